"""Bring a classifier's ONNX file into the one form that artifacts use, or refuse it by the name of a node.

Opset 19, the standard domain only, local functions inlined, no doc strings, source paths or metadata, batch
dimension free. Files are untrusted: sizes are bounded and no path leads out of the model's folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx import (
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    checker,
    defs,
    external_data_helper,
    inliner,
    numpy_helper,
    version_converter,
)

from grood_edge.artifact import Artifact
from grood_edge.errors import ArtifactError, ClassifierError, reason_of
from grood_edge.export.preflight_finding import MAX_NAME, name_of
from grood_edge.onnx_proto import OPSET

__all__ = ["IR_VERSION", "free_batch", "load_onnx", "model_of", "normal_form"]

IR_VERSION = 9  # belongs to opset 19; onnxruntime 1.18 reads up to 10
OLDEST_OPSET = 7  # below it, broadcasting was an attribute and no converter is reliable
MAX_MODEL_BYTES = (2 << 30) - 1  # protobuf's own limit
MAX_INLINED_NODES = 20_000  # in place of local functions; real classifiers have hundreds
MAX_INLINED_BYTES = 256 << 20  # beyond the model's own
_MAX_FUNCTION_DEPTH = 64
_STANDARD = ("", "ai.onnx")


def load_onnx(path: Path) -> ModelProto:
    """Read an .onnx file and its external data.

    Raises:
        ClassifierError: missing, damaged or too large, or external data outside the model's folder.
    """
    try:
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise ClassifierError(
                f"{path} has {path.stat().st_size:,} bytes; at most {MAX_MODEL_BYTES:,} are supported"
            )
        model = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise ClassifierError(f"cannot read {path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise ClassifierError(f"{path} is not an ONNX file, or it is damaged: {error}") from error
    if not model.graph.node:
        raise ClassifierError(f"{path} holds no ONNX graph; expected a trained classifier")
    if (odd := _odd_text(model)) is not None:
        raise ClassifierError(f"{path} is a damaged ONNX file: the name {odd[:40]!r} is not UTF-8")
    folder = path.resolve().parent
    total = 0
    for tensor in _external_tensors(model):
        total += _check_external(tensor, folder)
    if total > MAX_MODEL_BYTES:
        raise ClassifierError(f"{path} with its external data has {total:,} bytes; at most {MAX_MODEL_BYTES:,} fit")
    try:
        external_data_helper.load_external_data_for_model(model, str(folder))
    except (OSError, ValueError, checker.ValidationError) as error:
        raise ClassifierError(f"the external data of {path} cannot be read: {error}") from error
    return model


def model_of(artifact: Artifact) -> ModelProto:
    """Return the artifact's model as the onnx package reads it.

    Raises:
        ArtifactError: it does not: the reader of artifacts leaves some of the graph to the runtimes.
    """
    try:
        model = onnx.load_model_from_string(artifact.model)
    except DecodeError as error:
        raise ArtifactError(f"the package onnx cannot read the artifact: {error}; export it again") from error
    if (odd := _odd_text(model)) is not None:
        raise ArtifactError(f"the artifact's graph has the name {odd[:40]!r}, which is not UTF-8; export it again")
    return model


def _odd_text(message: Message) -> bytes | None:
    """Return a text that is not UTF-8, which protobuf gives as bytes; None when there is none."""
    for field in message.DESCRIPTOR.fields:
        if field.type not in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE):
            continue
        value = getattr(message, field.name)
        single = isinstance(value, str | bytes) or (isinstance(value, Message) and message.HasField(field.name))
        for part in (value,) if single else () if isinstance(value, Message) else value:
            odd = _odd_text(part) if isinstance(part, Message) else part if isinstance(part, bytes) else None
            if odd is not None:
                return odd
    return None


def normal_form(model: ModelProto) -> ModelProto:
    """Return the model in opset 19, inlined and stripped.

    Raises:
        ClassifierError: custom domains, training-mode batch norm, functions that become too large when they are
            inlined, or an opset that cannot be converted.
    """
    result = ModelProto()
    result.CopyFrom(model)
    if result.functions:
        _refuse_endless_functions(result)
        result = inliner.inline_local_functions(result)
    _refuse_custom_domains(result)
    _refuse_training_mode(result)
    result = _to_opset(result)
    _drop_weight_inputs(result.graph)
    _strip(result)
    result.ir_version = IR_VERSION
    return result


def _refuse_endless_functions(model: ModelProto) -> None:
    """Count what inlining would make: functions that call one another twice double it with each."""
    bodies: dict[tuple[str, str], list[GraphProto]] = {}
    for function in model.functions:
        bodies.setdefault((function.domain, function.name), []).append(GraphProto(node=function.node))
    known: dict[tuple[str, str], tuple[int, int]] = {}

    def size(graphs: list[GraphProto], depth: int) -> tuple[int, int]:
        count = total = 0
        for node in (node for graph in graphs for node in _nodes(graph)):
            name = node.domain, node.op_type
            if name in bodies and name not in known:
                if depth == _MAX_FUNCTION_DEPTH:
                    raise ClassifierError(
                        f"the classifier's local functions call one another more than {depth} deep, or themselves; "
                        "export it again without local functions"
                    )
                known[name] = size(bodies[name], depth + 1)
            nodes, size_in_bytes = known.get(name, (1, node.ByteSize()))
            count, total = count + nodes, total + size_in_bytes
        return count, total

    count, total = size([model.graph], 0)
    most = MAX_INLINED_NODES + len(model.graph.node), MAX_INLINED_BYTES + model.ByteSize()
    if count > most[0] or total > most[1]:
        raise ClassifierError(
            f"the classifier has {count:,} nodes of {total:,} bytes when its local functions are inlined; at most "
            f"{most[0]:,} of {most[1]:,} bytes are supported. Export it again without local functions"
        )


def free_batch(model: ModelProto) -> ModelProto:
    """Return the model with an open batch dimension; whether that works must be tried, not assumed."""
    result = ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    for value in (*graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims:
            dims[0].Clear()
            dims[0].dim_param = "N"
    graph.ClearField("value_info")
    shapes = {node.input[1] for node in graph.node if node.op_type == "Reshape"}
    fixed = {i.name: i for i in graph.initializer if i.name in shapes}
    fixed |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant" and node.output[0] in shapes
        for attribute in node.attribute
        if attribute.name == "value"
    }
    batch = _fixed_batch(model)
    for tensor in fixed.values():
        target = numpy_helper.to_array(tensor).copy()
        if batch is not None and target.ndim == 1 and target.size > 1 and target[0] == batch:
            target[0] = 0 if -1 in target[1:] else -1  # 0 copies the input's first dimension
            tensor.CopyFrom(numpy_helper.from_array(target.astype(np.int64), tensor.name))
    return result


def _fixed_batch(model: ModelProto) -> int | None:
    initializers = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name not in initializers and value.type.tensor_type.shape.dim:
            return value.type.tensor_type.shape.dim[0].dim_value or None
    return None


def _to_opset(model: ModelProto) -> ModelProto:
    version = max((o.version for o in model.opset_import if o.domain in _STANDARD), default=0)
    if version == OPSET:
        return model
    if version < OLDEST_OPSET:
        raise ClassifierError(f"the classifier has opset {version}; at least {OLDEST_OPSET} is needed. Export it again")
    if version > defs.onnx_opset_version():
        raise ClassifierError(
            f"the classifier has opset {version}; the installed onnx knows up to {defs.onnx_opset_version()}. "
            f"Export it again with opset {OPSET}, or install a newer onnx"
        )
    if version > OPSET:
        _refuse_newer_operators(model, version)
    _refuse_malformed_nodes(model, version)
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises RuntimeError and others straight from C++
        raise ClassifierError(
            f"the classifier has opset {version} and cannot be converted to {OPSET}: {reason_of(error)}. "
            f"Export it again with opset {OPSET}"
        ) from error


def _refuse_newer_operators(model: ModelProto, version: int) -> None:
    for node in _nodes(model.graph):
        try:
            defs.get_schema(node.op_type, OPSET, "")
        except defs.SchemaError as error:
            raise ClassifierError(
                f"the classifier has opset {version}, and its node {_named(node)} does not exist in opset {OPSET}, "
                f"the newest that every supported runtime reads. Export it again with opset {OPSET}"
            ) from error


def _refuse_malformed_nodes(model: ModelProto, version: int) -> None:
    """The converter trusts what a node says of its attributes: one of another type can end the process."""
    context = type(checker.DEFAULT_CONTEXT)()
    context.ir_version, context.opset_imports = IR_VERSION, {"": version}
    for node in _nodes(model.graph):
        alone = NodeProto()
        alone.CopyFrom(node)
        for attribute in alone.attribute:  # the nodes inside take their turn
            for graph in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
                graph.CopyFrom(GraphProto(name="inside"))
        try:
            checker.check_node(alone, context)
        except checker.ValidationError as error:
            reason = reason_of(error)[:300].rstrip(".")
            raise ClassifierError(
                f"the classifier's node {_named(node)} is not what opset {version} allows: {reason}. "
                "Export the classifier again"
            ) from error


def _refuse_custom_domains(model: ModelProto) -> None:
    nodes = [node for node in _nodes(model.graph) if node.domain not in _STANDARD]
    if nodes:
        shown = ", ".join(f"{_named(node)} ({node.domain})" for node in nodes[:5])
        raise ClassifierError(
            f"{len(nodes)} nodes use operators outside the ONNX standard: {shown}. "
            "Export the classifier without custom or runtime-specific operators"
        )
    for node in _nodes(model.graph):
        node.domain = ""


def _refuse_training_mode(model: ModelProto) -> None:
    for graph in _graphs(model.graph):
        true = {tensor.name for tensor in graph.initializer if _is_true(tensor)}
        true |= {n.output[0] for n in graph.node if n.op_type == "Constant" and any(_is_true(a.t) for a in n.attribute)}
        for node in graph.node:
            flag = any(a.name == "training_mode" and a.i for a in node.attribute)
            if node.op_type == "BatchNormalization" and (flag or len(node.output) > 1):
                raise ClassifierError(
                    f"node {_named(node)} is a batch norm in training mode: its output depends on the rest of the "
                    "batch. Call model.eval() before exporting the classifier"
                )
            if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in true:
                raise ClassifierError(
                    f"node {_named(node)} is a dropout in training mode: its output is random. "
                    "Call model.eval() before exporting the classifier"
                )


def _is_true(tensor: TensorProto) -> bool:
    if tensor.data_type != TensorProto.BOOL:
        return False
    try:
        return bool(numpy_helper.to_array(tensor).all())
    except ValueError as error:
        name = tensor.name[:MAX_NAME]
        raise ClassifierError(f"the classifier's tensor {name!r} is damaged: {error}; export it again") from error


def _drop_weight_inputs(graph: GraphProto) -> None:
    """Old files (IR version 3) list their weights among the inputs, too; only the image is one."""
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    graph.ClearField("input")
    graph.input.extend(inputs)


def _strip(model: ModelProto) -> None:
    """Remove what exporters leave behind: doc strings, source paths, stack traces, timestamps."""
    for field in ("doc_string", "metadata_props", "producer_name", "producer_version", "domain", "model_version"):
        model.ClearField(field)
    for opset in [o for o in model.opset_import if o.domain not in _STANDARD]:
        model.opset_import.remove(opset)
    for graph in _graphs(model.graph):
        for field in ("doc_string", "metadata_props", "quantization_annotation", "value_info"):
            graph.ClearField(field)
        for part in (*graph.node, *graph.initializer, *graph.input, *graph.output):
            part.ClearField("doc_string")
            part.ClearField("metadata_props")
        for attribute in (a for node in graph.node for a in node.attribute):
            attribute.ClearField("doc_string")
            for tensor in [attribute.t] if attribute.HasField("t") else attribute.tensors:
                tensor.ClearField("doc_string")
                tensor.ClearField("metadata_props")


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for sub in (attribute.g, *attribute.graphs):
                if sub.node:
                    yield from _graphs(sub)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for each in _graphs(graph):
        yield from each.node


def _named(node: NodeProto) -> str:
    return f"{node.op_type[:MAX_NAME]} {name_of(node)!r}"


def _external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    roots = [model.graph, *(GraphProto(node=function.node) for function in model.functions)]
    for graph in (part for root in roots for part in _graphs(root)):
        attributes = [attribute for node in graph.node for attribute in node.attribute]
        tensors = [*graph.initializer, *(tensor for a in attributes for tensor in (a.t, *a.tensors))]
        yield from (t for t in tensors if external_data_helper.uses_external_data(t))


def _check_external(tensor: TensorProto, folder: Path) -> int:
    """Return the size of the file that holds the tensor's data; refuse it outside the model's folder."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    try:
        target = (folder / location).resolve()
    except (OSError, ValueError, RuntimeError):  # links in a circle, a NUL
        target = folder.parent
    if not location or not target.is_relative_to(folder) or Path(location).is_absolute():
        raise ClassifierError(
            f"tensor {tensor.name!r} keeps its data in {location!r}, outside the model's folder; it was not read. "
            "Put the data file beside the .onnx"
        )
    if not os.path.isfile(target):  # False for a name that is too long
        raise ClassifierError(f"tensor {tensor.name!r} keeps its data in {location!r}, which does not exist")
    length = next((int(e.value) for e in tensor.external_data if e.key == "length" and e.value.isdigit()), 0)
    return length or target.stat().st_size
