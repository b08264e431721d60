"""Artifacts of three kinds of networks become TensorRT-RTX engines for every desktop generation, without a GPU."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from grood_edge.export import ExportOptions, export_model
from grood_edge.export.preflight import preflight
from tests.export.backbones import BACKBONES, fitted_network
from tests.export.conftest import DIGIT_PREPROCESSING, Batches
from tests.export.networks import legacy_onnx
from tests.rtx import build_rtx, digest_at_fixed_addresses

PRECISIONS = ("fp32",)
COMPUTE_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
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
    """An artifact with all that is chosen by itself: several OOD prototypes where they help, an int8 bank."""
    name, precision = request.param
    assert precision == "fp32"  # others come with their export option
    options = ExportOptions(
        preprocessing=DIGIT_PREPROCESSING, classes=tuple("0123456"), calibration_data=calibration_batches
    )
    path = tmp_path_factory.mktemp("rtx") / f"{name}-{precision}.onnx"
    network = fitted_network(name, *train_batches[0])
    if name != "vit":  # torch's old exporter is the quicker one; it loses the shapes of attention
        images = np.zeros((1, 1, 32, 32), np.float32)
        model = legacy_onnx(network, path.with_suffix(".classifier.onnx"), images, open_batch=True)
        report = export_model(model, train_batches, path, options)
    else:
        report = export_model(network, train_batches, path, options)
    accuracy = report.contract.fit.accuracy
    assert accuracy is not None
    assert accuracy > 0.9  # a classifier, not noise
    return Built(report.path, onnx.load(report.path))


def test_preflight_refuses_nothing(artifact: Built) -> None:
    findings = preflight(artifact.model)
    assert [finding.sentence for finding in findings if finding.kind == "refused"] == []
    quantised = {"DequantizeLinear"} & {node.op_type for node in artifact.model.graph.node}
    assert {finding.operator for finding in findings} == quantised  # the bank; nothing else is worth a warning


@pytest.mark.parametrize("compute_capability", COMPUTE_CAPABILITIES)
def test_becomes_an_engine(artifact: Built, compute_capability: str) -> None:
    verdict = build_rtx(artifact.model, (compute_capability,))
    assert (verdict.stage, verdict.message) == ("built", "")
    weights = sum(len(tensor.raw_data) for tensor in artifact.model.graph.initializer)
    assert len(verdict.engine) > weights / 2  # the weights are in it, in whatever type it computes


def test_one_engine_for_all(artifact: Built) -> None:
    assert build_rtx(artifact.model, COMPUTE_CAPABILITIES).stage == "built"


def test_two_builds_are_the_same_bytes(artifact: Built) -> None:
    first, second = (digest_at_fixed_addresses(artifact.path, ("SM89",)) for _ in range(2))
    assert first == second
