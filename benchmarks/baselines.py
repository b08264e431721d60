"""What both benchmarks share: baselines on the features and logits of the artifact itself, and one sorted table.

All scores are higher for more OOD, in NumPy, from the same images: MSP (Hendrycks, Gimpel 2017), energy (Liu et al.
2020), the distance to the 10th nearest unit feature (Sun et al. 2022), and Mahalanobis with one covariance (Lee et al.
2018), shrunk after Ledoit and Wolf because a benchmark may have fewer fit images than features.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from grood_edge.artifact import read_artifact
from grood_edge.evaluate.metrics import auroc, fpr95
from grood_edge.export.calibration import shipped_scores
from grood_edge.outputs import Outputs, concatenated
from grood_edge.runtime import open_session

Row = dict[str, float]  # "<set> auroc" and "<set> fpr95" of each OOD set, and "mean": of the AUROCs
Float = NDArray[np.float64]


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the export options that were given on the command line: `space`, and `bank` as a number or a word."""
    chosen = {name: getattr(arguments, name) for name in ("space", "bank") if getattr(arguments, name) is not None}
    return {name: int(value) if value.isdecimal() else value for name, value in chosen.items()}


def outputs_of(artifact: Path, batches: Iterable[Sequence[np.ndarray]]) -> Outputs:
    """Run an artifact over batches of frames."""
    with open_session(artifact) as session:
        return concatenated([session.infer(batch) for batch in batches])


def scored_by(artifact: Path, outputs: Outputs) -> Outputs:
    """Score outputs of another artifact of the same network with this one's head: the images need not run again."""
    model = read_artifact(artifact)
    contract = model.contract
    scores = shipped_scores(model.model, getattr(outputs, contract.space), contract.space)
    alarms = contract.calibration.rule(len(contract.classes)).is_alarm(scores, outputs.class_id)
    return replace(outputs, ood_score=scores, is_ood=alarms)


def bank_loss(test: tuple[Outputs, Outputs], ood: Mapping[str, tuple[Outputs, Outputs]]) -> dict[str, float]:
    """Compare (shipped bank, full float bank): largest loss of AUROC in points, and share of ID decisions changed."""
    losses = [
        auroc(test[1].ood_score, full.ood_score) - auroc(test[0].ood_score, small.ood_score)
        for small, full in ood.values()
    ]
    return {"auroc_points": 100 * max(losses), "changed": float((test[0].is_ood != test[1].is_ood).mean())}


def energy(scored: Outputs) -> Float:
    """Minus the log of the sum of the exponential logits."""
    score: Float = -np.logaddexp.reduce(scored.logits.astype(np.float64), axis=1)
    return score


def msp(scored: Outputs) -> Float:
    """Minus the log of the largest softmax probability: the logarithm has no ties near one."""
    logits = scored.logits.astype(np.float64)
    score: Float = np.logaddexp.reduce(logits, axis=1) - logits.max(axis=1)
    return score


def knn(fit: Outputs, scored: Outputs, neighbours: int = 10) -> Float:
    """Distance of the unit feature to the tenth nearest of the fit images."""
    bank, rows = (o.features / np.linalg.norm(o.features, axis=1, keepdims=True) for o in (fit, scored))
    distances, _ = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(bank).kneighbors(rows)
    score: Float = distances[:, -1].astype(np.float64)
    return score


def mahalanobis(fit: Outputs, labels: NDArray[np.int64], scored: Outputs) -> Float:
    """Squared distance to the nearest class mean, in the metric of the covariance within classes."""
    features = fit.features.astype(np.float64)
    means = np.stack([features[labels == c].mean(axis=0) for c in np.unique(labels)])
    precision: Float = LedoitWolf(assume_centered=True).fit(features - means[labels]).precision_
    factor = np.linalg.cholesky(precision)
    rows, centres = scored.features.astype(np.float64) @ factor, means @ factor
    score: Float = np.min([((rows - centre) ** 2).sum(axis=1) for centre in centres], axis=0)
    return score


def row_of(test: np.ndarray, ood: Mapping[str, np.ndarray]) -> Row:
    """Return AUROC and FPR95 (share of OOD accepted when 95 % of ID is accepted) of each OOD set."""
    row = {f"{name} auroc": auroc(test, scores) for name, scores in ood.items()}
    mean = float(np.mean(list(row.values())))
    return {**row, **{f"{name} fpr95": fpr95(test, scores) for name, scores in ood.items()}, "mean": mean}


def baseline_rows(fit: Outputs, labels: NDArray[np.int64], test: Outputs, ood: Mapping[str, Outputs]) -> dict[str, Row]:
    """Return the four baselines' rows."""
    methods: dict[str, Callable[[Outputs], Float]] = {
        "MSP": msp,
        "energy": energy,
        "KNN-10": lambda scored: knn(fit, scored),
        "Mahalanobis": lambda scored: mahalanobis(fit, labels, scored),
    }
    return {
        name: row_of(score(test), {kind: score(outputs) for kind, outputs in ood.items()})
        for name, score in methods.items()
    }


def mean_rows(seeds: Sequence[Mapping[str, Row]]) -> dict[str, Row]:
    """Average each number over the seeds."""
    first = seeds[0]
    return {m: {key: float(np.mean([rows[m][key] for rows in seeds])) for key in row} for m, row in first.items()}


def table_text(rows: Mapping[str, Row]) -> str:
    """Return the rows as a markdown table of AUROC in percent, best mean first."""
    names = [key.removesuffix(" auroc") for key in next(iter(rows.values())) if key.endswith(" auroc")]
    lines = [f"| AUROC, % | {' | '.join(names)} | mean |", "|---" * (len(names) + 2) + "|"]
    for method, row in sorted(rows.items(), key=lambda item: -item[1]["mean"]):
        values = [row[f"{name} auroc"] for name in names] + [row["mean"]]
        lines.append(f"| {method} | {' | '.join(f'{100 * value:.1f}' for value in values)} |")
    return "\n".join(lines)
