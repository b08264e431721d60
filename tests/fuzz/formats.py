"""Changes to protobuf messages, artifacts, archives and recordings; checksums fit where readers check them."""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from grood_edge import wire
from grood_edge.artifact import CONTRACT_KEY, artifact_bytes
from grood_edge.contract_reader import contract_from_json
from grood_edge.errors import GroodEdgeError
from tests.fuzz.mutations import NUMBERS, TEXTS, Mutate, mutate_bytes, mutate_json, mutate_text


def mutate_message(random: Random, data: bytes, depth: int = 0) -> bytes:
    """Change one field of a protobuf message, mostly deep inside."""
    try:
        fields = [
            (f.number, f.wire_type, f.value if isinstance(f.value, int) else bytes(f.value))
            for f in wire.read_fields(data)
        ]
    except GroodEdgeError:
        return mutate_bytes(random, data)
    if not fields or depth > 7:
        return mutate_bytes(random, data)
    index = random.randrange(len(fields))
    number, kind, value = fields[index]
    action = random.randrange(14)
    if action == 0:
        del fields[index]
    elif action == 1:
        fields.insert(random.randint(0, len(fields)), fields[index])
    elif action == 2:
        other = random.randrange(len(fields))
        fields[index], fields[other] = fields[other], fields[index]
    elif action == 3:
        fields[index] = (random.choice((number + 1, max(1, number - 1), random.randint(1, 30))), kind, value)
    elif action == 4:
        fields[index] = (number, 0, random.choice(NUMBERS)) if kind == 2 else (number, 2, b"\1\2")
    elif isinstance(value, int):
        fields[index] = (number, 0, random.choice((value + 1, max(0, value - 1), *NUMBERS)))
    elif kind == 2:
        fields[index] = (number, 2, _changed_payload(random, value, depth))
    else:
        fields[index] = (number, kind, random.randbytes(len(value)))
    return b"".join(map(_field, fields))


def _changed_payload(random: Random, value: bytes, depth: int) -> bytes:
    printable = 0 < len(value) < 60 and all(32 <= byte < 127 for byte in value)
    if printable and random.random() < 0.8:
        return mutate_text(random, value.decode()).encode("utf-8", "surrogatepass")
    return mutate_message(random, value, depth + 1)


def _field(field: tuple[int, int, Any]) -> bytes:
    number, kind, value = field
    if kind in (0, 2):
        return wire.encode_field(number, value % (1 << 64) if kind == 0 else value)
    return wire.encode_varint(number << 3 | kind) + bytes(value)


def mutate_artifact(random: Random, data: bytes) -> bytes:
    """Change graph, contract or both, and compute the digests anew where that is possible."""
    if random.random() < 0.1:
        return random.choice((mutate_bytes, mutate_message))(random, data)
    try:
        fields = list(wire.read_fields(data))
        model = b"".join(bytes(f.raw) for f in fields if f.number != 14)
        entries = [field.message() for field in fields if field.number == 14]
        texts = {bytes(wire.only_bytes(e, 1) or b""): bytes(wire.only_bytes(e, 2) or b"") for e in entries}
        text = texts[CONTRACT_KEY.encode()]
        what = random.randrange(3)
        if what != 0:
            text = mutate_json(random, text)
        if what != 1:
            model = mutate_message(random, model)
        return artifact_bytes(model, contract_from_json(text.decode())[0])
    except (GroodEdgeError, ValueError, KeyError):  # not even a contract
        return mutate_message(random, data)


def mutate_zip(inner: Callable[[Random, str, bytes], bytes]) -> Mutate:
    """Return a mutation of archives: members changed by `inner`, renamed, repeated or packed otherwise."""

    def mutate(random: Random, data: bytes) -> bytes:
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                members = [(info.filename, archive.read(info)) for info in archive.infolist()]
        except Exception:
            return mutate_bytes(random, data)
        kind, index = random.randrange(8), random.randrange(max(1, len(members)))
        if members and kind == 0:
            del members[index]
        elif members and kind == 1:
            members.append(members[index])
        elif members and kind == 2:
            members[index] = (
                random.choice((*TEXTS[:7], "images.npy", "labels.npy", "../" + members[index][0])),
                members[index][1],
            )
        elif members and kind < 7:
            members[index] = (members[index][0], inner(random, *members[index]))
        out = io.BytesIO()
        how = random.choice(
            (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        )
        with warnings.catch_warnings(), zipfile.ZipFile(out, "w", how) as archive:
            warnings.simplefilter("ignore")  # of names that are there twice
            for name, content in members:
                clean = name.encode("utf-8", "replace").decode().replace("\0", "_") or "_"
                archive.writestr(zipfile.ZipInfo(clean), content, how)  # of 1980: the same bytes in every run
        return mutate_bytes(random, out.getvalue()) if kind == 7 else out.getvalue()

    return mutate


def mutate_npy(random: Random, name: str, data: bytes) -> bytes:
    """Change the header's text, with a length that fits, or the data."""
    size = int.from_bytes(data[8:10], "little")
    header, rest = data[10 : 10 + size].decode("latin-1"), data[10 + size :]
    kind = random.randrange(6)
    if kind == 0:
        return mutate_bytes(random, data)
    if kind == 1:
        return data[: 10 + size] + mutate_bytes(random, rest)
    pieces = ("|u1", "<i8", "|O", "<f4", "<i4", "False", "True", "(", ")", "descr", "shape", "20", "24", "3", "1")
    options = (
        "|O",
        "<M8[s]",
        "True",
        str(10**9),
        str(-1),
        str(2**64),
        "0",
        "()",
        "(1,)",
        "," * 50,
        "(" * 200,
        "[('a','|u1')]",
        "1e9",
        "True+1",
    )
    old = random.choice([piece for piece in pieces if piece in header] or [""])
    changed = header.replace(old, random.choice(options), 1) if kind < 5 else mutate_text(random, header)
    raw = changed.encode("latin-1", "replace")
    version = random.choice((data[:8], data[:8], b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00", b"\x93NUMPY\x09\x00"))
    first = version[6:7] == b"\x01"  # not where an earlier change has cut the member off
    return version + (struct.pack("<H", len(raw) % 65536) if first else struct.pack("<I", len(raw))) + raw + rest


def mutate_mcap(random: Random, data: bytes) -> bytes:
    """Change records of an .mcap: opcode, length, content, order."""
    records, at = [], 8
    while at + 9 <= len(data) - 8:
        size = int.from_bytes(data[at + 1 : at + 9], "little")
        records.append((data[at], data[at + 9 : at + 9 + size]))
        at += 9 + size
    if not records or random.random() < 0.15:
        return mutate_bytes(random, data)
    index = random.randrange(len(records))
    code, content = records[index]
    kind = random.randrange(8)
    if kind == 0:
        del records[index]
    elif kind == 1:
        records.insert(index, records[index])
    elif kind == 2:
        records[index] = (random.randint(0, 17), content)
    elif kind == 3:
        other = random.randrange(len(records))
        records[index], records[other] = records[other], records[index]
    else:
        records[index] = (code, mutate_bytes(random, content))
    packed = b"".join(bytes([c]) + struct.pack("<Q", len(r)) + r for c, r in records)
    return data[:8] + packed + (data[:8] if random.random() < 0.9 else b"")
