"""The oldest supported runtime: onnxruntime 1.18 with numpy 1.26, in an environment that `make test` makes."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from grood_edge.demo.images import DemoImages
from grood_edge.runtime import open_session
from grood_edge.runtime.score import ScoreRow, score_images

PYTHON = os.environ.get("GROOD_EDGE_MINIMAL_PYTHON", "")

pytestmark = pytest.mark.skipif(not PYTHON, reason="GROOD_EDGE_MINIMAL_PYTHON is not set; `make test` sets it")


def minimal(*arguments: str | Path) -> str:
    command = [PYTHON, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_versions_are_the_oldest_and_nothing_heavy_is_there() -> None:
    code = (
        "import numpy, onnxruntime, importlib.util as u; heavy = ('torch', 'onnx', 'sklearn');"
        "print(numpy.__version__, onnxruntime.__version__, *[m for m in heavy if u.find_spec(m)])"
    )
    assert minimal("-c", code).split() == ["1.26.4", "1.18.0"]


def test_verify_and_score_agree_with_the_current_runtime(
    artifact_path: Path, digits: DemoImages, tmp_path: Path
) -> None:
    report = json.loads(minimal("-m", "grood_edge", "verify", artifact_path, "--json"))
    assert report["passed"] is True
    out = tmp_path / "scores.jsonl"
    minimal("-m", "grood_edge", "score", artifact_path, digits.near, "--out", out, "--json")
    old = [json.loads(line) for line in out.read_text().splitlines()]
    rows: list[ScoreRow] = []
    with open_session(artifact_path) as session:
        score_images(session, [digits.near], rows.append)
    assert [row["class_id"] for row in old] == [row.class_id for row in rows]
    assert [row["is_ood"] for row in old] == [row.is_ood for row in rows]
    np.testing.assert_allclose([row["ood_score"] for row in old], [row.ood_score for row in rows], atol=1e-3)


def test_calibrate_runs_on_the_device(artifact_path: Path, digits: DemoImages, tmp_path: Path) -> None:
    for name, options in (("threshold.onnx", ["--threshold-only"]), ("refit.onnx", [])):
        path = tmp_path / name
        shutil.copy(artifact_path, path)
        minimal("-m", "grood_edge", "calibrate", path, "--data", digits.calibration, *options)
        with open_session(path) as session:
            assert session.contract.calibration.n == 314
            assert session.contract.calibration.provenance == "unseen"
