"""One lane through an engine: a stream, buffers for the largest batch, execution contexts, captured graphs."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.errors import BackendError
from grood_edge.runtime.gpu import Device, Graph
from grood_edge.runtime.trt_plan import EngineTensor, LoadedEngine, logged_reason

__all__ = ["MAX_GRAPHS", "Lane"]

MAX_GRAPHS = 4  # batch sizes; each has a context of its own, and so device memory for all activations


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph and the context whose memory it uses; the context runs nothing else, so its shapes never change."""

    context: Any
    graph: Graph


class Lane:
    """Runs batches of `least` to `most` images, for one thread at a time.

    A batch size that comes back gets a CUDA graph: the second run of it goes through a new context, which makes that
    run the warm-up that a capture needs. Where nothing can be captured, `graph_refusal` says why, and runs go on.
    """

    def __init__(self, loaded: LoadedEngine, device: Device) -> None:
        self._loaded = loaded
        self._said = 0  # messages that TensorRT had logged before this run
        self._stream = device.open_stream()
        self._captured: dict[int, _Captured] = {}
        self._seen: set[int] = set()
        self.graph_refusal = ""
        try:
            self._buffers = {t.name: self._stream.allocate(t.row_bytes * loaded.most) for t in loaded.tensors}
            self._context = loaded.new_context()
        except BaseException:
            self.close()
            raise

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Batch sizes that have a CUDA graph."""
        return tuple(sorted(self._captured))

    def run(self, frames: Frames) -> dict[str, np.ndarray]:
        """Run uint8 frames `[n, h, w, c]`, n at most `most`; returns new arrays `[n, ...]` by name.

        Raises:
            BackendError: TensorRT or CUDA failed; close the lane then.
        """
        size = max(len(frames), self._loaded.least)
        self._said = self._loaded.logger.count
        for tensor in self._inputs():
            host = self._host(tensor, size)
            host[: len(frames)] = frames
            host[len(frames) :] = 0
        if size in self._captured:
            self._stream.launch(self._captured[size].graph)
            self._stream.synchronize()
        elif size in self._seen and not self.graph_refusal and len(self._captured) < MAX_GRAPHS:
            self._run_and_capture(size)
        else:
            self._run(self._context, size)
        self._seen.add(size)
        return {t.name: self._host(t, len(frames)).copy() for t in self._outputs()}

    def _run(self, context: Any, size: int) -> None:
        self._prepare(context, size)
        self._enqueue(context, size)
        self._stream.synchronize()

    def _run_and_capture(self, size: int) -> None:
        try:
            context = self._loaded.new_context()
        except BackendError as error:
            self.graph_refusal = str(error)
            self._run(self._context, size)
            return
        self._run(context, size)
        # TensorRT-RTX can tell; for TensorRT the capture itself is the test
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._stream.handle):
            self.graph_refusal = "TensorRT-RTX says that this engine's stream cannot be captured"
            return
        try:
            graph = self._stream.capture(lambda: self._enqueue(context, size))
        except BackendError as error:
            self.graph_refusal = str(error)
        else:
            self._captured[size] = _Captured(context, graph)

    def _prepare(self, context: Any, size: int) -> None:
        for tensor in self._inputs():
            if not context.set_input_shape(tensor.name, (size, *tensor.row)):
                raise self._failure(f"refused a batch of {size}")
        try:
            unknown = context.infer_shapes()
        except RuntimeError as error:
            raise self._failure(f"cannot infer the shapes of a batch of {size} ({error})") from error
        if unknown:
            raise self._failure(f"does not know the shapes of {', '.join(unknown)} for a batch of {size}")
        for tensor in self._loaded.tensors:
            shape = tuple(context.get_tensor_shape(tensor.name))
            if shape != (size, *tensor.row):  # the buffers are made for this and no more
                raise self._failure(f"gives {tensor.name!r} the shape {shape}, not {(size, *tensor.row)},")
            if not context.set_tensor_address(tensor.name, self._buffers[tensor.name].device):
                raise self._failure(f"refused the address of {tensor.name!r}")

    def _enqueue(self, context: Any, size: int) -> None:
        for tensor in self._inputs():
            self._stream.upload(self._buffers[tensor.name], size * tensor.row_bytes)
        if not context.execute_async_v3(self._stream.handle):
            raise self._failure(f"did not run a batch of {size}")
        for tensor in self._outputs():
            self._stream.download(self._buffers[tensor.name], size * tensor.row_bytes)

    def _failure(self, what: str) -> BackendError:
        reason = logged_reason(self._loaded.logger, self._said)
        return BackendError(
            f"TensorRT {what}: {reason}. Run grood-edge selftest; --backend onnxruntime runs without TensorRT"
        )

    def _inputs(self) -> list[EngineTensor]:
        return [tensor for tensor in self._loaded.tensors if tensor.is_input]

    def _outputs(self) -> list[EngineTensor]:
        return [tensor for tensor in self._loaded.tensors if not tensor.is_input]

    def _host(self, tensor: EngineTensor, rows: int) -> np.ndarray:
        raw = self._buffers[tensor.name].view()[: rows * tensor.row_bytes]
        array: np.ndarray = raw.view(tensor.dtype).reshape(rows, *tensor.row)
        return array

    def close(self) -> None:
        """Release graphs before the contexts whose memory they use, then the rest.

        Raises:
            BackendError: CUDA failed to release something; the rest was released.
        """
        try:
            self._stream.close()  # waits for what still runs, then graphs, buffers, stream
        finally:
            self._captured, self._context = {}, None
