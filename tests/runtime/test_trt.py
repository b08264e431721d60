"""The TensorRT backend on fakes that run the artifact for real: what it answers, in which order, what it leaves."""

import dataclasses
import functools
import gc
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.contract import Contract, encode_scores
from grood_edge.errors import BackendError, FrameError, GroodEdgeError
from grood_edge.outputs import OUTPUT_NAMES, Outputs
from grood_edge.runtime import Session
from grood_edge.runtime.cuda import open_device
from grood_edge.runtime.decisions import decided_by
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.trt import TrtBackend
from grood_edge.runtime.trt_lane import MAX_GRAPHS
from tests.runtime.fake_cuda import Code, FakeCudart, Misuse
from tests.runtime.fake_trt import DataType, FakeContext, FakeEngine, FakeRuntime, FakeTrt, RtxContext
from tests.trt_signatures import accepts


@pytest.fixture(scope="module", autouse=True)
def _fast_collection() -> Iterator[None]:
    """Leave what torch and others made out of the collections below: they look for what the backend left."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def artifact(artifact_path: Path) -> Artifact:
    return read_artifact(artifact_path)


@pytest.fixture(scope="module")
def frames(digits: Any) -> np.ndarray:
    """40 images: digits, then noise, a black and a white frame."""
    from grood_edge.images import find_images, load_image

    images = [load_image(path) for path in find_images(digits.test)[:30]]
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 1), np.uint8)
    real = np.stack([image.reshape(*image.shape[:2], -1)[:32, :32, :1] for image in images])
    padded = np.zeros((30, 32, 32, 1), np.uint8)
    padded[:, : real.shape[1], : real.shape[2]] = real
    flat = np.stack([np.full((32, 32, 1), level, np.uint8) for level in (0, 255)])
    return np.concatenate([padded, noise, flat])


@dataclasses.dataclass
class Rig:
    """A machine with a fake GPU and a fake TensorRT."""

    cuda: FakeCudart
    trt: FakeTrt
    artifact: Artifact

    def open(self, contract: Contract | None = None, decide_on_host: bool = False) -> TrtBackend:
        contract = contract or self.artifact.contract
        plan, device = self.artifact.model, open_device(self.cuda)
        return TrtBackend(self.trt.api(), plan, contract, device, self.trt.logger, decide_on_host)

    def require_nothing_left(self) -> None:
        gc.collect()
        assert self.cuda.alive() == []
        assert sorted(self.trt.released) == sorted(["context"] * self.trt.contexts + ["engine", "runtime"])
        assert self.trt.released[-2:] == ["engine", "runtime"], "released before what needs it"


@pytest.fixture
def rig(artifact: Artifact) -> Rig:
    cuda = FakeCudart()
    return Rig(cuda, FakeTrt(cuda), artifact)


@pytest.fixture(params=["tensorrt", "tensorrt-rtx", "tensorrt-integrated"])
def any_rig(request: pytest.FixtureRequest, artifact: Artifact) -> Rig:
    cuda = FakeCudart(integrated=request.param == "tensorrt-integrated", device=1)
    return Rig(cuda, FakeTrt(cuda, rtx=request.param == "tensorrt-rtx"), artifact)


@functools.cache
def reference(model: bytes) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(read_artifact(model), threads=1)


def require_same(found: Outputs, expected: Outputs) -> None:
    for name in OUTPUT_NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def answers(artifact: Artifact, frames: np.ndarray, at_once: int) -> list[Outputs]:
    backend = reference(artifact.model)
    return [backend.run(frames[i : i + at_once]) for i in range(0, len(frames), at_once)]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_it_answers_as_onnxruntime_does_before_and_after_capture(any_rig: Rig, frames: np.ndarray, n: int) -> None:
    backend = any_rig.open()
    assert backend.provider == any_rig.trt.api().family
    for start in range(0, 32, 8):  # plain, warm-up and capture, then the graph twice: each on new frames
        batch = frames[start : start + n]
        require_same(backend.run(batch), answers(any_rig.artifact, batch, n)[0])
    assert any_rig.trt.replayed == 2
    assert backend.cuda_graphs == f"captured for batch {n}"
    backend.close()
    any_rig.require_nothing_left()


def test_a_batch_above_the_largest_is_split(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    found = backend.run(frames[:19])
    assert len(found) == 19
    expected = answers(rig.artifact, frames[:19], 8)
    for name in OUTPUT_NAMES:
        np.testing.assert_array_equal(getattr(found, name), np.concatenate([getattr(e, name) for e in expected]))


def test_a_batch_below_the_smallest_is_filled_up_and_cut(rig: Rig, frames: np.ndarray) -> None:
    rig.trt.batch = (4, 4, 8)
    backend = rig.open()
    backend.run(frames[8:16])  # what stands in the buffer must not come back
    black = np.zeros((3, *frames.shape[1:]), np.uint8)
    expected = OnnxRuntimeBackend(rig.artifact).run(np.concatenate([frames[:1], black]))
    for _ in range(3):
        found = backend.run(frames[:1])
        assert len(found) == 1
        assert found.ood_score[0] == expected.ood_score[0]


def test_an_engine_of_fixed_batch_runs_through_a_session(rig: Rig, single_path: Path, frames: np.ndarray) -> None:
    rig.artifact = read_artifact(single_path)
    rig.trt.batch = (1, 1, 1)
    backend = rig.open()
    assert backend.batch_range == (1, 1)
    with Session(rig.artifact, backend) as session:
        found = session.infer_prepared(frames[:4])
    assert len(found) == 4
    np.testing.assert_array_equal(
        found.ood_score, np.concatenate([o.ood_score for o in answers(rig.artifact, frames[:4], 1)])
    )
    rig.require_nothing_left()


def test_the_outputs_belong_to_the_caller(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    first = backend.run(frames[:2])
    kept = {name: getattr(first, name).copy() for name in OUTPUT_NAMES}
    for _ in range(3):
        backend.run(frames[30:32])
    backend.close()
    for name in OUTPUT_NAMES:
        np.testing.assert_array_equal(getattr(first, name), kept[name])
        assert getattr(first, name).flags.writeable


def test_no_memory_is_allocated_after_opening(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    rig.cuda.calls.clear()
    for n in (1, 5, 8, 20, 3, 3, 3):
        backend.run(frames[:n])
    assert not {"cudaMalloc", "cudaHostAlloc", "cudaFree", "cudaFreeHost"} & set(rig.cuda.calls)


def test_the_number_of_graphs_is_bounded(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    for _ in range(4):
        for n in range(1, 9):
            backend.run(frames[:n])
    assert backend.cuda_graphs == f"captured for batch {', '.join(map(str, range(1, MAX_GRAPHS + 1)))}"
    assert rig.cuda.alive().count("executable") == MAX_GRAPHS
    assert rig.trt.contexts == 1 + MAX_GRAPHS
    backend.close()
    rig.require_nothing_left()


def refuse_capture(rig: Rig) -> None:
    rig.trt.capturable = False


def fail_instantiation(rig: Rig) -> None:
    rig.cuda.fail["cudaGraphInstantiate", 1] = Code.cudaErrorMemoryAllocation


def refuse_second_context(rig: Rig) -> None:
    rig.trt.fail.add(("create_execution_context", 2))


def refuse_captured_run(rig: Rig) -> None:
    rig.trt.fail.add(("execute_async_v3", 3))  # the first plain, the second the warm-up


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (refuse_capture, "captur"),
        (fail_instantiation, "cudaErrorMemoryAllocation"),
        (refuse_second_context, "fake failure of create_execution_context"),
        (refuse_captured_run, "fake failure of execute_async_v3"),
    ],
)
@pytest.mark.parametrize("rtx", [False, True])
def test_without_capture_it_runs_plainly_and_says_why(
    rig: Rig, frames: np.ndarray, spoil: Callable[[Rig], None], reason: str, rtx: bool
) -> None:
    rig.trt.rtx = rtx
    spoil(rig)
    backend = rig.open()
    for start in (0, 8, 16, 24):
        batch = frames[start : start + 4]
        require_same(backend.run(batch), answers(rig.artifact, batch, 4)[0])
    assert rig.trt.replayed == 0
    assert backend.cuda_graphs.startswith("not used: ")
    assert reason in backend.cuda_graphs
    backend.close()
    rig.require_nothing_left()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("Runtime", "cannot start"),
        (
            "deserialize_cuda_engine",
            "cannot read the engine: Error Code 1: fake failure of deserialize_cuda_engine; build",
        ),
        ("create_execution_context", "no execution context: Error Code 1"),
    ],
)
def test_a_none_at_opening_is_an_error_with_the_logged_reason(rig: Rig, method: str, message: str) -> None:
    rig.trt.fail.add((method, 1))
    with pytest.raises(BackendError, match=message):
        rig.open()
    gc.collect()
    assert rig.cuda.alive() == []


@pytest.mark.parametrize(
    ("function", "nth"),
    [
        ("cudaMalloc", 1),
        ("cudaMalloc", 3),
        ("cudaHostAlloc", 1),
        ("cudaHostAlloc", 8),
        ("cudaStreamCreateWithFlags", 1),
    ],
)
def test_an_error_of_cuda_at_opening_leaves_nothing_behind(rig: Rig, function: str, nth: int) -> None:
    rig.cuda.fail[function, nth] = Code.cudaErrorMemoryAllocation
    with pytest.raises(BackendError, match="cudaErrorMemoryAllocation"):
        rig.open()
    rig.require_nothing_left()


@pytest.mark.parametrize("run", [1, 2])
@pytest.mark.parametrize(
    "method", ["set_input_shape", "infer_shapes", "get_tensor_shape", "set_tensor_address", "execute_async_v3"]
)
def test_a_false_while_running_is_an_error_and_the_next_run_is_right(
    rig: Rig, frames: np.ndarray, method: str, run: int
) -> None:
    backend = rig.open()
    if run == 2:
        backend.run(frames[:2])
    rig.trt.fail.add((method, rig.trt.counts[method] + 1))
    with pytest.raises(BackendError, match=f"fake failure of {method}.*--backend onnxruntime"):
        backend.run(frames[:2])
    for _ in range(3):
        require_same(backend.run(frames[:2]), answers(rig.artifact, frames[:2], 2)[0])
    backend.close()
    rig.require_nothing_left()


@pytest.mark.parametrize("function", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaGraphLaunch", "cudaSetDevice"])
def test_an_error_of_cuda_while_running_is_told_and_all_is_released(
    rig: Rig, frames: np.ndarray, function: str
) -> None:
    backend = rig.open()
    backend.run(frames[:2]), backend.run(frames[:2])
    rig.cuda.fail[function, rig.cuda.counts[function] + 1] = Code.cudaErrorLaunchFailure
    with pytest.raises(BackendError, match="cudaErrorLaunchFailure"):
        backend.run(frames[:2] if function != "cudaMemcpyAsync" else frames[:3])
    require_same(backend.run(frames[:2]), answers(rig.artifact, frames[:2], 2)[0])
    backend.close()
    rig.require_nothing_left()


def test_close_is_final_and_can_be_repeated(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    backend.run(frames[:1])
    backend.close()
    rig.require_nothing_left()
    backend.close()
    with pytest.raises(BackendError, match=r"closed; open it again"):
        backend.run(frames[:1])


def test_another_thread_may_close(any_rig: Rig, frames: np.ndarray) -> None:
    backend = any_rig.open()
    backend.run(frames[:1])
    thread = threading.Thread(target=backend.close)
    thread.start()
    thread.join()
    any_rig.require_nothing_left()


def test_a_device_that_fails_at_close_is_told_once_and_the_rest_is_released(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    backend.run(frames[:1])
    rig.cuda.fail["cudaFreeHost", 1] = Code.cudaErrorLaunchFailure
    with pytest.raises(BackendError, match="cudaErrorLaunchFailure"):
        backend.close()
    backend.close()
    assert rig.cuda.alive() == ["host"]


def test_a_forgotten_backend_releases_itself(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    backend.run(frames[:1])
    del backend
    rig.require_nothing_left()


def test_an_open_backend_releases_itself_at_the_end_of_the_process(artifact_path: Path) -> None:
    code = f"""
import atexit, sys
from pathlib import Path
from tests.runtime.fake_cuda import FakeCudart
from tests.runtime.fake_trt import FakeTrt
from grood_edge.artifact import read_artifact
from grood_edge.runtime.cuda import open_device
from grood_edge.runtime.trt import TrtBackend
artifact = read_artifact({str(artifact_path)!r})
cuda = FakeCudart()
atexit.register(lambda: print("left:", cuda.alive()))  # runs after what was registered later
trt = FakeTrt(cuda)
backend = TrtBackend(trt.api(), artifact.model, artifact.contract, open_device(cuda), trt.logger)
print("open:", len(cuda.alive()))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.splitlines() == ["open: 17", "left: []"]
    assert done.stderr == ""


def test_threads_share_no_context_and_threads_that_end_cost_nothing(any_rig: Rig, frames: np.ndarray) -> None:
    backend = any_rig.open()
    expected = [answers(any_rig.artifact, frames[i : i + 2], 2)[0] for i in range(0, 8, 2)]
    together = threading.Barrier(4, timeout=30)
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for _ in range(4):
                together.wait()
                require_same(backend.run(frames[2 * index : 2 * index + 2]), expected[index])
        except BaseException as error:
            errors.append(error)
            together.abort()

    for _ in range(2):  # the second round's threads get the first round's lanes
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert errors == []
    assert any_rig.cuda.alive().count("stream") <= 4
    backend.close()
    any_rig.require_nothing_left()


def test_close_during_a_run_lets_it_end_and_releases_it(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    running, closed = threading.Event(), threading.Event()
    found: list[Outputs] = []

    def hold() -> None:
        running.set()
        assert closed.wait(30)

    rig.trt.gate = hold
    thread = threading.Thread(target=lambda: found.append(backend.run(frames[:2])))
    thread.start()
    assert running.wait(30)
    backend.close()
    assert rig.cuda.alive() != [], "memory was taken from under a run"
    closed.set()
    thread.join()
    require_same(found[0], answers(rig.artifact, frames[:2], 2)[0])
    rig.require_nothing_left()


def test_foreign_frames_are_refused(rig: Rig, frames: np.ndarray) -> None:
    backend = rig.open()
    for bad in (frames[:0], frames[:2, :16], np.zeros((2, 32, 32, 3), np.uint8)):
        with pytest.raises(FrameError, match="expected uint8"):
            backend.run(bad)


def test_an_engine_of_another_artifact_is_refused(rig: Rig) -> None:
    contract = rig.artifact.contract
    other = dataclasses.replace(contract, preprocessing=dataclasses.replace(contract.preprocessing, height=48))
    with pytest.raises(BackendError, match=r"not one of this artifact.*\(48, 32, 1\).*grood-edge compile"):
        rig.open(other)
    gc.collect()
    assert rig.cuda.alive() == []


@pytest.mark.parametrize(
    ("tensor", "dtype", "message"),
    [
        ("class_id", DataType.INT64, "'class_id' is int64; expected int32"),
        ("logits", DataType.HALF, "'logits' is float16; expected float32"),
        ("valid", DataType.UINT8, "'valid' is uint8; expected bool"),
        ("features", DataType.INT8, "'features' is DataType.INT8, which no artifact has"),
        ("image", DataType.FLOAT, "not one of this artifact"),
    ],
)
def test_an_engine_with_other_types_is_refused(rig: Rig, tensor: str, dtype: DataType, message: str) -> None:
    rig.trt.retyped[tensor] = dtype
    with pytest.raises(BackendError, match=message):
        rig.open()


def test_a_class_that_does_not_exist_is_refused(rig: Rig, frames: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = rig.open()
    compute = FakeContext._compute

    def broken(context: FakeContext) -> None:
        compute(context)
        rig.cuda.at(context._addresses["class_id"], 4, "device")[:] = 0x7F

    monkeypatch.setattr(FakeContext, "_compute", broken)
    with pytest.raises(BackendError, match=r"class 2139062143 of 7.*nonsense"):
        backend.run(frames[:2])


# The decision on the host


def test_the_host_decides_as_the_graph_does(artifact: Artifact, frames: np.ndarray) -> None:
    outputs = OnnxRuntimeBackend(artifact).run(frames)
    assert outputs.is_ood.any()
    assert not outputs.is_ood.all()
    spoilt = dataclasses.replace(outputs, p_value=np.full_like(outputs.p_value, 9), is_ood=~outputs.is_ood)
    require_same(decided_by(artifact.contract.calibration.rule(7), spoilt), outputs)


def test_the_host_decides_invalid_frames_as_the_graph_does(overflowing_path: Path) -> None:
    artifact = read_artifact(overflowing_path)
    frames = np.stack([np.full((32, 32, 1), level, np.uint8) for level in (0, 204, 90)])
    outputs = OnnxRuntimeBackend(artifact).run(frames)
    assert outputs.valid.tolist() == [True, False, True]
    require_same(decided_by(artifact.contract.calibration.rule(7), outputs), outputs)


def recalibrated(contract: Contract, by_class: bool) -> Contract:
    """Return the contract with other calibration scores: those of the first, shifted; or a part for each class."""
    calibration = contract.calibration
    scores = calibration.sorted_scores()
    if not by_class:
        changed = dataclasses.replace(calibration, scores=encode_scores((scores - np.float32(3),)))
    else:
        groups = tuple(np.sort(scores[i::7]) for i in range(7))
        sizes = tuple(group.size for group in groups)
        changed = dataclasses.replace(
            calibration, scores=encode_scores(groups), class_sizes=sizes, class_ranks=tuple(range(1, 8))
        )
    return dataclasses.replace(contract, calibration=changed)


@pytest.mark.parametrize("by_class", [False, True])
def test_an_old_engine_decides_by_the_recalibrated_contract(rig: Rig, frames: np.ndarray, by_class: bool) -> None:
    """Against the graph itself with the new calibration written into it."""
    from grood_edge.ort import open_ort
    from grood_edge.outputs import outputs_from_arrays
    from grood_edge.stored_head import calibration_tensors

    contract = recalibrated(rig.artifact.contract, by_class)
    model = with_initializers(rig.artifact.model, calibration_tensors(contract.calibration.rule(7)))
    expected = outputs_from_arrays(open_ort(model).run({"image": frames}, list(OUTPUT_NAMES)))
    stale = rig.open().run(frames)
    found = rig.open(contract, decide_on_host=True).run(frames)
    assert (stale.p_value != expected.p_value).any()
    for name in ("p_value", "is_ood", "class_id"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


def with_initializers(model: bytes, tensors: dict[str, np.ndarray]) -> bytes:
    import onnx

    loaded = onnx.load_model_from_string(model)
    for tensor in loaded.graph.initializer:
        if tensor.name in tensors:
            tensor.CopyFrom(onnx.numpy_helper.from_array(tensors[tensor.name], tensor.name))
    edited: bytes = loaded.SerializeToString()
    return edited


# The fake itself


def test_the_fake_notices_misuse(rig: Rig) -> None:
    engine = FakeEngine(rig.trt, FakeRuntime(rig.trt, None), rig.artifact.model)
    with pytest.raises(Misuse, match="after its runtime"):
        engine.create_execution_context()
    context = FakeContext(rig.trt, engine)
    stream = open_device(rig.cuda).open_stream()
    with pytest.raises(Misuse, match="before the shapes"):
        context.execute_async_v3(stream.handle)
    context.set_input_shape("image", (1, 32, 32, 1))
    context.infer_shapes()
    with pytest.raises(Misuse, match="without an address"):
        context.execute_async_v3(stream.handle)
    buffer = stream.allocate(4096)
    for index in range(engine.num_io_tensors):
        context.set_tensor_address(engine.get_tensor_name(index), buffer.device)
    with pytest.raises(Misuse, match="without a run of the same shape"):
        stream.capture(lambda: context.execute_async_v3(stream.handle))
    context.execute_async_v3(stream.handle)
    stream.synchronize()
    graph = stream.capture(lambda: context.execute_async_v3(stream.handle))
    context.set_input_shape("image", (2, 32, 32, 1))
    context.infer_shapes()
    context.execute_async_v3(stream.handle)
    stream.launch(graph)
    with pytest.raises(Misuse, match="other shapes or addresses"):
        stream.synchronize()


def test_the_fake_notices_a_graph_whose_context_is_gone(rig: Rig) -> None:
    runtime = FakeRuntime(rig.trt, None)
    engine = FakeEngine(rig.trt, runtime, rig.artifact.model)
    stream = open_device(rig.cuda).open_stream()
    buffer = stream.allocate(4096)
    context = FakeContext(rig.trt, engine)
    context.set_input_shape("image", (1, 32, 32, 1))
    context.infer_shapes()
    for index in range(engine.num_io_tensors):
        context.set_tensor_address(engine.get_tensor_name(index), buffer.device)
    context.execute_async_v3(stream.handle)
    del context
    with pytest.raises(Misuse, match="context that was released"):
        stream.synchronize()


def public_methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, member in inspect.getmembers(kind):
        if not name.startswith("_") and name != "engine":
            yield name, member


def test_the_fake_has_the_names_and_arguments_of_the_genuine_module() -> None:
    genuine = pytest.importorskip("tensorrt_rtx")
    kinds = {FakeRuntime: "Runtime", FakeEngine: "ICudaEngine", FakeContext: "IExecutionContext"}
    for fake, name in (*kinds.items(), (RtxContext, "IExecutionContext")):
        for method, ours in public_methods(fake):
            theirs = getattr(getattr(genuine, name), method)
            if inspect.isfunction(ours):
                assert accepts(theirs.__doc__, method, len(inspect.signature(ours).parameters) - 1, set()), method
    assert {member.name for member in DataType} <= set(genuine.DataType.__members__)
    assert hasattr(genuine.TensorIOMode, "INPUT")


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(BackendError, GroodEdgeError)
    assert not issubclass(Misuse, Exception), "an error handler would hide a misuse"
