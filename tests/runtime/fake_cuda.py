# ruff: noqa: N802, N815 -- the names are CUDA's
"""A CUDA runtime without a GPU: real bytes, late execution, and no forgiveness.

It stands in for the module `cuda.bindings.runtime`. Work on a stream happens when somebody waits for it, as late as
CUDA allows: a host that reads or writes too early sees it. Device memory has addresses that the host cannot touch.
What CUDA would leave undefined (use after free, double free, a copy past the end of a buffer, a stream destroyed with
work on it, the wrong thread's device) raises `Misuse`.
"""

import enum
import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

DEVICE_BASE = 0x7F00_0000_0000_0000  # not canonical on any machine: the host would crash there
GARBAGE = 0xA5  # of fresh memory


class Misuse(BaseException):
    """What CUDA leaves undefined; no handler for errors may swallow it."""


class Code(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorCudartUnloading = 4
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorIllegalAddress = 700
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class CopyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


class CaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


@dataclass(eq=False)
class Handle:
    """A stream, graph, executable graph or event; `work` is what it holds."""

    kind: str
    number: int
    device: int
    work: list[Callable[[], None]] = field(default_factory=list)
    capture: list[Callable[[], None]] | None = None
    broken: bool = False

    def __int__(self) -> int:
        return self.number


@dataclass(eq=False)
class Memory:
    kind: str  # host, mapped or device
    base: int
    data: np.ndarray


def call(function: Callable[..., Any]) -> Any:
    """Log the call, let it fail where the test says so, and hold the lock."""

    @functools.wraps(function)
    def wrapped(self: "FakeCudart", *args: Any) -> Any:
        name = function.__name__
        with self.lock:
            self.calls.append(name)
            self.counts[name] += 1
            code = self.fail.get((name, self.counts[name]), self.fail.get((name, 0)))
            if code is not None:
                return (code, None) if name in RETURNING else (code,)
            return function(self, *args)

    return wrapped


RETURNING = {  # functions that return something beside the code
    "cudaGetDeviceCount",
    "cudaGetDevice",
    "cudaGetDeviceProperties",
    "cudaDriverGetVersion",
    "cudaStreamCreateWithFlags",
    "cudaHostAlloc",
    "cudaHostGetDevicePointer",
    "cudaMalloc",
    "cudaStreamEndCapture",
    "cudaGraphInstantiate",
    "cudaEventCreateWithFlags",
    "cudaEventElapsedTime",
}
OK = Code.cudaSuccess


class FakeCudart:
    """`fail`: (function, n) -> code, for its n-th call (from 1); n = 0 for every call."""

    cudaError_t = Code
    cudaMemcpyKind = CopyKind
    cudaStreamCaptureMode = CaptureMode
    cudaStreamNonBlocking = 1
    cudaHostAllocDefault = 0
    cudaHostAllocMapped = 2
    cudaEventDefault = 0

    def __init__(self, integrated: bool = False, device: int = 0) -> None:
        self.fail: dict[tuple[str, int], Code] = {}
        self.calls: list[str] = []
        self.counts: Counter[str] = Counter()
        self.lock = threading.RLock()
        self.memory: dict[int, Memory] = {}
        self.handles: dict[int, Handle] = {}
        self.last_error: Code = OK
        self._integrated = integrated
        self._next = DEVICE_BASE
        self._threads = threading.local()
        self._threads.device = device

    # What a test asks

    def alive(self) -> list[str]:
        """Return the kinds of all that was not released."""
        return sorted([m.kind for m in self.memory.values()] + [h.kind for h in self.handles.values()])

    def submit(self, stream: int, work: Callable[[], None]) -> bool:
        """Put work on a stream, as TensorRT does by its handle; tells whether it is being captured."""
        with self.lock:
            handle = self._live(stream, "stream")
            (handle.work if handle.capture is None else handle.capture).append(work)
            return handle.capture is not None

    def is_capturing(self, stream: int) -> bool:
        return self._live(stream, "stream").capture is not None

    def spoil_capture(self, stream: int) -> None:
        self._live(stream, "stream").broken = True

    def at(self, address: int, size: int, side: str) -> np.ndarray:
        """Return the bytes at an address as the `host` or the `device` sees them."""
        for memory in self.memory.values():
            offset = address - memory.base
            if 0 <= offset < memory.data.size:
                if offset + size > memory.data.size:
                    raise Misuse(f"{size} bytes at {offset} of a buffer of {memory.data.size}")
                sides = {"host": ("host",), "mapped": ("device",), "device": ("device",)}[memory.kind]
                if side not in sides:
                    raise Misuse(f"{memory.kind} memory used from the {side}")
                return memory.data[offset : offset + size]
        raise Misuse(f"no live memory at {address:#x}: used after free, or never allocated")

    # Devices

    @call
    def cudaGetDeviceCount(self) -> Any:
        return OK, 2

    @call
    def cudaGetDevice(self) -> Any:
        return OK, self._device()

    @call
    def cudaSetDevice(self, device: int) -> Any:
        self._threads.device = device
        return (OK,)

    @call
    def cudaGetDeviceProperties(self, device: int) -> Any:
        flags = {"integrated": int(self._integrated), "canMapHostMemory": 1}
        name = b"Fake Orin" + bytes(4) if self._integrated else b"Fake RTX" + bytes(4)
        return OK, SimpleNamespace(name=name, major=8, minor=7, totalGlobalMem=8 << 30, **flags)

    @call
    def cudaDriverGetVersion(self) -> Any:
        return OK, 12060

    @call
    def cudaGetErrorString(self, error: Code) -> Any:
        return OK, error.name.removeprefix("cudaError").lower().encode()

    @call
    def cudaGetLastError(self) -> Any:
        last, self.last_error = self.last_error, OK
        return (last,)

    # Memory

    @call
    def cudaMalloc(self, size: int) -> Any:
        self._next += 1 << 32
        return OK, self._add("device", self._next, np.full(size, GARBAGE, np.uint8))

    @call
    def cudaHostAlloc(self, size: int, flags: int) -> Any:
        data = np.full(size, GARBAGE, np.uint8)
        return OK, self._add("host", data.ctypes.data, data)

    @call
    def cudaHostGetDevicePointer(self, pointer: int, flags: int) -> Any:
        self._next += 1 << 32
        return OK, self._add("mapped", self._next, self.memory[pointer].data)

    @call
    def cudaFree(self, pointer: int) -> Any:
        return self._free(pointer, "device")

    @call
    def cudaFreeHost(self, pointer: int) -> Any:
        data = self.memory[pointer].data if pointer in self.memory else None
        for alias in [m for m in self.memory.values() if m.kind == "mapped" and m.data is data]:
            del self.memory[alias.base]
        return self._free(pointer, "host")

    @call
    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: CopyKind, stream: Handle) -> Any:
        up = kind == CopyKind.cudaMemcpyHostToDevice
        target_side, source_side = ("device", "host") if up else ("host", "device")

        def copy() -> None:
            self.at(target, size, target_side)[:] = self.at(source, size, source_side)

        self.at(target, size, target_side), self.at(source, size, source_side)
        self.submit(int(stream), copy)
        return (OK,)

    # Streams

    @call
    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        if flags != self.cudaStreamNonBlocking:
            raise Misuse("a stream that waits for the default stream")
        return OK, self._handle("stream")

    @call
    def cudaStreamDestroy(self, stream: Handle) -> Any:
        return self._destroy(stream, "stream")

    @call
    def cudaStreamSynchronize(self, stream: Handle) -> Any:
        handle = self._live(int(stream), "stream")
        if handle.capture is not None:
            handle.broken = True
            return self._error(Code.cudaErrorStreamCaptureUnsupported)
        work, handle.work = handle.work, []
        for step in work:
            step()
        return (OK,)

    @call
    def cudaStreamBeginCapture(self, stream: Handle, mode: CaptureMode) -> Any:
        handle = self._live(int(stream), "stream")
        handle.capture, handle.broken = [], False
        return (OK,)

    @call
    def cudaStreamEndCapture(self, stream: Handle) -> Any:
        handle = self._live(int(stream), "stream")
        if handle.capture is None:
            raise Misuse("a capture that was not begun")
        work, handle.capture = handle.capture, None
        if handle.broken:
            return (*self._error(Code.cudaErrorStreamCaptureInvalidated), None)
        return OK, self._handle("graph", work)

    # Graphs and events

    @call
    def cudaGraphInstantiate(self, graph: Handle, flags: int) -> Any:
        return OK, self._handle("executable", self._live(int(graph), "graph").work)

    @call
    def cudaGraphLaunch(self, executable: Handle, stream: Handle) -> Any:
        for step in self._live(int(executable), "executable").work:
            self.submit(int(stream), step)
        return (OK,)

    @call
    def cudaGraphDestroy(self, graph: Handle) -> Any:
        return self._destroy(graph, "graph")

    @call
    def cudaGraphExecDestroy(self, executable: Handle) -> Any:
        return self._destroy(executable, "executable")

    @call
    def cudaEventCreateWithFlags(self, flags: int) -> Any:
        return OK, self._handle("event")

    @call
    def cudaEventRecord(self, event: Handle, stream: Handle) -> Any:
        handle = self._live(int(event), "event")
        handle.broken = True  # until the stream has come there

        def passed() -> None:
            handle.broken = False

        self.submit(int(stream), passed)
        handle.work = [lambda: self.cudaStreamSynchronize(stream)]
        return (OK,)

    @call
    def cudaEventSynchronize(self, event: Handle) -> Any:
        for wait in self._live(int(event), "event").work:
            wait()
        return (OK,)

    @call
    def cudaEventElapsedTime(self, start: Handle, end: Handle) -> Any:
        if start.broken or end.broken:
            raise Misuse("the time of an event that has not happened")
        return OK, 0.25

    @call
    def cudaEventDestroy(self, event: Handle) -> Any:
        return self._destroy(event, "event")

    def _device(self) -> int:
        return int(getattr(self._threads, "device", 0))

    def _error(self, code: Code) -> tuple[Code]:
        self.last_error = code
        return (code,)

    def _add(self, kind: str, base: int, data: np.ndarray) -> int:
        self.memory[base] = Memory(kind, base, data)
        return base

    def _free(self, pointer: int, kind: str) -> tuple[Code]:
        if pointer not in self.memory or self.memory[pointer].kind != kind:
            raise Misuse(f"freed twice, or never allocated as {kind} memory: {pointer:#x}")
        self.memory.pop(pointer).data[:] = GARBAGE
        return (OK,)

    def _handle(self, kind: str, work: list[Callable[[], None]] | None = None) -> Handle:
        handle = Handle(kind, 1000 + self.counts.total(), self._device(), list(work or []))
        self.handles[handle.number] = handle
        return handle

    def _live(self, number: int, kind: str) -> Handle:
        handle = self.handles.get(number)
        if handle is None or handle.kind != kind:
            raise Misuse(f"{kind} {number} was destroyed, or never made")
        if handle.device != self._device():
            raise Misuse(f"a {kind} of device {handle.device} used while the thread's device is {self._device()}")
        return handle

    def _destroy(self, handle: Handle, kind: str) -> tuple[Code]:
        found = self._live(int(handle), kind)
        if kind == "stream" and (found.work or found.capture is not None):
            raise Misuse("a stream destroyed with work on it")
        del self.handles[int(handle)]
        return (OK,)
