"""The GROOD equations, once, in NumPy float64: the definition that every graph and engine is held against.

Source: ElAraby et al., "GROOD: GRadient-Aware Out-of-Distribution Detection", arXiv 2312.14427, in the closed
form of its gradient. With features h, class prototypes p_j and OOD prototype p_ood:

    l_j = -||h - p_j||                       plain L2, j = 1..C and ood
    g   = d cross_entropy(softmax(l), predicted class) / d p_ood = s u
    s   = softmax(l)_ood,   u = (h - p_ood) / ||h - p_ood||
    S   = min_i ||g - g_i||                  over the gradient bank;   ood_score = log S, higher = more OOD

so that a gradient is one scalar (log s) and one unit vector (u), and
S^2 = min_i [(s - s_i)^2 + 2 s s_i (1 - u.u_i)]. Everything stays in the log domain: s underflows long before
its logarithm loses meaning.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from grood_edge.arrays import Bank, Features64, LogScale, Prototypes, Scores64, Vector64

__all__ = [
    "INVALID_SCORE",
    "MIN_DISTANCE",
    "MIN_RELATIVE_GAP",
    "Gradients",
    "Head",
    "OodHead",
    "gradients",
    "nearest_gap",
    "ood_scores",
]

INVALID_SCORE = 3.4e38  # ood_score of a frame whose features or logits are not finite
MIN_DISTANCE = 1e-6  # below it u is not a direction any more; such a frame must come out OOD, not ID
MIN_RELATIVE_GAP = 1e-12  # floor of S^2 / max(s, s_i)^2: at the floor two gradients are called identical
_BLOCK = 512  # rows of features at a time: bounds memory at 512 x bank rows


@dataclass(frozen=True)
class OodHead:
    """One OOD prototype with the gradient bank seen from it.

    `prototype` float64 `[d]`; `bank` float64 `[m, d]` unit rows u_i; `bank_log_s` float64 `[m]`.
    """

    prototype: Vector64
    bank: Bank
    bank_log_s: LogScale


@dataclass(frozen=True)
class Head:
    """All that the score needs: class prototypes float64 `[k, d]` and one `OodHead` per OOD prototype."""

    prototypes: Prototypes
    ood_heads: tuple[OodHead, ...]

    def only(self) -> OodHead:
        """Return the single OOD head; several need a combination, which this version does not have."""
        (ood_head,) = self.ood_heads
        return ood_head


@dataclass(frozen=True)
class Gradients:
    """Gradients g = s u of a batch: `log_s` float64 `[n]`, `u` float64 `[n, d]` unit rows."""

    log_s: Scores64
    u: Features64


def gradients(features: Features64, prototypes: Prototypes, ood_prototype: Vector64) -> Gradients:
    """Return the gradient of the loss with respect to the OOD prototype, in the log domain."""
    difference = features - ood_prototype
    d_ood = np.sqrt(np.einsum("nd,nd->n", difference, difference))
    distances = np.concatenate([_distances(features, prototypes), d_ood[:, None]], axis=1)
    nearest = distances.min(axis=1)
    log_sum = np.log(np.exp(nearest[:, None] - distances).sum(axis=1))
    return Gradients(
        log_s=nearest - d_ood - log_sum,
        u=difference / np.maximum(d_ood, MIN_DISTANCE)[:, None],
    )


def ood_scores(features: Features64, head: Head) -> Scores64:
    """Return `ood_score` = log S of each row, float64 `[n]`; higher is more OOD."""
    scores = [_log_s_and_gap(g, head.only())[0] for g in _blocks(features, head)]
    return np.concatenate(scores) if scores else np.zeros(0)


def nearest_gap(features: Features64, head: Head) -> Scores64:
    """Return E = S^2 / max(s, s_i)^2 at the nearest bank row, float64 `[n]`.

    float32 arithmetic gives log S to about 2e-7 / E, so E says how far a float32 score can be trusted.
    """
    gaps = [_log_s_and_gap(g, head.only())[1] for g in _blocks(features, head)]
    return np.concatenate(gaps) if gaps else np.zeros(0)


def _blocks(features: Features64, head: Head) -> Iterator[Gradients]:
    for start in range(0, len(features), _BLOCK):
        yield gradients(features[start : start + _BLOCK], head.prototypes, head.only().prototype)


def _log_s_and_gap(g: Gradients, ood_head: OodHead) -> tuple[Scores64, Scores64]:
    one_minus_cosine = np.maximum(1.0 - g.u @ ood_head.bank.T, 0.0)
    log_s, bank_log_s = g.log_s[:, None], ood_head.bank_log_s[None, :]
    ratio = np.exp(-np.abs(log_s - bank_log_s))
    gap = np.maximum((1.0 - ratio) ** 2 + 2.0 * ratio * one_minus_cosine, MIN_RELATIVE_GAP)
    log_distance = np.maximum(log_s, bank_log_s) + 0.5 * np.log(gap)
    rows = np.arange(len(g.log_s))
    nearest = log_distance.argmin(axis=1)
    return log_distance[rows, nearest], gap[rows, nearest]


def _distances(features: Features64, prototypes: Prototypes) -> np.ndarray:
    # Row by row of the prototypes: direct differences have no cancellation, and memory stays at n x d.
    return np.stack([np.sqrt(((features - p) ** 2).sum(axis=1)) for p in prototypes], axis=1)
