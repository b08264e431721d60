"""The onnxruntime backend."""

from grood_edge.arrays import Frames
from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError
from grood_edge.ort import OrtModel, open_ort
from grood_edge.outputs import OUTPUT_NAMES, Outputs, outputs_from_arrays

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
        return outputs_from_arrays(self._model.run({"image": frames}, list(OUTPUT_NAMES)))

    def close(self) -> None:
        """Drop the onnxruntime session."""
        self._model = None
