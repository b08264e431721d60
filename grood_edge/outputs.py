"""The outputs of an artifact's graph, as `docs/format.md` fixes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Features, Flags, Logits, Scores
from grood_edge.errors import BackendError

__all__ = ["OUTPUT_NAMES", "ClassIds", "Outputs", "concatenated", "outputs_from_arrays", "select_rows"]

ClassIds = np.ndarray  # int32 [n]

_DTYPES = {
    "logits": np.dtype(np.float32),
    "features": np.dtype(np.float32),
    "class_id": np.dtype(np.int32),
    "ood_score": np.dtype(np.float32),
    "p_value": np.dtype(np.float32),
    "is_ood": np.dtype(np.bool_),
    "valid": np.dtype(np.bool_),
}
OUTPUT_NAMES = tuple(_DTYPES)


@dataclass(frozen=True)
class Outputs:
    """One batch: logits float32 `[n, k]`, features float32 `[n, d]`, the rest `[n]` (class_id int32).

    `ood_score`: higher = more OOD. `p_value`: small = OOD. `is_ood` is at the artifact's own alpha.
    """

    logits: Logits
    features: Features
    class_id: ClassIds
    ood_score: Scores
    p_value: Scores
    is_ood: Flags
    valid: Flags

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.class_id)


def outputs_from_arrays(arrays: Mapping[str, np.ndarray]) -> Outputs:
    """Check dtypes and batch size of a backend's arrays.

    Raises:
        BackendError: an output is missing, or has another dtype or batch size than the format says.
    """
    for name, dtype in _DTYPES.items():
        if name not in arrays or arrays[name].dtype != dtype:
            found = arrays[name].dtype if name in arrays else "missing"
            raise BackendError(f"the backend's output {name!r} is {found}; expected {dtype}")
    if len({len(arrays[name]) for name in OUTPUT_NAMES}) != 1:
        sizes = {name: len(arrays[name]) for name in OUTPUT_NAMES}
        raise BackendError(f"the backend's outputs have different batch sizes: {sizes}")
    return Outputs(**{name: arrays[name] for name in OUTPUT_NAMES})


def select_rows(outputs: Outputs, rows: slice | np.ndarray) -> Outputs:
    """Return the outputs of the chosen images: a slice, bool `[n]`, or indices."""
    return Outputs(**{name: getattr(outputs, name)[rows] for name in OUTPUT_NAMES})


def concatenated(parts: Sequence[Outputs]) -> Outputs:
    """Return the outputs of several runs as one batch."""
    return Outputs(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in OUTPUT_NAMES})
