"""The camera part of an artifact's graph: cut off, or alone, by its names and without onnx.

Images of other sizes than the camera's take the host's resize into the graph without that part. Its output is whole
grey levels, so that a frame of the camera may go through it alone, and then on among the others.
"""

from collections.abc import Iterator

import numpy as np

from grood_edge import onnx_proto as proto
from grood_edge import wire
from grood_edge.arrays import Frame, InputFrame
from grood_edge.errors import ArtifactError
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import Camera, Preprocessing, camera_frame, preprocess_frame

__all__ = [
    "CAMERA",
    "PREPARED",
    "camera_part",
    "open_camera",
    "prepared_frame",
    "prepared_model",
    "require_camera_part",
    "simulated_frame",
    "without_camera",
]

CAMERA = "camera/"  # prefix of every node, tensor and initializer of the part
PREPARED = CAMERA + "prepared"  # its output, float32 [N, h, w, c]: whole grey levels
_IMAGE = "image"
_FLOAT, _UINT8 = 1, 2


def prepared_frame(frame: Frame, preprocessing: Preprocessing, camera: OrtModel | None) -> InputFrame:
    """Return an RGB or grey frame as the classifier takes it, uint8 `[height, width, channels]`.

    Frames of the camera's size and colour go through `camera`, the open camera part; others, and all where it is None,
    are resized and cropped on the host.

    Raises:
        FrameError: no frame.
        BackendError: onnxruntime failed.
    """
    raw = preprocessing.camera
    if camera is None or raw is None or (*np.shape(frame), 1)[:3] != raw.shape:
        return preprocess_frame(frame, preprocessing)
    found = camera.run({_IMAGE: camera_frame(frame, raw, "rgb")[None]}, [PREPARED])[PREPARED]
    return np.asarray(found[0]).astype(np.uint8)


def simulated_frame(frame: Frame, camera: Camera) -> InputFrame:
    """Return any RGB or grey frame as the camera would deliver it, uint8 `[*camera.shape]`: stretched to its size."""
    height, width, channels = camera.shape
    zero, one = (0.0,) * channels, (1.0,) * channels
    whole = Preprocessing("none", height, width, channels, "bilinear", "stretch", None, zero, one)
    return camera_frame(preprocess_frame(frame, whole), camera, "rgb")


def open_camera(model: bytes, preprocessing: Preprocessing, threads: int | None = None) -> OrtModel | None:
    """Open the camera part of an artifact's model, on the CPU; None where its contract names no camera.

    Raises:
        ArtifactError: the part is missing, or cannot be cut off.
        BackendError: onnxruntime refuses it.
    """
    return None if preprocessing.camera is None else open_ort(camera_part(model), threads=threads)


def camera_part(model: bytes) -> bytes:
    """Cut the camera part out: a model from raw frames `image` to `camera/prepared`.

    Raises:
        ArtifactError: there is none, or other nodes use more of it than its output.
    """
    require_camera_part(model)
    graph = [
        field.raw
        for field in wire.read_fields(proto.graph_of(model))
        if _is_camera(field) or field.number in (proto.GRAPH_NAME, proto.GRAPH_INPUT)
    ]
    graph.append(wire.encode_field(proto.GRAPH_OUTPUT, _value(PREPARED, _FLOAT, (b"", b"", b"", b""))))
    return proto.with_graph(model, graph)


def without_camera(model: bytes, preprocessing: Preprocessing) -> bytes:
    """Cut the camera part off: `image` is then the prepared frame, uint8 `[N, height, width, channels]`.

    Raises:
        ArtifactError: there is none, or other nodes use more of it than its output.
    """
    require_camera_part(model)

    def kept() -> Iterator[bytes | memoryview]:
        for field in wire.read_fields(proto.graph_of(model)):
            if _is_camera(field):
                continue
            if field.number == proto.GRAPH_NODE:
                yield wire.encode_field(proto.GRAPH_NODE, _reading_image(field.message()))
            elif field.number == proto.GRAPH_INPUT:
                p = preprocessing
                sides = (wire.encode_field(proto.DIM_VALUE, side) for side in (p.height, p.width, p.channels))
                value = _value(_IMAGE, _UINT8, (_batch_of(field.message()), *sides))
                yield wire.encode_field(proto.GRAPH_INPUT, value)
            else:
                yield field.raw

    return proto.with_graph(model, kept())


def prepared_model(model: bytes, preprocessing: Preprocessing) -> bytes:
    """Return the model that takes prepared frames: without the camera part, where there is one."""
    return model if preprocessing.camera is None else without_camera(model, preprocessing)


def require_camera_part(model: bytes) -> None:
    """Check that the graph has a camera part that can be cut off: only it reads `image`, and it gives one tensor.

    Raises:
        ArtifactError: it has not.
    """
    gives = False
    for field in wire.read_fields(proto.graph_of(model)):
        if field.number != proto.GRAPH_NODE:
            continue
        inside = _is_camera(field)
        for part in wire.read_fields(field.message()):
            if part.number == proto.NODE_OUTPUT and part.text().startswith(CAMERA):
                gives |= inside and part.text() == PREPARED
                wrong = not inside
            elif part.number == proto.NODE_INPUT and inside:
                wrong = not part.text().startswith(CAMERA) and part.text() not in (_IMAGE, "")
            elif part.number == proto.NODE_INPUT:
                wrong = part.text() == _IMAGE or (part.text().startswith(CAMERA) and part.text() != PREPARED)
            else:
                continue
            if wrong:
                raise ArtifactError(
                    f"tensor {part.text()!r} crosses the edge of the camera part, which can then not be cut off; "
                    "export the artifact again"
                )
    if not gives:
        raise ArtifactError(f"the contract names a camera, and no node of the graph gives {PREPARED!r}; export again")


def _is_camera(field: wire.Field) -> bool:
    number = {proto.GRAPH_NODE: proto.NODE_NAME, proto.GRAPH_INITIALIZER: proto.TENSOR_NAME}.get(field.number)
    return number is not None and proto.name_of(field, number).startswith(CAMERA)


def _reading_image(node: memoryview | bytes) -> bytes:
    renamed = wire.encode_field(proto.NODE_INPUT, _IMAGE.encode())
    return b"".join(
        renamed if field.number == proto.NODE_INPUT and field.text() == PREPARED else field.raw
        for field in wire.read_fields(node)
    )


def _batch_of(value: memoryview | bytes) -> bytes:
    """Return the first dimension of a ValueInfoProto, as it is encoded."""
    shape = value
    for number in (proto.VALUE_TYPE, proto.TYPE_TENSOR, proto.TENSOR_TYPE_SHAPE):
        shape = wire.only_bytes(shape, number) or b""
    return bytes(next(wire.read_fields(shape)).message()) if len(shape) else b""


def _value(name: str, kind: int, dims: tuple[bytes, ...]) -> bytes:
    """Encode a ValueInfoProto; an empty dimension is open."""
    shape = b"".join(wire.encode_field(1, dim) for dim in dims)
    tensor = wire.encode_field(proto.TENSOR_TYPE_ELEMENT, kind) + wire.encode_field(proto.TENSOR_TYPE_SHAPE, shape)
    kind_of_value = wire.encode_field(proto.TYPE_TENSOR, tensor)
    return wire.encode_field(proto.VALUE_NAME, name.encode()) + wire.encode_field(proto.VALUE_TYPE, kind_of_value)
