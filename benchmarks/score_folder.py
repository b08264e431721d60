"""`score` over a folder of JPEG beside a bare onnxruntime loop on decoded arrays, and beside what can be overlapped.

    python benchmarks/score_folder.py [--quick] [--work DIR] [--json FILE]

Sides, in turn, over the same 500 images of 480x640 in batches of 32: `score_images` as `grood-edge score` calls it; a
bare onnxruntime session of the same graph on arrays that are decoded and resized already; and the bound: as many
threads as `score` decodes with decode and resize every image and throw it away while that bare loop runs, and neither
waits for the other. Sessions are open before the clock starts, and onnxruntime chooses its own threads on all sides.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ratios import Found, Line, Target, Times, ratio_of, run_as_script
from setting import Setting, prepared

from grood_edge.artifact import read_artifact
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import open_session
from grood_edge.runtime.score import ScoreRow, score_images
from grood_edge.threads import decoding_threads

TURNS, BATCH = 6, 32
EVERY = 2  # of the images that an export fits on
OVERLAPPED = Target("at least", 0.9)


def measured(work: Path, quick: bool) -> Found:
    """Run all sides in turn."""
    setting = prepared(work)
    paths = find_images(setting.fit)[:: 16 if quick else EVERY]
    p = read_artifact(setting.three).contract.preprocessing
    ready = np.stack([preprocess_frame(load_image(path), p) for path in paths])
    sides = (
        lambda: score_seconds(setting, paths),
        lambda: bare_seconds(setting, ready),
        lambda: bare_seconds(setting, ready, paths),
    )
    turns = []
    for turn in range(1 if quick else TURNS):
        order = range(len(sides)) if turn % 2 else reversed(range(len(sides)))
        seconds = {index: sides[index]() for index in order}
        turns.append([len(paths) / seconds[index] for index in range(len(sides))])
    rounds: list[Times] = [np.array(turns)]  # images a second, so that more is better
    section = f"`score`: {len(paths):,} JPEG of 480x640, batch {BATCH}, three OOD prototypes"
    lines = (
        Line(section, "`score`", "decode beside network", ratio_of(rounds, 0, 2), "images/s", OVERLAPPED),
        Line(section, "`score`", "onnxruntime on decoded arrays", ratio_of(rounds, 0, 1), "images/s"),
    )
    return Found(lines)


def score_seconds(setting: Setting, paths: list[Path]) -> float:
    """Time `score_images`, with the session open."""
    rows: list[ScoreRow] = []
    with open_session(setting.three, any_size=True) as session:
        started = time.perf_counter()
        score_images(session, paths, rows.append, BATCH)
        return time.perf_counter() - started


def bare_seconds(setting: Setting, ready: np.ndarray, paths: Sequence[Path] = ()) -> float:
    """Time onnxruntime on decoded arrays, with the session open, while `paths` are decoded as well."""
    artifact = read_artifact(setting.three)
    model = open_ort(artifact.model)
    decoders = decoding_threads()

    def network() -> None:
        for start in range(0, len(ready), BATCH):
            model.run({"image": ready[start : start + BATCH]})

    def decode(part: Sequence[Path]) -> None:
        for path in part:
            preprocess_frame(load_image(path), artifact.contract.preprocessing)

    jobs: list[Callable[[], None]] = [network]
    if paths:
        jobs += [lambda first=first: decode(paths[first::decoders]) for first in range(decoders)]  # type: ignore[misc]
    threads = [threading.Thread(target=job) for job in jobs]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_as_script(__doc__, measured)
