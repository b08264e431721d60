"""An nn.Module, a .pt2 or a named network becomes ONNX. With `checkpoints`, the only modules that need torch.

`module:factory` runs the user's own code, which is the point of it; files are opened by `checkpoints` alone.
"""

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, TensorProto

from grood_edge.errors import ClassifierError, MissingExtraError, reason_of
from grood_edge.export.checkpoints import MAX_PT2_BYTES, checked_pt2, state_dict
from grood_edge.export.factory import call_factory, import_attribute
from grood_edge.onnx_proto import OPSET
from grood_edge.ort import open_ort

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "torch", "Exporting an nn.Module or .pt2") from error

__all__ = ["onnx_from_torch"]

MODULE_TOLERANCE = 1e-4  # relative to the largest logit: onnxruntime fuses batch norm into the convolutions
HALF_TOLERANCE = 1e-2  # the same for float16 modules: 11 bits of mantissa, summed in another order
_TRAINING_FLAGS = {"batch_norm": 5, "dropout": 2}  # position of the argument that says "training" in the operators
_PICKLED_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_FORMS = "an .onnx or .pt2 file, package.module:factory, torchvision:NAME or timm:NAME"


def onnx_from_torch(
    model: Any, weights: Path | None, input_size: tuple[int, int] | None
) -> tuple[ModelProto, Literal["module", "pt2"]]:
    """Trace a torch classifier to ONNX, and check that both give the same logits.

    Args:
        model: an nn.Module, or the text that names one.
        weights: a checkpoint for `torchvision:` and `timm:` names (a state dict).
        input_size: (height, width) to trace with; 224x224 when None.

    Raises:
        ClassifierError: it cannot be loaded or traced, is in training mode, or changes its logits in tracing.
    """
    if isinstance(model, nn.Module):
        return _trace_module(model, input_size), "module"
    text = str(model)
    if weights is not None and not text.startswith(("torchvision:", "timm:")):
        raise ClassifierError(f"--weights goes with torchvision:NAME or timm:NAME; {text} loads its own weights")
    if text.lower().endswith(".pt2"):
        return _onnx_from_pt2(Path(text)), "pt2"
    if text.lower().endswith(_PICKLED_SUFFIXES):
        raise ClassifierError(
            f"{text} is a pickled checkpoint, and unpickling runs whatever code is in it; it was not opened. "
            "Give a factory that builds the network and loads its state dict with weights_only=True "
            "(package.module:factory), or save the network with torch.export.save(...) as .pt2"
        )
    if text.startswith(("torchvision:", "timm:")):
        return _trace_module(_named_network(text, weights), input_size), "module"
    if ":" in text:
        return _trace_module(_module_from_factory(text), input_size), "module"
    raise ClassifierError(f"{text!r} is not a classifier that can be loaded; expected {_FORMS}")


def _module_from_factory(text: str) -> nn.Module:
    factory = import_attribute(text, ClassifierError, "package.module:factory")
    network = factory if isinstance(factory, nn.Module) else call_factory(factory, text, ClassifierError)
    if not isinstance(network, nn.Module):
        raise ClassifierError(f"{text} returned {type(network).__name__}; expected a torch.nn.Module")
    return network


def _named_network(text: str, weights: Path | None) -> nn.Module:
    package, _, name = text.partition(":")
    if weights is None:
        raise ClassifierError(f"{text} names an architecture; give its trained state dict with --weights FILE")
    try:
        library = importlib.import_module("torchvision.models" if package == "torchvision" else "timm")
    except ImportError as error:
        raise MissingExtraError(package, package, f"Building {text}") from error
    state = state_dict(weights)
    classes = next((len(t) for t in reversed(list(state.values())) if isinstance(t, torch.Tensor) and t.ndim), 1000)
    try:
        if package == "torchvision":
            network: nn.Module = library.get_model(name, weights=None, num_classes=classes)
        else:
            network = library.create_model(name, pretrained=False, num_classes=classes)
        network.load_state_dict(state)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ClassifierError(f"{weights} does not fit {text}: {reason_of(error)}") from error
    return network.eval()


def _trace_module(network: nn.Module, input_size: tuple[int, int] | None) -> ModelProto:
    _refuse_training(network)
    images, expected = _first_run(network, input_size or (224, 224))
    if not isinstance(expected, torch.Tensor):
        count = len(expected) if hasattr(expected, "__len__") else 1
        raise ClassifierError(
            f"the network returns {type(expected).__name__} with {count} outputs; expected one tensor, the logits. "
            "Wrap it in a module that returns the logits alone"
        )
    model = _export(network, images)
    _compare(model, images.float().cpu().numpy(), expected.float().cpu().numpy())
    return model


def _refuse_training(network: nn.Module) -> None:
    for name, part in network.named_modules():
        if part.training and isinstance(part, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise ClassifierError(
                f"layer {name!r} ({type(part).__name__}) is in training mode: its output is not the trained network's. "
                "Call .eval() on the network before handing it over"
            )


def _first_run(network: nn.Module, size: tuple[int, int]) -> tuple[torch.Tensor, Any]:
    """Run random images of 3 channels, then of 1, unless the first convolution says which; return both sides."""
    convolutions = [part.in_channels for part in network.modules() if isinstance(part, nn.Conv2d)]
    tried = (convolutions[0],) if convolutions and convolutions[0] in (1, 3) else (3, 1)
    first = next(network.parameters(), None)
    reasons = []
    for channels in tried:
        images = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        if first is not None and first.is_floating_point():
            images = images.to(first.dtype).to(first.device)
        try:
            with torch.no_grad():
                return images, network(images)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reasons.append(f"{list(images.shape)}: {reason_of(error)}")
    raise ClassifierError(
        f"the network does not accept images of shape {'; nor '.join(reasons)}. Give its input size with --input-size; "
        "networks of 1 or 3 channels are supported"
    )


def _export(network: nn.Module, images: torch.Tensor) -> ModelProto:
    """Trace with an open batch dimension; where the network forbids that, with batch 1 (freed later, if it works)."""
    attempts: list[tuple[torch.Tensor, Any]] = [(images, ({0: torch.export.Dim("N")},)), (images[:1], None)]
    for index, (example, shapes) in enumerate(attempts):
        try:
            with _quiet():
                program = torch.onnx.export(
                    network, (example,), dynamo=True, opset_version=OPSET, dynamic_shapes=shapes, verbose=False
                )
        except Exception as error:  # tracing runs arbitrary user code; anything can come out of it
            if index + 1 == len(attempts):
                raise ClassifierError(f"the network cannot be traced to ONNX: {reason_of(error)}") from error
            continue
        assert program is not None
        model: ModelProto = program.model_proto
        if shapes is None or not model.graph.input[0].type.tensor_type.shape.dim[0].dim_value:
            break  # otherwise the network fixed the open batch, silently, at the size of the example
    return model


def _compare(model: ModelProto, images: np.ndarray, expected: np.ndarray) -> None:
    session = open_ort(model.SerializeToString())
    (name,) = session.inputs
    step = session.batch(len(images))
    half = model.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT16
    dtype = np.float16 if half else np.float32
    rows = [session.run({name: images[i : i + step].astype(dtype)}) for i in range(0, len(images), step)]
    logits = np.concatenate([next(iter(row.values())) for row in rows]).astype(np.float64)
    limit = (HALF_TOLERANCE if half else MODULE_TOLERANCE) * max(1.0, float(np.abs(expected).max()))
    error = float(np.abs(logits - expected).max())
    if not error <= limit:
        raise ClassifierError(
            f"the traced network's logits differ by {error:.1e} from the module's (at most {limit:.1e} was expected): "
            "tracing changed it, or it gives NaN. Check for data-dependent control flow and random layers"
        )


def _onnx_from_pt2(path: Path) -> ModelProto:
    try:
        size = path.stat().st_size
        if size > MAX_PT2_BYTES:
            raise ClassifierError(f"{path} has {size:,} bytes; at most {MAX_PT2_BYTES:,} are read")
        clean = checked_pt2(path.read_bytes(), str(path))
    except OSError as error:
        raise ClassifierError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(clean))
    except Exception as error:  # torch's deserialiser raises many kinds on damaged files
        raise ClassifierError(f"{path} cannot be loaded by torch {torch.__version__}: {reason_of(error)}") from error
    for node in program.graph.nodes:
        for layer, flag in _TRAINING_FLAGS.items():
            if layer in str(node.target) and True in node.args[flag : flag + 1]:
                raise ClassifierError(f"{path} has a {layer} in training mode; call .eval() and export it again")
    try:
        with _quiet():
            traced = torch.onnx.export(program, (), dynamo=True, opset_version=OPSET, verbose=False)
    except Exception as error:  # tracing can fail in any operator
        raise ClassifierError(f"{path} cannot be converted to ONNX: {reason_of(error)}") from error
    assert traced is not None
    model: ModelProto = traced.model_proto
    _compare_with_program(model, program)
    return model


def _compare_with_program(model: ModelProto, program: "torch.export.ExportedProgram") -> None:
    inputs: tuple[Any, ...] = program.example_inputs[0] if program.example_inputs else ()
    if len(inputs) != 1 or not isinstance(inputs[0], torch.Tensor):
        return  # not a classifier of images; `graph_from_onnx` says so
    images = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(0)).to(inputs[0].dtype)
    with torch.no_grad(), _quiet():
        expected = program.module()(images)
    if isinstance(expected, torch.Tensor):
        _compare(model, images.float().numpy(), expected.float().numpy())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' log lines and deprecation notes, which are about themselves, off the user's terminal."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
