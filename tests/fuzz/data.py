"""Targets that read data: images, archives, class names, spools, alarms, names of files."""

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import skimage
from PIL import Image

from grood_edge.errors import GroodEdgeError
from grood_edge.export.dataset import open_dataset, read_class_names
from grood_edge.export.reservoir import Rows
from grood_edge.export.spool import BatchShape, SpooledBatch, opened_spool
from grood_edge.images import UnreadableImageError, decode_image, load_image, open_npz
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime.choose import _recorded
from grood_edge.runtime.score import ScoreRow, row_writer
from grood_edge.telemetry.alarm_folder import AlarmFolder
from grood_edge.terminal import plain_text
from tests.fuzz.formats import mutate_npy, mutate_zip
from tests.fuzz.guard import Target
from tests.fuzz.mutations import (
    mutate_bytes,
    mutate_json,
    mutate_png,
)
from tests.golden import golden_contract

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MOST_FRAMES = 400
SPOOL = (b"grood-edge spool 1 ", struct.Struct("<IIII"))
SHAPE = BatchShape(4, 3, (2, 2, 1))


def photo(width: int = 48, height: int = 32) -> Image.Image:
    with Image.open(Path(skimage.__file__).parent / "data" / "chelsea.png") as image:
        small: Image.Image = image.convert("RGB").resize((width, height))
    return small


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def images(folder: Path) -> Sequence[bytes]:
    whole, exif = photo(), Image.Exif()
    exif[0x0112] = 6
    more = [
        encoded(whole, "JPEG", exif=exif), encoded(whole, "JPEG", progressive=True),
        encoded(whole.convert("CMYK"), "JPEG"), encoded(whole.convert("P"), "PNG"),
        encoded(whole.convert("RGBA"), "PNG"), encoded(whole.convert("1"), "TIFF"),
        encoded(whole, "TIFF", compression="tiff_lzw"),
        encoded(whole, "TIFF", compression="jpeg"), encoded(whole, "WEBP", lossless=True),
        encoded(whole, "GIF", save_all=True, append_images=[photo().rotate(90)]),
    ]  # fmt: skip
    return [encoded(whole, form) for form in FORMATS] + more


def mutate_image(random: Random, data: bytes) -> bytes:
    return mutate_png(random, data) if data.startswith(b"\x89PNG") else mutate_bytes(random, data)


def read_image(data: bytes) -> None:
    path = Path(f"image{random_suffix(data)}")
    path.write_bytes(data)
    try:
        preprocess_frame(load_image(path), golden_contract().preprocessing)
        decode_image(data)
    except UnreadableImageError:
        return
    finally:
        path.unlink()


def random_suffix(data: bytes) -> str:
    return (".png", ".jpg", ".webp", ".tif", ".gif", ".bmp")[zlib.crc32(data) % 6]


def npz_files(folder: Path) -> Sequence[bytes]:
    found, pixels = [], np.stack([np.asarray(photo())] * 3)
    for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for arrays in ({"images": pixels, "labels": np.arange(3)}, {"images": pixels[..., 0]}):
            out = io.BytesIO()
            with zipfile.ZipFile(out, "w") as archive:  # np.savez notes the time
                for name, array in arrays.items():
                    content = io.BytesIO()
                    np.save(content, array)
                    archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), how)
            found.append(out.getvalue())
    return found


def read_npz(data: bytes) -> None:
    Path("images.npz").write_bytes(data)
    archive = open_npz(Path("images.npz"))
    for index, _ in enumerate(archive.frames()):
        if index == MOST_FRAMES:
            break


def class_names(folder: Path) -> Sequence[bytes]:
    return [json.dumps(["cat", "dog", "größe"]).encode(), "cat\ndog\ngröße\n".encode(), b"\xef\xbb\xbfa\r\nb\r\n"]


def read_names(data: bytes) -> None:
    for name in ("names.json", "names.txt"):
        Path(name).write_bytes(data)
        try:
            read_class_names(Path(name))
        except GroodEdgeError:
            continue


def spools(folder: Path) -> Sequence[bytes]:
    path, pixels = folder / "fit.spool", np.zeros((1, 2, 2, 1), np.uint8)
    path.unlink(missing_ok=True)
    rows = Rows(np.zeros((4, 5), np.float32), np.arange(4) % 3, np.zeros(4, np.int64), ("a", "b", "c", "d"))
    with opened_spool(path, {}, SHAPE) as spool:
        assert spool.read() is None
        for _ in range(3):
            spool.append(SpooledBatch(rows, np.arange(4, dtype=np.uint64), pixels, (("x.png", "broken"),)))
    return [path.read_bytes()]


def mutate_spool(random: Random, data: bytes) -> bytes:
    """Change the first record, with a checksum that fits."""
    start, head = len(SPOOL[0]) + 65, SPOOL[1]
    if random.random() < 0.2 or len(data) < start + 40:
        return mutate_bytes(random, data)
    sizes = list(head.unpack_from(data, start))[1:]
    length = 4 * (24 + 4 * sizes[0]) + 4 * sizes[1] + sizes[2]
    body, rest = data[start + head.size :][:length], data[start + head.size + length :]
    text = body[len(body) - sizes[2] :] if sizes[2] < len(body) else b""
    kind = random.randrange(4)
    if kind == 0:
        sizes[random.randrange(3)] = random.choice((0, 1, 6, 2**20, 2**20 + 1, 2**32 - 1))
    elif kind == 1:
        body = mutate_bytes(random, body)
    else:
        changed = mutate_json(random, text)
        body, sizes[2] = body[: len(body) - len(text)] + changed, len(changed)
    crc = zlib.crc32(body, zlib.crc32(struct.pack("<III", *sizes)))
    return data[:start] + head.pack(crc, *sizes) + body + rest


def read_spool(data: bytes) -> None:
    path = Path("fit.spool")
    path.write_bytes(data)
    with opened_spool(path, {}, SHAPE) as spool:
        while spool.read() is not None:
            pass


def alarms(folder: Path) -> Sequence[bytes]:
    return [json.dumps({"picture_bytes": 7, "index": 3, "verdict": {"is_ood": True}}).encode()]


def read_alarm(data: bytes) -> None:
    folder = Path("alarms") / "alarm-20260101T000000000000Z-00000003"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "00000003.json").write_bytes(data)
    (folder / "00000003.jpg").write_bytes(b"picture")
    AlarmFolder(Path("alarms"), 10).make_room("alarm-20260101T000000000000Z-00000004", 4)


def read_verified(data: bytes) -> None:
    """The note beside an engine, that it was verified."""
    Path("engine.verified").write_bytes(data)
    _recorded(Path("engine.verified"))


def file_names(folder: Path) -> Sequence[bytes]:
    return [b"cat/1.png\ndog/2.jpg", b"a b/x.png\n.hidden/y.png\n-v/z.png"]


def read_folder(data: bytes) -> None:
    """A data set whose folders and files have hostile names; the names come into tables, messages and JSON."""
    root = b"set"
    for name in data.split(b"\n")[:6]:
        folder, _, file = name.replace(b"\0", b"")[:200].rpartition(b"/")
        parts = [part for part in folder.split(b"/") if part not in (b"", b".", b"..")][:3]
        place = os.path.join(root, *parts)
        try:
            os.makedirs(place, exist_ok=True)
            with open(os.path.join(place, (file or b"f")[:80] + b".png"), "wb") as opened:
                opened.write(SMALL)
        except OSError:
            continue
    dataset = open_dataset("set", "folder")
    found = list(dataset.samples(lambda name, reason: None))
    if dataset.restart is not None:
        dataset.restart.identity()
    for suffix in ("jsonl", "csv"):
        with row_writer(Path(f"rows.{suffix}"), force=True) as write:
            for sample in found:
                write(ScoreRow(f"set/{sample.name}", 0, "a", None, 0.0, 0.5, False, True))
    plain_text(str(dataset.classes))


SMALL = encoded(photo(2, 2), "PNG")

TARGETS = (
    Target("image", images, mutate_image, read_image, memory=900, seconds=20, quick=240),
    Target("npz", npz_files, mutate_zip(mutate_npy), read_npz, memory=300, seconds=20, quick=100),
    Target("class-names", class_names, mutate_json, read_names),
    Target("spool", spools, mutate_spool, read_spool),
    Target("alarms", alarms, mutate_json, read_alarm),
    Target("verified", alarms, mutate_json, read_verified),
    Target("file-names", file_names, mutate_bytes, read_folder, quick=40),
)
