"""Nothing is published before this: the artifact's own outputs against the classifier and against the definition."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grood_edge.arrays import Flags, Frames, Logits, Scores64
from grood_edge.artifact import read_artifact
from grood_edge.conformal import count_at_least
from grood_edge.contract import Contract
from grood_edge.errors import VerificationError
from grood_edge.export.dataset import Sample
from grood_edge.ort import OrtModel, open_ort
from grood_edge.outputs import Outputs, outputs_from_arrays, select_rows
from grood_edge.preprocessing import Preprocessing, preprocess_frame
from grood_edge.probes import synthetic_frames
from grood_edge.scoring import MIN_RELATIVE_GAP, nearest_gap, ood_scores
from grood_edge.stored_head import head_from_model

__all__ = [
    "HALF_LOGIT_TOLERANCE",
    "LOGIT_TOLERANCE",
    "Verification",
    "reopen",
    "require_equal_logits",
    "require_equal_scores",
    "run_frames",
    "verification_frames",
]

VERIFIED_FRAMES = 48

LOGIT_TOLERANCE = 1e-5  # relative to the largest logit: float32, one more fusion at the first convolution
HALF_LOGIT_TOLERANCE = 5e-3  # the same for a float16 classifier: 11 bits, rounded in other places after other fusions
SCORE_TOLERANCE = 2e-4  # float32 head against float64, where E = S^2 / max(s, s_i)^2 > MIN_GAP, or
DISTANCE_ROUNDING = 5e-7  # times |h - p_ood| / sqrt(E), if that is more: 8 roundings of the distances behind log s
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
        _require_validity(outputs)
        outputs = select_rows(outputs, outputs.valid)
        features = outputs.features.astype(np.float64)
        expected, gap = ood_scores(features, head), nearest_gap(features, head)
        errors = np.abs(outputs.ood_score - expected)
        distance = np.linalg.norm(features - head.only().prototype, axis=1)
        limits = np.maximum(SCORE_TOLERANCE, DISTANCE_ROUNDING * distance / np.sqrt(gap))
        comparable = gap > MIN_GAP
        largest = max(largest, float(errors[comparable].max(initial=0.0)))
        worst = max(worst, float((errors / limits)[comparable].max(initial=0.0)))
        compared = int(comparable.sum())
        flips += _flips(outputs.is_ood, expected, gap, contract)
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


def _require_validity(outputs: Outputs) -> None:
    """A synthetic frame may overflow the network; then, and only then, it must be invalid and OOD."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = (outputs.features**2).sum(axis=1)
    finite = np.isfinite(squares) & np.isfinite(outputs.logits).all(axis=1)
    if (outputs.valid != finite).any() or (~outputs.valid & ~outputs.is_ood).any():
        raise VerificationError(
            "the artifact's outputs 'valid' and 'is_ood' do not say which features and logits are finite; nothing was "
            "written. Please report this with the classifier"
        )


def _flips(is_ood: Flags, expected: Scores64, gap: Scores64, contract: Contract) -> int:
    """Count decisions that differ from the definition's by more than one rank, and by more than float32 explains."""
    scores, k = contract.calibration.sorted_scores(), contract.calibration.k
    lowest = expected + 0.5 * np.log(np.maximum(gap - GAP_ROUNDING, MIN_RELATIVE_GAP) / gap)
    highest = expected + 0.5 * np.log((gap + GAP_ROUNDING) / gap)
    may_be_ood = count_at_least(scores, highest.astype(np.float32)) <= k
    may_be_id = count_at_least(scores, lowest.astype(np.float32)) >= k - 1
    return int(np.where(is_ood, ~may_be_ood, ~may_be_id).sum())


def run_frames(model: OrtModel, frames: Frames, batch: int) -> Outputs:
    """Run uint8 frames `[n, h, w, c]` through an artifact in batches."""
    runs = [model.run({"image": frames[i : i + batch]}) for i in range(0, len(frames), batch)]
    return outputs_from_arrays({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})


def verification_frames(samples: tuple[Sample, ...], preprocessing: Preprocessing) -> Frames:
    """Return some real frames, preprocessed, the same ones mirrored, and the synthetic ones: uint8 `[n, h, w, c]`.

    The real ones often are bank rows, of which no score can be compared; their mirror images are not.
    """
    real = [preprocess_frame(sample.frame, preprocessing) for sample in samples[: VERIFIED_FRAMES // 2]]
    mirrored = [frame[:, ::-1] for frame in real]
    return np.stack([*real, *mirrored, *(frame for _, frame in synthetic_frames(preprocessing))])


def reopen(path: Path) -> None:
    """Check the file that was written: whole, with matching digests, and opened by onnxruntime."""
    open_ort(read_artifact(path).model)
