"""`session.predict(frame)` beside bare onnxruntime on the same pixels: what the session adds to the network's own time.

    python benchmarks/hot_path.py [--animals DIR] [ARTIFACT.onnx ...] [--json FILE]

Artifacts: the packaged one of `grood-edge selftest`, those that are named, and with `--animals` EfficientNet-Lite0 (see
animals.py). One thread. Two comparisons for each:

`ready`: a frame of the graph's size that needs no resizing, against `InferenceSession.run(None, {"image": frame})`.
`camera`: a frame of 720x1280, against `preprocess_frame` and that same run, so that the host's resize is on both sides.

Calls are made in turn, the order alternating; every round opens both sessions anew, because where memory happens to
lie can make one of two equal sessions faster. Ratio and interval are those of `grood-edge bench`
(grood_edge/bench/statistics.py), over these rounds. `bytes` is the most that 100 calls held at a time (tracemalloc).
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.bench.loop import timed, times_in_turn, warmed_up
from grood_edge.bench.statistics import ratio_interval, ratio_of
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import Session
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.selftest import MODEL

ROUNDS, SECONDS = 6, 4.0  # seconds a round, both sides together
CALLS = 100


def lite0(folder: Path, work: Path) -> Path:
    """Export EfficientNet-Lite0 with a linear layer on ten animals."""
    import animals

    from grood_edge.export import ExportOptions, export_model

    train, path = folder / "id" / "train", work / "efficientnet-lite0.onnx"
    export_model(animals.trained_network(train), train, path, ExportOptions(preprocessing=animals.OPTIONS))
    return path


def bare_session(artifact: Artifact) -> onnxruntime.InferenceSession:
    """Open the artifact as anybody would without grood_edge."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of an initializer that it removes
    return onnxruntime.InferenceSession(artifact.model, options, providers=["CPUExecutionProvider"])


def paired_times(sides: tuple[Callable[[], Any], Callable[[], Any]], seconds: float) -> np.ndarray:
    """Call both in turn for a while, once they have settled; return seconds `[pairs, 2]`."""
    staged = [timed(side, time.perf_counter) for side in sides]
    warmed_up(staged, seconds, time.perf_counter)
    return np.concatenate(times_in_turn(staged, seconds, time.perf_counter), axis=1)


def most_bytes(call: Callable[[], Any]) -> int:
    """Return how many bytes calls held at most, beyond what was held before."""
    call()
    tracemalloc.start()
    call()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(CALLS):
        call()
    most = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return most


def compared(artifact: Artifact, frame: np.ndarray, resized: bool) -> dict[str, Any]:
    """Time `predict` beside bare onnxruntime, round by round."""
    p = artifact.contract.preprocessing
    ready = frame if not resized else preprocess_frame(frame, p)
    rounds = []
    for number in range(ROUNDS):
        bare = bare_session(artifact)
        with Session(artifact, OnnxRuntimeBackend(artifact, threads=1)) as session:

            def predict(session: Session = session) -> Any:
                return session.predict(frame)

            def run(bare: onnxruntime.InferenceSession = bare) -> Any:
                image = preprocess_frame(frame, p)[np.newaxis] if resized else ready[np.newaxis]
                return bare.run(None, {"image": image})

            rounds.append(paired_times((run, predict), SECONDS))
            if number == ROUNDS - 1:
                held = most_bytes(predict)
    medians = np.median(np.concatenate(rounds), axis=0)
    found = ratio_interval(rounds)
    return {
        "bare ms": round(1000 * float(medians[0]), 4),
        "predict ms": round(1000 * float(medians[1]), 4),
        "added us": round(1e6 * float(np.median([np.median(t[:, 1]) - np.median(t[:, 0]) for t in rounds])), 1),
        "ratio": round(ratio_of(rounds), 4),
        "interval": [round(found.low, 4), round(found.high, 4)],
        "pairs": sum(len(times) for times in rounds),
        "bytes": held,
    }


def measured(path: Path) -> dict[str, Any]:
    """Compare on a frame that needs no resizing, and on a camera's."""
    artifact = read_artifact(path)
    p = artifact.contract.preprocessing
    # the same graph; a centre crop would resize even a frame of the graph's size
    stretched = replace(artifact.contract, preprocessing=replace(p, crop="stretch", short_side=None))
    rng = np.random.default_rng(0)
    ready, camera = (
        rng.integers(0, 256, shape, np.uint8) for shape in ((p.height, p.width, p.channels), (720, 1280, p.channels))
    )
    return {
        "ready": compared(replace(artifact, contract=stretched), ready, resized=False),
        "camera": compared(artifact, camera, resized=True),
    }


def table_text(results: dict[str, dict[str, Any]]) -> str:
    """Return a markdown table."""
    lines = [
        "| artifact | frame | bare, ms | predict, ms | ratio (95 %) | added, us | bytes held |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, frames in results.items():
        for kind, row in frames.items():
            low, high = row["interval"]
            ratio = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
            times = f"{row['bare ms']:.3f} | {row['predict ms']:.3f}"
            lines.append(f"| {name} | {kind} | {times} | {ratio} | {row['added us']:.0f} | {row['bytes']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the options, run, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="*", type=Path, help="further artifacts, without in-graph resize")
    parser.add_argument("--animals", type=Path, help="folder with id/train, to export EfficientNet-Lite0")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        paths = [MODEL, *arguments.artifacts]
        if arguments.animals is not None:
            paths.append(lite0(arguments.animals, Path(work)))
        results = {path.stem: measured(path) for path in paths}
    print(table_text(results))
    if arguments.json:
        found = {"onnxruntime": onnxruntime.__version__, "numpy": np.__version__, "threads": 1, "artifacts": results}
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
