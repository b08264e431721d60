"""Did fresh ID images raise as many false alarms as the calibration allows? And what is missed most? In sentences."""

from collections.abc import Sequence

import numpy as np

from grood_edge.contract import Contract
from grood_edge.evaluate.decision import groups_of
from grood_edge.evaluate.metrics import count_band, rate_interval
from grood_edge.evaluate.passes import ScoredSet
from grood_edge.evaluate.results import OodResult, Promise
from grood_edge.runtime.session import Session

__all__ = ["check_promise", "sentence_of_missed"]

REMEDY = "grood-edge calibrate MODEL --data FRESH --threshold-only"
_LOOSE = {
    "approximate": " (cross-fitted: measured, not proven)",
    "marginal": " (which holds on average over calibration sets)",
}
_FITTED = 0.01  # share of ID images among those that the artifact was fitted on
_REPEATED = 0.1  # share of ID scores that equal a calibration score to the last bit


def check_promise(session: Session, id_set: ScoredSet) -> Promise:
    """Hold the false alarms against the 99 % beta-binomial band of the session's rank k (docs/evaluate.md)."""
    contract = session.contract
    count, images = int(id_set.rows.flagged.sum()), len(id_set.paths)
    low, high = rate_interval(count, images)
    interval = f"95 % interval {low:.1%} to {high:.1%}"
    seen = f"{count} of {images} ID images raised a false alarm ({count / images:.1%}, {interval})"
    calibration = contract.calibration
    known = _acquaintance(id_set, contract)
    if known:
        why = f"That says nothing about the promise: {known}. Evaluate on ID images that neither fitted nor calibrated"
        return Promise("untested", count, images, None, f"{seen}. {why}.")
    if calibration.guarantee == "none":
        why = f"No rate was promised, because the calibration images were seen in training. To get a promise: {REMEDY}"
        return Promise("none", count, images, None, f"{seen}. {why}.")
    band = count_band(
        [(int(np.isin(id_set.rows.class_ids, group.class_ids).sum()), group.n, group.k) for group in groups_of(session)]
    )
    expected = f"{band[0]} to {band[1]} are expected of {images} images like the calibration images"
    if count > band[1]:
        sentence = (
            f"The promise is broken: {seen}, and {expected}. These images are not like those that calibrated: find out "
            f"what changed (camera, light, place), then recalibrate on images from here: {REMEDY}."
        )
        return Promise("broken", count, images, band, sentence)
    limit = f"promised is at most {100 * session.alpha:.3g}%; {expected}"
    if count < band[0]:
        return Promise("stricter", count, images, band, f"Stricter than promised: {seen}; {limit}.")
    if count / images > session.alpha:
        limit += f". That is chance for {images} images; more images would tell a broken promise from bad luck sooner"
    loose = _LOOSE.get(calibration.guarantee, "")
    return Promise("kept", count, images, band, f"This agrees with the promise{loose}: {seen}; {limit}.")


def _acquaintance(id_set: ScoredSet, contract: Contract) -> str:
    """Return a clause that says how the ID images are known to the artifact, or an empty text.

    Fit images are found by the contract's sketch, the smallest hashes of them: it tells the share of known images also
    where it does not hold every image. Calibration images are found by their scores.
    """
    calibration = contract.calibration
    if id_set.digest == calibration.data_digest:
        return "these are the images that calibrated the artifact"
    fitted, covered = contract.fit.recognised(id_set.hashes)
    if fitted > max(1, _FITTED * covered):
        return f"the artifact was fitted on {fitted / covered:.0%} of them"
    repeated = int(np.isin(id_set.rows.scores[id_set.rows.valid], calibration.sorted_scores()).sum())
    if repeated > max(2, _REPEATED * len(id_set.paths)):
        return (
            f"{repeated} of {len(id_set.paths)} have exactly the ood_score of a calibration image, so they probably "
            "are calibration images"
        )
    return ""


def sentence_of_missed(ood: Sequence[OodResult]) -> str:
    """Say which OOD set is missed most, in words that somebody can act on."""
    worst = max(ood, key=lambda result: result.missed)
    if worst.missed == 0:
        return f"Every OOD image was found, in {'all sets' if len(ood) > 1 else 'the one set'} given here."
    much = " Do not count on it to stop such things." if worst.missed > 0.5 else ""
    missed = worst.images - worst.found
    which = f'Missed most is "{worst.name}": ' if len(ood) > 1 else f'Of "{worst.name}", '
    return f"{which}{missed} of its {worst.images} images ({worst.missed:.1%}) are taken for a known class.{much}"
