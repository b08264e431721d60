"""The analytic head beside the autograd way, and beside pytorch-ood's detectors on the same features; one thread.

    python benchmarks/head_speed.py [--quick] [--work DIR] [--json FILE]

All have the same fit images: about 1,000 features of EfficientNet-Lite0 (see setting.py). The scores of the autograd
way are held against `scoring.py` first. pytorch-ood imports torchvision for its data sets; where that is not there, an
empty module stands in for it, which the three detectors do not notice.

Times are CPU time of the process, right after a call of the same side. Without that one, the 5 MB of bank rows come
from cache or memory as it happens, and the head takes two to three times as long.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from head_alone import ALONE, HeadAlone
from onnx import numpy_helper
from other_ways import autograd_scores, search_name
from ratios import Found, Line, Target, Times, interleaved, ratio_of, run_as_script
from setting import Setting, prepared, test_features

from grood_edge.artifact import read_artifact
from grood_edge.scoring import Head, OodHead, class_distances, ood_scores
from grood_edge.stored_head import head_from_model

ROUNDS, SECONDS = 6, 1.5
BATCHES = (1, 32)
SPEED_UP = Target("at least", 50)
TOLERANCE = 2e-3  # of log S: float32 on both sides
Score = Callable[[np.ndarray], Any]


def measured(work: Path, quick: bool) -> Found:
    """Compare each head with the autograd way, and the first with the detectors, in both batch sizes."""
    setting = prepared(work)
    torch.set_num_threads(1)
    features, search = test_features(setting), search_name()
    lines, errors = [], {}
    detectors, skipped = detector_scores(setting)
    for name, head in heads_of(setting).items():
        autograd = autograd_scores(head, search)
        errors[name] = largest_error(head, features, (autograd, HeadAlone(head)))
        way = f"autograd + {search}" if len(head.bank) else "autograd"
        others = {way: autograd, **(detectors if name.startswith("one OOD prototype, 1") else {})}
        classes, dimension = head.prototypes.shape
        section = f"Head alone: {name}; {classes} classes, d {dimension}, 1 thread"
        for batch in BATCHES:
            rounds = rounds_of(head, others, features[:batch], quick)
            for index, other in enumerate(others, 1):
                target = SPEED_UP if index == 1 and batch == 32 else None
                what = f"{other}, batch {batch}"
                lines.append(Line(section, what, "analytic head", ratio_of(rounds, index, 0), "ms", target))
    return Found(tuple(lines), tuple(skipped), {"largest error of log S": errors})


def rounds_of(head: Head, others: dict[str, Score], rows: np.ndarray, quick: bool) -> list[Times]:
    """Time the head, opened anew each round, and the others; milliseconds."""
    rounds = []
    for _ in range(1 if quick else ROUNDS):
        sides: list[Score] = [HeadAlone(head), *others.values()]
        calls = [partial(side, rows) for side in sides]
        seconds, least = (0.0, 2) if quick else (SECONDS, 10)
        rounds.append(1000 * interleaved(calls, seconds, least, warm_up=2, timing=ALONE))
    return rounds


def heads_of(setting: Setting) -> dict[str, Head]:
    """Return the heads that are timed: as published, as exported by default, and without a bank."""
    paper, three = (head_from_model(read_artifact(path).model) for path in (setting.paper, setting.three))
    one = OodHead(paper.ood_heads[0].prototype, np.zeros(0))
    return {
        f"one OOD prototype, {len(paper.bank):,} float32 rows": paper,
        f"three OOD prototypes, {len(three.bank):,} int8 rows": three,
        "one OOD prototype, no bank": Head(paper.prototypes, paper.bank[:0], (one,)),
    }


def largest_error(head: Head, features: np.ndarray, ways: Sequence[Score]) -> list[float]:
    """Hold scores against `scoring.py`; a way that computes something else is not to be timed."""
    expected = ood_scores(features.astype(np.float64), head)
    errors = [float(np.abs(way(features) - expected).max()) for way in ways]
    if max(errors) > TOLERANCE:
        raise SystemExit(f"ood_score differs from scoring.py by {errors}; expected at most {TOLERANCE}")
    return errors


def detector_scores(setting: Setting) -> tuple[dict[str, Score], list[tuple[str, str]]]:
    """Fit pytorch-ood's KNN, ViM and Mahalanobis to the bank's features; without it say why they are missing."""
    real = importlib.util.find_spec("torchvision") is not None
    if not real:
        sys.meta_path.append(_StandIn())
    try:
        from pytorch_ood.detector import KNN, Mahalanobis, ViM
    except Exception as error:  # other people's imports can fail in any way
        return {}, [("pytorch-ood: KNN, ViM, Mahalanobis", f"{type(error).__name__}: {error}")]
    head = head_from_model(read_artifact(setting.paper).model)
    features = torch.from_numpy(head.bank.astype(np.float32))
    labels = torch.from_numpy(class_distances(head.bank, head.prototypes).argmin(axis=1))
    weight, bias = last_layer(setting.classifier)
    detectors = {
        "pytorch-ood KNN (k 50)": KNN(None),
        "pytorch-ood ViM (64)": ViM(None, 64, torch.from_numpy(weight), torch.from_numpy(bias)),
        "pytorch-ood Mahalanobis": Mahalanobis(None),
    }
    for detector in detectors.values():
        detector.fit_features(features, labels)
    notes = [] if real else [("torchvision", "not there; an empty module stood in while pytorch-ood was imported")]
    return {name: _torch_score(detector) for name, detector in detectors.items()}, notes


def _torch_score(detector: Any) -> Score:
    return lambda rows: detector.predict_features(torch.from_numpy(rows)).numpy()


def last_layer(classifier: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return weight `[classes, d]` and bias of the network's last layer."""
    graph = onnx.load(classifier).graph
    gemm = [node for node in graph.node if node.op_type == "Gemm"][-1]
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return values[gemm.input[1]].copy(), values[gemm.input[2]].copy()


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers for torchvision with empty modules, whose names are all empty classes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


if __name__ == "__main__":
    run_as_script(__doc__, measured)
