"""Frame after frame through one session: no arrays are made, threads do not meet, decisions stay what they were."""

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from grood_edge.arrays import Frames
from grood_edge.artifact import Artifact, read_artifact
from grood_edge.conformal import DecisionRule, rank_for
from grood_edge.errors import BackendError, FrameError
from grood_edge.outputs import OUTPUT_NAMES, Outputs
from grood_edge.runtime import ReplayBackend, Session, Verdict, open_session, record
from grood_edge.runtime.backend import FreshLane
from grood_edge.runtime.decisions import class_thresholds, is_alarm
from grood_edge.runtime.onnxrt import MOST_IDLE, MOST_KEPT, OnnxRuntimeBackend
from grood_edge.runtime.selftest import MODEL

SIDE = 256  # of the wide artifact: a frame has 196,608 bytes, which cannot hide among Python's small objects
LITTLE = 32_000  # bytes: verdicts, views, and what the checks of annotations need under test


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return read_artifact(MODEL)


@pytest.fixture(scope="module")
def wide(artifact: Artifact) -> Artifact:
    """The packaged digit artifact, seeing the red corner of RGB frames of 256x256."""
    model = onnx.load_model_from_string(artifact.model)
    for node in model.graph.node:
        node.input[:] = ["corner" if name == "image" else name for name in node.input]
    bounds = {"starts": [0, 0, 0], "ends": [32, 32, 1], "axes": [1, 2, 3]}
    for name, value in bounds.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    model.graph.node.insert(0, helper.make_node("Slice", ["image", *bounds], ["corner"]))
    for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], (SIDE, SIDE, 3), strict=True):
        dim.dim_value = side
    p = artifact.contract.preprocessing
    size = replace(p, height=SIDE, width=SIDE, channels=3, mean=p.mean * 3, std=p.std * 3)
    return replace(artifact, model=model.SerializeToString(), contract=replace(artifact.contract, preprocessing=size))


def single(artifact: Artifact) -> Artifact:
    """The artifact with its batch fixed at 1."""
    model = onnx.load_model_from_string(artifact.model)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    classifier = replace(artifact.contract.classifier, batch="1")
    return replace(
        artifact, model=model.SerializeToString(), contract=replace(artifact.contract, classifier=classifier)
    )


def opened(artifact: Artifact, **options: Any) -> Session:
    return Session(artifact, OnnxRuntimeBackend(artifact, threads=1), **options)


@pytest.fixture(scope="module")
def session(artifact: Artifact) -> Iterator[Session]:
    with opened(artifact) as session:
        yield session


@pytest.fixture(scope="module")
def frames() -> Frames:
    """Noise of growing strength on grey: scores on both sides of the threshold are not needed, different ones are."""
    rng = np.random.default_rng(0)
    strength = np.linspace(0, 127, 40).reshape(-1, 1, 1, 1)
    found: Frames = (128 + strength * rng.uniform(-1, 1, (40, 32, 32, 1))).astype(np.uint8)
    return found


class RunOnly:
    """A user's backend: it lends nothing, and keeps what it was given."""

    provider = "mine"

    def __init__(self, inner: OnnxRuntimeBackend) -> None:
        self.inner = inner
        self.seen: list[np.ndarray] = []

    def run(self, frames: Frames) -> Outputs:
        self.seen.append(frames)
        return self.inner.run(frames)

    def close(self) -> None:
        self.inner.close()


def largest_use(call: Callable[[], object], runs: int = 200) -> int:
    """Return the largest number of bytes that calls held at a time, after warm-up; NumPy reports its arrays' memory."""
    for _ in range(5):
        call()
    tracemalloc.start()
    try:
        call()
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        for _ in range(runs):
            call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


class TestAllocation:
    @pytest.mark.parametrize("shape", [(SIDE, SIDE, 3), (SIDE, SIDE, 1), (SIDE, SIDE)])
    @pytest.mark.parametrize("color", ["rgb", "bgr"])
    def test_a_frame_of_the_inputs_size_makes_no_array(
        self, wide: Artifact, shape: tuple[int, ...], color: Any
    ) -> None:
        frame = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        with opened(wide, color=color) as session:
            assert largest_use(lambda: session.predict(frame)) < LITTLE

    @pytest.mark.parametrize("color", ["rgb", "bgr"])
    def test_no_array_of_a_frame_is_made_to_resize_it(self, artifact: Artifact, color: Any) -> None:
        assert artifact.contract.preprocessing.channels == 1
        frame = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
        center = replace(artifact.contract.preprocessing, crop="center", short_side=36)
        for p in (artifact.contract.preprocessing, center):
            resizing = replace(artifact, contract=replace(artifact.contract, preprocessing=p))
            with opened(resizing, color=color) as session:
                most = largest_use(partial(session.predict, frame), 20)
                assert most < 65_536 + LITTLE < frame.nbytes // 9  # the first is what Pillow encodes into

    def test_nor_does_a_batch(self, wide: Artifact) -> None:
        frames = np.random.default_rng(0).integers(0, 256, (4, SIDE, SIDE, 3), np.uint8)
        with opened(wide) as session:
            assert largest_use(lambda: session.predict_batch(frames), 20) < LITTLE

    def test_nor_one_where_the_graph_takes_single_images(self, wide: Artifact) -> None:
        frame = np.zeros((SIDE, SIDE, 3), np.uint8)
        with opened(single(wide)) as session:
            assert largest_use(lambda: session.predict(frame)) < LITTLE
            assert largest_use(lambda: session.predict_batch([frame, frame]), 20) < LITTLE

    @pytest.mark.parametrize("lends", [True, False])
    def test_no_array_lives_when_the_verdict_is_made(
        self, artifact: Artifact, frames: Frames, monkeypatch: pytest.MonkeyPatch, lends: bool
    ) -> None:
        backend = OnnxRuntimeBackend(artifact)
        session, verdicts = Session(artifact, backend if lends else RunOnly(backend)), Session.verdicts
        made = []

        def spied(session: Session, *arguments: Any) -> list[Verdict]:
            arrays = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
            made.append(len(tracemalloc.take_snapshot().filter_traces([arrays]).traces))
            return verdicts(session, *arguments)

        for frame in frames[:5]:
            session.predict(frame)
        monkeypatch.setattr(Session, "verdicts", spied)
        tracemalloc.start()
        try:
            for frame in frames[:5]:
                session.predict(frame)
        finally:
            tracemalloc.stop()
        assert (made == [0] * 5) == lends

    def test_the_measure_sees_an_array(self, wide: Artifact) -> None:
        frame = np.zeros((SIDE, SIDE, 3), np.uint8)
        with Session(wide, RunOnly(OnnxRuntimeBackend(wide))) as session:
            assert largest_use(lambda: session.predict(frame), 3) > frame.nbytes

    def test_resizing_leaves_nothing_behind(self, wide: Artifact) -> None:
        frame = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
        with opened(wide) as session:
            session.predict(frame)
            tracemalloc.start()
            try:
                session.predict(frame)
                before = tracemalloc.get_traced_memory()[0]
                for _ in range(30):
                    session.predict(frame)
                assert tracemalloc.get_traced_memory()[0] - before < LITTLE
            finally:
                tracemalloc.stop()

    def test_buffers_are_the_same_every_time(self, artifact: Artifact, frames: Frames) -> None:
        backend = OnnxRuntimeBackend(artifact)
        addresses = set()
        for frame in frames[:10]:
            with backend.lend(1) as lane:
                lane.frames[0] = frame
                lane.run()
                outputs = lane.run()
                addresses.add((lane.frames.ctypes.data, *(getattr(outputs, n).ctypes.data for n in OUTPUT_NAMES)))
        assert len(addresses) == 1

    def test_buffers_that_are_kept_are_bounded(self, artifact: Artifact) -> None:
        with opened(artifact) as session:
            for size in range(1, MOST_KEPT + 4):
                assert len(session.predict_batch(np.zeros((size, 32, 32), np.uint8))) == size
            assert isinstance(session.backend, OnnxRuntimeBackend)
            kept = [len(lane.frames) for lane in session.backend._idle]
        assert kept == list(range(MOST_KEPT - MOST_IDLE + 1, MOST_KEPT + 1))
        assert not session.backend._idle  # closed


class TestSameAnswer:
    def test_bound_as_unbound(self, session: Session, frames: Frames) -> None:
        alone = [session.verdicts(session.infer([frame]))[0] for frame in frames]
        assert [session.predict(frame) for frame in frames] == alone
        assert len({verdict.ood_score for verdict in alone}) > 30
        assert session.predict_batch(frames) == session.verdicts(session.infer(frames))
        assert session.predict_batch(frames[:7]) == session.verdicts(session.infer(frames[:7]))

    def test_with_reasons(self, session: Session, frames: Frames) -> None:
        expected = session.verdicts(session.infer(frames[:3]), explain=True)
        assert session.predict_batch(frames[:3], explain=True) == expected
        assert expected[0].reason is not None
        reason = session.predict(frames[0], explain=True).reason
        assert reason is not None
        assert reason.nearest_class == expected[0].reason.nearest_class

    def test_single_images(self, artifact: Artifact, session: Session, frames: Frames) -> None:
        with opened(single(artifact)) as alone:
            found = [alone.predict(frame) for frame in frames]
            assert found == [session.predict(frame) for frame in frames]
            assert alone.predict_batch(frames) == found

    def test_arrays_of_infer_belong_to_the_caller(self, session: Session, frames: Frames) -> None:
        first = session.infer(frames[:1])
        kept = first.features.copy()
        for frame in frames[1:4]:
            session.predict(frame)
        np.testing.assert_array_equal(first.features, kept)

    def test_backends_that_lend_nothing_get_arrays_of_their_own(
        self, artifact: Artifact, session: Session, frames: Frames
    ) -> None:
        backend = RunOnly(OnnxRuntimeBackend(artifact))
        expected = [session.predict(frame) for frame in frames[:5]]
        with Session(artifact, backend) as mine:
            assert [mine.predict(frame) for frame in frames[:5]] == expected
        np.testing.assert_array_equal(np.concatenate(backend.seen), frames[:5])
        recording = record(session.backend, [frame[None] for frame in frames[:5]])
        with Session(artifact, ReplayBackend(recording)) as replayed:
            assert [replayed.predict(frame) for frame in frames[:5]] == expected

    def test_gpu_providers_get_new_arrays(self, artifact: Artifact) -> None:
        backend = OnnxRuntimeBackend(artifact)
        backend.provider = "cuda"
        with backend.lend(2) as first, backend.lend(2) as second:
            assert isinstance(first, FreshLane)
            assert first.frames is not second.frames
            assert len(first.run()) == 2

    def test_a_class_that_is_none(self, artifact: Artifact, session: Session, frames: Frames) -> None:
        outputs = session.infer(frames[:2])
        for label in (-1, 7):
            wrong = replace(outputs, class_id=np.array([0, label], np.int32))
            with pytest.raises(BackendError, match=rf"class_id {label}; expected 0 to 6"):
                session.verdicts(wrong)

    def test_outputs_of_another_shape_than_at_the_first_run(self, session: Session) -> None:
        assert isinstance(session.backend, OnnxRuntimeBackend)
        model = session.backend._model
        assert model is not None
        image, wrong = np.zeros((1, 32, 32, 1), np.uint8), np.zeros((1, 8), np.float32)
        with pytest.raises(BackendError, match="onnxruntime failed: "):
            model.bind({"image": image}, {"logits": wrong})()


class TestThreads:
    def test_eight_threads_get_the_verdicts_of_one(self, artifact: Artifact, frames: Frames) -> None:
        start = threading.Barrier(8)
        with opened(artifact) as session:
            expected = [session.predict(frame) for frame in frames]
            batches = session.predict_batch(frames[:5])

            def work(offset: int) -> list[Verdict]:
                start.wait()
                found: dict[int, Verdict] = {}
                for step in range(2 * len(frames)):
                    index = (offset * 5 + step) % len(frames)
                    found[index] = session.predict(frames[index])
                    if step % 16 == offset:  # others in between: larger batches, refused frames, the caller's arrays
                        assert session.predict_batch(frames[:5]) == batches
                        assert session.verdicts(session.infer(frames[:5])) == batches
                        with pytest.raises(FrameError):
                            session.predict(np.zeros((0, 8), np.uint8))
                return [found[index] for index in range(len(frames))]

            with ThreadPoolExecutor(8) as pool:
                for verdicts in pool.map(work, range(8)):
                    assert verdicts == expected
            assert isinstance(session.backend, OnnxRuntimeBackend)
            assert len(session.backend._idle) <= MOST_IDLE

    def test_no_two_blocks_share_buffers(self, artifact: Artifact) -> None:
        backend = OnnxRuntimeBackend(artifact)
        with backend.lend(1) as first, backend.lend(1) as second:
            assert not np.shares_memory(first.frames, second.frames)
        with backend.lend(1) as again, backend.lend(2) as other:
            assert again in (first, second)
            assert len(other.frames) == 2

    def test_closed_while_others_run(self, artifact: Artifact, frames: Frames) -> None:
        session = opened(artifact)
        expected = session.predict(frames[0])
        running = threading.Barrier(5)

        def work() -> str:
            running.wait()
            try:
                while True:
                    assert session.predict(frames[0]) == expected
            except BackendError as error:
                return str(error)

        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(work) for _ in range(4)]
            running.wait()
            session.close()
            said = {result.result(timeout=30) for result in results}
        assert said == {"the session is closed; open it again with open_session(...)"}
        assert isinstance(session.backend, OnnxRuntimeBackend)
        assert not session.backend._idle


def _rules() -> list[DecisionRule]:
    """One group and one a class, with many ties, at several alphas."""
    rng = np.random.default_rng(0)
    found = []
    for sizes in ((314,), (100, 80, 150)):
        groups = tuple(np.sort(np.round(rng.normal(-4, 1, size), 1)).astype(np.float32) for size in sizes)
        of_class = np.arange(3, dtype=np.int32) if len(sizes) == 3 else np.zeros(3, np.int32)
        for alpha, delta in ((0.05, 0.05), (0.3, 0.05), (0.02, None), (0.9, 0.1)):
            found.append(DecisionRule(groups, tuple(rank_for(alpha, delta, size) for size in sizes), of_class))
    return found


@pytest.mark.parametrize("rule", _rules())
def test_one_frame_is_decided_as_in_a_batch(rule: DecisionRule) -> None:
    calibration = np.concatenate(rule.scores)
    neighbours = [np.nextafter(calibration, np.float32(side)) for side in (-np.inf, np.inf)]
    special = np.array([np.nan, np.inf, -np.inf, 0, -0.0, 3.4e38, -3.4e38], np.float32)
    scores = np.concatenate([calibration, *neighbours, special, np.random.default_rng(1).normal(-4, 2, 500)])
    scores = scores.astype(np.float32)
    thresholds = class_thresholds(rule)
    for label in range(3):
        expected = rule.is_alarm(scores, np.full(len(scores), label, np.int32))
        assert [is_alarm(score, thresholds[label]) for score in scores.tolist()] == expected.tolist()
        assert 0 < expected.sum() < len(scores)


@pytest.mark.parametrize("alpha", [None, 0.3, 0.9])
def test_verdicts_are_decided_as_the_array_of_decisions(alpha: float | None, frames: Frames) -> None:
    with open_session(MODEL, alpha=alpha, threads=1) as session:
        outputs = session.infer(frames)
        calibration = session.contract.calibration.sorted_scores()
        chosen = np.random.default_rng(0).choice(calibration, len(frames)).astype(np.float32)
        valid = np.arange(len(frames)) % 5 != 0
        outputs = replace(outputs, ood_score=chosen, valid=valid)
        decisions = session.is_ood(outputs)
        assert [verdict.is_ood for verdict in session.verdicts(outputs)] == decisions.tolist()
        assert decisions.any()
        assert not decisions.all()
