"""onnxruntime, opened strictly: the provider that was asked for is the provider that runs, or an error.

onnxruntime itself falls back to the CPU with no more than a line on stderr.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from grood_edge.errors import BackendError, MissingExtraError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["PROVIDERS", "OrtModel", "open_ort"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtModel:
    """An open onnxruntime session: named arrays in, named arrays out."""

    def __init__(self, session: "onnxruntime.InferenceSession") -> None:
        self._session = session
        self.inputs = {i.name: tuple(i.shape) for i in session.get_inputs()}
        self.outputs = [o.name for o in session.get_outputs()]

    def batch(self, most: int) -> int:
        """Return how many images to run at a time: `most`, or 1 where the model takes no other batch."""
        return 1 if next(iter(self.inputs.values()))[0] == 1 else most

    def run(self, feeds: Mapping[str, np.ndarray], outputs: list[str] | None = None) -> dict[str, np.ndarray]:
        """Run the model; returns the named outputs, or all.

        Raises:
            BackendError: onnxruntime refused the inputs or failed.
        """
        names = self.outputs if outputs is None else outputs
        try:
            values = self._session.run(names, dict(feeds))
        except Exception as error:  # the only base class that onnxruntime's exceptions share
            raise BackendError(f"onnxruntime failed: {_first_line(error)}") from error
        return dict(zip(names, values, strict=True))


def open_ort(model: bytes, provider: str = "cpu", threads: int | None = None) -> OrtModel:
    """Open a model from its bytes.

    Args:
        model: the ONNX file's bytes.
        provider: `cpu` or `cuda`.
        threads: threads within an operator; None leaves it to onnxruntime.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        BackendError: unknown or unavailable provider, or a model that onnxruntime refuses.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu", "Running a model") from error
    if provider not in PROVIDERS:
        raise BackendError(f"provider {provider!r} is unknown; expected one of {', '.join(PROVIDERS)}")
    name = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise BackendError(
            f"provider {provider!r} was asked for, but this onnxruntime {onnxruntime.__version__} has no {name}. "
            "Install onnxruntime-gpu in its place (pip install 'grood-edge[gpu]'), or use --provider cpu"
        )
    options: Any = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors arrive as exceptions
    # Its own format is recognised by four bytes in the middle of a file; only what was checked may be loaded.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    if threads is not None:
        options.intra_op_num_threads = threads
    if provider != "cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(model, options, providers=[name])
    except Exception as error:  # the only base class that onnxruntime's exceptions share
        raise BackendError(f"onnxruntime cannot open the model on {provider}: {_first_line(error)}") from error
    if session.get_providers()[0] != name:
        raise BackendError(
            f"provider {provider!r} was asked for, but onnxruntime fell back to {session.get_providers()[0]}: "
            "its libraries could not be loaded. Check the CUDA and cuDNN installation, or use --provider cpu"
        )
    return OrtModel(session)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
