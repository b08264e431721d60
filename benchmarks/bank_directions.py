"""What bank rows on few principal directions would lose and save. Not built in: docs/performance.md says why.

    python benchmarks/bank_directions.py [--data DIR] [--seeds N] [--quick]

Rows b_j become c + V V^T (b_j - c), with c the mean class prototype and V the first principal directions of b_j - c at
unit length; features keep what lies outside of these. Time: graphs as in head_cost.py with float32 coordinates, over
the network without a head. Loss, with DIR (see animals.py) of which seeded 12 classes are held out as OOD and a quarter
of the images of the others is ID: the head that `export` fits with its defaults but all rows, and two at scale 1,
against the same over whole int8 rows. Points of AUROC and FPR95, and the share of ID images decided otherwise when 5 %
are alarms; the largest over sets and seeds, and the mean.
"""

import argparse
import itertools
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
from animals import OPTIONS, outputs_of_folder, trained_network
from head_cost import LEAST, SECONDS, Case, Kind, models_of, sides_of, times_of
from onnx import helper, numpy_helper
from ratios import Line, Target, ratio_of, table_text

from grood_edge.evaluate.metrics import auroc, fpr95
from grood_edge.export import ExportOptions, bank, export_model, fit
from grood_edge.export.bank import HeadPlan
from grood_edge.export.table import FeatureTable
from grood_edge.images import find_images
from grood_edge.scoring import ood_scores
from grood_edge.stored_head import rounded_rows

COUNTS = (16, 32, 64, 128)
HELD_OUT = 12
CASES = (
    Case("efficientnet-lite0", 100, 1, 1, (Kind(1, 1000, target=1.03), Kind(3, 1000, target=1.05))),
    Case("efficientnet-lite0", 1000, 1, 1, (Kind(1, 2000, target=1.10), Kind(3, 2000, target=1.10))),
)


@dataclass(frozen=True)
class Fitted:
    """What `export` fitted a head from, and features float32 `[n, d]` of ID test images and of each OOD set."""

    table: FeatureTable
    plan: HeadPlan
    test: np.ndarray
    ood: list[np.ndarray]


def fitted(data: Path, seed: int) -> Fitted:
    """Export a linear head on EfficientNet-Lite0 for most classes, and keep what its head was fitted from."""
    folders: dict[str, list[Path]] = {}
    for part in ("id/train", "id/test", "near", "far"):
        for folder in sorted((data / part).iterdir()):
            folders.setdefault(folder.name, []).extend(find_images(folder))
    rng = np.random.default_rng(seed)
    held = set(rng.permutation(sorted(folders))[:HELD_OUT])
    with tempfile.TemporaryDirectory() as name:
        train, test, out, artifact = (Path(name) / part for part in ("train", "test", "held", "model.onnx"))
        for label, images in folders.items():
            for index, image in enumerate(rng.permutation(np.array(images, object))):
                folder = (out if label in held else test if index % 4 == 0 else train) / label
                folder.mkdir(parents=True, exist_ok=True)
                shutil.copy(image, folder / f"{index}{image.suffix}")
        with mock.patch.object(fit, "fit_head", wraps=bank.fit_head) as fit_head:
            export_model(trained_network(train), train, artifact, ExportOptions(preprocessing=OPTIONS, seed=seed))
        sets = (test, out, data / "clutter", data / "texture")
        id_features, *ood = (outputs_of_folder(artifact, images).features for images in sets)
    table, plan = fit_head.call_args.args
    return Fitted(table, plan, id_features, ood)


def scores_of(case: Fitted, plan: HeadPlan, count: int | None) -> list[np.ndarray]:
    """Return the scores of ID and OOD sets, with rows projected on `count` directions, or whole int8 rows."""

    def projected(rows: np.ndarray, prototypes: np.ndarray, _: str) -> np.ndarray:
        center = prototypes.mean(axis=0)
        x = rows - center
        directions = np.linalg.svd(x / np.linalg.norm(x, axis=1, keepdims=True), full_matrices=False)[2][:count]
        return np.asarray(center + x @ directions.T @ directions)

    with mock.patch.object(bank, "rounded_rows", projected if count else rounded_rows):
        head, _ = bank.fit_head(case.table, plan)
    return [ood_scores(x.astype(np.float64), head) for x in (case.test, *case.ood)]


def losses(case: Fitted, plan: HeadPlan, count: int) -> np.ndarray:
    """Return the largest and the mean loss of AUROC, the largest of FPR95, and the share decided otherwise, in %."""
    (test, *ood), (few, *few_ood) = scores_of(case, plan, None), scores_of(case, plan, count)
    lost = [auroc(test, a) - auroc(few, b) for a, b in zip(ood, few_ood, strict=True)]
    missed = [fpr95(few, b) - fpr95(test, a) for a, b in zip(ood, few_ood, strict=True)]
    changed = ((test > np.quantile(test, 0.95)) != (few > np.quantile(few, 0.95))).mean()
    return 100 * np.array([max(lost), np.mean(lost), max(missed), changed])


def loss_table(data: Path, seeds: int) -> str:
    """Return the losses as a markdown table."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    for case in (fitted(data, seed) for seed in range(seeds)):
        print(
            f"{len(case.table.labels)} fit images, {len(case.plan.sources)} OOD prototypes, scale {case.plan.scale:g}"
        )
        plan = replace(case.plan, rows=None)
        plans = {"default": plan, "scale 1": replace(plan, scale=1.0)}
        plans["one OOD prototype, scale 1"] = replace(plan, sources=plan.sources[:1], scale=1.0)
        for (name, chosen), count in itertools.product(plans.items(), COUNTS):
            found.setdefault((name, count), []).append(losses(case, chosen, count))
    rows = ["| head | directions | largest loss | mean | FPR95 | decided otherwise |", "|---|---|---:|---:|---:|---:|"]
    for (name, count), lost in found.items():
        high, mean = np.max(lost, axis=0), np.mean(lost, axis=0)[1]
        rows.append(f"| {name} | {count} | {high[0]:.3f} | {mean:.3f} | {high[2]:.2f} | {high[3]:.2f} % |")
    return "\n".join(rows)


def in_coordinates(model: bytes, count: int) -> bytes:
    """Return an artifact's graph with its bank's rows as coordinates on their principal directions."""
    changed = onnx.load_model_from_string(model)
    stored = {tensor.name: tensor for tensor in changed.graph.initializer}
    rows, scale = stored["grood/bank"], stored["grood/bank_scale"]
    values = numpy_helper.to_array(rows) * numpy_helper.to_array(scale)[:, None]
    directions = np.linalg.svd(values, full_matrices=False)[2][:count].T.copy()
    rows.CopyFrom(numpy_helper.from_array((values @ directions).T.copy(), "grood/coordinates"))
    scale.CopyFrom(numpy_helper.from_array(directions, "grood/directions"))
    nodes = {node.name: node for node in changed.graph.node}
    for name, inputs in (("bank_rows", ["h", "directions"]), ("h_dot_b", ["bank_rows", "coordinates"])):
        node = nodes[f"grood/{name}"]
        node.CopyFrom(helper.make_node("Gemm", [f"grood/{part}" for part in inputs], list(node.output), node.name))
    return bytes(changed.SerializeToString())


def time_lines(quick: bool) -> list[Line]:
    """Time whole rows and coordinates in turn."""
    lines = []
    for case in CASES:
        models = models_of(case)
        tried = [(kind, model, 0) for kind, model in zip(case.kinds, models.artifacts, strict=True)]
        tried += [(kind, in_coordinates(model, n), n) for kind, model, _ in tried for n in (32, 64)]
        models = replace(models, artifacts=tuple(model for _, model, _ in tried))
        count, seconds, least = (1, 0.0, 2) if quick else (case.rounds, SECONDS, LEAST)
        rounds = [times_of(sides_of(models, case), seconds, 1, least) for _ in range(count)]
        for side, (kind, _, directions) in enumerate(tried, 2):
            what = kind.text() + (f" on {directions} directions" if directions else "")
            target = Target("at most", kind.target or 0)
            lines.append(Line(case.text(), what, "network", ratio_of(rounds, side, 1), "ms", target))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the animals; without it, time alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few calls of each graph: shows that it works")
    arguments = parser.parse_args()
    if arguments.data:
        print(loss_table(arguments.data, arguments.seeds))
    print(table_text(time_lines(arguments.quick)))
