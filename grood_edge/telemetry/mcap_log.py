"""`--mcap out.mcap`: the same documents as a JSON channel that Foxglove plots."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from grood_edge.errors import MissingExtraError
from grood_edge.publishing import write_error
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.telemetry.disk import check_growing, create, require_room
from grood_edge.telemetry.record import RECORD_SCHEMA, json_bytes, record_of, wall_time

__all__ = ["TOPIC", "McapLog", "open_mcap"]

TOPIC = "/grood_edge/verdict"
# Uncompressed bytes that a kill -9 can lose; each chunk also leaves an entry for the index in memory until the end.
CHUNK = 2**18


def open_mcap(path: Path, force: bool) -> "McapLog":
    """Check that the log can be written; it is created at the first frame.

    Raises:
        MissingExtraError: the package mcap is not installed.
        UsageError: the path does not end in `.mcap`.
        OutputError: the folder is missing or not writable, or the file exists without `force`.
    """
    check_growing(path, (".mcap",), force)
    try:
        import mcap.writer
    except ImportError as error:
        raise MissingExtraError("mcap", "bag", "Writing .mcap") from error
    return McapLog(path, force, mcap.writer)


class McapLog:
    """Log time is the wall clock at capture, publish time the end of the decision, sequence the frame's index."""

    def __init__(self, path: Path, force: bool, module: Any) -> None:
        self.path = path
        self._force = force
        self._module = module
        self._file: Any = None
        self._writer: Any = None
        self._channel = 0
        self._broken = False

    def write(self, verdict: StreamVerdict) -> None:
        """Add one message.

        Raises:
            OutputError: the disk is nearly full, and the file can still be finished; or it cannot be written.
        """
        captured = wall_time(verdict.frame.captured)
        data = json_bytes(record_of(verdict))
        require_room(self.path)
        try:
            if self._writer is None:
                self._start()
            self._writer.add_message(
                channel_id=self._channel,
                log_time=_nanoseconds(captured),
                publish_time=_nanoseconds(captured + verdict.age),
                sequence=verdict.frame.index % 2**32,
                data=data,
            )
            self._file.flush()
        except OSError as error:
            self._broken = True  # a chunk was cut: what follows it would not be found
            raise write_error(self.path, error, "it has no index; `mcap recover` keeps what was written") from error

    def close(self) -> None:
        """Write the last chunk, the index and the footer.

        Raises:
            OutputError: they cannot be written.
        """
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            if not self._broken:
                self._writer.finish()
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.path, error, "it has no index; `mcap recover` keeps what was written") from error
        finally:
            with contextlib.suppress(OSError):  # what could not be flushed cannot be flushed now either
                file.close()

    def _start(self) -> None:
        self._file = os.fdopen(create(self.path, self._force), "wb")
        self._writer = self._module.Writer(self._file, chunk_size=CHUNK)
        self._writer.start(profile="", library="grood-edge")
        schema = self._writer.register_schema(
            name=RECORD_SCHEMA["title"], encoding="jsonschema", data=json.dumps(RECORD_SCHEMA).encode()
        )
        self._channel = self._writer.register_channel(topic=TOPIC, message_encoding="json", schema_id=schema)


def _nanoseconds(seconds: float) -> int:
    return max(0, round(seconds * 1e9))
