"""From a trained classifier and its images to one verified ONNX file.

Names are loaded on first use: `calibrate` runs on devices that have neither torch nor onnx.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grood_edge.export.classifier import ClassifierOptions
    from grood_edge.export.pipeline import ExportOptions, ExportReport, export_model
    from grood_edge.export.recalibrate import RecalibrateOptions, recalibrate
    from grood_edge.preprocessing import PreprocessingOptions

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
    "PreprocessingOptions": "grood_edge.preprocessing",
    "RecalibrateOptions": "grood_edge.export.recalibrate",
    "export_model": "grood_edge.export.pipeline",
    "recalibrate": "grood_edge.export.recalibrate",
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
