"""The command `grood-edge export`."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from grood_edge.cli_options import AllowUnreadable, Engine, Force, Json, Labels, PerClass, RayAddress, Rule, Threads
from grood_edge.errors import UsageError

if TYPE_CHECKING:
    from grood_edge.preprocessing import Camera

__all__ = ["export_command", "print_written"]

_T = TypeVar("_T")


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
    crop: Annotated[
        Literal["center", "letterbox", "stretch"] | None,
        typer.Option(help="'stretch' resizes the whole frame; 'letterbox' pads it, so that its aspect ratio is kept."),
    ] = None,
    filter_: Annotated[
        Literal["nearest", "bilinear", "bicubic", "lanczos"] | None, typer.Option("--filter", help="Of the resize.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Per channel, as fractions of full scale: 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[
        str | None, typer.Option(help="Like --mean. --mean 0 --std 1 is torchvision's ToTensor alone.")
    ] = None,
    camera_size: Annotated[
        str | None, typer.Option(help="Resize in the graph: it takes raw frames of this size alone, such as 720x1280.")
    ] = None,
    layout: Annotated[
        Literal["rgb", "bgr", "gray"] | None, typer.Option(help="Of those raw frames. (default: rgb)")
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
        float | None, typer.Option(help="Risk that the rate exceeds alpha after all. (default: 0.05)")
    ] = None,
    rule: Rule = "guaranteed",
    per_class: PerClass = False,
    probes: Annotated[
        Path | None, typer.Option(help="Images to embed as test vectors instead of synthetic ones.")
    ] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Folder for what was read so far; after Ctrl-C the same command goes on.")
    ] = None,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    threads: Threads = None,
    force: Force = False,
    allow_unreadable: AllowUnreadable = False,
    as_json: Json = False,
) -> None:
    """Trace, fit, attach, verify, publish: from a classifier and its images to one ONNX file."""
    from grood_edge.export import ClassifierOptions, ExportOptions, PreprocessingOptions, export_model
    from grood_edge.export.dataset import read_class_names
    from grood_edge.terminal import progress_bars
    from grood_edge.threads import limited_threads

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
            camera=_camera(camera_size, layout),
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
        engine=engine,
        ray_address=ray_address,
    )
    with limited_threads(threads), progress_bars() as progress:
        try:
            report = export_model(model, data, out, options, progress)
        except KeyboardInterrupt as error:
            if spool is None:
                raise
            raise KeyboardInterrupt(
                f"interrupted; no artifact was written. What was read is kept in {spool}: the same command goes on "
                "from there"
            ) from error
    print_written(report, as_json, f"grood-edge score {out} IMAGES --out scores.jsonl")


def print_written(report: Any, as_json: bool, next_command: str) -> None:
    """Print what an export or a recalibration wrote, and the command that comes next."""
    from grood_edge.tables import written_document, written_table
    from grood_edge.terminal import print_json, show, tell, tell_notes

    tell_notes(report.warnings, report.unreadable)
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
    parts = _sides("--input-size", text, "224 or 224x320")
    if len(parts) not in (1, 2):
        raise UsageError(f"--input-size {text!r}; expected 224 or 224x320 (height x width)")
    return parts[0], parts[-1]


def _sides(option: str, text: str, expected: str) -> list[int]:
    return _parsed(option, text, lambda t: [int(v) for v in t.lower().split("x")], f"{expected} (height x width)")


def _camera(size: str | None, layout: Literal["rgb", "bgr", "gray"] | None) -> "Camera | None":
    from grood_edge.preprocessing import Camera

    if size is None:
        if layout is not None:
            raise UsageError(
                f"--layout {layout} is of a camera's raw frames; give their size with --camera-size 720x1280"
            )
        return None
    sides = _sides("--camera-size", size, "720x1280")
    if len(sides) != 2:
        raise UsageError(f"--camera-size {size!r}; expected 720x1280 (height x width)")
    return Camera(sides[0], sides[1], layout or "rgb")
