"""The command line: parse, call one library function, print. Heavy imports happen inside the commands."""

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperGroup

from grood_edge import __version__
from grood_edge.cli_compile import compile_command
from grood_edge.cli_doctor import doctor_command, selftest_command
from grood_edge.cli_evaluate import evaluate_command
from grood_edge.cli_options import (
    AllowUnreadable,
    Alpha,
    Backend,
    Force,
    Json,
    Labels,
    PerClass,
    PerClassOrNone,
    Provider,
    Rule,
    RuleOrNone,
    Trust,
)
from grood_edge.errors import GroodEdgeError, UsageError

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
    add_completion=False,
)

_T = TypeVar("_T")


@app.command("export")
def export_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A .onnx or .pt2 file, package.module:factory (runs your code), torchvision:NAME, timm:NAME."
        ),
    ],
    data: Annotated[str, typer.Option(help="ID images: class folders, an .npz, or package.module:factory.")],
    out: Annotated[Path, typer.Option(help="The artifact to write.")],
    calibration_data: Annotated[
        str | None, typer.Option(help="ID images the network was never trained on; without them nothing is promised.")
    ] = None,
    unseen: Annotated[bool, typer.Option("--unseen", help="The network was never trained on --data.")] = False,
    preprocess: Annotated[str | None, typer.Option(help="imagenet, efficientnet-lite, inception or none.")] = None,
    input_size: Annotated[
        str | None, typer.Option(help="The network's input: 224 or 224x320 (height x width).")
    ] = None,
    resize: Annotated[int | None, typer.Option(help="Short side before the centre crop.")] = None,
    crop: Annotated[Literal["center", "none"] | None, typer.Option(help="'none' resizes the whole frame.")] = None,
    filter_: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None, typer.Option("--filter", help="Of the resize.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per channel, as fractions of full scale: 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Like --mean. --mean 0 --std 1 is torchvision's ToTensor alone.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="Class names in the network's order, one a line or JSON.")
    ] = None,
    labels: Labels = "folder",
    features: Annotated[str | None, typer.Option(help="Name of the features tensor, when it cannot be found.")] = None,
    classifier_layout: Annotated[
        Literal["NCHW", "NHWC"] | None, typer.Option(help="When the shape is unclear.")
    ] = None,
    classifier_bgr: Annotated[bool, typer.Option("--classifier-bgr", help="The network expects BGR.")] = False,
    weights: Annotated[Path | None, typer.Option(help="State dict for torchvision:NAME or timm:NAME.")] = None,
    ood_prototype: Annotated[
        str, typer.Option(help="auto, or some of mean, mixup, noise, origin, images:DIR, separated by commas.")
    ] = "auto",
    mixup_layer: Annotated[
        str, typer.Option(help="Where mixup mixes: features, early (the paper's), or a tensor of the classifier.")
    ] = "features",
    space: Annotated[Literal["features", "logits"], typer.Option(help="What the head reads.")] = "features",
    scale: Annotated[str, typer.Option(help="Of the distances: auto, or a number; 1 is the paper's.")] = "auto",
    score: Annotated[
        Literal["gradient", "s"], typer.Option(help="'s' scores by log s alone and needs no bank.")
    ] = "gradient",
    bank: Annotated[str, typer.Option(help="auto, all, none, or a number of k-means rows.")] = "auto",
    bank_dtype: Annotated[Literal["int8", "float32"], typer.Option(help="How bank rows are stored.")] = "int8",
    keep_paths: Annotated[
        bool, typer.Option("--keep-paths", help="Keep the names of the images behind the bank, for explanations.")
    ] = False,
    precision: Annotated[
        Literal["fp32", "fp16", "int8", "auto"],
        typer.Option(help="Of the classifier; 'auto': the smallest that decides alike."),
    ] = "fp32",
    keep_float: Annotated[
        list[str] | None, typer.Option(help="A tensor or node that stays float32 in fp16 and int8; may be repeated.")
    ] = None,
    max_auroc_drop: Annotated[float, typer.Option(help="Points of AUROC that fp16 or int8 may cost.")] = 0.5,
    max_flips: Annotated[str, typer.Option(help="Share of decisions that fp16 or int8 may change.")] = "3%",
    max_bank_source: Annotated[
        int, typer.Option(help="Feature rows kept in memory for the bank, spread over the classes.")
    ] = 20_000,
    alpha: Annotated[float, typer.Option(help="Accepted false-alarm rate on ID frames.")] = 0.05,
    delta: Annotated[
        float | None, typer.Option(help="Risk that the rate exceeds alpha after all. [default: 0.05]")
    ] = None,
    rule: Rule = "guaranteed",
    per_class: PerClass = False,
    probes: Annotated[
        Path | None, typer.Option(help="Images to embed as test vectors instead of synthetic ones.")
    ] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Folder for what was read so far; after Ctrl-C the same command goes on.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Trace, fit, attach, verify, publish: from a classifier and its images to one ONNX file."""
    from grood_edge.export import ClassifierOptions, ExportOptions, PreprocessingOptions, export_model
    from grood_edge.export.dataset import read_class_names
    from grood_edge.terminal import progress_bars

    options = ExportOptions(
        calibration_data=calibration_data,
        classifier=ClassifierOptions(features=features, layout=classifier_layout, bgr=classifier_bgr, weights=weights),
        preprocessing=PreprocessingOptions(
            preset=preprocess,
            input_size=_size(input_size),
            resize=resize,
            crop=crop,
            filter=filter_,
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
        ),
        classes=None if classes is None else read_class_names(classes),
        labels=labels,
        ood_prototype=ood_prototype,
        mixup_layer=mixup_layer,
        space=space,
        scale="auto" if scale == "auto" else _parsed("--scale", scale, float, "auto or a number"),
        bank=_bank_size(bank, score),
        bank_dtype=bank_dtype,
        keep_paths=keep_paths,
        precision=precision,
        keep_float=tuple(keep_float or ()),
        max_auroc_drop=max_auroc_drop / 100,
        max_flips=_parsed("--max-flips", max_flips, _share, "a share such as 3% or 0.03"),
        max_bank_source=max_bank_source,
        alpha=alpha,
        delta=delta,
        rule=rule,
        per_class=per_class,
        unseen=unseen,
        probes=probes,
        seed=seed,
        force=force,
        allow_unreadable=allow_unreadable,
        spool=spool,
    )
    with progress_bars() as progress:
        try:
            report = export_model(model, data, out, options, progress)
        except KeyboardInterrupt as error:
            if spool is None:
                raise
            raise KeyboardInterrupt(
                f"interrupted; no artifact was written. What was read is kept in {spool}: the same command goes on "
                "from there"
            ) from error
    _print_written(report, as_json, f"grood-edge score {out} IMAGES --out scores.jsonl")


@app.command("calibrate")
def calibrate_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    data: Annotated[str, typer.Option(help="ID images the network was never trained on.")],
    threshold_only: Annotated[
        bool, typer.Option("--threshold-only", help="Keep prototypes and bank; replace the calibration scores.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Where to write; without it the artifact is replaced.")] = None,
    alpha: Alpha = None,
    delta: Annotated[float | None, typer.Option(help="Risk that the rate exceeds alpha after all.")] = None,
    rule: RuleOrNone = None,
    per_class: PerClassOrNone = None,
    labels: Labels = "folder",
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Refit an artifact on new ID images, on the device: needs neither torch nor onnx."""
    from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
    from grood_edge.terminal import progress_bars

    options = RecalibrateOptions(
        threshold_only=threshold_only,
        labels=labels,
        alpha=alpha,
        delta=delta,
        marginal=None if rule is None else rule == "marginal",
        per_class=per_class,
        seed=seed,
        force=force,
        allow_unreadable=allow_unreadable,
    )
    with progress_bars() as progress:
        report = recalibrate(model, data, out, options, progress)
    _print_written(report, as_json, f"grood-edge verify {report.path}")


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
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Score images: one row an image, and a summary."""
    from contextlib import nullcontext

    from grood_edge.runtime.score import ScoreRow, require_readable, row_writer, score_images
    from grood_edge.runtime.session import open_session
    from grood_edge.tables import score_document, score_tables
    from grood_edge.terminal import print_json, progress_bars, show, tell

    shown: list[ScoreRow] = []
    writer = nullcontext(_keep(shown, None if as_json else 20)) if out is None else row_writer(out, force)
    with (
        progress_bars() as progress,
        open_session(
            model, alpha=alpha, backend=backend, provider=provider, trusted_engine=trusted, progress=progress
        ) as session,
    ):
        for reason in session.fallbacks:
            tell(f"warning: {reason}", "yellow")
        with writer as write:
            summary = score_images(session, sources, write, batch_size, progress, explain)
        for path, reason in summary.unreadable:
            tell(f"unreadable: {path}: {reason}", "yellow")
        if as_json:
            print_json(score_document(summary, session, shown, out))
        else:
            for table in score_tables(summary, session, shown):
                show(table)
            tell(f"rows are in {out}" if out else "All rows: add --out scores.jsonl (or .csv, .parquet)")
    if not allow_unreadable:
        require_readable(summary)


app.command("evaluate")(evaluate_command)
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
    from grood_edge.terminal import print_json, progress_bars, show, tell

    with (
        progress_bars() as progress,
        open_session(model, backend=backend, provider=provider, trusted_engine=trusted, progress=progress) as session,
    ):
        for reason in session.fallbacks:
            tell(f"warning: {reason}", "yellow")
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
    from grood_edge.tables import demo_tables
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
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"grood-edge {__version__}")
        raise typer.Exit()


def main() -> None:
    """Run the command line: exit code 0 done, 1 refused, 2 wrong usage, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    app()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _keep(rows: list[Any], most: int | None) -> Callable[[Any], None]:
    return lambda row: rows.append(row) if most is None or len(rows) < most else None


def _print_written(report: Any, as_json: bool, next_command: str) -> None:
    from grood_edge.tables import written_document, written_table
    from grood_edge.terminal import print_json, show, tell

    for path, reason in report.unreadable:
        tell(f"unreadable: {path}: {reason}", "yellow")
    for warning in report.warnings:
        tell(f"warning: {warning}", "yellow")
    if as_json:
        print_json(written_document(report))
        return
    show(written_table(report))
    tell(f"Next: {next_command}")


def _parsed(option: str, text: str, kind: Callable[[str], _T], expected: str) -> _T:
    try:
        return kind(text)
    except ValueError as error:
        raise UsageError(f"{option} {text!r}; expected {expected}") from error


def _share(text: str) -> float:
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _bank_size(text: str, score: str) -> Any:
    """Read --bank; --score s is another word for --bank none."""
    if score == "s":
        if text not in ("auto", "none"):
            raise UsageError(f"--score s has no bank, but --bank {text} was given; leave one of the two out")
        return "none"
    if text in ("auto", "all", "none"):
        return text
    return _parsed("--bank", text, int, "auto, all, none or a number of rows")


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    return _parsed(option, text, lambda t: tuple(float(v) for v in t.split(",")), "numbers separated by commas")


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = _parsed("--input-size", text, lambda t: [int(v) for v in t.lower().split("x")], "224 or 224x320")
    if len(parts) not in (1, 2):
        raise UsageError(f"--input-size {text!r}; expected 224 or 224x320 (height x width)")
    return parts[0], parts[-1]
