"""Decisions of a rewritten graph against the float32 one's, on digits; weights are spoilt by known amounts."""

from dataclasses import replace

import numpy as np
import pytest
from onnx import ModelProto, numpy_helper
from scipy import stats

from grood_edge.errors import ClassifierError
from grood_edge.export.acceptance import FEW_IMAGES, Behaviour, Comparison, Judge, Limits, behaviour, compared
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.features import FeaturePass, Reading
from grood_edge.export.graph import base_model
from grood_edge.preprocessing import Preprocessing

LIMITS = Limits(auroc_drop=0.005, flips=0.03)


def spoilt(graph: ModelProto, amount: float) -> ModelProto:
    """Add noise to every convolution's weights, relative to their spread."""
    rng = np.random.default_rng(0)
    result = ModelProto()
    result.CopyFrom(graph)
    for tensor in result.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            noisy = values + amount * values.std() * rng.standard_normal(values.shape)
            tensor.CopyFrom(numpy_helper.from_array(noisy.astype(values.dtype), tensor.name))
    return result


@pytest.fixture(scope="module")
def base(digit_graph: ClassifierGraph, digit_preprocessing: Preprocessing) -> ModelProto:
    return base_model(digit_graph, digit_preprocessing)


@pytest.fixture(scope="module")
def judge(digit_pass: FeaturePass, digit_preprocessing: Preprocessing) -> Judge:
    p = digit_pass
    return Judge(p.frames, p.frame_labels, p.frame_names, Reading(digit_preprocessing, 7), alpha=0.05)


@pytest.fixture(scope="module")
def reference(judge: Judge, base: ModelProto) -> Behaviour:
    return behaviour(judge, base)


def test_behaviour_covers_every_frame(reference: Behaviour, judge: Judge) -> None:
    n = len(judge.frames)
    assert reference.features.shape == (n, 64)
    assert reference.flags.sum() == round(0.05 * n)
    assert (reference.class_ids == judge.labels).mean() > 0.95
    assert len(reference.aurocs) == 7
    assert (reference.aurocs > 0.5).all()


def test_the_same_graph_changes_nothing(reference: Behaviour, judge: Judge, base: ModelProto) -> None:
    same = compared(reference, behaviour(judge, base))
    assert same == Comparison(len(judge.frames), 0.0, 0.0, 0.0, 0.0, 0.0)
    assert same.within(LIMITS)
    assert not same.clearly_beyond(LIMITS)


def test_more_noise_costs_more(reference: Behaviour, judge: Judge, base: ModelProto) -> None:
    little, much = (compared(reference, behaviour(judge, spoilt(base, amount))) for amount in (1e-3, 1.0))
    assert little.feature_error is not None
    assert much.feature_error is not None
    assert little.feature_error < 0.02
    assert much.feature_error > 0.2
    assert little.within(LIMITS)
    assert not much.within(LIMITS)
    assert much.clearly_beyond(LIMITS)


def test_an_overflow_is_an_error(judge: Judge, base: ModelProto) -> None:
    with pytest.raises(ClassifierError, match="NaN or Inf"):
        behaviour(judge, spoilt(base, 1e38))


def made(flags: list[int], class_ids: list[int], aurocs: list[float], n: int = 400) -> Behaviour:
    marked, ids = np.zeros(n, bool), np.zeros(n, np.int64)
    marked[flags], ids[class_ids] = True, 1
    return Behaviour(np.eye(n, 3), marked, ids, np.array(aurocs))


def test_a_decision_is_flag_or_class() -> None:
    found = compared(made([0, 1], [5], []), made([0, 2], [5, 2, 9], []))
    assert found.flips == 3 / 400  # 1: flag; 2: flag and class; 9: class
    assert found.auroc_drop is None
    assert found.auroc_drop_bound is None


def test_bounds_are_one_sided_at_95_percent() -> None:
    """The lower bound p of Clopper and Pearson: as many flips or more have 5 % at p; Student's t over the classes."""
    found = compared(made([], [], [0.9, 0.8, 0.95]), made(list(range(20)), [], [0.88, 0.8, 0.94]))
    assert stats.binom.sf(19, 400, found.flips_bound) == pytest.approx(0.05, abs=1e-3)
    lost = np.array([0.02, 0.0, 0.01])
    test = stats.ttest_1samp(lost, found.auroc_drop_bound, alternative="greater")
    assert found.auroc_drop == pytest.approx(0.01)
    assert test.pvalue == pytest.approx(0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "within", "beyond"),
    [
        ({"flips": 0.03}, True, False),
        ({"flips": 0.031, "flips_bound": 0.03}, False, False),
        ({"flips": 0.05, "flips_bound": 0.031}, False, True),
        ({"flips": 0.05, "flips_bound": 0.031, "images": FEW_IMAGES - 1}, False, False),
        ({"auroc_drop": 0.006, "auroc_drop_bound": 0.005}, False, False),
        ({"auroc_drop": 0.02, "auroc_drop_bound": 0.006}, False, True),
        ({"auroc_drop": -0.02, "auroc_drop_bound": -0.03}, True, False),
        ({"auroc_drop": None, "auroc_drop_bound": None}, True, False),
    ],
)
def test_limits(change: dict[str, float], within: bool, beyond: bool) -> None:
    found = replace(Comparison(FEW_IMAGES, 0.1, 0.0, 0.0, 0.0, 0.0), **change)  # type: ignore[arg-type]
    assert (found.within(LIMITS), found.clearly_beyond(LIMITS)) == (within, beyond)
