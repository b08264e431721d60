"""What was asked is what is built: types in TensorRT's network against the graph and the contract."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest

from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError
from grood_edge.runtime.layer_types import (
    Layer,
    count_types,
    graph_products,
    inspected_types,
    read_layers,
    require_precision,
)
from grood_edge.runtime.trt_api import TrtApi, process_logger
from tests.runtime.engines import Name, with_precision

FIRST = "node_Conv_25"


def layers_of(api: TrtApi, artifact: Artifact) -> tuple[Layer, ...]:
    builder = api.module.Builder(process_logger(api))
    network = builder.create_network(1 << int(api.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = api.module.OnnxParser(network, process_logger(api))
    assert parser.parse(artifact.model)
    return read_layers(network)


def check(layers: tuple[Layer, ...], artifact: Artifact) -> None:
    require_precision(layers, graph_products(artifact.model), artifact.contract)


def retyped(layers: tuple[Layer, ...], name: str, kind: str) -> tuple[Layer, ...]:
    """Return the layers with the outputs of one in another type."""
    assert any(layer.name == name for layer in layers)
    return tuple(
        dataclasses.replace(layer, outputs=tuple((output, kind) for output, _ in layer.outputs))
        if layer.name == name
        else layer
        for layer in layers
    )


class TestTrue:
    def test_float32_with_an_int8_bank(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        layers = layers_of(rtx, digit_artifact)
        assert any(kind == "INT8" for layer in layers for _, kind in layer.outputs), "the bank's rows"
        check(layers, digit_artifact)
        assert set(count_types(layers)) == {"BOOL", "FLOAT", "INT32", "INT64"}

    @pytest.mark.parametrize("kept", [(), (FIRST,)])
    def test_half(self, rtx: TrtApi, digit_artifact: Artifact, kept: tuple[str, ...]) -> None:
        artifact = with_precision(digit_artifact, "fp16", kept)
        layers = layers_of(rtx, artifact)
        check(layers, artifact)
        assert count_types(layers)["HALF"] >= 4
        halves = [product.node for product in graph_products(artifact.model) if product.type == "HALF"]
        assert len(halves) == 3 - len(kept)

    @pytest.mark.parametrize("kept", [(), (FIRST,)])
    def test_int8(self, rtx: TrtApi, digit_artifact: Artifact, kept: tuple[str, ...]) -> None:
        artifact = with_precision(digit_artifact, "int8", kept)
        layers = layers_of(rtx, artifact)
        check(layers, artifact)
        quantised = [product for product in graph_products(artifact.model) if product.quantised]
        assert len(quantised) == 3 - len(kept)
        assert all(product.type == "FLOAT" for product in quantised)


class TestFalse:
    @pytest.mark.parametrize(
        ("made", "says", "message"),
        [
            ("fp32", "fp16", "none of the 5 convolutions and products is HALF"),
            ("fp32", "int8", "none of the 5 convolutions and products is quantised"),
            ("fp16", "fp32", "is HALF and should be FLOAT"),
            ("int8", "fp32", "is INT8 and should be FLOAT"),
            ("fp16", "int8", "none of the 5 convolutions and products is quantised"),
            ("int8", "fp16", "none of the 5 convolutions and products is HALF"),
        ],
    )
    def test_another_precision_than_the_contracts(
        self, rtx: TrtApi, digit_artifact: Artifact, made: Name, says: Name, message: str
    ) -> None:
        artifact = with_precision(digit_artifact, made, says=says)
        with pytest.raises(BackendError, match=message) as caught:
            check(layers_of(rtx, artifact), artifact)
        assert f"the contract says {says}" in str(caught.value)
        assert f"--precision {says}" in str(caught.value)

    @pytest.mark.parametrize("name", ["fp16", "int8"])
    def test_a_layer_that_the_contract_keeps(self, rtx: TrtApi, digit_artifact: Artifact, name: Name) -> None:
        made = with_precision(digit_artifact, name)
        entry = dataclasses.replace(made.contract.precision, float_layers=(FIRST,))
        lying = dataclasses.replace(made, contract=dataclasses.replace(made.contract, precision=entry))
        with pytest.raises(BackendError, match=f"{FIRST}.*the contract keeps it in float32"):
            check(layers_of(rtx, made), lying)

    def test_half_that_became_float_on_the_way(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        """What a parser that ignores types would make of the graph."""
        artifact = with_precision(digit_artifact, "fp16")
        layers = retyped(layers_of(rtx, artifact), f"classifier/{FIRST}", "FLOAT")
        with pytest.raises(BackendError, match=f"{FIRST}.* is FLOAT and should be HALF"):
            check(layers, artifact)

    @pytest.mark.parametrize("name", ["fp32", "fp16"])
    def test_a_head_that_became_half(self, rtx: TrtApi, digit_artifact: Artifact, name: Name) -> None:
        artifact = with_precision(digit_artifact, name)
        layers = retyped(layers_of(rtx, artifact), "grood/h_dot_p", "HALF")
        with pytest.raises(BackendError, match=r"grood/h_dot_p.* is HALF and should be FLOAT"):
            check(layers, artifact)

    def test_an_output_in_half(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        artifact = with_precision(digit_artifact, "fp16")
        layers = layers_of(rtx, artifact)
        maker = next(layer.name for layer in layers if layer.outputs[0][0] == "features")
        with pytest.raises(BackendError, match="output 'features' is HALF"):
            check(retyped(layers, maker, "HALF"), artifact)

    def test_quantisation_that_fell_off_on_the_way(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        artifact = with_precision(digit_artifact, "int8")
        layers = tuple(
            dataclasses.replace(layer, kind="IDENTITY") if layer.name == f"classifier/{FIRST}/dq" else layer
            for layer in layers_of(rtx, artifact)
        )
        with pytest.raises(BackendError, match=f"{FIRST}.*reads no quantised activations"):
            check(layers, artifact)

    def test_a_network_without_the_graphs_names(self, rtx: TrtApi, digit_artifact: Artifact) -> None:
        layers = tuple(
            dataclasses.replace(layer, outputs=tuple((f"tensor {i}", kind) for _, kind in layer.outputs))
            for i, layer in enumerate(layers_of(rtx, digit_artifact))
            if not layer.name.startswith("grood/")
        )
        with pytest.raises(BackendError, match=r"none of the 5 .* is found in TensorRT's network"):
            check(layers, digit_artifact)


class TestInspector:
    """No engine can be opened without a GPU: a stand-in for the module, with texts as TensorRT's own."""

    def inspected(self, artifact: Artifact, document: Any) -> dict[str, int] | None:
        inspector = SimpleNamespace(get_engine_information=lambda kind: json.dumps(document))
        engine = SimpleNamespace(create_engine_inspector=lambda: inspector)

        class Logger:
            WARNING = 2

        module = SimpleNamespace(
            ILogger=Logger,
            Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: engine),
            EngineInspector=object,
            ICudaEngine=SimpleNamespace(create_engine_inspector=None),
            LayerInformationFormat=SimpleNamespace(JSON=1),
        )
        return inspected_types(TrtApi(module, "tensorrt", "10.3.0"), b"plan", artifact.contract)

    def layer(self, **inputs: str) -> dict[str, Any]:
        return {"Layers": [{"Name": "conv Half", "Inputs": [{"Name": "Int8", **inputs}]}]}

    @pytest.mark.parametrize("key", ["Format/Datatype", "DataType"])
    def test_finds_the_types(self, digit_artifact: Artifact, key: str) -> None:
        artifact = with_precision(digit_artifact, "fp16")
        text = "Channel major FP16 format where channel % 8 == 0"
        assert self.inspected(artifact, self.layer(**{key: text})) == {"FP16": 1}

    def test_refuses_an_engine_without_the_asked_type(self, digit_artifact: Artifact) -> None:
        artifact = with_precision(digit_artifact, "fp16")
        with pytest.raises(BackendError, match="inspector names only FP32"):
            self.inspected(artifact, self.layer(DataType="Row major linear FP32"))
        with pytest.raises(BackendError, match="inspector names only FP16"):
            self.inspected(with_precision(digit_artifact, "int8"), self.layer(DataType="FP16"))

    def test_says_nothing_where_no_types_are_named(self, digit_artifact: Artifact) -> None:
        assert self.inspected(with_precision(digit_artifact, "fp16"), {"Layers": ["conv1", "conv2"]}) is None
