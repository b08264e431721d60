"""Between a camera that does not wait and a network that takes its time: which frames are kept, which are dropped."""

import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Literal

from grood_edge.errors import UsageError
from grood_edge.runtime.capture.sources import CapturedFrame, Clock, Source

__all__ = ["Capture", "FramePolicy", "Mailbox", "parse_policy"]

_EVERY_SIZE = 4  # frames read ahead of a file; decoding overlaps scoring, and memory stays small
_LARGEST = 1000
_LOOK_UP = 0.5  # seconds between looks at signals while nothing comes; Windows interrupts no wait without end
_JOIN = 2.0  # seconds that a driver has for ending its read


@dataclass(frozen=True)
class FramePolicy:
    """What happens to frames while the consumer is busy.

    `newest`: only the newest frame is kept. `drop-oldest`: the `size` newest are kept, in order. `every`: none is lost,
    the source waits while `size` frames are waiting.
    """

    kind: Literal["newest", "every", "drop-oldest"]
    size: int = 1


def parse_policy(text: str | None, live: bool) -> FramePolicy:
    """Read `newest`, `every` or `drop-oldest:N` (N from 1 to 1000); None is `newest` if live, else `every`.

    Raises:
        UsageError: it is none of them.
    """
    text = text or ("newest" if live else "every")
    kind, _, count = text.partition(":")
    if text == "newest":
        return FramePolicy("newest")
    if text == "every":
        return FramePolicy("every", _EVERY_SIZE)
    if kind == "drop-oldest" and count.isdecimal() and len(count) <= 4 and 1 <= int(count) <= _LARGEST:
        return FramePolicy("drop-oldest", int(count))
    raise UsageError(f"frame policy {text!r}; expected newest, every, or drop-oldest:N with N from 1 to {_LARGEST}")


class Mailbox:
    """Hands frames from one thread to another, never more than the policy's `size` waiting.

    captured: frames put. dropped: of these, the ones that nobody will see. delivered: the ones taken. All three and
    the frames that still wait add up at any time. Safe for any threads.
    """

    def __init__(self, policy: FramePolicy) -> None:
        self._policy = policy
        self._waiting: deque[CapturedFrame] = deque()
        self._change = threading.Condition()
        self._finished = False
        self._error: BaseException | None = None
        self.captured = self.dropped = self.delivered = 0

    @property
    def drained(self) -> bool:
        """Nothing waits, nothing will be put, and no error is left to be raised."""
        with self._change:
            return self._finished and not self._waiting and self._error is None

    def put(self, frame: CapturedFrame) -> bool:
        """Leave a frame; with `every`, wait for room. False once closed: the frame was dropped."""
        with self._change:
            if self._policy.kind == "every":
                self._change.wait_for(lambda: self._finished or len(self._waiting) < self._policy.size)
            self.captured += 1
            if self._finished:
                self.dropped += 1
                return False
            if len(self._waiting) == self._policy.size:
                self._waiting.popleft()
                self.dropped += 1
            self._waiting.append(frame)
            self._change.notify_all()
            return True

    def take(self, timeout: float | None = None) -> CapturedFrame | None:
        """Take the oldest waiting frame; None when nothing came within `timeout` seconds, or `drained`.

        Raises:
            BaseException: what ended the source, after the frames before it were taken.
        """
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._finished, timeout)
            if self._waiting:
                self.delivered += 1
                frame = self._waiting.popleft()
                self._change.notify_all()
                return frame
            error, self._error = self._error, None
            if error is not None:
                raise error
            return None

    def finish(self, error: BaseException | None = None) -> None:
        """Say that no more frames come, and why; those that wait can still be taken."""
        with self._change:
            if not self._finished:
                self._finished, self._error = True, error
            self._change.notify_all()

    def close(self) -> None:
        """Say that nobody takes frames any more: those that wait are dropped, a waiting `put` returns."""
        with self._change:
            self.dropped += len(self._waiting)
            self._waiting.clear()
            self._finished, self._error = True, None
            self._change.notify_all()


class Capture:
    """Reads a source in a thread of its own; an iterator over the frames that the policy leaves.

    Used in a `with` statement: leaving it, by whatever way, stops the thread and closes the source. An exception in the
    source is raised in the loop that iterates, after the frames before it. The thread is a daemon, so a driver
    that never returns keeps no process alive.

    Args:
        source: read by this capture alone, and closed by it.
        policy: which frames are kept.
        stall_after: seconds without a frame after which the last one is handed out again without its image and with a
            `problem`, and again every so many seconds: whoever waits must learn that the camera stands still. None for
            sources that may take their time.
        clock: the one that stamps `captured`.
    """

    def __init__(
        self, source: Source, policy: FramePolicy, stall_after: float | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.source = source
        self._mailbox = Mailbox(policy)
        self._stall_after = stall_after
        self._clock = clock
        self._last = CapturedFrame(None, 0, clock(), None, source.name)
        self._told = self._last.captured
        self._thread = threading.Thread(target=self._run, name=f"capture {source.name}", daemon=True)

    @property
    def captured(self) -> int:
        """Frames that the source delivered."""
        return self._mailbox.captured

    @property
    def dropped(self) -> int:
        """Frames that were captured and will never be seen."""
        return self._mailbox.dropped

    def __enter__(self) -> "Capture":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop: frames that wait are dropped, a blocked read is woken, the thread ends."""
        self._mailbox.close()
        self.source.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN)

    def __iter__(self) -> "Capture":
        return self

    def __next__(self) -> CapturedFrame:
        if self._thread.ident is None:
            raise UsageError("a capture delivers frames inside its with statement: with Capture(...) as frames")
        while (frame := self._mailbox.take(self._patience())) is None:
            if self._mailbox.drained:
                raise StopIteration
            if self._stall_after is not None and self._quiet() >= self._stall_after:
                self._told = self._clock()
                return replace(self._last, image=None, problem=f"no frame for {self._told - self._last.captured:.1f} s")
        self._last = frame
        return frame

    def _quiet(self) -> float:
        return self._clock() - max(self._told, self._last.captured)

    def _patience(self) -> float:
        return _LOOK_UP if self._stall_after is None else min(_LOOK_UP, max(0.0, self._stall_after - self._quiet()))

    def _run(self) -> None:
        try:
            while (frame := self.source.read()) is not None and self._mailbox.put(frame):
                pass
            self._mailbox.finish()
        except BaseException as error:  # whatever it is, the consumer must not wait for frames that never come
            self._mailbox.finish(error)
        finally:
            self.source.close()
