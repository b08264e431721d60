"""Options that several commands share."""

from typing import Annotated, Literal

import typer

__all__ = [
    "AllowUnreadable", "Alpha", "Backend", "Engine", "Force", "Json", "Labels", "PerClass", "Provider", "RayAddress",
    "Rule", "Threads", "Trust",
]  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Alpha = Annotated[float | None, typer.Option(help="Accepted false-alarm rate on ID frames.")]
Provider = Annotated[
    Literal["cpu", "cuda", "tensorrt-ep"] | None,
    typer.Option(help="Where onnxruntime runs; never falls back. (default: cpu)"),
]
Backend = Annotated[
    Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"],
    typer.Option(help="What runs the network; 'auto' takes the best that works, and says what it passed over."),
]
Trust = Annotated[
    str | None,
    typer.Option(
        "--i-trust-this-engine", metavar="SHA256", help="Load this engine although another user or machine built it."
    ),
]
Labels = Annotated[Literal["folder", "predicted"], typer.Option(help="'predicted' for unlabelled frames.")]
Rule = Annotated[
    Literal["guaranteed", "marginal"],
    typer.Option(help="'marginal': alpha on average over calibration sets, without a confidence."),
]
PerClass = Annotated[bool, typer.Option("--per-class", help="p-values, and alpha, for each predicted class.")]
RuleOrNone = Annotated[
    Literal["guaranteed", "marginal"] | None, typer.Option(help="As for export. (default: the artifact's own)")
]
PerClassOrNone = Annotated[
    bool | None, typer.Option("--per-class/--all-classes", help="As for export. (default: as in the artifact)")
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads of onnxruntime, and of decoding images. (default: one a core)")
]
AllowUnreadable = Annotated[bool, typer.Option("--allow-unreadable", help="Go on with over 1 % unreadable images.")]
Engine = Annotated[
    Literal["local", "ray"],
    typer.Option(help="'ray' spreads decoding and the network over a Ray cluster, to the same result."),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Of a running cluster: host:port or auto. (default: Ray on this machine, for this command)"),
]
