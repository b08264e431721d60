"""The command `grood-edge bench`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grood_edge.cli_options import Backend, Json, Provider, Trust

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grood_edge.bench.results import BatchResult, BenchReport

__all__ = ["bench_command"]

_MIB = 1 << 20


def bench_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    batch: Annotated[str | None, typer.Option(help="Images a run. (default: 1,8)", metavar="N,N,...")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of onnxruntime. (default: its own)")] = None,
    seconds: Annotated[float, typer.Option(help="Of measuring, for each batch size.")] = 10.0,
    baseline: Annotated[
        Path | None,
        typer.Option(help="The bare classifier's .onnx to compare with. (default: the artifact without its head)"),
    ] = None,
    backend: Backend = "onnxruntime",
    provider: Provider = None,
    trusted: Trust = None,
    as_json: Json = False,
) -> None:
    """Measure an artifact here: latency, throughput, memory, where the time goes, and the cost over the classifier."""
    from grood_edge.bench.measure import bench
    from grood_edge.bench.options import BenchOptions, parse_batches
    from grood_edge.runtime.choose import Choice
    from grood_edge.terminal import print_json, progress_bars, show, tell, tell_notes

    options = BenchOptions(None if batch is None else parse_batches(batch), seconds, baseline)
    choice = Choice(backend, provider, threads, trusted)
    with progress_bars(background=False) as progress:
        found = bench(model, options, choice, progress)
    tell_notes(found.notes)
    if as_json:
        print_json(found)
        return
    for table in _tables(found):
        show(table)
    name = shlex.quote(str(model))
    if baseline is None:
        tell(f"Next: grood-edge bench {name} --baseline CLASSIFIER.onnx, against the file that it was exported from")
    else:
        tell("Next: grood-edge doctor, which shows what else could run it here")


def _tables(found: "BenchReport") -> list[Any]:
    compared = [row for row in found.batches if row.ratio is not None]
    return [
        _latency_table(found.batches),
        *([_ratio_table(compared)] if compared else []),
        _split_table(found.batches),
        _facts(found),
    ]


def _latency_table(rows: "Sequence[BatchResult]") -> Any:
    from grood_edge.bench.statistics import PERCENTS, runs_needed

    names = (*(f"p{percent:g}" for percent in PERCENTS), "images/s", "runs", "settled after")
    table = _table("a whole call: frames in, verdicts out; ms", "batch", *names)
    for row in rows:
        latency, warm_up = row.latency, row.warm_up
        values = (latency.p50, latency.p90, latency.p99, latency.p99_9)
        settled = f"{'' if warm_up.settled else 'not in '}{warm_up.runs:,}"
        counts = (f"{latency.images_per_second:,.1f}", f"{latency.runs:,}", settled)
        table.add_row(str(row.batch), *(_ms(value) for value in values), *counts)
    if any(row.latency.p99_9 is None for row in rows):
        needed = ", ".join(f"p{percent:g} {runs_needed(percent):,}" for percent in PERCENTS)
        table.caption, table.caption_justify = f"-: too few runs. Needed: {needed}", "left"
    return table


def _ratio_table(rows: "Sequence[BatchResult]") -> Any:
    table = _table("over the bare classifier, in turn; ms", "batch", "bare", "artifact", "ratio", "95 %")
    for row in rows:
        r = row.ratio
        assert r is not None
        interval = f"{r.low:.3f} to {r.high:.3f}"
        table.add_row(str(row.batch), _ms(r.bare), _ms(r.artifact), f"{r.value:.3f}", interval)
    return table


def _split_table(rows: "Sequence[BatchResult]") -> Any:
    names = ("host", "copy", "graph", "= prepare", "+ network", "+ head", "decision")
    table = _table("where the time goes, medians; ms", "batch", *names)
    for row in rows:
        s = row.split
        parts = (
            s.host_preprocessing, s.copy, s.graph, s.graph_preprocessing, s.network, s.head, s.decision,
        )  # fmt: skip
        table.add_row(str(row.batch), *(_ms(value) for value in parts))
    if any(row.split.head is None for row in rows):
        table.caption, table.caption_justify = "-: cannot be told apart with this backend", "left"
    return table


def _facts(found: "BenchReport") -> Any:
    from grood_edge.tables import key_values

    memory = found.memory
    parts = {"before": memory.before, "with the artifact": memory.artifact, "with everything": memory.peak}
    states = (found.before, found.after)
    facts = {
        "artifact": f"{found.model}, {found.precision}",
        "runs on": f"{found.provider}, threads: {found.threads or 'as onnxruntime chooses'}",
        "frames": f"{'x'.join(map(str, found.frames.shape))}, {found.frames.source}",
        "bare classifier": found.baseline or "none",
        "resident memory": ", ".join(
            f"{name} {value / _MIB:,.0f} MiB" for name, value in parts.items() if value is not None
        ),
        "CPU clocks": _change(*(state.cpu_clocks for state in states)),
        "temperatures": _change(*(state.temperatures for state in states)),
        "power": _change(*(state.power for state in states)),
        "load": _change(*("" if state.load is None else f"{state.load:.1f}" for state in states)),
    }
    return key_values("measured", [(name, value) for name, value in facts.items() if value])


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} before, {after} after"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 100 else f"{value:,.1f}"


def _table(title: str, *names: str) -> Any:
    import rich.box
    from rich.table import Table

    table = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    return table
