"""Does a backend compute what the artifact means? Asked before its first verdict is believed.

Silently wrong engines exist: wrong for batches above one, rows of one batch that differ although their images do not,
rows that depend on their neighbours. So the probes are replayed, and a set of frames runs alone, in twos, threes and
the largest batch, repeated and in another order, beside onnxruntime on the CPU.
"""

from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Frames
from grood_edge.contract import Contract
from grood_edge.errors import VerificationError
from grood_edge.outputs import Outputs, concatenated, select_rows
from grood_edge.probes import decode_png, replay_probes, score_tolerance, synthetic_frames
from grood_edge.runtime.backend import Backend
from grood_edge.runtime.decisions import decided_by

__all__ = ["ParityReport", "require_parity"]

# Images of one batch are computed by one kernel: they may differ where it sums in parts, and that is little.
REPEATED_SHARE = 0.1  # of the tolerance
LOGIT_SHARE = 0.05  # of the spread of the logits, within which another class is no error


@dataclass(frozen=True)
class ParityReport:
    """What was compared: batch sizes, frames, rows, and the largest |ood_score - reference| beside its tolerance."""

    provider: str
    batches: tuple[int, ...]
    frames: int
    rows: int
    largest_error: float
    tolerance: float


def require_parity(backend: Backend, contract: Contract, reference: Backend, most: int) -> ParityReport:
    """Hold a backend against the contract's probes and against a reference.

    Args:
        backend: what is to be trusted.
        contract: of the artifact that both run.
        reference: onnxruntime on the CPU.
        most: largest batch that the backend will be given.

    Raises:
        VerificationError: says which check failed, with numbers.
        BackendError: a backend fails to run.
    """
    judge = _Judge(backend, contract, score_tolerance(contract, backend.provider))
    probes = replay_probes(contract, backend.run, backend.provider)
    if not probes.passed:
        raise VerificationError(
            f"{backend.provider} does not reproduce the artifact's probes: ood_score is off by up to "
            f"{probes.largest_error:.1e} (at most {probes.tolerance:.1e} is accepted), {probes.flips} decisions flip"
        )
    frames = _frames(contract)
    expected = concatenated([reference.run(frame[None]) for frame in frames])
    most = 1 if contract.classifier.batch == "1" else max(1, most)
    batches = tuple(sorted({size for size in (1, 2, 3, most) if size <= most}))
    for size in batches:
        judge.require_equal(frames, expected, size)
    if most > 1:
        judge.require_repeatable(frames, expected, most)
        judge.require_order_free(frames, most)
    error = max(judge.largest, probes.largest_error)
    return ParityReport(backend.provider, batches, len(frames), judge.rows + len(probes.rows), error, judge.tolerance)


class _Judge:
    """Runs the checks, and keeps the largest error."""

    def __init__(self, backend: Backend, contract: Contract, tolerance: float) -> None:
        self._backend, self._rule = backend, contract.calibration.rule(len(contract.classes))
        self.tolerance, self.largest, self.rows = tolerance, 0.0, 0

    def require_equal(self, frames: Frames, expected: Outputs, size: int) -> None:
        """Run the frames in batches of one size, the last one filled up from the front."""
        index = np.arange(-(-len(frames) // size) * size) % len(frames)
        found = concatenated([self._backend.run(frames[index[i : i + size]]) for i in range(0, len(index), size)])
        self._compare(found, select_rows(expected, index), f"in batches of {size}", self.tolerance)

    def require_repeatable(self, frames: Frames, expected: Outputs, size: int) -> None:
        """Run one image several times in one batch."""
        for row in (0, len(frames) // 2):
            found = self._backend.run(np.repeat(frames[row : row + 1], size, axis=0))
            first = select_rows(found, np.zeros(size, np.int64))
            self._compare(found, first, "of one image repeated in a batch", REPEATED_SHARE * self.tolerance)

    def require_order_free(self, frames: Frames, size: int) -> None:
        """Run one batch in two orders."""
        batch = frames[np.arange(size) % len(frames)]
        forward, backward = self._backend.run(batch), self._backend.run(np.ascontiguousarray(batch[::-1]))
        turned = select_rows(backward, np.arange(size)[::-1])
        self._compare(turned, forward, "of a batch in another order", REPEATED_SHARE * self.tolerance)

    def _compare(self, found: Outputs, expected: Outputs, what: str, tolerance: float) -> None:
        provider, valid = self._backend.provider, expected.valid
        self._require_form(found, expected, what)
        self.rows += len(found)
        if (found.valid != valid).any() or (~found.valid & ~found.is_ood).any():
            rows = int((found.valid != valid).sum())
            raise VerificationError(
                f"{provider} answers wrongly {what}: 'valid' differs in {rows} of {len(found)} rows, or a row that is "
                "not valid is not OOD"
            )
        with np.errstate(invalid="ignore"):
            errors = np.where(valid, np.abs(found.ood_score.astype(np.float64) - expected.ood_score), 0.0)
        worst = float(np.where(np.isnan(errors), np.inf, errors).max())
        self.largest = max(self.largest, worst)
        spread = np.abs(expected.logits).max(axis=1)
        with np.errstate(invalid="ignore"):
            logit_errors = np.where(valid, np.abs(found.logits - expected.logits).max(axis=1) / (spread + 1e-30), 0.0)
            feature_errors = np.linalg.norm(found.features.astype(np.float64) - expected.features, axis=1)
            feature_errors = np.where(valid, feature_errors / (np.linalg.norm(expected.features, axis=1) + 1e-30), 0.0)
        relative = float(np.maximum(logit_errors.max(), feature_errors.max()))  # NaN where either is, unlike max()
        flips = self._flips(found, expected)
        self._require_consistent(found, what)
        if not worst <= tolerance or not relative <= max(LOGIT_SHARE, tolerance) or flips:
            raise VerificationError(
                f"{provider} answers wrongly {what}: ood_score is off by up to {worst:.1e} (at most {tolerance:.1e} is "
                f"accepted), logits by {float(logit_errors.max()):.1%} of the largest, features by "
                f"{float(feature_errors.max()):.1%}, and {flips} decisions of "
                f"{len(found)} differ"
            )

    def _require_form(self, found: Outputs, expected: Outputs, what: str) -> None:
        """Rows, columns and class indices, before anything is computed with them."""
        shapes = [getattr(outputs, name).shape for outputs in (found, expected) for name in ("logits", "features")]
        if shapes[:2] != shapes[2:]:
            raise VerificationError(
                f"{self._backend.provider} answers wrongly {what}: logits and features are {shapes[0]} and "
                f"{shapes[1]}; expected {shapes[2]} and {shapes[3]}"
            )
        classes = expected.logits.shape[1]
        strange = (found.class_id < 0) | (found.class_id >= classes)
        if strange.any():
            raise VerificationError(
                f"{self._backend.provider} answers wrongly {what}: class_id is {int(found.class_id[strange][0])}; "
                f"expected 0 to {classes - 1}"
            )

    def _require_consistent(self, found: Outputs, what: str) -> None:
        """The decision and p_value must be those of the score: they are counts of calibration scores."""
        expected = decided_by(self._rule, found)
        wrong = (found.is_ood != expected.is_ood) | ~(np.abs(found.p_value - expected.p_value) <= 1e-6)  # NaN, too
        if wrong.any():
            raise VerificationError(
                f"{self._backend.provider} answers wrongly {what}: p_value or is_ood of {int(wrong.sum())} rows of "
                f"{len(found)} are not those of their ood_score"
            )

    def _flips(self, found: Outputs, expected: Outputs) -> int:
        """Count other classes and decisions, but not where the reference itself lies within the tolerance of both."""
        top = np.sort(expected.logits, axis=1)[:, -2:]
        sure_class = top[:, 1] - top[:, 0] > LOGIT_SHARE * np.abs(expected.logits).max(axis=1)
        thresholds = np.array([self._rule.threshold(int(label)) for label in expected.class_id])
        sure = np.abs(expected.ood_score - thresholds) > self.tolerance
        classes = (found.class_id != expected.class_id) & sure_class
        decisions = (found.is_ood != expected.is_ood) & sure & sure_class
        return int(((classes | decisions) & expected.valid).sum())


def _frames(contract: Contract) -> Frames:
    """Return the probes' pictures and the synthetic ones, black and saturated among them: uint8 `[n, h, w, c]`."""
    probes = [decode_png(probe.png, contract.preprocessing) for probe in contract.probes]
    frames: Frames = np.stack([*probes, *(frame for _, frame in synthetic_frames(contract.preprocessing))])
    return frames
