"""Which image files are compared: one folder of ID images and named folders of OOD images."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grood_edge.arrays import Labels
from grood_edge.errors import DatasetError, UsageError
from grood_edge.images import find_images
from grood_edge.progress import Progress, silent

__all__ = ["FolderSet", "id_set", "ood_set", "overlaps", "parse_ood", "require_every_class"]

LEAST_IMAGES = 2
MAX_NAME = 40


@dataclass(frozen=True)
class FolderSet:
    """The images of one set: paths sorted, `labels` int64 `[n]` by folder name, None where nothing names classes."""

    name: str
    folder: Path
    paths: tuple[Path, ...]
    labels: Labels | None


def parse_ood(texts: Sequence[str]) -> tuple[tuple[str, Path], ...]:
    """Read `NAME=DIR` texts of the command line.

    Raises:
        UsageError: no text, no name, no folder, or a name twice.
    """
    example = "expected NAME=DIR, such as --ood near=photos/other-products"
    if not texts:
        raise UsageError(f"no --ood was given, and without OOD images nothing is told apart; {example}")
    pairs: list[tuple[str, Path]] = []
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or not name.strip() or not folder.strip():
            raise UsageError(f"--ood {text!r}; {example}")
        if len(name) > MAX_NAME or not name.isprintable():
            raise UsageError(f"--ood {text!r}: the name has {len(name)} characters; at most {MAX_NAME}, all printable")
        if name.strip() in (known for known, _ in pairs):
            raise UsageError(f"--ood names {name.strip()!r} twice; give each folder its own name: {example}")
        pairs.append((name.strip(), Path(folder)))
    return tuple(pairs)


def id_set(folder: Path, classes: tuple[str, ...]) -> tuple[FolderSet, tuple[str, ...]]:
    """List the ID images: class folders named like the artifact's classes, or a flat folder without labels.

    Returns the set and warnings.

    Raises:
        DatasetError: no folder, fewer than two images, or a folder that is no class.
    """
    if not os.path.isdir(folder):  # False for a name that is too long
        raise DatasetError(f"--id {folder} is no folder; expected class folders of ID images the network has not seen")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    paths = find_images(folder)
    _require_images("--id", folder, len(paths))
    if not names:
        return FolderSet("ID", folder, tuple(paths), None), ()
    if unknown := [name for name in names if name not in classes]:
        raise DatasetError(
            f"--id {folder} has folders {unknown[:5]} that are none of the artifact's {len(classes)} classes "
            f"({', '.join(classes[:8])}{', ...' if len(classes) > 8 else ''}). Rename or move them; images of other "
            "things belong to an --ood set"
        )
    order = {name: index for index, name in enumerate(classes)}
    kept = [path for path in paths if path.parent != folder]
    _require_images("--id", folder, len(kept))
    labels = np.array([order[path.relative_to(folder).parts[0]] for path in kept], np.int64)
    loose = len(paths) - len(kept)
    warnings = (f"{loose} images lie directly in {folder}, in no class folder, and were left out",) if loose else ()
    return FolderSet("ID", folder, tuple(kept), labels), warnings


def ood_set(name: str, folder: Path) -> FolderSet:
    """List the images of an OOD folder, recursively.

    Raises:
        DatasetError: no folder, or fewer than two images.
    """
    if not os.path.isdir(folder):  # False for a name that is too long
        raise DatasetError(f"--ood {name}={folder}: {folder} is no folder; expected a folder of images of other things")
    paths = find_images(folder)
    _require_images(f"--ood {name}", folder, len(paths))
    return FolderSet(name, folder, tuple(paths), None)


def require_every_class(known: FolderSet, classes: tuple[str, ...], unknown: tuple[str, ...]) -> None:
    """Check that class folders have images of every class that the artifact models; `unknown` are those it does not.

    Raises:
        DatasetError: a class has no image: the false-alarm rate would not speak for it, and nobody would see that.
    """
    if known.labels is None:
        return
    missing = [name for index, name in enumerate(classes) if name not in unknown and not (known.labels == index).any()]
    if missing:
        raise DatasetError(
            f"--id {known.folder} has no image of {len(missing)} of {len(classes)} classes ({', '.join(missing[:8])}"
            f"{', ...' if len(missing) > 8 else ''}); the figures would not speak for these. Add images of them, or "
            "give one flat folder of images, without classes: figures by class are then left out"
        )


def overlaps(sets: Sequence[FolderSet], progress: Progress = silent) -> tuple[str, ...]:
    """Find image files that two sets share, byte for byte; one sentence for each pair of sets, with names."""
    owners: dict[bytes, tuple[int, Path]] = {}
    shared: dict[tuple[int, int], list[str]] = {}
    total, done = sum(len(one.paths) for one in sets), 0
    for index, one in enumerate(sets):
        for path in one.paths:
            first, original = owners.setdefault(_digest(path), (index, path))
            if first != index:
                shared.setdefault((first, index), []).append(f"{path} = {original}")
            done += 1
            progress("comparing files", done, total)
    return tuple(
        f'{len(names)} images of "{sets[b].name}" are also in "{sets[a].name}" ({"; ".join(names[:5])}'
        f"{'; ...' if len(names) > 5 else ''}): one of the two is wrong about them. Remove them and evaluate again"
        for (a, b), names in shared.items()
    )


def _digest(path: Path) -> bytes:
    """BLAKE2b of the bytes; of the path where the file cannot be read: it is reported as unreadable later."""
    try:
        with path.open("rb") as file:
            digest = hashlib.blake2b(digest_size=16)
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.digest()
    except OSError:
        return str(path).encode()


def _require_images(option: str, folder: Path, count: int) -> None:
    if count < LEAST_IMAGES:
        raise DatasetError(
            f"{option}: {folder} has {count} image{'' if count == 1 else 's'}; at least {LEAST_IMAGES} are needed for "
            "a rate and its interval, and some hundred for one that means something"
        )
