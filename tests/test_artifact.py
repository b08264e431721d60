"""The file: what is refused when reading."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from grood_edge import wire
from grood_edge.artifact import (
    CONTRACT_KEY,
    artifact_bytes,
    graph_digest,
    read_artifact,
)
from grood_edge.contract import Contract
from grood_edge.errors import ArtifactError
from grood_edge.scoring import Head
from grood_edge.stored_head import head_from_model, head_tensors, model_with_tensors


@pytest.fixture(scope="module")
def data(artifact_path: Path) -> bytes:
    return artifact_path.read_bytes()


@pytest.fixture(scope="module")
def contract(data: bytes) -> Contract:
    return read_artifact(data).contract


def metadata(data: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_model_from_string(data).metadata_props}


class TestRead:
    def test_from_path_text_and_bytes(self, artifact_path: Path, data: bytes) -> None:
        artifact = read_artifact(artifact_path)
        assert artifact == read_artifact(str(artifact_path)) == read_artifact(data)
        assert artifact.model == data
        assert (artifact.opset, artifact.ir_version) == (19, 9)
        assert len(artifact.graph_digest) == len(artifact.contract_digest) == 64

    def test_what_onnx_sees_beside_the_graph(self, data: bytes, contract: Contract) -> None:
        found = metadata(data)
        assert found["names"] == str({i: name for i, name in enumerate(contract.classes)})  # noqa: C416 - spelled out
        assert found["imgsz"] == "[32, 32]"
        assert found["channels"] == "1"
        assert found["task"] == "classify"
        assert contract.classes == ("0", "1", "2", "3", "4", "5", "6")

    def test_writing_again_gives_the_same_bytes(self, data: bytes, contract: Contract) -> None:
        assert artifact_bytes(data, contract) == data

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"cannot read .*none\.onnx: No such file"):
            read_artifact(tmp_path / "none.onnx")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=f"cannot read {tmp_path}"):
            read_artifact(tmp_path)

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "empty.onnx").touch()
        with pytest.raises(ArtifactError, match=r"ONNX"):
            read_artifact(tmp_path / "empty.onnx")

    def test_truncated_anywhere(self, data: bytes) -> None:
        """Also where a field ends: the contract stands last, so that nothing but the whole file has one."""
        boundaries = [len(data) - 1, 0]
        position = 0
        for field in wire.read_fields(data):
            boundaries.append(position)
            position += len(field.raw)
        assert position == len(data)
        ends = sorted(
            {*range(1, 400, 3), *range(400, len(data), 5003), *range(len(data) - 300, len(data)), *boundaries}
        )
        for end in ends:
            with pytest.raises(ArtifactError):
                read_artifact(data[:end])

    def test_foreign_onnx(self) -> None:
        value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
        with pytest.raises(
            ArtifactError, match="without a grood-edge contract; make an artifact of it with: grood-edge"
        ):
            read_artifact(model.SerializeToString())

    def test_no_onnx_at_all(self, tmp_path: Path) -> None:
        for content in (b"PK\x03\x04 a zip", b"\x80\x02}q\x00.", b"hello, world", b"\xff" * 1000, b"\0" * 1000):
            with pytest.raises(ArtifactError):
                read_artifact(content)

    def test_tampered_weight(self, data: bytes) -> None:
        model = onnx.load_model_from_string(data)
        weight = next(t for t in model.graph.initializer if t.raw_data and not t.name.startswith("grood/"))
        at = data.index(weight.raw_data) + len(weight.raw_data) // 2
        assert data.count(weight.raw_data) == 1
        tampered = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        with pytest.raises(ArtifactError, match=r"graph digest does not match.*damaged or edited after export"):
            read_artifact(tampered)

    def test_tampered_opset(self, data: bytes) -> None:
        model = onnx.load_model_from_string(data)
        model.opset_import[0].version = 20
        with pytest.raises(ArtifactError, match=r"graph digest|opset"):
            read_artifact(model.SerializeToString())

    def test_tampered_contract(self, data: bytes, contract: Contract) -> None:
        old = f'"alpha":{contract.calibration.alpha}'.encode()
        assert data.count(old) == 1
        tampered = data.replace(old, b'"alpha":0.06')
        with pytest.raises(ArtifactError, match="contract digest does not match"):
            read_artifact(tampered)

    @pytest.mark.parametrize("name", ["graph", "contract"])
    def test_digest_that_is_missing_or_swapped(self, data: bytes, contract: Contract, name: str) -> None:
        digests = {"graph": graph_digest(data), "contract": contract.digest()}
        for wrong in ({k: v for k, v in digests.items() if k != name}, digests | {name: digests[name][::-1]}, {}):
            with pytest.raises(ArtifactError, match=r"digest"):
                read_artifact(with_contract(data, contract.to_json(wrong)))

    def test_newer_contract(self, data: bytes) -> None:
        text = metadata(data)[CONTRACT_KEY].replace('"version":1}', '"version":2}')
        with pytest.raises(ArtifactError, match="has version 2 and this grood-edge reads version 1; upgrade"):
            read_artifact(with_contract(data, text))

    @pytest.mark.parametrize("text", ["", "{}", "not json", "null", "\x00"])
    def test_contract_that_is_none(self, data: bytes, text: str) -> None:
        with pytest.raises(ArtifactError, match="contract"):
            read_artifact(with_contract(data, text))

    def test_two_contracts(self, data: bytes, contract: Contract) -> None:
        """onnx takes the last one, other readers the first."""
        entry = wire.encode_field(1, CONTRACT_KEY.encode()) + wire.encode_field(2, contract.to_json().encode())
        with pytest.raises(ArtifactError, match=r"more than one|twice"):
            read_artifact(data + wire.encode_field(14, entry))

    def test_second_graph(self, data: bytes, contract: Contract) -> None:
        """With matching digests: protobuf would merge both graphs when the model runs."""
        tensor = numpy_helper.from_array(np.zeros(1, np.float32), "more").SerializeToString()
        merged = artifact_bytes(data + wire.encode_field(7, wire.encode_field(5, tensor)), contract)
        assert len(onnx.load_model_from_string(merged).graph.initializer) > 20
        with pytest.raises(ArtifactError):
            read_artifact(merged)

    def test_external_data_with_matching_digests(self, data: bytes, contract: Contract, tmp_path: Path) -> None:
        model = onnx.load_model_from_string(data)
        tensor = next(t for t in model.graph.initializer if t.raw_data and not t.name.startswith("grood/"))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="../secret.bin")
        with pytest.raises(ArtifactError, match=f"{tensor.name}.*in another file; an artifact is one self-contained"):
            read_artifact(artifact_bytes(model.SerializeToString(), contract))

    def test_class_without_images_has_no_prototype(self, data: bytes, contract: Contract) -> None:
        head = head_from_model(data)
        fewer = model_with_prototypes(data, dataclasses.replace(head, prototypes=head.prototypes[:6]))
        fit = dataclasses.replace(contract.fit, classes_without_prototype=("6",))
        artifact = read_artifact(artifact_bytes(fewer, dataclasses.replace(contract, fit=fit)))
        assert head_from_model(artifact.model).prototypes.shape == (6, 64)
        with pytest.raises(ArtifactError, match="prototypes_t"):
            read_artifact(artifact_bytes(fewer, contract))

    def test_random_damage_raises_nothing_but_artifact_errors(self, data: bytes) -> None:
        rng = random.Random(0)
        refused = 0
        for _ in range(200):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                area = rng.choice([200, len(data)])
                damaged[rng.choice([1, -1]) * rng.randrange(1, area)] = rng.randrange(256)
            try:
                read_artifact(bytes(damaged))
            except ArtifactError:
                refused += 1
        assert refused > 185  # the rest hit a byte with the value that it had, or one that no digest covers

    def test_random_bytes_raise_nothing_but_artifact_errors(self) -> None:
        rng = random.Random(1)
        for _ in range(3000):
            with pytest.raises(ArtifactError):
                read_artifact(rng.randbytes(rng.randrange(200)))

    def test_random_fields_around_a_contract(self, data: bytes) -> None:
        """Messages that are well-formed, but not ONNX."""
        rng = random.Random(2)
        text = metadata(data)[CONTRACT_KEY]
        entry = wire.encode_field(14, wire.encode_field(1, CONTRACT_KEY.encode()) + wire.encode_field(2, text.encode()))
        for _ in range(500):
            fields = []
            for _ in range(rng.randrange(5)):
                value = rng.randrange(2**60) if rng.random() < 0.5 else rng.randbytes(rng.randrange(9))
                fields.append(wire.encode_field(rng.randrange(1, 30), value))
            fields.insert(rng.randint(0, len(fields)), entry)
            with pytest.raises(ArtifactError):
                read_artifact(b"".join(fields))


def model_with_prototypes(data: bytes, head: Head) -> bytes:
    return model_with_tensors(data, head_tensors(head))


def with_contract(data: bytes, text: str) -> bytes:
    model = onnx.load_model_from_string(data)
    entry = next(entry for entry in model.metadata_props if entry.key == CONTRACT_KEY)
    entry.value = text
    return bytes(model.SerializeToString())
