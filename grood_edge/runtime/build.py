"""Building an engine: parse, check the types, build; with progress, cancellation, and errors in words."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from grood_edge.artifact import Artifact
from grood_edge.errors import BackendError, OutputError
from grood_edge.progress import Progress
from grood_edge.publishing import published
from grood_edge.runtime.engine_spec import BuildSpec
from grood_edge.runtime.layer_types import count_types, graph_products, read_layers, require_precision
from grood_edge.runtime.trt_api import TrtApi, process_logger, without_noise

__all__ = ["BuildSettings", "Built", "Interrupts", "build_engine", "held_interrupts", "require_usable"]

MAX_TIMING_CACHE_BYTES = 256 << 20
_INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SHOWN_DEPTH = 2  # of nested phases of a build
_ADVICE = {  # by what the reason says, in lower case
    "memory": "free memory on this machine, or build for a smaller batch with --batch",
    "turing": "leave that GPU out of --sm",
}


@dataclass(frozen=True)
class BuildSettings:
    """What the builder was told beside the spec; False where it has no such setting.

    tf32 would round factors to ten bits; strict_nans keeps `x - x` and the like from being folded.
    """

    strongly_typed: bool
    tf32: bool
    strict_nans: bool
    timing_cache: bool
    optimization_level: int


@dataclass(frozen=True)
class Built:
    """An engine: the serialised plan, how it was built, and what TensorRT said meanwhile.

    layer_types: how many layers of the strongly typed network have each type, constants aside.
    """

    plan: bytes
    settings: BuildSettings
    layer_types: dict[str, int]
    warnings: tuple[str, ...]
    seconds: float


def build_engine(api: TrtApi, artifact: Artifact, spec: BuildSpec, progress: Progress) -> Built:
    """Build the engine of an artifact.

    Args:
        api: the loaded TensorRT module.
        artifact: its graph carries the precision: no flag here changes it.
        spec: see `engine_spec.check_spec` for what contradicts itself.
        progress: called with TensorRT's own phases.

    Raises:
        BackendError: TensorRT refuses the graph, or would compute it in other types than the contract says.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; TensorRT was let end in an orderly way.
    """
    start = time.monotonic()
    logger = process_logger(api)
    said = logger.count
    with held_interrupts() as interrupts:
        builder = _builder(api, logger)
        progress("reading the graph", 0, None)
        network, parser = _parsed(api, builder, artifact.model, logger)
        progress("reading the graph", 1, 1)
        layers = read_layers(network)
        require_precision(layers, graph_products(artifact.model), artifact.contract)
        config, settings = _config(api, builder, network, spec)
        cache = _open_timing_cache(api, config, spec.timing_cache)
        if api.capabilities.progress_monitor:
            config.progress_monitor = monitor = _monitor(api, progress, interrupts)
        serialised = None if interrupts.came else builder.build_serialized_network(network, config)
        if interrupts.came:
            raise KeyboardInterrupt
        if serialised is None:
            raise BackendError(_failed(api, logger.since(said)))
        plan = bytes(memoryview(serialised))
        _save_timing_cache(config, cache, spec.timing_cache)
        # TensorRT calls the monitor, and reads the network through the parser, for as long as they are used here
        del monitor, parser
    warnings = tuple(dict.fromkeys(logger.since(said)))
    return Built(plan, settings, count_types(layers), warnings, time.monotonic() - start)


def require_usable(api: TrtApi) -> None:
    """Find out whether TensorRT starts at all.

    Raises:
        BackendError: it does not; mostly there is no driver.
    """
    _builder(api, process_logger(api))


def _builder(api: TrtApi, logger: Any) -> Any:
    said = logger.count
    try:
        builder = api.module.Builder(logger)
    except (TypeError, RuntimeError) as error:  # TypeError: pybind11's word for a factory that returned nothing
        reason = _last(logger.since(said)) or "it gave no reason; mostly there is no NVIDIA driver or GPU"
        raise BackendError(
            f"{api.family} {api.version} is installed and cannot start: {reason}. Run grood-edge doctor; TensorRT-RTX "
            "(pip install 'grood-edge[rtx]') builds without a GPU"
        ) from error
    return builder


def _parsed(api: TrtApi, builder: Any, model: bytes, logger: Any) -> tuple[Any, Any]:
    flag = api.module.NetworkDefinitionCreationFlag
    flags = 1 << int(flag.STRONGLY_TYPED) if api.capabilities.strongly_typed else 0
    network = builder.create_network(flags)
    if network is None:
        raise BackendError(f"{api.family} {api.version} made no network: {_last(logger.messages) or 'no reason given'}")
    parser = api.module.OnnxParser(network, logger)
    if not parser.parse(model):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        refusals = [_refusal(error) for error in errors if error is not None] or ["it gave no reason"]
        raise BackendError(
            f"{api.family} {api.version} cannot use the graph: {'; '.join(refusals[:3])}. Run grood-edge compile "
            "--check for what to do about it, or run the artifact with --backend onnxruntime"
        )
    return network, parser


def _refusal(error: Any) -> str:
    """Return node, operator, kind and first line of the reason of a parser's error."""
    lines = without_noise(error.desc() or "").splitlines()
    where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_operator() else "the file"
    return f"{where}: {_code(error)}{lines[0].rstrip('.') if lines else 'no reason given'}"


def _code(error: Any) -> str:
    name = getattr(error.code(), "name", "")
    return f"{name}: " if name and name != "SUCCESS" else ""


def _config(api: TrtApi, builder: Any, network: Any, spec: BuildSpec) -> tuple[Any, BuildSettings]:
    trt, can = api.module, api.capabilities
    config = builder.create_builder_config()
    if config is None:
        raise BackendError(f"{api.family} {api.version} made no builder configuration; run grood-edge doctor")
    if can.tf32:  # on by default, and ten bits of mantissa are too few for distances
        config.clear_flag(trt.BuilderFlag.TF32)
    if can.strict_nans:
        config.set_flag(trt.BuilderFlag.STRICT_NANS)
    if api.has("ProfilingVerbosity.DETAILED") and can.inspector:
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector names no types
    if spec.targets:
        config.num_compute_capabilities = len(spec.targets)
    for index, target in enumerate(spec.targets):
        if not config.set_compute_capability(getattr(trt.ComputeCapability, target), index):
            raise BackendError(f"{api.family} {api.version} refuses to build for {target}; leave it out of --sm")
    _add_profile(api, builder, network, config, spec.batch)
    settings = BuildSettings(
        strongly_typed=can.strongly_typed,
        tf32=False,
        strict_nans=can.strict_nans,
        timing_cache=can.timing_cache and spec.timing_cache is not None,
        optimization_level=int(config.builder_optimization_level),
    )
    return config, settings


def _add_profile(api: TrtApi, builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """Name the batch sizes of every input with a free dimension; an artifact's only free one is its batch."""
    profile, free = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape:
            free = True
            profile.set_shape(tensor.name, *(tuple(size if d == -1 else d for d in shape) for size in batch))
    if free and config.add_optimization_profile(profile) < 0:
        raise BackendError(
            f"{api.family} {api.version} refuses batch sizes {','.join(map(str, batch))}: "
            f"{_last(process_logger(api).messages) or 'no reason given'}. Choose others with --batch"
        )


def _open_timing_cache(api: TrtApi, config: Any, path: Path | None) -> Any:
    """Give TensorRT what it timed before, so that it chooses alike; a cache that cannot be used is started anew."""
    if path is None or not api.capabilities.timing_cache:
        return None
    stored = b""
    with contextlib.suppress(OSError):
        if path.stat().st_size <= MAX_TIMING_CACHE_BYTES:
            stored = path.read_bytes()
    for content in (stored, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _save_timing_cache(config: Any, cache: Any, path: Path | None) -> None:
    """Keep what was timed. It only saves time: where it cannot be kept, nothing is lost."""
    kept = None if cache is None or path is None else config.get_timing_cache()
    content = None if kept is None else kept.serialize()
    if content is None or path is None:
        return
    with contextlib.suppress(OSError, OutputError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with published(path, force=True, mode=0o600) as temporary:
            temporary.write_bytes(bytes(memoryview(content)))


def _failed(api: TrtApi, said: list[str]) -> str:
    reason = _last(said) or "it gave no reason"
    advice = next((text for sign, text in _ADVICE.items() if sign in reason.lower()), None)
    advice = advice or "run grood-edge compile --check, or run the artifact with --backend onnxruntime"
    return f"{api.family} {api.version} built no engine: {reason}. What to do: {advice}"


def _last(said: list[str]) -> str:
    """Return the first line of the last message, without its full stop."""
    return said[-1].splitlines()[0].strip().rstrip(".") if said else ""


def _monitor(api: TrtApi, progress: Progress, interrupts: "Interrupts") -> Any:
    base: Any = api.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        """TensorRT calls it from the thread that builds, or from its own."""

        def __init__(self) -> None:
            super().__init__()
            self._depth: dict[str, int] = {}
            self._total: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._depth[phase_name] = self._depth.get(parent_phase or "", 0) + 1
            self._total[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not interrupts.came

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._total.get(phase_name, 0))

        def _tell(self, phase_name: str, done: int) -> None:
            try:
                if self._depth.get(phase_name, 1) <= _SHOWN_DEPTH:
                    progress(phase_name, done, self._total.get(phase_name))
            except BaseException as error:  # must not pass through TensorRT's C++
                interrupts.came = True
                interrupts.error = interrupts.error or error

    return Monitor()


class Interrupts:
    """Whether somebody wants the build to end, and what went wrong in the caller's own progress function."""

    came = False
    error: BaseException | None = None


@contextlib.contextmanager
def held_interrupts() -> Iterator[Interrupts]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back while TensorRT works: an exception inside its C++ would end the process.

    In other threads nothing is changed: signals never reach them.
    """
    interrupts = Interrupts()
    wanted = _INTERRUPTS if threading.current_thread() is threading.main_thread() else []

    def note(number: int, frame: FrameType | None) -> None:
        interrupts.came = True

    before = {number: signal.signal(number, note) for number in wanted if callable(signal.getsignal(number))}
    try:
        yield interrupts
        if interrupts.came:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        if interrupts.error is not None:
            raise interrupts.error from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
