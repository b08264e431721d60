"""The onnxruntime backend."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError
from grood_edge.ort import PROFILE, OrtModel, open_ort
from grood_edge.outputs import OUTPUT_NAMES, Outputs, concatenated, outputs_from_arrays
from grood_edge.runtime.backend import FreshLane, Lane

__all__ = ["OnnxRuntimeBackend"]

MOST_IDLE = 16  # lanes that are kept; each has the buffers of one batch
MOST_KEPT = 32  # frames of a lane that is kept


class OnnxRuntimeBackend:
    """Runs an artifact on the provider that was asked for, or raises `BackendError`. Any number of threads may use it.

    On the CPU it lends lanes, whose buffers are bound once; a thread has one to itself for the time of a run.
    """

    def __init__(self, artifact: Artifact, provider: str = "cpu", threads: int | None = None) -> None:
        self.provider = provider
        model = open_ort(artifact.model, provider, threads)
        self._model: OrtModel | None = model
        self._shape = tuple(model.inputs["image"][1:])
        self._idle: deque[_BoundLane] = deque(maxlen=MOST_IDLE)  # a further one pushes out the oldest
        self._lock = threading.Lock()

    def run(self, frames: Frames) -> Outputs:
        """Run uint8 frames `[n, h, w, c]`; the outputs are new arrays.

        Raises:
            BackendError: the backend is closed, or onnxruntime failed.
        """
        model = self._opened()
        # TensorRT builds for batches up to a size; a larger one would be built for anew
        step = PROFILE[2] if self.provider == "tensorrt-ep" else max(1, len(frames))
        parts = [
            outputs_from_arrays(model.run({"image": frames[i : i + step]}, list(OUTPUT_NAMES)))
            for i in range(0, max(1, len(frames)), step)
        ]
        return parts[0] if len(parts) == 1 else concatenated(parts)

    @contextmanager
    def lend(self, count: int) -> Iterator[Lane]:
        """Lend buffers for `count` frames: kept ones on the CPU, new ones for a GPU.

        Raises:
            BackendError: the backend is closed.
        """
        if self.provider != "cpu":
            yield FreshLane(self, (count, *self._shape))
            return
        lane = self._taken(count)
        try:
            yield lane
        finally:
            with self._lock:
                if self._model is not None and count <= MOST_KEPT:
                    self._idle.append(lane)

    def _taken(self, count: int) -> "_BoundLane":
        with self._lock:
            model = self._opened()
            for lane in reversed(self._idle):
                if len(lane.frames) == count:
                    self._idle.remove(lane)
                    return lane
        return _BoundLane(model, (count, *self._shape))

    def _opened(self) -> OrtModel:
        model = self._model
        if model is None:
            raise BackendError("the session is closed; open it again with open_session(...)")
        return model

    def close(self) -> None:
        """Drop the onnxruntime session; a run in another thread still ends."""
        with self._lock:
            self._model = None
            self._idle.clear()


class _BoundLane:
    """Arrays of one batch, bound to the model as its input and outputs by the first run, which shows their shapes."""

    def __init__(self, model: OrtModel, shape: tuple[int, ...]) -> None:
        self.frames: Frames = np.zeros(shape, np.uint8)
        self._model = model
        self._run_bound: Callable[[], None] | None = None
        self._outputs: Outputs

    def run(self) -> Outputs:
        """Run the frames; the outputs are overwritten by the next run."""
        if self._run_bound is not None:
            self._run_bound()
            return self._outputs
        arrays = self._model.run({"image": self.frames}, list(OUTPUT_NAMES))
        outputs = outputs_from_arrays(arrays)
        buffers = {name: np.empty_like(array, order="C") for name, array in arrays.items()}
        self._outputs = outputs_from_arrays(buffers)
        self._run_bound = self._model.bind({"image": self.frames}, buffers)
        return outputs
