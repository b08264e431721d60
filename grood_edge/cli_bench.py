"""The command `grood-edge bench`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from grood_edge.cli_options import Backend, Json, Provider, Trust

if TYPE_CHECKING:
    from grood_edge.bench.results import BatchResult, BenchReport, Ratio

__all__ = ["bench_command"]

_MIB = 1 << 20


def bench_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    batch: Annotated[str | None, typer.Option(help="Images a run. [default: 1,8]", metavar="N,N,...")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of onnxruntime. [default: its own]")] = None,
    seconds: Annotated[float, typer.Option(help="Of measuring, for each batch size.")] = 10.0,
    baseline: Annotated[
        Path | None,
        typer.Option(help="The bare classifier's .onnx to compare with. [default: the artifact without its head]"),
    ] = None,
    backend: Backend = "onnxruntime",
    provider: Provider = None,
    trusted: Trust = None,
    as_json: Json = False,
) -> None:
    """Measure an artifact here: latency, throughput, memory, where the time goes, and the cost over the classifier."""
    from grood_edge.bench.measure import BenchOptions, bench, parse_batches
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
    return [_latency_table(found), _split_table(found.batches), _facts(found)]


def _latency_table(found: "BenchReport") -> Any:
    from grood_edge.bench.statistics import PERCENTS, runs_needed

    table = _table("a whole call: frames in, verdicts out", "batch", *(f"p{p:g}" for p in PERCENTS), "images/s", "runs")
    table.add_column("over the bare classifier (95 %)")
    table.add_column("warm-up")
    for row in found.batches:
        latency, warm_up = row.latency, row.warm_up
        values = (latency.p50, latency.p90, latency.p99, latency.p99_9)
        settled = "settled after" if warm_up.settled else "NOT settled after"
        table.add_row(
            str(row.batch),
            *(_ms(value) for value in values),
            f"{latency.images_per_second:,.1f}",
            f"{latency.runs:,}",
            _ratio(row.ratio),
            f"{settled} {warm_up.runs:,} runs",
        )
    if any(row.latency.p99_9 is None for row in found.batches):
        needed = ", ".join(f"p{percent:g} {runs_needed(percent):,}" for percent in PERCENTS)
        table.caption, table.caption_justify = f"-: too few runs. Needed are: {needed}", "left"
    return table


def _ratio(ratio: "Ratio | None") -> str:
    if ratio is None:
        return "-"
    return f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}); bare {_ms(ratio.bare)}"


def _split_table(rows: "tuple[BatchResult, ...]") -> Any:
    names = ("host preprocessing", "copy", "graph", "its preprocessing", "its network", "its head", "decision")
    table = _table("where the time goes (medians)", "batch", *names)
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
        "runs on": found.provider if found.threads is None else f"{found.provider}, {found.threads} threads",
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
    return "-" if value is None else f"{value:.3f} ms" if value < 100 else f"{value:,.1f} ms"


def _table(title: str, *names: str) -> Any:
    import rich.box
    from rich.table import Table

    table = Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    return table
