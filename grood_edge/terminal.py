"""The terminal: results on stdout, everything else on stderr; progress bars only where somebody looks."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

__all__ = ["escaped_json", "plain_text", "print_json", "progress_bars", "show", "tell", "tell_notes"]

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
OUT = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def tell(text: str, style: str = "") -> None:
    """Say something beside the result."""
    ERR.print(plain_text(text), style=style, markup=False)


def tell_notes(warnings: Iterable[str], unreadable: Iterable[tuple[str, str]] = ()) -> None:
    """Say what could not be read, as (name, reason), and what one should know about a result."""
    for name, reason in unreadable:
        tell(f"unreadable: {name}: {reason}", "yellow")
    for warning in warnings:
        tell(f"warning: {warning}", "yellow")


def plain_text(text: str) -> str:
    """Make control characters visible: names of files and tensors are other people's, and terminals obey them.

    So are marks that turn the writing direction, and bytes of a file's name that are no UTF-8.
    """
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def escaped_json(text: str) -> str:
    r"""Write what `plain_text` makes visible in the text of a JSON document as JSON does, \uXXXX: it means the same."""
    return _CONTROL.sub(lambda found: json.dumps(found.group())[1:-1], text)


def show(item: Any) -> None:
    """Print a result for people: a table or a sentence."""
    OUT.print(item, markup=False)


def print_json(value: Any) -> None:
    """Print a result for machines: one JSON document."""
    print(escaped_json(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False, default=_plain)))


@contextmanager
def progress_bars(background: bool = True) -> Iterator[Callable[[str, int, int | None], None]]:
    """Hand out a progress function that draws bars on a terminal and nothing elsewhere.

    Without `background` they are drawn when something is reported alone: a thread that draws would be measured, too.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with RichProgress(
        *columns, console=ERR, disable=not ERR.is_terminal, transient=True, auto_refresh=background
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def report(label: str, done: int, total: int | None) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total, refresh=not background)

        yield report


def _finite(value: Any) -> Any:
    """JSON has no NaN and no Inf: null stands for them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _finite(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    return str(value)
