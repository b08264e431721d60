"""Where features can be mixed: outside residual blocks, on every path from the image, small enough."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, shape_inference
from torch import nn

from grood_edge.errors import ClassifierError
from grood_edge.export import tap as module
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier
from grood_edge.export.feature_point import captured_tensors
from grood_edge.export.graph import base_model
from grood_edge.export.tap import Tap, cut, find_tap
from grood_edge.ort import open_ort
from grood_edge.preprocessing import PreprocessingOptions, resolve_preprocessing
from tests.export.networks import (
    CLASSES,
    CONV_NODES,
    GEMM,
    ONNX_CASES,
    OPTIONS,
    SIZE,
    legacy_onnx,
    onnx_classifier,
    torch_network,
    traced_graph,
)

NETWORKS = ("conv-bn-gap", "lenet", "squeezenet", "mlp", "vit", "logit-scale", "softmax", "grey", "cosine")
LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


class Residual(nn.Module):
    """Stem, two residual blocks (one with a projection), pooling, linear: a very small ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.inner = nn.ModuleList(
            nn.Sequential(nn.Conv2d(6, n, 3, s, 1), nn.ReLU(), nn.Conv2d(n, n, 3, 1, 1)) for n, s in ((6, 1), (8, 2))
        )
        self.projection, self.head = nn.Conv2d(6, 8, 1, 2), nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.inner[0](x))
        x = torch.relu(self.projection(x) + self.inner[1](x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Parallel(nn.Module):
    """Two networks that share nothing but the image: whatever is mixed, half of the features do not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)) for _ in range(2))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.cat([self.a(x), self.b(x)], dim=1).flatten(1))
        return logits


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> ClassifierGraph:
    return small_graph(Residual(), tmp_path_factory.mktemp("residual") / "residual.onnx")


def small_graph(network: nn.Module, path: Path) -> ClassifierGraph:
    torch.manual_seed(0)
    images = np.zeros((1, 3, SIZE, SIZE), np.float32)
    return load_classifier(legacy_onnx(network.eval(), path, images, open_batch=True), ClassifierOptions())


def base_of(classifier: ClassifierGraph) -> ModelProto:
    channels = classifier.channels
    plain = PreprocessingOptions(input_size=(SIZE, SIZE), mean=(0.0,) * channels, std=(1.0,) * channels)
    return base_model(classifier, resolve_preprocessing(plain, channels, (SIZE, SIZE)))


def images_for(model: ModelProto, count: int = 4) -> np.ndarray:
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(1).integers(0, 256, (count, *shape), dtype=np.uint8)


def reached(model: ModelProto, without: str | None = None) -> set[str]:
    """Return all tensors that the image reaches when one tensor is taken away: brute force."""
    found = {value.name for value in model.graph.input}
    for node in model.graph.node:
        if found.intersection([*node.input, *captured_tensors(node)]):
            found.update(name for name in node.output if name != without)
    return found


def separates(model: ModelProto, tensor: str) -> bool:
    return not {"features", "logits"} & reached(model, tensor)


def all_taps(model: ModelProto) -> list[Tap]:
    return module._cuts(model)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_path_passes_the_tap(name: str) -> None:
    model = base_of(traced_graph(name))
    assert {"features", "logits"} <= reached(model)
    for tap in all_taps(model):
        assert separates(model, tap.tensor), tap
    first = find_tap(model, CLASSES)
    if name == "conv-bn-gap":
        assert first is not None
        assert first.shape == (8, SIZE, SIZE)


@pytest.mark.parametrize("name", sorted(ONNX_CASES))
def test_taps_of_graphs_written_by_hand(name: str) -> None:
    model = base_of(load_classifier_from(ONNX_CASES[name].build()))
    for tap in all_taps(model):
        assert separates(model, tap.tensor), tap


def load_classifier_from(model: ModelProto) -> ClassifierGraph:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model, path)
        return load_classifier(path, OPTIONS)


def test_no_tap_lies_inside_a_residual_block(residual: ClassifierGraph) -> None:
    """All tensors that separate the image from the outputs, found one by one, are what is listed, and no others."""
    model = base_of(residual)
    taps = {tap.tensor for tap in all_taps(model)}
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    relus = [node.output[0] for node in graph.node if node.op_type == "Relu"]
    outside = {name for name in relus if separates(model, name)}
    assert len(relus) == 5
    assert len(outside) == 3  # after the stem and after each block, not inside one
    assert outside & taps == outside - features_again(model)
    assert not taps & (set(relus) - outside)
    for tap in taps:
        assert separates(model, tap)
    first = find_tap(model, CLASSES)
    assert first is not None
    assert (first.tensor, first.shape) == (relus[0], (6, SIZE, SIZE))


def features_again(model: ModelProto) -> set[str]:
    """Tensors that are the features in another shape."""
    same = {"features"}
    for node in reversed(model.graph.node):
        if same.intersection(node.output) and node.op_type in ("Identity", "Flatten", "Reshape", "Squeeze", "Cast"):
            same.add(node.input[0])
    return same


def test_tokens_of_a_transformer_are_a_tap() -> None:
    """Class token and patches together: a block's input and output, and no tensor between them."""
    model = base_of(traced_graph("vit"))
    taps = all_taps(model)
    assert taps
    assert (5, 16) in [tap.shape for tap in taps]
    assert all(separates(model, tap.tensor) for tap in taps)


@pytest.mark.parametrize("name", ["conv-bn-gap", "lenet", "vit", "squeezenet"])
def test_front_and_back_together_are_the_whole_graph(name: str) -> None:
    model = base_of(traced_graph(name))
    check_composition(model, all_taps(model))


def test_front_and_back_of_a_residual_network(residual: ClassifierGraph) -> None:
    model = base_of(residual)
    check_composition(model, all_taps(model))


def check_composition(model: ModelProto, taps: list[Tap]) -> None:
    images = images_for(model)
    whole = open_ort(model.SerializeToString()).run({"image": images})
    assert taps
    for tap in taps:
        front, back = (open_ort(part.SerializeToString()) for part in cut(model, tap))
        early = front.run({"image": images})
        assert set(early) == {tap.tensor}
        assert early[tap.tensor].shape == (len(images), *tap.shape)
        late = back.run(early)
        assert set(late) == {"features", "logits"}
        for output in ("features", "logits"):
            np.testing.assert_allclose(late[output], whole[output], rtol=1e-5, atol=1e-5)


def test_named_tensors(residual: ClassifierGraph) -> None:
    model = base_of(residual)
    for tap in all_taps(model):
        assert find_tap(model, CLASSES, tap.tensor) == tap
        assert find_tap(model, CLASSES, tap.tensor.removeprefix("classifier/")) == tap  # as in the user's own graph


def test_tensor_inside_a_residual_block_is_refused_with_candidates(residual: ClassifierGraph) -> None:
    model = base_of(residual)
    relus = [node.output[0] for node in model.graph.node if node.op_type == "Relu"]
    inside = [name for name in relus if not separates(model, name)]
    first = find_tap(model, CLASSES)
    assert first is not None
    assert inside
    for name in (*(n.removeprefix("classifier/") for n in inside), "nothing", "image", "features", "logits"):
        with pytest.raises(ClassifierError, match=r"cannot be mixed: expected a tensor outside residual") as caught:
            find_tap(model, CLASSES, name)
        assert f"Candidates: {first.tensor.removeprefix('classifier/')} [6, 16, 16]" in str(caught.value)
        assert f"--mixup-layer {name!r}" in str(caught.value)


def test_early_prototypes_stay_below_the_memory_cap(residual: ClassifierGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_of(residual)
    taps = all_taps(model)
    sizes = [4 * CLASSES * int(np.prod(tap.shape)) for tap in taps]
    assert min(sizes) < sizes[0]
    monkeypatch.setattr(module, "MAX_EARLY_BYTES", sizes[0])
    assert find_tap(model, CLASSES) == taps[0]
    monkeypatch.setattr(module, "MAX_EARLY_BYTES", sizes[0] - 1)
    later = find_tap(model, CLASSES)
    assert later == next(tap for tap, size in zip(taps, sizes, strict=True) if size < sizes[0])
    with pytest.raises(ClassifierError, match="cannot be mixed"):
        find_tap(model, CLASSES, taps[0].tensor)
    monkeypatch.setattr(module, "MAX_EARLY_BYTES", min(sizes) - 1)
    assert find_tap(model, CLASSES) is None
    with pytest.raises(ClassifierError, match="Candidates: none"):
        find_tap(model, CLASSES, taps[0].tensor)


def test_linear_operators_alone_are_no_tap() -> None:
    """Before the first nonlinear operator mixing would be mixing pictures."""
    model = base_of(traced_graph("conv-bn-gap"))
    tap = find_tap(model, CLASSES)
    assert tap is not None
    before = [node for node in model.graph.node if separates(model, node.output[0])]
    first = next(node for node in before if node.op_type == "Relu")
    assert tap.tensor == first.output[0]
    assert any(node.op_type == "Conv" for node in before)


def test_network_of_two_branches_has_no_tap(tmp_path: Path) -> None:
    model = base_of(small_graph(Parallel(), tmp_path / "parallel.onnx"))
    assert find_tap(model, CLASSES) is None


def test_features_in_another_shape_are_no_tap() -> None:
    nodes = [CONV_NODES[0], *CONV_NODES[2:], GEMM]
    nodes[1] = helper.make_node("GlobalAveragePool", ["conv"], ["pooled"])
    model = base_of(load_classifier_from(onnx_classifier(nodes)))
    assert find_tap(model, CLASSES) is None


@pytest.mark.parametrize("name", ["resnet50", "squeezenet"])
def test_graphs_of_the_onnx_package(name: str) -> None:
    classifier = load_classifier(LIGHT / f"light_{name}.onnx", ClassifierOptions())
    assert classifier.height is not None
    assert classifier.width is not None
    plain = PreprocessingOptions(input_size=(classifier.height, classifier.width))
    model = base_model(classifier, resolve_preprocessing(plain, 3, (classifier.height, classifier.width)))
    taps = all_taps(model)
    assert find_tap(model, 1000) is not None
    for tap in taps:
        assert separates(model, tap.tensor)
    types = {v.name: v.type.tensor_type.elem_type for v in shape_inference.infer_shapes(model).graph.value_info}
    assert all(types.get(tap.tensor, TensorProto.FLOAT) == TensorProto.FLOAT for tap in taps)


def test_torch_network_is_the_same_every_time() -> None:
    """The registry is seeded: a tap found in one run is that of the next."""
    a, b = torch_network("vit").state_dict(), torch_network("vit").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
