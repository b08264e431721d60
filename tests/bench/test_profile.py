"""The split of a run by onnxruntime's profile: parts by names, what profiling adds taken off, real graphs."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.bench.profile import Parts, part_of, parts_of, profiled_parts
from grood_edge.errors import BackendError
from grood_edge.ort import OrtModel
from grood_edge.runtime.selftest import MODEL


def seconds(found: Parts) -> tuple[float, float, float]:
    return found.preprocessing, found.network, found.head


def events(durations: dict[str, int], runs: int = 4) -> list[dict[str, Any]]:
    """A profile with the same nodes in each run."""
    found: list[dict[str, Any]] = [{"cat": "Session", "name": "session_initialization", "ts": 1, "dur": 9}]
    for run in range(runs):
        found.append({"cat": "Session", "name": "model_run", "ts": 1000 * (run + 1), "dur": 900})
        for index, (name, duration) in enumerate(durations.items()):
            at = 1000 * (run + 1) + 1 + index
            found.append({"cat": "Node", "name": f"{name}_kernel_time", "ts": at, "dur": duration})
    return found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("preprocess/cast_0_kernel_time", 0),
        ("camera/prepared_kernel_time", 0),
        ("classifier/preprocess/cast_kernel_time", 1),
        ("fused classifier/linear_kernel_time", 1),
        ("ReorderOutput_token_11_kernel_time", 1),
        ("classifier/grood/x_kernel_time", 1),
        ("grood/h_dot_b_kernel_time", 2),
        ("fused grood/h_kernel_time", 2),
    ],
)
def test_the_name_tells_the_part(name: str, part: int) -> None:
    assert part_of(name) == part


def test_a_profile_that_adds_nothing_is_taken_as_it_is() -> None:
    found = parts_of(events({"preprocess/a": 10, "classifier/b": 70, "grood/c": 20}), 100e-6)
    assert seconds(found) == pytest.approx((10e-6, 70e-6, 20e-6), abs=1e-12)


def test_what_profiling_adds_is_taken_off_each_node() -> None:
    nodes = {"preprocess/a": 13, "classifier/b": 83} | {f"grood/{i}": 3 + i % 2 for i in range(20)}
    found = parts_of(events(nodes), (10 + 80 + 10) * 1e-6)  # 3 microseconds were added to each
    assert seconds(found) == pytest.approx((10e-6, 80e-6, 10e-6), abs=1e-12)


def test_no_more_is_taken_off_than_short_nodes_have() -> None:
    nodes = {"classifier/a": 150, "classifier/b": 150} | {f"grood/{i}": 5 for i in range(8)}
    found = parts_of(events(nodes), 145e-6)  # the network ran at half its speed while it was profiled
    assert seconds(found) == pytest.approx((0.0, 145e-6, 0.0), abs=1e-12)
    assert sum(seconds(found)) == pytest.approx(145e-6)


@pytest.mark.parametrize("found", [[], events({}), events({"grood/a": 1}, runs=2)])
def test_a_profile_without_nodes_or_runs_is_refused(found: list[dict[str, Any]]) -> None:
    with pytest.raises(BackendError, match="no time of nodes"):
        parts_of(found, 1.0)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return read_artifact(MODEL)


def test_an_interrupted_profile_leaves_nothing(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: Any) -> None:
        assert len(list(tmp_path.glob("grood-edge-*/profile*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(OrtModel, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        profiled_parts(artifact.model, np.zeros((1, 32, 32, 1), np.uint8), 1, 1e-3, time.perf_counter)
    assert list(tmp_path.glob("grood-edge-*")) == []


def test_a_real_artifact(artifact: Artifact) -> None:
    frames = np.zeros((2, 32, 32, 1), np.uint8)
    found = profiled_parts(artifact.model, frames, 1, 1e-3, time.perf_counter)
    assert found.network > 0
    assert found.head > 0
    assert sum(seconds(found)) == pytest.approx(1e-3)
