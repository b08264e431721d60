"""A frame at a time: `session.predict` beside onnxruntime for the features and Python for the score; one thread.

    python benchmarks/end_to_end.py [--quick] [--work DIR] [--json FILE]

Both sides take a decoded camera frame of 480x640 and resize it with the same function, and run the same network (image
normalised in the graph, which is to the other side's advantage). The other side then computes the gradient in NumPy and
searches the bank, and compares with the same threshold. End to end holds the network, which is most of both sides;
so the score part alone, and both sides over the same without a score, are lines of their own. End to end is wall time;
the score alone is timed as in head_speed.py, with warm caches.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from head_alone import ALONE, HeadAlone
from other_ways import numpy_scores, search_name
from ratios import Found, Line, Target, Times, interleaved, ratio_of, run_as_script
from setting import Setting, prepared, test_features, test_frames

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.ort import open_ort
from grood_edge.preprocessing import preprocess_frame
from grood_edge.runtime import Session
from grood_edge.runtime.decisions import class_thresholds, is_alarm
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.stored_head import head_from_model

ROUNDS, SECONDS = 6, 3.0
END_TO_END = Target("at least", 3)
Side = Callable[[], Any]


def measured(work: Path, quick: bool) -> Found:
    """Compare end to end, the score part alone, and both beside the bare network, for both artifacts."""
    setting = prepared(work)
    frames, features, search = test_frames(setting), test_features(setting), search_name()
    seconds, least = (0.0, 3) if quick else (SECONDS, 20)
    lines: list[Line] = []
    for path, kind in ((setting.paper, "one OOD prototype, {} float32 rows"), (setting.three, "three, {} int8 rows")):
        artifact, whole, parts = read_artifact(path), [], []
        head = head_from_model(artifact.model)
        for _ in range(1 if quick else ROUNDS):
            whole.append(1000 * interleaved(whole_sides(setting, artifact, frames, search), seconds, least))
            ways = (HeadAlone(head), numpy_scores(head, search), numpy_scores(head, "NumPy"))
            calls = [partial(way, features[:1]) for way in ways]
            parts.append(1000 * interleaved(calls, seconds / 4, least, timing=ALONE))
        section = f"Batch 1, 1 thread, 480x640 frames, {kind.format(f'{len(head.bank):,}')}"
        lines += lines_of(section, f"onnxruntime + NumPy + {search}", whole, parts)
    return Found(tuple(lines))


def lines_of(section: str, today: str, whole: list[Times], parts: list[Times]) -> list[Line]:
    """Return the lines of one artifact; sides are ours, theirs, and the network alone or NumPy without FAISS."""
    alone = today.removeprefix("onnxruntime + ")
    return [
        Line(section, f"{today}, end to end", "`predict`", ratio_of(whole, 1, 0), "ms", END_TO_END),
        Line(section, f"score alone: {alone}", "head alone", ratio_of(parts, 1, 0), "ms"),
        Line(section, "score alone: NumPy", "head alone", ratio_of(parts, 2, 0), "ms"),
        Line(section, f"{today}, end to end", "without score", ratio_of(whole, 1, 2), "ms"),
        Line(section, "`predict`", "the same without score", ratio_of(whole, 0, 2), "ms"),
    ]


def whole_sides(setting: Setting, artifact: Artifact, frames: list[np.ndarray], search: str) -> list[Side]:
    """Open everything anew: `predict`, the other way, and the other way without its score."""
    contract = artifact.contract
    threshold = class_thresholds(contract.calibration.rule(len(contract.classes)))[0]  # one for all classes
    score = numpy_scores(head_from_model(artifact.model), search)
    network = open_ort(setting.base.read_bytes(), threads=1)
    session = Session(artifact, OnnxRuntimeBackend(artifact, threads=1))

    def run(frame: np.ndarray) -> dict[str, np.ndarray]:
        return network.run({"image": preprocess_frame(frame, contract.preprocessing)[np.newaxis]})

    def today(frame: np.ndarray) -> tuple[int, bool]:
        outputs = run(frame)
        return int(outputs["logits"].argmax()), is_alarm(float(score(outputs["features"])[0]), threshold)

    for frame in frames:
        ours = session.predict(frame)
        if (ours.class_id, ours.is_ood) != today(frame):
            raise SystemExit("both sides decide differently; one of them computes something else")
    return [_over(frames, session.predict), _over(frames, today), _over(frames, run)]


def _over(frames: list[np.ndarray], call: Callable[[np.ndarray], Any]) -> Side:
    position = [0]

    def side() -> Any:
        position[0] = (position[0] + 1) % len(frames)
        return call(frames[position[0]])

    return side


if __name__ == "__main__":
    run_as_script(__doc__, measured)
