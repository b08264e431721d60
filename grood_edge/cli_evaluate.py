"""The command `grood-edge evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from grood_edge.cli_options import AllowUnreadable, Alpha, Engine, Force, Json, Provider, RayAddress, Threads

__all__ = ["evaluate_command"]


def evaluate_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    id_: Annotated[Path, typer.Option("--id", help="Fresh ID images, in folders named like the classes, or flat.")],
    ood: Annotated[
        list[str] | None, typer.Option(help="Images of other things; may be repeated.", metavar="NAME=DIR")
    ] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="Also score ID images blurred, darkened, ...")] = False,
    baselines: Annotated[bool, typer.Option("--baselines", help="Compare with other OOD scores.")] = False,
    fit: Annotated[str | None, typer.Option(help="With --baselines: the images that export got as --data.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write everything as one HTML file.")] = None,
    alpha: Alpha = None,
    provider: Provider = None,
    threads: Threads = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Show on your own images how well ID and OOD are told apart, and whether the promise holds."""
    from grood_edge.contract_rows import decision_rows
    from grood_edge.evaluate.evaluation import EvaluateOptions, evaluate
    from grood_edge.evaluate.sets import parse_ood
    from grood_edge.evaluate.settings import check_report, next_command, write_report
    from grood_edge.evaluate.summary import evaluation_document, evaluation_tables
    from grood_edge.runtime.session import open_session
    from grood_edge.terminal import print_json, progress_bars, show, tell, tell_notes
    from grood_edge.threads import limited_threads

    options = EvaluateOptions(
        model, id_, parse_ood(ood or ()), corrupt, baselines, fit, allow_unreadable, engine, ray_address
    )
    check_report(report, force)
    with (
        limited_threads(threads),
        open_session(model, alpha=alpha, provider=provider, any_size=True) as session,
        progress_bars() as progress,
    ):
        found = evaluate(session, options, progress)
        if report is not None:
            write_report(report, force, found, options, session, decision_rows(session.contract))
    tell_notes(found.warnings, found.unreadable)
    if as_json:
        print_json(evaluation_document(found))
        return
    for item in evaluation_tables(found):
        show(item)
    if report is not None:
        tell(f"The report is in {report}")
    tell(f"Next: {next_command(found, options, report)}")
