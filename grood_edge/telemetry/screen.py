"""A stream on the terminal: one line while it runs, the changes of state as they come, tables at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from rich.live import Live
from rich.table import Table
from rich.text import Text

from grood_edge.runtime.drift import Drift
from grood_edge.runtime.stream import StreamVerdict
from grood_edge.tables import key_values
from grood_edge.telemetry.watching import WatchSummary
from grood_edge.terminal import ERR, plain_text, tell

__all__ = ["status_line", "watch_tables"]

_STYLES = {"KNOWN": "green", "UNKNOWN": "bold red", "UNSURE": "yellow", "NO-VIEW": "magenta"}
_SECONDS_A_LINE = 0.1
_SHOWN = 12  # changes of state in the table; the log has all


@contextmanager
def status_line() -> Iterator[Callable[[StreamVerdict], None]]:
    """Hand out a function that shows a stream's newest verdict in one line, and each change of state in one of its own.

    Times are seconds since the first frame. Where nobody looks there are only the changes.
    """
    with Live(console=ERR, auto_refresh=False, transient=True) if ERR.is_terminal else nullcontext() as live:
        shown = -1.0
        start: float | None = None
        told: Drift | None = None

        def report(found: StreamVerdict) -> None:
            nonlocal shown, start, told
            start = found.time if start is None else start
            if found.changed:
                tell(
                    f"{found.time - start:10.2f} s  {found.state.name:<8} {found.state.reason}",
                    _STYLES[found.state.name],
                )
            if found.drift is not None and found.drift != told:
                told = found.drift
                if told.drifted:
                    kept = "" if told.measured else "; the level is not kept without episodes"
                    figure = f"distance {told.statistic:.2f}, p {told.p_value:.1g}{kept}"
                    tell(
                        f"{told.time - start:10.2f} s  DRIFT    scores no longer look like calibration: {figure}",
                        "yellow",
                    )
            now = time.monotonic()
            if live is not None and now - shown >= _SECONDS_A_LINE:
                live.update(Text(plain_text(_line(found)), _STYLES[found.state.name], no_wrap=True), refresh=True)
                shown = now

        yield report


def _line(found: StreamVerdict) -> str:
    said, state = found.verdict, found.state
    parts = [f"frame {found.frame.index}", f"{state.name} for {max(0.0, found.time - state.since):.1f} s"]
    parts.append(found.status if said is None else f"{said.class_name}  p {said.p_value:.3f}")
    parts += [f"age {1000 * found.age:.0f} ms", f"dropped {found.dropped}"]
    if found.drift is not None and found.drift.drifted:
        parts.append(f"DRIFT {found.drift.statistic:.2f}")
    return "  ".join(parts)


def watch_tables(summary: WatchSummary) -> list[Table]:
    """Return what a stream came to, and its changes of state."""
    frames = ", ".join(f"{count:,} {name}" for name, count in sorted(summary.statuses.items(), key=lambda s: -s[1]))
    states = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in summary.states.items() if seconds > 0)
    rows = [
        ("frames", f"{summary.frames:,}: {frames}"),
        *((f"first {status}", problem) for status, problem in summary.problems.items()),
        ("dropped", f"{summary.dropped:,} captured and never looked at"),
        ("states", states or "one frame"),
        ("age", _times(summary.age, "from capture to decision")),
        ("latency", _times(summary.latency, "in the session")),
        ("drift", f"{summary.drifted} windows no longer looked like calibration" if summary.drifted else "none found"),
        ("ended", summary.ended),
    ]
    tables = [key_values("what was seen", rows)]
    if summary.transitions:
        changes = Table("time", "frame", "from", "to", "why", title=f"changes of state: {summary.changes:,}")
        for change in summary.transitions[:_SHOWN]:
            why = plain_text(change.reason)
            changes.add_row(f"{change.time:.2f} s", str(change.frame), change.before, change.after, why)
        if summary.changes > _SHOWN:
            changes.add_row("...", "", "", "", f"{summary.changes - _SHOWN:,} more; --log has all")
        tables.append(changes)
    return tables


def _times(found: tuple[float, float] | None, what: str) -> str:
    return "-" if found is None else f"median {1000 * found[0]:.1f} ms, 99 % below {1000 * found[1]:.1f} ms, {what}"
