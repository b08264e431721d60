"""The onnxruntime backend."""

from grood_edge.arrays import Frames
from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError
from grood_edge.ort import PROFILE, OrtModel, open_ort
from grood_edge.outputs import OUTPUT_NAMES, Outputs, concatenated, outputs_from_arrays

__all__ = ["OnnxRuntimeBackend"]


class OnnxRuntimeBackend:
    """Runs an artifact on the provider that was asked for, or raises `BackendError`."""

    def __init__(self, artifact: Artifact, provider: str = "cpu", threads: int | None = None) -> None:
        self.provider = provider
        self._model: OrtModel | None = open_ort(artifact.model, provider, threads)

    def run(self, frames: Frames) -> Outputs:
        """Run uint8 frames `[n, h, w, c]`; the outputs are new arrays.

        Raises:
            BackendError: the backend is closed, or onnxruntime failed.
        """
        if self._model is None:
            raise BackendError("the session is closed; open it again with open_session(...)")
        # TensorRT builds for batches up to a size; a larger one would be built for anew
        step = PROFILE[2] if self.provider == "tensorrt-ep" else max(1, len(frames))
        parts = [
            outputs_from_arrays(self._model.run({"image": frames[i : i + step]}, list(OUTPUT_NAMES)))
            for i in range(0, max(1, len(frames)), step)
        ]
        return parts[0] if len(parts) == 1 else concatenated(parts)

    def close(self) -> None:
        """Drop the onnxruntime session."""
        self._model = None
