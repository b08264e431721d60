"""From an artifact to an engine file: which TensorRT, check, build, read back, publish."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

from grood_edge.artifact import Artifact, read_artifact
from grood_edge.errors import BackendError, GroodEdgeError
from grood_edge.progress import Progress, silent
from grood_edge.publishing import check_output
from grood_edge.runtime.build import require_usable
from grood_edge.runtime.build_process import build_apart
from grood_edge.runtime.cuda import device_info, load_cudart
from grood_edge.runtime.engine import require_safe_folder, runs_on
from grood_edge.runtime.engine_spec import BuildSpec, Device, check_spec, engine_name, fitting_batch, sm_name
from grood_edge.runtime.layer_types import inspected_types
from grood_edge.runtime.sidecar import Sidecar, publish_engine, sidecar_of, sidecar_path
from grood_edge.runtime.trt_api import FAMILIES, Family, TrtApi, load_api
from grood_edge.runtime.user_key import user_key
from grood_edge.user_folders import cache_folder

__all__ = ["CompileOptions", "Compiled", "choose_api", "compile_artifact", "engine_path", "present_device"]

NO_DEVICE = Device("no GPU", None, None)


@dataclass(frozen=True)
class CompileOptions:
    """How to compile. spec: None builds for the artifact's usual batch sizes; out: folder, None for the model's own."""

    spec: BuildSpec | None = None
    out: Path | None = None
    force: bool = False


@dataclass(frozen=True)
class Compiled:
    """What was written. `warnings`: what TensorRT said meanwhile."""

    path: Path
    sidecar: Sidecar
    warnings: tuple[str, ...]
    seconds: float


def present_device() -> Device:
    """Return the GPU of this machine; without one, a device without compute capability."""
    try:
        info = device_info(load_cudart())
    except GroodEdgeError:  # no driver, no GPU, no cuda-bindings: `grood-edge doctor` says which
        return NO_DEVICE
    major, minor = info.driver
    return Device(info.name, info.compute_capability, f"{major}.{minor}")


def choose_api(family: Family | None, device: Device) -> TrtApi:
    """Load the module that was asked for, else TensorRT where it is usable, else TensorRT-RTX.

    Raises:
        BackendError: none is usable; says why for each.
        MissingExtraError: TensorRT-RTX was asked for and is not installed.
    """
    if family is not None:
        return _usable(family, device)
    reasons = []
    for candidate in FAMILIES:
        try:
            return _usable(candidate, device)
        except GroodEdgeError as error:
            reasons.append(f"{candidate}: {str(error).rstrip('.')}")
    raise BackendError(f"no TensorRT can be used here. {'. '.join(reasons)}")


def _usable(family: Family, device: Device) -> TrtApi:
    api = load_api(family)
    if family == "tensorrt" and device.compute_capability is None:
        raise BackendError(
            f"TensorRT {api.version} builds for the GPU of this machine, and there is none that can be used. Build on "
            "the device itself, or use --backend tensorrt-rtx, which needs no GPU to build"
        )
    require_usable(api)
    return api


def engine_path(model: Path, artifact: Artifact, api: TrtApi, device: Device, options: CompileOptions) -> Path:
    """Return where the engine is written."""
    spec = options.spec or BuildSpec(fitting_batch(artifact.contract))
    return (options.out or model.parent) / engine_name(model.stem, artifact, api, device, spec)


def compile_artifact(
    model: Path, api: TrtApi, device: Device, options: CompileOptions | None = None, progress: Progress = silent
) -> Compiled:
    """Build the engine of an artifact and write it, with its sidecar, all or nothing.

    Args:
        model: path of the artifact.
        api: see `choose_api`.
        device: see `present_device`.
        options: see `CompileOptions`.
        progress: called with TensorRT's phases.

    Raises:
        GroodEdgeError: see `errors`; nothing is written then.
    """
    start, options = time.monotonic(), options or CompileOptions()
    artifact = read_artifact(model)
    spec = options.spec or BuildSpec(fitting_batch(artifact.contract))
    check_spec(api, artifact.contract, spec, device)
    path = engine_path(model, artifact, api, device, options)
    for written in (path, sidecar_path(path)):
        if written.is_symlink():
            raise BackendError(f"{written} is a symbolic link; delete it, engines are written as files")
        check_output(written, options.force)
    require_safe_folder(path.parent)
    user_key(create=True)  # what would stop the publication stops the build
    built = build_apart(api, artifact, replace(spec, timing_cache=_timing_cache(api, device)), progress)
    capability = device.compute_capability
    runs_here = capability is not None and (api.family == "tensorrt" or runs_on(spec.targets, capability))
    inspected = inspected_types(api, built.plan, artifact.contract) if runs_here else None
    sidecar = sidecar_of(artifact, api, device, spec, built, inspected)
    publish_engine(path, built.plan, sidecar, artifact.contract, options.force)
    return Compiled(path, sidecar, built.warnings, time.monotonic() - start)


def _timing_cache(api: TrtApi, device: Device) -> Path | None:
    """Return the user's file of what TensorRT timed on this GPU; None where it keeps none."""
    if not api.capabilities.timing_cache or device.compute_capability is None:
        return None
    try:
        folder = cache_folder("timing")
    except BackendError:  # no folder of this user's own: only time is lost
        return None
    return folder / f"{api.version}-{sm_name(device.compute_capability).lower()}.cache"
