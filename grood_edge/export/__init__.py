"""From a trained classifier and its images to one verified ONNX file.

What needs onnx is loaded on first use: `recalibrate` runs on devices that have neither torch nor onnx.
"""

from typing import TYPE_CHECKING, Any

# At once, not on first use: importing the module later would put it in the place of the function of the same name.
from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
from grood_edge.preprocessing import PreprocessingOptions

if TYPE_CHECKING:
    from grood_edge.export.classifier import ClassifierOptions
    from grood_edge.export.pipeline import ExportOptions, ExportReport, export_model

__all__ = [
    "ClassifierOptions",
    "ExportOptions",
    "ExportReport",
    "PreprocessingOptions",
    "RecalibrateOptions",
    "export_model",
    "recalibrate",
]

_MODULES = {
    "ClassifierOptions": "grood_edge.export.classifier",
    "ExportOptions": "grood_edge.export.pipeline",
    "ExportReport": "grood_edge.export.pipeline",
    "export_model": "grood_edge.export.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from grood_edge.errors import MissingExtraError

    try:
        return getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in ("onnx", "google"):
            raise
        raise MissingExtraError("onnx", "export", "Exporting") from error
