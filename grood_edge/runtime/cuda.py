"""The little of CUDA that a backend needs: buffers, a stream, graphs; through the package cuda-bindings.

Every return code is checked. What is opened here is released exactly once, by `close`, in whatever state the device is.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.runtime.gpu import Buffer, DeviceInfo, Graph

__all__ = ["CudaDevice", "CudaStream", "device_count", "device_info", "load_cudart", "open_device"]

_UNLOADING = "cudaErrorCudartUnloading"  # the process is ending: the driver has released everything itself
_ADVICE = {
    "cudaErrorMemoryAllocation": "the GPU's memory is full: close other programs on it, or build the engine for a "
    "smaller batch with grood-edge compile --batch",
    "cudaErrorInsufficientDriver": "no NVIDIA driver, or one too old for this cuda-bindings: install or update the "
    "driver, or run with --backend onnxruntime",
    "cudaErrorNoDevice": "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with "
    "--backend onnxruntime",
    "cudaErrorUnsupportedPtxVersion": "the driver is older than what was compiled for it: update the driver",
}
_OTHERWISE = "restart the program; if it happens again, run grood-edge selftest and look for driver messages in dmesg"


def load_cudart() -> Any:
    """Import the CUDA runtime of cuda-bindings.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        BackendError: it is there and cannot be loaded.
    """
    try:
        from cuda.bindings import runtime
    except ModuleNotFoundError as error:
        raise MissingExtraError("cuda-bindings", "cuda", "Running TensorRT engines") from error
    except ImportError as error:
        raise BackendError(f"cuda-bindings cannot be loaded ({error}); install it again") from error
    return runtime


def device_count(cudart: Any) -> tuple[int, str]:
    """Return the number of GPUs, and when it is 0 the reason; never raises for a machine without one."""
    try:
        code, count = cudart.cudaGetDeviceCount()
    except RuntimeError as error:  # cuda-bindings 12 without a driver; 13 returns a code
        return 0, f"no NVIDIA driver ({error})"
    if code != cudart.cudaError_t.cudaSuccess:
        return 0, _described(cudart, code)
    return int(count), "" if count else "cudaErrorNoDevice: " + _ADVICE["cudaErrorNoDevice"]


def device_info(cudart: Any) -> DeviceInfo:
    """Describe the calling thread's current GPU.

    Raises:
        BackendError: there is none, or CUDA failed.
    """
    count, reason = device_count(cudart)
    if count == 0:
        raise BackendError(f"no CUDA device can be used: {reason}")
    index = int(_checked(cudart, cudart.cudaGetDevice(), "finding the current device"))
    properties = _checked(cudart, cudart.cudaGetDeviceProperties(index), "describing the device")
    driver = int(_checked(cudart, cudart.cudaDriverGetVersion(), "asking for the driver's version"))
    name = properties.name
    text = name.split(b"\0")[0].decode(errors="replace") if isinstance(name, bytes) else str(name)
    return DeviceInfo(
        index=index,
        name=text.strip(),
        compute_capability=(int(properties.major), int(properties.minor)),
        driver=(driver // 1000, driver % 1000 // 10),
        integrated=bool(properties.integrated) and bool(properties.canMapHostMemory),
        memory=int(properties.totalGlobalMem),
    )


def open_device(cudart: Any = None) -> "CudaDevice":
    """Open the calling thread's current GPU; `cudart`: another module of the same functions, None for cuda-bindings.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        BackendError: there is no usable GPU; names CUDA's error.
    """
    cudart = load_cudart() if cudart is None else cudart
    return CudaDevice(cudart, device_info(cudart))


@dataclass(frozen=True)
class CudaDevice:
    """The GPU of an open backend; it holds nothing by itself."""

    cudart: Any
    info: DeviceInfo

    def make_current(self) -> None:
        """Make it the calling thread's device: new threads start on device 0.

        Raises:
            BackendError: CUDA refused.
        """
        _checked(self.cudart, self.cudart.cudaSetDevice(self.info.index), f"choosing device {self.info.index}")

    def open_stream(self) -> "CudaStream":
        """Return a new stream, which does not wait for the default one.

        Raises:
            BackendError: CUDA refused.
        """
        flags = self.cudart.cudaStreamNonBlocking
        stream = _checked(self.cudart, self.cudart.cudaStreamCreateWithFlags(flags), "creating a stream")
        return CudaStream(self.cudart, self.info.integrated, stream)


@dataclass(eq=False)
class CudaStream:
    """A stream, and the buffers and graphs that belong to it. For one thread at a time."""

    cudart: Any
    mapped: bool
    stream: Any
    _buffers: list[Buffer] = field(default_factory=list)
    _graphs: list[Graph] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.handle = int(self.stream)

    def allocate(self, size: int) -> Buffer:
        """Return a new buffer; on an integrated GPU one memory for both sides, so that nothing is copied.

        Raises:
            BackendError: not enough memory.
        """
        cudart, what = self.cudart, f"allocating {size:,} bytes"
        flags = cudart.cudaHostAllocMapped if self.mapped else cudart.cudaHostAllocDefault
        host = _checked(cudart, cudart.cudaHostAlloc(size, flags), f"{what} of pinned memory")
        try:
            if self.mapped:
                device = _checked(cudart, cudart.cudaHostGetDevicePointer(host, 0), "mapping pinned memory")
            else:
                device = _checked(cudart, cudart.cudaMalloc(size), what)
        except BackendError:
            cudart.cudaFreeHost(host)
            raise
        buffer = Buffer(int(device), int(host), size, self.mapped)
        self._buffers.append(buffer)
        return buffer

    def upload(self, buffer: Buffer, size: int) -> None:
        """Copy the first `size` bytes from the host side to the device; nothing to do for mapped memory.

        Raises:
            BackendError: CUDA refused.
        """
        if not buffer.mapped:
            self._copy(buffer.device, buffer.host, size, self.cudart.cudaMemcpyKind.cudaMemcpyHostToDevice)

    def download(self, buffer: Buffer, size: int) -> None:
        """Copy the first `size` bytes from the device to the host side; nothing to do for mapped memory.

        Raises:
            BackendError: CUDA refused.
        """
        if not buffer.mapped:
            self._copy(buffer.host, buffer.device, size, self.cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost)

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        result = self.cudart.cudaMemcpyAsync(target, source, size, kind, self.stream)
        _checked(self.cudart, result, f"copying {size:,} bytes")

    def synchronize(self) -> None:
        """Wait for all work on the stream; errors of earlier calls may appear here.

        Raises:
            BackendError: the work failed.
        """
        _checked(self.cudart, self.cudart.cudaStreamSynchronize(self.stream), "waiting for the GPU")

    def capture(self, work: Callable[[], object]) -> Graph:
        """Record what `work` puts on the stream as a graph.

        Raises:
            BackendError: the work cannot be captured, or failed; the stream can be used on.
        """
        # thread-local: what other threads allocate or free meanwhile neither fails nor spoils the capture
        mode = self.cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _checked(self.cudart, self.cudart.cudaStreamBeginCapture(self.stream, mode), "beginning a capture")
        try:
            work()
        except BaseException:
            self._abandon_capture()
            raise
        ended = self.cudart.cudaStreamEndCapture(self.stream)
        captured = self._or_clear(ended, "capturing a CUDA graph")
        try:
            executable = self._or_clear(self.cudart.cudaGraphInstantiate(captured, 0), "instantiating a CUDA graph")
        finally:
            self.cudart.cudaGraphDestroy(captured)
        graph = Graph(executable)
        self._graphs.append(graph)
        return graph

    def _or_clear(self, result: tuple[Any, ...], what: str) -> Any:
        """Check; a failed capture leaves an error behind that the next, innocent call would report."""
        try:
            return _checked(self.cudart, result, what)
        except BackendError:
            self.cudart.cudaGetLastError()
            raise

    def _abandon_capture(self) -> None:
        code, captured = self.cudart.cudaStreamEndCapture(self.stream)
        if code == self.cudart.cudaError_t.cudaSuccess:
            self.cudart.cudaGraphDestroy(captured)
        self.cudart.cudaGetLastError()

    def launch(self, graph: Graph) -> None:
        """Put a captured graph on the stream.

        Raises:
            BackendError: CUDA refused.
        """
        _checked(self.cudart, self.cudart.cudaGraphLaunch(graph.executable, self.stream), "launching a CUDA graph")

    def elapsed(self, work: Callable[[], object]) -> float:
        """Return the milliseconds that the GPU spends on what `work` puts on the stream.

        Raises:
            BackendError: CUDA failed.
        """
        cudart, events = self.cudart, []
        try:
            for _ in range(2):
                created = cudart.cudaEventCreateWithFlags(cudart.cudaEventDefault)
                events.append(_checked(cudart, created, "creating an event"))
            _checked(cudart, cudart.cudaEventRecord(events[0], self.stream), "recording an event")
            work()
            _checked(cudart, cudart.cudaEventRecord(events[1], self.stream), "recording an event")
            _checked(cudart, cudart.cudaEventSynchronize(events[1]), "waiting for an event")
            return float(_checked(cudart, cudart.cudaEventElapsedTime(events[0], events[1]), "reading a time"))
        finally:
            for event in events:
                cudart.cudaEventDestroy(event)

    def close(self) -> None:
        """Release graphs, buffers and the stream, each once, and all of them even where some fail.

        Raises:
            BackendError: a release failed; the others were done.
        """
        cudart, stream, self.stream = self.cudart, self.stream, None
        if stream is None:
            return
        releases: list[tuple[Callable[..., tuple[Any, ...]], Any]] = [(cudart.cudaStreamSynchronize, stream)]
        releases += [(cudart.cudaGraphExecDestroy, graph.executable) for graph in self._graphs]
        for buffer in self._buffers:
            releases += [] if buffer.mapped else [(cudart.cudaFree, buffer.device)]
            releases.append((cudart.cudaFreeHost, buffer.host))
        releases.append((cudart.cudaStreamDestroy, stream))
        self._graphs, self._buffers = [], []
        failures = []
        for release, handle in releases:
            code = release(handle)[0]
            if code != cudart.cudaError_t.cudaSuccess and _name(cudart, code) != _UNLOADING:
                failures.append(f"{release.__name__}: {_described(cudart, code)}")
        if failures:
            raise BackendError(f"releasing the GPU failed: {failures[0]}")


def _checked(cudart: Any, result: tuple[Any, ...], what: str) -> Any:
    """Return what a call returned beside its code.

    Raises:
        BackendError: the code is not success.
    """
    if result[0] != cudart.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA failed at {what}: {_described(cudart, result[0])}")
    return result[1] if len(result) > 1 else None


def _described(cudart: Any, code: Any) -> str:
    name = _name(cudart, code)
    text = ""
    with suppress(Exception):  # a message must not fail for its own details
        text = cudart.cudaGetErrorString(code)[1].decode()
    return f"{name} ({text}); {_ADVICE.get(name, _OTHERWISE)}" if text else f"{name}; {_ADVICE.get(name, _OTHERWISE)}"


def _name(cudart: Any, code: Any) -> str:
    return str(getattr(code, "name", None) or f"CUDA error {code}")
