"""The command line: parse, call one library function, print. Heavy imports happen inside the commands."""

import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from grood_edge.cli_bench import bench_command
from grood_edge.cli_calibrate import calibrate_command
from grood_edge.cli_compile import compile_command
from grood_edge.cli_doctor import doctor_command, selftest_command
from grood_edge.cli_evaluate import evaluate_command
from grood_edge.cli_export import export_command
from grood_edge.cli_options import (
    AllowUnreadable,
    Alpha,
    Backend,
    Engine,
    Force,
    Json,
    Provider,
    RayAddress,
    Threads,
    Trust,
)
from grood_edge.cli_watch import watch_command
from grood_edge.errors import GroodEdgeError, Terminated, UsageError

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Turns every error of ours into one sentence and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GroodEdgeError as error:
            from grood_edge.terminal import plain_text

            print(plain_text(f"error: {error}"), file=sys.stderr)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            print(str(error) or "interrupted; nothing was written", file=sys.stderr)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Commands,
    help="Give an image classifier a calibrated 'I do not know this', in one ONNX file.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

app.command("export")(export_command)
app.command("calibrate")(calibrate_command)


@app.command("score")
def score_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    sources: Annotated[list[str], typer.Argument(help="Images, folders, globs, .npz archives.", metavar="SOURCE...")],
    out: Annotated[Path | None, typer.Option(help="Rows as .jsonl, .csv or .parquet.")] = None,
    alpha: Alpha = None,
    batch_size: Annotated[int, typer.Option(help="Images a batch.")] = 32,
    explain: Annotated[
        bool, typer.Option("--explain", help="Add nearest class, log s, nearest bank row and its image.")
    ] = False,
    backend: Backend = "onnxruntime",
    provider: Provider = None,
    trusted: Trust = None,
    threads: Threads = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Score images: one row an image, and a summary."""
    from contextlib import nullcontext

    from grood_edge.ray_engine import opened_engine, require_engine
    from grood_edge.runtime.score import ScoreRow, require_readable, row_writer, score_images
    from grood_edge.runtime.session import open_session
    from grood_edge.runtime.shards import score_with_workers, workers_for
    from grood_edge.tables import score_document, score_tables
    from grood_edge.terminal import print_json, progress_bars, show, tell, tell_notes
    from grood_edge.threads import limited_threads

    require_engine(engine, ray_address)
    if engine == "ray" and (backend != "onnxruntime" or provider not in (None, "cpu")):
        raise UsageError("--engine ray runs onnxruntime on CPUs; leave out --backend and --provider, or --engine ray")
    shown: list[ScoreRow] = []
    writer = nullcontext(_keep(shown, None if as_json else 20)) if out is None else row_writer(out, force)
    with (
        limited_threads(threads),
        progress_bars() as progress,
        open_session(
            model,
            alpha=alpha,
            backend=backend,
            provider=provider,
            trusted_engine=trusted,
            any_size=True,
            progress=progress,
        ) as session,
    ):
        tell_notes(session.fallbacks)
        with writer as write, opened_engine(engine, ray_address) as cluster:
            if cluster is None:
                summary = score_images(session, sources, write, batch_size, progress, explain)
            else:
                workers = workers_for(cluster, model, session)
                summary = score_with_workers(workers, sources, write, batch_size, progress, explain)
        tell_notes((), summary.unreadable)
        if as_json:
            print_json(score_document(summary, session, shown, out))
        else:
            for table in score_tables(summary, session, shown):
                show(table)
            tell(f"rows are in {out}" if out else "All rows: add --out scores.jsonl (or .csv, .parquet)")
    if not allow_unreadable:
        require_readable(summary)


app.command("evaluate")(evaluate_command)
app.command("watch")(watch_command)
app.command("bench")(bench_command)
app.command("doctor")(doctor_command)
app.command("selftest")(selftest_command)
app.command("compile")(compile_command)


@app.command("inspect")
def inspect_command(model: Annotated[Path, typer.Argument(help="The artifact.")], as_json: Json = False) -> None:
    """Show everything that an artifact's contract says."""
    from grood_edge.artifact import read_artifact
    from grood_edge.tables import artifact_document, artifact_table
    from grood_edge.terminal import print_json, show, tell

    artifact = read_artifact(model)
    if as_json:
        print_json(artifact_document(artifact))
        return
    show(artifact_table(artifact))
    tell(f"Next: grood-edge verify {model}")


@app.command("verify")
def verify_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    backend: Backend = "onnxruntime",
    provider: Provider = None,
    trusted: Trust = None,
    as_json: Json = False,
) -> None:
    """Replay the embedded probes on this machine; exit code 1 when a score or decision differs."""
    from grood_edge.probes import replay_probes
    from grood_edge.runtime.session import open_session
    from grood_edge.tables import probe_document, probe_table
    from grood_edge.terminal import print_json, progress_bars, show, tell, tell_notes

    with (
        progress_bars() as progress,
        open_session(model, backend=backend, provider=provider, trusted_engine=trusted, progress=progress) as session,
    ):
        tell_notes(session.fallbacks)
        report = replay_probes(session.contract, session.backend.run, session.backend.provider)
    if as_json:
        print_json(probe_document(report))
    else:
        show(probe_table(report))
        verdict = "PASS" if report.passed else "FAIL"
        show(
            f"{verdict}: largest score error {report.largest_error:.1e} (at most {report.tolerance:.0e} is accepted on "
            f"{report.provider}), {report.flips} decision flips in {len(report.rows)} runs"
        )
        if not report.passed:
            tell("This machine does not decide like the one that exported: do not use the artifact here.")
    raise typer.Exit(0 if report.passed else 1)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("grood-demo"),
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo in that folder.")] = False,
    as_json: Json = False,
) -> None:
    """Run the main job on real images: train, export, verify, score digits against things that are no digits."""
    from grood_edge.demo.run import run_demo
    from grood_edge.demo.table import demo_tables
    from grood_edge.terminal import print_json, progress_bars, show, tell

    with progress_bars() as progress:
        report = run_demo(out, seed, force, progress)
    if as_json:
        print_json(report)
        return
    for table in demo_tables(report):
        show(table)
    tell(f"Next: grood-edge inspect {report.artifact}")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print version, build and packages, and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        from grood_edge.cli_version import version_lines

        print("\n".join(version_lines()))
        raise typer.Exit()


def main() -> None:
    """Run the command line: exit code 0 done, 1 refused, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, partial(_hang_up, [fd for fd in (1, 2) if os.isatty(fd)]))
    app()


def _interrupt(number: int, frame: FrameType | None) -> None:
    for further in ("SIGTERM", "SIGHUP"):  # shells and systemd send several; one that came now would end the closing
        if hasattr(signal, further):
            signal.signal(getattr(signal, further), signal.SIG_IGN)
    raise Terminated(number)


def _hang_up(terminals: list[int], number: int, frame: FrameType | None) -> None:
    """The terminal is gone: saying anything would fail, and that must not come before outputs are closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in terminals:
        os.dup2(nowhere, fd)
    _interrupt(number, frame)


def _keep(rows: list[Any], most: int | None) -> Callable[[Any], None]:
    return lambda row: rows.append(row) if most is None or len(rows) < most else None
