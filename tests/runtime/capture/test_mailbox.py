"""Which frames are kept while the consumer is busy: step by step on a fake clock, then with threads and bad cameras."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from grood_edge.errors import SourceError, UsageError
from grood_edge.preprocessing import Color
from grood_edge.runtime.capture.image_source import iterator_source
from grood_edge.runtime.capture.mailbox import Capture, FramePolicy, Mailbox, parse_policy
from grood_edge.runtime.capture.sources import CapturedFrame, Source

IMAGE = np.zeros((4, 6, 3), np.uint8)


def frame(index: int, captured: float = 0.0) -> CapturedFrame:
    return CapturedFrame(IMAGE, index, captured, None, "fake")


def indices(mailbox: Mailbox) -> list[int]:
    taken = []
    while (one := mailbox.take(0.0)) is not None:
        taken.append(one.index)
    return taken


@pytest.mark.parametrize(
    ("text", "live", "expected"),
    [
        (None, True, FramePolicy("newest")),
        (None, False, FramePolicy("every", 4)),
        ("newest", False, FramePolicy("newest")),
        ("every", True, FramePolicy("every", 4)),
        ("drop-oldest:3", True, FramePolicy("drop-oldest", 3)),
        ("drop-oldest:1000", True, FramePolicy("drop-oldest", 1000)),
    ],
)
def test_policies_are_read(text: str | None, live: bool, expected: FramePolicy) -> None:
    assert parse_policy(text, live) == expected


@pytest.mark.parametrize(
    "text", ["latest", "drop-oldest", "drop-oldest:0", "drop-oldest:1001", "drop-oldest:-1", "every:2", "drop-oldest:²"]
)
def test_other_policies_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected newest, every, or drop-oldest:N"):
        parse_policy(text, live=True)


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (FramePolicy("newest"), [9]),
        (FramePolicy("drop-oldest", 3), [7, 8, 9]),
        (FramePolicy("drop-oldest", 20), [*range(10)]),
    ],
)
def test_the_oldest_are_dropped_and_counted(policy: FramePolicy, kept: list[int]) -> None:
    mailbox = Mailbox(policy)
    for index in range(10):
        assert mailbox.put(frame(index))
    assert (mailbox.captured, mailbox.dropped) == (10, 10 - len(kept))
    assert indices(mailbox) == kept
    assert (mailbox.captured, mailbox.dropped, mailbox.delivered) == (10, 10 - len(kept), len(kept))


def test_every_waits_for_room_and_loses_nothing() -> None:
    mailbox = Mailbox(FramePolicy("every", 2))
    putter = threading.Thread(target=lambda: [mailbox.put(frame(i)) for i in range(5)])
    putter.start()
    putter.join(0.05)
    assert putter.is_alive()
    assert mailbox.captured == 2
    taken = [mailbox.take(5.0) for _ in range(5)]
    putter.join(5)
    assert [f.index for f in taken if f] == [0, 1, 2, 3, 4]
    assert (mailbox.captured, mailbox.dropped) == (5, 0)


def test_closing_wakes_a_put_that_waits() -> None:
    mailbox = Mailbox(FramePolicy("every", 1))
    mailbox.put(frame(0))
    results: list[bool] = []
    putter = threading.Thread(target=lambda: results.append(mailbox.put(frame(1))))
    putter.start()
    mailbox.close()
    putter.join(5)
    assert results == [False]
    assert (mailbox.captured, mailbox.dropped, mailbox.delivered) == (2, 2, 0)
    assert mailbox.drained


def test_an_error_comes_once_and_after_the_frames_before_it() -> None:
    mailbox = Mailbox(FramePolicy("every", 2))
    mailbox.put(frame(0))
    mailbox.finish(SourceError("gone"))
    assert not mailbox.drained
    assert indices_of(mailbox.take(0.0)) == 0
    with pytest.raises(SourceError, match="gone"):
        mailbox.take(0.0)
    assert mailbox.take(0.0) is None
    assert mailbox.drained


def indices_of(one: CapturedFrame | None) -> int:
    assert one is not None
    return one.index


@dataclass(frozen=True)
class Run:
    """Ages of the frames when their scoring ended, and what was counted."""

    ages: list[float]
    mailbox: Mailbox


def simulate(policy: FramePolicy, inference: int, phase: int = 0) -> Run:
    """3,600 frames of a 60 fps camera, and a consumer that takes a frame whenever it is free.

    Times are whole ticks of 1/3000 s, so that everything is exact: a frame comes every 50, 25 ms are 75.
    """
    mailbox, ages, free_at = Mailbox(policy), [], phase
    for index in range(3601):
        now = 50 * index
        while free_at < now and (taken := mailbox.take(0.0)) is not None:
            free_at += inference
            ages.append(free_at - taken.captured)
        free_at = max(free_at, now)  # it had nothing to do, and waits for this frame
        if index < 3600:
            mailbox.put(frame(index, float(now)))
    return Run(ages, mailbox)


@pytest.mark.parametrize("phase", [0, 1, 17, 49])
@pytest.mark.parametrize("inference", [75, 15, 50, 51, 300])
def test_newest_is_never_older_than_one_inference_and_one_frame(inference: int, phase: int) -> None:
    run = simulate(FramePolicy("newest"), inference, phase)
    assert max(run.ages) <= inference + 50
    # above 50 ticks the consumer is never idle: it starts a frame every `inference` ticks until 180,000
    scored = 3600 if inference <= 50 else math.ceil((180_000 - phase) / inference)
    last_start = phase + inference * (scored - 1)
    waiting = int(inference > 50 and last_start < 50 * 3599)  # the last frame came while the last but one was scored
    assert len(run.ages) == run.mailbox.delivered == scored
    assert (run.mailbox.captured, run.mailbox.dropped) == (3600, 3600 - scored - waiting)


def test_a_queue_would_break_that_bound() -> None:
    """The check above can fail: with ten places the frames are older."""
    run = simulate(FramePolicy("drop-oldest", 10), 75)
    assert max(run.ages) > 75 + 5 * 50
    assert run.mailbox.captured == 3600


class Camera:
    """A camera that runs a script: a number of frames, then whatever `then` does."""

    name, live = "fake camera", True

    def __init__(self, frames: int, then: Callable[["Camera"], CapturedFrame | None], every: float = 0.0) -> None:
        self.color: Color = "bgr"
        self.fps: float | None = None
        self.closed = threading.Event()
        self.closes = 0
        self._left, self._then, self._every, self._index = frames, then, every, 0

    def read(self) -> CapturedFrame | None:
        if self._index == self._left:
            return self._then(self)
        if self._every and self.closed.wait(self._every):
            return None
        self._index += 1
        return frame(self._index - 1, time.monotonic())

    def close(self) -> None:
        self.closes += 1
        self.closed.set()


def end(camera: Camera) -> None:
    return None


def hang(camera: Camera) -> None:
    camera.closed.wait(60)


def vanish(camera: Camera) -> None:
    raise SourceError("fake camera vanished")


def break_down(camera: Camera) -> None:
    raise ZeroDivisionError


def threads() -> set[str]:
    return {t.name for t in threading.enumerate() if t.name.startswith("capture")}


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == set()


def test_fakes_are_sources() -> None:
    assert isinstance(Camera(0, end), Source)


def test_every_delivers_all_frames_of_a_file_and_ends() -> None:
    camera = Camera(50, end)
    with Capture(camera, FramePolicy("every", 4)) as capture:
        assert [f.index for f in capture] == list(range(50))
    assert (capture.captured, capture.dropped) == (50, 0)
    assert camera.closes > 0


def test_a_camera_that_vanishes_raises_in_the_loop() -> None:
    with Capture(Camera(3, vanish), FramePolicy("every", 4)) as capture:
        assert [next(capture).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(SourceError, match="vanished"):
            next(capture)
        assert list(capture) == []


def test_a_bug_in_a_source_raises_in_the_loop() -> None:
    with pytest.raises(ZeroDivisionError), Capture(Camera(1, break_down), FramePolicy("newest")) as capture:
        list(capture)


def test_a_camera_that_hangs_is_told_and_can_be_left() -> None:
    camera = Camera(2, hang)
    start = time.monotonic()
    with Capture(camera, FramePolicy("every", 4), stall_after=0.05) as capture:
        frames = [next(capture) for _ in range(4)]
    assert time.monotonic() - start < 1.5
    assert [f.index for f in frames] == [0, 1, 1, 1]
    assert [f.image is None for f in frames] == [False, False, True, True]
    assert frames[3].captured == frames[1].captured
    assert frames[2].problem == "no frame for 0.1 s"
    assert (capture.captured, capture.dropped) == (2, 0)


def test_a_slow_consumer_gets_the_frame_that_waits_before_any_notice() -> None:
    with Capture(Camera(1, hang), FramePolicy("newest"), stall_after=0.02) as capture:
        time.sleep(0.06)
        assert next(capture).image is not None
        assert next(capture).image is None


def test_an_exception_in_the_loop_stops_the_thread() -> None:
    camera = Camera(10**6, end, every=0.001)
    capture = Capture(camera, FramePolicy("newest"))

    def loop() -> None:
        with capture:
            for _ in capture:
                raise KeyError

    with pytest.raises(KeyError):
        loop()
    assert camera.closed.is_set()
    assert capture.captured >= 1


def test_ctrl_c_while_waiting_stops_the_thread() -> None:
    camera = Camera(1, hang)
    capture = Capture(camera, FramePolicy("newest"))
    start = time.monotonic()

    def loop() -> None:
        with capture:
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            list(capture)

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert time.monotonic() - start < 1.5
    assert camera.closed.is_set()


def test_frames_left_behind_count_as_dropped() -> None:
    with Capture(Camera(100, end), FramePolicy("every", 4)) as capture:
        next(capture)
    assert capture.captured == 1 + capture.dropped
    assert capture.dropped >= 1


def test_newest_with_threads_counts_every_frame() -> None:
    with Capture(Camera(200, end, every=0.001), FramePolicy("newest")) as capture:
        seen = []
        for one in capture:
            seen.append(one.index)
            time.sleep(0.005)
    assert seen == sorted(set(seen))
    assert seen[-1] == 199
    assert capture.captured == 200
    assert capture.dropped == 200 - len(seen)
    assert capture.dropped > 50


def test_outside_its_with_statement_it_says_so() -> None:
    with pytest.raises(UsageError, match="with Capture"):
        next(Capture(Camera(1, end), FramePolicy("newest")))


def test_a_generator_that_raises_ends_the_loop_with_its_error() -> None:
    def frames() -> Iterator[np.ndarray]:
        yield IMAGE
        raise OSError("bus error")

    with Capture(iterator_source(frames()), FramePolicy("every", 2)) as capture:
        assert next(capture).image is IMAGE
        with pytest.raises(OSError, match="bus error"):
            next(capture)
