"""Frames that must not be scored: each status by a frame that just has it, and by one that just has not."""

import re
import time

import numpy as np
import pytest
from numpy.random import Generator, default_rng

from grood_edge.errors import UsageError
from grood_edge.runtime.capture.health import HealthMemory, HealthRules, check_frame, describe
from grood_edge.runtime.capture.sources import CapturedFrame

RULES = HealthRules(max_age=0.5, frozen_after=3)


@pytest.fixture
def rng() -> Generator:
    return default_rng(0)


def captured(image: np.ndarray | None, at: float = 0.0, problem: str | None = None) -> CapturedFrame:
    return CapturedFrame(image, 0, at, None, "camera", problem)


def picture(rng: Generator, shape: tuple[int, ...] = (90, 120, 3)) -> np.ndarray:
    return rng.integers(30, 220, shape, dtype=np.uint8)


def statuses(images: list[np.ndarray], rules: HealthRules = RULES) -> list[str]:
    memory = HealthMemory()
    found: list[str] = []
    for image in images:
        memory, status = check_frame(rules, memory, captured(image), 0.0)
        found.append(status)
    return found


def test_age_is_compared_exactly(rng: Generator) -> None:
    image = picture(rng)
    assert check_frame(RULES, HealthMemory(), captured(image, 10.0), 10.5)[1] == "OK"
    memory, status = check_frame(RULES, HealthMemory(), captured(image, 10.0), 10.5000001)
    assert (memory, status) == (HealthMemory(), "STALE")
    assert check_frame(HealthRules(max_age=None), HealthMemory(), captured(image, 0.0), 1e9)[1] == "OK"


def test_a_stall_is_stale_and_a_fresh_damaged_frame_is_invalid() -> None:
    stalled = captured(None, 10.0, "no frame for 0.6 s")
    assert check_frame(RULES, HealthMemory(), stalled, 10.6)[1] == "STALE"
    assert describe(RULES, stalled, 10.6, "STALE") == "taken 0.60 s ago, more than 0.5 s; no frame for 0.6 s"
    damaged = captured(None, 10.6, "a packet of the video could not be decoded")
    assert check_frame(RULES, HealthMemory(), damaged, 10.6)[1] == "INVALID"
    assert describe(RULES, damaged, 10.6, "INVALID") == "a packet of the video could not be decoded"


def test_frozen_after_three_repeats_and_over_with_the_first_other_frame(rng: Generator) -> None:
    still, other = picture(rng), picture(rng)
    images = [other, *(still.copy() for _ in range(6)), other, still, still]
    assert statuses(images) == ["OK"] * 4 + ["FROZEN"] * 3 + ["OK"] * 3


def test_one_grey_level_of_one_pixel_is_not_frozen(rng: Generator) -> None:
    still = picture(rng)
    images = [still.copy() for _ in range(12)]
    for index, image in enumerate(images):
        image[-1, -1, -1] = index  # in the last bytes, behind the last whole word
    assert statuses(images) == ["OK"] * 12


def test_frames_of_the_same_sum_are_told_apart(rng: Generator) -> None:
    """A picture that moves by whole words has the same sum; the CRC-32 sees it."""
    still = picture(rng, (64, 64, 1))
    assert statuses([np.roll(still, 8 * i, axis=1) for i in range(8)]) == ["OK"] * 8
    assert statuses([still, np.roll(still, 8, axis=1)] * 6) == ["OK"] * 12


def test_a_camera_that_reuses_its_memory_is_not_frozen(rng: Generator) -> None:
    memory, buffer = HealthMemory(), np.empty((90, 120, 3), np.uint8)
    for _ in range(10):
        buffer[...] = picture(rng)
        memory, status = check_frame(RULES, memory, captured(buffer), 0.0)
        assert status == "OK"


def test_stale_frames_do_not_count_as_repeats(rng: Generator) -> None:
    still, memory = picture(rng), HealthMemory()
    for _ in range(9):
        memory, status = check_frame(RULES, memory, captured(still, 0.0), 0.6)
        assert status == "STALE"
    assert check_frame(RULES, memory, captured(still), 0.0)[1] == "OK"


def test_frozen_can_be_switched_off(rng: Generator) -> None:
    assert statuses([picture(rng)] * 9, HealthRules(frozen_after=None)) == ["OK"] * 9


@pytest.mark.parametrize("order", ["C", "F", "reversed", "strided"])
def test_any_memory_layout_counts(rng: Generator, order: str) -> None:
    image = picture(rng, (91, 123, 3))
    layouts = {
        "C": image,
        "F": np.asfortranarray(image),
        "reversed": image[..., ::-1],
        "strided": picture(rng, (182, 123, 3))[::2],
    }
    assert statuses([layouts[order]] * 5) == ["OK"] * 3 + ["FROZEN"] * 2


@pytest.mark.parametrize("shape", [(90, 120, 3), (90, 120, 1), (90, 120), (32, 32), (720, 1280, 3), (1, 1, 3)])
def test_black_and_saturated(rng: Generator, shape: tuple[int, ...]) -> None:
    noise = rng.integers(0, 6, shape, dtype=np.uint8)
    assert statuses([noise + np.uint8(11)]) == ["BLACK"]
    assert statuses([noise + np.uint8(17)]) == ["OK"]
    assert statuses([noise + np.uint8(250)]) == ["SATURATED"]
    assert statuses([noise + np.uint8(244)]) == ["OK"]


def test_a_lit_corner_of_three_percent_is_a_view(rng: Generator) -> None:
    black = rng.integers(0, 10, (720, 1280, 3), dtype=np.uint8)
    few, more = black.copy(), black.copy()
    few[:72, :128] = 120  # 1 %
    more[:144, :192] = 120  # 3 %
    assert statuses([few, more]) == ["BLACK", "OK"]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.full((90, 120, 3), 99, np.uint16), "dtype uint16; expected uint8"),
        (np.full((90, 120, 4), 99, np.uint8), r"shape \[90, 120, 4\]"),
        (np.full((2, 90, 120, 3), 99, np.uint8), r"shape \[2, 90, 120, 3\]"),
        (np.zeros((0, 120, 3), np.uint8), r"shape \[0, 120, 3\]"),
        (np.full((120, 90, 3), 99, np.uint8), r"120x90 \(height x width\); expected 90x120"),
        (None, "no picture"),
    ],
)
def test_what_is_no_frame_is_invalid(image: np.ndarray | None, said: str) -> None:
    rules = HealthRules(shape=(90, 120))
    memory, status = check_frame(rules, HealthMemory(), captured(image), 0.0)
    assert (memory, status) == (HealthMemory(), "INVALID")
    assert re.match(said, describe(rules, captured(image), 0.0, "INVALID"))


def test_words_for_the_rest() -> None:
    assert describe(RULES, captured(None), 0.0, "OK") == ""
    assert describe(RULES, captured(None), 0.0, "FROZEN") == "identical to each of the last 3 frames"
    assert describe(RULES, captured(None), 0.0, "BLACK") == "98% of its values are at most 16"
    assert describe(RULES, captured(None), 0.0, "SATURATED") == "98% of its values are at least 250"


@pytest.mark.parametrize(
    "wrong", [{"max_age": 0.0}, {"frozen_after": 0}, {"black_below": 250}, {"saturated_above": 256}, {"share": 0.0}]
)
def test_rules_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="expected max_age above 0 s"):
        HealthRules(**wrong)  # type: ignore[arg-type]


def test_a_check_is_cheap_at_720p(rng: Generator) -> None:
    """Two frames in turn, so that nothing is frozen; the promise in docs/sources.md is for an idle machine."""
    frames = [captured(picture(rng, (720, 1280, 3))) for _ in range(2)]
    memory, seconds = HealthMemory(), []
    for index in range(40):
        start = time.perf_counter()
        memory, _ = check_frame(RULES, memory, frames[index % 2], 0.0)
        seconds.append(time.perf_counter() - start)
    print(f"a check at 720p takes {1e3 * min(seconds):.2f} ms")
    assert min(seconds) < 0.005
