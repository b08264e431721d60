"""Artifacts of three kinds of networks become TensorRT-RTX engines for every desktop generation, without a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest

from grood_edge.artifact import read_artifact
from grood_edge.export import ExportOptions, export_model
from grood_edge.export.preflight import preflight
from grood_edge.export.torch_classifier import onnx_from_torch
from grood_edge.progress import silent
from grood_edge.runtime.build_process import build_apart
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.trt_api import load_api
from tests.export.backbones import BACKBONES, fitted_network
from tests.export.conftest import DIGIT_PREPROCESSING, Batches
from tests.export.networks import legacy_onnx
from tests.rtx import build_rtx, require_fixed_addresses

PRECISIONS: tuple[Literal["fp32", "fp16", "int8"], ...] = ("fp32", "fp16", "int8")
COMPUTE_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
IMAGES = 210  # of 630 and 314: types and operators are looked at here, not how well a network recognises
CASES = [(name, precision) for name in BACKBONES for precision in PRECISIONS]


@dataclass(frozen=True)
class Built:
    path: Path
    model: onnx.ModelProto


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def artifact(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    train_batches: Batches,
    calibration_batches: Batches,
) -> Built:
    """An artifact with three OOD prototypes and an int8 bank."""
    name, precision = request.param
    options = ExportOptions(
        preprocessing=DIGIT_PREPROCESSING,
        classes=tuple("0123456"),
        calibration_data=[tuple(part[:IMAGES] for part in calibration_batches[0])],
        precision=precision,
        ood_prototype="mean,mixup,origin",  # three, as the default has where they help
        bank=64,
        scale=1.0,
        max_flips=1.0,  # random backbones are no measure of what a precision costs
        max_auroc_drop=1.0,
    )
    folder = tmp_path_factory.getbasetemp() / "rtx"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{precision}.onnx"
    (frames, labels), *_ = train_batches
    some = [(frames[:IMAGES], labels[:IMAGES])]
    report = export_model(_classifier(name, folder, train_batches), some, path, options)
    accuracy = report.contract.fit.accuracy
    assert accuracy is not None
    assert accuracy > 0.9  # a classifier, not noise
    assert report.contract.precision.name == precision
    return Built(report.path, onnx.load(report.path))


def _classifier(name: str, folder: Path, batches: Batches) -> Path:
    """Trace each network once."""
    path = folder / f"{name}.classifier.onnx"
    if not path.exists():
        network = fitted_network(name, *batches[0])
        if name == "vit":  # torch's old exporter is the quicker one, but it loses the shapes of attention
            onnx.save(onnx_from_torch(network, None, (32, 32))[0], path)
        else:
            legacy_onnx(network, path, np.zeros((1, 1, 32, 32), np.float32), open_batch=True)
    return path


def test_preflight_refuses_nothing(artifact: Built) -> None:
    findings = preflight(artifact.model)
    assert [finding.sentence for finding in findings if finding.kind == "refused"] == []
    quantised = {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in artifact.model.graph.node}
    assert {finding.operator for finding in findings} <= quantised  # nothing else is worth a warning


def test_becomes_an_engine(artifact: Built) -> None:
    """One engine for all generations; of the ResNet, one for each as well."""
    targets: list[tuple[str, ...]] = [COMPUTE_CAPABILITIES]
    if artifact.path.stem.startswith("resnet"):
        targets += [(name,) for name in COMPUTE_CAPABILITIES]
    for target in targets:
        verdict = build_rtx(artifact.model, target)
        assert (verdict.stage, verdict.message) == ("built", "")
        weights = sum(len(tensor.raw_data) for tensor in artifact.model.graph.initializer)
        assert len(verdict.engine) > weights / 2  # the weights are in it, in whatever type it computes


def test_two_builds_are_the_same_bytes(artifact: Built) -> None:
    if not artifact.path.stem.startswith("resnet"):
        pytest.skip("of one network is enough")
    require_fixed_addresses()
    api, spec = load_api("tensorrt-rtx"), BuildSpec(targets=("SM89",))
    first, second = (build_apart(api, read_artifact(artifact.path), spec, silent).plan for _ in range(2))
    assert first == second
