"""Images decoded by a few threads ahead of whoever takes them, so that the network does not wait for JPEGs.

Pillow and NumPy let go of the interpreter's lock while they decode and resize, and onnxruntime while it runs: the
thread that takes the images is the network's own.
"""

import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Generic, Protocol, TypeVar, runtime_checkable

from grood_edge.images import UnreadableImageError, large_images_in_turn
from grood_edge.threads import decoding_threads

__all__ = ["AHEAD", "AHEAD_BYTES", "decoded"]

AHEAD = 96  # results that may wait to be taken: three batches,
AHEAD_BYTES = 64 << 20  # unless they are larger than this
PATIENCE = 2.0  # seconds that threads have to end; they are daemons


@runtime_checkable
class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


_Item = TypeVar("_Item")
_Result = TypeVar("_Result", bound=_Sized)


def decoded(
    items: Iterable[_Item], load: Callable[[_Item], _Result], workers: int | None = None
) -> Generator[tuple[_Item, _Result | UnreadableImageError], None, None]:
    """Load every item, several at a time; yield each with its result in the order of `items`.

    At most `AHEAD` results of `AHEAD_BYTES` in all wait, beside the one that every worker is at; items are taken no
    earlier. Only one worker at a time has a large image file (`images.LARGE_PIXELS`). When the iterator is closed, or
    dropped, its threads end with the image they are at; those that are stuck in a file or an item that never comes,
    as on a share that is gone, are left behind after two seconds.

    Args:
        items: taken by one thread at a time, not always the same one.
        load: called from several threads. An `UnreadableImageError` becomes the result; any other exception is raised
            here, in its item's turn.
        workers: threads; None takes `decoding_threads()`.
    """
    queue = _Queue(iter(items), load)
    count = workers or decoding_threads()
    threads = [threading.Thread(target=queue.work, name=f"decoding-{i}", daemon=True) for i in range(count)]
    try:
        for thread in threads:
            thread.start()
        yield from queue.results()
    finally:
        queue.close()
        ends = time.monotonic() + PATIENCE
        for thread in threads:
            if thread.ident is not None:
                thread.join(max(0.0, ends - time.monotonic()))


class _Queue(Generic[_Item, _Result]):
    """Results by place. Places are given out in order, so the next one to be taken never waits for room."""

    def __init__(self, items: Iterator[_Item], load: Callable[[_Item], _Result]) -> None:
        self._items, self._load = items, load
        self._changed = threading.Condition()
        self._source = threading.Lock()  # of `_items` and `_given`; taken before `_changed`
        self._waiting: dict[int, tuple[_Item, _Result | UnreadableImageError]] = {}
        self._bytes = self._given = self._taken = 0
        self._end: int | None = None  # the place after the last one, or the one that failed with `_error`
        self._error: BaseException | None = None
        self._closed = False

    def work(self) -> None:
        """Load items until there are no more."""
        while (given := self._next()) is not None:
            place, item = given
            try:
                with large_images_in_turn():
                    result: _Result | UnreadableImageError = self._load(item)
            except UnreadableImageError as error:
                result = UnreadableImageError(*error.args)  # tracebacks, also its cause's, hold the file and the pixels
            except BaseException as error:  # whoever takes the results would wait for ever
                self._stop(place, error)
                return
            with self._changed:
                self._waiting[place] = item, result
                self._bytes += _size(result)
                self._changed.notify_all()

    def results(self) -> Iterator[tuple[_Item, _Result | UnreadableImageError]]:
        """Yield the results in order."""
        while (found := self._take()) is not None:
            yield found

    def close(self) -> None:
        """Let the threads end with the image they are at."""
        with self._changed:
            self._closed, self._error = True, None
            self._waiting.clear()
            self._changed.notify_all()

    def _next(self) -> tuple[int, _Item] | None:
        with self._source:
            with self._changed:
                self._changed.wait_for(lambda: self._over() or self._has_room())
                if self._over():
                    return None
            try:
                item = next(self._items)  # may take long: results can be taken meanwhile, and the queue be closed
            except StopIteration:
                self._stop(self._given, None)
                return None
            except BaseException as error:  # an archive that is damaged here
                self._stop(self._given, error)
                return None
            with self._changed:
                if self._closed:  # while it waited
                    return None
            self._given += 1
            return self._given - 1, item

    def _take(self) -> tuple[_Item, _Result | UnreadableImageError] | None:
        with self._changed:
            place = self._taken
            self._changed.wait_for(lambda: place in self._waiting or place == self._end)
            if place in self._waiting:
                found = self._waiting.pop(place)
                self._bytes -= _size(found[1])
                self._taken += 1
                self._changed.notify_all()
                return found
            if self._error is not None:
                raise self._error
            return None

    def _over(self) -> bool:
        return self._closed or self._end is not None

    def _has_room(self) -> bool:
        return self._given - self._taken < AHEAD and self._bytes < AHEAD_BYTES

    def _stop(self, place: int, error: BaseException | None) -> None:
        with self._changed:
            if self._end is None or place < self._end:
                self._end, self._error = place, error
            self._changed.notify_all()


def _size(result: _Sized | UnreadableImageError) -> int:
    return 0 if isinstance(result, UnreadableImageError) else result.nbytes
