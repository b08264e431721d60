"""Which part of a run goes where in the graph, from onnxruntime's own profile of its nodes (CPU only).

A node's part is told by its name: the head's nodes are `grood/...`, the preprocessing's `preprocess/...` and
`camera/...`; what onnxruntime fuses keeps the name of one of its nodes, and what it adds is counted as network.

Profiling slows a run down, by microseconds for each node: a head of many short nodes would seem several times as large
as it is. What it adds is taken off each node alike: as much as makes the sum what the run takes without a profile, and
at most what the shortest tenth of the nodes takes. What then is still too much or too little is shared in proportion.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.bench.loop import Clock
from grood_edge.camera_part import CAMERA
from grood_edge.errors import BackendError
from grood_edge.ort import open_ort
from grood_edge.outputs import OUTPUT_NAMES
from grood_edge.stored_head import GROUP, PREPROCESS

__all__ = ["Parts", "part_of", "parts_of", "profiled_parts"]

_RUNS, _LEAST, _WARM_UP = 30, 3, 2
_SECONDS = 2.0
_NODE = "_kernel_time"  # how the name of a node's event ends
_SHORTEST = 0.1  # share of the nodes


@dataclass(frozen=True)
class Parts:
    """Seconds of one run in each part of the graph."""

    preprocessing: float
    network: float
    head: float


def profiled_parts(model: bytes, frames: Frames, threads: int | None, graph: float, clock: Clock) -> Parts:
    """Run the model a few times with onnxruntime's profile on, and split the time of a run by it.

    Args:
        model: the artifact's.
        frames: uint8 `[n, h, w, c]` of its input.
        threads: as for `open_ort`.
        graph: seconds of a run without a profile.
        clock: seconds.

    Raises:
        BackendError: onnxruntime failed, or its profile names no node.
    """
    with TemporaryDirectory(prefix="grood-edge-") as folder:
        opened = open_ort(model, "cpu", threads, Path(folder) / "profile")
        ends = clock() + _SECONDS
        try:
            for number in range(_WARM_UP + _RUNS):
                if number >= _WARM_UP + _LEAST and clock() > ends:
                    break
                opened.run({"image": frames}, list(OUTPUT_NAMES))
        finally:
            path = opened.end_profiling()  # or onnxruntime would write it when the folder is gone
        return parts_of(json.loads(path.read_bytes()), graph)


def parts_of(events: Iterable[dict[str, Any]], graph: float) -> Parts:
    """Split `graph` seconds by the events of a profile: medians over its runs but the first two.

    Raises:
        BackendError: there are no such runs, or no nodes in them.
    """
    events = list(events)
    starts = np.sort([event["ts"] for event in events if event["name"] == "model_run"])
    nodes = [event for event in events if event["name"].endswith(_NODE)]
    runs = np.searchsorted(starts, [event["ts"] for event in nodes], side="right") - 1
    parts = np.array([part_of(event["name"]) for event in nodes], np.int64)
    durations = np.array([event["dur"] for event in nodes], np.float64)  # microseconds
    last = len(starts) - 1
    if not (runs == last).any() or last < _WARM_UP:
        raise BackendError("onnxruntime's profile has no time of nodes, so that the time of a run cannot be split")
    sums = np.zeros((len(starts), 3))
    np.add.at(sums, (runs[runs >= 0], parts[runs >= 0]), durations[runs >= 0])
    counts = np.bincount(parts[runs == last], minlength=3)
    spent = np.median(sums[_WARM_UP:], axis=0)
    added = (spent.sum() - 1e6 * graph) / counts.sum()
    shortest = float(np.quantile(durations[runs >= _WARM_UP], _SHORTEST))
    spent = np.maximum(0.0, spent - counts * min(max(added, 0.0), shortest))
    return Parts(*(float(value) for value in graph * spent / max(spent.sum(), np.finfo(float).tiny)))


def part_of(node: str) -> int:
    """Return the part that a node belongs to by its name: 0 preprocessing, 1 network, 2 head."""
    name = node.removeprefix("fused ")
    return 2 if name.startswith(GROUP) else 0 if name.startswith((PREPROCESS, CAMERA)) else 1
