"""The protobuf reader and writer against the onnx package, and against damaged bytes."""

import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf import descriptor
from onnx import helper, numpy_helper

from grood_edge import wire
from grood_edge.errors import ArtifactError


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**14 - 1, 2**14, 2**31, 2**32, 2**63, 2**64 - 1])
def test_varint_round_trip(value: int) -> None:
    encoded = wire.encode_varint(value)
    assert wire.read_varint(b"\xff" + encoded + b"\xff", 1) == (value, 1 + len(encoded))
    assert len(encoded) == max(1, -(-value.bit_length() // 7))


def test_known_bytes_of_the_protobuf_guide() -> None:
    assert wire.encode_field(1, 150) == bytes.fromhex("089601")
    assert wire.encode_field(2, b"testing") == bytes.fromhex("120774657374696e67")


def test_varint_that_ends_or_grows_too_long() -> None:
    with pytest.raises(ArtifactError, match="ends inside a number"):
        wire.read_varint(b"\x80\x80", 0)
    with pytest.raises(ArtifactError, match="ends inside a number"):
        wire.read_varint(b"", 0)
    for tail in (b"\x80\x01", b"\x7f"):  # eleven bytes, and ten bytes with 70 bits
        with pytest.raises(ArtifactError, match="more than"):
            wire.read_varint(b"\x80" * 9 + tail, 0)


def test_negative_numbers_are_not_encoded() -> None:
    with pytest.raises(ValueError, match="byte must be in range"):
        wire.encode_varint(-1)


def test_every_field_of_a_real_model_as_onnx_sees_it(artifact_path: Path) -> None:
    data = artifact_path.read_bytes()
    model = onnx.load_model_from_string(data)
    fields = list(wire.read_fields(data))
    assert b"".join(field.raw for field in fields) == data
    found: dict[str, int] = {}
    for field in fields:
        name = model.DESCRIPTOR.fields_by_number[field.number].name
        found[name] = found.get(name, 0) + 1
    expected = {d.name: len(value) if d.is_repeated else 1 for d, value in model.ListFields()}
    assert found == expected


def _assert_same(message: memoryview | bytes, parsed: object, depth: int = 0) -> int:
    """Compare a message with what protobuf parsed, field by field; returns the number of fields."""
    count = 0
    seen: dict[int, int] = {}
    for field in wire.read_fields(message):
        d = parsed.DESCRIPTOR.fields_by_number[field.number]  # type: ignore[attr-defined]
        value = getattr(parsed, d.name)
        index = seen.get(field.number, 0)
        seen[field.number] = index + 1
        count += 1
        if d.is_repeated and d.type != descriptor.FieldDescriptor.TYPE_MESSAGE and isinstance(field.value, int):
            assert field.value == value[index]
            continue
        item = value[index] if d.is_repeated else value
        if d.type == descriptor.FieldDescriptor.TYPE_MESSAGE:
            count += _assert_same(field.message(), item, depth + 1)
        elif d.type == descriptor.FieldDescriptor.TYPE_STRING:
            assert field.text() == item
        elif d.type == descriptor.FieldDescriptor.TYPE_BYTES:
            assert bytes(field.message()) == item
        elif isinstance(field.value, int):
            assert field.value == item
    return count


def test_nested_messages_as_onnx_sees_them(artifact_path: Path) -> None:
    data = artifact_path.read_bytes()
    assert _assert_same(data, onnx.load_model_from_string(data)) > 500


def test_encoded_fields_are_read_by_onnx() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    encoded = b"".join(
        [
            wire.encode_field(1, 2),
            wire.encode_field(1, 3),
            wire.encode_field(2, onnx.TensorProto.FLOAT),
            wire.encode_field(8, "größe".encode()),
            wire.encode_field(9, [array[:1].tobytes(), array[1:].tobytes()]),
        ]
    )
    tensor = onnx.TensorProto.FromString(encoded)
    assert tensor.name == "größe"
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), array)


def test_fixed_width_fields_are_carried_along() -> None:
    message = helper.make_attribute("alpha", 0.25).SerializeToString()  # float f = 2: wire type 5
    fields = {field.number: field for field in wire.read_fields(message)}
    assert fields[2].wire_type == 5
    assert np.frombuffer(fields[2].raw[1:], "<f4")[0] == 0.25
    with pytest.raises(ArtifactError, match="field 2 is a number"):
        fields[2].message()
    with pytest.raises(ArtifactError, match=r"field 20 is a number"):
        fields[20].message()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x0a\x05abc", "reaches past"),
        (b"\x0a", "ends inside a number"),
        (b"\x09\x00\x00", "reaches past"),
        (b"\x0d\x00", "reaches past"),
        (b"\x0b", "wire type 3"),
        (b"\x0c", "wire type 4"),
        (b"\x0e", "wire type 6"),
        (b"\x0f", "wire type 7"),
        (b"\x02\x00", "field number 0"),
        (b"\x00\x00", "field number 0"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "reaches past"),
    ],
)
def test_damaged_messages(data: bytes, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        list(wire.read_fields(data))


def test_only_bytes() -> None:
    message = wire.encode_field(3, 7) + wire.encode_field(4, b"name")
    assert bytes(wire.only_bytes(message, 4) or b"") == b"name"
    assert wire.only_bytes(message, 5) is None
    with pytest.raises(ArtifactError, match="field 3 is a number"):
        wire.only_bytes(message, 3)
    with pytest.raises(ArtifactError, match="field 4 is there twice"):
        wire.only_bytes(message * 2, 4)


def test_number_of_fields_is_bounded() -> None:
    assert len(list(wire.read_fields(b"\x08\x01" * 10, limit=10))) == 10
    with pytest.raises(ArtifactError, match="more fields than expected"):
        list(wire.read_fields(b"\x08\x01" * 11, limit=10))


def test_random_bytes_end_or_are_refused() -> None:
    rng = random.Random(0)
    refused = 0
    for _ in range(5000):
        data = rng.randbytes(rng.randrange(40))
        try:
            fields = list(wire.read_fields(data))
            assert b"".join(field.raw for field in fields) == data
        except ArtifactError:
            refused += 1
    assert refused > 1000
