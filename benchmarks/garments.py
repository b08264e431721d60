"""Garments: a small CNN trained on eight classes of Fashion-MNIST, with sandals and bags held out as near-OOD.

    python benchmarks/garments.py [--cache DIR] [--data DIR] [--batch-norm] [--seeds N]
        [--json FILE] [--ood-prototype NAME ...] [--space SPACE] [--bank ROWS]

The images come from Debian's package dataset-fashion-mnist (MIT licence), fetched with `apt-get download` and
unpacked without root into the cache; `--data` names a folder that holds the four idx.gz files instead. The trained
network is kept in the cache. Training takes a few minutes on one thread. Half of the test images calibrate, the other
half is scored against images of the held-out classes, digits, inverted garments and uniform noise.
"""

import argparse
import gzip
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import Row, bank_loss, baseline_rows, given, mean_rows, outputs_of, row_of, scored_by, table_text
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from grood_edge.evaluate.metrics import beta_binomial_band
from grood_edge.export import ExportOptions, PreprocessingOptions, export_model

CACHE = Path.home() / ".cache" / "grood-edge-benchmarks"
NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
HELD_OUT = (5, 8)
KEPT = tuple(label for label in range(10) if label not in HELD_OUT)
SIDE = 28
FEATURES = 128
RECIPES = {False: (3, 2e-3), True: (4, 4e-3)}  # epochs and peak rate without and with batch norm
BATCH = 128
FIT_IMAGES = 10_000

Images = NDArray[np.uint8]
Classes = NDArray[np.int64]


@dataclass(frozen=True)
class Garments:
    """Frames uint8 `[n, 28, 28, 1]` and labels 0..7 of the eight kept classes, and the OOD sets by name."""

    train: Images
    train_labels: Classes
    test: Images
    test_labels: Classes
    ood: dict[str, Images]


class SmallCnn(nn.Module):
    """Six convolutions with ReLU, global average pooling (features `[N, 128]`), one linear layer.

    Without batch norm the features are long (median norm about 30, with it 9), and noise images lie elsewhere: the
    sources of the OOD prototype rank differently in the two. `shift` is subtracted from, and `scale` divides, pixels
    in 0..1.
    """

    def __init__(self, batch_norm: bool, classes: int = len(KEPT)) -> None:
        super().__init__()
        self.shift, self.scale = (0.5, 0.5) if batch_norm else (0.0, 1.0)
        self.epochs, self.peak_rate = RECIPES[batch_norm]
        widths, strides = (1, 32, 32, 64, 64, 128, FEATURES), (1, 2, 1, 2, 1, 1)
        layers: list[nn.Module] = []
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True):
            convolution = nn.Conv2d(before, after, 3, stride, 1, bias=not batch_norm)
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()] if batch_norm else [convolution, nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return pooled features."""
        pooled: torch.Tensor = self.layers(x).mean((2, 3))
        return pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.features(x))
        return logits


def dataset_folder(cache: Path) -> Path:
    """Fetch and unpack the Debian package into the cache, unless it is there, and return the folder of its files."""
    folder = cache / "dataset-fashion-mnist" / "usr" / "share" / "datasets" / "fashion-mnist"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "dataset-fashion-mnist"], cwd=cache, check=True)
        package = max(cache.glob("dataset-fashion-mnist_*.deb"))
        subprocess.run(["dpkg", "-x", package, cache / "dataset-fashion-mnist"], check=True)
    return folder


def _idx(path: Path) -> Images:
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, ">i4", dimensions, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _digits() -> Images:
    small = (load_digits().images * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in small]
    return np.stack([np.asarray(image) for image in large])[..., None]


def load_garments(folder: Path) -> Garments:
    """Read the idx files and split off the held-out classes."""
    images = {part: _idx(folder / f"{part}-images-idx3-ubyte.gz")[..., None] for part in ("train", "t10k")}
    labels = {part: _idx(folder / f"{part}-labels-idx1-ubyte.gz").astype(np.int64) for part in ("train", "t10k")}
    kept = {part: np.isin(labels[part], KEPT) for part in images}
    test = images["t10k"][kept["t10k"]]
    rng = np.random.default_rng(0)
    return Garments(
        train=images["train"][kept["train"]],
        train_labels=np.searchsorted(KEPT, labels["train"][kept["train"]]),
        test=test,
        test_labels=np.searchsorted(KEPT, labels["t10k"][kept["t10k"]]),
        ood={
            "near": images["t10k"][~kept["t10k"]],
            "digits": _digits(),
            "inverted": 255 - test[:2000],
            "noise": rng.integers(0, 256, (2000, SIDE, SIDE, 1), dtype=np.uint8),
        },
    )


def tensor_from_frames(frames: Images, network: SmallCnn) -> torch.Tensor:
    """Return the network's input `[n, 1, 28, 28]`."""
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - network.shift) / network.scale


def train_network(network: SmallCnn, frames: Images, labels: Classes) -> SmallCnn:
    """Train on one thread: AdamW, one cycle, random mirroring."""
    # channels last: a third less time on one thread
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = tensor_from_frames(frames, network), torch.from_numpy(labels)
    steps = network.epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, network.peak_rate, total_steps=steps)
    for epoch in range(network.epochs):
        order = torch.randperm(len(x))
        for start in range(0, len(x) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            mirrored = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, x[rows].flip(3), x[rows])
            mirrored = mirrored.contiguous(memory_format=torch.channels_last)
            loss = nn.functional.cross_entropy(network(mirrored), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {network.epochs}: loss {loss.item():.3f}", flush=True)
    return network.eval()


def trained_network(garments: Garments, cache: Path, batch_norm: bool, seed: int = 0) -> SmallCnn:
    """Return the network from the cache, or train it and keep it there."""
    path = cache / f"garments-{'batch-norm' if batch_norm else 'plain'}-{seed}.pt"
    torch.manual_seed(seed)
    network = SmallCnn(batch_norm)
    if path.is_file():
        network.load_state_dict(torch.load(path, weights_only=True))
        return network.eval()
    torch.set_num_threads(1)
    train_network(network, garments.train, garments.train_labels)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), path)
    return network


def balanced_rows(labels: Classes, count: int, seed: int) -> Classes:
    """Return `count` rows, the same number of each class, in random order."""
    rng = np.random.default_rng(seed)
    each = count // len(KEPT)
    rows = [rng.choice(np.flatnonzero(labels == c), each, replace=False) for c in range(len(KEPT))]
    return rng.permutation(np.concatenate(rows))


def batches(frames: Images) -> Iterator[list[np.ndarray]]:
    """Cut frames into batches of 250."""
    for start in range(0, len(frames), 250):
        yield list(frames[start : start + 250])


def run(garments: Garments, network: SmallCnn, seed: int, sources: list[str], extra: dict[str, Any]) -> dict[str, Any]:
    """Export once for each source of the OOD prototype, and measure beside the baselines."""
    chosen = balanced_rows(garments.train_labels, FIT_IMAGES, seed)
    fit, labels = garments.train[chosen], garments.train_labels[chosen]
    order = np.random.default_rng(seed).permutation(len(garments.test))
    calibration, test = order[: len(order) // 2], order[len(order) // 2 :]
    options = ExportOptions(
        calibration_data=[(garments.test[calibration], garments.test_labels[calibration])],
        preprocessing=PreprocessingOptions(input_size=(SIDE, SIDE), mean=(network.shift,), std=(network.scale,)),
        classes=tuple(NAMES[label] for label in KEPT),
        seed=seed,
    )
    rows: dict[str, Row] = {}
    result: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        first, artifact, other = (Path(folder) / f"{name}.onnx" for name in ("first", "garments", "other"))
        export_model(network, [(fit, labels)], first, replace(options, ood_prototype="mean", bank="none", scale=1.0))
        test_outputs = outputs_of(first, batches(garments.test[test]))
        ood = {name: outputs_of(first, batches(frames)) for name, frames in garments.ood.items()}
        for source in sources:
            chosen_options = replace(options, ood_prototype=source, force=True, **extra)
            started = time.monotonic()
            report = export_model(network, [(fit, labels)], artifact, chosen_options)
            result[f"seconds, {source}"] = round(time.monotonic() - started, 1)
            scored = scored_by(artifact, test_outputs)
            found = {name: scored_by(artifact, outputs) for name, outputs in ood.items()}
            rows[f"GROOD {source}"] = row_of(scored.ood_score, {name: o.ood_score for name, o in found.items()})
            entry = report.contract.calibration
            result[f"bank, {source}"] = report.contract.bank.rows
            result[f"scale, {source}"] = report.contract.scale.value
            result[f"false alarms, {source}"] = {
                "count": int(scored.is_ood.sum()),
                "m": len(scored),
                "band_99": beta_binomial_band(len(scored), entry.n, entry.k),
            }
            if source == "auto":
                export_model(network, [(fit, labels)], other, replace(chosen_options, bank="all", bank_dtype="float32"))
                full = {name: (found[name], scored_by(other, outputs)) for name, outputs in ood.items()}
                result["bank loss"] = bank_loss((scored, scored_by(other, test_outputs)), full)
        rows |= baseline_rows(outputs_of(first, batches(fit)), labels, test_outputs, ood)
    accuracy = float((test_outputs.class_id == garments.test_labels[test]).mean())
    return {**result, "accuracy": accuracy, "rows": rows}


def main() -> None:
    """Parse the options, run, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the images and the trained networks are kept")
    parser.add_argument("--data", type=Path, help="folder with the four idx.gz files of Fashion-MNIST")
    parser.add_argument("--batch-norm", action="store_true", help="the network with batch norm")
    parser.add_argument("--ood-prototype", nargs="+", default=["auto", "mean", "mixup", "noise", "origin"])
    parser.add_argument("--space", help="features or logits")
    parser.add_argument("--bank", help="auto, all, none or a number of rows")
    parser.add_argument("--seeds", type=int, default=1, help="networks trained, each with its own split")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    garments = load_garments(arguments.data or dataset_folder(arguments.cache))
    results = []
    for seed in range(arguments.seeds):
        network = trained_network(garments, arguments.cache, arguments.batch_norm, seed)
        results.append(run(garments, network, seed, arguments.ood_prototype, given(arguments)))
    print(table_text(mean_rows([result["rows"] for result in results])))
    for result in results:
        print(json.dumps({name: value for name, value in result.items() if name != "rows"}))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
