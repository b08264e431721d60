"""Folders of this user: where grood-edge keeps its key, and what it can make again."""

import os
import stat
from pathlib import Path

from grood_edge.errors import BackendError

__all__ = ["WRITABLE_BY_OTHERS", "cache_folder", "user_folder"]

WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def user_folder(variable: str, otherwise: str) -> Path:
    """Return the folder `grood-edge` in the one that a variable of the XDG standard names, else below the home folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    named = os.environ.get(variable, "")
    base = Path(named) if os.path.isabs(named) else Path.home() / otherwise  # as the standard says
    return base / "grood-edge"


def cache_folder(name: str) -> Path:
    """Return `$XDG_CACHE_HOME/grood-edge/NAME`, made with mode 0700 if need be.

    Raises:
        BackendError: it cannot be made, is another user's, or others can write it: engines are native code.
    """
    try:
        folder = user_folder("XDG_CACHE_HOME", ".cache") / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except (OSError, RuntimeError) as error:
        raise BackendError(
            f"the cache folder cannot be made ({error}); name another with the environment variable XDG_CACHE_HOME"
        ) from error
    if os.name == "posix" and (status.st_uid != os.getuid() or status.st_mode & WRITABLE_BY_OTHERS):
        raise BackendError(
            f"others own or can write {folder} (mode {stat.S_IMODE(status.st_mode):04o}), and engines are native code; "
            "close it with chmod 700, or name another with the environment variable XDG_CACHE_HOME"
        )
    return folder
