"""TensorRT's Python modules, loaded when needed: `tensorrt` 10.x and 11.x, and `tensorrt_rtx`.

What a module can do is read from its attributes, never guessed from a version.
"""

import importlib
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from grood_edge.errors import BackendError, MissingExtraError

__all__ = ["FAMILIES", "Capabilities", "Family", "TrtApi", "load_api", "process_logger", "without_noise"]

Family = Literal["tensorrt", "tensorrt-rtx"]
FAMILIES: tuple[Family, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_NOISE = ("catchCudaError", "cudaError 35")  # said again and again where there is no GPU
_KEPT_MESSAGES = 1000


@dataclass(frozen=True)
class Capabilities:
    """What a module can do.

    strongly_typed: there is a flag that makes networks keep the types of the ONNX graph (11 does so without it).
    weak_flags: builder flags that would let TensorRT choose the precision; never set here. timing_cache: False where
    it exists and does nothing (RTX). compute_capabilities: engines for other GPUs than the one that builds.
    """

    strict_nans: bool
    tf32: bool
    timing_cache: bool
    compute_capabilities: bool
    progress_monitor: bool
    engine_validity: bool
    runtime_config: bool
    inspector: bool
    strongly_typed: bool
    weak_flags: tuple[str, ...]


@dataclass(frozen=True)
class TrtApi:
    """A loaded module with its family and version."""

    module: Any
    family: Family
    version: str

    def has(self, path: str) -> bool:
        """Return whether the module has this attribute, such as `BuilderFlag.STRICT_NANS`."""
        found = self.module
        for name in path.split("."):
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True

    @property
    def capabilities(self) -> Capabilities:
        """What the module can do, read from its attributes."""
        weak = ("FP16", "BF16", "INT8", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS")
        return Capabilities(
            strict_nans=self.has("BuilderFlag.STRICT_NANS"),
            tf32=self.has("BuilderFlag.TF32"),
            timing_cache=self.family == "tensorrt" and self.has("IBuilderConfig.create_timing_cache"),
            compute_capabilities=self.has("IBuilderConfig.set_compute_capability") and self.has("ComputeCapability"),
            progress_monitor=self.has("IProgressMonitor") and self.has("IBuilderConfig.progress_monitor"),
            engine_validity=self.has("Runtime.get_engine_validity"),
            runtime_config=self.has("ICudaEngine.create_runtime_config"),
            inspector=self.has("EngineInspector") and self.has("ICudaEngine.create_engine_inspector"),
            strongly_typed=self.has("NetworkDefinitionCreationFlag.STRONGLY_TYPED"),
            weak_flags=tuple(name for name in weak if self.has(f"BuilderFlag.{name}")),
        )


def load_api(family: Family) -> TrtApi:
    """Import the module of a family.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        BackendError: TensorRT is not installed, is too old, or its libraries cannot be loaded.
    """
    try:
        module = importlib.import_module(_MODULES[family])
    except (ImportError, OSError) as error:  # OSError: a wheel without its libraries
        if family == "tensorrt-rtx" and isinstance(error, ModuleNotFoundError):
            raise MissingExtraError("tensorrt-rtx", "rtx", "Building TensorRT-RTX engines") from error
        raise BackendError(
            f"{family} cannot be imported ({error}). On a Jetson it comes with JetPack (apt install "
            "python3-libnvinfer; a virtual environment needs --system-site-packages); see docs/tensorrt.md"
        ) from error
    except Exception as error:  # bindings and libraries of different versions fail in many ways
        raise BackendError(
            f"{family} fails when it is imported ({type(error).__name__}: {error}); install it again"
        ) from error
    version = str(getattr(module, "__version__", ""))
    major = version.split(".", maxsplit=1)[0]
    if not major.isdigit():
        raise BackendError(f"the module {_MODULES[family]} is not TensorRT: its version is {version[:20]!r}; remove it")
    if family == "tensorrt" and int(major) < 10:
        raise BackendError(
            f"TensorRT {version} is installed; expected 10 or newer (strongly typed networks). "
            "Use --backend onnxruntime"
        )
    return TrtApi(module, family, version)


def without_noise(text: str) -> str:
    """Return a message of TensorRT without the lines that it adds on a machine without a GPU."""
    lines = (line.strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not any(noise in line for noise in _NOISE))


_LOGGERS: dict[int, tuple[Any, Any]] = {}  # the module beside its logger: an id is only good while it lives
_LOCK = threading.Lock()


def process_logger(api: TrtApi) -> Any:
    """Return the logger of a module: one for the whole process, because TensorRT ignores every later one.

    It collects warnings and errors: `messages` are the texts kept, oldest first; `count` is how many there were, and
    `since(count)` returns those that came after.
    """
    with _LOCK:
        if id(api.module) not in _LOGGERS:
            _LOGGERS[id(api.module)] = (api.module, _logger_class(api.module)())
        return _LOGGERS[id(api.module)][1]


def _logger_class(module: Any) -> Any:
    worst_wanted = module.ILogger.WARNING

    class Logger(module.ILogger):  # type: ignore[misc]
        """TensorRT calls `log` from any thread."""

        def __init__(self) -> None:
            super().__init__()
            self.count = 0
            self._texts: deque[str] = deque(maxlen=_KEPT_MESSAGES)
            self._lock = threading.Lock()

        @property
        def messages(self) -> list[str]:
            with self._lock:
                return list(self._texts)

        def since(self, count: int) -> list[str]:
            with self._lock:
                new = min(self.count - count, len(self._texts))
                return list(self._texts)[len(self._texts) - new :]

        def log(self, severity: Any, msg: str) -> None:
            text = without_noise(msg)
            if severity <= worst_wanted and text:
                with self._lock:
                    self.count += 1
                    self._texts.append(text)

    return Logger
