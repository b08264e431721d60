"""The seam between a session and whatever runs the graph: onnxruntime, a recording, later TensorRT."""

from typing import Protocol, runtime_checkable

from grood_edge.arrays import Frames
from grood_edge.outputs import Outputs

__all__ = ["Backend"]


@runtime_checkable
class Backend(Protocol):
    """Runs an artifact's graph. A Protocol because users bring their own, and tests run without hardware."""

    provider: str

    def run(self, frames: Frames) -> Outputs:
        """Run uint8 frames `[n, h, w, c]` of the graph's input size; the caller owns the outputs."""

    def close(self) -> None:
        """Release the device; `run` must not be called afterwards."""
