"""Tiny classifiers, each with its own expectation of what export must find in it."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from onnx import FunctionProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier

SIZE = 16  # height and width of all inputs here
CLASSES = 5
OPTIONS = ClassifierOptions(input_size=(SIZE, SIZE))


@dataclass(frozen=True)
class Expectation:
    """What `load_classifier` must find; `rank` is that of the features tensor in the graph."""

    rank: int
    dimension: int
    pooling: Literal["none", "channels-first", "channels-last"] = "none"
    classes: int = CLASSES
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: int = 3
    ends_in_softmax: bool = False


@dataclass(frozen=True)
class Case:
    """A torch classifier by name."""

    name: str
    build: Callable[[], nn.Module]
    expected: Expectation


@dataclass(frozen=True)
class OnnxCase:
    """A classifier that is written as ONNX, node by node."""

    name: str
    build: Callable[[], ModelProto]
    expected: Expectation


class ConvBnGap(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.body(x).mean((2, 3))
        return pooled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(x))
        return logits


class Lenet(nn.Module):
    """Flattens by `view` with the batch size read from the tensor, as old code does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=2)
        self.hidden, self.head = nn.Linear(4 * 6 * 6, 12), nn.Linear(12, CLASSES)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = torch.relu(self.conv(x)).view(x.size(0), -1)
        logits: torch.Tensor = self.head(self.dropout(torch.relu(self.hidden(flat))))
        return logits


class SqueezeNetLike(nn.Module):
    """A 1x1 convolution classifies every position; ReLU and average pooling follow, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 10, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Sequential(nn.Dropout(), nn.Conv2d(10, CLASSES, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.flatten(self.head(self.body(x)), 1)
        return logits


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 20), nn.GELU(), nn.Linear(20, CLASSES))


class Vit(nn.Module):
    """Patches, class token, position embedding, one block of attention and MLP, LayerNorm, head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.norm_1, self.norm_2, self.norm = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], dim=1) + self.position
        y = self.norm_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm_2(x))
        logits: torch.Tensor = self.head(self.norm(x)[:, 0])
        return logits


class After(nn.Module):
    """ConvBnGap with something after its linear layer."""

    def __init__(self, last: Callable[[torch.Tensor], torch.Tensor], channels: int = 3) -> None:
        super().__init__()
        self.network, self.last = ConvBnGap(channels), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.network(x))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale - 0.5


class Cosine(nn.Module):
    """Unit features times unit class directions, no bias: a face or metric-learning head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ConvBnGap()
        self.directions = nn.Parameter(torch.randn(CLASSES, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = nn.functional.normalize(self.body.features(x), dim=1)
        return 16 * unit @ nn.functional.normalize(self.directions, dim=1).T


TORCH_CASES = {
    case.name: case
    for case in (
        Case("conv-bn-gap", ConvBnGap, Expectation(rank=2, dimension=8)),
        Case("lenet", Lenet, Expectation(rank=2, dimension=12)),
        Case("squeezenet", SqueezeNetLike, Expectation(rank=4, dimension=10, pooling="channels-first")),
        Case("mlp", Mlp, Expectation(rank=2, dimension=20)),
        Case("vit", Vit, Expectation(rank=2, dimension=16)),
        Case("logit-scale", lambda: After(Scale()), Expectation(rank=2, dimension=8)),
        Case("bn-after-linear", lambda: After(nn.BatchNorm1d(CLASSES)), Expectation(rank=2, dimension=8)),
        Case("softmax", lambda: After(nn.Softmax(1)), Expectation(rank=2, dimension=8, ends_in_softmax=True)),
        Case("log-softmax", lambda: After(nn.LogSoftmax(1)), Expectation(rank=2, dimension=8, ends_in_softmax=True)),
        Case("grey", lambda: ConvBnGap(1), Expectation(rank=2, dimension=8, channels=1)),
        Case("cosine", Cosine, Expectation(rank=2, dimension=8)),
    )
}


def torch_network(name: str) -> nn.Module:
    """Return a new network of the registry: always the same weights, lively batch-norm statistics, eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = TORCH_CASES[name].build()
        for part in network.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    return network.eval()


@cache
def traced_graph(name: str) -> ClassifierGraph:
    """Return the classifier graph of a registered nn.Module, traced once a test run."""
    return load_classifier(torch_network(name), OPTIONS)


def random_batch(channels: int, count: int = 6) -> np.ndarray:
    """Return seeded noise, float32 `[count, channels, SIZE, SIZE]`."""
    return np.random.default_rng(7).standard_normal((count, channels, SIZE, SIZE)).astype(np.float32)


def saved_pt2(network: nn.Module, path: Path, images: np.ndarray, open_batch: bool = True) -> Path:
    """Save a network with torch.export.save."""
    shapes = ({0: torch.export.Dim("N")},) if open_batch else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notes about itself
        program = torch.export.export(network, (torch.from_numpy(images),), dynamic_shapes=shapes)
        torch.export.save(program, path)
    return path


def legacy_onnx(network: nn.Module, path: Path, images: np.ndarray, opset: int = 17, open_batch: bool = False) -> Path:
    """Export with torch's TorchScript exporter, as most .onnx files in the wild were; it fixes batch 1 by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so
        torch.onnx.export(
            network,
            (torch.from_numpy(images[:1]),),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}} if open_batch else None,
        )
    return path


def onnx_tensor(name: str, *shape: int, dtype: Any = np.float32) -> TensorProto:
    """Return seeded normal weights, scaled by the fan-in."""
    noise = np.random.default_rng(sum(map(ord, name))).standard_normal(shape)
    return numpy_helper.from_array((noise / float(np.prod(shape[1:])) ** 0.5).astype(dtype), name)


CONV_NODES = (
    helper.make_node("Conv", ["image", "w"], ["conv"], name="conv", pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
    helper.make_node("GlobalAveragePool", ["relu"], ["pooled"], name="pool"),
    helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
)
GEMM = helper.make_node("Gemm", ["flat", "w2", "b2"], ["logits"], name="gemm")


def onnx_classifier(
    nodes: list[NodeProto],
    extra: list[TensorProto] | None = None,
    *,
    batch: int | str = "N",
    opset: int = 17,
    layout: str = "NCHW",
    dtype: Any = np.float32,
    functions: list[FunctionProto] | None = None,
    domains: tuple[str, ...] = (),
    outputs: tuple[str, ...] = ("logits",),
) -> ModelProto:
    """Return an ONNX classifier with input `image` of 3 channels; weights w, w2 and b2 are there for the taking."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weights = [
        onnx_tensor("w", 6, 3, 3, 3, dtype=dtype),
        onnx_tensor("w2", 6, CLASSES, dtype=dtype),
        onnx_tensor("b2", CLASSES, dtype=dtype),
    ]
    given = {tensor.name for tensor in extra or []}
    used = {name for node in nodes for name in node.input}
    shape = [batch, 3, SIZE, SIZE] if layout == "NCHW" else [batch, SIZE, SIZE, 3]
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [*(tensor for tensor in weights if tensor.name not in given and tensor.name in used), *(extra or [])],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, functions=functions)


def _matmul_add() -> ModelProto:
    return onnx_classifier(
        [
            *CONV_NODES,
            helper.make_node("MatMul", ["flat", "w2"], ["product"]),
            helper.make_node("Add", ["product", "b2"], ["logits"]),
        ]
    )


def _nhwc() -> ModelProto:
    to_nchw = helper.make_node("Transpose", ["image"], ["nchw"], perm=[0, 3, 1, 2])
    conv = helper.make_node("Conv", ["nchw", "w"], ["conv"], pads=[1, 1, 1, 1])
    return onnx_classifier([to_nchw, conv, *CONV_NODES[1:], GEMM], layout="NHWC")


def _pooled_conv() -> ModelProto:
    """Pools first, then a 1x1 convolution gives logits `[N, classes, 1, 1]`, as in DenseNet's ONNX files."""
    last = helper.make_node("Conv", ["pooled", "w1x1"], ["logits"])
    return onnx_classifier([*CONV_NODES[:3], last], [onnx_tensor("w1x1", CLASSES, 6, 1, 1)])


def _channels_last_matmul() -> ModelProto:
    """Works on `[N, h, w, channels]` inside and classifies every position, as converted TensorFlow graphs do."""
    return onnx_classifier(
        [
            *CONV_NODES[:2],
            helper.make_node("Transpose", ["relu"], ["nhwc"], perm=[0, 2, 3, 1]),
            helper.make_node("MatMul", ["nhwc", "w2"], ["each"]),
            helper.make_node("ReduceMean", ["each"], ["logits"], axes=[1, 2], keepdims=0),
        ]
    )


ONNX_CASES = {
    case.name: case
    for case in (
        OnnxCase("matmul-add", _matmul_add, Expectation(rank=2, dimension=6)),
        OnnxCase("nhwc", _nhwc, Expectation(rank=2, dimension=6, layout="NHWC")),
        OnnxCase(
            "fp16", lambda: onnx_classifier([*CONV_NODES, GEMM], dtype=np.float16), Expectation(rank=2, dimension=6)
        ),
        OnnxCase("pooled-conv", _pooled_conv, Expectation(rank=4, dimension=6, pooling="channels-first")),
        OnnxCase("channels-last", _channels_last_matmul, Expectation(rank=4, dimension=6, pooling="channels-last")),
    )
}


class Bomb:
    """Unpickling it makes a folder: a harmless stand-in for the code that a pickle can run."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)
