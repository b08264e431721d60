"""Prepared frames by their hashes: which set they are, in any order, and whether an artifact was fitted on them."""

import hashlib

import numpy as np

from grood_edge.contract import Fit
from grood_edge.errors import DatasetError

__all__ = ["digest_of", "frame_hash", "require_new_frames"]

KNOWN_LIMIT = 0.01  # share of frames that an artifact may have been fitted on


def frame_hash(frame: np.ndarray) -> int:
    """Return the BLAKE2b-64 hash of a prepared frame's bytes, as the little-endian uint64 that the format names."""
    return int.from_bytes(hashlib.blake2b(frame.tobytes(), digest_size=8).digest(), "little")


def digest_of(hashes: np.ndarray) -> str:
    """Return the SHA-256 (hex) over the ascending hashes, uint64 `[n]`: the contract's digest of a set of frames."""
    return hashlib.sha256(np.sort(hashes.astype("<u8")).tobytes()).hexdigest()


def require_new_frames(fit: Fit, hashes: np.ndarray, looked_at: str, give: str) -> None:
    """Refuse frames that the artifact was fitted on: they would turn "no guarantee" into a false one.

    The contract keeps the smallest hashes of the fit images; new ones with hashes as small must not be among them.

    Args:
        fit: of the artifact.
        hashes: of the new frames, uint64 `[n]`.
        looked_at: what they are called, such as `images`.
        give: what to give instead.

    Raises:
        DatasetError: says how many of them are known.
    """
    known, covered = fit.recognised(hashes)
    if known > KNOWN_LIMIT * covered:
        of = looked_at if covered == len(hashes) else f"{looked_at} looked at (a sample of {len(hashes)})"
        raise DatasetError(
            f"{known} of {covered} {of} are among those that this artifact was fitted on; their scores say "
            f"nothing about new frames. Give {give} that neither the network nor the artifact has seen"
        )
