"""fp16 and int8 against fp32: size, AUROC, changed decisions; statistics refitted on the lower graph, and stale ones.

    python benchmarks/precision.py [--animals DIR] [--garments DIR] [--network NAME ...] [--json FILE]

Networks: `animals` (EfficientNet-Lite0, see animals.py), `garments` and `garments-batch-norm` (see garments.py). Every
artifact is made with the default options. fp16 is scored by its really rounded graph (export/rounding.py), because
onnxruntime's CPU provider does not round. `stale` is the lower graph with the float32 artifact's statistics and
calibration on it. Decisions are `is_ood` and `class_id`; those of ID test images are compared with the float32
artifact's. Times are of one image on onnxruntime's CPU provider, over float32's, in turn.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import animals
import garments
import numpy as np
import onnx
from baselines import scored_by

from grood_edge.evaluate.metrics import auroc
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from grood_edge.export.rounding import rounded
from grood_edge.images import find_images, load_image
from grood_edge.ort import open_ort
from grood_edge.outputs import Outputs, outputs_from_arrays
from grood_edge.preprocessing import preprocess_frame, resolve_preprocessing

Name = Literal["fp32", "fp16", "int8"]
LOWER: tuple[Name, ...] = ("fp16", "int8")
TIMED = 40


@dataclass(frozen=True)
class Trial:
    """A network, its images, and prepared frames uint8 `[n, h, w, c]` by set, `test` for ID."""

    network: Any
    data: Any
    options: ExportOptions
    frames: Mapping[str, np.ndarray]


def animals_trial(folder: Path, work: Path) -> Trial:
    """Return EfficientNet-Lite0 with a linear layer on ten animals, calibrated on half of id/test."""
    preprocessing = resolve_preprocessing(animals.OPTIONS, 3, (None, None))
    calibration, test = animals.divided(folder / "id" / "test", work, 1 / 2, 0)
    sets = {"test": test, **{kind: folder / kind for kind in animals.SETS}}
    frames = {
        name: np.stack([preprocess_frame(load_image(path), preprocessing) for path in find_images(where)])
        for name, where in sets.items()
    }
    train = folder / "id" / "train"
    options = ExportOptions(preprocessing=animals.OPTIONS, calibration_data=calibration)
    return Trial(animals.trained_network(train), train, options, frames)


def garments_trial(cache: Path, folder: Path | None, batch_norm: bool) -> Trial:
    """Return a small CNN on eight garments, calibrated on half of the test images and tested on the other half."""
    found = garments.load_garments(folder or garments.dataset_folder(cache))
    network = garments.trained_network(found, cache, batch_norm)
    chosen = garments.balanced_rows(found.train_labels, garments.FIT_IMAGES, 0)
    order = np.random.default_rng(0).permutation(len(found.test))
    calibration, test = order[: len(order) // 2], order[len(order) // 2 :]
    side = (garments.SIDE, garments.SIDE)
    options = ExportOptions(
        calibration_data=[(found.test[calibration], found.test_labels[calibration])],
        preprocessing=PreprocessingOptions(input_size=side, mean=(network.shift,), std=(network.scale,)),
        classes=tuple(garments.NAMES[label] for label in garments.KEPT),
    )
    data = [(found.train[chosen], found.train_labels[chosen])]
    return Trial(network, data, options, {"test": found.test[test], **found.ood})


def outputs_of(model: bytes, frames: Mapping[str, np.ndarray]) -> dict[str, Outputs]:
    """Run a graph over every set."""
    opened, found = open_ort(model), {}
    for name, images in frames.items():
        runs = [opened.run({"image": images[i : i + 32]}) for i in range(0, len(images), 32)]
        found[name] = outputs_from_arrays({key: np.concatenate([run[key] for run in runs]) for key in runs[0]})
    return found


def row_of(outputs: Mapping[str, Outputs], reference: Mapping[str, Outputs]) -> dict[str, Any]:
    """Return AUROC by set in percent, false alarms, and the share of ID decisions that differ from the reference's."""
    test, before = outputs["test"], reference["test"]
    changed = (test.is_ood != before.is_ood) | (test.class_id != before.class_id)
    scores = {name: o.ood_score for name, o in outputs.items() if name != "test"}
    return {
        "auroc": {name: round(100 * auroc(test.ood_score, other), 2) for name, other in scores.items()},
        "false alarms": round(100 * float(test.is_ood.mean()), 2),
        "changed": round(100 * float(changed.mean()), 2),
    }


def speed_ratios(paths: Mapping[Name, Path], frame: np.ndarray) -> dict[str, float]:
    """Time one image on each artifact in turn, over fp32's."""
    models = {name: open_ort(path.read_bytes(), threads=1) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TIMED):
        for name, model in models.items():
            started = time.perf_counter()
            model.run({"image": frame[None]})
            times[name].append(time.perf_counter() - started)
    middle = {name: float(np.median(values[TIMED // 4 :])) for name, values in times.items()}
    return {name: round(value / middle["fp32"], 3) for name, value in middle.items()}


def run(trial: Trial, work: Path) -> dict[str, Any]:
    """Export in the three precisions, and measure."""
    names: tuple[Name, ...] = ("fp32", *LOWER)
    paths = {name: work / f"{name}.onnx" for name in names}
    result: dict[str, Any] = {"images": {name: len(frames) for name, frames in trial.frames.items()}}
    reference: dict[str, Outputs] = {}
    for name, path in paths.items():
        started = time.monotonic()
        report = export_model(trial.network, trial.data, path, replace(trial.options, precision=name))
        seconds = round(time.monotonic() - started, 1)
        model = rounded(onnx.load(path)).SerializeToString() if name == "fp16" else path.read_bytes()
        outputs = outputs_of(model, trial.frames)
        reference = reference or outputs
        entry = report.contract.precision
        row = row_of(outputs, reference) | {"seconds": seconds}
        if name != "fp32":
            row["size"] = round(entry.trials[-1].size / entry.float32_size, 3)
            row["layers in float32"], row["ranges"] = len(entry.float_layers), entry.ranges
            row["features off by"] = round(100 * (entry.trials[-1].feature_error or 0.0), 1)
            row["plain onnxruntime changed"] = row_of(outputs_of(path.read_bytes(), trial.frames), reference)["changed"]
            stale = {key: scored_by(paths["fp32"], o) for key, o in outputs.items()}
            row["stale"] = row_of(stale, reference)
        result[name] = row
    result["time of one image"] = speed_ratios(paths, trial.frames["test"][0])
    return result


def table_text(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a markdown table: refitted beside stale."""
    lines = [
        "| network | graph | size | statistics | near AUROC | mean AUROC | false alarms | ID decisions changed |",
        "|---|---|---:|---|---:|---:|---:|---:|",
    ]
    for network, result in results.items():
        for name in ("fp32", *LOWER):
            row = result[name]
            for kind, part in (("own", row), ("fp32's", row.get("stale"))):
                if part is None:
                    continue
                values = [part["auroc"]["near"], float(np.mean(list(part["auroc"].values())))]
                shown = " | ".join(f"{value:.2f}" for value in (*values, part["false alarms"], part["changed"]))
                lines.append(f"| {network} | {name} | {row.get('size', 1.0):.2f} | {kind} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the options, run, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--animals", type=Path, help="folder with id/, near/, far/, clutter/, texture/")
    parser.add_argument("--garments", type=Path, help="folder with the four idx.gz files of Fashion-MNIST")
    parser.add_argument("--cache", type=Path, default=garments.CACHE, help="where networks are kept")
    parser.add_argument("--network", nargs="+", default=["animals", "garments", "garments-batch-norm"])
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if "animals" in arguments.network and arguments.animals is None:
        parser.error("the network animals needs --animals DIR; its images are not packaged")
    trials: dict[str, Callable[[Path], Trial]] = {
        "animals": lambda work: animals_trial(arguments.animals, work / "images"),
        "garments": lambda _: garments_trial(arguments.cache, arguments.garments, batch_norm=False),
        "garments-batch-norm": lambda _: garments_trial(arguments.cache, arguments.garments, batch_norm=True),
    }
    results = {}
    for name in arguments.network:
        with tempfile.TemporaryDirectory() as work:
            results[name] = run(trials[name](Path(work)), Path(work))
        print(json.dumps({name: results[name]}), flush=True)
    print(table_text(results))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
