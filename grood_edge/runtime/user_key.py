"""The user's own key: what this user's compile signed, this user's sessions load. Engines are native code."""

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from grood_edge.errors import BackendError
from grood_edge.user_folders import user_folder

__all__ = ["key_path", "open_no_link", "signature", "user_key"]

_KEY_BYTES = 32


def key_path() -> Path:
    """Return where the key is kept: `engine.key` in `$XDG_DATA_HOME/grood-edge`, else `~/.local/share/grood-edge`.

    Raises:
        BackendError: the user has no home folder.
    """
    try:
        return user_folder("XDG_DATA_HOME", ".local/share") / "engine.key"
    except RuntimeError as error:
        raise BackendError(f"no folder for the engine key ({error}); set XDG_DATA_HOME to one of your own") from error


def user_key(create: bool) -> bytes | None:
    """Read the key, 32 bytes; where there is none, make one with `create`, else return None.

    Raises:
        BackendError: others could have read or written the key, or it cannot be read or made.
    """
    path = key_path()
    try:
        if create and not os.path.lexists(path):
            _make(path)
        opened = open_no_link(path)
    except FileNotFoundError:
        return None
    except OSError as problem:
        raise BackendError(
            f"the engine key {path} cannot be used ({problem.strerror}); make its folder yours and writable, or set "
            "XDG_DATA_HOME to one that is"
        ) from problem
    with opened as file:
        _require_private(path, os.fstat(file.fileno()))
        key = file.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise BackendError(
            f"the engine key {path} has not {_KEY_BYTES} bytes: it was damaged. Delete it and build the engines again"
        )
    return key


def signature(document: bytes, key: bytes) -> str:
    """Return the HMAC-SHA256 (hex) of a document."""
    return hmac.new(key, document, hashlib.sha256).hexdigest()


def open_no_link(path: Path) -> BinaryIO:
    """Open a file for reading, neither through a symbolic link nor waiting for a pipe.

    Raises:
        OSError: it is not there, is a link, or may not be read.
    """
    extra = os.O_NOFOLLOW | os.O_NONBLOCK if os.name == "posix" else 0
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | extra))


def _require_private(path: Path, status: os.stat_result) -> None:
    remedy = "Delete it and build the engines again with grood-edge compile"
    if not stat.S_ISREG(status.st_mode):
        raise BackendError(f"the engine key {path} is no regular file. {remedy}")
    if os.name != "posix":  # Windows: a profile's folders are the user's own, and modes say nothing
        return
    if status.st_uid != os.geteuid():
        raise BackendError(f"the engine key {path} belongs to another user (uid {status.st_uid}). {remedy}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise BackendError(
            f"the engine key {path} has mode {stat.S_IMODE(status.st_mode):04o}: others could read it and sign engines "
            f"with it; expected 0600. {remedy}"
        )


def _make(path: Path) -> None:
    """Write a new key beside its place and link it there: whoever is first wins, and nobody reads half a key."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
