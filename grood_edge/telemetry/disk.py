"""Files that grow while the stream runs: created at the first frame, and stopped before the disk is full."""

import os
import shutil
from pathlib import Path

from grood_edge.errors import OutputError, UsageError
from grood_edge.publishing import check_output, write_error

__all__ = ["KEPT", "RESERVE", "check_growing", "create", "require_room"]

KEPT = "what was written before is kept"
RESERVE = 32 * 2**20  # bytes left free: an index or a footer still has to be written at the end


def check_growing(path: Path, suffixes: tuple[str, ...], force: bool) -> None:
    """Find out before the loop whether the file can be written.

    Raises:
        UsageError: another suffix.
        OutputError: the folder is missing or not writable, or the file exists without `force`.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path} ends in {path.suffix or 'nothing'}; expected {' or '.join(suffixes)}")
    check_output(path, force)


def create(path: Path, force: bool) -> int:
    """Create the file, or empty it with `force`; return its descriptor, open for appending.

    Raises:
        OutputError: it cannot be created, or exists without `force`.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if force else os.O_EXCL)
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise write_error(path, error, KEPT) from error


def require_room(path: Path, more: int = 0) -> None:
    """Stop while the file can still be finished.

    Raises:
        OutputError: fewer than `RESERVE` + `more` bytes are free where `path` is.
    """
    free, least = shutil.disk_usage(path.parent).free, RESERVE + more
    if free < least:
        raise OutputError(
            f"the disk of {path} is nearly full: {free / 2**20:.0f} MiB are free, and {least / 2**20:.0f} MiB "
            "must stay so that the file can be finished; it was ended here. Make room, or write to another disk"
        )
