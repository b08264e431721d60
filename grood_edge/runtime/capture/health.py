"""Is this frame worth looking at? Checked before the network: a stalled or blinded camera must not be scored."""

import zlib
from dataclasses import dataclass

import numpy as np

from grood_edge.errors import UsageError
from grood_edge.runtime.capture.sources import CapturedFrame
from grood_edge.runtime.states import Status

__all__ = ["HealthMemory", "HealthRules", "check_frame", "describe"]

_SAMPLES = 64  # along the shorter side, for black and saturated


@dataclass(frozen=True)
class HealthRules:
    """When a frame is not scored.

    max_age: seconds since capture above which it is `STALE`; None for files, whose frames wait. frozen_after: it is
    `FROZEN` when it repeats as many frames before it, byte for byte; None for screens and simulators, which may.
    black_below, saturated_above: grey levels; it is `BLACK` (`SATURATED`) when a share of at least `share` of its
    values, sampled on a grid, lies at or below (above) the level. shape: height and width that it must have, or it
    is `INVALID`; None takes any.

    Raises:
        UsageError: a number out of its range.
    """

    max_age: float | None = 1.0
    frozen_after: int | None = 5
    black_below: int = 16
    saturated_above: int = 250
    share: float = 0.98
    shape: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        good = (self.max_age is None or self.max_age > 0) and (self.frozen_after is None or self.frozen_after >= 1)
        if not good or not 0 <= self.black_below < self.saturated_above <= 255 or not 0 < self.share <= 1:
            raise UsageError(
                f"{self}: expected max_age above 0 s, frozen_after of at least 1 frame, levels 0 <= black_below < "
                "saturated_above <= 255 and a share in (0, 1]"
            )


@dataclass(frozen=True)
class HealthMemory:
    """What is remembered of the newest fresh picture: shape, sum and CRC-32 of its bytes, and how many it repeats."""

    shape: tuple[int, ...] = ()
    total: int = 0
    crc: int | None = None
    repeats: int = 0


def check_frame(
    rules: HealthRules, memory: HealthMemory, frame: CapturedFrame, now: float
) -> tuple[HealthMemory, Status]:
    """Judge a frame: the memory after it, and `OK` or the first of STALE, INVALID, FROZEN, BLACK, SATURATED.

    Args:
        rules: the limits.
        memory: after the frame before; `HealthMemory()` at the start.
        frame: as captured.
        now: seconds on the clock of `frame.captured`.
    """
    if rules.max_age is not None and now - frame.captured > rules.max_age:
        return memory, "STALE"
    image = frame.image
    if image is None or _fault(image, rules.shape) is not None:
        return memory, "INVALID"
    if rules.frozen_after is not None:
        memory = _remember(memory, image)
        if memory.repeats >= rules.frozen_after:
            return memory, "FROZEN"
    step = max(1, min(image.shape[:2]) // _SAMPLES)
    sample = np.ascontiguousarray(image[::step, ::step])
    enough = rules.share * sample.size
    if np.count_nonzero(sample <= rules.black_below) >= enough:
        return memory, "BLACK"
    if np.count_nonzero(sample >= rules.saturated_above) >= enough:
        return memory, "SATURATED"
    return memory, "OK"


def describe(rules: HealthRules, frame: CapturedFrame, now: float, status: Status) -> str:
    """Say in words why a frame has its status; empty for `OK`."""
    if status == "STALE":
        text = f"taken {now - frame.captured:.2f} s ago, more than {rules.max_age:g} s"
        return f"{text}; {frame.problem}" if frame.problem else text
    if status == "INVALID":
        fault = None if frame.image is None else _fault(frame.image, rules.shape)
        return frame.problem or fault or "no picture"
    words = {
        "FROZEN": f"identical to each of the last {rules.frozen_after} frames",
        "BLACK": f"{rules.share:.0%} of its values are at most {rules.black_below}",
        "SATURATED": f"{rules.share:.0%} of its values are at least {rules.saturated_above}",
    }
    return words.get(status, "")


def _fault(image: np.ndarray, shape: tuple[int, int] | None) -> str | None:
    if image.dtype != np.uint8:
        return f"dtype {image.dtype}; expected uint8"
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)) or 0 in image.shape:
        return f"shape {list(image.shape)}; expected [h, w, 3], [h, w, 1] or [h, w]"
    if shape is not None and image.shape[:2] != shape:
        return f"{image.shape[0]}x{image.shape[1]} (height x width); expected {shape[0]}x{shape[1]}"
    return None


def _remember(memory: HealthMemory, image: np.ndarray) -> HealthMemory:
    """Compare with the frame before: by the sum of the bytes, and only where that is the same by their CRC-32.

    The sum is ten times as fast and differs in practice for any two frames of a sensor. A frame is remembered by
    numbers and not by itself, because whoever made it may reuse its memory.
    """
    flat = np.ascontiguousarray(image).reshape(-1)
    words = flat.size // 8 * 8
    total = (int(flat[:words].view(np.uint64).sum()) + int(flat[words:].sum())) % 2**64
    if total != memory.total or image.shape != memory.shape:
        return HealthMemory(image.shape, total)
    crc = zlib.crc32(flat.data)
    same = memory.crc is None or memory.crc == crc
    return HealthMemory(image.shape, total, crc, memory.repeats + 1 if same else 0)
