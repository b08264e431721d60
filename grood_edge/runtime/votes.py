"""Do k of the last n frames look known? The way back to KNOWN that all decisions with a memory share."""

from dataclasses import dataclass

from grood_edge.errors import UsageError

__all__ = ["Votes", "at_most"]

ROUNDING = 1e-6  # relative; p_values are float32, and their neighbours lie further apart

MOST_FRAMES = 1000


@dataclass(frozen=True)
class Votes:
    """k of the last n scored frames must have p_value > leave.

    Raises:
        UsageError: leave outside 0..1, n outside 1..1000, or k outside 1..n.
    """

    leave: float
    k: int
    n: int

    def __post_init__(self) -> None:
        if not 0 < self.leave < 1:
            raise UsageError(f"leave is p_value {self.leave:g}; expected a number above 0 and below 1, such as 0.2")
        if not 1 <= self.k <= self.n <= MOST_FRAMES:
            raise UsageError(f"k of n is {self.k} of {self.n}; expected 1 <= k <= n <= {MOST_FRAMES}")

    def with_newest(self, recent: tuple[float, ...], p_value: float) -> tuple[float, ...]:
        """Return the p_values of the last n frames, the newest last."""
        return (*recent[-self.n + 1 :], p_value) if self.n > 1 else (p_value,)

    def known(self, recent: tuple[float, ...]) -> int:
        """Count the frames that speak for KNOWN."""
        return sum(not at_most(p, self.leave) for p in recent)

    def sentence(self, recent: tuple[float, ...]) -> str:
        """Say it."""
        return f"{self.known(recent)} of the last {len(recent)} fed frames have p_value > {self.leave:g}"


def at_most(p_value: float, limit: float) -> bool:
    """Tell whether p_value <= limit, whatever float32 made of its last digit."""
    return p_value <= limit * (1 + ROUNDING)
