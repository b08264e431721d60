"""Which backend runs an artifact: the one that was asked for, or with `auto` the first that answers rightly."""

import glob
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from grood_edge import __version__
from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError, GroodEdgeError, UsageError
from grood_edge.progress import Progress
from grood_edge.publishing import publish
from grood_edge.runtime.backend import Backend
from grood_edge.runtime.compile import CompileOptions, choose_api, compile_artifact, engine_path, present_device
from grood_edge.runtime.cuda import open_device
from grood_edge.runtime.engine import OpenedEngine, open_engine, runs_on
from grood_edge.runtime.engine_spec import BuildSpec, Device
from grood_edge.runtime.onnxrt import OnnxRuntimeBackend
from grood_edge.runtime.parity import require_parity
from grood_edge.runtime.trt import TrtBackend
from grood_edge.runtime.trt_api import Family, TrtApi, process_logger
from grood_edge.user_folders import cache_folder

__all__ = ["AUTO_ORDER", "BackendName", "Choice", "Chosen", "choose_backend"]

BackendName = Literal["auto", "tensorrt", "tensorrt-rtx", "onnxruntime"]
AUTO_ORDER = ("tensorrt", "tensorrt-rtx", "onnxruntime on cuda", "onnxruntime on cpu")
_MAX_RECORD_BYTES = 10_000
_LOG = logging.getLogger("grood_edge")


@dataclass(frozen=True)
class Choice:
    """What was asked for. provider, threads: of onnxruntime. trusted: SHA-256 of a foreign engine to be loaded."""

    backend: BackendName = "onnxruntime"
    provider: str | None = None
    threads: int | None = None
    trusted: str | None = None

    def __post_init__(self) -> None:
        if self.backend not in get_args(BackendName):
            raise UsageError(
                f"backend {self.backend!r} is unknown; expected one of {', '.join(get_args(BackendName))} (cpu, cuda "
                "and tensorrt-ep are providers: backend onnxruntime, --provider)"
            )
        if self.backend != "onnxruntime" and self.provider is not None:
            raise UsageError(
                f"--provider {self.provider} is a word of onnxruntime, and --backend {self.backend} was asked for; "
                "leave one of the two out"
            )
        if self.trusted is not None and self.backend in ("onnxruntime", "auto"):
            raise UsageError(
                "--i-trust-this-engine has no use without --backend tensorrt or tensorrt-rtx: no engine is loaded"
            )


@dataclass(frozen=True)
class Chosen:
    """An open backend, and why better ones were passed over."""

    backend: Backend
    fallbacks: tuple[str, ...] = ()


def choose_backend(path: Path, artifact: Artifact, choice: Choice, progress: Progress) -> Chosen:
    """Open the backend.

    A TensorRT engine is looked for beside the artifact and in the user's cache, else built into the cache; it is used
    only after it has answered like onnxruntime on the CPU (`parity`). `auto` says loudly what it could not use.

    Raises:
        GroodEdgeError: what was asked for by name cannot be used; it is never replaced by another.
    """
    if choice.backend == "onnxruntime":
        return Chosen(OnnxRuntimeBackend(artifact, choice.provider or "cpu", choice.threads))
    if choice.backend != "auto":
        return Chosen(_tensorrt(choice.backend, path, artifact, choice.trusted, progress))
    ways: dict[str, Callable[[], Backend]] = {
        "tensorrt": lambda: _tensorrt("tensorrt", path, artifact, None, progress),
        "tensorrt-rtx": lambda: _tensorrt("tensorrt-rtx", path, artifact, None, progress),
        "onnxruntime on cuda": lambda: _cuda(artifact, choice.threads),
        "onnxruntime on cpu": lambda: OnnxRuntimeBackend(artifact, "cpu", choice.threads),
    }
    fallbacks: list[str] = []
    for name in AUTO_ORDER[:-1]:
        try:
            return Chosen(ways[name](), tuple(fallbacks))
        except GroodEdgeError as error:
            fallbacks.append(f"{name} is not used: {error}")
            _LOG.warning("%s", fallbacks[-1])
    return Chosen(ways[AUTO_ORDER[-1]](), tuple(fallbacks))


def _cuda(artifact: Artifact, threads: int | None) -> Backend:
    backend, reference = OnnxRuntimeBackend(artifact, "cuda", threads), OnnxRuntimeBackend(artifact)
    try:
        require_parity(backend, artifact.contract, reference, BuildSpec.batch[2])
    except BaseException:
        backend.close()
        raise
    finally:
        reference.close()
    return backend


def _tensorrt(family: Family, path: Path, artifact: Artifact, trusted: str | None, progress: Progress) -> Backend:
    """Find or build the engine, load it, and hold it against onnxruntime."""
    gpu = open_device()  # first: without one nothing else is worth trying
    device = present_device()
    api = choose_api(family, device)
    if (
        family == "tensorrt-rtx"
        and device.compute_capability is not None
        and not runs_on((), device.compute_capability)
    ):
        raise BackendError(
            f"TensorRT-RTX builds no engine for {device.name} (compute capability "
            f"{'.'.join(map(str, device.compute_capability))}); use --backend tensorrt or onnxruntime"
        )
    found = _opened(path, artifact, (api, device), trusted, progress)
    backend = TrtBackend(api, found.plan, artifact.contract, gpu, process_logger(api), not found.knots_match)
    try:
        _verify(backend, found, artifact, device, progress)
    except BaseException:
        backend.close()
        raise
    return backend


def _opened(
    path: Path, artifact: Artifact, where: tuple[TrtApi, Device], trusted: str | None, progress: Progress
) -> OpenedEngine:
    api, device = where
    if trusted is not None:
        return _trusted(path, artifact, where, trusted)
    beside = _beside(path, api)
    usual = engine_path(path, artifact, api, device, CompileOptions())
    refused: BackendError | None = None
    for candidate in sorted(beside, key=lambda engine: engine != usual):  # one compiled by hand may have other batches
        try:
            return open_engine(candidate, artifact, api, device, model=path)
        except BackendError as error:
            refused = refused or error
    if refused is not None:
        raise refused
    options = CompileOptions(out=cache_folder("engines"))
    cached = engine_path(path, artifact, api, device, options)
    if cached.exists():
        try:
            return open_engine(cached, artifact, api, device, model=path)
        except BackendError as error:  # half-written by a killed process, or damaged: our own cache is made again
            _LOG.warning("%s", error)
    compile_artifact(path, api, device, replace(options, force=True), progress)
    return open_engine(cached, artifact, api, device, model=path)


def _beside(path: Path, api: TrtApi) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.{api.family}-*.engine"))


def _trusted(path: Path, artifact: Artifact, where: tuple[TrtApi, Device], trusted: str) -> OpenedEngine:
    """Look for the named engine beside the artifact."""
    api, device = where
    errors = []
    for candidate in _beside(path, api):
        try:
            return open_engine(candidate, artifact, api, device, trusted, path)
        except BackendError as error:
            errors.append(str(error))
    of_that_engine = [error for error in errors if "--i-trust-this-engine names" not in error]
    raise BackendError(
        (of_that_engine or errors)[0]
        if errors
        else f"--i-trust-this-engine {trusted[:12]}: there is no {path.stem}.{api.family}-*.engine beside {path}; copy "
        "the engine and its .json there"
    )


def _verify(backend: TrtBackend, found: OpenedEngine, artifact: Artifact, device: Device, progress: Progress) -> None:
    """Verify once for each engine, contract, GPU, driver and version of grood-edge; kept beside the engine."""
    wanted = {
        "engine": found.sidecar.engine_sha256,
        "contract": artifact.contract_digest,
        "grood-edge": __version__,
        "device": [device.name, list(device.compute_capability or ()), device.driver],
    }
    record = found.path.with_name(f"{found.path.name}.verified")
    if _recorded(record) == wanted:
        return
    progress("verifying the engine", 0, None)
    reference = OnnxRuntimeBackend(artifact)
    try:
        require_parity(backend, artifact.contract, reference, backend.batch_range[1])
    finally:
        reference.close()
    progress("verifying the engine", 1, 1)
    try:
        publish(json.dumps(wanted, indent=1).encode(), record, force=True)
    except GroodEdgeError:  # a read-only folder: it is verified again next time
        return


def _recorded(record: Path) -> object:
    try:
        if record.is_symlink() or record.stat().st_size > _MAX_RECORD_BYTES:
            return None
        return json.loads(record.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
