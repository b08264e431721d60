"""A short pass, the same in every run; `python -m tests.fuzz` is the long one (SECURITY.md).

Over every target but `.pt2`, whose seed alone takes torch seconds: that one is in the long run only.
"""

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.__main__ import run_target
from tests.fuzz.guard import ROOT, Target, execute, mutated
from tests.fuzz.targets import TARGETS
from tests.without_hook import without_hook


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", [target for target in TARGETS if target.quick], ids=lambda target: target.name)
def test_changed_files_are_read_or_refused(target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    seeds, random = target.seeds(tmp_path), Random(1)
    monkeypatch.chdir(tmp_path / "work")
    for index in range(target.quick):
        data = seeds[index] if index < len(seeds) else mutated(target, seeds, random)
        with without_hook():
            assert execute(target, data, tmp_path) is None, data


def contained(run: Callable[[str], object], argument: str) -> None:
    with contextlib.suppress(OSError):
        run(argument)


def fork(_: bytes) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["weights", "npz", "video", "mcap"])
def test_seeds_and_changes_are_the_same_in_every_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = next(target for target in TARGETS if target.name == name)

    def some() -> list[bytes]:
        seeds, random = target.seeds(tmp_path), Random(3)
        return [*seeds, *(mutated(target, seeds, random) for _ in range(8))]

    first = some()
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(1e9))
    assert some() == first


def test_a_target_whose_process_ends_is_reported_once(tmp_path: Path) -> None:
    ends = Target("ends", lambda _: [b"x"], lambda _, data: data, lambda _: os._exit(0))
    count, findings, over = run_target(ends, 600, 0, tmp_path)
    assert (count, list(findings), over) == (1, ["the process ended with exit code 0"], False)


def test_the_guard_sees_what_it_is_there_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outside = tmp_path.parent / f"{tmp_path.name}-outside"

    def found(run: object) -> str | None:
        return execute(Target("x", lambda _: [], lambda _, data: data, run, 50, 1.0), b"", tmp_path)  # type: ignore[arg-type]

    assert found(lambda _: Path("inside").write_bytes(b"x")) is None
    assert found(lambda data: data[0]) == "IndexError from test_fuzz.py:<lambda>"
    assert "writes" in str(found(lambda _: outside.write_bytes(b"x")))
    assert "os.remove" in str(found(lambda _: outside.unlink()))
    assert "reads /etc/passwd" in str(found(lambda _: Path("/etc/passwd").read_bytes()))
    assert "reads" in str(found(lambda _: (ROOT / "pyproject.toml").read_bytes()))
    assert "reads /home" in str(found(lambda _: os.listdir("/home")))
    assert "reads /tmp" in str(found(lambda _: os.scandir("/tmp").close()))
    assert "os.utime" in str(found(lambda _: os.utime(ROOT)))
    assert "/no/such.so" in str(found(lambda _: contained(ctypes.CDLL, "/no/such.so")))
    assert "os.fork" in str(found(fork))
    assert "socket.getaddrinfo" in str(found(lambda _: socket.getaddrinfo("127.0.0.1", 9)))
    for name in ("bind", "connect"):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            assert f"socket.{name}" in str(found(lambda _, one=one, name=name: getattr(one, name)(("127.0.0.1", 0))))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        assert "socket.sendto" in str(found(lambda _: one.sendto(b"", ("127.0.0.1", 9))))
    assert "too much memory" in str(found(lambda _: bytearray(200 << 20)))
    assert found(lambda _: [None for _ in iter(int, 1)]) is not None  # never ends, and takes memory on the way
