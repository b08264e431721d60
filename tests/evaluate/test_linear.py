"""The last layer is read, whatever operators it is made of, and refused where the logits are no W h + b."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.evaluate.linear import NoLinearLayer, read_linear_layer
from grood_edge.images import find_images, load_image
from grood_edge.outputs import Outputs
from grood_edge.runtime.session import open_session
from tests.runtime.conftest import single_path  # noqa: F401


@pytest.fixture(scope="module")
def outputs(artifact_path: Path, digits: DemoImages) -> Outputs:
    with open_session(artifact_path) as session:
        return session.infer([load_image(path) for path in find_images(digits.test)[:40]])


def test_weights_of_the_network_come_back(artifact_path: Path, network: DigitNetwork, outputs: Outputs) -> None:
    layer = read_linear_layer(read_artifact(artifact_path), outputs.features, outputs.logits)
    wanted = [parameter.detach().numpy() for parameter in network.parameters()][-2:]
    np.testing.assert_allclose(layer.weight, wanted[0], atol=1e-5)
    np.testing.assert_allclose(layer.bias, wanted[1], atol=1e-6)
    np.testing.assert_allclose(layer.logits(outputs.features), outputs.logits, atol=1e-3)


def test_batch_of_one(single_path: Path, outputs: Outputs) -> None:  # noqa: F811
    layer = read_linear_layer(read_artifact(single_path), outputs.features, outputs.logits)
    assert layer.weight.shape == (outputs.logits.shape[1], outputs.features.shape[1])


def changed(artifact: Artifact, nodes: list[tuple[str, list[str], str]], start: str) -> Artifact:
    """Put nodes between the classifier's own logits and the artifact's `logits`; `start` names their first input."""
    model = onnx.load_model_from_string(artifact.model)
    logits = f"classifier/{artifact.contract.classifier.logits_tensor}"
    features = f"classifier/{artifact.contract.classifier.features_tensor}"
    made = [
        helper.make_node(kind, [{"LOGITS": logits, "FEATURES": features}.get(i, i) for i in inputs], [output])
        for kind, inputs, output in nodes
    ]
    existing = list(model.graph.node)
    at = next(index for index, node in enumerate(existing) if logits in node.output) + 1
    for node in existing[at:]:
        node.input[:] = [start if name == logits else name for name in node.input]
    model.graph.ClearField("node")
    model.graph.node.extend([*existing[:at], *made, *existing[at:]])
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2.0), "two"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "axes"))
    return dataclasses.replace(artifact, model=model.SerializeToString())


def test_more_linear_operators_are_part_of_the_layer(artifact_path: Path, outputs: Outputs) -> None:
    artifact = changed(read_artifact(artifact_path), [("Mul", ["LOGITS", "two"], "twice")], "twice")
    layer = read_linear_layer(artifact, outputs.features, 2 * outputs.logits)
    np.testing.assert_allclose(layer.logits(outputs.features), 2 * outputs.logits, atol=1e-3)


def test_logits_that_are_not_linear_are_refused(artifact_path: Path, outputs: Outputs) -> None:
    artifact = changed(read_artifact(artifact_path), [("Mul", ["LOGITS", "LOGITS"], "squared")], "squared")
    with pytest.raises(NoLinearLayer, match="differ from W h"):
        read_linear_layer(artifact, outputs.features, outputs.logits**2)


def test_logits_with_a_second_way_from_the_image_are_refused(artifact_path: Path, outputs: Outputs) -> None:
    nodes = [
        ("ReduceMean", ["preprocess/div_2", "axes"], "level"),
        ("Flatten", ["level"], "flat"),
        ("Add", ["LOGITS", "flat"], "both"),
    ]
    artifact = changed(read_artifact(artifact_path), nodes, "both")
    with pytest.raises(NoLinearLayer, match="do not come from the features alone"):
        read_linear_layer(artifact, outputs.features, outputs.logits)


def test_no_images_prove_nothing(artifact_path: Path, outputs: Outputs) -> None:
    with pytest.raises(NoLinearLayer, match="no image"):
        read_linear_layer(read_artifact(artifact_path), outputs.features[:0], outputs.logits[:0])
