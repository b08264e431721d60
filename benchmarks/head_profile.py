"""Where the head's time goes within a run of the artifact, by onnxruntime's profile of its nodes; for head_cost.py.

Two of the head's nodes multiply a matrix: the bank and the class prototypes. All others are small: starting one costs
about as much as computing it. The profile adds 1 to 2.5 us to each node, so that their sum is more than what was
measured without it.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grood_edge.bench.profile import part_of
from grood_edge.ort import open_ort

SESSIONS, RUNS, WARM_UP = 3, 40, 5  # opened anew; runs of each that count; runs before those
HEAD = 2  # of `part_of`
PRODUCTS = {"grood/h_dot_b": "bank", "grood/class_sq_of_h": "class prototypes"}
OTHERS = "other nodes"
GROUPS = (*PRODUCTS.values(), OTHERS)


@dataclass(frozen=True)
class Profile:
    """A head's nodes, and microseconds of a run in each of GROUPS.

    allowed_us: what the target allows over the network. added_us: what was measured over it, without a profile.
    """

    head: str
    target: float
    allowed_us: float
    added_us: float
    group_us: Mapping[str, float]
    other_nodes: int


def group_times(model: bytes, image: np.ndarray, quick: bool = False) -> tuple[dict[str, float], int]:
    """Return the median microseconds of each group of the head's nodes, and the number of nodes in OTHERS.

    Raises:
        ValueError: the head has not one node of each product; they have other names by now.
    """
    sessions = [_node_times(model, image, WARM_UP + (2 if quick else RUNS)) for _ in range(1 if quick else SESSIONS)]
    names = [PRODUCTS.get(name, OTHERS) for name in sessions[0]]
    if any(names.count(product) != 1 for product in PRODUCTS.values()):
        raise ValueError(f"expected one node of each of {', '.join(PRODUCTS)} in the head, found {', '.join(names)}")
    medians = {}
    for group in GROUPS:
        of_group = [name for name in sessions[0] if PRODUCTS.get(name, OTHERS) == group]
        runs = [np.sum([times[name] for name in of_group], axis=0)[WARM_UP:] for times in sessions]
        medians[group] = float(np.median([np.median(one) for one in runs]))
    return medians, names.count(OTHERS)


def _node_times(model: bytes, image: np.ndarray, runs: int) -> dict[str, list[int]]:
    """Return the microseconds of each node of the head in each run of a session of its own."""
    with tempfile.TemporaryDirectory() as folder:
        opened = open_ort(model, threads=1, profile=Path(folder) / "profile")
        for _ in range(runs):
            opened.run({"image": image})
        events = json.loads(opened.end_profiling().read_text())
    times: dict[str, list[int]] = {}
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if name != event["name"] and part_of(name) == HEAD:
            times.setdefault(name, []).append(event["dur"])
    return times


def table_text(profiles: Sequence[Profile]) -> str:
    """Return the profiles as a markdown table."""
    rows = [
        "| head | target | allowed, us | added, us | bank's product, us | class prototypes', us | other nodes |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for one in profiles:
        bank, classes, others = (one.group_us[group] for group in GROUPS)
        small = f"{one.other_nodes}: {others:.0f} us, {others / one.other_nodes:.1f} each"
        measured = f"{one.target:g} | {one.allowed_us:.0f} | {one.added_us:.0f}"
        rows.append(f"| {one.head} | {measured} | {bank:.0f} | {classes:.0f} | {small} |")
    return "\n".join(rows)
