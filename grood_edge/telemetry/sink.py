"""Where stream verdicts go."""

from typing import Protocol, runtime_checkable

from grood_edge.runtime.stream import StreamVerdict

__all__ = ["Sink"]


@runtime_checkable
class Sink(Protocol):
    """Takes every verdict of a stream, in order, from one thread. A Protocol because users bring their own.

    Frames are only borrowed: a sink that keeps pixels beyond `write` copies them.
    """

    def write(self, verdict: StreamVerdict) -> None:
        """Write or show one verdict. Raises `OutputError` when that is no longer possible."""

    def close(self) -> None:
        """Finish what was written, so that it can be read. Called once or more, also after an error."""
