"""The part of a graph that brings a camera's raw frames to the classifier's input: resize and crop as ONNX nodes.

Pillow's bilinear filter is linear, so each axis is one product with a constant matrix. Of that matrix only a band is
not 0. So the output is cut into blocks of `BLOCK` rows, and each block is multiplied with the few source rows that it
reaches. Pillow rounds to whole grey levels after each axis and the graph only once, at the end; before that they differ
by at most 0.5 + 0.5 grey levels, and so by at most one after it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, checker, helper, numpy_helper

from grood_edge.camera_part import CAMERA, PREPARED
from grood_edge.export.normal_form import IR_VERSION
from grood_edge.onnx_proto import OPSET
from grood_edge.preprocessing import Camera, Preprocessing, placement_of
from grood_edge.resampling import Placement, SourceSpan

__all__ = ["attach_camera", "camera_model"]

BLOCK = 4  # output rows that share their source rows: fewer copy more, more multiply more zeros (benchmarks/resize.py)
TOGETHER = 16  # pixels that become grey in one row of a product
_ONE = 1 << 22  # Pillow's weights are integers of this unit
_LUMA = np.array([19595, 38470, 7471], np.float32) / 65536  # of R, G, B; exact in float32, as Pillow's integers are


def attach_camera(model: ModelProto, preprocessing: Preprocessing) -> ModelProto:
    """Return a model of prepared frames `image` as one of the camera's raw frames; all other nodes stay as they are.

    `image` becomes uint8 `[N, *preprocessing.input_shape]`.
    """
    attached = ModelProto()
    attached.CopyFrom(model)
    graph = attached.graph
    part = _part_of(preprocessing)
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(part.nodes)
    graph.node.extend(model.graph.node)
    for node in graph.node[len(part.nodes) :]:
        node.input[:] = [PREPARED if name == "image" else name for name in node.input]
    graph.initializer.extend(part.constants)
    graph.initializer.extend(model.graph.initializer)
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]
    graph.input.append(_raw_image(batch.dim_param or batch.dim_value, preprocessing))
    checker.check_model(attached)
    return attached


def camera_model(preprocessing: Preprocessing) -> ModelProto:
    """Return that part alone: `image` uint8 `[N, *input_shape]` to whole grey levels, float32 `[N, h, w, c]`."""
    part = _part_of(preprocessing)
    shape: list[str | int] = ["N", preprocessing.height, preprocessing.width, preprocessing.channels]
    graph = helper.make_graph(
        part.nodes,
        "camera",
        [_raw_image("N", preprocessing)],
        [helper.make_tensor_value_info(PREPARED, TensorProto.FLOAT, shape)],
        part.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    checker.check_model(model)
    return model


def _raw_image(batch: int | str, preprocessing: Preprocessing) -> ValueInfoProto:
    return helper.make_tensor_value_info("image", TensorProto.UINT8, [batch, *preprocessing.input_shape])


@dataclass
class _Part:
    """Nodes in a row, each of the output of the one before, and their constants."""

    nodes: list[NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    tensor: str = "image"

    def constant(self, name: str, value: np.ndarray | Sequence[int]) -> str:
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        self.constants.append(numpy_helper.from_array(array, CAMERA + name))
        return CAMERA + name

    def add(self, operator: str, name: str, more: Sequence[str] = (), **attributes: Any) -> None:
        """Add a node that takes the tensor so far, then `more`."""
        self.add_of(operator, name, [self.tensor, *more], **attributes)

    def add_of(self, operator: str, name: str, inputs: Sequence[str], **attributes: Any) -> None:
        """Add a node whose inputs are all named."""
        self.tensor = CAMERA + name
        self.nodes.append(helper.make_node(operator, inputs, [self.tensor], name=self.tensor, **attributes))

    def reshape(self, name: str, shape: Sequence[int]) -> None:
        """Reshape; 0 keeps the batch."""
        self.add("Reshape", name, [self.constant(f"{name}_shape", shape)])

    def slice(self, name: str, axes: Sequence[int], starts: Sequence[int], ends: Sequence[int]) -> None:
        values = {"start": starts, "end": ends, "axes": axes}
        self.add("Slice", name, [self.constant(f"{name}_{key}", value) for key, value in values.items()])


def _part_of(preprocessing: Preprocessing) -> _Part:
    """Rows before columns: the large tensor is then only read row by row, and never transposed."""
    p, camera = preprocessing, preprocessing.camera
    assert camera is not None
    placement = placement_of(camera.height, camera.width, p)
    rows, columns = _Band.of(placement.rows), _Band.of(placement.columns)
    channels = camera.shape[2]
    part = _Part()
    part.add("Cast", "float", to=TensorProto.FLOAT)  # first: TensorRT takes uint8 nowhere else
    if (rows.last - rows.first, columns.last - columns.first) != (camera.height, camera.width):
        part.slice("kept", (1, 2), (rows.first, columns.first), (rows.last, columns.last))
    if channels > p.channels:
        _add_luma(part, camera, (rows.last - rows.first) * (columns.last - columns.first))
        channels = 1
    width = (columns.last - columns.first) * channels
    part.reshape("rows_in", [0, rows.last - rows.first, width])
    _add_axis(part, "rows", rows, width)
    part.add("Transpose", "turned", perm=[0, 2, 1])
    part.reshape("columns_in", [0, columns.last - columns.first, channels * rows.out])
    _add_axis(part, "columns", columns, channels * rows.out)
    part.reshape("by_channel", [0, columns.out, channels, rows.out])
    if channels == 3 and camera.layout == "bgr":
        part.add("Gather", "rgb", [part.constant("rgb_order", [2, 1, 0])], axis=2)
    part.add("Round", "levels")
    part.add("Transpose", "upright", perm=[0, 3, 1, 2])
    if channels < p.channels:
        part.add("Concat", "repeated", [part.tensor] * 2, axis=3)
    if (rows.out, columns.out) != (p.height, p.width):
        _add_padding(part, p, placement)
    part.nodes[-1].output[:] = [PREPARED]
    return part


def _add_luma(part: _Part, camera: Camera, pixels: int) -> None:
    """Whole grey levels, as Pillow rounds them before it resizes; every sum is exact in float32.

    Several pixels a row of the product, each with its own column: one alone has too little to multiply.
    """
    together = max(count for count in range(1, TOGETHER + 1) if pixels % count == 0)
    luma = _LUMA if camera.layout == "rgb" else _LUMA[::-1]
    part.reshape("pixels", [0, pixels // together, 3 * together])
    part.add(
        "MatMul", "luma", [part.constant("luma_weights", np.kron(np.eye(together, dtype=np.float32), luma[:, None]))]
    )
    part.add("Add", "luma_half", [part.constant("half", np.array(0.5, np.float32))])
    part.add("Floor", "grey")


@dataclass(frozen=True)
class _Band:
    """One axis: block b of the output is `weights[b]` times the source rows `first + index[b]`.

    first, last: source rows that count at all. weights float32 `[blocks, BLOCK, k]`, index int64 `[blocks, k]`.
    out: output rows; the last block may have a few more, which are 0.
    """

    first: int
    last: int
    weights: np.ndarray
    index: np.ndarray
    out: int

    @classmethod
    def of(cls, span: SourceSpan) -> "_Band":
        """Return the band of a span."""
        taps = list(_bilinear(span))
        groups = [taps[i : i + BLOCK] for i in range(0, len(taps), BLOCK)]
        starts = [min(start for start, _ in group) for group in groups]
        ends = [max(start + w.size for start, w in group) for group in groups]
        first, last = min(starts), max(ends)
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        begins = np.clip(starts, first, last - width)
        weights = np.zeros((len(groups), BLOCK, width), np.float32)
        for block, group in enumerate(groups):
            for row, (start, w) in enumerate(group):
                weights[block, row, start - begins[block] : start - begins[block] + w.size] = w
        return cls(first, last, weights, begins[:, None] - first + np.arange(width), span.out)


def _bilinear(span: SourceSpan) -> Iterator[tuple[int, np.ndarray]]:
    """Yield for each output pixel its first source pixel and the weights from there on, as Pillow rounds them."""
    low, reach = float(np.float32(span.low)), max(1.0, span.scale)
    for i in range(span.out):
        center = low + (i + 0.5) * span.scale
        start, end = max(0, int(center - reach + 0.5)), min(span.size, int(center + reach + 0.5))
        weights = np.maximum(0.0, 1.0 - np.abs((np.arange(start, end) - center + 0.5) / reach))
        yield start, np.floor(weights / weights.sum() * _ONE + 0.5) / _ONE


def _add_axis(part: _Part, name: str, band: _Band, width: int) -> None:
    """From `[N, last - first, width]` to `[N, out, width]`."""
    part.add("Gather", f"{name}_blocks", [part.constant(f"{name}_index", band.index)], axis=1)
    weights = part.constant(f"{name}_weights", band.weights)
    part.add_of("MatMul", f"{name}_products", [weights, part.tensor])
    blocks, block, _ = band.weights.shape
    part.reshape(f"{name}_out", [0, blocks * block, width])
    if band.out < blocks * block:
        part.slice(f"{name}_all", (1,), (0,), (band.out,))


def _add_padding(part: _Part, p: Preprocessing, placement: Placement) -> None:
    """Put zeros around the frame, and add the padding's colour where they are."""
    rows, columns = placement.rows, placement.columns
    after = (p.height - rows.start - rows.out, p.width - columns.start - columns.out)
    part.add("Pad", "page", [part.constant("margins", [0, rows.start, columns.start, 0, 0, *after, 0])])
    free = np.ones((p.height, 1) if columns.out == p.width else (1, p.width), np.float32)  # one axis has room at most
    free[rows.start : rows.start + rows.out, columns.start : columns.start + columns.out] = 0
    part.add("Add", "padded", [part.constant("padding", free[..., None] * np.array(p.padding, np.float32))])
