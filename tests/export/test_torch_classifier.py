"""nn.Module, .pt2, factories and names become ONNX; what cannot is refused with a reason."""

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto
from torch import nn

from grood_edge.errors import ClassifierError, MissingExtraError
from grood_edge.export.classifier import ClassifierOptions, load_classifier
from grood_edge.export.torch_classifier import onnx_from_torch
from grood_edge.ort import open_ort
from tests.export.networks import Bomb, ConvBnGap, random_batch, saved_pt2, torch_network

SIZE_16 = (16, 16)


def outputs(model: ModelProto, images: np.ndarray) -> np.ndarray:
    session = open_ort(model.SerializeToString())
    (name,) = session.inputs
    return session.run({name: images})[session.outputs[0]]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin", ".PT"])
def test_pickled_checkpoint_is_refused_and_never_unpickled(suffix: str, tmp_path: Path) -> None:
    marker, proof = tmp_path / "marker", tmp_path / "proof"
    path = tmp_path / f"network{suffix}"
    torch.save(Bomb(proof), path)
    torch.load(path, weights_only=False)
    assert proof.exists()  # such a file does run code when it is unpickled
    torch.save(Bomb(marker), path)
    with pytest.raises(ClassifierError, match=r"is a pickled checkpoint.*not opened.*weights_only=True.*\.pt2"):
        load_classifier(path, ClassifierOptions())
    assert not marker.exists()


def test_whole_pickled_module_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "network.pth"
    torch.save(ConvBnGap(), path)
    with pytest.raises(ClassifierError, match="pickled checkpoint"):
        load_classifier(str(path), ClassifierOptions())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("batch norm", r"layer 'body.1' \(BatchNorm2d\) is in training mode.*\.eval\(\)"),
        ("dropout", r"layer 'dropout' \(Dropout\) is in training mode"),
    ],
)
def test_training_mode_is_refused(kind: str, message: str) -> None:
    network = torch_network("conv-bn-gap" if kind == "batch norm" else "lenet").train()
    with pytest.raises(ClassifierError, match=message):
        load_classifier(network, ClassifierOptions(input_size=SIZE_16))


def test_one_forgotten_batch_norm_is_found() -> None:
    network = torch_network("conv-bn-gap")
    network.get_submodule("body.1").train()
    with pytest.raises(ClassifierError, match=r"layer 'body.1'"):
        load_classifier(network, ClassifierOptions(input_size=SIZE_16))


class _Training(nn.Module):
    """One layer that was left in training mode; nn.Sequential(...).eval() is not enough for a functional one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer, self.head = nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(torch.relu(self.layer(self.conv(x))).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("layer", "message"),
    [(nn.BatchNorm2d(8), "batch_norm in training mode"), (nn.Dropout(0.5), "dropout in training mode")],
)
def test_pt2_in_training_mode_is_refused(layer: nn.Module, message: str, tmp_path: Path) -> None:
    path = saved_pt2(_Training(layer).train(), tmp_path / "training.pt2", random_batch(3))
    with pytest.raises(ClassifierError, match=message):
        load_classifier(path, ClassifierOptions())


class _Pair(ConvBnGap):
    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x)
        return self.head(features), features


def test_network_returning_a_tuple_is_refused() -> None:
    with pytest.raises(ClassifierError, match="returns tuple with 2 outputs; expected one tensor, the logits"):
        load_classifier(_Pair().eval(), ClassifierOptions(input_size=SIZE_16))


class _Random(ConvBnGap):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(nn.functional.dropout(self.features(x), 0.5, training=True))
        return logits


def test_random_network_is_refused() -> None:
    with pytest.raises(ClassifierError, match=r"traced network's logits differ by .* random layers"):
        load_classifier(_Random().eval(), ClassifierOptions(input_size=SIZE_16))


def test_nan_weights_are_refused() -> None:
    network = torch_network("conv-bn-gap")
    with torch.no_grad():
        network.get_parameter("head.bias").fill_(float("nan"))
    with pytest.raises(ClassifierError, match="gives NaN"):
        load_classifier(network, ClassifierOptions(input_size=SIZE_16))


class _Branching(ConvBnGap):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.features(x))
        return logits if logits.sum().item() > 0 else -logits


def test_data_dependent_control_flow_is_refused() -> None:
    with pytest.raises(ClassifierError, match="cannot be traced to ONNX"):
        load_classifier(_Branching().eval(), ClassifierOptions(input_size=SIZE_16))


def test_wrong_input_size_says_how_to_give_it() -> None:
    with pytest.raises(ClassifierError, match=r"does not accept images of shape \[2, 3, 20, 20\].*--input-size"):
        load_classifier(torch_network("mlp"), ClassifierOptions(input_size=(20, 20)))


def test_half_precision_module_keeps_its_precision() -> None:
    network = torch_network("conv-bn-gap").half()
    graph = load_classifier(network, ClassifierOptions(input_size=SIZE_16))
    assert graph.input_type == 10  # FLOAT16


class _ReadsBatch(ConvBnGap):
    """Python code that needs the batch size as a number: only batch 1 can be traced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [self.head(self.features(x[i : i + 1])) for i in range(int(x.shape[0]))]
        return torch.cat(rows)


def test_network_that_fixes_its_batch_is_traced_with_batch_1() -> None:
    network = _ReadsBatch().eval()
    graph = load_classifier(network, ClassifierOptions(input_size=SIZE_16))
    assert graph.class_count == 5
    images = random_batch(3, 1)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)).numpy()
    logits = open_ort(graph.model.SerializeToString()).run({graph.input_name: images})[graph.logits_tensor]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


FACTORY = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))

def build():
    torch.manual_seed(0)
    return Network().eval()

ready = build()

def number():
    return 7

def broken():
    raise KeyError("weights.pt")
"""


@pytest.fixture
def workshop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a module of the user's own, which is not on sys.path."""
    (tmp_path / "my_networks.py").write_text(FACTORY)
    (tmp_path / "my_broken_module.py").write_text("def build(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["build", "ready"])
@pytest.mark.usefixtures("workshop")
def test_factory_in_the_working_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    graph = load_classifier(f"my_networks:{name}", ClassifierOptions(input_size=SIZE_16))
    monkeypatch.delitem(sys.modules, "my_networks")
    assert (graph.source, graph.class_count, graph.dimension) == ("module", 3, 4)
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_module:build", "cannot import 'no_such_module:build'.*expected package.module:factory"),
        ("my_networks:no_such_factory", "cannot import .*no attribute 'no_such_factory'"),
        ("my_networks:", "cannot import 'my_networks:'"),
        ("my_networks:number", "my_networks:number returned int; expected a torch.nn.Module"),
        ("my_networks:broken", "my_networks:broken failed with KeyError: 'weights.pt'"),
        ("my_broken_module:build", "cannot import 'my_broken_module:build': .*invalid syntax"),
        ("resnet18", "'resnet18' is not a classifier that can be loaded; expected an .onnx or .pt2 file"),
    ],
)
@pytest.mark.usefixtures("workshop")
def test_factories_that_cannot_be_used(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    with pytest.raises(ClassifierError, match=message):
        load_classifier(text, ClassifierOptions(input_size=SIZE_16))
    monkeypatch.delitem(sys.modules, "my_networks", raising=False)
    assert sys.path == path


@pytest.mark.parametrize("text", ["torchvision:resnet18", "timm:resnet18"])
def test_named_network_needs_weights(text: str) -> None:
    with pytest.raises(ClassifierError, match="names an architecture; give its trained state dict with --weights FILE"):
        load_classifier(text, ClassifierOptions())


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_named_network_without_its_package(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.models", "timm"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails, installed or not
    torch.save({"fc.weight": torch.zeros(5, 8)}, tmp_path / "weights.pt")
    with pytest.raises(MissingExtraError, match=rf"needs the package {package}.*grood-edge\[{package}\]"):
        load_classifier(f"{package}:resnet18", ClassifierOptions(weights=tmp_path / "weights.pt"))


def test_named_network_of_torchvision(tmp_path: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.squeezenet1_1(num_classes=6).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    options = ClassifierOptions(weights=tmp_path / "weights.pt", input_size=(64, 64))
    model, source = onnx_from_torch("torchvision:squeezenet1_1", options.weights, options.input_size)
    images = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(outputs(model, images), network(torch.from_numpy(images)).numpy(), atol=1e-4)
    assert source == "module"
    with pytest.raises(ClassifierError, match="does not fit torchvision:resnet18"):
        onnx_from_torch("torchvision:resnet18", options.weights, options.input_size)


def test_weights_go_with_named_networks_alone(tmp_path: Path) -> None:
    with pytest.raises(ClassifierError, match="--weights goes with torchvision:NAME or timm:NAME"):
        load_classifier("my_networks:build", ClassifierOptions(weights=tmp_path / "weights.pt"))


def test_refusal_does_not_depend_on_what_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "harmless.pt"
    path.write_bytes(pickle.dumps({"weight": [1, 2, 3]}))
    with pytest.raises(ClassifierError, match="it was not opened"):
        load_classifier(path, ClassifierOptions())
    with pytest.raises(ClassifierError, match="it was not opened"):
        load_classifier(tmp_path / "not there.pt", ClassifierOptions())


def test_grey_network_without_convolution_is_tried_with_one_channel() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    graph = load_classifier(network.eval(), ClassifierOptions(input_size=(8, 8)))
    assert (graph.channels, graph.dimension, graph.class_count) == (1, 16, 4)


def test_network_of_four_channels_is_refused_with_what_was_tried() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 2, 3), torch.nn.Flatten(), torch.nn.LazyLinear(3))
    network(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ClassifierError, match=r"\[2, 3, 8, 8\].*nor \[2, 1, 8, 8\].*1 or 3 channels"):
        load_classifier(network.eval(), ClassifierOptions(input_size=(8, 8)))
