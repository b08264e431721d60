"""Rerun: the genuine SDK writes a file, which its own reader reads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from grood_edge.errors import MissingExtraError, OutputError, UsageError
from grood_edge.telemetry.rerun_log import open_rerun
from tests.telemetry.conftest import Camera, verdict_of


def test_refused_before_the_loop(tmp_path: Path) -> None:
    (tmp_path / "old.rrd").write_bytes(b"old")
    with pytest.raises(OutputError, match="use --force"):
        open_rerun(str(tmp_path / "old.rrd"), False, Camera())
    for target in ("", "out.txt", "http://host:9876", "view"):
        with pytest.raises(UsageError, match=r"expected spawn, a file NAME\.rrd, or rerun\+http"):
            open_rerun(target, False, Camera())


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rerun", None)
    with pytest.raises(MissingExtraError, match=r"grood-edge\[rerun\]"):
        open_rerun(str(tmp_path / "out.rrd"), False, Camera())
    assert list(tmp_path.iterdir()) == []


def test_file(tmp_path: Path, video: list[np.ndarray]) -> None:
    pytest.importorskip("rerun", reason="rerun-sdk (extra rerun) is not installed")
    path = tmp_path / "out.rrd"
    log = open_rerun(str(path), False, Camera())
    for index in range(6):
        log.write(verdict_of(index, video[index], "UNKNOWN" if index >= 3 else "KNOWN", score=5.0 + index))
    log.write(verdict_of(6, None, "NO-VIEW", "INVALID"))
    log.close()
    log.close()
    command = [sys.executable, "-m", "rerun", "rrd"]
    verified = subprocess.run([*command, "verify", path], capture_output=True, text=True, timeout=60, check=False)
    assert verified.returncode == 0, verified.stderr
    printed = subprocess.run([*command, "print", "-v", path], capture_output=True, text=True, timeout=60, check=True)
    for entity in ("/camera", "/ood_score", "/p_value", "/age", "/latency", "/state"):
        assert entity in printed.stdout, printed.stdout
