"""Images from files, folders, globs and .npz archives, as uint8 frames, one at a time. They are untrusted input."""

import contextlib
import glob
import io
import math
import os
import threading
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from grood_edge.arrays import Frame
from grood_edge.errors import DatasetError

__all__ = [
    "IMAGE_SUFFIXES",
    "NpzImages",
    "UnreadableImageError",
    "decode_image",
    "find_images",
    "large_images_in_turn",
    "load_image",
    "open_npz",
]

# Those that cannot be decoded here are listed too: an image is reported as unreadable, never skipped silently.
IMAGE_SUFFIXES = (
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".jp2",
    ".jpeg",
    ".jpg",
    ".jxl",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)
UNREADABLE_LIMIT = 0.01  # share of unreadable images above which a command fails, unless told otherwise
MAX_IMAGES = 50_000_000  # of an archive
MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs (an 8k frame has 33 million)
LARGE_PIXELS = 16 << 20  # images above this are decoded one at a time: up to 0.7 GB each, whatever their files' size
_STRIP_PIXELS = 4 << 20  # converted at a time
# Not every format that Pillow knows: some start other programs (EPS), whatever the file is called.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "La", "RGBa", "HSV", "LAB")


class UnreadableImageError(Exception):
    """One image that cannot be decoded; callers count and report it by name."""


def load_image(path: Path) -> Frame:
    """Decode one image to uint8 `[h, w, 3]` RGB, or `[h, w, 1]` when the file itself is grey.

    EXIF orientation is applied; alpha is dropped, as torchvision's and Keras's loaders do.

    Raises:
        UnreadableImageError: corrupt, animated, too large, or not 8 bits a channel.
    """
    return _opened(path, _FORMATS)


def decode_image(data: bytes) -> Frame:
    """Decode a JPEG or PNG in memory as `load_image` does a file, with the same limits and errors."""
    return _opened(io.BytesIO(data), ("JPEG", "PNG"))


class _Quiet:
    """No warnings while any thread decodes: the size is checked here, and the rest is the decoder's chatter.

    The filters are the process's. Threads that each set and restored them would undo one another's, and leave them
    changed for good: the first one in sets them, and the last one out restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._before.__exit__(None, None, None)


_quiet = _Quiet()
_large = threading.RLock()
_turn = threading.local()


@contextlib.contextmanager
def large_images_in_turn() -> Iterator[None]:
    """Let this thread keep its turn, once it decoded a large image in the block, until the block ends.

    So other threads decode theirs when this one has resized its own, and not while it holds the pixels.
    """
    with contextlib.ExitStack() as turn:
        _turn.kept = turn
        try:
            yield
        finally:
            del _turn.kept


def _opened(source: Path | io.BytesIO, formats: tuple[str, ...]) -> Frame:
    try:
        with _quiet, contextlib.ExitStack() as turn, Image.open(source, formats=formats) as image:
            if image.width * image.height > LARGE_PIXELS:
                getattr(_turn, "kept", turn).enter_context(_large)
            return _decoded(image)
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders raise anything on damaged files: struct.error, SyntaxError, KeyError
        raise UnreadableImageError(str(error) or type(error).__name__) from error


def _decoded(image: Image.Image) -> Frame:
    if (count := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":  # MPO: a phone's JPEG with a preview
        raise UnreadableImageError(f"animated: {count} frames")
    if image.width * image.height > MAX_PIXELS:
        raise UnreadableImageError(f"{image.width}x{image.height} pixels; at most {MAX_PIXELS:,} are decoded")
    if image.mode not in _EIGHT_BIT_MODES:
        raise UnreadableImageError(f"mode {image.mode} is not 8 bits a channel")
    ImageOps.exif_transpose(image, in_place=True)
    grey = image.mode in ("1", "L", "LA", "La")
    pixels = _pixels(image, "L" if grey else "RGB")
    return pixels[..., None] if grey else pixels


def _pixels(image: Image.Image, mode: str) -> np.ndarray:
    """Convert in strips: Pillow's copies of a whole large image are several times the result."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if rows >= image.height:
        return np.asarray(image.convert(mode), dtype=np.uint8)
    pixels = np.empty((image.height, image.width, *([3] if mode == "RGB" else [])), np.uint8)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        pixels[top : top + rows] = np.asarray(strip.convert(mode))
    return pixels


def find_images(source: str | Path) -> list[Path]:
    """List the image files of a file, a folder (searched recursively) or a glob pattern, sorted by path.

    Raises:
        DatasetError: nothing is there, or no image is in it.
    """
    if not str(source):  # Path("") is the current folder
        raise DatasetError("the source of images is empty; expected a file, a folder (. for this one) or a glob")
    path = Path(source)
    if os.path.isfile(path):  # unlike Path.is_file, False also for a pattern that is too long for a file name
        return [path]
    if os.path.isdir(path):
        files = [
            Path(folder) / name
            for folder, _, names in os.walk(path, onerror=_refuse_folder)
            for name in names
            if _is_image(name)
        ]
        found = "contains no image file"
    else:
        files = [Path(name) for name in glob.glob(str(source), recursive=True) if _is_image(name)]
        found = "does not exist and matches no image file"
    if not files:
        raise DatasetError(f"{source} {found}; expected images ending in {', '.join(IMAGE_SUFFIXES)}")
    return sorted(files)


def name_some(unreadable: Sequence[tuple[str, str]]) -> str:
    """Return the first five of (name, reason), for a message."""
    return "; ".join(f"{name} ({reason})" for name, reason in unreadable[:5])


@dataclass(frozen=True)
class NpzImages:
    """An .npz with `images` uint8 `[n, h, w]` or `[n, h, w, c]` and, optionally, integer `labels` `[n]`.

    Opened by reading headers only; the images are streamed, never held together.
    """

    path: Path
    shape: tuple[int, ...]
    labels: np.ndarray | None

    def __len__(self) -> int:
        """Return the number of images."""
        return self.shape[0]

    def frames(self) -> Iterator[Frame]:
        """Iterate over the images as uint8 `[h, w, c]`.

        Raises:
            DatasetError: the archive is damaged, or ends before its header says so.
        """
        h, w, c = (*self.shape[1:], 1)[:3]
        index = 0
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as file:
                _read_header(file)
                for index in range(len(self)):
                    raw = _read_exactly(file, h * w * c)
                    if len(raw) != h * w * c:
                        raise DatasetError(f"{self.path} is truncated at image {index} of {len(self)}")
                    yield np.frombuffer(raw, dtype=np.uint8).reshape(h, w, c)
        except DatasetError:
            raise
        except Exception as error:  # as in open_npz
            raise DatasetError(f"{self.path} is damaged at image {index} of {len(self)}: {error}") from error


def open_npz(path: Path) -> NpzImages:
    """Open an .npz archive of images without reading the images.

    Raises:
        DatasetError: not an .npz, no `images`, another dtype or shape, or pickled content.
    """
    expected = "expected images uint8 [n, h, w] or [n, h, w, c] (c 1 or 3) and, optionally, integer labels [n]"
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open("images.npy") as file:
                shape, fortran, dtype = _read_header(file)
            labels = None
            if "labels.npy" in archive.namelist():
                with archive.open("labels.npy") as file:
                    labels = _read_labels(file, shape[0] if shape else 0)
    except Exception as error:  # zipfile and numpy raise anything on damaged archives: zlib.error, TokenError, KeyError
        raise DatasetError(f"{path} cannot be read as .npz ({error}); {expected}") from error
    good_shape = len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))
    good_shape = good_shape and min(shape) >= 1 and shape[0] <= MAX_IMAGES and math.prod(shape[1:3]) <= MAX_PIXELS
    if dtype != np.uint8 or fortran or not good_shape:
        raise DatasetError(f"{path} holds images of dtype {dtype} and shape {list(shape)}; {expected}, C order")
    return NpzImages(path, shape, labels)


def _read_labels(file: object, count: int) -> np.ndarray:
    shape, _, dtype = _read_header(file)
    if shape != (count,) or dtype.kind not in "iu" or count > MAX_IMAGES:
        raise ValueError(f"labels of dtype {dtype} and shape {list(shape)} for {count} images")
    raw = _read_exactly(file, count * dtype.itemsize)
    if len(raw) != count * dtype.itemsize:
        raise ValueError(f"labels end after {len(raw)} of {count * dtype.itemsize} bytes")
    return np.frombuffer(raw, dtype=dtype).astype(np.int64)


def _read_header(file: object) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)  # type: ignore[arg-type]
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file, max_header_size=10_000)  # type: ignore[arg-type]
    else:
        header = np.lib.format.read_array_header_2_0(file, max_header_size=10_000)  # type: ignore[arg-type]
    shape, fortran, dtype = header
    return tuple(int(size) for size in shape), bool(fortran), dtype


def _read_exactly(file: object, count: int) -> bytes:
    data = bytearray()
    with contextlib.suppress(EOFError):
        while len(data) < count and (part := file.read(count - len(data))):  # type: ignore[attr-defined]
            data += part
    return bytes(data)


def _refuse_folder(error: OSError) -> None:
    raise DatasetError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not os.path.basename(name).startswith(".")
