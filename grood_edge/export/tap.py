"""Find the tensor of a classifier graph at which features can be mixed, and cut the graph there.

Mixing is right only where one tensor is all that the rest of the network sees: every path from the image to logits and
features passes through it. Inside a residual block no tensor is like that.
"""

import math
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, shape_inference
from onnx.utils import Extractor

from grood_edge.errors import ClassifierError
from grood_edge.export.feature_point import captured_tensors, pruned

__all__ = ["MAX_EARLY_BYTES", "Tap", "cut", "find_tap"]

MAX_EARLY_BYTES = 1 << 30  # float32 class means at the tap, all classes together

# Operators after which mixing two images is still mixing two pictures: nothing has been recognised yet.
_LINEAR = {
    "Add", "AveragePool", "BatchNormalization", "Cast", "Concat", "Conv", "Div", "Expand", "Flatten", "Gather", "Gemm",
    "Identity", "MatMul", "Mul", "Pad", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip


@dataclass(frozen=True)
class Tap:
    """A tensor of the graph and its shape for one image."""

    tensor: str
    shape: tuple[int, ...]


def find_tap(model: ModelProto, class_count: int, named: str | None = None) -> Tap | None:
    """Find the first tensor after a nonlinear operator that can be mixed; None when there is none.

    Args:
        model: `image` to `features` and `logits`, as `graph.base_model` makes it.
        class_count: its early prototypes must fit `MAX_EARLY_BYTES`.
        named: take this tensor of the classifier instead.

    Raises:
        ClassifierError: `named` is no such tensor; lists those that are.
    """
    candidates = [tap for tap in _cuts(model) if 4 * class_count * math.prod(tap.shape) <= MAX_EARLY_BYTES]
    if named is None:
        return candidates[0] if candidates else None
    for tap in candidates:
        if named in (tap.tensor, tap.tensor.removeprefix("classifier/")):
            return tap
    names = ", ".join(f"{tap.tensor.removeprefix('classifier/')} {list(tap.shape)}" for tap in candidates[:8]) or "none"
    raise ClassifierError(
        f"--mixup-layer {named!r} cannot be mixed: expected a tensor outside residual blocks that every path from the "
        f"image to logits and features passes, with {class_count} class means below {MAX_EARLY_BYTES >> 20} MiB. "
        f"Candidates: {names}"
    )


def cut(model: ModelProto, tap: Tap) -> tuple[ModelProto, ModelProto]:
    """Return the model up to the tap (`image` to the tap) and from it (the tap to `features` and `logits`)."""
    front = pruned(model, [tap.tensor])
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    front.graph.ClearField("output")
    known = {value.name: value for value in inferred.graph.value_info}
    front.graph.output.append(known[tap.tensor])
    return front, Extractor(inferred).extract_model([tap.tensor], ["features", "logits"])


def _cuts(model: ModelProto) -> list[Tap]:
    """List the tensors that all later nodes depend on, in order, from the first nonlinear operator to the features.

    In topological order, a tensor is such a cut if and only if it is the only one made from the image that is still
    needed after the node that makes it.
    """
    graph = shape_inference.infer_shapes(pruned(model, ["features", "logits"]), data_prop=True).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    types = {v.name: v.type.tensor_type.elem_type for v in graph.value_info}
    last_use = {name: index for index, node in enumerate(graph.node) for name in _read(node)}
    last_use |= {value.name: len(graph.node) for value in graph.output}
    live = {value.name for value in graph.input}
    outputs = {value.name for value in graph.output}
    nonlinear, found = False, []
    for index, node in enumerate(graph.node):
        if not live.intersection(_read(node)):
            continue  # a constant: the image has no part in it
        nonlinear |= node.op_type not in _LINEAR
        live.update(name for name in node.output if last_use.get(name, -1) > index)
        live = {name for name in live if last_use[name] > index}
        if len(live) != 1:
            continue
        (name,) = live
        shape = shapes.get(name, [])[1:]
        if outputs.intersection(_only_reshapes_after(graph.node[index + 1 :], name)) or name in outputs:
            break
        if nonlinear and name in node.output and shape and all(shape) and types[name] == TensorProto.FLOAT:
            found.append(Tap(name, tuple(shape)))
    return found


def _only_reshapes_after(nodes: list[NodeProto], name: str) -> set[str]:
    """Return the tensors that are this one in another shape or type: mixing there would be mixing features."""
    same = {name}
    for node in nodes:
        if node.op_type in ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose") and node.input[0] in same:
            same.update(node.output)
    return same


def _read(node: NodeProto) -> list[str]:
    return [*node.input, *captured_tensors(node)]
