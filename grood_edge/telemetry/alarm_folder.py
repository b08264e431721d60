"""The folder of saved alarms: what is in it, and the oldest alarms removed when it would grow too large.

`DIR/alarm-TIME-INDEX/INDEX.jpg` and `.json`. Only what this program wrote is counted or removed: files of that name in
folders of that name, with a document beside the picture that states the picture's size, and the temporary files of
writes that were killed.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from grood_edge.errors import OutputError

__all__ = ["AlarmFolder", "alarm_name"]

_ALARM = re.compile(r"alarm-\d{8}T\d{12}Z-\d{8,}")
_DOCUMENT = re.compile(r"\d{8,}\.json")
_TEMPORARY = re.compile(r"\.\d{8,}\.(jpg|json)\.\w{8}\.(jpg|json)")  # as `published` names them
_MOST_TEXT = 2**16  # bytes of a document that is read back


def alarm_name(time: str, index: int) -> str:
    """Return the folder of an alarm: by name, they are in order of time. `time` ISO 8601, UTC, with microseconds."""
    return f"alarm-{re.sub('[-:.]', '', time)}-{index:08d}"


class AlarmFolder:
    """Knows what each alarm takes on disk; `disk_bytes` bounds their sum."""

    def __init__(self, path: Path, disk_bytes: int) -> None:
        self.path = path
        self._most = disk_bytes
        self._sizes: dict[str, int] = {}
        try:
            for name in sorted(entry.name for entry in os.scandir(path) if _ALARM.fullmatch(entry.name)):
                self._sizes[name] = sum(size for _, size in _files(path / name))
        except FileNotFoundError:  # it is made with the first alarm
            pass
        except OSError as error:
            raise OutputError(f"cannot read the folder {path}: {error.strerror}; name another one") from error

    def make_room(self, alarm: str, more: int) -> Path:
        """Return the folder of `alarm`, after the oldest others made room for `more` bytes.

        Raises:
            OutputError: `alarm` alone is larger than all that may be used, or others cannot be removed.
        """
        while sum(self._sizes.values()) + more > self._most:
            oldest = next((name for name in sorted(self._sizes) if name != alarm), None)
            if oldest is None:
                raise OutputError(
                    f"the frames of one alarm do not fit in the {self._most / 2**20:.0f} MiB that {self.path} may "
                    "take; allow more"
                )
            self._remove(oldest)
        return self.path / alarm

    def count(self, alarm: str, size: int) -> None:
        """Note that `size` bytes of `alarm` were written."""
        self._sizes[alarm] = self._sizes.get(alarm, 0) + size

    def _remove(self, alarm: str) -> None:
        folder = self.path / alarm
        try:
            for file, _ in _files(folder):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot remove the oldest alarm {folder}: {error.strerror}; remove it, or name another folder"
            ) from error
        with contextlib.suppress(OSError):  # somebody keeps files of their own in it: they stay
            folder.rmdir()
        del self._sizes[alarm]


def _files(folder: Path) -> list[tuple[Path, int]]:
    """List the files in an alarm's folder that were written here, with their sizes; none behind a link."""
    if folder.is_symlink():
        return []
    found: list[tuple[Path, int]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in os.scandir(folder):
            if not entry.is_file(follow_symlinks=False):
                continue
            path, size = Path(entry.path), entry.stat(follow_symlinks=False).st_size
            if _DOCUMENT.fullmatch(entry.name):
                found += _pair(path, size)
            elif _TEMPORARY.fullmatch(entry.name):
                found.append((path, size))
    return found


def _pair(document: Path, size: int) -> list[tuple[Path, int]]:
    if size > _MOST_TEXT:
        return []
    try:
        stated = json.loads(document.read_bytes())["picture_bytes"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    picture = document.with_suffix(".jpg")
    whole = picture.is_file() and not picture.is_symlink() and picture.stat().st_size == stated
    return [(document, size), *([(picture, stated)] if whole else [])]
