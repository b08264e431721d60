"""The log line by line: killed, on a full disk, beside an existing file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from grood_edge.errors import OutputError, UsageError
from grood_edge.telemetry.jsonl import open_json_lines
from grood_edge.telemetry.record import RECORD_SCHEMA
from grood_edge.telemetry.sink import Sink
from tests.telemetry.conftest import small_disk, verdict_of, write_all

ROOT = Path(__file__).parent.parent.parent


def lines_of(path: Path) -> list[dict[str, object]]:
    """Read a log; every line is whole, the last one too."""
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def test_one_valid_line_a_frame_readable_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    log = open_json_lines(path, force=False)
    assert isinstance(log, Sink)
    assert not path.exists()  # nothing before the first frame
    for index in range(3):
        log.write(verdict_of(index))
        assert [line["index"] for line in lines_of(path)] == list(range(index + 1))
    log.close()
    log.close()
    for line in lines_of(path):
        jsonschema.validate(line, RECORD_SCHEMA)


def test_no_frame_no_file(tmp_path: Path) -> None:
    open_json_lines(tmp_path / "out.jsonl", force=False).close()
    assert os.listdir(tmp_path) == []


def test_existing_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("old\n")
    with pytest.raises(OutputError, match="exists and was left as it is; use --force"):
        open_json_lines(path, force=False)
    log = open_json_lines(path, force=True)
    assert path.read_text() == "old\n"
    log.write(verdict_of(0))
    log.close()
    assert [line["index"] for line in lines_of(path)] == [0]


def test_file_that_appears_meanwhile_is_untouched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    log = open_json_lines(path, force=False)
    path.write_text("theirs\n")
    with pytest.raises(OutputError, match="File exists"):
        log.write(verdict_of(0))
    log.close()
    assert path.read_text() == "theirs\n"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("out.txt", UsageError, r"ends in \.txt; expected \.jsonl"),
        ("missing/out.jsonl", OutputError, "does not exist; create it first"),
    ],
)
def test_refused_before_the_loop(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        open_json_lines(tmp_path / name, force=False)
    assert os.listdir(tmp_path) == []


def test_full_disk_keeps_whole_lines(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        log = open_json_lines(disk / "out.jsonl", force=False)
        with pytest.raises(OutputError, match="the disk is full; the lines before it are whole"):
            write_all(log, (verdict_of(index) for index in range(100_000)))
        log.close()
        lines = lines_of(disk / "out.jsonl")
        assert [line["index"] for line in lines] == list(range(len(lines)))
        assert os.path.getsize(disk / "out.jsonl") > 2**20 - 4096


def test_limit_on_file_size_keeps_whole_lines(tmp_path: Path) -> None:
    import resource

    log = open_json_lines(tmp_path / "out.jsonl", force=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OutputError, match="File too large; the lines before it are whole"):
            write_all(log, (verdict_of(index) for index in range(100)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.close()
    assert 15 < len(lines_of(tmp_path / "out.jsonl")) < 30


WRITER = """
import sys
from pathlib import Path
from grood_edge.telemetry.jsonl import open_json_lines
from tests.telemetry.conftest import verdict_of
log = open_json_lines(Path(sys.argv[1]), force=False)
for index in range(1_000_000):
    log.write(verdict_of(index))
    if index == 500:
        print("going", flush=True)
"""


def test_kill_in_the_middle_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == b"going\n"
        writer.send_signal(signal.SIGKILL)
        assert writer.wait(timeout=30) == -signal.SIGKILL
    *whole, last = path.read_bytes().split(b"\n")
    assert last == b"" or len(path.read_bytes()) % 4096 == 0  # the kernel stops at most between two pages
    assert [json.loads(line)["index"] for line in whole] == list(range(len(whole)))
    assert len(whole) > 500
