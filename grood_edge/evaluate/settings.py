"""Writing the report: what is needed to do the evaluation again, and the file itself, all or nothing."""

import datetime
import importlib.metadata
import platform
import shlex
from pathlib import Path

from grood_edge import __version__
from grood_edge.artifact import read_artifact
from grood_edge.errors import UsageError
from grood_edge.evaluate.decision import groups_of
from grood_edge.evaluate.evaluation import EvaluateOptions
from grood_edge.evaluate.metrics import RESAMPLES
from grood_edge.evaluate.promise import REMEDY
from grood_edge.evaluate.report import Facts, report_html
from grood_edge.evaluate.results import Evaluation
from grood_edge.publishing import check_output, publish
from grood_edge.runtime.session import Session

__all__ = ["check_report", "command_line", "next_command", "settings", "write_report"]

_PACKAGES = ("numpy", "pillow", "onnxruntime", "onnxruntime-gpu")


def check_report(path: Path | None, force: bool) -> None:
    """Find out before the work whether the report can be written.

    Raises:
        UsageError: a name that does not end in .html.
        OutputError: as `publishing.check_output`.
    """
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--report {path}: expected a name ending in .html")
    check_output(path, force)


def write_report(
    path: Path, force: bool, evaluation: Evaluation, options: EvaluateOptions, session: Session, choices: Facts
) -> None:
    """Write the HTML report; `choices`: what was chosen at export, and why.

    Raises:
        OutputError: it cannot be written, or exists without `force`.
    """
    page = report_html(evaluation, options.model.name, choices, settings(evaluation, options, session))
    publish(page.encode(errors="replace"), path, force)


def command_line(options: EvaluateOptions, session: Session) -> str:
    """Return the command that does this again, quoted for a POSIX shell."""
    parts = ["grood-edge", "evaluate", str(options.model), "--id", str(options.id_folder)]
    for name, folder in options.ood:
        parts += ["--ood", f"{name}={folder}"]
    parts += ["--corrupt"] * options.corrupt + ["--baselines"] * options.baselines
    parts += [] if options.fit is None else ["--fit", options.fit]
    if session.alpha != session.contract.calibration.alpha:
        parts += ["--alpha", f"{session.alpha:g}"]
    parts += ["--allow-unreadable"] * options.allow_unreadable
    return shlex.join(parts)


def next_command(evaluation: Evaluation, options: EvaluateOptions, report: Path | None) -> str:
    """Return what to do next: recalibrate for want of a promise, bring other images where it is untested."""
    model = shlex.quote(str(options.model))
    if evaluation.promise.outcome in ("broken", "none"):
        return REMEDY.replace("MODEL", model)
    if evaluation.promise.outcome == "untested":
        return f"grood-edge evaluate {model} --id FRESH ..., on images that neither fitted nor calibrated"
    if report is None:
        return "the same command with --report report.html, for pictures and the most confident mistakes"
    return f"grood-edge score {model} IMAGES --out scores.jsonl"


def settings(evaluation: Evaluation, options: EvaluateOptions, session: Session) -> list[tuple[str, str]]:
    """Return (name, value) of everything that the figures depend on."""
    artifact = read_artifact(options.model)
    groups = groups_of(session)
    rule = f"k = {groups[0].k} of n = {groups[0].n:,} calibration scores"
    if len(groups) > 1:
        rule = f"by predicted class, {sum(group.n for group in groups):,} calibration scores in {len(groups)} groups"
    versions = [f"{name} {version}" for name in _PACKAGES if (version := _version(name))]
    return [
        ("command", command_line(options, session)),
        ("artifact", f"{options.model.resolve()}"),
        ("graph digest", artifact.graph_digest),
        ("contract digest", artifact.contract_digest),
        ("decision", f"alpha = {session.alpha:g}, {rule}"),
        *(
            (f"images of {one.name}", f"{len(one.paths):,} in {one.folder.resolve()}, digest {one.digest}")
            for one in (evaluation.id_set, *evaluation.ood_sets)
        ),
        ("random choices", f"seed 0; bootstrap of {RESAMPLES:,} resamples"),
        ("provider", session.backend.provider),
        ("made with", ", ".join([f"grood-edge {__version__}", f"Python {platform.python_version()}", *versions])),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("date", datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
