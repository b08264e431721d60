"""The terminal: results on stdout, everything else on stderr; progress bars only where somebody looks."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["print_json", "progress_bars", "show", "tell"]

OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def tell(text: str, style: str = "") -> None:
    """Say something beside the result."""
    ERR.print(text, style=style, markup=False)


def show(item: Any) -> None:
    """Print a result for people: a table or a sentence."""
    OUT.print(item, markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines: one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain))


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Hand out a progress function that draws bars on a terminal and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(*columns, console=ERR, disable=not ERR.is_terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def report(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield report


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
