"""Decoding of real files written with Pillow: orientation, modes, damage; and .npz archives, streamed."""

import io
import os
import random
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

from grood_edge.errors import DatasetError
from grood_edge.images import UnreadableImageError, find_images, load_image, open_npz

FOLDER = Path(skimage.__file__).parent / "data"


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A real photo, 90x60, without symmetry."""
    return Image.open(FOLDER / "coffee.png").convert("RGB").resize((90, 60))


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


class TestLoad:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
    def test_lossless_formats(self, tmp_path: Path, photo: Image.Image, suffix: str) -> None:
        frame = load_image(save(photo, tmp_path / f"a.{suffix}"))
        assert frame.dtype == np.uint8
        np.testing.assert_array_equal(frame, np.asarray(photo))

    @pytest.mark.parametrize("suffix", ["jpg", "webp"])
    def test_lossy_formats(self, tmp_path: Path, photo: Image.Image, suffix: str) -> None:
        frame = load_image(save(photo, tmp_path / f"a.{suffix}", quality=95))
        assert frame.shape == (60, 90, 3)
        assert np.abs(frame.astype(int) - np.asarray(photo)).mean() < 6

    def test_photos_as_they_come(self) -> None:
        assert load_image(FOLDER / "chelsea.png").shape == (300, 451, 3)
        assert load_image(FOLDER / "coins.png").shape == (303, 384, 1)
        assert load_image(FOLDER / "rocket.jpg").shape == (427, 640, 3)

    @pytest.mark.parametrize(
        ("orientation", "upright"),
        [
            (1, lambda a: a),
            (2, lambda a: a[:, ::-1]),
            (3, lambda a: a[::-1, ::-1]),
            (4, lambda a: a[::-1]),
            (5, lambda a: a.transpose(1, 0, 2)),
            (6, lambda a: np.rot90(a, -1)),
            (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
            (8, lambda a: np.rot90(a, 1)),
        ],
    )
    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
    def test_exif_orientation(
        self,
        tmp_path: Path,
        photo: Image.Image,
        orientation: int,
        upright: Callable[[np.ndarray], np.ndarray],
        suffix: str,
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = save(
            photo, tmp_path / f"a.{suffix}", exif=exif, **({"quality": 100} if suffix in ("jpg", "webp") else {})
        )
        expected = upright(np.asarray(photo))
        frame = load_image(path)
        assert frame.shape == expected.shape
        assert np.abs(frame.astype(int) - expected).mean() < 6

    @pytest.mark.parametrize("mode", ["L", "1", "LA"])
    def test_grey(self, tmp_path: Path, photo: Image.Image, mode: str) -> None:
        image = photo.convert("L").convert(mode)
        frame = load_image(save(image, tmp_path / "a.png"))
        np.testing.assert_array_equal(frame, np.asarray(image.convert("L"))[..., None])

    def test_alpha_is_dropped_not_blended(self, tmp_path: Path, photo: Image.Image) -> None:
        image = photo.copy()
        image.putalpha(Image.linear_gradient("L").resize(photo.size))
        np.testing.assert_array_equal(load_image(save(image, tmp_path / "a.png")), np.asarray(photo))

    @pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))], ids=["plain", "one colour", "table"])
    def test_palette(self, tmp_path: Path, photo: Image.Image, transparency: int | bytes | None) -> None:
        """With a table of transparencies Pillow warns: not on the user's terminal (in tests warnings are errors)."""
        image = photo.quantize(256)
        extra = {} if transparency is None else {"transparency": transparency}
        frame = load_image(save(image, tmp_path / "a.png", **extra))
        np.testing.assert_array_equal(frame, np.asarray(image.convert("RGB")))

    def test_cmyk(self, tmp_path: Path, photo: Image.Image) -> None:
        assert load_image(save(photo.convert("CMYK"), tmp_path / "a.jpg")).shape == (60, 90, 3)

    def test_phone_photo_with_a_preview_in_the_same_jpeg(self, tmp_path: Path, photo: Image.Image) -> None:
        """MPO: two pictures in one .jpg, as phones write it. The first one is the photo; nothing is animated."""
        path = tmp_path / "a.jpg"
        photo.save(path, format="MPO", save_all=True, append_images=[photo.resize((45, 30))], quality=95)
        with Image.open(path) as image:
            assert getattr(image, "n_frames", 1) == 2
        assert load_image(path).shape == (60, 90, 3)

    @pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
    def test_16_bit_is_refused(self, tmp_path: Path, suffix: str) -> None:
        deep = Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30))
        with pytest.raises(UnreadableImageError, match=r"mode I.* is not 8 bits a channel"):
            load_image(save(deep, tmp_path / f"a.{suffix}"))

    def test_float_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnreadableImageError, match="mode F is not 8 bits"):
            load_image(save(Image.fromarray(np.zeros((4, 4), np.float32)), tmp_path / "a.tif"))

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
    def test_animated(self, tmp_path: Path, photo: Image.Image, suffix: str) -> None:
        others = [photo.rotate(90 * i) for i in (1, 2)]
        path = save(photo, tmp_path / f"a.{suffix}", save_all=True, append_images=others)
        with pytest.raises(UnreadableImageError, match="animated: 3 frames"):
            load_image(path)
        still = save(photo, tmp_path / "still.gif")
        assert load_image(still).shape == (60, 90, 3)

    @pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif", "ppm", "gif", "webp"])
    def test_truncated(self, tmp_path: Path, photo: Image.Image, suffix: str) -> None:
        path = save(photo, tmp_path / f"a.{suffix}")
        content = path.read_bytes()
        for share in (0.0, 0.01, 0.3, 0.8):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(UnreadableImageError) as error:
                load_image(path)
            assert str(error.value)

    def test_no_image(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_text("<html>404</html>")
        with pytest.raises(UnreadableImageError, match="cannot identify"):
            load_image(tmp_path / "a.png")
        with pytest.raises(UnreadableImageError, match="No such file"):
            load_image(tmp_path / "b.png")
        with pytest.raises(UnreadableImageError):
            load_image(tmp_path)

    @pytest.mark.parametrize("seed", range(2))
    def test_random_damage_is_reported_never_raised_otherwise(
        self, tmp_path: Path, photo: Image.Image, seed: int
    ) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x0132] = "2020:01:01 00:00:00"
        small = photo.resize((24, 16))
        contents = []
        for name, options in [
            ("png", {"exif": exif}), ("jpeg", {"exif": exif}), ("webp", {"exif": exif}), ("gif", {}), ("bmp", {}),
            ("tiff", {"exif": exif}), ("ppm", {}),
        ]:  # fmt: skip
            buffer = io.BytesIO()
            small.save(buffer, name, **options)
            contents.append(buffer.getvalue())
        rng, path, refused = random.Random(seed), tmp_path / "a.img", 0
        for _ in range(500):
            damaged = bytearray(rng.choice(contents))
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(min(len(damaged), rng.choice([60, 300])))] = rng.choice(
                    [0, 255, rng.randrange(256)]
                )
            path.write_bytes(damaged)
            try:
                frame = load_image(path)
                assert frame.dtype == np.uint8
            except UnreadableImageError:
                refused += 1
        assert refused > 100

    @pytest.mark.parametrize("mode", ["RGB", "P", "L", "LA", "1", "CMYK"])
    def test_large_images_are_converted_in_strips(
        self, tmp_path: Path, photo: Image.Image, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = save(photo.convert(mode), tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
        whole = load_image(path)
        monkeypatch.setattr("grood_edge.images._STRIP_PIXELS", 90 * 7)  # 60 rows: the last strip has four
        np.testing.assert_array_equal(load_image(path), whole)

    @pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
    def test_decompression_bomb(self, tmp_path: Path, side: int) -> None:
        """A file of a few KB that says it has billions of pixels: refused by its header, before memory is taken."""
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 10_000)), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with pytest.raises(UnreadableImageError, match="pixels"):
            load_image(tmp_path / "a.png")


class TestFind:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("b/2.png", "a/1.JPG", "a/x/3.webp", "c.bmp", "a/notes.txt", "a/.hidden.png", "b/._2.png"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    def test_file(self, folder: Path) -> None:
        assert find_images(folder / "c.bmp") == [folder / "c.bmp"]
        assert find_images(str(folder / "a" / "notes.txt")) == [folder / "a" / "notes.txt"]  # named: the user wants it

    def test_folder_is_searched_recursively_and_sorted(self, folder: Path) -> None:
        expected = ["a/1.JPG", "a/x/3.webp", "b/2.png", "c.bmp"]
        assert find_images(folder) == [folder / name for name in expected]
        assert find_images(str(folder)) == find_images(folder)

    def test_glob(self, folder: Path) -> None:
        assert find_images(f"{folder}/*/*") == [folder / "a/1.JPG", folder / "b/2.png"]
        assert find_images(f"{folder}/**/*.webp") == [folder / "a/x/3.webp"]

    def test_folder_whose_name_looks_like_a_pattern(self, tmp_path: Path) -> None:
        (tmp_path / "run[1]").mkdir()
        (tmp_path / "run[1]" / "a.png").touch()
        assert find_images(tmp_path / "run[1]") == [tmp_path / "run[1]" / "a.png"]

    def test_links_to_files(self, folder: Path) -> None:
        (folder / "d").mkdir()
        (folder / "d" / "link.png").symlink_to(folder / "b" / "2.png")
        assert find_images(folder / "d") == [folder / "d" / "link.png"]

    def test_nothing(self, folder: Path) -> None:
        with pytest.raises(
            DatasetError, match=r"none does not exist and matches no image file; expected images ending"
        ):
            find_images(folder / "none")
        with pytest.raises(DatasetError, match="matches no image file"):
            find_images(f"{folder}/*.gif")
        with pytest.raises(DatasetError, match="matches no image file"):
            find_images("x" * 5000)
        (folder / "empty").mkdir()
        with pytest.raises(DatasetError, match=r"contains no image file; expected images ending in \.avif, \.bmp"):
            find_images(folder / "empty")


@pytest.fixture(scope="module")
def stack() -> np.ndarray:
    """Seven crops of a real photo, uint8 [7, 20, 30, 3]."""
    photo = np.asarray(Image.open(FOLDER / "chelsea.png").convert("RGB"))
    return np.stack([photo[20 * i : 20 * i + 20, 40 * i : 40 * i + 30] for i in range(7)])


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """Return an .npy; with `shape`, one whose header claims another shape."""
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": shape or array.shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + array.tobytes()


def write_zip(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


class TestNpz:
    @pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
    @pytest.mark.parametrize("kind", [np.int64, np.uint8, np.int32, ">i8"])
    def test_images_and_labels(self, tmp_path: Path, stack: np.ndarray, writer: Any, kind: Any) -> None:
        labels = np.array([0, 1, 2, 0, 1, 2, 0]).astype(kind)
        writer(tmp_path / "a.npz", images=stack, labels=labels)
        archive = open_npz(tmp_path / "a.npz")
        assert len(archive) == 7
        assert archive.shape == (7, 20, 30, 3)
        assert archive.labels is not None
        assert archive.labels.dtype == np.int64
        np.testing.assert_array_equal(archive.labels, labels)
        np.testing.assert_array_equal(np.stack(list(archive.frames())), stack)
        np.testing.assert_array_equal(np.stack(list(archive.frames())), stack)  # and a second time

    @pytest.mark.parametrize("axes", [np.s_[..., 0], np.s_[..., :1]])
    def test_grey_without_labels(self, tmp_path: Path, stack: np.ndarray, axes: Any) -> None:
        np.savez(tmp_path / "a.npz", images=np.ascontiguousarray(stack[axes]))
        archive = open_npz(tmp_path / "a.npz")
        assert archive.labels is None
        np.testing.assert_array_equal(np.stack(list(archive.frames())), stack[..., :1])

    def test_images_are_streamed(self, tmp_path: Path) -> None:
        big = np.zeros((400, 200, 300, 3), np.uint8)
        np.savez_compressed(tmp_path / "a.npz", images=big)
        tracemalloc.start()
        try:
            count = sum(1 for _ in open_npz(tmp_path / "a.npz").frames())
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert count == 400
        assert peak < big.nbytes / 20

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            (np.zeros((2, 4, 4, 3), np.float32), r"dtype float32 and shape \[2, 4, 4, 3\]"),
            (np.zeros((2, 4, 4, 3), np.int8), "dtype int8"),
            (np.zeros((2, 4, 4, 4), np.uint8), r"shape \[2, 4, 4, 4\]"),
            (np.zeros((2, 3, 4, 4), np.uint8), r"shape \[2, 3, 4, 4\]"),
            (np.zeros((4, 4), np.uint8), r"shape \[4, 4\]"),
            (np.zeros((), np.uint8), r"shape \[\]"),
            (np.zeros((0, 4, 4), np.uint8), r"shape \[0, 4, 4\]"),
            (np.asfortranarray(np.zeros((2, 4, 5, 3), np.uint8)), "C order"),
            (np.array([b"gadget", None], object), "dtype object"),
        ],
    )
    def test_wrong_images(self, tmp_path: Path, images: np.ndarray, message: str) -> None:
        np.savez(tmp_path / "a.npz", images=images)
        with pytest.raises(DatasetError, match=message) as error:
            open_npz(tmp_path / "a.npz")
        assert "expected images uint8 [n, h, w]" in str(error.value)

    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            (np.zeros(6, np.int64), r"labels of dtype int64 and shape \[6\] for 7 images"),
            (np.zeros((7, 1), np.int64), r"shape \[7, 1\]"),
            (np.zeros(7), "labels of dtype float64"),
            (np.array(["a"] * 7), "labels of dtype <U1"),
            (np.array([None] * 7, object), "labels of dtype object"),
        ],
    )
    def test_wrong_labels(self, tmp_path: Path, stack: np.ndarray, labels: np.ndarray, message: str) -> None:
        np.savez(tmp_path / "a.npz", images=stack, labels=labels)
        with pytest.raises(DatasetError, match=message):
            open_npz(tmp_path / "a.npz")

    def test_pickles_are_never_loaded(self, tmp_path: Path, stack: np.ndarray) -> None:
        marker = tmp_path / "executed"

        class Attack:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        for name in ("images", "labels"):
            arrays = {"images": stack} | {name: np.array([Attack()] * 7, object)}
            np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type]
            with pytest.raises(DatasetError, match="object"):
                open_npz(tmp_path / f"{name}.npz")
        assert not marker.exists()

    def test_labels_that_end_early(self, tmp_path: Path, stack: np.ndarray) -> None:
        write_zip(tmp_path / "a.npz", images=npy(stack), labels=npy(np.zeros(3, np.int64), (7,)))
        with pytest.raises(DatasetError, match="labels end after 24 of 56 bytes"):
            open_npz(tmp_path / "a.npz")

    def test_images_that_end_early(self, tmp_path: Path, stack: np.ndarray) -> None:
        archive = open_npz(write_zip(tmp_path / "a.npz", images=npy(stack[:5], stack.shape)))
        frames = archive.frames()
        for index in range(5):
            np.testing.assert_array_equal(next(frames), stack[index])
        with pytest.raises(DatasetError, match="truncated at image 5 of 7"):
            next(frames)

    @pytest.mark.parametrize(
        "shape", [(-7, 20, 30, 3), (7, -20, 30, 3), (1, 2**33, 2**33, 1), (1, 2**32, 2**32, 1), (2**63, 2, 2, 1)]
    )
    def test_impossible_shapes(self, tmp_path: Path, stack: np.ndarray, shape: tuple[int, ...]) -> None:
        with pytest.raises(DatasetError, match="and shape"):
            open_npz(write_zip(tmp_path / "a.npz", images=npy(stack, shape)))

    @pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
    def test_truncated_archive(self, tmp_path: Path, stack: np.ndarray, writer: Any) -> None:
        path = tmp_path / "a.npz"
        writer(path, images=stack, labels=np.zeros(7, np.int64))
        content = path.read_bytes()
        for share in (0, 0.1, 0.5, 0.99):
            path.write_bytes(content[: int(share * len(content))])
            with pytest.raises(DatasetError, match=r"cannot be read as \.npz"):
                open_npz(path)

    @pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
    def test_damaged_archive(self, tmp_path: Path, stack: np.ndarray, writer: Any) -> None:
        """In the picture data: a wrong check sum, or a stream that cannot be inflated."""
        path = tmp_path / "a.npz"
        writer(path, images=stack)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DatasetError, match=r"damaged at image|truncated at image"):
            list(open_npz(path).frames())

    @pytest.mark.parametrize("at", range(0, 70, 7))
    def test_damaged_header(self, tmp_path: Path, stack: np.ndarray, at: int) -> None:
        content = bytearray(npy(stack))
        content[at : at + 2] = b"([" if at % 2 else b"\x00\xff"
        path = write_zip(tmp_path / "a.npz", images=bytes(content))
        with pytest.raises(DatasetError):
            list(open_npz(path).frames())

    def test_not_an_archive(self, tmp_path: Path, stack: np.ndarray) -> None:
        np.save(tmp_path / "a.npy", stack)
        for path in (tmp_path / "a.npy", tmp_path / "none.npz", tmp_path):
            with pytest.raises(DatasetError, match=r"cannot be read as \.npz"):
                open_npz(path)

    def test_other_names(self, tmp_path: Path, stack: np.ndarray) -> None:
        np.savez(tmp_path / "a.npz", stack)
        with pytest.raises(DatasetError, match=r"no item named 'images\.npy'.*expected images uint8"):
            open_npz(tmp_path / "a.npz")


def test_a_format_that_starts_other_programs_is_not_decoded_whatever_its_name(tmp_path: Path) -> None:
    """Pillow hands EPS to Ghostscript."""
    path = tmp_path / "photo.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"
    with pytest.raises(UnreadableImageError, match="cannot identify"):
        load_image(path)
