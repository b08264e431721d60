"""`grood-edge --version`: which build this is, and which versions it runs with."""

import platform
import re
from importlib import metadata
from pathlib import Path

from grood_edge import __version__

__all__ = ["version_lines"]

COMMIT = Path(__file__).with_name("commit.txt")  # in wheels of `make release-check`; a clone has none
_NOT_SHOWN = ("dev", "docs")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*(?:;.*extra == .(?P<extra>[\w-]+))?")


def version_lines() -> list[str]:
    """Return version and commit, Python and system, then the packages of each extra that is whole here."""
    build = f", commit {COMMIT.read_text().strip()}" if COMMIT.is_file() else ""
    lines = [
        f"grood-edge {__version__}{build}",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    ]
    packages: dict[str, list[str]] = {}
    for requirement in _requirements():
        found = _REQUIREMENT.match(requirement)
        if found and found["name"] != "grood-edge" and found["extra"] not in _NOT_SHOWN:
            packages.setdefault(found["extra"] or "always", []).append(found["name"])
    for extra, names in packages.items():
        versions = [f"{name} {_version(name)}" for name in names if _version(name)]
        if len(versions) == len(names):
            lines.append(f"{extra}: {', '.join(versions)}")
    return lines


def _requirements() -> list[str]:
    try:
        return metadata.requires("grood-edge") or []
    except metadata.PackageNotFoundError:  # run from a folder that is not installed
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
