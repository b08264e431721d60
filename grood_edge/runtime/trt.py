"""The TensorRT backend: runs an engine of an artifact with TensorRT 10, 11 or TensorRT-RTX."""

import threading
import weakref
from typing import Any

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.contract import Contract
from grood_edge.errors import BackendError, FrameError
from grood_edge.outputs import Outputs, concatenated, outputs_from_arrays
from grood_edge.runtime.decisions import decided_by
from grood_edge.runtime.gpu import Device
from grood_edge.runtime.trt_api import TrtApi
from grood_edge.runtime.trt_lane import Lane
from grood_edge.runtime.trt_plan import LoadedEngine, load_engine

__all__ = ["TrtBackend"]


class TrtBackend:
    """Runs an artifact's engine, from any number of threads at once.

    A thread gets an execution context of its own for the time of a run; contexts are kept and lent again, so that
    threads that come and go do not use up the GPU's memory. Larger batches than the engine's are split.
    """

    def __init__(
        self,
        api: TrtApi,
        plan: bytes,
        contract: Contract,
        device: Device,
        logger: Any,
        decide_on_host: bool = False,
    ) -> None:
        """Open a trusted plan.

        Args:
            api: the loaded TensorRT module.
            plan: the serialised engine. It is native code: check where it came from first.
            contract: of the artifact that the engine was built from, or of that artifact recalibrated.
            device: the GPU.
            logger: the process's TensorRT logger, which counts what it logs (`count`) and returns it (`since(count)`).
            decide_on_host: the contract was recalibrated since the engine was built: compute `p_value` and `is_ood`
                from the contract's calibration scores, not with the engine's.

        Raises:
            BackendError: TensorRT refuses the plan, it is not of this artifact, or the GPU's memory is full.
        """
        self.provider: str = api.family
        self._shape = contract.preprocessing.input_shape
        self._classes = len(contract.classes)
        self._rule = contract.calibration.rule(self._classes) if decide_on_host else None
        device.make_current()
        loaded = load_engine(api, plan, contract, logger)
        self.batch_range = (loaded.least, loaded.most)
        self._lanes = _Lanes(loaded, device)
        # also at the end of the process, before the modules that it needs are gone
        self._finalizer = weakref.finalize(self, self._lanes.close)
        self._lanes.give_back(self._lanes.take())  # memory that is missing is missed now

    @property
    def cuda_graphs(self) -> str:
        """What became of the CUDA graphs so far, as a phrase for a report."""
        return self._lanes.cuda_graphs()

    def run(self, frames: Frames) -> Outputs:
        """Run uint8 frames `[n, h, w, c]` of the engine's input size, n at least 1; the outputs are new arrays.

        Raises:
            FrameError: frames of another dtype or size, or none.
            BackendError: the backend is closed, or TensorRT or CUDA failed.
        """
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape or len(frames) == 0:
            h, w, c = self._shape
            raise FrameError(
                f"frames are {frames.dtype} {list(frames.shape)}; expected uint8 [n, {h}, {w}, {c}], n at least 1"
            )
        lane = self._lanes.take()
        try:
            most = self.batch_range[1]
            parts = [outputs_from_arrays(lane.run(frames[i : i + most])) for i in range(0, len(frames), most)]
        except BaseException:
            self._lanes.discard(lane)
            raise
        self._lanes.give_back(lane)
        outputs = parts[0] if len(parts) == 1 else concatenated(parts)
        if outputs.class_id.min() < 0 or outputs.class_id.max() >= self._classes:
            raise BackendError(
                f"the engine answered with class {outputs.class_id.max()} of {self._classes}: it computes nonsense. "
                "Run grood-edge selftest; --backend onnxruntime runs without TensorRT"
            )
        return outputs if self._rule is None else decided_by(self._rule, outputs)

    def close(self) -> None:
        """Release the engine and the GPU's memory; a run in another thread still ends, and releases its own part.

        Raises:
            BackendError: CUDA failed to release something; the rest was released.
        """
        self._finalizer()


class _Lanes:
    """Lanes to lend: as many as there were runs at the same time."""

    def __init__(self, loaded: LoadedEngine, device: Device) -> None:
        self._loaded: LoadedEngine | None = loaded
        self._device = device
        self._idle: list[Lane] = []
        self._lock = threading.Lock()

    def take(self) -> Lane:
        """Lend a lane, a new one if need be."""
        with self._lock:
            loaded = self._loaded
            if loaded is None:
                raise BackendError("the session is closed; open it again with open_session(...)")
            self._device.make_current()
            if self._idle:
                return self._idle.pop()
        return Lane(loaded, self._device)

    def give_back(self, lane: Lane) -> None:
        """Keep a lane for the next run; after `close` it is released instead."""
        with self._lock:
            is_open = self._loaded is not None
            if is_open:
                self._idle.append(lane)
        if not is_open:
            lane.close()

    def discard(self, lane: Lane) -> None:
        """Release a lane whose run failed: nobody knows what it would do next."""
        try:
            lane.close()
        except BackendError:  # the run's own error is the one to be told
            return

    def close(self) -> None:
        """Release all that is idle."""
        with self._lock:
            lanes, self._idle, self._loaded = self._idle, [], None
        errors: list[BackendError] = []
        try:
            self._device.make_current()  # another thread may close what this one opened
        except BackendError as error:
            errors.append(error)
        for lane in lanes:
            try:
                lane.close()
            except BackendError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def cuda_graphs(self) -> str:
        """Say which batch sizes are captured, or why none can be."""
        with self._lock:
            sizes = sorted({size for lane in self._idle for size in lane.captured_sizes})
            refusals = [lane.graph_refusal for lane in self._idle if lane.graph_refusal]
        if sizes:
            return f"captured for batch {', '.join(map(str, sizes))}"
        return f"not used: {refusals[0]}" if refusals else "none yet: a batch size is captured when it comes back"
