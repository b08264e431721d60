"""Wheel and sdist of the last commit, and whether everything that belongs into them is there, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path

__all__ = ["Distributions", "build_distributions", "declared_extras", "wrong_contents"]

NEEDED = ("py.typed", "commit.txt", "cli.py", "runtime/selftest.onnx", "demo/run.py")
MOST_BYTES = 2_000_000  # of either: the built-in artifact is the only file that is not text


@dataclass(frozen=True)
class Distributions:
    """What would be published, the commit it was built from, and whether the work tree had other changes."""

    sdist: Path
    wheel: Path
    commit: str
    uncommitted: bool


def build_distributions(root: Path, out: Path) -> Distributions:
    """Build both from the files of the last commit, which is written into them; `out` is emptied first.

    The same commit gives the same wheel: times of files are the commit's. The sdist is packed by setuptools, which
    puts its own times into it.
    """
    commit, when = _git(root, "log", "-1", "--format=%H %ct").split()
    shutil.rmtree(out, ignore_errors=True)
    source = out / "source"
    source.mkdir(parents=True)
    packed = out / "source.tar"
    _git(root, "archive", "--output", str(packed), "HEAD")
    with tarfile.open(packed) as archive:
        archive.extractall(source, filter="data")
    packed.unlink()
    (source / "grood_edge" / "commit.txt").write_text(commit + "\n")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(source)],
        env={**os.environ, "SOURCE_DATE_EPOCH": when}, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shutil.rmtree(source)
    return Distributions(
        sdist=next(out.glob("*.tar.gz")),
        wheel=next(out.glob("*.whl")),
        commit=commit,
        uncommitted=bool(_git(root, "status", "--porcelain")),
    )


def wrong_contents(built: Distributions) -> list[str]:
    """Return what is missing, what does not belong there, and what is too large; empty when both are right."""
    with zipfile.ZipFile(built.wheel) as wheel:
        in_wheel = wheel.namelist()
    with tarfile.open(built.sdist) as sdist:
        in_sdist = [name.partition("/")[2] for name in sdist.getnames()]
    found = []
    for kind, names in (("wheel", in_wheel), ("sdist", in_sdist)):
        found += [f"{kind}: grood_edge/{name} is missing" for name in NEEDED if f"grood_edge/{name}" not in names]
        found += [f"{kind}: {name} does not belong there" for name in names if _foreign(name)]
    found += [f"sdist: {name} is missing" for name in ("LICENSE", "README.md", "CHANGELOG.md") if name not in in_sdist]
    for path in (built.wheel, built.sdist):
        size = path.stat().st_size
        found += [f"{path.name} has {size:,} bytes; expected at most {MOST_BYTES:,}"] if size > MOST_BYTES else []
    return found


def declared_extras(wheel: Path) -> list[str]:
    """Return the extras that the wheel's own metadata declares, in their order."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return BytesParser().parsebytes(archive.read(name)).get_all("Provides-Extra", [])


def _foreign(name: str) -> bool:
    top = name.partition("/")[0]
    return top in ("tests", "benchmarks", "docs", "release", "build") or name.endswith((".pyc", ".pkl"))


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True).stdout
