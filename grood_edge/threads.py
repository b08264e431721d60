"""How many CPU threads the work inside a block may use: of onnxruntime, and of decoding images."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from grood_edge.errors import UsageError

__all__ = ["decoding_threads", "limited_threads", "thread_limit"]

MAX_THREADS = 1024
MOST_DECODERS = 16  # each holds one whole image, however many cores there are
_LIMIT: ContextVar[int | None] = ContextVar("grood_edge_threads", default=None)


@contextmanager
def limited_threads(count: int | None) -> Iterator[None]:
    """Let every model that is opened in the block run on `count` threads, and as many decode images.

    None changes nothing. A context variable, because an export opens a dozen models in as many places.

    Raises:
        UsageError: a count below 1 or above 1,024.
    """
    if count is not None and not 1 <= count <= MAX_THREADS:
        raise UsageError(f"--threads {count}; expected a number from 1 to {MAX_THREADS}")
    token = _LIMIT.set(thread_limit() if count is None else count)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def thread_limit() -> int | None:
    """Return what the innermost block allows; None leaves it to onnxruntime."""
    return _LIMIT.get()


def decoding_threads() -> int:
    """Return how many threads decode images: the limit, or the cores that this process may run on."""
    return min(MOST_DECODERS, thread_limit() or _cores())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
