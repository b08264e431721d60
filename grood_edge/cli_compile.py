"""The command `grood-edge compile`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from grood_edge.cli_options import Force, Json
from grood_edge.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from grood_edge.runtime.compile import Compiled
    from grood_edge.runtime.engine_spec import Device

__all__ = ["compile_command"]

TensorRT = Literal["tensorrt", "tensorrt-rtx"]


def compile_command(
    model: Annotated[Path, typer.Argument(help="The artifact.")],
    backend: Annotated[
        TensorRT | None, typer.Option(help="(default: tensorrt where it is usable, else tensorrt-rtx)")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Smallest, most usual, largest batch. (default: 1,1,8)", metavar="MIN,OPT,MAX")
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(
            help="GPUs to build for, with tensorrt-rtx: compute capabilities such as 86,89,120, or current. "
            "(default: all that it can)"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the engine. (default: the model's)")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Build nothing: list what TensorRT would refuse, with advice.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Build a TensorRT engine of an artifact, for a GPU that need not be here (tensorrt-rtx)."""
    if check:
        given = {"--batch": batch, "--sm": sm, "--out": out, "--force": force or None}
        surplus = [option for option, value in given.items() if value is not None]
        if surplus:
            raise UsageError(f"--check builds nothing, so {' and '.join(surplus)} would do nothing; leave one out")
        _check(model, backend, as_json)
        return
    from grood_edge.artifact import read_artifact
    from grood_edge.runtime.compile import CompileOptions, choose_api, compile_artifact, present_device
    from grood_edge.runtime.engine_spec import BuildSpec, fitting_batch, parse_batch, parse_targets
    from grood_edge.terminal import print_json, progress_bars, show, tell, tell_notes

    wanted = None if batch is None else parse_batch(batch)
    targets = () if sm is None else parse_targets(sm)
    if backend == "tensorrt" and targets:
        raise UsageError(
            "--sm with --backend tensorrt: TensorRT builds for the GPU of this machine alone; leave it out"
        )
    spec = BuildSpec(wanted or fitting_batch(read_artifact(model).contract), targets)
    device = present_device()
    api = choose_api("tensorrt-rtx" if backend is None and targets else backend, device)
    with progress_bars() as progress:
        compiled = compile_artifact(model, api, device, CompileOptions(spec, out, force), progress)
    tell_notes(compiled.warnings)
    if as_json:
        print_json(_document(compiled))
        return
    show(_table(compiled))
    tell(f"Next: {_next(model, compiled, device)}")


def _document(compiled: "Compiled") -> dict[str, Any]:
    import dataclasses

    from grood_edge.runtime.sidecar import sidecar_path

    return {
        "path": str(compiled.path),
        "sidecar": str(sidecar_path(compiled.path)),
        "seconds": round(compiled.seconds, 3),
        **dataclasses.asdict(compiled.sidecar),
    }


def _table(compiled: "Compiled") -> Any:
    from grood_edge.tables import key_values

    sidecar = compiled.sidecar
    what = (
        sidecar.device.name
        if sidecar.device
        else ", ".join(sidecar.targets) or "every GPU that TensorRT-RTX builds for"
    )
    rows = {
        "size": f"{sidecar.engine_bytes:,} bytes",
        "built in": f"{compiled.seconds:.1f} s, with {sidecar.backend} {sidecar.backend_version}",
        "runs on": what,
        "batch": f"{sidecar.batch[0]} to {sidecar.batch[2]}, tuned for {sidecar.batch[1]}",
        "precision": sidecar.precision,
        "layers": ", ".join(f"{count} {kind}" for kind, count in sidecar.layer_types.items()),
        "sha256": sidecar.engine_sha256,
    }
    return key_values(f"wrote {compiled.path}", list(rows.items()))


def _next(model: Path, compiled: "Compiled", device: "Device") -> str:
    if device.compute_capability is not None:
        return f"grood-edge verify {shlex.quote(str(model))} --backend {compiled.sidecar.backend}"
    return (
        "this machine has no usable GPU. Copy the engine, its .json and the artifact to one that has, and load it "
        f"there with --i-trust-this-engine {compiled.sidecar.engine_sha256}"
    )


def _check(model: Path, backend: TensorRT | None, as_json: bool) -> None:
    from grood_edge.artifact import read_artifact
    from grood_edge.terminal import print_json, show, tell

    artifact = read_artifact(model)
    try:
        import onnx  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError("onnx", "export", "Checking a graph") from error
    from grood_edge.export.normal_form import model_of
    from grood_edge.export.preflight import preflight

    found = preflight(model_of(artifact))
    findings = [finding for finding in found if backend is None or backend in finding.families]
    refused = sum(finding.kind == "refused" for finding in findings)
    if as_json:
        print_json({"refused": refused, "findings": [{**vars(f), "sentence": f.sentence} for f in findings]})
    else:
        for finding in findings:
            tell(f"{finding.kind}: {finding.sentence}", "red" if finding.kind == "refused" else "yellow")
        which = backend or "TensorRT"
        show(f"{which} would refuse {refused} nodes" if refused else f"nothing in the graph that {which} refuses")
        if not refused:
            tell(f"Next: grood-edge compile {shlex.quote(str(model))}")
    raise typer.Exit(1 if refused else 0)
