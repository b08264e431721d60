"""Which packages have a part in the numbers: another release may decode, resize or multiply differently."""

import contextlib
from importlib import metadata

from grood_edge import __version__

__all__ = ["numeric_versions"]


def numeric_versions() -> dict[str, str]:
    """Return the versions of what features depend on, by package."""
    versions = {"grood-edge": __version__}
    for name in ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
