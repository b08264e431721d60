"""Simulate the e-CUSUM on scores whose law is known: does the mean time between false alarms hold, and when not?

    python benchmarks/e_cusum.py [--json benchmarks/results/e_cusum.json]

ID scores are standard normal, as calibration scores are. Frames are independent; or AR(1) with 0.9 from frame to frame,
fed one by one or as far apart as `correlation_lag` finds on 60 simulated episodes; or half of their variance is
one value a scene of 300 fed frames. Every line draws 200 calibration sets anew, with 20 streams of 5,000 fed frames
each. The threshold is set to one false alarm in 1,000 fed frames. Then the threshold by episode, on 59 episodes of 299
frames, and the delay until OOD frames are found. Prints the table in Markdown. A minute and a half on one core.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from grood_edge.runtime.correlation import correlation_lag
from grood_edge.runtime.e_cusum import correction, detector_step, log_e_values, threshold_by_episode

A = 1000
SETS, STREAMS, FRAMES, CHUNK = 200, 20, 5000, 500
SCENE = 300


@dataclass(frozen=True)
class Process:
    """ID scores: correlation from one frame to the next, and the share of the variance that a scene has in common.

    every: each so many-th frame is fed.
    """

    name: str
    rho: float = 0.0
    scene: float = 0.0
    every: int = 1


@dataclass(frozen=True)
class Line:
    """What came out. interval: mean fed frames between alarms. below: share of calibration sets with a mean below A."""

    process: Process
    n: int
    fed_frames: int
    alarms: int
    interval: float
    below: float


class Scores:
    """Fed scores `[streams]`, step after step; an AR(1) of which every m-th frame is fed is an AR(1) with rho^m."""

    def __init__(self, process: Process, streams: int, rng: np.random.Generator) -> None:
        self._rng, self._share = rng, process.scene
        self._rho = process.rho**process.every
        self._value = rng.standard_normal(streams)
        self._scene = rng.standard_normal(streams)
        self._step = int(rng.integers(SCENE))

    def next(self) -> np.ndarray:
        """Return the next score of each stream."""
        noise = self._rng.standard_normal(len(self._value))
        self._value = self._rho * self._value + math.sqrt(1 - self._rho**2) * noise
        self._step += 1
        if self._share and self._step % SCENE == 0:
            self._scene = self._rng.standard_normal(len(self._value))
        return math.sqrt(1 - self._share) * self._value + math.sqrt(self._share) * self._scene


def log_e_of(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Return the corrected log e of scores `[sets, streams, steps]`; calibration `[sets, n]`, ascending."""
    n = calibration.shape[1]
    table = log_e_values(np.arange(1, n + 2) / (n + 1)) - math.log(correction((n,)))
    ranks = [n - np.searchsorted(own, block, side="left") for own, block in zip(calibration, scores, strict=True)]
    return np.asarray(table[np.stack(ranks)])


def simulate(process: Process, n: int, seed: int = 0) -> Line:
    """Count false alarms; M is 1 again after each."""
    rng = np.random.default_rng(seed)
    calibration = np.sort(rng.standard_normal((SETS, n)), axis=1)
    scores = Scores(process, SETS * STREAMS, rng)
    log_m, alarms = np.zeros((SETS, STREAMS)), np.zeros(SETS, int)
    for _ in range(FRAMES // CHUNK):
        block = np.stack([scores.next() for _ in range(CHUNK)], axis=1).reshape(SETS, STREAMS, CHUNK)
        log_e = log_e_of(block, calibration)
        for step in range(CHUNK):
            log_m = np.maximum(log_m, 0) + log_e[:, :, step]
            alarm = log_m >= math.log(A)
            alarms += alarm.sum(axis=1)
            log_m[alarm] = 0
    fed = STREAMS * FRAMES
    total = int(alarms.sum())
    return Line(process, n, SETS * fed, total, SETS * fed / max(1, total), float((alarms > fed / A).mean()))


def by_episode(process: Process, n: int, frames: int, repetitions: int = 200, test: int = 1000) -> dict[str, float]:
    """Set the threshold by 59 episodes; return the mean share of new ones that alarm, and how often it is over 5 %."""
    rng = np.random.default_rng(1)
    calibration = np.sort(rng.standard_normal((repetitions, n)), axis=1)
    episodes = 59 + test
    scores = Scores(process, repetitions * episodes, rng)
    scores._step = 0  # an episode is one scene
    assert frames < SCENE
    log_m = largest = np.zeros((repetitions, episodes))
    for _ in range(frames // process.every):
        log_e = log_e_of(scores.next().reshape(repetitions, episodes, 1), calibration)[:, :, 0]
        log_m = np.maximum(log_m, 0) + log_e
        largest = np.maximum(largest, log_m)
    shares = []
    for maxima in largest:
        threshold = threshold_by_episode(tuple(maxima[:59].tolist()), 0.05, 0.05)
        assert threshold is not None
        shares.append((maxima[59:] >= threshold).mean())
    above = np.array(shares)
    return {"alarms": float(above.mean()), "above_five_percent": float((above > 0.05).mean())}


def delay(auroc: float, n: int, log_a: float, streams: int = 4000) -> float:
    """Return the mean number of fed frames until independent OOD frames raise the alarm, from M = 1 on."""
    rng = np.random.default_rng(2)
    shift = math.sqrt(2) * NormalDist().inv_cdf(auroc)
    calibration = np.sort(rng.standard_normal((1, n)), axis=1)
    log_m, found = np.zeros(streams), np.zeros(streams)
    for step in range(1, 2000):
        log_e = log_e_of(rng.normal(shift, 1, (1, streams, 1)), calibration)[0, :, 0]
        log_m = np.maximum(log_m, 0) + log_e
        found[(found == 0) & (log_m >= log_a)] = step
        if found.all():
            return float(found.mean())
    return math.inf


def measured_lag(rho: float) -> int:
    """Return the lag that calibration on 60 episodes of 3,000 frames finds, each with a calibration set of 1,000."""
    rng = np.random.default_rng(3)
    calibration = np.sort(rng.standard_normal((1, 1000)), axis=1)
    scores = Scores(Process("", rho), 60, rng)
    block = np.stack([scores.next() for _ in range(3000)], axis=1)[None]
    found = correlation_lag(list(log_e_of(block, calibration)[0]))
    assert found.lag is not None, found.reason
    return found.lag


def main() -> None:
    """Run everything, print the tables, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    assert detector_step(-1.0, 2.0) == 2.0  # the loops here are its vector form
    start, lag = time.perf_counter(), measured_lag(0.9)
    plans = [
        *((Process("independent"), n) for n in (300, 1000, 10_000)),
        (Process("AR(1) 0.9, every frame fed", 0.9), 1000),
        (Process("AR(1) 0.9, every 9th fed", 0.9, every=9), 1000),
        (Process(f"AR(1) 0.9, decimated as measured, every {lag}th", 0.9, every=lag), 1000),
        (Process("independent within scenes, half of the variance between them", scene=0.5), 1000),
        (Process(f"AR(1) 0.9 decimated (every {lag}th), half between scenes", 0.9, 0.5, lag), 1000),
    ]
    lines = []
    print(f"| frames | n | mean fed frames between false alarms (set to {A:,}) | calibration sets below |")
    print("|---|---|---|---|")
    for process, n in plans:
        line = simulate(process, n)
        lines.append(line)
        print(
            f"| {process.name} | {n:,} | {line.interval:,.0f} ({line.alarms:,} alarms) | {line.below:.1%} |", flush=True
        )
    scenes = Process("AR(1) 0.9, every frame fed, half of the variance between episodes", 0.9, 0.5)
    episodes = by_episode(scenes, 1000, SCENE - 1)
    print(f"\nBy episode ({scenes.name}): {json.dumps(episodes)}")
    delays = {f"auroc {a}, n {n}": delay(a, n, math.log(1e6)) for a in (0.8, 0.9, 0.95) for n in (1000, 10_000)}
    print(f"Delay in fed frames at A = 1e6: {json.dumps(delays)}")
    result = {
        "set_to": A,
        "correction": {str(n): correction((n,)) for n in (300, 1000, 10_000)},
        "measured_lag": lag,
        "lines": [asdict(line) for line in lines],
        "by_episode": {"episodes": 59, "frames": SCENE - 1, **asdict(scenes), **episodes},
        "delay_at_a_million": delays,
        "seconds": round(time.perf_counter() - start),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
