"""A backend that plays back recorded outputs: for tests, demos and integration without a network or a GPU."""

from collections.abc import Iterable

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.errors import BackendError
from grood_edge.outputs import Outputs, concatenated, select_rows
from grood_edge.runtime.backend import Backend

__all__ = ["Recorded", "ReplayBackend", "record"]

Recorded = tuple[np.ndarray, Outputs]  # frames uint8 [n, h, w, c] and their outputs; n may differ between batches


class ReplayBackend:
    """Answers each frame with the outputs that were recorded for the very same pixels."""

    provider = "replay"

    def __init__(self, recording: Iterable[Recorded]) -> None:
        self._rows = {
            frames[index].tobytes(): select_rows(outputs, slice(index, index + 1))
            for frames, outputs in recording
            for index in range(len(outputs))
        }

    def run(self, frames: Frames) -> Outputs:
        """Return the recorded outputs of these frames.

        Raises:
            BackendError: a frame that was not recorded.
        """
        keys = [frame.tobytes() for frame in frames]
        missing = [index for index, key in enumerate(keys) if key not in self._rows]
        if missing:
            raise BackendError(f"frame {missing[0]} of {len(keys)} is not in the recording; record it first")
        return concatenated([self._rows[key] for key in keys])

    def close(self) -> None:
        """Forget the recording."""
        self._rows = {}


def record(backend: Backend, batches: Iterable[np.ndarray]) -> list[Recorded]:
    """Run a real backend over batches uint8 `[n, h, w, c]` and keep what it answers, for a `ReplayBackend`."""
    return [(frames, backend.run(frames)) for frames in batches]
