"""The parts of onnx.proto3 that are read without the onnx package: field numbers, and the two lookups all need."""

from collections.abc import Iterable

from grood_edge import wire
from grood_edge.errors import ArtifactError

OPSET = 19  # of every artifact: TensorRT 10 parses it, and Q/DQ may carry float16 scales

# Field numbers of onnx.proto3
MODEL_GRAPH, MODEL_OPSET, MODEL_FUNCTION = 7, 8, 25
GRAPH_NODE, GRAPH_NAME, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 1, 2, 5, 11, 12, 15
FUNCTION_NODE, FUNCTION_ATTRIBUTE = 7, 11
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 5, 7
ATTRIBUTE_T, ATTRIBUTE_G, ATTRIBUTE_TENSORS, ATTRIBUTE_GRAPHS = 5, 6, 10, 11
ATTRIBUTE_SPARSE, ATTRIBUTE_SPARSES = 22, 23
SPARSE_PARTS = (1, 2)  # values and indices
TENSOR_DIMS, TENSOR_TYPE, TENSOR_NAME, TENSOR_RAW, TENSOR_EXTERNAL, TENSOR_LOCATION = 1, 2, 8, 9, 13, 14
VALUE_NAME, VALUE_TYPE, TYPE_TENSOR, TENSOR_TYPE_ELEMENT, TENSOR_TYPE_SHAPE, DIM_VALUE = 1, 2, 1, 1, 2, 1


def graph_of(model: bytes) -> memoryview | bytes:
    """Return the model's graph message.

    Raises:
        ArtifactError: there is none, or more than one.
    """
    graphs = [field.message() for field in wire.read_fields(model) if field.number == MODEL_GRAPH]
    if len(graphs) != 1:  # protobuf would merge several, so that what is checked is not what runs
        raise ArtifactError(f"the file has {len(graphs)} ONNX graphs: it is not an ONNX model, or it was damaged")
    return graphs[0]


def name_of(field: wire.Field, number: int) -> str:
    """Return the name that stands in field `number` of a message; "" when there is none."""
    name = wire.only_bytes(field.message(), number)
    return "" if name is None else bytes(name).decode("utf-8", errors="replace")


def with_graph(model: bytes, fields: Iterable[bytes | memoryview]) -> bytes:
    """Return the model with another graph, given as its encoded fields; everything else is carried over."""
    return b"".join(
        wire.encode_field(field.number, b"".join(fields)) if field.number == MODEL_GRAPH else field.raw
        for field in wire.read_fields(model)
    )
