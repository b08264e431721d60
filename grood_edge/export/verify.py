"""Nothing is published before this: the artifact's own outputs against the classifier and against the definition."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from grood_edge.arrays import Features64, Flags, Frame, Frames, Logits, Scores64
from grood_edge.artifact import read_artifact
from grood_edge.camera_part import PREPARED, open_camera, prepared_model, simulated_frame
from grood_edge.contract import Contract
from grood_edge.errors import VerificationError
from grood_edge.export.dataset import Sample
from grood_edge.export.kept_frames import VERIFIED_SAMPLES
from grood_edge.ort import OrtModel, open_ort
from grood_edge.outputs import Outputs, outputs_from_arrays, select_rows
from grood_edge.preprocessing import Camera, Preprocessing, preprocess_frame
from grood_edge.probes import synthetic_frames
from grood_edge.scoring import MIN_RELATIVE_GAP, Head, SeenBank, nearest_rows
from grood_edge.stored_head import head_from_model

__all__ = [
    "HALF_LOGIT_TOLERANCE",
    "LOGIT_TOLERANCE",
    "Verification",
    "reopen",
    "require_equal_logits",
    "require_equal_resize",
    "require_equal_scores",
    "run_frames",
    "verification_frames",
]

CAMERA_FRAMES = 8  # real ones, enlarged to the camera's size; a raw frame is a hundred times larger
RESIZE_TOLERANCE = 1  # grey levels between the graph's resize and the host's

LOGIT_TOLERANCE = 1e-5  # relative to the largest logit: float32, one more fusion at the first convolution
HALF_LOGIT_TOLERANCE = 5e-3  # the same for a float16 classifier: 11 bits, rounded in other places after other fusions
SCORE_TOLERANCE = 2e-4  # float32 head against float64, where E = S^2 / max(s, s_i)^2 > MIN_GAP, or
DISTANCE_ROUNDING = 5e-7  # times a |h - p_ood| / sqrt(E), if that is more: 8 roundings of the distances behind log s
COSINE_ROUNDING = 5e-7  # times the condition of the expanded (h - p).(b - p), over E: it is a sum of four products
MIN_GAP = 1e-3  # nearer to a bank row float32 carries no score that precise, and decisions alone are compared
GAP_ROUNDING = 2e-6  # what float32 unit rows may add to E or take from it: 4e-7 seen, times five


@dataclass(frozen=True)
class Verification:
    """What was compared: number of frames, largest errors, and decisions that differ beyond one rank."""

    frames: int
    largest_logit_error: float
    largest_score_error: float
    compared_scores: int
    flips: int


def require_equal_logits(outputs: Outputs, classifier_logits: Logits, tolerance: float = LOGIT_TOLERANCE) -> float:
    """Return the largest error of the artifact's logits, relative to the largest logit.

    Raises:
        VerificationError: above the tolerance.
    """
    scale = max(1.0, float(np.abs(classifier_logits).max()))
    error = float(np.abs(outputs.logits.astype(np.float64) - classifier_logits).max()) / scale
    if not error <= tolerance:
        raise VerificationError(
            f"the artifact's logits differ from the classifier's by {error:.1e} of the largest logit (at most "
            f"{tolerance:.0e} is accepted); nothing was written. Please report this with the classifier's .onnx"
        )
    return error


def require_equal_scores(model: OrtModel, stored: bytes, contract: Contract, frames: Frames) -> Verification:
    """Compare the artifact's scores and decisions with the float64 definition over the statistics stored in it.

    Frames are run alone, in twos and threes where the batch is open, and all together.

    Raises:
        VerificationError: a score beyond the tolerance, a decision beyond one rank, or rows that depend on the batch.
    """
    head = head_from_model(stored)
    batches = (1, 2, 3, len(frames)) if contract.classifier.batch == "dynamic" else (1,)
    largest, worst, compared, flips = 0.0, 0.0, 0, 0
    for batch in batches:
        outputs = run_frames(model, frames, batch)
        _require_validity(outputs, contract.space)
        outputs = select_rows(outputs, outputs.valid)
        expected = _expected(getattr(outputs, contract.space).astype(np.float64), head)
        errors = np.abs(outputs.ood_score - expected.score)
        largest = max(largest, float(errors[expected.comparable].max(initial=0.0)))
        worst = max(worst, float((errors / expected.limit)[expected.comparable].max(initial=0.0)))
        compared = int(expected.comparable.sum())
        flips += _flips(outputs, expected, contract)
    if compared == 0:
        raise VerificationError(
            "no frame's score can be compared: all frames give the same gradients. Check the classifier's weights and "
            "the preprocessing; nothing was written"
        )
    if not worst <= 1.0 or flips:
        raise VerificationError(
            f"the artifact's ood_score differs from its definition by up to {largest:.1e} ({worst:.1f} times what "
            f"rounding explains) and {flips} decisions differ; nothing was written. Please report this with the "
            "classifier"
        )
    return Verification(len(frames), 0.0, largest, compared, flips)


def require_equal_resize(
    model: bytes, preprocessing: Preprocessing, samples: tuple[Sample, ...], tolerance: float = LOGIT_TOLERANCE
) -> None:
    """Hold the graph's own resize against the host's, on raw frames of the camera, and what follows it as well.

    Some real frames brought to the camera's size, a black, a white and a noisy one: the pixels are within one grey
    level, and the whole graph's logits are those of the graph without its camera part on the same pixels.

    Raises:
        VerificationError: a pixel or a logit differs by more, or a frame's pixels depend on the batch.
    """
    camera, raw = open_camera(model, preprocessing), preprocessing.camera
    if camera is None or raw is None:
        return
    whole, prepared = open_ort(model), open_ort(prepared_model(model, preprocessing))
    before: tuple[Frames, Frames] | None = None
    for rgb in _camera_frames(raw, samples):
        frame = simulated_frame(rgb, raw)[None]
        pixels = camera.run({"image": frame})[PREPARED]
        _require_pixels(pixels[0], preprocess_frame(rgb, preprocessing))
        expected = run_frames(prepared, pixels.astype(np.uint8), 1)
        require_equal_logits(run_frames(whole, frame, 1), expected.logits, tolerance)
        if before is not None and camera.batch(2) == 2:
            both = camera.run({"image": np.concatenate([before[0], frame])})[PREPARED]
            _require_pixels(both, np.concatenate([before[1], pixels]))
        before = frame, pixels


def _camera_frames(camera: Camera, samples: tuple[Sample, ...]) -> Iterator[Frame]:
    """Yield raw frames of the camera's size: RGB, or grey for a grey camera; one at a time."""
    rgb = replace(camera, layout="gray" if camera.layout == "gray" else "rgb")
    yield from (simulated_frame(sample.frame, rgb) for sample in samples[:CAMERA_FRAMES])
    yield from (np.full(rgb.shape, level, np.uint8) for level in (0, 255))
    yield np.random.default_rng(0).integers(0, 256, rgb.shape, np.uint8)


def _require_pixels(found: np.ndarray, host: np.ndarray) -> None:
    error = np.abs(found.astype(np.float64) - host).max()
    if not error <= RESIZE_TOLERANCE or (found != np.rint(found)).any():
        raise VerificationError(
            f"the graph's resize of a camera frame differs from the host's by up to {error:.2f} grey levels (at most "
            f"{RESIZE_TOLERANCE} whole level is accepted); nothing was written. Export without --camera-size, and "
            "please report this with the camera's size"
        )


@dataclass(frozen=True)
class _Expected:
    """The definition's scores float64 `[n]`, between which bounds float32 may fall, and how far it may be off.

    `comparable`: far enough from every bank row for numbers to be compared.
    """

    score: Scores64
    lowest: Scores64
    highest: Scores64
    limit: Scores64
    comparable: Flags


def _expected(features: Features64, head: Head) -> _Expected:
    center = head.prototypes.mean(axis=0)
    length = np.linalg.norm(features - center, axis=1)
    totals = np.zeros((4, len(features)))
    comparable = np.ones(len(features), bool)
    for ood_head, nearest in zip(head.ood_heads, nearest_rows(features, head), strict=True):
        prototype = ood_head.prototype - center
        seen = SeenBank.of(head.bank - center, prototype)
        distance = np.maximum(np.linalg.norm(features - ood_head.prototype, axis=1), seen.least)
        condition = np.zeros(len(features))
        if len(head.bank):  # how much larger than (h - p).(b - p) the terms are that it is the sum of
            rows = np.linalg.norm(head.bank[nearest.row] - center, axis=1)
            reach = np.linalg.norm(prototype)
            condition = (length + reach) * (rows + reach) / (distance * seen.lengths[nearest.row])
        rounding = GAP_ROUNDING * np.maximum(1.0, condition)
        below = 0.5 * np.log(np.maximum(nearest.gap - rounding, MIN_RELATIVE_GAP) / nearest.gap)
        above = 0.5 * np.log((nearest.gap + rounding) / nearest.gap)
        of_distance = DISTANCE_ROUNDING * head.scale * distance
        limit = np.maximum(SCORE_TOLERANCE, of_distance / np.sqrt(nearest.gap))
        limit = np.maximum(limit, COSINE_ROUNDING * condition / nearest.gap)
        low, high = nearest.score + below - of_distance, nearest.score + above + of_distance
        scores = (nearest.score, low, high)
        totals[:3] += np.stack([ood_head.score_map(score) for score in scores])
        totals[3] += limit * np.maximum(ood_head.score_map.slope_at(low), ood_head.score_map.slope_at(high))
        comparable &= nearest.gap > MIN_GAP
    return _Expected(totals[0], totals[1], totals[2], totals[3], comparable)


def _require_validity(outputs: Outputs, space: str) -> None:
    """A synthetic frame may overflow the network; then, and only then, it must be invalid and OOD."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (getattr(outputs, space) ** 2).sum(axis=1)
    finite = np.isfinite(squares) & np.isfinite(outputs.features).all(axis=1) & np.isfinite(outputs.logits).all(axis=1)
    if (outputs.valid != finite).any() or (~outputs.valid & ~outputs.is_ood).any():
        raise VerificationError(
            "the artifact's outputs 'valid' and 'is_ood' do not say which features and logits are finite; nothing was "
            "written. Please report this with the classifier"
        )


def _flips(outputs: Outputs, expected: _Expected, contract: Contract) -> int:
    """Count decisions that differ from the definition's by more than one rank, and by more than float32 explains."""
    rule = contract.calibration.rule(len(contract.classes))
    ranks = rule.ranks_of(outputs.class_id)
    may_be_ood = rule.counts(expected.highest.astype(np.float32), outputs.class_id) <= ranks
    may_be_id = rule.counts(expected.lowest.astype(np.float32), outputs.class_id) >= ranks - 1
    return int(np.where(outputs.is_ood, ~may_be_ood, ~may_be_id).sum())


def run_frames(model: OrtModel, frames: Frames, batch: int) -> Outputs:
    """Run uint8 frames `[n, h, w, c]` through an artifact in batches."""
    runs = [model.run({"image": frames[i : i + batch]}) for i in range(0, len(frames), batch)]
    return outputs_from_arrays({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})


def verification_frames(samples: tuple[Sample, ...], preprocessing: Preprocessing) -> Frames:
    """Return some real frames, preprocessed, the same ones mirrored, and the synthetic ones: uint8 `[n, h, w, c]`.

    They are the classifier's input, of a camera as well. The real ones often are bank rows, of which no score can be
    compared; their mirror images are not.
    """
    real = [preprocess_frame(sample.frame, preprocessing) for sample in samples[:VERIFIED_SAMPLES]]
    mirrored = [frame[:, ::-1] for frame in real]
    return np.stack([*real, *mirrored, *(frame for _, frame in synthetic_frames(replace(preprocessing, camera=None)))])


def reopen(path: Path) -> None:
    """Check the file that was written: whole, with matching digests, and opened by onnxruntime."""
    open_ort(read_artifact(path).model)
