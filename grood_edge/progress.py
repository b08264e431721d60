"""How long work tells how far it is: a callable that the caller may hand in, and the CLI draws bars with."""

from collections.abc import Callable

__all__ = ["Progress", "silent"]

Progress = Callable[[str, int, int | None], None]  # label of the step, items done, items in all (None: unknown)


def silent(label: str, done: int, total: int | None) -> None:
    """Report nothing."""
