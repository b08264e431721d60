"""`grood-edge --version`: which build this is, and which versions it runs with."""

import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from grood_edge import __version__

__all__ = ["version_lines"]

COMMIT = Path(__file__).with_name("commit.txt")  # in wheels of `make release-check`; a clone has none
CLONE = Path(__file__).parent.parent
_NOT_SHOWN = ("dev", "docs")
_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)[^;]*(?:;.*extra == .(?P<extra>[\w-]+))?")


def version_lines() -> list[str]:
    """Return version and commit, Python and system, then what is installed of each extra and what it lacks.

    A package that several extras name is listed with the first.
    """
    commit = _commit()
    lines = [
        f"grood-edge {__version__}{f', commit {commit}' if commit else ''}",
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    ]
    packages: dict[str, list[str]] = {}
    listed: set[str] = set()
    for requirement in _requirements():
        found = _REQUIREMENT.match(requirement)
        if found and found["extra"] not in _NOT_SHOWN and found["name"] not in {"grood-edge", *listed}:
            packages.setdefault(found["extra"] or "always", []).append(found["name"])
            listed.add(found["name"])
    for extra, names in packages.items():
        versions = {name: _version(name) for name in names}
        if any(versions.values()):
            shown = [f"{name} {version}" if version else f"{name} missing" for name, version in versions.items()]
            lines.append(f"{extra}: {', '.join(shown)}")
    return lines


def _commit() -> str:
    """Return the commit of this build or clone; "-dirty" behind it says that files differ from it."""
    try:
        if COMMIT.is_file():
            return COMMIT.read_text().strip()
        if not (CLONE / ".git").exists():
            return ""
        command = ["git", "--no-optional-locks", "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty"]
        done = subprocess.run(  # noqa: S603 - fixed words
            command, cwd=CLONE, capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):  # no git, or one that does not answer
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _requirements() -> list[str]:
    try:
        return metadata.requires("grood-edge") or []
    except metadata.PackageNotFoundError:  # run from a folder that is not installed
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""
