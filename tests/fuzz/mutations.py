"""Changes to real files that keep most of their structure: JSON values, protobuf fields, members, chunks, records."""

import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

Mutate = Callable[[Random, bytes], bytes]

NUMBERS = (
    0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
TEXTS = (
    "", "a", "\0", "\x1b[2J", "../../x", "/etc/passwd", "\u202e", "\ud800", "é" * 40, "x" * 2000, "nan", "9" * 40,
    "0" * 64, "%s%n", "os:system", "x" * 50_000,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, "", 0, 1, -1, 0.5, 1e308, -1e308, 1e-320, 2**53, 10**25, float("nan"), float("inf"),
)  # fmt: skip
DEEP, LONG = "@deep@", "@long@"


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Flip, overwrite, insert, remove, repeat or cut."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4, 16))):
        at, size = random.randint(0, len(found)), random.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = random.randrange(8)
        if kind == 0 and found:
            found[at % len(found)] ^= 1 << random.randrange(8)
        elif kind == 1:
            found[at : at + size] = random.randbytes(min(size, 64))
        elif kind == 2:
            found[at:at] = random.randbytes(min(size, 64))
        elif kind == 3:
            del found[at : at + size]
        elif kind == 4:
            found[at:at] = found[at : at + size] * random.choice((1, 2, 20))
        elif kind == 5:
            del found[at:]
        else:
            found[at : at + (4 if kind == 6 else 8)] = packed_number(random, 4 if kind == 6 else 8)
    return bytes(found)


def packed_number(random: Random, size: int) -> bytes:
    value = random.choice(NUMBERS) % (1 << 8 * size)
    return value.to_bytes(size, random.choice(("little", "big")))


def mutate_text(random: Random, text: str) -> str:
    """Change a text, or the bytes behind it where it is base64."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if raw and random.random() < 0.7:
        changed = mutate_png(random, raw) if raw.startswith(b"\x89PNG") else mutate_bytes(random, raw)
        return base64.b64encode(changed).decode()
    if random.random() < 0.5:
        return random.choice(TEXTS)
    return mutate_bytes(random, text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")


def mutate_json(random: Random, data: bytes) -> bytes:
    """Change one to three values or keys; rarely the text itself."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(random, data)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(document))
        if places:
            _change(random, *random.choice(places), places)
    text = json.dumps(document, ensure_ascii=random.random() < 0.5, separators=(",", ":"))
    text = text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * random.choice((0, 100_000)))
    text = text.replace(f'"{LONG}"', "[" + "0," * 1_200_000 + "0]")
    if random.random() < 0.05:  # a key twice
        text = text.replace("{", random.choice(('{"schema":0,', '{"":0,"":0,', '{"a":')), 1)
    raw = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(random, raw) if random.random() < 0.05 else raw


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(pairs):
        yield value, key
        yield from _places(item)


def _change(random: Random, container: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    kind, value = random.randrange(9), None
    try:
        value = container[key]
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[random.choice(TEXTS)] = value
        elif kind == 1 or (kind == 2 and isinstance(value, list)):
            target = value if kind == 2 else container
            target += target[: random.choice((1, 5))] * random.choice((1, 3, 100))
        elif kind == 3:
            container[key] = random.choice((*VALUES, *VALUES, DEEP, LONG) if random.random() < 0.1 else VALUES)
        elif kind == 4:
            other, name = random.choice(places)
            container[key] = json.loads(json.dumps(other[name]))
        elif isinstance(value, bool):
            container[key] = not value
        elif isinstance(value, int | float):
            container[key] = random.choice((value + 1, value - 1, -value, value * 2, value / 2, *NUMBERS))
        elif isinstance(value, str):
            container[key] = mutate_text(random, value)
        else:
            container[key] = random.choice(VALUES)
    except (KeyError, IndexError, RecursionError):  # an earlier change took the place away
        return


def mutate_png(random: Random, data: bytes) -> bytes:
    """Change, remove or repeat a chunk, with a checksum that fits; or change what is packed in it."""
    chunks, at = [], 8
    while at + 12 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += 12 + size
    if not chunks or random.random() < 0.1:
        return mutate_bytes(random, data)
    index = random.randrange(len(chunks))
    name, content = chunks[index]
    kind = random.randrange(6)
    if kind == 0:
        del chunks[index]
    elif kind == 1:
        chunks.insert(
            index, (random.choice((b"tEXt", b"zTXt", b"acTL", b"fcTL", b"PLTE", b"eXIf", b"iCCP", b"tRNS")), content)
        )
    elif kind == 2 and name == b"IDAT":
        try:
            chunks[index] = (name, zlib.compress(mutate_bytes(random, zlib.decompress(content))))
        except zlib.error:
            chunks[index] = (name, zlib.compress(bytes(1 << 20)))
    elif kind == 3 and name == b"IHDR":
        sides = struct.pack(">II", *(random.choice((0, 1, 8, 60_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)))
        chunks[index] = (name, sides + bytes(random.choice((0, 1, 2, 3, 4, 6, 8, 16)) for _ in range(2)) + content[10:])
    else:
        chunks[index] = (name, mutate_bytes(random, content))
    packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return data[:8] + b"".join(packed)
