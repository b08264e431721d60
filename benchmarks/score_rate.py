"""`score` on a folder of JPEGs beside the rate that decoding and the network allow when nothing waits for anything.

    python benchmarks/score_rate.py [ARTIFACT.onnx ...] [--images N] [--rounds N] [--json FILE]

Without an artifact the packaged one of `grood-edge selftest` is measured: a network so small that decoding decides.

The bound is measured, not computed, because both want the same cores: as many threads as `score` has decode and resize
every image and throw it away, while another thread runs bare onnxruntime on as many arrays that lie ready, in batches
of 32. Neither waits for the other, and the bound is images over the time until both have ended. `decode` and `network`
alone are beside it: `network` with nothing else going on, `decode` likewise. `before` reads one image after the other,
as `score` did without a pool. Sides run in turn, round by round, the order alternating; ratios are medians over rounds.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from photos import write_photos

from grood_edge.artifact import read_artifact
from grood_edge.images import find_images, load_image
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import open_session
from grood_edge.runtime.score import score_images
from grood_edge.runtime.selftest import MODEL
from grood_edge.threads import decoding_threads

BATCH, WARM_UP = 32, 64


def compared(artifact: Path, paths: list[Path], rounds: int) -> dict[str, Any]:
    """Measure all sides in turn; return images a second of each, and the ratios."""
    opened = read_artifact(artifact)
    p = opened.contract.preprocessing
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    bare = onnxruntime.InferenceSession(opened.model, options, providers=["CPUExecutionProvider"])
    ready = np.stack([preprocess_frame(load_image(path), p) for path in paths[:BATCH]])

    def network() -> None:
        for start in range(0, len(paths), BATCH):
            bare.run(None, {"image": ready[: min(BATCH, len(paths) - start)]})

    def decode() -> None:
        _in_threads(decoders)

    def both() -> None:
        _in_threads([network, *decoders])

    def _decode(part: list[Path]) -> None:
        for path in part:
            preprocess_frame(load_image(path), p)

    workers = decoding_threads()
    decoders: list[Callable[[], None]] = [partial(_decode, paths[i::workers]) for i in range(workers)]
    with open_session(artifact, any_size=True) as session:

        def ours() -> None:
            score_images(session, paths, lambda _: None, BATCH)

        def before() -> None:
            with mock.patch("grood_edge.runtime.score.decoded", one_after_the_other):
                ours()

        sides = {"bound": both, "score": ours, "before": before, "decode": decode, "network": network}
        score_images(session, paths[:WARM_UP], lambda _: None, BATCH)
        both()
        seconds = timed(sides, rounds)
    rates = {name: [len(paths) / value for value in values] for name, values in seconds.items()}
    return {
        "artifact": "selftest" if artifact == MODEL else artifact.name,
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "score_over_bound": ratio(rates["score"], rates["bound"]),
        "score_over_before": ratio(rates["score"], rates["before"]),
    }


def one_after_the_other(items: Iterable[Any], load: Callable[[Any], Any]) -> Iterator[Any]:
    """Load as `score` did before there was a pool."""
    return ((item, load(item)) for item in items)


def timed(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every side in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sides if number % 2 else reversed(sides):
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], other: list[float]) -> dict[str, float]:
    """Return the median, least and largest ratio over rounds."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    found = {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}
    return {name: round(value, 3) for name, value in found.items()}


def _in_threads(jobs: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    """Measure every artifact, print the figures, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="*", default=[MODEL])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder) / "photos", arguments.images)
        paths = find_images(folder)
        runs = [compared(artifact, paths, arguments.rounds) for artifact in arguments.artifacts]
    from scale import machine  # imports the whole export: after the measurement

    cores = len(os.sched_getaffinity(0))
    result = {"machine": machine(), "cores": cores, "images": arguments.images, "jpeg": "640x480", "runs": runs}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
