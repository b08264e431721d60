"""The equation three times: torch autograd on the literal definition, NumPy's closed form, and the ONNX head."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import GraphProto, TensorProto, ValueInfoProto, helper

from grood_edge.arrays import Bank, Features, Features64, Prototypes, Scores64, Vector64
from grood_edge.conformal import DecisionRule
from grood_edge.export.graph import attach_head
from grood_edge.export.normal_form import IR_VERSION
from grood_edge.export.score_map import fitted_map
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import OrtModel, open_ort
from grood_edge.scoring import (
    IDENTITY,
    BankDtype,
    Head,
    OodHead,
    ScoreMap,
    SeenBank,
    class_distances,
    nearest_gap,
    nearest_rows,
    ood_scores,
    pieces,
)
from grood_edge.stored_head import head_from_model, head_model, rounded_rows

CLOSED_FORM_TOLERANCE = 1e-9  # both float64; what is lost is the cancellation in ||g - g_i||
HEAD_TOLERANCE = 2e-4  # float32 head against float64, where E = S^2 / max(s, s_i)^2 > MIN_GAP (method, section 3)
MIN_GAP = 1e-3

NORMS = (1.0, 80.0, 500.0)
SCALES = (0.125, 8.0)
CLASS_COUNTS = (2, 10, 100)
DIMENSION = 96


@dataclass(frozen=True)
class Case:
    """Features after a ReLU at one norm: fit images, and images to score (half of them of no class)."""

    fit: Features
    scored: Features
    prototypes: Prototypes
    ood_prototype: Vector64

    def head(self, kind: str = "float32", scale: float = 1.0) -> Head:
        """The head with one OOD prototype over float32 or int8 rows, with `three` of them and maps, or with no bank."""
        bank = self.fit.astype(np.float64)
        if kind == "no bank":
            return head_over(self.prototypes, bank[:0], (self.ood_prototype,), scale=scale)
        if kind in ("float32", "int8"):
            return head_over(self.prototypes, bank, (self.ood_prototype,), kind, scale=scale)  # type: ignore[arg-type]
        mixed = 0.5 * (self.prototypes[:-1] + self.prototypes[1:]).mean(axis=0) + 0.25 * self.prototypes[0]
        prototypes = (self.ood_prototype, mixed, np.zeros(DIMENSION))
        unmapped = head_over(self.prototypes, bank, prototypes, "int8", scale=scale)
        scores = nearest_rows(self.scored[:40].astype(np.float64), unmapped)
        maps = tuple(fitted_map(nearest.score) for nearest in scores)
        assert all(score_map.knots.size > 5 for score_map in maps)
        return head_over(self.prototypes, bank, prototypes, "int8", maps, scale)


KINDS = ("float32", "int8", "three", "no bank")


def head_over(
    prototypes: Prototypes,
    bank: Bank,
    ood_prototypes: tuple[Vector64, ...],
    dtype: BankDtype = "float32",
    maps: tuple[ScoreMap, ...] = (),
    scale: float = 1.0,
) -> Head:
    """Look at the bank from every OOD prototype."""
    rows = rounded_rows(bank, prototypes, dtype) if len(bank) else bank
    alone = Head(prototypes, bank[:0], tuple(OodHead(p, np.zeros(0)) for p in ood_prototypes), scale=scale)
    seen = nearest_rows(rows, alone)
    maps = maps or (IDENTITY,) * len(ood_prototypes)
    heads = (OodHead(p, n.log_s[: len(rows)], t) for p, n, t in zip(ood_prototypes, seen, maps, strict=True))
    return Head(prototypes, rows, tuple(heads), dtype, scale)


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


def autograd_gradients(
    features: Features64, prototypes: Prototypes, ood_prototype: Vector64, scale: float = 1.0
) -> Bank:
    """Return d cross_entropy(softmax(-a distances), predicted class) / d p_ood, one row an image, from torch alone."""
    h, p = torch.from_numpy(features), torch.from_numpy(prototypes)
    p_ood = (
        torch.from_numpy(ood_prototype).expand(len(h), -1).clone().requires_grad_()
    )  # a copy a row: one gradient each
    class_distances = torch.linalg.vector_norm(h[:, None, :] - p[None], dim=2)
    ood_distance = torch.linalg.vector_norm(h - p_ood, dim=1)
    logits = -scale * torch.cat([class_distances, ood_distance[:, None]], dim=1)
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


def onnx_head(head: Head, scores: np.ndarray | None = None, space: str = "features") -> bytes:
    """Build the head of the export with `features` and `logits` as inputs; rank 1 of the scores decides."""
    shapes = {"logits": 10, "features": 10} | {space: head.prototypes.shape[1]}

    def values(prefix: str) -> list[ValueInfoProto]:
        return [helper.make_tensor_value_info(prefix + n, TensorProto.FLOAT, ["N", s]) for n, s in shapes.items()]

    nodes = [helper.make_node("Identity", [f"in_{name}"], [name], name=name) for name in shapes]
    graph = helper.make_graph(nodes, "base", values("in_"), values(""))
    base = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    calibration = np.zeros(1, np.float32) if scores is None else np.sort(scores).astype(np.float32)
    rule = DecisionRule((calibration,), (1,), np.zeros(shapes["logits"], np.int32))
    return head_model(attach_head(base, head, space, rule).SerializeToString())


def run_head(model: OrtModel, rows: Features, batch: int = 0, space: str = "features") -> dict[str, np.ndarray]:
    other = "logits" if space == "features" else "features"
    step, shape = batch or len(rows), (len(rows), int(model.inputs[other][1]))
    feeds = {space: rows, other: np.zeros(shape, np.float32)}
    runs = [model.run({name: array[i : i + step] for name, array in feeds.items()}) for i in range(0, len(rows), step)]
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
    actual, _, comparable = head_and_definition(case.head(), case.scored)
    # Storing prototypes and bank as float32 moves the score as well: that much and no more.
    np.testing.assert_allclose(actual["ood_score"][comparable], literal[comparable], rtol=0, atol=2 * HEAD_TOLERANCE)


def head_and_definition(
    head: Head, rows: Features, batch: int = 0, space: str = "features"
) -> tuple[dict[str, np.ndarray], Scores64, np.ndarray]:
    """Hold the ONNX head against the definition on what the file stores, where float32 carries a score."""
    stored = onnx_head(head, space=space)
    definition, rows64 = head_from_model(stored), rows.astype(np.float64)
    expected, comparable = ood_scores(rows64, definition), nearest_gap(rows64, definition) > MIN_GAP
    actual = run_head(open_ort(stored), rows, batch, space)
    assert comparable.mean() > 0.9
    assert actual["valid"].all()
    tolerance = HEAD_TOLERANCE * max(1.0, head.scale)  # distances are rounded, and the score has a times the distances
    np.testing.assert_allclose(actual["ood_score"][comparable], expected[comparable], rtol=0, atol=tolerance)
    return actual, expected, comparable


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes", CLASS_COUNTS)
@pytest.mark.parametrize("norm", NORMS)
def test_every_kind_of_head_is_its_definition(norm: float, classes: int, kind: str) -> None:
    case = make_case(norm, classes)
    actual, _, _ = head_and_definition(case.head(kind), case.scored)
    known, strange = actual["ood_score"][:40], actual["ood_score"][40:]
    assert np.median(known) < np.median(strange)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_kind_of_head_is_its_definition_at_any_scale(scale: float, norm: float, kind: str) -> None:
    case = make_case(norm, 10)
    head = case.head(kind, scale)
    actual, expected, _ = head_and_definition(head, case.scored)
    assert head_from_model(onnx_head(head)).scale == scale
    forgotten = ood_scores(case.scored.astype(np.float64), replace(head, scale=1.0))
    assert np.median(np.abs(expected - forgotten)) > 100 * HEAD_TOLERANCE * max(1.0, scale)
    assert np.isfinite(actual["ood_score"]).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_scaled_score_is_that_of_autograd(scale: float) -> None:
    """The gradient of the scaled distances is a s u: the factor a is the same for all, and the score leaves it out."""
    case = make_case(5.0, 4)
    scored, fit = case.scored.astype(np.float64), case.fit.astype(np.float64)
    samples, bank = (autograd_gradients(h, case.prototypes, case.ood_prototype, scale) for h in (scored, fit))
    closed = ood_scores(scored, case.head(scale=scale))
    literal = literal_log_s(samples / scale, bank / scale)
    np.testing.assert_allclose(np.exp(closed - literal), 1.0, rtol=0, atol=CLOSED_FORM_TOLERANCE)


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_reads_logits(kind: str, batch: int) -> None:
    """The same head over the logits: what stands in `features` has no part in the score, but in `valid`."""
    case = make_case(80.0, 10)
    actual, _, _ = head_and_definition(case.head(kind), case.scored, batch, space="logits")
    assert actual["class_id"].tolist() == case.scored.argmax(axis=1).tolist()
    model = open_ort(onnx_head(case.head(kind), space="logits"))
    features = np.random.default_rng(0).standard_normal((80, 10)).astype(np.float32)
    features[3, 1] = np.nan
    found = model.run({"features": features, "logits": case.scored})
    assert found["valid"].tolist() == [row != 3 for row in range(80)]
    np.testing.assert_array_equal(
        np.delete(found["ood_score"], 3), np.delete(run_head(model, case.scored, 0, "logits")["ood_score"], 3)
    )


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_head_does_not_depend_on_the_batch(kind: str, batch: int) -> None:
    case = make_case(80.0, 10)
    whole, _, comparable = head_and_definition(case.head(kind), case.scored)
    parts, _, _ = head_and_definition(case.head(kind), case.scored, batch)
    np.testing.assert_allclose(parts["ood_score"][comparable], whole["ood_score"][comparable], atol=HEAD_TOLERANCE)


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
    log_s = nearest_rows(case.scored.astype(np.float64), head)[0].log_s
    assert (np.exp(log_s.astype(np.float32)) == 0).mean() > 0.3  # the hazard is there: a literal port would tie at 0
    scores = run_head(open_ort(onnx_head(head)), case.scored)["ood_score"]
    assert np.isfinite(scores).all()
    known, strange = scores[:40], scores[40:]
    assert known.min() < -200  # exp(-200) is far below float32
    assert len(np.unique(known)) == len(known)
    assert strange.min() > known.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [0.0, 1e-9])
def test_a_frame_on_an_ood_prototype_is_ood(norm: float, offset: float, kind: str) -> None:
    case = make_case(norm, 10)
    head = case.head(kind)
    id_scores = ood_scores(case.scored[:40].astype(np.float64), head)
    on_prototypes = np.stack([ood_head.prototype for ood_head in head.ood_heads]) + offset
    assert ood_scores(on_prototypes, head).min() > id_scores.max()

    # The zero gradient of the literal definition is the hazard: with s near 0 in the bank it reads as "most ID".
    model = open_ort(onnx_head(head, id_scores.astype(np.float32)))
    outputs = run_head(model, on_prototypes.astype(np.float32))
    assert outputs["valid"].all()
    assert outputs["is_ood"].all()
    np.testing.assert_allclose(outputs["p_value"], 1 / 41, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_dead_frame_on_the_origin_as_ood_prototype_is_ood(dtype: BankDtype) -> None:
    """h - p_ood is exactly 0 in float32 as well: a black frame after a ReLU, and the origin as prototype."""
    case = make_case(80.0, 10)
    origin, dead = np.zeros(DIMENSION), np.zeros((1, DIMENSION))
    head = head_over(case.prototypes, case.fit.astype(np.float64), (origin,), dtype)
    id_scores = ood_scores(case.scored[:40].astype(np.float64), head)
    assert np.abs(SeenBank.of(head.bank, origin).cosine(dead, dead @ head.bank.T)).max() == 0
    outputs = run_head(open_ort(onnx_head(head, id_scores.astype(np.float32))), dead.astype(np.float32))
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
    floor = head.ood_heads[0].bank_log_s + 0.5 * np.log(1e-12)
    on_bank = ood_scores(case.fit.astype(np.float64), head)
    np.testing.assert_allclose(on_bank, floor, atol=1e-2)
    assert on_bank.max() < ood_scores(case.scored.astype(np.float64), head).min() - 5
    np.testing.assert_array_less(nearest_gap(case.fit.astype(np.float64), head), 1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_finite_features_are_valid_or_flagged_but_never_nan(kind: str) -> None:
    case = make_case(80.0, 10)
    model = open_ort(onnx_head(case.head(kind)))
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


class TestNearestRows:
    def test_row_and_score_against_every_row_in_turn(self) -> None:
        """The nearest row is the one whose bank, alone, gives the score of the whole bank."""
        case = make_case(80.0, 4)
        head, scored = case.head("three"), case.scored.astype(np.float64)
        bare = [OodHead(h.prototype, h.bank_log_s) for h in head.ood_heads]
        for index, (ood_head, nearest) in enumerate(zip(bare, nearest_rows(scored, head), strict=True)):
            # From every row alone the least distance would change with it, so that a pair stands in: the row twice.
            for sample in (0, 17, 60):
                row = int(nearest.row[sample])
                alone = Head(
                    case.prototypes,
                    head.bank[[row, row]],
                    (OodHead(ood_head.prototype, ood_head.bank_log_s[[row, row]]),),
                )
                one = nearest_rows(scored[sample : sample + 1], alone)[0]
                np.testing.assert_allclose(one.score, nearest.score[sample], atol=1e-9)
                np.testing.assert_allclose(one.gap, nearest.gap[sample], rtol=1e-6)
                np.testing.assert_allclose(one.log_s, nearest.log_s[sample])
            assert len(np.unique(nearest.row)) > 10, index

    def test_bank_images_find_themselves(self) -> None:
        case = make_case(80.0, 10)
        fit = case.fit.astype(np.float64)
        for nearest in nearest_rows(fit, case.head()):
            np.testing.assert_array_equal(nearest.row, np.arange(len(fit)))

    def test_without_a_bank_the_score_is_log_s(self) -> None:
        case = make_case(80.0, 10)
        (nearest,) = nearest_rows(case.scored.astype(np.float64), case.head("no bank"))
        np.testing.assert_array_equal(nearest.score, nearest.log_s)
        assert (nearest.row == -1).all()
        assert (nearest.gap == 1).all()
        distances = class_distances(case.scored.astype(np.float64), case.prototypes)
        ood_distance = np.linalg.norm(case.scored - case.ood_prototype, axis=1)
        s = np.exp(-ood_distance) / (np.exp(-ood_distance) + np.exp(-distances).sum(axis=1))
        representable = s > 1e-300
        np.testing.assert_allclose(nearest.log_s[representable], np.log(s[representable]), rtol=1e-9)

    def test_gap_is_the_smallest_over_the_heads(self) -> None:
        case = make_case(80.0, 10)
        scored, head = case.scored.astype(np.float64), case.head("three")
        gaps = np.stack([nearest.gap for nearest in nearest_rows(scored, head)])
        np.testing.assert_array_equal(nearest_gap(scored, head), gaps.min(axis=0))
        assert (gaps.argmin(axis=0) != 0).any()


class TestScoreMap:
    T = ScoreMap(0.5, 1.0, np.array([0.0, 2.0]), np.array([1.0, -1.5]))

    def test_by_hand(self) -> None:
        x = np.array([-3.0, 0.0, 1.0, 2.0, 4.0])
        np.testing.assert_allclose(self.T(x), [-2.5, 0.5, 2.5, 4.5, 5.5])
        np.testing.assert_allclose(self.T.slope_at(x + 1e-9), [1, 2, 2, 0.5, 0.5])
        np.testing.assert_allclose(self.T.scaled(2.0)(x), 2 * self.T(x))
        np.testing.assert_allclose(IDENTITY(x), x)

    def test_several_heads_add_their_maps(self) -> None:
        case = make_case(80.0, 10)
        head, scored = case.head("three"), case.scored.astype(np.float64)
        total = sum(h.score_map(n.score) for h, n in zip(head.ood_heads, nearest_rows(scored, head), strict=True))
        np.testing.assert_allclose(ood_scores(scored, head), total)


def test_int8_rows_are_multiplied_in_float32(tmp_path: Path) -> None:
    """onnxruntime (1.32) turns DequantizeLinear + MatMul into MatMulNBits, which rounds h to 8 bits too: 5e-3."""
    case = make_case(80.0, 10)
    model = onnx.load_model_from_string(onnx_head(case.head("int8")))
    model.graph.output.append(helper.make_tensor_value_info("grood/h_dot_b", TensorProto.FLOAT, ["N", 300]))
    shown = model.SerializeToString()
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((64, DIMENSION)) * 10.0 ** rng.uniform(-2, 2, (64, 1))).astype(np.float32)
    head = head_from_model(shown)
    center = head.prototypes.mean(axis=0).astype(np.float32)
    exact = (features - center).astype(np.float64) @ (head.bank - center).T
    for rows in (slice(None), slice(0, 1), slice(0, 2)):
        products = run_head(open_ort(shown), features[rows])["grood/h_dot_b"]
        error = np.abs(products - exact[rows]).max(axis=1) / np.abs(exact[rows]).max(axis=1)
        assert error.max() < 1e-6
    operators = {node.op_type for node in optimised(onnx_head(case.head("int8")), tmp_path).node}
    assert operators & {"Gemm", "FusedGemm"}
    assert not operators & {"MatMulNBits", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QGemm"}


def optimised(model: bytes, folder: Path) -> GraphProto:
    """Return the graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(model, options)
    return onnx.load(folder / "optimised.onnx").graph


def test_another_ood_prototype_starts_no_more_operators_than_its_map_needs(tmp_path: Path) -> None:
    """What is stored for each is joined on loading; starting a small operator takes longer than its work."""
    case = make_case(5.0, 4)
    counts = []
    for ood_prototypes in (2, 3):
        head = case.head("three")
        graph = optimised(onnx_head(replace(head, ood_heads=head.ood_heads[:ood_prototypes])), tmp_path)
        constants = {tensor.name for tensor in graph.initializer}
        constant = [node.op_type for node in graph.node if set(node.input) <= constants]
        assert constant == ["DequantizeLinear"]
        counts.append(len(graph.node))
    assert counts[1] - counts[0] == 1


@pytest.mark.parametrize("count", [0, 1, 63, 64, 129, 1000])
def test_pieces_are_all_rows_and_none_is_short(count: int) -> None:
    """A short piece could go another way through NumPy's sums, and its last bits would not be those of the whole."""
    slices = list(pieces(count))
    assert np.concatenate([np.arange(count)[rows] for rows in slices]).tolist() == list(range(count))
    assert all(min(count, 64) <= rows.stop - rows.start < 128 for rows in slices)
