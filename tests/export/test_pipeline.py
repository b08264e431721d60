"""End to end on digits: one verified file, the same bytes anywhere, and nothing left behind when something fails."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from grood_edge import __version__
from grood_edge.artifact import read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.errors import CalibrationError, ClassifierError, DatasetError, OutputError, UsageError
from grood_edge.evaluate.metrics import auroc, beta_binomial_band
from grood_edge.export import (
    ClassifierOptions,
    ExportOptions,
    ExportReport,
    PreprocessingOptions,
    export_model,
    inputs,
)
from grood_edge.images import find_images, load_image
from grood_edge.probes import replay_probes
from grood_edge.runtime import open_session
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.scoring import nearest_gap, ood_scores
from grood_edge.stored_head import head_from_model
from tests.export.conftest import DIGIT_PREPROCESSING, Batches
from tests.export.networks import ConvBnGap, legacy_onnx, saved_pt2

NAMES = tuple("0123456")
AUTO = ExportOptions(preprocessing=DIGIT_PREPROCESSING, classes=NAMES)
DIGITS = replace(AUTO, ood_prototype="mean", bank="all", scale=1.0)  # nothing to choose: quicker
OUTPUTS = {"logits", "features", "class_id", "ood_score", "p_value", "is_ood", "valid"}


@pytest.fixture(scope="module")
def calibrated(calibration_batches: Batches) -> ExportOptions:
    return replace(DIGITS, calibration_data=calibration_batches)


@pytest.fixture(scope="module")
def report(digit_onnx: Path, digits: DemoImages, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """An export of the .onnx and class folders, with a folder of unseen calibration images."""
    path = tmp_path_factory.mktemp("report") / "digits.onnx"
    options = replace(DIGITS, classes=None, calibration_data=digits.calibration)
    return export_model(digit_onnx, digits.train, path, options)


@pytest.fixture(scope="module")
def auto_report(digit_onnx: Path, digits: DemoImages, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """The same with all that is chosen by itself."""
    path = tmp_path_factory.mktemp("auto") / "digits.onnx"
    options = replace(AUTO, classes=None, calibration_data=digits.calibration)
    return export_model(digit_onnx, digits.train, path, options)


def scores_of(path: Path, folder: Path) -> np.ndarray:
    with open_session(path) as session:
        return session.infer([load_image(image) for image in find_images(folder)]).ood_score


def subset(source: Path, target: Path, counts: dict[str, int]) -> Path:
    """Copy the first images of some classes."""
    for name, count in counts.items():
        (target / name).mkdir(parents=True, exist_ok=True)
        for path in find_images(source / name)[:count]:
            shutil.copy(path, target / name / path.name)
    return target


def test_contract_says_what_was_done(report: ExportReport, digits: DemoImages, digit_onnx: Path) -> None:
    contract = read_artifact(report.path).contract
    assert contract == report.contract
    assert contract.classes == tuple("0123456")
    p = contract.preprocessing
    assert (p.height, p.width, p.channels, p.mean, p.std, p.preset) == (32, 32, 1, (0.0,), (255.0,), "custom")
    c = contract.classifier
    assert (c.source, c.layout, c.bgr, c.batch, c.opset, c.dimension) == ("onnx", "NCHW", False, "dynamic", 19, 64)
    assert (c.features_pooled, contract.precision.name) == (False, "fp32")
    names = {name for node in onnx.load(digit_onnx).graph.node for name in node.output}
    assert {c.features_tensor, c.logits_tensor} <= names  # of the user's own graph
    images = len(find_images(digits.train))
    fit = contract.fit
    assert (fit.images, fit.unreadable, fit.labels, fit.seed) == (images, 0, "folder", 0)
    assert fit.classes_without_prototype == ()
    assert fit.accuracy == pytest.approx(contract.bank.candidates / images, abs=1e-6)
    assert contract.bank.choice == "all"
    assert contract.bank.rows == contract.bank.candidates
    assert [entry.source for entry in contract.ood_prototypes] == ["mean"]
    k = contract.calibration
    assert (k.provenance, k.method, k.guarantee, k.alpha, k.delta) == ("unseen", "separate", "conformal", 0.05, 0.05)
    assert k.n == len(find_images(digits.calibration))
    assert contract.tools["grood-edge"] == __version__
    assert {"numpy", "onnx", "onnxruntime", "pillow"} <= set(contract.tools)
    assert "torch" not in contract.tools
    assert len(contract.probes) >= 5
    assert report.unreadable == ()


def test_file_has_the_stated_inputs_and_outputs(report: ExportReport) -> None:
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 19)]
    assert model.ir_version <= 10
    assert [i.name for i in model.graph.input] == ["image"]
    assert {o.name for o in model.graph.output} == OUTPUTS
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["N", 32, 32, 1]
    assert model.graph.node[0].op_type == "Cast"  # TensorRT takes uint8 nowhere else
    assert {node.domain for node in model.graph.node} == {""}


def test_report_of_the_verification(report: ExportReport) -> None:
    assert report.verification.largest_logit_error <= 1e-5
    assert report.verification.largest_score_error <= 2e-4
    assert report.verification.compared_scores >= 20
    assert report.verification.flips == 0


def test_probes_replay(report: ExportReport) -> None:
    artifact = read_artifact(report.path)
    found = replay_probes(artifact.contract, OnnxRuntimeBackend(artifact).run, "cpu")
    assert found.passed
    assert found.largest_error <= 1e-5  # one product over all bank rows: rounded otherwise in other batches


def test_artifact_scores_like_its_definition_on_unseen_images(report: ExportReport, digits: DemoImages) -> None:
    artifact = read_artifact(report.path)
    head = head_from_model(artifact.model)
    frames = [load_image(p) for folder in (digits.test, digits.near, digits.far_photos) for p in find_images(folder)]
    with open_session(report.path) as session:
        outputs = session.infer(frames)
    features = outputs.features.astype(np.float64)
    clear = nearest_gap(features, head) > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_allclose(outputs.ood_score[clear], ood_scores(features, head)[clear], atol=2e-4)


def test_separates_known_from_unknown(report: ExportReport, digits: DemoImages) -> None:
    known = scores_of(report.path, digits.test)
    assert auroc(known, scores_of(report.path, digits.far_noise)) > 0.97
    assert auroc(known, scores_of(report.path, digits.far_photos)) > 0.9
    assert auroc(known, scores_of(report.path, digits.near)) > 0.8


def test_false_alarms_lie_in_the_promised_band(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, tmp_path: Path
) -> None:
    """Half of the test digits calibrate, the other half counts; both were never trained on."""
    frames = np.stack([load_image(image) for image in find_images(digits.test)])
    options = replace(DIGITS, calibration_data=[frames[::2]])
    found = export_model(digit_onnx, train_batches, tmp_path / "half.onnx", options)
    entry = found.contract.calibration
    with open_session(found.path) as session:
        verdicts = session.predict_batch(list(frames[1::2]))
    count = sum(verdict.is_ood for verdict in verdicts)
    low, high = beta_binomial_band(len(verdicts), entry.n, entry.k)
    assert (entry.n, len(verdicts)) == (len(frames[::2]), len(frames[1::2]))
    assert high < len(verdicts) / 5  # a band that says something
    assert low <= count <= high


def test_module_pt2_and_onnx_score_the_same(
    network: DigitNetwork, artifact_path: Path, auto_report: ExportReport, digits: DemoImages, tmp_path: Path
) -> None:
    pt2 = saved_pt2(network, tmp_path / "digits.pt2", np.zeros((2, 1, 32, 32), np.float32))
    options = replace(AUTO, classes=None, calibration_data=digits.calibration)
    from_pt2 = export_model(str(pt2), digits.train, tmp_path / "from pt2.onnx", options)
    assert (
        from_pt2.contract.tools["torch"] == torch.__version__.split("+")[0] or "+" in from_pt2.contract.tools["torch"]
    )
    sources = [
        read_artifact(path).contract.classifier.source for path in (artifact_path, from_pt2.path, auto_report.path)
    ]
    assert sources == ["module", "pt2", "onnx"]
    for folder in (digits.test, digits.near, digits.far_photos):
        module = scores_of(artifact_path, folder)
        np.testing.assert_allclose(scores_of(from_pt2.path, folder), module, atol=1e-4)
        np.testing.assert_allclose(scores_of(auto_report.path, folder), module, atol=1e-4)


def test_nothing_of_this_machine_is_in_the_file(artifact_path: Path, digits: DemoImages) -> None:
    data = artifact_path.read_bytes()
    repository = str(Path(__file__).parents[2])
    for trace in (repository, sys.prefix, str(digits.train), "site-packages", "torch/nn", "stack_trace", '.py"'):
        assert trace.encode() not in data


def test_same_bytes_from_other_folders_and_another_working_folder(
    auto_report: ExportReport, digit_onnx: Path, digits: DemoImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, calibration = tmp_path / "zz" / "moved", tmp_path / "aa" / "calibration elsewhere"
    shutil.copytree(digits.train, train)
    shutil.copytree(digits.calibration, calibration)
    model = tmp_path / "other name.onnx"
    shutil.copy(digit_onnx, model)
    monkeypatch.chdir(tmp_path)
    options = replace(AUTO, classes=None, calibration_data=Path("aa/calibration elsewhere"))
    found = export_model("other name.onnx", "zz/moved", "out.onnx", options)
    assert (tmp_path / "out.onnx").read_bytes() == auto_report.path.read_bytes()
    assert found.path == Path("out.onnx")


def test_same_inputs_and_seed_give_the_same_bytes(digit_onnx: Path, train_batches: Batches, tmp_path: Path) -> None:
    """With all that draws numbers: cross-fitting, k-means, the scale, maps, mixes and noise images."""
    options = replace(AUTO, bank=24, ood_prototype="noise,mixup,mean")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        export_model(digit_onnx, train_batches, tmp_path / name, replace(options, seed=seed))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()


def test_module_traced_twice_gives_the_same_bytes(
    network: DigitNetwork, artifact_path: Path, digits: DemoImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = replace(AUTO, classes=None, calibration_data=digits.calibration)
    export_model(network, digits.train, "again.onnx", options)
    assert (tmp_path / "again.onnx").read_bytes() == artifact_path.read_bytes()


def test_without_calibration_data_nothing_is_promised(digit_onnx: Path, train_batches: Batches, tmp_path: Path) -> None:
    found = export_model(digit_onnx, train_batches, tmp_path / "seen.onnx", DIGITS).contract.calibration
    images = len(train_batches[0][1])
    assert (found.provenance, found.method, found.guarantee) == ("seen-in-training", "cross-fitted", "none")
    assert (found.n, found.delta, found.k) == (images, None, int(0.05 * (images + 1)))
    with pytest.raises(UsageError, match="--delta promises a false-alarm rate"):
        export_model(digit_onnx, train_batches, tmp_path / "promise.onnx", replace(DIGITS, delta=0.05))
    assert [path.name for path in tmp_path.iterdir()] == ["seen.onnx"]


def test_unseen_data_carry_an_approximate_promise(
    digit_onnx: Path, calibration_batches: Batches, tmp_path: Path
) -> None:
    options = replace(DIGITS, unseen=True, delta=0.1)
    found = export_model(digit_onnx, calibration_batches, tmp_path / "unseen.onnx", options).contract.calibration
    assert (found.provenance, found.method, found.guarantee) == ("unseen", "cross-fitted", "approximate")
    assert found.delta == 0.1
    assert found.n == len(calibration_batches[0][1])


def test_many_images_are_split_instead_of_cross_fitted(
    digit_onnx: Path, train_batches: Batches, tmp_path: Path
) -> None:
    """1,500 images and more: a fifth of each class calibrates, and neither prototypes nor bank have seen it."""
    rng = np.random.default_rng(0)
    (frames, labels) = train_batches[0]
    chosen = np.concatenate([rng.choice(np.flatnonzero(labels == label), 220) for label in range(7)])
    noisy = frames[chosen].astype(int) + rng.integers(-20, 21, (1540, 32, 32, 1))
    data = [(np.clip(noisy, 0, 255).astype(np.uint8), labels[chosen])]
    options = replace(DIGITS, unseen=True)
    found = export_model(digit_onnx, data, tmp_path / "split.onnx", options).contract
    assert found.fit.images == 1540
    assert 7 * 43 <= found.calibration.n <= 7 * 45  # every fifth of a class, from a random start
    assert (found.calibration.method, found.calibration.guarantee) == ("split", "conformal")
    assert found.bank.candidates <= 1540 - found.calibration.n


def test_kmeans_bank(
    digit_onnx: Path, train_batches: Batches, calibrated: ExportOptions, report: ExportReport, tmp_path: Path
) -> None:
    found = export_model(digit_onnx, train_batches, tmp_path / "bank.onnx", replace(calibrated, bank=32))
    assert (found.contract.bank.choice, found.contract.bank.rows) == ("kmeans", 32)
    assert found.contract.bank.candidates == report.contract.bank.candidates
    artifact = read_artifact(found.path)
    assert head_from_model(artifact.model).bank.shape == (32, 64)
    assert found.path.stat().st_size < report.path.stat().st_size
    with open_session(found.path) as session:  # calibrated with the bank that ships
        scores = session.infer(list(calibrated.calibration_data[0][0])).ood_score
    np.testing.assert_array_equal(np.sort(scores), artifact.contract.calibration.sorted_scores())


def test_noise_and_image_prototypes_say_what_they_used(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, calibrated: ExportOptions, tmp_path: Path
) -> None:
    entries = {}
    for name in ("noise", f"images:{digits.far_photos}"):
        path = tmp_path / f"{name.partition(':')[0]}.onnx"
        found = export_model(digit_onnx, train_batches, path, replace(calibrated, ood_prototype=name))
        entries[path.stem] = found.contract.ood_prototypes[0]
        assert auroc(scores_of(path, digits.test), scores_of(path, digits.far_noise)) > 0.9
    assert (entries["noise"].images, entries["noise"].uses_ood_data) == (100, False)
    assert (entries["images"].images, entries["images"].uses_ood_data) == (len(find_images(digits.far_photos)), True)


def test_own_probes(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, calibrated: ExportOptions, tmp_path: Path
) -> None:
    (tmp_path / "probes").mkdir()
    for index, path in enumerate(find_images(digits.test)[::40]):
        shutil.copy(path, tmp_path / "probes" / f"camera {index}.png")
    options = replace(calibrated, probes=tmp_path / "probes")
    found = export_model(digit_onnx, train_batches, tmp_path / "out.onnx", options)
    assert {probe.name for probe in found.contract.probes} <= {f"camera {i}.png" for i in range(20)}
    assert len(found.contract.probes) >= 4
    (tmp_path / "probes" / "broken.png").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"a probe image in .* cannot be read"):
        export_model(digit_onnx, train_batches, tmp_path / "other.onnx", options)


def test_predicted_labels_leave_classes_without_frames_out(
    digit_onnx: Path, digits: DemoImages, tmp_path: Path
) -> None:
    """The integrator's case: an .onnx and unlabelled frames, in which two of the classes never appear."""
    flat = tmp_path / "frames"
    flat.mkdir()
    for name in "01246":
        for path in find_images(digits.calibration / name):
            shutil.copy(path, flat / f"{name}-{path.name}")
    options = replace(DIGITS, labels="predicted", unseen=True, classes=tuple("abcdefg"))
    found = export_model(digit_onnx, flat, tmp_path / "out.onnx", options).contract
    with open_session(tmp_path / "out.onnx") as session:
        predicted = {v.class_name for v in session.predict_batch([load_image(p) for p in find_images(flat)])}
    assert found.fit.accuracy is None
    assert found.fit.labels == "predicted"
    assert set(found.fit.classes_without_prototype) == set("abcdefg") - predicted
    assert found.fit.classes_without_prototype
    assert head_from_model(read_artifact(tmp_path / "out.onnx").model).prototypes.shape[0] == len(predicted)
    assert found.bank.candidates == found.fit.images


def test_unnamed_classes_get_numbers(digit_onnx: Path, calibration_batches: Batches, tmp_path: Path) -> None:
    options = replace(DIGITS, labels="predicted", unseen=True, classes=None)
    found = export_model(digit_onnx, calibration_batches, tmp_path / "out.onnx", options).contract
    assert found.classes == tuple(f"class_{i}" for i in range(7))


class Before(nn.Module):
    """A network with something in front of it."""

    def __init__(self, first: Callable[[torch.Tensor], torch.Tensor], network: nn.Module) -> None:
        super().__init__()
        self.first, self.network = first, network
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(self.first(x))
        return logits


def test_network_that_keeps_batch_1(network: DigitNetwork, digits: DemoImages, tmp_path: Path) -> None:
    images = np.zeros((1, 1, 32, 32), np.float32)
    path = legacy_onnx(Before(lambda x: x.squeeze(0).unsqueeze(0), network), tmp_path / "single.onnx", images)
    small = subset(digits.train, tmp_path / "data", {str(i): 15 for i in range(7)})
    found = export_model(path, small, tmp_path / "out.onnx", DIGITS)
    assert found.contract.classifier.batch == "1"
    assert onnx.load(found.path).graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    frames = [load_image(image) for image in find_images(digits.test)[::30]]
    with open_session(found.path) as session:
        together = session.infer(frames)
        alone = [session.predict(frame) for frame in frames]
    np.testing.assert_array_equal(together.class_id, [verdict.class_id for verdict in alone])
    np.testing.assert_allclose(together.ood_score, [verdict.ood_score for verdict in alone], rtol=1e-6)


@pytest.mark.parametrize("kind", ["fp16", "nhwc"])
def test_other_input_types_and_layouts(
    kind: str,
    network: DigitNetwork,
    digits: DemoImages,
    train_batches: Batches,
    calibrated: ExportOptions,
    tmp_path: Path,
) -> None:
    if kind == "nhwc":
        moved = Before(lambda x: x.permute(0, 3, 1, 2), network)
        model = legacy_onnx(moved, tmp_path / "n.onnx", np.zeros((1, 32, 32, 1), np.float32), open_batch=True)
    else:
        half = DigitNetwork(7)
        half.load_state_dict(network.state_dict())
        images = np.zeros((1, 1, 32, 32), np.float16)
        model = legacy_onnx(half.half().eval(), tmp_path / "h.onnx", images, open_batch=True)
    found = export_model(model, train_batches, tmp_path / "out.onnx", calibrated)
    assert found.contract.classifier.layout == ("NHWC" if kind == "nhwc" else "NCHW")
    assert auroc(scores_of(found.path, digits.test), scores_of(found.path, digits.far_noise)) > 0.95


def _refusal(error: type[Exception], message: str, model: Any, data: Any, folder: Path, options: ExportOptions) -> None:
    """Export must fail with this message, and leave no file, temporary ones included."""
    (folder / "out").mkdir(exist_ok=True)
    with pytest.raises(error, match=message):
        export_model(model, data, folder / "out" / "model.onnx", options)
    assert list((folder / "out").iterdir()) == []


def test_class_count_that_differs_from_the_logits(digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    six = subset(digits.train, tmp_path / "six", {str(i): 5 for i in range(6)})
    message = "has 6 class folders, but the classifier has 7 outputs"
    _refusal(DatasetError, message, digit_onnx, six, tmp_path, replace(DIGITS, classes=None))
    message = "8 class names were given, but the classifier has 7 outputs; expected one name an output"
    options = replace(DIGITS, classes=tuple("01234567"))
    _refusal(DatasetError, message, digit_onnx, digits.train, tmp_path, options)


def test_folders_may_cover_a_part_of_the_named_classes(digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    part = subset(digits.calibration, tmp_path / "part", dict.fromkeys("0145", 30))
    options = replace(DIGITS, unseen=True)
    found = export_model(digit_onnx, part, tmp_path / "out.onnx", options).contract
    assert found.fit.classes_without_prototype == ("2", "3", "6")


def test_one_image_in_a_class(digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    data = subset(digits.train, tmp_path / "data", {str(i): 1 if i == 4 else 20 for i in range(7)})
    _refusal(DatasetError, "class '4' has one image", digit_onnx, data, tmp_path, DIGITS)


def test_all_images_of_a_class_misclassified(digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    data = subset(digits.train, tmp_path / "data", {str(i): 20 for i in range(6)})
    (data / "6").mkdir()
    for path in find_images(digits.train / "1")[20:40]:
        shutil.copy(path, data / "6" / path.name)
    _refusal(
        DatasetError, "all 20 images of class '6' are misclassified, most as '1'", digit_onnx, data, tmp_path, DIGITS
    )


@pytest.mark.parametrize(("alpha", "needed"), [(0.005, "598"), (0.0001, "29,956")])
def test_alpha_that_the_images_cannot_carry(
    alpha: float, needed: str, digit_onnx: Path, train_batches: Batches, calibrated: ExportOptions, tmp_path: Path
) -> None:
    message = rf"calibration images cannot carry alpha {re.escape(f'{alpha:g}')} .*at least {needed} are needed"
    _refusal(CalibrationError, message, digit_onnx, train_batches, tmp_path, replace(calibrated, alpha=alpha))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 0.0}, "--alpha 0.0; expected a number above 0 and below 1"),
        ({"alpha": 1.5}, "--alpha 1.5"),
        ({"unseen": True, "delta": 1.0}, "--delta 1.0"),
        ({"bank": 0}, "--bank 0; expected auto, all, none or a number of rows from 1"),
        ({"max_bank_source": 1_999}, "--max-bank-source 1999; expected a number of rows from 2,000 to 100,000"),
        ({"max_bank_source": 100_001}, "--max-bank-source 100001; expected a number of rows"),
        ({"spool": Path("spool")}, "--spool needs a folder or an .npz, but the given batches is a stream"),
        ({"ood_prototype": "magic"}, "--ood-prototype 'magic': 'magic' is unknown"),
        ({"mixup_layer": "early"}, "--mixup-layer has no use without --ood-prototype mixup or auto"),
        ({"scale": 1e9}, "--scale 1000000000.0; expected auto or a number from"),
        ({"unseen": True, "delta": 0.1, "rule": "marginal"}, "--delta states a confidence, and --rule marginal has"),
        ({"preprocessing": PreprocessingOptions(preset="resnet")}, "preset 'resnet' is unknown"),
        ({"preprocessing": PreprocessingOptions(input_size=(64, 64))}, "the classifier's input is fixed at 32"),
    ],
)
def test_options_that_cannot_be_used(
    changes: dict[str, Any], message: str, digit_onnx: Path, train_batches: Batches, tmp_path: Path
) -> None:
    _refusal(UsageError, message, digit_onnx, train_batches, tmp_path, replace(DIGITS, **changes))


def test_calibration_images_among_the_training_images(digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(digits.calibration, mixed)
    for index, path in enumerate(find_images(digits.train)[:20]):
        Image.open(path).save(mixed / f"renamed {index}.bmp")  # other name, other format, same pixels
    options = replace(DIGITS, calibration_data=mixed)
    message = r"20 of \d+ calibration images are also among the fit images"
    _refusal(DatasetError, message, digit_onnx, digits.train, tmp_path, options)


@pytest.mark.parametrize("what", ["data", "calibration_data", "model"])
def test_missing_inputs(what: str, digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    model = missing.with_suffix(".onnx") if what == "model" else digit_onnx
    data = missing if what == "data" else digits.train
    options = replace(DIGITS, calibration_data=missing if what == "calibration_data" else None)
    error = ClassifierError if what == "model" else DatasetError
    _refusal(error, "nowhere.* does not exist|cannot read .*nowhere", model, data, tmp_path, options)


def test_existing_output_is_left_alone_without_force(
    digit_onnx: Path, train_batches: Batches, calibrated: ExportOptions, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"somebody's own")
    with pytest.raises(OutputError, match=r"exists and was left as it is; use --force"):
        export_model(digit_onnx, train_batches, path, calibrated)
    assert path.read_bytes() == b"somebody's own"
    with pytest.raises(DatasetError):
        export_model(digit_onnx, tmp_path / "gone", path, replace(calibrated, force=True))
    assert path.read_bytes() == b"somebody's own"  # also with --force, as long as nothing better is there
    export_model(digit_onnx, train_batches, path, replace(calibrated, force=True))
    assert read_artifact(path).contract.classes == tuple("0123456")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("where", ["missing folder", "folder itself", "read-only folder"])
def test_output_that_cannot_be_written(where: str, digit_onnx: Path, train_batches: Batches, tmp_path: Path) -> None:
    out = tmp_path / "gone" / "model.onnx" if where == "missing folder" else tmp_path
    if where == "read-only folder":
        if os.geteuid() == 0:
            pytest.skip("the superuser may write everywhere")
        (tmp_path / "locked").mkdir(mode=0o500)
        out = tmp_path / "locked" / "model.onnx"
    with pytest.raises(OutputError, match=r"does not exist; create it first|is a folder|is not writable"):
        export_model(digit_onnx, train_batches, out, DIGITS)


STEPS = ["loading the classifier", "reading", "noise images", "fitting statistics", "verifying"]


@pytest.mark.parametrize("step", STEPS)
def test_interrupted_export_leaves_nothing(
    step: str, digit_onnx: Path, train_batches: Batches, calibrated: ExportOptions, tmp_path: Path
) -> None:
    """Ctrl-C in any of the steps that report progress."""
    reached: list[str] = []

    def interrupt(label: str, done: int, total: int | None) -> None:
        reached.append(label)
        if label.startswith(step) and done:
            raise KeyboardInterrupt

    out = tmp_path / "model.onnx"
    out.write_bytes(b"before")
    options = replace(calibrated, ood_prototype="noise", force=True)
    with pytest.raises(KeyboardInterrupt):
        export_model(digit_onnx, train_batches, out, options, interrupt)
    assert reached[-1].startswith(step)
    assert out.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_full_disk_leaves_nothing(
    digit_onnx: Path,
    train_batches: Batches,
    calibrated: ExportOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = "the disk is full; nothing was changed"
    _refusal(OutputError, message, digit_onnx, train_batches, tmp_path, calibrated)


def test_full_bank_of_more_images_than_rows_are_kept(
    digit_onnx: Path, digits: DemoImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MIN_ROWS", 100)
    options = replace(DIGITS, max_bank_source=200)
    message = "--bank all would need a row for each of .* --max-bank-source keeps 200 .*; use --bank N or raise"
    _refusal(UsageError, message, digit_onnx, digits.train, tmp_path, options)
    options = replace(options, bank=32, calibration_data=digits.calibration)
    found = export_model(digit_onnx, digits.train, tmp_path / "model.onnx", options)
    contract = found.contract
    assert contract.bank.rows == 32
    assert contract.fit.accuracy is not None
    assert contract.bank.candidates == round(contract.fit.accuracy * contract.fit.images) > 200  # of all images
    assert contract.fit.images == len(find_images(digits.train))
    assert contract.calibration.n == 200  # a uniform sample of the 314 calibration images


@pytest.mark.parametrize("separate", [True, False])
def test_interrupted_export_with_a_spool_goes_on_to_the_same_bytes(
    separate: bool, digit_onnx: Path, digits: DemoImages, tmp_path: Path
) -> None:
    """Ctrl-C in the first pass, in the calibration pass, and after both."""
    options = replace(DIGITS, classes=None, calibration_data=digits.calibration if separate else None)
    expected = export_model(digit_onnx, digits.train, tmp_path / "expected.onnx", options).path.read_bytes()
    spool, out = tmp_path / "spool", tmp_path / "model.onnx"
    spooled = replace(options, spool=spool)
    read: dict[str, list[int]] = {}

    def interrupt_at(step: str, count: int) -> None:
        def report(label: str, done: int, total: int | None) -> None:
            if label == step and done >= count:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_model(digit_onnx, digits.train, out, spooled, report)
        assert not out.exists()

    interrupt_at(f"reading {digits.train}", 64)
    assert [path.name for path in spool.iterdir()] == ["fit.spool"]
    if separate:
        interrupt_at(f"reading {digits.calibration}", 96)
        assert sorted(path.name for path in spool.iterdir()) == ["calibration.spool", "fit.spool"]
    interrupt_at("verifying", 0)
    kept = (spool / "fit.spool").read_bytes()
    (spool / "mine.txt").write_text("mine")
    report = export_model(
        digit_onnx, digits.train, out, spooled, lambda label, done, _: read.setdefault(label, []).append(done)
    )
    assert out.read_bytes() == expected
    assert len(kept) > 64 * 64 * 4
    assert report.warnings == ()
    assert [path.name for path in spool.iterdir()] == ["mine.txt"]


def test_spool_of_another_classifier_is_not_used(digit_onnx: Path, digits: DemoImages, tmp_path: Path) -> None:
    changed = onnx.load(digit_onnx)
    weights = max(changed.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weights) * np.float32(1.001)
    weights.CopyFrom(onnx.numpy_helper.from_array(values, weights.name))
    onnx.save(changed, tmp_path / "changed.onnx")
    options = replace(DIGITS, classes=None, calibration_data=digits.calibration)
    plain = export_model(tmp_path / "changed.onnx", digits.train, tmp_path / "expected.onnx", options)

    def interrupt(label: str, done: int, total: int | None) -> None:
        if label == "verifying":
            raise KeyboardInterrupt

    spooled = replace(options, spool=tmp_path / "spool")
    with pytest.raises(KeyboardInterrupt):
        export_model(digit_onnx, digits.train, tmp_path / "model.onnx", spooled, interrupt)
    found = export_model(tmp_path / "changed.onnx", digits.train, tmp_path / "model.onnx", spooled)
    assert found.path.read_bytes() == plain.path.read_bytes()
    for name, warning in zip(("fit.spool", "calibration.spool"), found.warnings, strict=True):
        assert f"{name} was of other images, options or versions" in warning


def test_unreadable_images_are_reported(
    digit_onnx: Path, digits: DemoImages, calibrated: ExportOptions, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits.test, data)
    (data / "3" / "broken.png").write_bytes(b"no image")
    found = export_model(digit_onnx, data, tmp_path / "out.onnx", calibrated)
    assert [name for name, _ in found.unreadable] == ["3/broken.png"]
    assert found.contract.fit.unreadable == 1
    for index in range(9):
        (data / "3" / f"broken {index}.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"10 of \d+ images in .* cannot be read"):
        export_model(digit_onnx, data, tmp_path / "other.onnx", calibrated)


def test_unreadable_calibration_and_ood_images_are_reported(
    digit_onnx: Path, digits: DemoImages, train_batches: Batches, tmp_path: Path
) -> None:
    calibration, photos = tmp_path / "calibration", tmp_path / "photos"
    for source, target in ((digits.calibration, calibration), (digits.far_photos, photos)):
        shutil.copytree(source, target)
        (target / f"broken {target.name}.png").write_bytes(b"no image")
    options = replace(DIGITS, calibration_data=calibration, ood_prototype=f"images:{photos}")
    found = export_model(digit_onnx, train_batches, tmp_path / "out.onnx", options)
    assert [name for name, _ in found.unreadable] == ["broken calibration.png", "broken photos.png"]


def test_classifier_options_reach_the_classifier(
    digit_onnx: Path, train_batches: Batches, calibrated: ExportOptions, tmp_path: Path
) -> None:
    graph = onnx.load(digit_onnx).graph
    relu = [node.output[0] for node in graph.node if node.op_type == "Relu"][-2]  # [N, 32, 4, 4]
    options = replace(calibrated, classifier=ClassifierOptions(features=relu))
    found = export_model(digit_onnx, train_batches, tmp_path / "out.onnx", options).contract
    assert found.classifier.features_tensor == relu
    assert (found.classifier.dimension, found.classifier.features_pooled) == (32, True)


def test_overflowing_classifier_is_refused(digits: DemoImages, tmp_path: Path) -> None:
    loud = Before(lambda x: torch.exp(8 * x), ConvBnGap(1))  # finite for random noise, infinite for bright pixels
    path = legacy_onnx(loud, tmp_path / "loud.onnx", np.zeros((1, 1, 32, 32), np.float32), open_batch=True)
    data = subset(digits.train, tmp_path / "data", {str(i): 5 for i in range(5)})
    options = replace(DIGITS, classes=None, preprocessing=replace(DIGIT_PREPROCESSING, std=(0.01,)))
    _refusal(ClassifierError, r"NaN or Inf for \d+ of \d+ images", path, data, tmp_path, options)


def test_progress_names_every_step(digit_onnx: Path, train_batches: Batches, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []

    def record(label: str, done: int, total: int | None) -> None:
        calls.append((label, done, total))

    export_model(digit_onnx, train_batches, tmp_path / "out.onnx", DIGITS, record)
    labels = list(dict.fromkeys(label for label, _, _ in calls))
    steps = ["loading the classifier", "reading the given batches", "fitting statistics", "cross-fitting", "verifying"]
    assert [label for label in labels if label in steps] == steps
    for label in labels:
        done = [d for name, d, _ in calls if name == label]
        assert done == sorted(done)
