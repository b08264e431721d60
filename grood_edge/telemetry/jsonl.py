"""`--log out.jsonl`: one line a frame, each on disk's way before the next frame is looked at."""

import contextlib
import os
from pathlib import Path

from grood_edge.publishing import write_error
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.disk import KEPT, check_growing, create
from grood_edge.telemetry.record import json_bytes, record_of

__all__ = ["JsonLinesLog", "open_json_lines"]


def open_json_lines(path: Path, force: bool) -> "JsonLinesLog":
    """Check that the log can be written; it is created at the first frame.

    Raises:
        UsageError: the path does not end in `.jsonl`.
        OutputError: the folder is missing or not writable, or the file exists without `force`.
    """
    check_growing(path, (".jsonl",), force)
    return JsonLinesLog(path, force)


class JsonLinesLog:
    """Hands every line to the kernel in one call, so that a killed process leaves whole lines."""

    def __init__(self, path: Path, force: bool) -> None:
        self.path = path
        self._force = force
        self._file: int | None = None

    def write(self, verdict: StreamVerdict) -> None:
        """Append one line.

        Raises:
            OutputError: the disk is full, or the file cannot be written; the file ends with its last whole line.
        """
        line = json_bytes(record_of(verdict)) + b"\n"
        if self._file is None:
            self._file = create(self.path, self._force)
        end = os.lseek(self._file, 0, os.SEEK_END)
        try:
            while line:  # the second call says why the first took only a part
                line = line[os.write(self._file, line) :]
        except BaseException as error:  # also an interrupt: no half line stays
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, end)
            if isinstance(error, OSError):
                raise write_error(self.path, error, "the lines before it are whole") from error
            raise

    def close(self) -> None:
        """Wait until the disk has the file.

        Raises:
            OutputError: the disk does not take it.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            os.fsync(file)
        except OSError as error:
            raise write_error(self.path, error, KEPT) from error
        finally:
            os.close(file)
