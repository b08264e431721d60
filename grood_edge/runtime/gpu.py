"""What a backend needs of a GPU, in a few small protocols; `cuda` implements them."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

__all__ = ["Buffer", "Device", "DeviceInfo", "Graph", "Graphs", "Memory", "Queue", "Stream"]


@dataclass(frozen=True)
class DeviceInfo:
    """The current GPU. `driver`: the newest CUDA version that it supports, (major, minor); `memory` in bytes.

    integrated: the GPU shares the CPU's memory, as on a Jetson.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    driver: tuple[int, int]
    integrated: bool
    memory: int


@dataclass(frozen=True)
class Buffer:
    """`size` bytes at a device address and at a pinned host address; `mapped`: the same memory seen from both sides."""

    device: int
    host: int
    size: int
    mapped: bool

    def view(self) -> np.ndarray:
        """Return the host side, uint8 `[size]`; it must not outlive the buffer."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.size).from_address(self.host))


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured and instantiated CUDA graph."""

    executable: Any


@runtime_checkable
class Memory(Protocol):
    """Buffers. Copies are put on a stream and return at once."""

    def allocate(self, size: int) -> Buffer:
        """Return a new buffer; it lives until the stream is closed."""

    def upload(self, buffer: Buffer, size: int) -> None:
        """Copy the first `size` bytes from the host side to the device."""

    def download(self, buffer: Buffer, size: int) -> None:
        """Copy the first `size` bytes from the device to the host side."""


@runtime_checkable
class Queue(Protocol):
    """Work in order; `handle` is the stream as TensorRT takes it."""

    handle: int

    def synchronize(self) -> None:
        """Wait until all work is done; only then may the host read a buffer, or write it again."""

    def close(self) -> None:
        """Release everything that was made with the stream."""


@runtime_checkable
class Graphs(Protocol):
    """Work that is captured once and launched often."""

    def capture(self, work: Callable[[], object]) -> Graph:
        """Record what `work` puts on the stream, without running it."""

    def launch(self, graph: Graph) -> None:
        """Put a captured graph on the stream."""


@runtime_checkable
class Stream(Memory, Queue, Graphs, Protocol):
    """What one execution context works with: for one thread at a time."""


@runtime_checkable
class Device(Protocol):
    """A GPU as a backend sees it."""

    @property
    def info(self) -> DeviceInfo:
        """Describe it."""

    def make_current(self) -> None:
        """Make it the calling thread's device; needed before any other call in a thread."""

    def open_stream(self) -> Stream:
        """Return a new stream."""
