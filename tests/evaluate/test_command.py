"""`grood-edge evaluate` as a person meets it: exit codes, sentences, --json, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from grood_edge.cli import app
from grood_edge.images import find_images


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200"})


def test_tables_verdict_report_and_next_command(artifact_path: Path, few: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    result = run(
        artifact_path, "--id", few / "test", "--ood", f"near={few / 'near'}", "--ood", f"photos={few / 'far-photos'}",
        "--baselines", "--report", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in ("False alarms", "share of OOD accepted when 95 % of ID is accepted", "GROOD (this artifact)",
                  "left out: KNN", "Next: grood-edge score"):  # fmt: skip
        assert words in result.output
    page = report.read_text(encoding="utf-8")
    assert "gradient bank" in page, "what was chosen, and why"
    assert "grood-edge evaluate" in page
    again = run(artifact_path, "--id", few / "test", "--ood", f"near={few / 'near'}", "--report", report)
    assert again.exit_code == 1
    assert "--force" in again.output
    assert report.read_text(encoding="utf-8") == page


def test_json_is_one_document_and_alpha_decides(artifact_path: Path, few: Path) -> None:
    found = [
        json.loads(run(artifact_path, "--id", few / "test", "--ood", f"n={few / 'near'}", "--json", *more).stdout)
        for more in ([], ["--alpha", "0.3"])
    ]
    assert found[0]["alpha"] == 0.05
    assert found[0]["ood"][0]["found"] < found[1]["ood"][0]["found"]
    assert found[0]["ood"][0]["auroc"] == found[1]["ood"][0]["auroc"]
    assert found[0]["id"]["images"] == len(find_images(few / "test"))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "--ood near="),
        (["--ood", "near"], 2, "expected NAME=DIR"),
        (["--ood", "a={few}/near", "--ood", "a={few}/near"], 2, "names 'a' twice"),
        (["--ood", "a={few}/near", "--fit", "x"], 2, "add --baselines"),
        (["--ood", "a={few}/near", "--report", "r.pdf"], 2, "ending in .html"),
        (["--ood", "a={few}/near", "--report", "{tmp}/no/r.html"], 1, "create it first"),
        (["--ood", "a={tmp}/nowhere"], 1, "is no folder"),
        (["--ood", "a={tmp}"], 1, "contains no image file"),
        (["--ood", "a={tmp}/one"], 1, "has 1 image; at least 2"),
        (["--ood", "a={few}/near", "--alpha", "0.0001"], 1, "calibration images cannot carry"),
        (["--ood", "a={few}/near", "--provider", "cuda"], 1, "cuda"),
    ],
)
def test_mistakes_are_answered_in_a_sentence(
    arguments: list[str], code: int, words: str, artifact_path: Path, few: Path, tmp_path: Path
) -> None:
    if "one" in str(arguments):
        (tmp_path / "one").mkdir()
        shutil.copy(find_images(few / "near")[0], tmp_path / "one")
    filled = [argument.format(few=few, tmp=tmp_path) for argument in arguments]
    result = run(artifact_path, "--id", few / "test", *filled)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_model_that_is_no_artifact(few: Path, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    result = run(tmp_path / "x.onnx", "--id", few / "test", "--ood", f"n={few / 'near'}")
    assert result.exit_code == 1
    assert "Traceback" not in result.output


def test_ctrl_c_leaves_nothing(artifact_path: Path, few: Path, tmp_path: Path) -> None:
    """The fitted images never end, so the evaluation is certainly at work when the signal comes."""
    out, marker = tmp_path / "out" / "r.html", tmp_path / "marker"
    out.parent.mkdir()
    (tmp_path / "endless.py").write_text(
        "import itertools, pathlib, numpy as np\n"
        "def batches():\n"
        "    for i in itertools.count():\n"
        "        yield np.full((8, 32, 32, 1), i % 256, np.uint8), np.arange(8) % 7\n"
        f"        pathlib.Path({str(marker)!r}).touch()\n"
    )
    command = [sys.executable, "-m", "grood_edge", "evaluate", str(artifact_path), "--id", str(few / "test")]
    command += ["--ood", f"near={few / 'near'}", "--baselines", "--fit", "endless:batches", "--report", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not marker.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.strip().endswith("interrupted; nothing was written")
    assert list(out.parent.iterdir()) == []
