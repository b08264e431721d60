"""The .mcap log, read back by the mcap package's own reader."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from grood_edge.errors import MissingExtraError, OutputError, UsageError
from grood_edge.telemetry import disk
from grood_edge.telemetry.mcap_log import TOPIC, open_mcap
from grood_edge.telemetry.record import RECORD_SCHEMA, wall_time
from tests.telemetry.conftest import small_disk, verdict_of, write_all

reader = pytest.importorskip("mcap.reader", reason="mcap (extra bag) is not installed")


def messages_of(path: Path) -> list[tuple[Any, Any, Any]]:
    """Read an indexed file: schema, channel and message of each; the index is used, and its checksums hold."""
    with path.open("rb") as file:
        found = reader.make_reader(file, validate_crcs=True)
        summary = found.get_summary()
        assert summary is not None
        messages = list(found.iter_messages())
        assert summary.statistics.message_count == len(messages)
        assert len(summary.chunk_indexes) == summary.statistics.chunk_count
    return messages


def test_messages_and_schema(tmp_path: Path) -> None:
    path = tmp_path / "out.mcap"
    log = open_mcap(path, force=False)
    assert not path.exists()
    verdicts = [verdict_of(index, captured=1000.0 + index / 25) for index in range(5)]
    expected = [wall_time(verdict.frame.captured) for verdict in verdicts]
    for verdict in verdicts:
        log.write(verdict)
    log.close()
    log.close()
    messages = messages_of(path)
    assert [message.sequence for _, _, message in messages] == list(range(5))
    for (schema, channel, message), when in zip(messages, expected, strict=True):
        assert (channel.topic, channel.message_encoding) == (TOPIC, "json")
        assert (schema.encoding, json.loads(schema.data)) == ("jsonschema", RECORD_SCHEMA)
        jsonschema.validate(json.loads(message.data), json.loads(schema.data))
        assert abs(message.log_time / 1e9 - when) < 0.01
        assert message.publish_time - message.log_time == pytest.approx(0.031 * 1e9, abs=1e3)


def test_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grood_edge.telemetry.mcap_log.CHUNK", 4096)
    log = open_mcap(tmp_path / "out.mcap", force=False)
    for index in range(200):
        log.write(verdict_of(index))
    log.close()
    assert [json.loads(message.data)["index"] for _, _, message in messages_of(tmp_path / "out.mcap")] == [*range(200)]


def test_nearly_full_disk_ends_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE", 2**19)
    monkeypatch.setattr("grood_edge.telemetry.mcap_log.CHUNK", 4096)
    with small_disk(tmp_path / "disk", 1) as small:
        path = small / "out.mcap"
        log = open_mcap(path, force=False)
        with pytest.raises(OutputError, match="is nearly full"):
            write_all(log, (verdict_of(index, name=os.urandom(200).hex()) for index in range(100_000)))
        log.close()
        assert len(messages_of(path)) > 500


def test_disk_that_is_full_at_once_says_so_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RESERVE", 0)  # as if somebody else filled it
    monkeypatch.setattr("grood_edge.telemetry.mcap_log.CHUNK", 4096)
    with small_disk(tmp_path / "disk", 1) as small:
        path = small / "out.mcap"
        log = open_mcap(path, force=False)
        with pytest.raises(OutputError, match="the disk is full; it has no index; `mcap recover`"):
            write_all(log, (verdict_of(index, name=os.urandom(200).hex()) for index in range(100_000)))
        log.close()
        with path.open("rb") as file:
            found = list(readable_chunks(file))
        assert len(found) > 500


def readable_chunks(file: Any) -> list[Any]:
    """Read what is whole, as `mcap recover` does."""
    from mcap.records import Message
    from mcap.stream_reader import StreamReader

    messages: list[Any] = []
    records = StreamReader(file).records
    while True:
        try:
            record = next(records)
        except Exception:  # where the file was cut, the reader raises whatever it meets
            return messages
        if isinstance(record, Message):
            messages.append(record)


def test_killed_writer_leaves_whole_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on disk without `close`, as after kill -9."""
    monkeypatch.setattr("grood_edge.telemetry.mcap_log.CHUNK", 4096)
    log = open_mcap(tmp_path / "out.mcap", force=False)
    for index in range(100):
        log.write(verdict_of(index))
    with (tmp_path / "out.mcap").open("rb") as file:
        assert 80 <= len(readable_chunks(file)) <= 100
    log.close()


def test_refused_before_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old.mcap").write_bytes(b"old")
    with pytest.raises(OutputError, match="use --force"):
        open_mcap(tmp_path / "old.mcap", force=False)
    with pytest.raises(UsageError, match=r"expected \.mcap"):
        open_mcap(tmp_path / "out.bag", force=False)
    monkeypatch.setitem(__import__("sys").modules, "mcap.writer", None)
    with pytest.raises(MissingExtraError, match=r"grood-edge\[bag\]"):
        open_mcap(tmp_path / "out.mcap", force=False)
