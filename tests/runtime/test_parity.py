"""Broken backends, each caught by its own check; and the head alone, fed with NaN and Inf."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.errors import VerificationError
from grood_edge.ort import open_ort
from grood_edge.outputs import Outputs, select_rows
from grood_edge.runtime.decisions import decided_by
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.parity import require_parity
from grood_edge.runtime.selftest import MODEL
from grood_edge.scoring import INVALID_SCORE
from grood_edge.stored_head import head_model


@dataclasses.dataclass
class Broken:
    """onnxruntime, its outputs spoilt."""

    inner: OnnxRuntimeBackend
    spoil: Callable[[Outputs], Outputs]
    provider: str = "tensorrt"

    def run(self, frames: np.ndarray) -> Outputs:
        return self.spoil(self.inner.run(frames))

    def close(self) -> None:
        self.inner.close()


@pytest.fixture(scope="module")
def artifact(artifact_path: Path) -> Artifact:
    return read_artifact(artifact_path)


@pytest.fixture(scope="module")
def reference(artifact: Artifact) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(artifact)


def check(artifact: Artifact, reference: OnnxRuntimeBackend, spoil: Callable[[Outputs], Outputs]) -> None:
    require_parity(Broken(reference, spoil), artifact.contract, reference, 8)


def test_a_right_backend(artifact: Artifact, reference: OnnxRuntimeBackend) -> None:
    report = require_parity(Broken(reference, lambda o: o), artifact.contract, reference, 8)
    assert report.batches == (1, 2, 3, 8)
    assert report.largest_error < 1e-4 < report.tolerance
    assert report.frames >= 10
    assert report.rows > 4 * report.frames


def test_the_largest_batch_counts(artifact: Artifact, reference: OnnxRuntimeBackend) -> None:
    assert require_parity(Broken(reference, lambda o: o), artifact.contract, reference, 1).batches == (1,)
    assert require_parity(Broken(reference, lambda o: o), artifact.contract, reference, 5).batches == (1, 2, 3, 5)


def test_a_fixed_batch_runs_alone(single_path: Path) -> None:
    single = read_artifact(single_path)
    backend = OnnxRuntimeBackend(single)
    assert require_parity(backend, single.contract, backend, 8).batches == (1,)


def with_score(outputs: Outputs, change: Callable[[np.ndarray], np.ndarray]) -> Outputs:
    return dataclasses.replace(outputs, ood_score=change(outputs.ood_score.copy()).astype(np.float32))


def wrong_in_threes(outputs: Outputs) -> Outputs:
    return with_score(outputs, lambda s: s + 1) if len(outputs) == 3 else outputs


def second_row_wrong(outputs: Outputs) -> Outputs:
    """Rows of one batch that differ although their images do not."""
    if len(outputs) < 8 or np.ptp(outputs.ood_score) > 1e-4:
        return outputs
    return with_score(outputs, lambda s: np.where(np.arange(len(s)) == 1, s + 1, s))


def rotated(outputs: Outputs) -> Outputs:
    return select_rows(outputs, np.roll(np.arange(len(outputs)), 1))


def no_nan_seen(outputs: Outputs) -> Outputs:
    return with_score(outputs, lambda s: np.full_like(s, np.nan))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: with_score(o, lambda s: s + 0.5), "does not reproduce the artifact's probes: ood_score is off by"),
        (no_nan_seen, "probes: ood_score is off by up to inf"),
        (lambda o: dataclasses.replace(o, is_ood=~o.is_ood), "decisions flip"),
        (lambda o: dataclasses.replace(o, class_id=(o.class_id + 1) % 7), "decisions flip"),
        (wrong_in_threes, "answers wrongly in batches of 3"),
        (second_row_wrong, "answers wrongly of one image repeated in a batch"),
        (rotated, "does not reproduce|answers wrongly in batches of 2"),
        (lambda o: dataclasses.replace(o, logits=o.logits * np.float32(1.5)), "logits by"),
        (lambda o: dataclasses.replace(o, features=o.features * np.float32(1.5)), "features by"),
        (lambda o: dataclasses.replace(o, p_value=o.p_value * np.float32(0.9)), "p_value or is_ood of"),
        (lambda o: dataclasses.replace(o, valid=~o.valid), "decisions flip|'valid' differs"),
    ],
)  # fmt: skip
def test_broken_backends(
    artifact: Artifact, reference: OnnxRuntimeBackend, spoil: Callable[[Outputs], Outputs], message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        check(artifact, reference, spoil)


def in_threes(spoil: Callable[[Outputs], Outputs]) -> Callable[[Outputs], Outputs]:
    """Right alone and in pairs, so that the probes pass."""
    return lambda outputs: spoil(outputs) if len(outputs) == 3 else outputs


def last_row(name: str, value: float) -> Callable[[Outputs], Outputs]:
    def spoil(outputs: Outputs) -> Outputs:
        values = getattr(outputs, name).copy()
        values[-1] = value
        return dataclasses.replace(outputs, **{name: values})

    return in_threes(spoil)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (last_row("features", np.nan), "features by nan"),
        (last_row("features", np.inf), "features by inf"),
        (last_row("logits", np.nan), "logits by nan"),
        (last_row("p_value", np.nan), "p_value or is_ood of"),
        (last_row("class_id", 999), "class_id is 999; expected 0 to 6"),
        (last_row("class_id", -(2**31)), "class_id is -2147483648; expected 0 to 6"),
        (in_threes(lambda o: select_rows(o, slice(0, 2))), r"logits and features are \(14, 7\).*expected \(21, 7\)"),
        (in_threes(lambda o: dataclasses.replace(o, logits=o.logits[:, :-1])), r"\(21, 6\).*expected \(21, 7\)"),
    ],
)
def test_garbage_that_no_comparison_may_let_pass(spoil: Callable[[Outputs], Outputs], message: str) -> None:
    """NaN compares as False, and indices that lie outside must not end in a traceback: `auto` would not fall back."""
    packaged = read_artifact(MODEL)
    backend = OnnxRuntimeBackend(packaged)
    with pytest.raises(VerificationError, match=message):
        check(packaged, backend, spoil)


def test_rows_that_depend_on_their_neighbours(artifact: Artifact, reference: OnnxRuntimeBackend) -> None:
    """A little, so that only the same batch in another order shows it."""
    tolerance = require_parity(Broken(reference, lambda o: o), artifact.contract, reference, 8).tolerance

    def spoil(outputs: Outputs) -> Outputs:
        changed = with_score(outputs, lambda s: s + (0.4 * tolerance * (np.arange(len(s)) == 7)))
        return decided_by(artifact.contract.calibration.rule(7), changed)

    with pytest.raises(VerificationError, match=r"of one image repeated|in another order"):
        check(artifact, reference, spoil)


def test_a_network_that_overflows_must_be_invalid(overflowing_path: Path) -> None:
    artifact = read_artifact(overflowing_path)
    backend = OnnxRuntimeBackend(artifact)

    def ignores_valid(outputs: Outputs) -> Outputs:
        return dataclasses.replace(outputs, valid=np.ones_like(outputs.valid))

    frames = np.full((2, 32, 32, 1), 204, np.uint8)
    assert not backend.run(frames).valid.any()
    with pytest.raises(VerificationError):
        require_parity(Broken(backend, ignores_valid, "cpu"), artifact.contract, reference=_greys(backend), most=2)


def _greys(backend: OnnxRuntimeBackend) -> Broken:
    """The reference, as if every frame overflowed."""
    frame = np.full((1, 32, 32, 1), 204, np.uint8)
    return Broken(backend, lambda o: select_rows(backend.run(frame), np.zeros(len(o), np.int64)), "cpu")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_the_head_alone_with_values_that_no_pixel_can_make(artifact: Artifact, value: float) -> None:
    head = open_ort(head_model(artifact.model))
    features, logits = (np.zeros((3, head.inputs[name][1]), np.float32) for name in ("features", "logits"))
    features[1, 0] = value
    found = head.run({"features": features, "logits": logits})
    assert found["valid"].tolist() == [True, False, True]
    assert found["is_ood"][1]
    assert found["ood_score"][1] == np.float32(INVALID_SCORE)
    assert found["p_value"][1] == 0


def test_the_head_alone_becomes_an_engine(artifact: Artifact) -> None:
    pytest.importorskip("tensorrt_rtx")
    from tests.rtx import build_rtx

    assert build_rtx(head_model(artifact.model)).stage == "built"
