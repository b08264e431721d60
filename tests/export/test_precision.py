"""fp16, int8 and auto on digits: judged on fit images, relaxed layer by layer, refused, and written down."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.errors import ClassifierError, UsageError, VerificationError
from grood_edge.export import ClassifierOptions, ExportOptions, ExportReport, export_model, precision_trial
from grood_edge.export.acceptance import Behaviour, Comparison, Judge, behaviour
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.graph import base_model
from grood_edge.export.half import half_precision
from grood_edge.export.inputs import open_inputs, reopened
from grood_edge.export.precision import PrecisionChoice, choose_precision, graph_precision
from grood_edge.preprocessing import Preprocessing
from grood_edge.progress import silent
from grood_edge.runtime import open_session
from tests.export.conftest import DIGIT_PREPROCESSING, Batches

OPTIONS = ExportOptions(preprocessing=DIGIT_PREPROCESSING, classes=tuple("0123456"), scale=1.0)


def chosen(model: Any, batches: Batches, **options: Any) -> PrecisionChoice:
    asked = replace(OPTIONS, **options)
    inputs = open_inputs(model, batches, asked, silent)
    return choose_precision(inputs, lambda: reopened(batches, asked), asked, silent)


@pytest.fixture(scope="module")
def auto(
    digit_onnx: Path, train_batches: Batches, calibration_batches: Batches, tmp_path_factory: pytest.TempPathFactory
) -> ExportReport:
    options = replace(OPTIONS, precision="auto", calibration_data=calibration_batches, bank=64)
    return export_model(digit_onnx, train_batches, tmp_path_factory.mktemp("auto") / "digits.onnx", options)


def test_auto_takes_the_smallest_that_keeps_the_limits(auto: ExportReport) -> None:
    entry = auto.contract.precision
    good = [t for t in entry.trials if t.flips <= 0.03 and (t.auroc_drop or 0) <= 0.005]
    assert entry.name == min(good, key=lambda trial: trial.size).precision
    assert entry.asked == "auto"
    assert {t.precision for t in entry.trials} == {"int8", "fp16"}
    sizes = {t.precision: t.size / entry.float32_size for t in entry.trials}
    assert sizes["int8"] < sizes["fp16"] < 0.6
    assert {name for name, _ in auto.speeds} == {t.precision for t in good}
    assert all(ratio > 0 for _, ratio in auto.speeds)


def test_the_artifact_is_whole_in_that_precision(auto: ExportReport, train_batches: Batches) -> None:
    artifact = read_artifact(auto.path)
    assert artifact.contract == auto.contract
    model = onnx.load(auto.path)
    inner = [node.op_type for node in model.graph.node if node.name.startswith("classifier/")]
    assert ("QuantizeLinear" in inner) == (auto.contract.precision.name == "int8")
    (frames, labels), *_ = train_batches
    with open_session(auto.path) as session:
        found = session.infer(list(frames[:100]))
    assert (found.class_id == labels[:100]).mean() > 0.95
    assert found.is_ood.mean() < 0.2
    assert auto.verification.flips == 0


def test_the_same_command_gives_the_same_bytes(
    auto: ExportReport, digit_onnx: Path, train_batches: Batches, calibration_batches: Batches, tmp_path: Path
) -> None:
    """Speeds are measured, and not in the file."""
    options = replace(OPTIONS, precision="auto", calibration_data=calibration_batches, bank=64)
    again = export_model(digit_onnx, train_batches, tmp_path / "digits.onnx", options)
    assert again.path.read_bytes() == auto.path.read_bytes()


def test_judged_images_are_fit_images_never_calibration_images(
    digit_onnx: Path, train_batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a split every fifth image calibrates; the judge sees others only."""
    seen: list[tuple[str, ...]] = []

    def watched(judge: Judge, *rest: Any) -> Behaviour:
        seen.append(judge.names)
        return behaviour(judge, *rest)

    monkeypatch.setattr(precision_trial, "behaviour", watched)
    asked = replace(OPTIONS, precision="fp16", unseen=True)
    inputs = open_inputs(digit_onnx, train_batches, asked, silent)
    choose_precision(inputs, lambda: reopened(train_batches, asked), asked, silent)
    from grood_edge.export.features import collect_features
    from grood_edge.export.inputs import reading_of
    from grood_edge.ort import open_ort

    base = open_ort(base_model(inputs.classifier, inputs.preprocessing).SerializeToString())
    passed = collect_features(inputs.dataset, base, reading_of(inputs, asked, hold_out=True))
    assert passed.held_out is not None
    assert not set(seen[0]) & set(passed.held_out.names)


def test_fp32_is_the_graph_itself(digit_onnx: Path, train_batches: Batches, digit_graph: ClassifierGraph) -> None:
    found = chosen(digit_onnx, train_batches)
    assert found.entry.name == "fp32"
    assert found.entry.trials == ()
    assert found.classifier.model == digit_graph.model


def test_layers_are_given_back_until_it_decides_alike(
    digit_onnx: Path, train_batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison that is never content: three rounds, each with more layers in float32, and then it is refused."""
    bad = Comparison(1000, 0.5, 0.1, 0.05, 0.2, 0.1)
    monkeypatch.setattr(precision_trial, "compared", lambda *_: bad)
    with pytest.raises(
        VerificationError, match=r"20.0 % of 1000 decisions change.*Layers with the largest error: /body"
    ):
        chosen(digit_onnx, train_batches, precision="fp16")
    monkeypatch.setattr(precision_trial, "compared", lambda *_: replace(bad, images=299))
    found = chosen(digit_onnx, train_batches, precision="fp16")
    kept = [trial.float_layers for trial in found.entry.trials]
    assert kept == sorted(set(kept))
    assert 2 <= len(kept) <= 4
    assert any("too few images to be sure" in warning for warning in found.warnings)


def test_a_precision_that_overflows_is_refused_or_passed_over(
    digit_onnx: Path, train_batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(judge: Any, graph: onnx.ModelProto, *rest: Any) -> Any:
        if any(node.name.startswith("rounding/") for node in graph.graph.node):
            raise ClassifierError("NaN or Inf")
        return behaviour(judge, graph, *rest)

    monkeypatch.setattr(precision_trial, "behaviour", overflowing)
    with pytest.raises(VerificationError, match="features are not finite"):
        chosen(digit_onnx, train_batches, precision="fp16")
    assert chosen(digit_onnx, train_batches, precision="auto").entry.name == "int8"


def test_few_images_are_warned_of(digit_onnx: Path, train_batches: Batches) -> None:
    (frames, labels), *_ = train_batches
    found = chosen(digit_onnx, [(frames[:200], labels[:200])], precision="fp16", unseen=True)
    assert any("300 or more say more about it" in warning for warning in found.warnings)


def test_refused(digit_onnx: Path, train_batches: Batches) -> None:
    with pytest.raises(UsageError, match="--keep-float has no use without"):
        chosen(digit_onnx, train_batches, keep_float=("conv",))
    with pytest.raises(ClassifierError, match="--keep-float 'conv' is no node or tensor"):
        chosen(digit_onnx, train_batches, keep_float=("conv",), precision="auto")
    with pytest.raises(UsageError, match="--max-flips is 300 %"):
        chosen(digit_onnx, train_batches, max_flips=3.0, precision="fp16")

    def stream() -> Iterator[Any]:
        yield from train_batches

    with pytest.raises(UsageError, match="reads the images twice, and generator can be read once"):
        chosen(digit_onnx, stream(), precision="int8")  # type: ignore[arg-type]


def test_a_classifier_that_is_lower_already(
    digit_graph: ClassifierGraph, train_batches: Batches, tmp_path: Path, digit_preprocessing: Preprocessing
) -> None:
    half = half_precision(digit_graph)
    model = onnx.ModelProto()
    model.CopyFrom(half.model)
    del model.graph.output[1:]
    onnx.save(model, tmp_path / "half.onnx")
    assert graph_precision(model) == "fp16"
    found = chosen(tmp_path / "half.onnx", train_batches)
    assert (found.entry.name, found.entry.asked) == ("fp16", "fp32")
    assert "is used as it is" in found.entry.reason
    with pytest.raises(ClassifierError, match="the classifier is fp16 already"):
        chosen(tmp_path / "half.onnx", train_batches, precision="int8")


def test_user_layers_stay_float(digit_onnx: Path, train_batches: Batches, digit_graph: ClassifierGraph) -> None:
    node = [n for n in digit_graph.model.graph.node if n.op_type == "Conv"][1]
    found = chosen(digit_onnx, train_batches, precision="fp16", keep_float=(node.output[0],), unseen=True)
    assert node.name in found.entry.float_layers
    types = {t.name: t.data_type for t in found.classifier.model.graph.initializer}
    assert types[node.input[1]] == onnx.TensorProto.FLOAT
    assert np.isfinite(found.entry.trials[0].flips)


def test_what_tensorrt_would_refuse_is_said_at_export(
    digit_onnx: Path, train_batches: Batches, tmp_path: Path, auto: ExportReport
) -> None:
    """Det is standard ONNX and runs on onnxruntime; its value is multiplied by zero, so the classes stay."""
    assert not any("TensorRT" in warning for warning in auto.warnings)
    model = onnx.load(digit_onnx)
    (image,), (logits,) = model.graph.input, model.graph.output
    last = next(node for node in model.graph.node if logits.name in node.output)
    last.output[0] = "inner"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero"))
    nodes = [("Det", [image.name], "det"), ("Mul", ["det", "zero"], "none"), ("Add", ["inner", "none"], logits.name)]
    model.graph.node.extend(onnx.helper.make_node(kind, given, [made]) for kind, given, made in nodes)
    onnx.save(model, tmp_path / "det.onnx")
    features = auto.contract.classifier.features_tensor
    options = replace(
        OPTIONS, bank=64, ood_prototype="mean", unseen=True, classifier=ClassifierOptions(features=features)
    )
    report = export_model(tmp_path / "det.onnx", train_batches, tmp_path / "a.onnx", options)
    (warning,) = [warning for warning in report.warnings if "TensorRT" in warning]
    assert "Det" in warning
