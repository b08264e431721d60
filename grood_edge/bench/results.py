"""What a benchmark found: plain values in milliseconds and bytes, and what one should know about them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grood_edge.bench.loop import WarmUp
from grood_edge.bench.profile import Parts
from grood_edge.bench.statistics import AGREEMENT, drift_of, percentiles, ratio_interval, ratio_of, rounds_of
from grood_edge.runtime.machine import MachineState

__all__ = ["BatchResult", "BenchReport", "FrameKind", "Latency", "Memories", "Ratio", "Split", "batch_result", "doubts"]

_BUSY = 0.5  # load for each core


@dataclass(frozen=True)
class Latency:
    """Of a whole call, frames in, verdicts out, in milliseconds. None: too few runs for it (`runs_needed`)."""

    runs: int
    p50: float | None
    p90: float | None
    p99: float | None
    p99_9: float | None
    images_per_second: float


@dataclass(frozen=True)
class Split:
    """Medians in milliseconds. None: cannot be told with this backend.

    host_preprocessing: resize and crop, into the graph's input. copy: to the device and back. graph: the run of the
    graph, of which `graph_preprocessing`, `network` and `head` are the parts. decision: from outputs to verdicts.
    """

    host_preprocessing: float
    copy: float | None
    graph: float
    graph_preprocessing: float | None
    network: float | None
    head: float | None
    decision: float


@dataclass(frozen=True)
class Ratio:
    """Graph and decision of the artifact over the bare run, with a 95 % interval; and both medians in milliseconds."""

    value: float
    low: float
    high: float
    pairs: int
    artifact: float
    bare: float


@dataclass(frozen=True)
class BatchResult:
    """One batch size. drift: median of the second half of the runs over that of the first."""

    batch: int
    latency: Latency
    split: Split
    ratio: Ratio | None
    warm_up: WarmUp
    drift: float


@dataclass(frozen=True)
class FrameKind:
    """Which frames were measured on: where they come from, and their height, width and channels."""

    source: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Memories:
    """Resident memory of the process in bytes; None where the system does not tell.

    before: when nothing was open. artifact: the most while it was opened and run alone. peak: the most of all, with
    the bare classifier and the profile.
    """

    before: int | None
    artifact: int | None
    peak: int | None


@dataclass(frozen=True)
class BenchReport:
    """All of it. threads: None leaves it to onnxruntime. baseline: None where nothing was compared."""

    grood_edge: str
    model: str
    provider: str
    precision: str
    threads: int | None
    seconds: float
    frames: FrameKind
    baseline: str | None
    batches: tuple[BatchResult, ...]
    memory: Memories
    before: MachineState
    after: MachineState
    notes: tuple[str, ...]


def batch_result(
    batch: int, times: list[np.ndarray], warm_up: WarmUp, parts: Parts | None, copies: bool
) -> BatchResult:
    """Sum up times in seconds: of the artifact `[runs, 3]` (host, graph, decision), of the bare classifier `[runs, 1]`.

    Args:
        batch: images a run.
        times: the artifact's, and the bare classifier's where there is one.
        warm_up: what it took.
        parts: of the graph, None where they cannot be told.
        copies: the backend copies frames to a device and outputs back.
    """
    artifact = times[0]
    whole = artifact.sum(axis=1)
    p50, p90, p99, p99_9 = (None if value is None else _ms(value) for value in percentiles(whole).values())
    speed = round(batch * len(whole) / float(whole.sum()), 1)
    host, graph, decision = (float(value) for value in np.median(artifact, axis=0))
    split = Split(
        host_preprocessing=_ms(host),
        copy=None if copies else 0.0,
        graph=_ms(graph),
        graph_preprocessing=None if parts is None else _ms(parts.preprocessing),
        network=None if parts is None else _ms(parts.network),
        head=None if parts is None else _ms(parts.head),
        decision=_ms(decision),
    )
    ratio = None if len(times) == 1 else _ratio(np.column_stack([times[1][:, 0], artifact[:, 1:].sum(axis=1)]))
    latency = Latency(len(whole), p50, p90, p99, p99_9, speed)
    return BatchResult(batch, latency, split, ratio, warm_up, round(drift_of(whole), 4))


def _ratio(pairs: np.ndarray) -> Ratio:
    rounds = rounds_of(pairs)
    bare, artifact = (_ms(float(value)) for value in np.median(pairs, axis=0))
    found = ratio_interval(rounds)
    return Ratio(
        round(ratio_of(rounds), 4), round(found.low, 4), round(found.high, 4), len(pairs), artifact=artifact, bare=bare
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def doubts(results: tuple[BatchResult, ...], before: MachineState, after: MachineState) -> Iterator[str]:
    """Say what makes the figures less sure than they look."""
    for found in results:
        if not found.warm_up.settled:
            yield (
                f"batch {found.batch}: the times had not settled when the warm-up ended, after {found.warm_up.runs} "
                f"runs in {found.warm_up.seconds:.1f} s; raise --seconds, or stop what else is running"
            )
        if abs(found.drift - 1) > AGREEMENT:
            yield (
                f"batch {found.batch}: the second half of the runs took {found.drift:.2f}x of the first: the clock "
                "changed, or something else was running. The ratio holds better than the times"
            )
    cores = os.cpu_count() or 1
    if before.load is not None and before.load > _BUSY * cores:
        yield (
            f"the load was {before.load:.1f} on {cores} cores before the start: other processes are running, and the "
            "times are theirs too"
        )
    if after.throttled is not None and before.throttled is not None and after.throttled > before.throttled:
        yield "the CPU was slowed down for its heat while it was measured"
