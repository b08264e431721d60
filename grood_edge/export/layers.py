"""The layers of a classifier graph, for the rewrites of its precision: names, constants, and what one layer changes."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    helper,
    numpy_helper,
    shape_inference,
)

from grood_edge.errors import ClassifierError, reason_of
from grood_edge.export.classifier import ClassifierGraph
from grood_edge.ort import open_ort

__all__ = [
    "LARGEST_HALF",
    "STORED_SIZE",
    "WEIGHTED",
    "LayerError",
    "cast_node",
    "checked",
    "constant_of",
    "error_at_features",
    "features_of",
    "fits_half",
    "is_stored_half",
    "layers_named",
    "logits_layer",
    "prepared",
    "ranked",
    "replace_initializers",
    "replace_nodes",
    "tensor_types",
]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LARGEST_HALF = float(np.finfo(np.float16).max)
STORED_SIZE = 1024  # values from which the weights of a float32 layer are stored as float16 and cast back
_SUBGRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


@dataclass(frozen=True)
class LayerError:
    """A node of the classifier, its operator, and the relative error at the features; infinite where it overflows."""

    node: str
    operator: str
    error: float


def prepared(model: ModelProto) -> ModelProto:
    """Return a copy with inferred types, named nodes, and constants as initializers.

    Raises:
        ClassifierError: a node with a subgraph.
    """
    result = shape_inference.infer_shapes(model, data_prop=True)
    nodes, names = [], {node.name for node in result.graph.node}
    for index, node in enumerate(result.graph.node):
        if any(attribute.type in _SUBGRAPHS for attribute in node.attribute):
            raise ClassifierError(
                f"the classifier's node {node.name or node.output[0]!r} ({node.op_type}) has a subgraph, which cannot "
                "be given a lower precision; export the classifier without control flow, or use --precision fp32"
            )
        constant = constant_of(node)
        if constant is not None:
            result.graph.initializer.append(constant)
            continue
        if not node.name:
            node.name = f"{node.op_type}_{index}"
            while node.name in names:
                node.name += "_"
        nodes.append(node)
    replace_nodes(result.graph, nodes)
    return result


def constant_of(node: NodeProto) -> TensorProto | None:
    """Return what a Constant node holds, in whichever numeric form, under the name of its output; None for others."""
    for a in node.attribute if node.op_type == "Constant" else ():
        if a.name == "value":
            tensor: TensorProto = TensorProto.FromString(a.t.SerializeToString())
            tensor.name = node.output[0]
            return tensor
        if a.name in ("value_int", "value_ints"):
            whole = a.ints if a.type == AttributeProto.INTS else a.i
            return numpy_helper.from_array(np.array(whole, np.int64), node.output[0])
        if a.name in ("value_float", "value_floats"):
            floats = a.floats if a.type == AttributeProto.FLOATS else a.f
            return numpy_helper.from_array(np.array(floats, np.float32), node.output[0])
    return None


def checked(model: ModelProto, precision: str) -> ModelProto:
    """Return the rewritten model.

    Raises:
        ClassifierError: it is no valid ONNX.
    """
    try:
        checker.check_model(model, full_check=True)
    except Exception as error:  # ValidationError and InferenceError share no other base class
        raise ClassifierError(
            f"the classifier cannot be written in {precision}: {reason_of(error)}. Keep the node in float32 with "
            "--keep-float, or use --precision fp32"
        ) from error
    return model


def replace_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Put these nodes in the place of the graph's own, in order; they may be the graph's."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    graph.ClearField("node")
    graph.node.extend(copies)


def replace_initializers(graph: GraphProto, tensors: Iterable[TensorProto]) -> None:
    """Put those of these tensors that a node reads in the place of the graph's own; they may be the graph's."""
    read = {name for node in graph.node for name in node.input}
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in tensors if tensor.name in read]
    graph.ClearField("initializer")
    graph.initializer.extend(copies)


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Return the element type of every tensor that is known."""
    graph = model.graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def logits_layer(model: ModelProto, classifier: ClassifierGraph) -> list[NodeProto]:
    """Return the nodes from the logits back to the layer with weights that makes them."""
    producers = {name: node for node in model.graph.node for name in node.output}
    nodes, node = [], producers.get(classifier.logits_tensor)
    while node is not None:
        nodes.append(node)
        node = None if node.op_type in WEIGHTED else producers.get(node.input[0])
    return nodes


def fits_half(values: np.ndarray) -> bool:
    """Tell whether float16 holds the values.

    Small weights become 0, and large ones beside them drown that; an epsilon that stands alone must not.
    """
    finite = np.abs(values[np.isfinite(values)])
    if finite.size and finite.max() > LARGEST_HALF:
        return False
    return bool(values.size > 1 or not finite.size or finite.max() == 0 or values.astype(np.float16).any())


def is_stored_half(node: NodeProto, values: np.ndarray) -> bool:
    """Tell whether the weights of a float32 layer are worth storing as float16: 2^-11 of each is lost, half the bytes.

    The layer computes in float32 all the same.
    """
    return node.op_type in WEIGHTED and values.size >= STORED_SIZE and fits_half(values)


def cast_node(name: str, wanted: int) -> NodeProto:
    """Return a Cast of a tensor, named after it and the type."""
    target = f"{name}_to_{TensorProto.DataType.Name(wanted).lower()}"
    return helper.make_node("Cast", [name], [target], name=target, to=wanted)


def layers_named(classifier: ClassifierGraph, names: frozenset[str]) -> frozenset[str]:
    """Return the nodes that the user's tensors or nodes name.

    Raises:
        ClassifierError: a name that is neither; lists some that are.
    """
    nodes = prepared(classifier.model).graph.node
    by_name = {node.name: node.name for node in nodes}
    by_name |= {output: node.name for node in nodes for output in node.output}
    unknown = sorted(names - set(by_name))
    if unknown:
        some = ", ".join(node.name for node in nodes if node.op_type in WEIGHTED)[:600]
        raise ClassifierError(f"--keep-float {unknown[0]!r} is no node or tensor of the classifier; some are: {some}")
    return frozenset(by_name[name] for name in names)


def features_of(model: ModelProto, classifier: ClassifierGraph, images: np.ndarray) -> np.ndarray:
    """Return the features tensor of a graph with the classifier's names for its input `[n, ...]`: float64 `[n, v]`."""
    opened = open_ort(model.SerializeToString())
    runs = [opened.run({classifier.input_name: image[None]}, [classifier.features_tensor]) for image in images]
    rows = np.concatenate([run[classifier.features_tensor] for run in runs]).astype(np.float64)
    return rows.reshape(len(rows), -1)


def error_at_features(found: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean distance of the features from the reference's, over its mean length about the mean."""
    centred = np.linalg.norm(reference - reference.mean(axis=0), axis=1).mean()
    with np.errstate(invalid="ignore"):
        error = float(np.linalg.norm(found - reference, axis=1).mean() / max(centred, 1e-30))
    return error if np.isfinite(error) else float("inf")


def ranked(nodes: Iterable[NodeProto], error: Callable[[NodeProto], float]) -> list[LayerError]:
    """Return the error of each node, largest first."""
    return sorted((LayerError(n.name, n.op_type, error(n)) for n in nodes), key=lambda e: -e.error)
