"""The classifiers that people deploy, at full size and as ONNX, with random weights: time does not depend on them.

Batch norms are folded into the convolutions, as every deployed graph has them. `efficientnet-lite0` is
EfficientNet-Lite0 at 224 (features 1280), `resnet-18` and `resnet-50` are He et al.'s with stride in the 3x3
convolution (features 512 and 2048). Opset 19, input `image` float32 `[N, 3, 224, 224]`, output `logits`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["NETWORKS", "classifier_model"]

SIDE = 224
LITE0_STAGES = (  # kernel, stride, expansion, channels, repeats
    (3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)  # fmt: skip
RESIDUAL_GAIN = 0.3  # of a block's last convolution, so that sums of blocks do not grow


@dataclass
class _Graph:
    rng: np.random.Generator
    nodes: list[NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def add(self, operator: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def weight(self, values: np.ndarray) -> str:
        name = f"w_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def conv(
        self, tensor: str, shape: tuple[int, int, int], stride: int = 1, *, groups: int = 1, gain: float = 1
    ) -> str:
        """Convolve with weights of `shape` = (inside, outside, kernel), SAME padding and a bias."""
        inside, outside, kernel = shape
        normal = self.rng.standard_normal((outside, inside // groups, kernel, kernel))
        weights = self.weight(gain * normal * np.sqrt(2 / (inside // groups * kernel**2)))
        bias = self.weight(0.1 * self.rng.standard_normal(outside))
        return self.add(
            "Conv", [tensor, weights, bias], kernel_shape=[kernel] * 2, strides=[stride] * 2, group=groups,
            pads=[kernel // 2] * 4,
        )  # fmt: skip


def _relu(graph: _Graph, tensor: str) -> str:
    return graph.add("Relu", [tensor])


def _relu6(graph: _Graph, tensor: str) -> str:
    return graph.add("Clip", [tensor, graph.weight(np.array(0)), graph.weight(np.array(6))])


def _efficientnet_lite0(graph: _Graph) -> tuple[str, int]:
    tensor, inside = _relu6(graph, graph.conv("image", (3, 32, 3), 2)), 32
    for kernel, first_stride, expansion, outside, repeats in LITE0_STAGES:
        for repeat in range(repeats):
            stride, wide = first_stride if repeat == 0 else 1, expansion * inside
            inner = tensor
            if expansion > 1:
                inner = _relu6(graph, graph.conv(inner, (inside, wide, 1)))
            inner = _relu6(graph, graph.conv(inner, (wide, wide, kernel), stride, groups=wide))
            inner = graph.conv(inner, (wide, outside, 1), gain=RESIDUAL_GAIN if repeat else 1)
            tensor = graph.add("Add", [inner, tensor]) if repeat else inner
            inside = outside
    return _relu6(graph, graph.conv(tensor, (inside, 1280, 1))), 1280


def _resnet(graph: _Graph, blocks: tuple[int, ...], bottleneck: bool) -> tuple[str, int]:
    tensor, inside = _relu(graph, graph.conv("image", (3, 64, 7), 2)), 64
    tensor = graph.add("MaxPool", [tensor], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, repeats in enumerate(blocks):
        width = 64 << stage
        outside = 4 * width if bottleneck else width
        for repeat in range(repeats):
            stride = 2 if stage and not repeat else 1
            skip = tensor
            if stride > 1 or inside != outside:
                skip = graph.conv(tensor, (inside, outside, 1), stride)
            if bottleneck:
                inner = _relu(graph, graph.conv(tensor, (inside, width, 1)))
                inner = _relu(graph, graph.conv(inner, (width, width, 3), stride))
            else:
                inner = _relu(graph, graph.conv(tensor, (inside, width, 3), stride))
            inner = graph.conv(inner, (width, outside, 1 if bottleneck else 3), gain=RESIDUAL_GAIN)
            tensor, inside = _relu(graph, graph.add("Add", [inner, skip])), outside
    return tensor, inside


NETWORKS: dict[str, Callable[[_Graph], tuple[str, int]]] = {
    "efficientnet-lite0": _efficientnet_lite0,
    "resnet-18": lambda graph: _resnet(graph, (2, 2, 2, 2), bottleneck=False),
    "resnet-50": lambda graph: _resnet(graph, (3, 4, 6, 3), bottleneck=True),
}


def classifier_model(name: str, classes: int) -> ModelProto:
    """Return a network of `NETWORKS` with so many classes; the same weights every time."""
    graph = _Graph(np.random.default_rng(0))
    tensor, dimension = NETWORKS[name](graph)
    features = graph.add("Flatten", [graph.add("GlobalAveragePool", [tensor])])
    last = graph.weight(graph.rng.standard_normal((classes, dimension)) / np.sqrt(dimension))
    bias = graph.weight(np.zeros(classes))
    graph.nodes.append(helper.make_node("Gemm", [features, last, bias], ["logits"], name="logits", transB=1))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
    made = helper.make_graph(graph.nodes, name, [image], [logits], graph.weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
