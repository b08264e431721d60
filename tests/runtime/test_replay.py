"""The replay backend gives the verdicts of the backend that was recorded, and nothing else."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from grood_edge.arrays import Frame
from grood_edge.demo.images import DemoImages
from grood_edge.errors import BackendError
from grood_edge.images import find_images, load_image
from grood_edge.outputs import OUTPUT_NAMES
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import Backend, ReplayBackend, Session, open_session
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.replay import Recorded, record


@pytest.fixture(scope="module")
def frames(digits: DemoImages) -> list[Frame]:
    paths = [*find_images(digits.test)[::30], *find_images(digits.far_photos)[::40]]
    return [load_image(path) for path in paths]


@pytest.fixture(scope="module")
def session(artifact_path: Path) -> Session:
    return open_session(artifact_path)


@pytest.fixture(scope="module")
def batches(session: Session, frames: list[Frame]) -> list[np.ndarray]:
    """Batches of three, and a rest."""
    ready = [preprocess_frame(frame, session.contract.preprocessing) for frame in frames]
    return [np.stack(ready[i : i + 3]) for i in range(0, len(ready), 3)]


@pytest.fixture(scope="module")
def recording(session: Session, batches: list[np.ndarray]) -> list[Recorded]:
    return record(session.backend, batches)


def test_both_backends_satisfy_the_protocol(session: Session, recording: list[Recorded]) -> None:
    replay = ReplayBackend(recording)
    typed: list[Backend] = [replay, session.backend]  # for mypy
    assert all(isinstance(backend, Backend) for backend in typed)
    assert isinstance(session.backend, OnnxRuntimeBackend)
    assert replay.provider == "replay"
    assert not isinstance(object(), Backend)
    methods = [name for name in vars(Backend) if not name.startswith("_")]
    assert sorted(methods) == ["close", "run"]


def test_identical_verdicts(
    artifact_path: Path, session: Session, frames: list[Frame], recording: list[Recorded]
) -> None:
    with open_session(artifact_path, backend=ReplayBackend(recording)) as replayed:
        expected = [v for i in range(0, len(frames), 3) for v in session.predict_batch(frames[i : i + 3])]
        assert replayed.predict_batch(frames) == expected
        assert [replayed.predict(frame) for frame in frames] == expected
        assert replayed.predict_batch(frames[::-1]) == expected[::-1]
        assert {v.is_ood for v in expected} == {True, False}


def test_identical_outputs_to_the_bit(batches: list[np.ndarray], recording: list[Recorded]) -> None:
    replay = ReplayBackend(recording)
    for batch, (_, recorded) in zip(batches, recording, strict=True):
        outputs = replay.run(batch)
        for name in OUTPUT_NAMES:
            np.testing.assert_array_equal(getattr(outputs, name), getattr(recorded, name))
            assert getattr(outputs, name).dtype == getattr(recorded, name).dtype


def test_alpha_works_on_a_recording(artifact_path: Path, frames: list[Frame], recording: list[Recorded]) -> None:
    with (
        open_session(artifact_path, alpha=0.3, backend=ReplayBackend(recording)) as replayed,
        open_session(artifact_path, alpha=0.3) as real,
    ):
        assert [v.is_ood for v in replayed.predict_batch(frames)] == [v.is_ood for v in real.predict_batch(frames)]


def test_unknown_frame(artifact_path: Path, frames: list[Frame], recording: list[Recorded]) -> None:
    with open_session(artifact_path, backend=ReplayBackend(recording)) as replayed:
        changed = frames[1].copy()
        changed[0, 0] ^= 1
        with pytest.raises(BackendError, match="frame 1 of 3 is not in the recording; record it first"):
            replayed.predict_batch([frames[0], changed, frames[2]])
    with pytest.raises(BackendError, match="frame 0 of 1 is not in the recording"):
        replayed.predict(frames[0])  # closed: the recording is gone


def test_caller_owns_the_outputs(batches: list[np.ndarray], recording: list[Recorded]) -> None:
    replay = ReplayBackend(recording)
    expected = recording[0][1].features.copy()
    replay.run(batches[0]).features[:] = 0
    np.testing.assert_array_equal(replay.run(batches[0]).features, expected)


def test_provider_is_not_opened_when_a_backend_is_given(artifact_path: Path, recording: list[Recorded]) -> None:
    """A device without onnxruntime's provider can replay."""
    with open_session(artifact_path, provider="cuda", backend=ReplayBackend(recording)) as replayed:
        assert replayed.backend.provider == "replay"


def test_a_backend_may_be_falsy(artifact_path: Path, frames: list[Frame], recording: list[Recorded]) -> None:
    class Sized(ReplayBackend):
        def __len__(self) -> int:
            return 0

    with open_session(artifact_path, backend=Sized(recording)) as replayed:
        assert replayed.backend.provider == "replay"
        assert replayed.predict(frames[0]).valid


def test_a_backend_for_another_artifact(artifact_path: Path, frames: list[Frame], recording: list[Recorded]) -> None:
    """More classes than the contract names: no class name may be made up, and no index may wrap around."""
    wider = [
        (batch, dataclasses.replace(outputs, logits=np.pad(outputs.logits, ((0, 0), (0, 2)))))
        for batch, outputs in recording
    ]
    with (
        open_session(artifact_path, backend=ReplayBackend(wider)) as replayed,
        pytest.raises(BackendError, match="the backend gives 9 logits, but the contract names 7 classes"),
    ):
        replayed.predict(frames[0])
