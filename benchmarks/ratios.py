"""What the benchmarks share: things measured side by side in turn, ratios with intervals, and lines of the table.

Two sides are called in turn, the order changing, so that a machine that slows down slows both. A ratio is the median
over rounds of the ratio of medians; a round opens whatever it measures anew, because where memory happens to lie can
make one of two equal sessions faster. The interval (95 %) is that of `grood_edge.bench.statistics`, over these rounds,
or over the turns where there is one round. Fewer than six of them give no interval, only the range that they cover.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from grood_edge.bench import statistics
from grood_edge.bench.loop import Clock, Side, timed, times_in_turn

Times = NDArray[np.float64]  # [turns, sides]: seconds, or another quantity of which less is better
WARM_UP, LEAST = 5, 20
FEW = 6  # with fewer rounds a 95 % interval would hold the ratio less often than it says
INTERVAL, COUNTED = "95 %", "counted"


@dataclass(frozen=True)
class Timing:
    """How a call is timed. `after_one`: right after another one of its own, which is not.

    That is as in use: caches hold what the side itself left there, and not another network. `pause` are seconds before
    that: with more than one thread, those of the session before still spin for a while, and take the cores.
    """

    clock: Clock = time.perf_counter
    after_one: bool = False
    pause: float = 0.0

    def side(self, call: Callable[[], Any]) -> Side:
        """Make a side for `times_in_turn`."""
        side = timed(call, self.clock)

        def after_another(number: int) -> tuple[float, ...]:
            time.sleep(self.pause)
            call()
            return side(number)

        return after_another if self.after_one else side


def interleaved(
    sides: Sequence[Callable[[], Any]],
    seconds: float,
    least: int = LEAST,
    warm_up: int = WARM_UP,
    timing: Timing = Timing(),
) -> Times:
    """Call all sides in turn for `seconds` and at least `least` times each; return seconds `[turns, sides]`."""
    for _ in range(warm_up):
        for side in sides:
            side()
    timed_sides = [timing.side(side) for side in sides]
    return np.concatenate(times_in_turn(timed_sides, seconds, time.perf_counter, least=least), axis=1)


@dataclass(frozen=True)
class Ratio:
    """One side over another, and the median of each side in the unit that was measured.

    low, high: what `basis` says: INTERVAL, or the range of so many rounds or turns, or COUNTED, where nothing varies.
    """

    value: float
    low: float
    high: float
    over: float
    under: float
    turns: int
    basis: str = INTERVAL


def ratio_of(rounds: Sequence[Times], over: int, under: int) -> Ratio:
    """Return side `over` in units of side `under`."""
    pairs = [times[:, [under, over]] for times in rounds]
    single = [pairs[0][turn : turn + 1] for turn in range(len(pairs[0]))] if len(pairs) == 1 else pairs
    if len(single) < FEW:
        each = [statistics.ratio_of([pair]) for pair in single]
        low, high = min(each), max(each)
        basis = f"range of {len(single)} {'turn' if len(pairs) == 1 else 'round'}{'s' * (len(single) > 1)}"
    else:
        interval = statistics.ratio_interval(pairs)
        low, high, basis = interval.low, interval.high, INTERVAL
    medians = np.median(np.concatenate(pairs), axis=0)
    turns = sum(len(times) for times in pairs)
    return Ratio(statistics.ratio_of(pairs), low, high, float(medians[1]), float(medians[0]), turns, basis)


def counted(over: float, under: float) -> Ratio:
    """Return the ratio of two counts, which are the same every time."""
    value = over / under
    return Ratio(value, value, value, over, under, 1, COUNTED)


@dataclass(frozen=True)
class Target:
    """What a ratio should be."""

    sense: Literal["at least", "at most"]
    value: float

    def met(self, ratio: Ratio) -> str:
        """Say whether the ratio meets it; `not certain` where the interval holds the target, or the range there is."""
        reached = ratio.value >= self.value if self.sense == "at least" else ratio.value <= self.value
        word = "yes" if reached else "no"
        if ratio.basis not in (INTERVAL, COUNTED):
            return f"{word} ({ratio.basis})"
        crossed = ratio.basis == INTERVAL and ratio.low <= self.value <= ratio.high
        return f"{word} (not certain)" if crossed else word


@dataclass(frozen=True)
class Line:
    """One line of the table: `what` over `against`, in a section. `unit` is that of the two medians."""

    section: str
    what: str
    against: str
    ratio: Ratio
    unit: str
    target: Target | None = None
    note: str = ""


@dataclass(frozen=True)
class Found:
    """What a benchmark found. `skipped`: (what, reason). `details`: whatever else the JSON should keep."""

    lines: tuple[Line, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def table_text(lines: Sequence[Line]) -> str:
    """Return the lines as a markdown table."""
    rows = ["| what | over | ratio (95 %) | measured | target | met |", "|---|---|---:|---|---|---|"]
    section = ""
    for line in lines:
        if line.section != section:
            rows.append(f"| **{line.section}** | | | | | |")
            section = line.section
        r, t = line.ratio, line.target
        ratio = f"**{_short(r.value)}**{_spread(r)}"
        medians = f"{_short(r.over)} / {_short(r.under)} {line.unit}" + (f"; {line.note}" if line.note else "")
        target, met = (f"{t.sense} {t.value:g}", t.met(r)) if t else ("", "")
        rows.append(f"| {line.what} | {line.against} | {ratio} | {medians} | {target} | {met} |")
    return "\n".join(rows)


def _spread(ratio: Ratio) -> str:
    if ratio.basis == COUNTED:
        return ""
    basis = "" if ratio.basis == INTERVAL else f", {ratio.basis}"
    return f" ({_short(ratio.low)} to {_short(ratio.high)}{basis})"


def _short(value: float) -> str:
    """Three digits, four for ratios near one."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value < 0.5 or value >= 2 else f"{value:.3f}"


def machine() -> dict[str, object]:
    """Describe the machine that the figures are of."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def run_as_script(document: str | None, measure: Callable[[Path, bool], Found]) -> None:
    """Parse the options of a benchmark, measure, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few calls of each: shows that it works")
    parser.add_argument("--work", type=Path, help="folder of images and artifacts; made there when it is empty")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.work or Path(folder), arguments.quick)
    print(table_text(found.lines))
    for what, reason in found.skipped:
        print(f"skipped: {what}: {reason}")
    if arguments.json:
        arguments.json.write_text(json.dumps(as_document(found), indent=2) + "\n")


def as_document(found: Found) -> dict[str, Any]:
    """Return what the JSON holds."""
    return {"machine": machine(), **asdict(found)}
