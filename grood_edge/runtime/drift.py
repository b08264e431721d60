"""Do the scores of ID frames still look like those of the calibration images?"""

from dataclasses import dataclass

__all__ = ["Drift"]


@dataclass(frozen=True)
class Drift:
    """The newest full window of fed frames against the calibration scores.

    statistic: Kolmogorov-Smirnov distance, 0 to 1. p_value: of that distance. level: below which it is drift (already
    divided by the number of looks). window: frames in it. time: when it was full (`Observation.time`).
    """

    statistic: float
    p_value: float
    level: float
    window: int
    time: float

    @property
    def drifted(self) -> bool:
        """The scores no longer look like calibration."""
        return self.p_value < self.level
