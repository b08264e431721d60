"""Nothing is published before this: the artifact's own outputs against the classifier and against the definition."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grood_edge.arrays import Frames, Logits
from grood_edge.artifact import read_artifact
from grood_edge.conformal import count_at_least
from grood_edge.contract import Contract
from grood_edge.errors import VerificationError
from grood_edge.export.dataset import Sample
from grood_edge.ort import OrtModel, open_ort
from grood_edge.outputs import Outputs, outputs_from_arrays
from grood_edge.preprocessing import Preprocessing, preprocess_frame
from grood_edge.probes import synthetic_frames
from grood_edge.scoring import nearest_gap, ood_scores
from grood_edge.stored_head import head_from_model

__all__ = [
    "Verification",
    "reopen",
    "require_equal_logits",
    "require_equal_scores",
    "run_frames",
    "verification_frames",
]

VERIFIED_FRAMES = 48

LOGIT_TOLERANCE = 1e-5  # relative to the largest logit: float32, one more fusion at the first convolution
SCORE_TOLERANCE = 2e-4  # float32 head against float64, where E = S^2 / max(s, s_i)^2 > MIN_GAP
MIN_GAP = 1e-3  # nearer to a bank row float32 carries no score that precise, and decisions alone are compared


@dataclass(frozen=True)
class Verification:
    """What was compared: number of frames, largest errors, and decisions that differ beyond one rank."""

    frames: int
    largest_logit_error: float
    largest_score_error: float
    compared_scores: int
    flips: int


def require_equal_logits(outputs: Outputs, classifier_logits: Logits) -> float:
    """Return the largest error of the artifact's logits, relative to the largest logit.

    Raises:
        VerificationError: above the tolerance.
    """
    scale = max(1.0, float(np.abs(classifier_logits).max()))
    error = float(np.abs(outputs.logits.astype(np.float64) - classifier_logits).max()) / scale
    if not error <= LOGIT_TOLERANCE:
        raise VerificationError(
            f"the artifact's logits differ from the classifier's by {error:.1e} of the largest logit (at most "
            f"{LOGIT_TOLERANCE:.0e} is accepted); nothing was written. Please report this with the classifier's .onnx"
        )
    return error


def require_equal_scores(model: OrtModel, stored: bytes, contract: Contract, frames: Frames) -> Verification:
    """Compare the artifact's scores and decisions with the float64 definition over the statistics stored in it.

    Frames are run alone, in twos and threes where the batch is open, and all together.

    Raises:
        VerificationError: a score beyond the tolerance, a decision beyond one rank, or rows that depend on the batch.
    """
    head = head_from_model(stored)
    scores = contract.calibration.sorted_scores()
    batches = (1, 2, 3, len(frames)) if contract.classifier.batch == "dynamic" else (1,)
    largest, compared, flips = 0.0, 0, 0
    for batch in batches:
        outputs = run_frames(model, frames, batch)
        features = outputs.features.astype(np.float64)
        expected = ood_scores(features, head)
        comparable = nearest_gap(features, head) > MIN_GAP
        errors = np.abs(outputs.ood_score - expected)[comparable]
        largest, compared = max(largest, float(errors.max(initial=0.0))), int(comparable.sum())
        rank = count_at_least(scores, expected.astype(np.float32))
        agreed = outputs.is_ood == (rank < contract.calibration.k)
        near = np.abs(rank - contract.calibration.k + 0.5) < 1.5  # within one rank of the threshold
        flips += int((~agreed & ~near).sum())
        if not outputs.valid.all():
            raise VerificationError(
                "the artifact calls finite features invalid; nothing was written. Please report this"
            )
    if not largest <= SCORE_TOLERANCE or flips:
        raise VerificationError(
            f"the artifact's ood_score differs from its definition by {largest:.1e} (at most {SCORE_TOLERANCE:.0e} is "
            f"accepted) and {flips} decisions differ; nothing was written. Please report this with the classifier"
        )
    return Verification(len(frames), 0.0, largest, compared, flips)


def run_frames(model: OrtModel, frames: Frames, batch: int) -> Outputs:
    """Run uint8 frames `[n, h, w, c]` through an artifact in batches."""
    runs = [model.run({"image": frames[i : i + batch]}) for i in range(0, len(frames), batch)]
    return outputs_from_arrays({name: np.concatenate([run[name] for run in runs]) for name in runs[0]})


def verification_frames(samples: tuple[Sample, ...], preprocessing: Preprocessing) -> Frames:
    """Return some real frames, preprocessed, and the synthetic ones: uint8 `[n, h, w, c]`."""
    real = [preprocess_frame(sample.frame, preprocessing) for sample in samples[:VERIFIED_FRAMES]]
    return np.stack([*real, *(frame for _, frame in synthetic_frames(preprocessing))])


def reopen(path: Path) -> None:
    """Check the file that was written: whole, with matching digests, and opened by onnxruntime."""
    open_ort(read_artifact(path).model)
