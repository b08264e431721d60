"""Write a result all or nothing: to a temporary file beside its target, checked there, then renamed."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from grood_edge.errors import OutputError

__all__ = ["check_output", "publish", "published", "write_error", "write_through"]


def check_output(path: Path, force: bool) -> None:
    """Find out before the work whether the result can be written.

    Raises:
        OutputError: the folder is missing or not writable, the path is a folder, or exists without `force`.
    """
    try:
        folder = path.resolve().parent
        if path.is_dir():
            raise OutputError(f"{path} is a folder; expected the path of a file to write, such as {path}/model.onnx")
        if not folder.is_dir():
            raise OutputError(f"the folder {folder} does not exist; create it first")
        if not os.access(folder, os.W_OK):
            raise OutputError(f"the folder {folder} is not writable; choose another output path")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is a device or pipe; expected the path of a file to write")
        if path.exists() and not force:
            raise OutputError(f"{path} exists and was left as it is; use --force to replace it")
    except (OSError, RuntimeError) as error:  # a folder that must not be entered, a long name, links in a circle
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}; choose another output path") from error


def publish(data: bytes, path: Path, force: bool, check: Callable[[Path], None] = lambda _: None) -> None:
    """Write to a temporary file, check that file, then rename it: all or nothing.

    `check` gets the temporary file's path and raises when the file must not be published.

    Raises:
        OutputError: the file cannot be written, or `path` exists and `force` is not set.
    """
    with published(path, force) as temporary:
        write_through(temporary, data)
        check(temporary)


def write_error(path: Path, error: OSError, rest: str) -> OutputError:
    """Return the error that says why a file cannot be written, and what became of it."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
    return OutputError(f"cannot write {path}: {reason}; {rest}")


def write_through(path: Path, data: bytes) -> None:
    """Write a file, and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def published(path: Path, force: bool, mode: int = 0o666) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; rename it when the block ends well, remove it when it does not.

    `mode`: who may do what with the file at most; the umask takes away from it.

    Raises:
        OutputError: the file cannot be written, or `path` exists and `force` is not set.
    """
    check_output(path, force)
    target = path.resolve()
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        temporary = Path(name)
        os.close(handle)
        yield temporary
        temporary.chmod(mode & ~_umask())
        if force:
            temporary.replace(target)
        else:
            _move_without_replacing(temporary, target)
    except OSError as error:
        raise write_error(path, error, "nothing was changed") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _move_without_replacing(temporary: Path, target: Path) -> None:
    try:
        os.link(temporary, target)  # unlike a rename, a link never replaces a file that appeared meanwhile
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or target.exists():
            raise
        os.rename(temporary, target)  # the file system has no links (FAT on a memory card)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
