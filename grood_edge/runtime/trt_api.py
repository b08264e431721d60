"""TensorRT's Python modules, loaded when needed: `tensorrt` 10.x and 11.x, and `tensorrt_rtx`.

What a module can do is read from its attributes, never guessed from a version.
"""

import importlib
from dataclasses import dataclass
from typing import Any, Literal

from grood_edge.errors import BackendError, MissingExtraError

__all__ = ["FAMILIES", "Family", "TrtApi", "load_api"]

Family = Literal["tensorrt", "tensorrt-rtx"]
FAMILIES: tuple[Family, ...] = ("tensorrt", "tensorrt-rtx")
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


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


def load_api(family: Family) -> TrtApi:
    """Import the module of a family.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed.
        BackendError: TensorRT is not installed, is too old, or its libraries cannot be loaded.
    """
    try:
        module = importlib.import_module(_MODULES[family])
    except ImportError as error:
        if family == "tensorrt-rtx" and isinstance(error, ModuleNotFoundError):
            raise MissingExtraError("tensorrt-rtx", "rtx", "Building TensorRT-RTX engines") from error
        raise BackendError(
            f"{family} cannot be imported ({error}). On a Jetson it comes with JetPack (apt install "
            "python3-libnvinfer; a virtual environment needs --system-site-packages); see docs/tensorrt.md"
        ) from error
    version = str(getattr(module, "__version__", "0"))
    if family == "tensorrt" and int(version.split(".", maxsplit=1)[0]) < 10:
        raise BackendError(
            f"TensorRT {version} is installed; expected 10 or newer (strongly typed networks). "
            "Use --backend onnxruntime"
        )
    return TrtApi(module, family, version)
