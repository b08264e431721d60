"""The equation three times: torch autograd on the literal definition, NumPy's closed form, and the ONNX head."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from onnx import TensorProto, ValueInfoProto, helper

from grood_edge.arrays import Bank, Features, Features64, Prototypes, Scores64, Vector64
from grood_edge.export.graph import attach_head
from grood_edge.export.normal_form import IR_VERSION
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import OrtModel, open_ort
from grood_edge.scoring import Head, OodHead, gradients, nearest_gap, ood_scores
from grood_edge.stored_head import head_from_model, head_model

CLOSED_FORM_TOLERANCE = 1e-9  # both float64; what is lost is the cancellation in ||g - g_i||
HEAD_TOLERANCE = 2e-4  # float32 head against float64, where E = S^2 / max(s, s_i)^2 > MIN_GAP (method, section 3)
MIN_GAP = 1e-3

NORMS = (1.0, 80.0, 500.0)
CLASS_COUNTS = (2, 10, 100)
DIMENSION = 96


@dataclass(frozen=True)
class Case:
    """Features after a ReLU at one norm: fit images, and images to score (half of them of no class)."""

    fit: Features
    scored: Features
    prototypes: Prototypes
    ood_prototype: Vector64

    def head(self) -> Head:
        g = gradients(self.fit.astype(np.float64), self.prototypes, self.ood_prototype)
        return Head(self.prototypes, (OodHead(self.ood_prototype, g.u, g.log_s),))


def make_case(norm: float, classes: int) -> Case:
    rng = np.random.default_rng([classes, int(norm)])
    centers = np.maximum(rng.standard_normal((classes, DIMENSION)), 0)

    def around(rows: np.ndarray) -> Features:
        h = np.maximum(rows + 0.4 * rng.standard_normal(rows.shape), 0)
        scaled: Features = (h * norm / np.linalg.norm(centers, axis=1).mean()).astype(np.float32)
        return scaled

    labels = np.arange(300) % classes
    fit = around(centers[labels])
    strangers = np.maximum(rng.standard_normal((40, DIMENSION)), 0)
    scored = np.concatenate([around(centers[np.arange(40) % classes]), around(strangers)])
    prototypes = np.stack([fit[labels == c].astype(np.float64).mean(axis=0) for c in range(classes)])
    return Case(fit, scored, prototypes, prototypes.mean(axis=0))


def autograd_gradients(features: Features64, prototypes: Prototypes, ood_prototype: Vector64) -> Bank:
    """Return d cross_entropy(softmax(-distances), predicted class) / d p_ood, one row an image, from torch alone."""
    h, p = torch.from_numpy(features), torch.from_numpy(prototypes)
    p_ood = (
        torch.from_numpy(ood_prototype).expand(len(h), -1).clone().requires_grad_()
    )  # a copy a row: one gradient each
    class_distances = torch.linalg.vector_norm(h[:, None, :] - p[None], dim=2)
    ood_distance = torch.linalg.vector_norm(h - p_ood, dim=1)
    logits = -torch.cat([class_distances, ood_distance[:, None]], dim=1)
    predicted = class_distances.argmin(dim=1)
    torch.nn.functional.cross_entropy(logits, predicted, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert p_ood.grad is not None
    return np.asarray(p_ood.grad.numpy())


def literal_log_s(samples: Bank, bank: Bank) -> Scores64:
    """Return log min_i ||g - g_i||, each row scaled first: the squares of 1e-200 are 0."""
    scores = np.empty(len(samples))
    for row, g in enumerate(samples):
        scale = max(np.abs(g).max(), np.abs(bank).max())
        scores[row] = np.log(scale) + np.log(np.linalg.norm((g - bank) / scale, axis=1).min())
    return scores


def onnx_head(head: Head, scores: np.ndarray | None = None, rank: int = 1, classes: int = 10) -> bytes:
    """Build the head of the export with `features` and `logits` as inputs."""
    shapes = {"logits": classes, "features": head.prototypes.shape[1]}

    def values(prefix: str) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(prefix + n, TensorProto.FLOAT, ["N", s]) for n, s in shapes.items()]

    nodes = [helper.make_node("Identity", [f"in_{name}"], [name], name=name) for name in shapes]
    graph = helper.make_graph(nodes, "base", values("in_"), values(""))
    base = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    calibration = np.zeros(1, np.float32) if scores is None else np.sort(scores).astype(np.float32)
    return head_model(attach_head(base, head, calibration, rank).SerializeToString())


def run_head(model: OrtModel, features: Features, batch: int = 0) -> dict[str, np.ndarray]:
    logits = np.zeros((len(features), model.inputs["logits"][1]), np.float32)
    step = batch or len(features)
    runs = [
        model.run({"features": features[i : i + step], "logits": logits[i : i + step]})
        for i in range(0, len(features), step)
    ]
    return {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}


@pytest.mark.parametrize("classes", CLASS_COUNTS)
@pytest.mark.parametrize("norm", NORMS)
def test_autograd_numpy_and_onnx_agree(norm: float, classes: int) -> None:
    case = make_case(norm, classes)
    scored = case.scored.astype(np.float64)

    samples = autograd_gradients(scored, case.prototypes, case.ood_prototype)
    bank = autograd_gradients(case.fit.astype(np.float64), case.prototypes, case.ood_prototype)
    literal = literal_log_s(samples, bank)
    closed = ood_scores(scored, case.head())
    np.testing.assert_allclose(np.exp(closed - literal), 1.0, rtol=0, atol=CLOSED_FORM_TOLERANCE)

    stored = onnx_head(case.head())
    definition = head_from_model(stored)
    expected, comparable = ood_scores(scored, definition), nearest_gap(scored, definition) > MIN_GAP
    assert comparable.mean() > 0.9
    actual = run_head(open_ort(stored), case.scored)
    assert actual["valid"].all()
    np.testing.assert_allclose(actual["ood_score"][comparable], expected[comparable], rtol=0, atol=HEAD_TOLERANCE)
    # Storing prototypes and bank as float32 moves the score as well: that much and no more.
    np.testing.assert_allclose(actual["ood_score"][comparable], literal[comparable], rtol=0, atol=2 * HEAD_TOLERANCE)


def test_the_predicted_class_does_not_enter_the_gradient() -> None:
    case = make_case(5.0, 4)
    p_ood = torch.from_numpy(case.ood_prototype).requires_grad_()
    h, p = torch.from_numpy(case.scored[0].astype(np.float64)), torch.from_numpy(case.prototypes)
    found: list[np.ndarray] = []
    for predicted in range(4):
        logits = -torch.linalg.vector_norm(torch.cat([p, p_ood[None]]) - h, dim=1)
        (gradient,) = torch.autograd.grad(
            torch.nn.functional.cross_entropy(logits[None], torch.tensor([predicted])), [p_ood]
        )
        found.append(gradient.numpy())
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-12)


def test_scores_survive_where_s_underflows_float32() -> None:
    case = make_case(500.0, 10)
    head = case.head()
    log_s = gradients(case.scored.astype(np.float64), case.prototypes, case.ood_prototype).log_s
    assert (np.exp(log_s.astype(np.float32)) == 0).mean() > 0.3  # the hazard is there: a literal port would tie at 0
    scores = run_head(open_ort(onnx_head(head)), case.scored)["ood_score"]
    assert np.isfinite(scores).all()
    known, strange = scores[:40], scores[40:]
    assert known.min() < -200  # exp(-200) is far below float32
    assert len(np.unique(known)) == len(known)
    assert strange.min() > known.max()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [0.0, 1e-9])
def test_a_frame_on_the_ood_prototype_is_ood(norm: float, offset: float) -> None:
    case = make_case(norm, 10)
    head = case.head()
    id_scores = ood_scores(case.scored[:40].astype(np.float64), head)
    on_prototype = (case.ood_prototype + offset)[None]
    assert ood_scores(on_prototype, head)[0] > id_scores.max()

    # The zero gradient of the literal definition is the hazard: with s near 0 in the bank it reads as "most ID".
    model = open_ort(onnx_head(head, id_scores.astype(np.float32), rank=1))
    outputs = run_head(model, on_prototype.astype(np.float32))
    assert outputs["valid"][0]
    assert outputs["is_ood"][0]
    assert outputs["p_value"][0] == pytest.approx(1 / 41)


def test_a_dead_frame_on_the_origin_as_ood_prototype_is_ood() -> None:
    """h - p_ood is exactly 0 in float32 as well: a black frame after a ReLU, and the origin as prototype."""
    case = make_case(80.0, 10)
    origin = np.zeros(DIMENSION)
    head = Case(case.fit, case.scored, case.prototypes, origin).head()
    id_scores = ood_scores(case.scored[:40].astype(np.float64), head)
    dead = np.zeros((1, DIMENSION))
    assert gradients(dead, case.prototypes, origin).u.max() == 0
    outputs = run_head(open_ort(onnx_head(head, id_scores.astype(np.float32), rank=1)), dead.astype(np.float32))
    assert outputs["valid"][0]
    assert outputs["is_ood"][0]
    assert outputs["ood_score"][0] == pytest.approx(ood_scores(dead, head)[0], abs=HEAD_TOLERANCE)


def test_a_frame_on_a_class_prototype_is_not_ood() -> None:
    case = make_case(80.0, 10)
    head = case.head()
    scores = ood_scores(case.prototypes, head)
    assert scores.max() < np.median(ood_scores(case.scored[40:].astype(np.float64), head))


def test_bank_rows_score_at_the_floor() -> None:
    """Which is why calibration images must not be bank images, and probes neither."""
    case = make_case(5.0, 10)
    head = case.head()
    floor = head.only().bank_log_s + 0.5 * np.log(1e-12)
    on_bank = ood_scores(case.fit.astype(np.float64), head)
    np.testing.assert_allclose(on_bank, floor, atol=1e-2)
    assert on_bank.max() < ood_scores(case.scored.astype(np.float64), head).min() - 5
    np.testing.assert_array_less(nearest_gap(case.fit.astype(np.float64), head), 1e-11)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_head_does_not_depend_on_the_batch(batch: int) -> None:
    case = make_case(80.0, 10)
    head = case.head()
    model = open_ort(onnx_head(head))
    whole, parts = run_head(model, case.scored), run_head(model, case.scored, batch)
    comparable = nearest_gap(case.scored.astype(np.float64), head) > MIN_GAP
    np.testing.assert_allclose(parts["ood_score"][comparable], whole["ood_score"][comparable], atol=HEAD_TOLERANCE)


def test_huge_finite_features_are_valid_or_flagged_but_never_nan() -> None:
    case = make_case(80.0, 10)
    model = open_ort(onnx_head(case.head()))
    features = np.stack([case.scored[0] / np.abs(case.scored[0]).max() * np.float32(10.0**e) for e in range(39)])
    outputs = run_head(model, features)
    assert np.isfinite(outputs["ood_score"]).all()
    assert outputs["valid"][:18].all()
    assert not outputs["valid"][20:].any()  # |h|^2 overflows float32
    assert outputs["is_ood"][~outputs["valid"]].all()
    assert (outputs["ood_score"][~outputs["valid"]] == np.float32(3.4e38)).all()


def test_more_rows_than_one_block_and_none_at_all() -> None:
    case = make_case(5.0, 4)
    head = case.head()
    rows = np.tile(case.scored.astype(np.float64), (20, 1))
    np.testing.assert_allclose(ood_scores(rows, head), np.tile(ood_scores(rows[:80], head), 20), rtol=1e-9)
    assert nearest_gap(rows, head).shape == (1600,)
    assert ood_scores(rows[:0], head).shape == nearest_gap(rows[:0], head).shape == (0,)
