"""How long work tells how far it is: a callable that the caller may hand in."""

from typing import Protocol

__all__ = ["Progress", "silent"]


class Progress(Protocol):
    """Called as work goes on; the CLI draws bars with it."""

    def __call__(self, label: str, done: int, total: int | None) -> None:
        """Say that `done` of `total` items (None: unknown) of the step `label` are done."""


def silent(label: str, done: int, total: int | None) -> None:
    """Report nothing."""
