"""The seam between a session and whatever runs the graph: onnxruntime, an engine, a recording."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.outputs import Outputs

__all__ = ["Backend", "FreshLane", "Lane", "LendingBackend"]


@runtime_checkable
class Backend(Protocol):
    """Runs an artifact's graph. A Protocol because users bring their own, and tests run without hardware."""

    provider: str

    def run(self, frames: Frames) -> Outputs:
        """Run uint8 frames `[n, h, w, c]` of the graph's input size; the caller owns the outputs."""

    def close(self) -> None:
        """Release the device; `run` must not be called afterwards."""


class Lane(Protocol):
    """Buffers of one batch, for one thread at a time.

    frames: uint8 `[n, h, w, c]`, to be filled before each run.
    """

    frames: Frames

    def run(self) -> Outputs:
        """Run what stands in `frames`; the outputs belong to the lane, and its next run may overwrite them."""


@runtime_checkable
class LendingBackend(Backend, Protocol):
    """A backend that also lends its own buffers, so that nothing is allocated and copied per frame."""

    def lend(self, count: int) -> AbstractContextManager[Lane]:
        """Lend buffers for `count` frames to the thread that asks, until the block ends."""


class FreshLane:
    """New arrays for one run of a backend that lends nothing."""

    def __init__(self, backend: Backend, shape: tuple[int, ...]) -> None:
        self.frames: Frames = np.empty(shape, np.uint8)
        self._backend = backend

    def run(self) -> Outputs:
        """Run the frames through the backend."""
        return self._backend.run(self.frames)
