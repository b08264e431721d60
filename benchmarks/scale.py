"""A million synthetic features of 100 classes through the gatherer and the fit, with the memory and the time they take.

    python benchmarks/scale.py [--images N ...] [--dimension D] [--json FILE]

Features are made batch by batch, so nothing but the gatherer and the fit holds them. Every number of images runs in a
process of its own, because the peak of a process never falls.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ratios import machine

from grood_edge.export.bank import HeadPlan, fit_head
from grood_edge.export.batches import BATCH
from grood_edge.export.features import DEFAULT_ROWS
from grood_edge.export.ood_prototype import plain_source
from grood_edge.export.reservoir import Rows
from grood_edge.export.table import Gatherer
from grood_edge.terminal import progress_bars

CLASSES = 100
BANK_ROWS = 1024


def batches(images: int, dimension: int, seed: int = 0) -> Iterator[Rows]:
    """Make features around one mean a class, every twentieth predicted as the next class; classes are not balanced."""
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((CLASSES, dimension), dtype=np.float32)
    frequency = np.linspace(1, 10, CLASSES) / np.linspace(1, 10, CLASSES).sum()
    for start in range(0, images, BATCH):
        count = min(BATCH, images - start)
        labels = rng.choice(CLASSES, count, p=frequency)
        features = means[labels] + rng.standard_normal((count, dimension), dtype=np.float32)
        predictions = np.where(rng.random(count) < 0.05, (labels + 1) % CLASSES, labels)
        yield Rows(features, labels, predictions, tuple(f"train/{i:07d}.jpg" for i in range(start, start + count)))


def peak_megabytes() -> float:
    """Return the peak resident memory of this process: kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def run(images: int, dimension: int, max_rows: int = DEFAULT_ROWS) -> dict[str, object]:
    """Gather and fit; return seconds and peak memory."""
    before, start = peak_megabytes(), time.perf_counter()
    gatherer = Gatherer(CLASSES, max_rows, 0, stratified=True)
    done = 0
    with progress_bars() as progress:
        for rows in batches(images, dimension):
            gatherer.add(rows)
            done += len(rows.labels)
            progress("reading synthetic features", done, images)
        table = gatherer.table()
        gathered = time.perf_counter()
        progress("fitting", 0, None)
        sources = (plain_source("mean"), plain_source("origin"))
        head, _ = fit_head(table, HeadPlan(sources, BANK_ROWS, "int8", 0))
        progress("fitting", 1, 1)
    return {
        "images": images,
        "dimension": dimension,
        "rows_kept": len(table.labels),
        "rows_of_a_class": [int(np.bincount(table.labels).min()), int(np.bincount(table.labels).max())],
        "bank_rows": len(head.bank),
        "seconds_gathering": round(gathered - start, 2),
        "seconds_fitting": round(time.perf_counter() - gathered, 2),
        "peak_mb_imports": round(before),
        "peak_mb": round(peak_megabytes()),
    }


def main() -> None:
    """Run each number of images in a process of its own, print the figures, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[250_000, 1_000_000])
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        arguments.json.write_text(json.dumps(run(arguments.images[0], arguments.dimension)))
        return
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for images in arguments.images:
            part = Path(folder) / f"{images}.json"
            command = [sys.executable, __file__, "--here", "--images", str(images)]
            subprocess.run([*command, "--dimension", str(arguments.dimension), "--json", str(part)], check=True)
            runs.append(json.loads(part.read_text()))
    result = {"machine": machine(), "classes": CLASSES, "runs": runs}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
