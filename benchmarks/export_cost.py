"""`export` by phase, beside the bare time of decoding the same images and running the network over them.

    python benchmarks/export_cost.py [--quick] [--work DIR] [--json FILE]

An ONNX EfficientNet-Lite0, 1,000 JPEG of 480x640 in ten classes and 120 that calibrate, default options, onnxruntime's
own choice of threads on both sides. Phases come from the progress callback: the time between two calls belongs to the
label of the later one, or to that of the earlier one where the later one opens a phase.
"""

import time
from pathlib import Path

import numpy as np
from animals import OPTIONS
from ratios import Found, Line, Target, Times, ratio_of, run_as_script
from setting import Setting, prepared

from grood_edge.artifact import read_artifact
from grood_edge.export import ExportOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.preprocessing import preprocess_frame

TURNS, BATCH = 3, 32
GROUPS = {  # label of the progress callback, or its beginning -> group
    "loading": "opening",
    "reading": "reading",
    "comparing preprocessing": "checks",
    "shuffling": "network again",
    "mixing": "network again",
    "choosing": "statistics",
    "cross-fitting": "statistics",
    "fitting": "statistics",
    "verifying": "checks",
}
SHARE = Target("at most", 0.10)


class Phases:
    """A progress callback that adds up seconds by label."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._label, self._at = "opening", time.perf_counter()

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Give the time since the last call to a phase."""
        self._add(label if done else self._label)
        self._label = label

    def end(self) -> dict[str, float]:
        """Return seconds by label; what came after the last call was writing."""
        self._add("writing")
        return self.seconds

    def _add(self, label: str) -> None:
        now = time.perf_counter()
        self.seconds[label] = self.seconds.get(label, 0.0) + now - self._at
        self._at = now


def measured(work: Path, quick: bool) -> Found:
    """Export and run bare, in turn."""
    setting = prepared(work)
    turns, labels = [], []
    for turn in range(1 if quick else TURNS):
        bare = bare_seconds(setting) if turn % 2 else None
        phases = exported(setting, work / "cost.onnx")
        decode, network = bare or bare_seconds(setting)
        group = groups(phases)
        labels.append(phases)
        turns.append([sum(group.values()), decode + network, network, group["statistics"]])
    rounds: list[Times] = [np.array(turns)]
    section = f"`export`: EfficientNet-Lite0, {len(images_of(setting)):,} JPEG of 480x640"
    lines = (
        Line(section, "`export`, default options", "decode, resize, network", ratio_of(rounds, 0, 1), "s"),
        Line(section, "`export`, default options", "network alone", ratio_of(rounds, 0, 2), "s"),
        Line(section, "statistics, bank and head", "the whole export", ratio_of(rounds, 3, 0), "s", SHARE),
    )
    medians = {label: float(np.median([p.get(label, 0.0) for p in labels])) for label in labels[0]}
    total = sum(medians.values())
    table = {label: {"seconds": round(s, 3), "share": round(s / total, 4)} for label, s in medians.items()}
    return Found(lines, (), {"phases": table})


def exported(setting: Setting, out: Path) -> dict[str, float]:
    """Export once; return seconds by label."""
    phases = Phases()
    options = ExportOptions(preprocessing=OPTIONS, calibration_data=setting.calibration, force=True)
    export_model(setting.classifier, setting.fit, out, options, phases)
    folder = f"{setting.fit.parent}/"
    return {label.replace(folder, ""): seconds for label, seconds in phases.end().items()}


def images_of(setting: Setting) -> list[Path]:
    """Return what an export reads."""
    return [*find_images(setting.fit), *find_images(setting.calibration)]


def groups(phases: dict[str, float]) -> dict[str, float]:
    """Add labels up in groups."""
    found = dict.fromkeys([*GROUPS.values(), "opening", "writing"], 0.0)
    for label, seconds in phases.items():
        found[next((group for start, group in GROUPS.items() if label.startswith(start)), label)] += seconds
    return found


def bare_seconds(setting: Setting) -> tuple[float, float]:
    """Return seconds of decoding and resizing, and of the network, over the same images."""
    p = read_artifact(setting.paper).contract.preprocessing
    network = open_ort(setting.base.read_bytes())
    decoding = running = 0.0
    paths = images_of(setting)
    for start in range(0, len(paths), BATCH):
        began = time.perf_counter()
        images = np.stack([preprocess_frame(load_image(path), p) for path in paths[start : start + BATCH]])
        decoded = time.perf_counter()
        network.run({"image": images})
        decoding, running = decoding + decoded - began, running + time.perf_counter() - decoded
    return decoding, running


if __name__ == "__main__":
    run_as_script(__doc__, measured)
