"""The little of protobuf's wire format that artifacts need: read ONNX files, and replace parts of them, without onnx.

Source: https://protobuf.dev/programming-guides/encoding/ and onnx.proto3. A message is a list of
`Field(number, wire type, value)`; unknown fields are carried along untouched, so that reading and writing a
message gives the same bytes back. Length-delimited values are memoryviews: nothing is copied while reading.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from grood_edge.errors import ArtifactError

__all__ = ["MAX_FIELDS", "Field", "encode_field", "encode_varint", "only_bytes", "read_fields", "read_varint"]

MAX_FIELDS = 1 << 21  # in one message: ten times what real graphs have, and still read in seconds
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_TAG = (1 << 32) - 1
_MAX_VARINT = (1 << 64) - 1


@dataclass(frozen=True)
class Field:
    """One field of a message. `value` is an int for varints and the raw bytes for everything else."""

    number: int
    wire_type: int
    value: int | memoryview | bytes
    raw: memoryview | bytes  # tag, length and value as they stand in the file

    def text(self) -> str:
        """Return the value as a string; undecodable bytes are replaced."""
        return bytes(self.message()).decode("utf-8", errors="replace")

    def message(self) -> memoryview | bytes:
        """Return the value as bytes.

        Raises:
            ArtifactError: the field is a number where a string or message was expected.
        """
        if isinstance(self.value, int) or self.wire_type != _BYTES:
            raise ArtifactError(f"damaged ONNX file: field {self.number} is a number where a message was expected")
        return self.value


def read_fields(buffer: memoryview | bytes, limit: int = MAX_FIELDS) -> Iterator[Field]:
    """Iterate over the fields of one message, at most `limit` of them.

    Raises:
        ArtifactError: the bytes are not a whole protobuf message, or it has more fields.
    """
    view, position, end = memoryview(buffer), 0, len(buffer)
    while position < end:
        start = position
        tag, position = read_varint(view, position)
        number, wire_type = tag >> 3, tag & 7
        limit -= 1
        if limit < 0 or number == 0 or tag > _MAX_TAG:
            found = "more fields than expected" if limit < 0 else f"field number {number}"
            raise ArtifactError(f"damaged ONNX file: {found} at byte {start} of a message")
        value: int | memoryview
        if wire_type == _VARINT:
            value, position = read_varint(view, position)
        else:
            if wire_type == _BYTES:
                length, position = read_varint(view, position)
            elif wire_type in (_FIXED64, _FIXED32):
                length = 8 if wire_type == _FIXED64 else 4
            else:
                raise ArtifactError(f"damaged ONNX file: wire type {wire_type} at byte {start}")
            if position + length > end:
                raise ArtifactError("damaged or truncated ONNX file: a field reaches past its message")
            value = view[position : position + length]
            position += length
        yield Field(number, wire_type, value, view[start:position])


def only_bytes(buffer: memoryview | bytes, number: int, limit: int = MAX_FIELDS) -> memoryview | bytes | None:
    """Return the value of the length-delimited field with this number, or None when there is none.

    Raises:
        ArtifactError: it is there twice (parsers differ in which one counts), or it is a number.
    """
    value = None
    for field in read_fields(buffer, limit):
        if field.number == number:
            if value is not None:
                raise ArtifactError(f"damaged ONNX file: field {number} is there twice; expected it once")
            value = field.message()
    return value


def encode_field(number: int, value: int | bytes | memoryview | Iterable[bytes]) -> bytes:
    """Encode one field: an int as varint, bytes as length-delimited, an iterable of bytes as their concatenation."""
    if isinstance(value, int):
        return encode_varint(number << 3 | _VARINT) + encode_varint(value)
    payload = value if isinstance(value, bytes | memoryview) else b"".join(value)
    return b"".join((encode_varint(number << 3 | _BYTES), encode_varint(len(payload)), payload))


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer of at most 64 bits."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(view: memoryview | bytes, position: int) -> tuple[int, int]:
    """Read one varint; return it and the position after it.

    Raises:
        ArtifactError: the bytes end inside it, or it has more than 64 bits.
    """
    result = 0
    for index in range(10):
        if position >= len(view):
            raise ArtifactError("damaged or truncated ONNX file: it ends inside a number")
        byte = view[position]
        position += 1
        result |= (byte & 0x7F) << (7 * index)
        if byte < 0x80 and result <= _MAX_VARINT:
            return result, position
    raise ArtifactError("damaged ONNX file: a number has more than 64 bits")
