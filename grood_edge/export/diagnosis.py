"""Why does the classifier do badly on its own images? The usual silent errors: class order, RGB/BGR, mean and std."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from grood_edge.errors import DatasetError
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.export.dataset import Sample
from grood_edge.export.graph import base_model
from grood_edge.ort import open_ort
from grood_edge.preprocessing import (
    PRESETS,
    Preprocessing,
    PreprocessingOptions,
    preprocess_frame,
    resolve_preprocessing,
)

__all__ = ["require_plausible_classes", "require_plausible_preprocessing"]

GOOD_ENOUGH = 0.98  # above it, nothing else can fit clearly better
CLEAR_GAIN = 0.03  # in accuracy, and
CLEAR_Z = 3.0  # in standard errors of the paired difference (McNemar)
ORDER_GAIN = 0.2  # a permutation is fitted to the data, so it must win by far more
_LISTED_CLASSES = 2000  # beyond, the assignment problem gets too large to be worth it


@dataclass(frozen=True)
class _Fit:
    name: str
    correct: np.ndarray


def require_plausible_classes(confusion: Counter[tuple[int, int]], classes: tuple[str, ...]) -> None:
    """Stop when another order of the classes fits clearly better.

    Raises:
        DatasetError: says which order fits, and how to give it.
    """
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn, which `export` installs

    if len(classes) > _LISTED_CLASSES:
        return
    counts = np.zeros((len(classes), len(classes)))
    for (label, prediction), n in confusion.items():
        counts[label, prediction] = n
    rows, columns = linear_sum_assignment(-counts)
    accuracy, best = np.trace(counts) / counts.sum(), counts[rows, columns].sum() / counts.sum()
    moved = [(r, c) for r, c in zip(rows, columns, strict=True) if r != c and counts[r, c] > counts[r, r]]
    if best - accuracy < ORDER_GAIN or not moved:
        return
    order = np.argsort(columns)
    shown = ", ".join(classes[i] for i in order[:8]) + (", ..." if len(order) > 8 else "")
    raise DatasetError(
        f"accuracy is {accuracy:.1%}, but {best:.1%} if the classifier's outputs meant the classes in this order: "
        f"{shown}. Sorted folder names are not the order that the classifier was trained with; give that order with "
        "--classes FILE"
    )


def require_plausible_preprocessing(
    classifier: ClassifierGraph, preprocessing: Preprocessing, samples: tuple[Sample, ...], accuracy: float
) -> None:
    """Stop when another preset, or BGR instead of RGB, fits clearly better on some of the images.

    Raises:
        DatasetError: says what fits better, by how much, and the option to set.
    """
    labelled = [sample for sample in samples if sample.label is not None]
    if accuracy >= GOOD_ENOUGH or not labelled:
        return
    chosen = _Fit("as given", _correct(classifier, preprocessing, labelled))
    fits = [_Fit(name, _correct(graph, p, labelled)) for name, graph, p in _alternatives(classifier, preprocessing)]
    best = max(fits, key=lambda fit: int(fit.correct.sum()), default=chosen)
    won, lost = int((best.correct & ~chosen.correct).sum()), int((chosen.correct & ~best.correct).sum())
    gain = (won - lost) / len(labelled)
    if won > lost and gain >= CLEAR_GAIN and (won - lost) / (won + lost) ** 0.5 >= CLEAR_Z:
        raise DatasetError(
            f"accuracy on {len(labelled)} images is {chosen.correct.mean():.1%} as given, but "
            f"{best.correct.mean():.1%} with {best.name}: the preprocessing is probably not the one that the "
            "classifier was trained with. "
            f"Export with {best.name}"
        )


def _alternatives(
    classifier: ClassifierGraph, chosen: Preprocessing
) -> list[tuple[str, ClassifierGraph, Preprocessing]]:
    options: list[tuple[str, ClassifierGraph, Preprocessing]] = []
    if classifier.channels == 3:
        flag = "--classifier-bgr" if not classifier.bgr else "no --classifier-bgr"
        options.append((flag, replace(classifier, bgr=not classifier.bgr), chosen))
    size = (chosen.height, chosen.width)
    for name in PRESETS:
        resolved = resolve_preprocessing(PreprocessingOptions(preset=name), classifier.channels, size)
        options.append((f"--preprocess {name}", classifier, resolved))
    scaled = replace(chosen, mean=(0.0,) * chosen.channels, std=(255.0,) * chosen.channels)
    options.append(("--mean 0 --std 1", classifier, scaled))
    same = (classifier.bgr, replace(chosen, preset=""))
    return [(name, graph, p) for name, graph, p in options if (graph.bgr, replace(p, preset="")) != same]


def _correct(classifier: ClassifierGraph, preprocessing: Preprocessing, samples: list[Sample]) -> np.ndarray:
    model = open_ort(base_model(classifier, preprocessing).SerializeToString())
    step = 8 if classifier.dynamic_batch else 1
    frames = np.stack([preprocess_frame(sample.frame, preprocessing) for sample in samples])
    logits = np.concatenate(
        [model.run({"image": frames[i : i + step]}, ["logits"])["logits"] for i in range(0, len(frames), step)]
    )
    return np.asarray(logits.argmax(axis=1) == [sample.label for sample in samples])
