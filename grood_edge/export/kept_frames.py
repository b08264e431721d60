"""Which frames of a pass stay in memory: raw ones for the checks, preprocessed ones for a second run of the network."""

from dataclasses import dataclass, field

import numpy as np

from grood_edge.arrays import Flags, Frames, Labels
from grood_edge.export.dataset import Sample
from grood_edge.preprocessing import Preprocessing

__all__ = ["KEPT_BYTES", "KEPT_FRAMES", "VERIFIED_SAMPLES", "CheckSamples", "KeptFrames"]

CHECK_SAMPLES = 256  # raw frames kept for verification and diagnosis, whatever the number of images,
CHECK_BYTES = 256 << 20  # and however large they are
VERIFIED_SAMPLES = 24  # raw frames where a pass is only verified, not diagnosed: on a device,
VERIFIED_BYTES = 64 << 20  # which has little memory
KEPT_FRAMES = 2_000  # preprocessed frames of fit images, and
KEPT_BYTES = 128 << 20  # their size in all


class KeptFrames:
    """The first preprocessed fit frames of each class, equally many of each, within a number of frames and of bytes.

    `frames` uint8 `[room, h, w, c]`, of which the first `count` are there, and their `labels` and `names`. `none`: no
    room, because there will be no second run.
    """

    def __init__(self, preprocessing: Preprocessing, classes: int, none: bool = False) -> None:
        p = preprocessing
        room = 0 if none else max(1, min(KEPT_FRAMES, KEPT_BYTES // (p.height * p.width * p.channels)))
        each = max(2, KEPT_FRAMES // classes)
        self._each = each if room == KEPT_FRAMES or each * classes <= room else max(1, room // classes)
        self.frames = np.empty((room, p.height, p.width, p.channels), np.uint8)  # unused pages take no memory
        self.labels: list[int] = []
        self.names: list[str] = []
        self.count = 0
        self._seen = np.zeros(classes, np.int64)

    def wanted(self, labels: Labels, names: tuple[str, ...], held_out: Flags) -> np.ndarray:
        """Return which images of a batch are to be kept, int64 `[q]`; `add` must get their frames next."""
        rows = []
        for row in np.flatnonzero(~held_out):
            if len(self.labels) == len(self.frames):
                break
            if self._seen[labels[row]] < self._each:
                self._seen[labels[row]] += 1
                self.labels.append(int(labels[row]))
                self.names.append(names[row])
                rows.append(row)
        return np.array(rows, np.int64)

    def add(self, frames: Frames) -> None:
        """Keep these frames."""
        self.frames[self.count : self.count + len(frames)] = frames
        self.count += len(frames)


@dataclass
class CheckSamples:
    """The first raw samples, as many as a fixed amount of memory holds; `few` for verification alone."""

    few: bool = False
    kept: list[Sample] = field(default_factory=list)
    size: int = 0
    full: bool = False

    def offer(self, sample: Sample) -> None:
        """Keep a sample, unless one before it did not fit."""
        most, room = (VERIFIED_SAMPLES, VERIFIED_BYTES) if self.few else (CHECK_SAMPLES, CHECK_BYTES)
        self.full = self.full or len(self.kept) == most or self.size + sample.frame.nbytes > room
        if not self.full:
            self.kept.append(sample)
            self.size += sample.frame.nbytes
