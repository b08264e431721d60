"""Why does the classifier do badly on its own images? The usual silent errors: class order, RGB/BGR, mean and std."""

from collections import Counter
from dataclasses import replace

import numpy as np

from grood_edge.arrays import Frames
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
from grood_edge.progress import Progress, silent

__all__ = ["require_plausible_classes", "require_plausible_preprocessing"]

DIAGNOSED = 128  # images that are run again
FIRST_LOOK = 32  # after so many, an alternative that is not ahead is given up
CLEAR_GAIN = 0.03  # in accuracy, and
CLEAR_Z = 3.0  # in standard errors of the paired difference (McNemar)
CLEAR_MARGIN_Z = 4.0  # in standard errors of the paired difference of margins, and
CLEAR_SHARE = 0.6  # of the images, so that a few outliers decide nothing
ORDER_GAIN = 0.2  # a permutation is fitted to the data, so it must win by far more, and
ORDER_SHARE = 0.5  # explain this share of the errors: wrong colours, too, confuse classes in some order
_LISTED_CLASSES = 2000  # beyond, the assignment problem gets too large to be worth it


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
    if best - accuracy < max(ORDER_GAIN, ORDER_SHARE * (1 - accuracy)) or not moved:
        return
    order = np.argsort(columns)
    shown = ", ".join(classes[i] for i in order[:8]) + (", ..." if len(order) > 8 else "")
    raise DatasetError(
        f"accuracy is {accuracy:.1%}, but {best:.1%} if the classifier's outputs meant the classes in this order: "
        f"{shown}. Sorted folder names are not the order that the classifier was trained with; give that order with "
        "--classes FILE"
    )


def require_plausible_preprocessing(
    classifier: ClassifierGraph,
    preprocessing: Preprocessing,
    samples: tuple[Sample, ...],
    progress: Progress = silent,
) -> None:
    """Stop when another preset's mean and std, or BGR instead of RGB, fits clearly better on some labelled images.

    Accuracy alone is too coarse: a network often classifies its training images perfectly with the wrong constants.
    So margins are compared as well, image by image, each divided by the spread of its own logits: a change of
    contrast, which scales all logits, gains nothing.

    Raises:
        DatasetError: says what fits better, by how much, and the option to set.
    """
    labelled = [sample for sample in samples if sample.label is not None][:DIAGNOSED]
    if not labelled:
        return
    frames = np.stack([preprocess_frame(sample.frame, preprocessing) for sample in labelled])
    labels = np.array([sample.label for sample in labelled])
    chosen = _margins(classifier, preprocessing, frames, labels)
    alternatives = _alternatives(classifier, preprocessing)
    better: dict[str, np.ndarray] = {}
    for index, (name, graph, other) in enumerate(alternatives):
        progress("comparing preprocessing", index + 1, len(alternatives))
        first = _margins(graph, other, frames[:FIRST_LOOK], labels[:FIRST_LOOK])
        if first.mean() < chosen[:FIRST_LOOK].mean():
            continue
        margins = _margins(graph, other, frames, labels)
        if _clearly_better(margins, chosen):
            better[name] = margins
    if better:
        name, margins = max(better.items(), key=lambda item: float(item[1].mean()))
        accuracy, before = (margins > 0).mean(), (chosen > 0).mean()
        gain = f"the accuracy is {accuracy:.1%} instead of {before:.1%}, and " if accuracy > before else ""
        raise DatasetError(
            f"{name} fits clearly better: on {len(labels)} images {gain}{(margins > chosen).mean():.0%} of them are "
            "told apart better. The preprocessing is probably not the one that the classifier was trained with; export "
            f"with {name}"
        )


def _clearly_better(margins: np.ndarray, chosen: np.ndarray) -> bool:
    won, lost = int(((margins > 0) & (chosen <= 0)).sum()), int(((margins <= 0) & (chosen > 0)).sum())
    accuracy_gain = (won - lost) / len(chosen)
    by_accuracy = accuracy_gain >= CLEAR_GAIN and won - lost >= CLEAR_Z * (won + lost) ** 0.5
    difference = margins - chosen
    z = difference.mean() / max(difference.std() / len(difference) ** 0.5, 1e-12)
    by_margin = won >= lost and z >= CLEAR_MARGIN_Z and (difference > 0).mean() >= CLEAR_SHARE
    return bool(by_accuracy or by_margin)


def _alternatives(
    classifier: ClassifierGraph, chosen: Preprocessing
) -> list[tuple[str, ClassifierGraph, Preprocessing]]:
    """Return what is worth a try, with the chosen resize and crop: other geometry is rarely a silent error."""
    options: list[tuple[str, ClassifierGraph, Preprocessing]] = []
    if classifier.channels == 3:
        flag = "--classifier-bgr" if not classifier.bgr else "RGB (no --classifier-bgr)"
        options.append((flag, replace(classifier, bgr=not classifier.bgr), chosen))
    size = (chosen.height, chosen.width)
    for name in PRESETS:
        preset = resolve_preprocessing(PreprocessingOptions(preset=name), classifier.channels, size)
        options.append((f"--preprocess {name}", classifier, replace(chosen, mean=preset.mean, std=preset.std)))
    scaled = replace(chosen, mean=(0.0,) * chosen.channels, std=(255.0,) * chosen.channels)
    options.append(("--mean 0 --std 1", classifier, scaled))
    return [(name, graph, p) for name, graph, p in options if (graph.bgr, p) != (classifier.bgr, chosen)]


def _margins(
    classifier: ClassifierGraph, preprocessing: Preprocessing, frames: Frames, labels: np.ndarray
) -> np.ndarray:
    """Logit of the label less the largest other logit, over the standard deviation of the image's logits: `[n]`."""
    model = open_ort(base_model(classifier, preprocessing).SerializeToString())
    step = 8 if classifier.dynamic_batch else 1
    runs = [model.run({"image": frames[i : i + step]}, ["logits"])["logits"] for i in range(0, len(frames), step)]
    logits = np.concatenate(runs).astype(np.float64)
    rows = np.arange(len(labels))
    own = logits[rows, labels]
    spread = np.maximum(logits.std(axis=1), 1e-12)
    logits[rows, labels] = -np.inf
    margins: np.ndarray = (own - logits.max(axis=1)) / spread
    return margins
