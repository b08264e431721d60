"""The checks of gpu.py: buffers, streams and graphs on a GPU; an engine against the probes of its artifact."""

import dataclasses
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError
from grood_edge.outputs import Outputs
from grood_edge.probes import decode_png, replay_probes
from grood_edge.runtime.backend import Backend
from grood_edge.runtime.cuda import CudaDevice, CudaStream
from grood_edge.runtime.gpu import Buffer

__all__ = ["Check", "Skipped", "backend_checks", "checked", "device_checks", "median_milliseconds"]

MEGABYTE = 1 << 20
CYCLES = 50  # of opening and closing
LAUNCHES = 100
THREADS = 4
TIMED_RUNS = 50
Values = dict[str, float | str]


class Skipped(Exception):  # noqa: N818 -- not an error
    """A check that has nothing to work with; says why."""


@dataclass(frozen=True)
class Check:
    """One row of the report."""

    name: str
    outcome: Literal["pass", "fail", "skipped"]
    values: Values
    detail: str = ""


def checked(name: str, work: Callable[[], Values]) -> Check:
    """Run one check; whatever goes wrong is a row of the report, and the next check runs."""
    try:
        return Check(name, "pass", work())
    except Skipped as reason:
        return Check(name, "skipped", {}, str(reason))
    except Exception as error:
        return Check(name, "fail", {}, f"{type(error).__name__}: {error}")


def require(condition: bool, what: str) -> None:
    """Fail the check."""
    if not condition:
        raise AssertionError(what)


def device_checks(device: CudaDevice) -> list[Check]:
    """Check buffers, streams, graph capture and lifetimes; needs no TensorRT."""
    checks = {
        "copies": copies,
        "mapped memory": mapped_memory,
        "order on a stream": order_on_a_stream,
        "graph capture": graph_capture,
        "spoilt capture": spoilt_capture,
        "too much memory": too_much_memory,
        "threads": threads,
        "lifetimes": lifetimes,
        "copy speed": copy_speed,
    }
    return [checked(f"cuda: {name}", lambda check=check: check(device)) for name, check in checks.items()]  # type: ignore[misc]


def round_trip(stream: CudaStream, buffer: Buffer, seed: int) -> None:
    """Send random bytes to the device, wipe the host's side, fetch them back."""
    sent = np.random.default_rng(seed).integers(0, 256, buffer.size, np.uint8)
    buffer.view()[:] = sent
    stream.upload(buffer, buffer.size)
    stream.synchronize()
    if not buffer.mapped:
        buffer.view()[:] = 0
    stream.download(buffer, buffer.size)
    stream.synchronize()
    require(bool((buffer.view() == sent).all()), f"{buffer.size} bytes came back changed")


def fill(device: CudaDevice, stream: CudaStream, buffer: Buffer, value: int) -> None:
    """Put the filling of device memory on the stream: the smallest work there is."""
    code = device.cudart.cudaMemsetAsync(buffer.device, value, buffer.size, stream.stream)[0]
    require(code == device.cudart.cudaError_t.cudaSuccess, f"cudaMemsetAsync: {code}")


def copies(device: CudaDevice) -> Values:
    """Bytes of odd sizes go to the device and back."""
    stream = device.open_stream()
    for size in (1, 4097, MEGABYTE, 5 * MEGABYTE + 3):
        round_trip(stream, stream.allocate(size), size)
    stream.close()
    return {}


def mapped_memory(device: CudaDevice) -> Values:
    """What the device writes into mapped memory stands there after a wait, without a copy."""
    stream = dataclasses.replace(device, info=dataclasses.replace(device.info, integrated=True)).open_stream()
    buffer = stream.allocate(MEGABYTE)
    for value in (1, 200):
        buffer.view()[:] = 0
        fill(device, stream, buffer, value)
        stream.synchronize()
        require(bool((buffer.view() == value).all()), "the host does not see what the device wrote")
    stream.close()
    return {"integrated": str(device.info.integrated)}


def order_on_a_stream(device: CudaDevice) -> Values:
    """Work on a stream runs in order, on two streams without harm to each other."""
    streams = [device.open_stream() for _ in range(2)]
    buffers = [stream.allocate(4 * MEGABYTE) for stream in streams]
    for value in (1, 2, 3):
        for index, (stream, buffer) in enumerate(zip(streams, buffers, strict=True)):
            fill(device, stream, buffer, 10 * index + value)
            stream.download(buffer, buffer.size)
    for index, (stream, buffer) in enumerate(zip(streams, buffers, strict=True)):
        stream.synchronize()
        require(bool((buffer.view() == 10 * index + 3).all()), "work ran out of order")
        stream.close()
    return {}


def graph_capture(device: CudaDevice) -> Values:
    """A captured upload, filling of another buffer and download repeat with new bytes; capturing runs nothing."""
    stream = device.open_stream()
    moved, filled = stream.allocate(MEGABYTE), stream.allocate(MEGABYTE)

    def work() -> None:
        stream.upload(moved, moved.size)
        fill(device, stream, filled, 7)
        stream.download(moved, moved.size)
        stream.download(filled, filled.size)

    filled.view()[:] = 1
    graph = stream.capture(work)
    stream.synchronize()
    require(bool((filled.view() == 1).all()), "capturing ran the work")
    for value in range(LAUNCHES):
        moved.view()[:] = value
        stream.launch(graph)
        stream.synchronize()
        require(bool((moved.view() == value).all() and (filled.view() == 7).all()), f"launch {value} is wrong")
    milliseconds = stream.elapsed(lambda: stream.launch(graph))
    stream.close()
    return {"launch_ms": milliseconds}


def spoilt_capture(device: CudaDevice) -> Values:
    """A wait inside a capture is an error, and the stream works on."""
    stream = device.open_stream()
    try:
        stream.capture(stream.synchronize)
    except BackendError as error:
        said = str(error)
    else:
        raise AssertionError("a wait inside a capture was accepted")
    round_trip(stream, stream.allocate(MEGABYTE), 0)
    graph = stream.capture(lambda: None)
    stream.launch(graph)
    stream.synchronize()
    stream.close()
    return {"error": said.split(";", maxsplit=1)[0]}


def too_much_memory(device: CudaDevice) -> Values:
    """More memory than there can be is an error with CUDA's name, and the stream works on."""
    stream = device.open_stream()
    try:
        stream.allocate(1 << 50)
    except BackendError as error:
        require("cudaError" in str(error), f"no CUDA error in {error}")
    else:
        raise AssertionError("a petabyte was allocated")
    round_trip(stream, stream.allocate(MEGABYTE), 0)
    stream.close()
    return {}


def threads(device: CudaDevice) -> Values:
    """Threads with a stream each do not disturb each other, while one of them captures."""

    def work(index: int) -> None:
        device.make_current()
        stream = device.open_stream()
        buffer = stream.allocate(MEGABYTE)
        for seed in range(20):
            round_trip(stream, buffer, 100 * index + seed)
            if index == 0:
                stream.launch(stream.capture(lambda: stream.upload(buffer, buffer.size)))
        stream.synchronize()
        stream.close()

    in_threads([lambda index=index: work(index) for index in range(THREADS)])  # type: ignore[misc]
    return {}


def in_threads(works: list[Callable[[], None]]) -> None:
    """Run all at once; the first error is raised."""
    errors: list[Exception] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


def free_memory(device: CudaDevice) -> int:
    """Return the bytes of free device memory."""
    code, free, _ = device.cudart.cudaMemGetInfo()
    require(code == device.cudart.cudaError_t.cudaSuccess, f"cudaMemGetInfo: {code}")
    return int(free)


def lifetimes(device: CudaDevice) -> Values:
    """What is opened is released: streams, 16 MB of buffers and a graph, again and again."""

    def cycle() -> None:
        stream = device.open_stream()
        buffer = stream.allocate(16 * MEGABYTE)
        stream.launch(stream.capture(lambda: stream.upload(buffer, buffer.size)))  # closed with work on it
        stream.close()
        stream.close()

    cycle()
    before = free_memory(device)
    for _ in range(CYCLES):
        cycle()
    lost = before - free_memory(device)
    require(lost < CYCLES * MEGABYTE, f"{lost:,} bytes are lost after {CYCLES} cycles")
    return {"lost_bytes": lost}


def copy_speed(device: CudaDevice) -> Values:
    """Measure the copies of 64 MB."""
    stream = device.open_stream()
    buffer = stream.allocate(64 * MEGABYTE)
    if buffer.mapped:
        stream.close()
        raise Skipped("integrated GPU: nothing is copied")
    values: Values = {}
    for name, copy in (("to_device", stream.upload), ("to_host", stream.download)):
        copy(buffer, buffer.size)
        milliseconds = stream.elapsed(lambda copy=copy: copy(buffer, buffer.size))  # type: ignore[misc]
        values[f"{name}_gb_per_s"] = buffer.size / max(milliseconds, 1e-6) / 1e6
    stream.close()
    return values


def backend_checks(name: str, artifact: Artifact, open_backend: Callable[[], Backend]) -> list[Check]:
    """Check a backend against the probes of its artifact, against itself in other batches, in threads, and time it."""
    frames = np.stack([decode_png(probe.png, artifact.contract.preprocessing) for probe in artifact.contract.probes])
    opened: list[Backend] = []

    def opening() -> Values:
        start = time.perf_counter()
        opened.append(open_backend())
        return {"seconds": time.perf_counter() - start}

    rows = [checked(f"{name}: opens", opening)]
    if not opened:
        return rows
    backend = opened[0]
    checks: dict[str, Callable[[], Values]] = {
        "probes": lambda: probes(artifact, backend),
        "batches": lambda: batches(artifact, backend, frames),
        "threads": lambda: many_threads(backend, frames),
        "time": lambda: times(artifact, backend, frames),
        "closes": lambda: closes(backend, open_backend, frames),
    }
    return rows + [checked(f"{name}: {check}", work) for check, work in checks.items()]


def probes(artifact: Artifact, backend: Backend) -> Values:
    """Class, decision and validity of every probe are those of the export, and scores within the tolerance."""
    contract = artifact.contract
    report = replay_probes(contract, backend.run, backend.provider)
    values: Values = {"largest_error": report.largest_error, "tolerance": report.tolerance, "flips": report.flips}
    require(report.passed, f"probes differ: {values}")
    return values


def batches(artifact: Artifact, backend: Backend, frames: np.ndarray) -> Values:
    """A frame gets the same answer alone and in any batch, at any place, before and after a graph is captured."""
    if artifact.contract.classifier.batch == "1":
        raise Skipped("the artifact takes single images alone")
    alone = [backend.run(frame[None]) for frame in frames]
    largest = 0.0
    for size in (2, 3, 8, 19):
        for turn in range(4):  # plain, warm-up and capture, graph, graph
            rows = [(turn + i) % len(frames) for i in range(size)]
            largest = max(largest, compare(backend.run(frames[rows]), [alone[row] for row in rows]))
    return {"largest_error": largest, "cuda_graphs": str(getattr(backend, "cuda_graphs", ""))}


def many_threads(backend: Backend, frames: np.ndarray) -> Values:
    """Threads that run at the same time get what one alone gets."""
    in_threads([lambda: require_singles(backend, frames)] * THREADS)
    return {"threads": str(THREADS)}


def require_singles(backend: Backend, frames: np.ndarray) -> None:
    """The same frame again and again gets the same answer."""
    first = [backend.run(frame[None]) for frame in frames]
    for _ in range(5):
        for frame, expected in zip(frames, first, strict=True):
            compare(backend.run(frame[None]), [expected])


def compare(found: Outputs, expected: list[Outputs]) -> float:
    """Return the largest difference of a score; a changed class, decision or validity fails the check."""
    largest = 0.0
    for index, single in enumerate(expected):
        for name in ("class_id", "is_ood", "valid"):
            require(getattr(found, name)[index] == getattr(single, name)[0], f"{name} of row {index} changed")
        largest = max(largest, abs(float(found.ood_score[index] - single.ood_score[0])))
    return largest


def times(artifact: Artifact, backend: Backend, frames: np.ndarray) -> Values:
    """Measure runs from host memory to host memory."""
    sizes = (1,) if artifact.contract.classifier.batch == "1" else (1, 8)
    batch = np.concatenate([frames] * 8)
    return {f"batch_{size}_ms": median_milliseconds(backend, batch[:size]) for size in sizes}


def median_milliseconds(backend: Backend, frames: np.ndarray) -> float:
    """Return the median time of a run, after runs that warm up."""
    taken = []
    for index in range(TIMED_RUNS + 5):
        start = time.perf_counter()
        backend.run(frames)
        if index >= 5:
            taken.append(1e3 * (time.perf_counter() - start))
    return float(np.median(taken))


def closes(backend: Any, open_backend: Callable[[], Backend], frames: np.ndarray) -> Values:
    """Closing releases everything, twice is once, and a closed backend says so."""
    backend.close()
    backend.close()
    try:
        backend.run(frames[:1])
    except BackendError:
        pass
    else:
        raise AssertionError("a closed backend ran")
    for _ in range(3):
        again = open_backend()
        again.run(frames[:1])
        again.close()
    return {}
