"""Choose the scale a of the distances, softmax(-a d), from pseudo-OOD: fit images whose patches were shuffled.

The paper has a = 1, whatever the length of the features. A network whose features are long or short is served better by
another scale, and images of shuffled patches, which have the network's textures and not its classes, tell which: see
docs/method.md for the measurements.
"""

from dataclasses import replace

import numpy as np

from grood_edge.arrays import Features, Frames
from grood_edge.contract import Scale, ScaleTrial
from grood_edge.export.bank import HeadPlan, bank_rows, heads_by_scale
from grood_edge.export.features import FeaturePass, FeatureTable, Reading
from grood_edge.export.leave_class_out import divisible_classes, leave_out
from grood_edge.ort import OrtModel
from grood_edge.progress import Progress, silent
from grood_edge.ranking import auroc
from grood_edge.scoring import ood_scores_by_scale

__all__ = ["SCALES", "choose_scale", "shuffled_features", "shuffled_patches"]

SCALES = tuple(2.0**i for i in range(-6, 4))
PATCHES = 4  # an image is cut into 4 x 4
SHUFFLED_IMAGES = 256
BANK_IMAGES = 1024
_BATCH = 32


def choose_scale(table: FeatureTable, shuffled: Features, plan: HeadPlan, progress: Progress = silent) -> Scale:
    """Choose the scale at which held-out fit images and shuffled ones are told apart best; 1 where none is better.

    Args:
        table: fit images; those that calibrate are not among them.
        shuffled: features float32 `[q, d]` of shuffled fit images.
        plan: the OOD prototypes.
        progress: called as the work goes on.
    """
    if divisible_classes(table) == 0:
        return Scale(1.0, "auto", "no class has two images, so none could be held out: 1 is the paper's", ())
    progress("choosing the scale", 0, None)
    half = leave_out(table, plan.seed, BANK_IMAGES)
    strangers = shuffled.astype(np.float64)
    plan = replace(plan, rows=None)
    rows = bank_rows(half.bank, half.prototypes, plan)
    heads = heads_by_scale(rows, half.prototypes, plan, SCALES)
    known, unknown = ood_scores_by_scale(half.scored, heads), ood_scores_by_scale(strangers, heads)
    found = [auroc(id_scores, ood_scores) for id_scores, ood_scores in zip(known, unknown, strict=True)]
    trials = tuple(ScaleTrial(scale, round(value, 6)) for scale, value in zip(SCALES, found, strict=True))
    progress("choosing the scale", 1, 1)
    best = max(trials, key=lambda trial: (trial.auroc, -abs(np.log(trial.scale))))
    reason = f"tells {len(shuffled)} images with shuffled patches from ID best"
    return Scale(best.scale, "auto", reason, trials)


def shuffled_features(model: OrtModel, fitted: FeaturePass, reading: Reading, progress: Progress = silent) -> Features:
    """Run the classifier graph over some fit frames with shuffled patches: float32 `[q, d]` in the reading's space."""
    chosen = np.linspace(0, len(fitted.frames) - 1, min(SHUFFLED_IMAGES, len(fitted.frames))).astype(np.int64)
    frames = shuffled_patches(fitted.frames[chosen], reading.seed)
    step = model.batch(_BATCH)
    runs = []
    for start in range(0, len(frames), step):
        progress("shuffling images", start, len(frames))
        runs.append(model.run({"image": frames[start : start + step]}, [reading.space])[reading.space])
    progress("shuffling images", len(frames), len(frames))
    features: Features = np.concatenate(runs)
    return features


def shuffled_patches(frames: Frames, seed: int) -> Frames:
    """Return the frames with their 4 x 4 patches in another order, each frame its own; a remainder stays in place."""
    rng = np.random.default_rng(seed)
    _, height, width, channels = frames.shape
    h, w = height // PATCHES, width // PATCHES
    shuffled: Frames = frames.copy()
    for frame in shuffled:
        kept = frame[: h * PATCHES, : w * PATCHES]
        patches = kept.reshape(PATCHES, h, PATCHES, w, channels).swapaxes(1, 2)
        order = rng.permutation(PATCHES * PATCHES)
        patches = patches[order // PATCHES, order % PATCHES].reshape(PATCHES, PATCHES, h, w, channels)
        kept[:] = patches.swapaxes(1, 2).reshape(kept.shape)
    return shuffled
