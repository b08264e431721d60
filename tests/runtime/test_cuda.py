"""Buffers, streams and graphs, through a CUDA that forgives nothing; and that fake held against the genuine module."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grood_edge.errors import BackendError, MissingExtraError
from grood_edge.runtime import cuda
from grood_edge.runtime.cuda import CudaStream, device_count, load_cudart, open_device
from tests.runtime.fake_cuda import Code, FakeCudart, Misuse

OUT_OF_MEMORY = Code.cudaErrorMemoryAllocation
ILLEGAL = Code.cudaErrorIllegalAddress


def open_stream(fake: FakeCudart) -> CudaStream:
    return open_device(fake).open_stream()


def doubled_on_device(fake: FakeCudart, stream: CudaStream, address: int, size: int) -> None:
    """Put work on the stream that doubles bytes in device memory, as a kernel would."""

    def kernel() -> None:
        fake.at(address, size, "device")[:] *= 2

    fake.submit(stream.handle, kernel)


def test_the_device_is_described() -> None:
    info = open_device(FakeCudart(device=1)).info
    assert (info.index, info.name, info.compute_capability, info.driver) == (1, "Fake RTX", (8, 7), (12, 6))
    assert (info.integrated, info.memory) == (False, 8 << 30)
    assert open_device(FakeCudart(integrated=True)).info.integrated


@pytest.mark.parametrize("integrated", [False, True])
def test_bytes_go_to_the_device_and_back(integrated: bool) -> None:
    fake = FakeCudart(integrated)
    stream = open_stream(fake)
    buffer = stream.allocate(100)
    buffer.view()[:] = np.arange(100)
    stream.upload(buffer, 60)
    doubled_on_device(fake, stream, buffer.device, 60)
    stream.download(buffer, 60)
    assert buffer.view()[5] == 5, "the host must not see a result before it waits"
    stream.synchronize()
    assert buffer.view()[:60].tolist() == list(range(0, 120, 2))
    assert buffer.view()[60:].tolist() == list(range(60, 100)), "more was copied than asked for"
    assert ("cudaMemcpyAsync" in fake.calls) == (not integrated)
    assert buffer.mapped == integrated
    stream.close()
    assert fake.alive() == []


def test_a_copy_past_the_end_is_noticed_by_the_fake() -> None:
    stream = open_stream(FakeCudart())
    with pytest.raises(Misuse):
        stream.upload(stream.allocate(10), 11)


def test_a_captured_graph_repeats_the_work_with_new_bytes() -> None:
    fake = FakeCudart()
    stream = open_stream(fake)
    buffer = stream.allocate(4)

    def work() -> None:
        stream.upload(buffer, 4)
        doubled_on_device(fake, stream, buffer.device, 4)
        stream.download(buffer, 4)

    buffer.view()[:] = 1
    graph = stream.capture(work)
    stream.synchronize()
    assert buffer.view().tolist() == [1] * 4, "capturing must not run anything"
    for value in (3, 20):
        buffer.view()[:] = value
        stream.launch(graph)
        stream.synchronize()
        assert buffer.view().tolist() == [2 * value] * 4
    stream.close()
    assert fake.alive() == []


def test_a_spoilt_capture_is_an_error_and_the_stream_goes_on() -> None:
    fake = FakeCudart()
    stream = open_stream(fake)
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureUnsupported"):
        stream.capture(stream.synchronize)
    with pytest.raises(BackendError, match="cudaErrorStreamCaptureInvalidated"):
        stream.capture(lambda: fake.spoil_capture(stream.handle))
    assert fake.last_error == Code.cudaSuccess, "the next call would report an old error"
    with pytest.raises(KeyboardInterrupt):
        stream.capture(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert fake.alive() == ["stream"]
    buffer = stream.allocate(4)
    stream.upload(buffer, 4)
    stream.synchronize()
    stream.close()
    assert fake.alive() == []


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate", "cudaStreamBeginCapture"])
def test_a_failed_capture_leaves_nothing_behind(function: str) -> None:
    fake = FakeCudart()
    stream = open_stream(fake)
    fake.fail[function, 1] = OUT_OF_MEMORY
    with pytest.raises(BackendError, match=r"cudaErrorMemoryAllocation .*--batch"):
        stream.capture(lambda: None)
    assert [kind for kind in fake.alive() if kind != "stream"] == []


@pytest.mark.parametrize("function", ["cudaHostAlloc", "cudaMalloc", "cudaHostGetDevicePointer"])
def test_a_failed_allocation_names_the_error_and_keeps_nothing(function: str) -> None:
    fake = FakeCudart(integrated=function == "cudaHostGetDevicePointer")
    stream = open_stream(fake)
    fake.fail[function, 1] = OUT_OF_MEMORY
    with pytest.raises(BackendError, match=r"cudaErrorMemoryAllocation .* memory is full"):
        stream.allocate(1000)
    assert fake.alive() == ["stream"]


CALLS = {
    "cudaMemcpyAsync": lambda stream: stream.upload(stream.allocate(4), 4),
    "cudaStreamSynchronize": lambda stream: stream.synchronize(),
    "cudaGraphLaunch": lambda stream: stream.launch(stream.capture(lambda: None)),
    "cudaEventRecord": lambda stream: stream.elapsed(lambda: None),
    "cudaEventSynchronize": lambda stream: stream.elapsed(lambda: None),
    "cudaEventCreateWithFlags": lambda stream: stream.elapsed(lambda: None),
    "cudaEventElapsedTime": lambda stream: stream.elapsed(lambda: None),
}


@pytest.mark.parametrize("function", CALLS)
def test_every_return_code_is_checked(function: str) -> None:
    fake = FakeCudart()
    stream = open_stream(fake)
    fake.fail[function, 1] = ILLEGAL
    with pytest.raises(BackendError, match=r"cudaErrorIllegalAddress .*; restart the program"):
        CALLS[function](stream)
    stream.close()
    assert fake.alive() == []


@pytest.mark.parametrize("function", ["cudaSetDevice", "cudaStreamCreateWithFlags"])
def test_a_device_that_refuses_is_an_error(function: str) -> None:
    fake = FakeCudart()
    device = open_device(fake)
    fake.fail[function, 1] = ILLEGAL
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        device.make_current() if function == "cudaSetDevice" else device.open_stream()


def test_a_broken_device_is_released_once_and_reported() -> None:
    """After an illegal address every call fails; all the same each release is tried, and no second close repeats it."""
    fake = FakeCudart()
    stream = open_stream(fake)
    stream.allocate(4)
    stream.capture(lambda: None)
    releases = ["cudaStreamSynchronize", "cudaGraphExecDestroy", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"]
    fake.fail |= {(name, 0): ILLEGAL for name in releases}
    fake.calls.clear()
    with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
        stream.close()
    stream.close()
    assert [name for name in fake.calls if name in releases] == releases


def test_a_driver_that_is_gone_at_exit_is_no_error() -> None:
    fake = FakeCudart()
    stream = open_stream(fake)
    fake.fail["cudaStreamSynchronize", 0] = fake.fail["cudaStreamDestroy", 0] = Code.cudaErrorCudartUnloading
    stream.close()


def test_time_is_measured_on_the_device() -> None:
    fake = FakeCudart()
    stream = open_stream(fake)
    ran: list[bool] = []
    assert stream.elapsed(lambda: fake.submit(stream.handle, lambda: ran.append(True))) == 0.25
    assert ran, "the time was read before the work was done"
    assert fake.alive() == ["stream"]


@pytest.mark.parametrize("code", [Code.cudaErrorInsufficientDriver, Code.cudaErrorNoDevice])
def test_a_machine_without_gpu_is_told_apart(code: Code) -> None:
    fake = FakeCudart()
    fake.fail["cudaGetDeviceCount", 0] = code
    count, reason = device_count(fake)
    assert count == 0
    assert reason.startswith(code.name)
    with pytest.raises(BackendError, match=f"no CUDA device can be used: {code.name} .*--backend onnxruntime"):
        open_device(fake)


def test_an_older_binding_that_raises_without_driver_counts_no_device() -> None:
    """cuda-bindings 12.8 raises RuntimeError where 13 returns a code."""

    def cuda_get_device_count() -> Any:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    count, reason = device_count(SimpleNamespace(cudaGetDeviceCount=cuda_get_device_count))
    assert count == 0
    assert "libcuda.so.1" in reason


def test_without_cuda_bindings_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['cuda.bindings'] = None\n"
        "from grood_edge.runtime.cuda import load_cudart\n"
        "from grood_edge.errors import MissingExtraError\n"
        "try: load_cudart()\n"
        "except MissingExtraError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cuda-bindings" in done.stdout
    assert "grood-edge[cuda]" in done.stdout


def genuine() -> Any:
    try:
        return load_cudart()
    except (MissingExtraError, BackendError) as error:
        pytest.skip(str(error))


def touched_names() -> set[str]:
    """Return the names that the code takes from the CUDA runtime."""
    tree = ast.parse(Path(cuda.__file__).read_text())
    return {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr.startswith("cuda")
    } - {"cudart"}


def test_the_genuine_module_has_all_that_is_used_as_the_fake_has_it() -> None:
    module = genuine()
    names = touched_names()
    assert len(names) > 30, "the code was not understood"
    values = {name for name in names if hasattr(module.cudaMemcpyKind, name)}
    values |= {name for name in names if hasattr(module.cudaStreamCaptureMode, name)}
    for name in names - values:
        if name == "cudaSuccess":
            continue
        ours, theirs = getattr(FakeCudart, name), getattr(module, name)
        if isinstance(ours, int):
            assert ours == int(theirs), name
        elif not isinstance(ours, type):
            arguments = re.match(r"\w+\((.*?)\)", theirs.__doc__.splitlines()[0])
            assert arguments, name
            count = len([a for a in arguments[1].split(",") if a.strip()])
            assert len(inspect.signature(ours).parameters) - 1 == count, name
    for kind in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode"):
        for member in getattr(FakeCudart, kind):
            assert int(getattr(getattr(module, kind), member.name)) == member.value, member


def test_the_genuine_module_answers_on_this_machine() -> None:
    """With a GPU it is opened and used; without one the reason is told in CUDA's words."""
    module = genuine()
    count, reason = device_count(module)
    if count == 0:
        assert reason
        with pytest.raises(BackendError, match="no CUDA device"):
            open_device()
        return
    stream = open_device().open_stream()
    buffer = stream.allocate(1 << 20)
    buffer.view()[:] = 7

    def work() -> None:
        stream.upload(buffer, 1 << 20)
        stream.download(buffer, 1 << 20)

    graph = stream.capture(work)
    stream.launch(graph)
    stream.synchronize()
    assert (buffer.view() == 7).all()
    stream.close()
