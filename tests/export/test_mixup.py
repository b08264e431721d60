"""Mixed images, held against the same in plain torch; and image mixup where a network has no tensor to mix at."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto
from torch import nn

from grood_edge.demo.network import DigitNetwork
from grood_edge.errors import ClassifierError
from grood_edge.export.classifier import ClassifierGraph, ClassifierOptions, load_classifier
from grood_edge.export.features import FeaturePass, Reading
from grood_edge.export.graph import base_model
from grood_edge.export.mixup import EARLY, FEATURES, MIXED_IMAGES, mixup_source
from grood_edge.export.ood_prototype import Mixes, OodSource
from grood_edge.export.tap import find_tap
from grood_edge.ort import OrtModel, open_ort
from grood_edge.preprocessing import Preprocessing
from tests.export.networks import legacy_onnx

EMPTY = np.zeros((1, 1, 32, 32), np.float32)


class TwoPaths(nn.Module):
    """The trained digit network with a second path round it: no tensor is passed by all paths."""

    def __init__(self, network: DigitNetwork) -> None:
        super().__init__()
        self.network, self.other = network, nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(64 + 4, 7)
        with torch.no_grad():
            self.head.weight[:, :64] = last_linear(network).weight
            self.head.bias.copy_(last_linear(network).bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = nn.Sequential(*list(parts(self.network))[:-1])(x)
        logits: torch.Tensor = self.head(torch.cat([features, self.other(x).flatten(1)], dim=1))
        return logits


def parts(network: nn.Module) -> list[nn.Module]:
    """The layers of the digit network, one after the other."""
    return [layer for child in network.children() for layer in (child if isinstance(child, nn.Sequential) else [child])]


def last_linear(network: nn.Module) -> nn.Linear:
    return next(layer for layer in reversed(parts(network)) if isinstance(layer, nn.Linear))


@dataclass(frozen=True)
class Mixed:
    """A source and its mixes."""

    source: OodSource
    mixes: Mixes


@pytest.fixture(scope="module")
def base(digit_graph: ClassifierGraph, digit_preprocessing: Preprocessing) -> ModelProto:
    return base_model(digit_graph, digit_preprocessing)


@pytest.fixture(scope="module")
def reading(digit_preprocessing: Preprocessing) -> Reading:
    return Reading(digit_preprocessing, 7)


def mixed(base: ModelProto, fitted: FeaturePass, reading: Reading, layer: str = EARLY) -> Mixed:
    source = mixup_source(base, open_ort(base.SerializeToString()), fitted, reading, layer)
    assert source.mixes is not None
    return Mixed(source, source.mixes)


@pytest.fixture(scope="module")
def found(base: ModelProto, digit_pass: FeaturePass, reading: Reading) -> Mixed:
    return mixed(base, digit_pass, reading)


def chosen_rows(found: Mixed, fitted: FeaturePass) -> np.ndarray:
    place = {name: row for row, name in enumerate(fitted.frame_names)}
    return np.array([place[name] for name in found.mixes.names])


def torch_mixes(
    network: nn.Module, images: torch.Tensor, labels: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """z = 0.5 z + 0.5 mean of the second class at the first ReLU, then the rest: hooks and nothing else."""
    layers = parts(network)
    first = next(i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU))
    early: list[torch.Tensor] = []
    with torch.no_grad():
        handle = layers[first].register_forward_hook(lambda module, inputs, output: early.append(output))
        logits = network(images)
        handle.remove()
        means = torch.stack([early[0][torch.from_numpy(labels == c)].double().mean(0).float() for c in range(7)])
        masked = logits[rows].clone()
        masked[torch.arange(len(rows)), torch.from_numpy(labels[rows])] = -torch.inf
        second = masked.argmax(1)
        handle = layers[first].register_forward_hook(lambda module, inputs, output: 0.5 * output + 0.5 * means[second])
        features: list[torch.Tensor] = []
        seen = last_linear(network).register_forward_hook(lambda module, inputs, output: features.append(inputs[0]))
        mixed_logits = network(images[rows])
        handle.remove()
        seen.remove()
    return {"features": features[0].numpy(), "logits": mixed_logits.numpy(), "second": second.numpy()}


@pytest.mark.parametrize("space", ["features", "logits"])
def test_mixes_equal_a_plain_torch_computation(
    space: str, network: DigitNetwork, base: ModelProto, digit_pass: FeaturePass, reading: Reading
) -> None:
    ours = mixed(base, digit_pass, replace(reading, space=space))  # type: ignore[arg-type]
    images = torch.from_numpy(digit_pass.frames.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    rows = chosen_rows(ours, digit_pass)
    theirs = torch_mixes(network, images, digit_pass.frame_labels, rows)
    np.testing.assert_array_equal(ours.mixes.other, theirs["second"])
    np.testing.assert_allclose(ours.mixes.features, theirs[space], atol=1e-4, rtol=1e-4)
    position = ours.source.at(np.zeros((7, ours.mixes.features.shape[1])))
    np.testing.assert_allclose(position, theirs[space].astype(np.float64).mean(axis=0), atol=1e-4, rtol=1e-4)


def test_entry_names_the_layer_as_the_users_graph_does(
    found: Mixed, base: ModelProto, digit_graph: ClassifierGraph
) -> None:
    entry = found.source.entry
    assert (entry.source, entry.images, entry.uses_ood_data) == ("mixup", len(found.mixes.names), False)
    names = {name for node in digit_graph.model.graph.node for name in node.output}
    assert entry.layer in names
    tap = find_tap(base, 7)
    assert tap is not None
    assert tap.tensor.endswith(entry.layer or "?")


def test_second_class_is_never_the_own_one(found: Mixed, digit_pass: FeaturePass) -> None:
    assert (found.mixes.own != found.mixes.other).all()
    rows = chosen_rows(found, digit_pass)
    np.testing.assert_array_equal(found.mixes.own, digit_pass.frame_labels[rows])
    assert len(np.unique(found.mixes.other)) > 1


def test_images_are_spread_over_the_classes(found: Mixed) -> None:
    counts = np.bincount(found.mixes.own, minlength=7)
    assert counts.sum() == MIXED_IMAGES
    assert counts.max() - counts.min() <= 1
    assert len(set(found.mixes.names)) == len(found.mixes.names)


def test_few_images_are_all_mixed_and_missing_classes_are_never_mixed_in(
    base: ModelProto, digit_pass: FeaturePass, reading: Reading
) -> None:
    """Of two classes only a few images are there: each is mixed with the other class."""
    rows = np.concatenate(
        [np.flatnonzero(digit_pass.frame_labels == label)[:count] for label, count in ((2, 3), (5, 9))]
    )
    few = replace(
        digit_pass,
        frames=digit_pass.frames[rows],
        frame_labels=digit_pass.frame_labels[rows],
        frame_names=tuple(digit_pass.frame_names[i] for i in rows),
    )
    small = mixed(base, few, reading)
    assert sorted(small.mixes.names) == sorted(few.frame_names)
    assert set(zip(small.mixes.own.tolist(), small.mixes.other.tolist(), strict=True)) == {(2, 5), (5, 2)}


def test_mixes_lie_between_the_classes(found: Mixed, digit_pass: FeaturePass) -> None:
    """A mix is farther from its own class than the image was, for nearly all of them."""
    fit = digit_pass.fit
    prototypes = fit.class_sums / fit.class_counts[:, None]
    place = {name: row for row, name in enumerate(fit.names)}
    images = fit.features[[place[name] for name in found.mixes.names]]
    own = prototypes[found.mixes.own]
    nearer = np.linalg.norm(images - own, axis=1) < np.linalg.norm(found.mixes.features - own, axis=1)
    assert nearer.mean() > 0.9


@pytest.fixture(scope="module")
def two_paths(
    network: DigitNetwork, digit_preprocessing: Preprocessing, tmp_path_factory: pytest.TempPathFactory
) -> ModelProto:
    torch.manual_seed(0)
    path = legacy_onnx(TwoPaths(network).eval(), tmp_path_factory.mktemp("two") / "two.onnx", EMPTY, open_batch=True)
    return base_model(load_classifier(path, ClassifierOptions()), digit_preprocessing)


def test_images_are_mixed_where_no_tensor_can_be(
    two_paths: ModelProto, digit_pass: FeaturePass, reading: Reading
) -> None:
    assert find_tap(two_paths, 7) is None
    ours = mixed(two_paths, digit_pass, reading)
    assert ours.source.entry.layer == "image"
    assert (ours.mixes.own != ours.mixes.other).all()
    model = open_ort(two_paths.SerializeToString())
    logits = model.run({"image": digit_pass.frames}, ["logits"])["logits"]
    rows = chosen_rows(ours, digit_pass)
    logits = logits[rows].copy()
    logits[np.arange(len(rows)), ours.mixes.own] = -np.inf
    np.testing.assert_array_equal(ours.mixes.other, logits.argmax(axis=1))
    # Each mix is the mean of its own picture and one picture of the second class.
    for index in (0, 100, len(rows) - 1):
        partners = digit_pass.frames[digit_pass.frame_labels == ours.mixes.other[index]].astype(int)
        halves = ((digit_pass.frames[rows[index]].astype(int) + partners + 1) // 2).astype(np.uint8)
        candidates = model.run({"image": halves}, ["features"])["features"]
        assert np.abs(candidates - ours.mixes.features[index]).max(axis=1).min() < 1e-4
    again, other = mixed(two_paths, digit_pass, reading), mixed(two_paths, digit_pass, replace(reading, seed=1))
    np.testing.assert_array_equal(ours.mixes.features, again.mixes.features)
    assert not np.array_equal(ours.mixes.features, other.mixes.features)


def test_layer_can_be_named(base: ModelProto, digit_pass: FeaturePass, reading: Reading, found: Mixed) -> None:
    assert found.source.entry.layer is not None
    same = mixed(base, digit_pass, reading, found.source.entry.layer)
    np.testing.assert_array_equal(same.mixes.features, found.mixes.features)
    relus = [node.output[0] for node in base.graph.node if node.op_type == "Relu"]
    later = mixed(base, digit_pass, reading, relus[1])
    assert later.source.entry.layer == relus[1].removeprefix("classifier/")
    assert not np.allclose(later.mixes.features, found.mixes.features)
    with pytest.raises(ClassifierError, match=r"--mixup-layer 'nothing' cannot be mixed.*Candidates: "):
        mixup_source(base, open_ort(base.SerializeToString()), digit_pass, reading, "nothing")


def test_network_for_single_images(
    network: DigitNetwork,
    digit_preprocessing: Preprocessing,
    digit_pass: FeaturePass,
    reading: Reading,
    found: Mixed,
    tmp_path: Path,
) -> None:
    path = legacy_onnx(network, tmp_path / "single.onnx", EMPTY)
    single = load_classifier(path, ClassifierOptions())
    fixed = base_model(single, digit_preprocessing)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    alone = mixed(fixed, digit_pass, reading)
    assert alone.mixes.names == found.mixes.names
    np.testing.assert_array_equal(alone.mixes.other, found.mixes.other)
    np.testing.assert_allclose(alone.mixes.features, found.mixes.features, atol=1e-4, rtol=1e-4)


def test_progress_goes_up(base: ModelProto, digit_pass: FeaturePass, reading: Reading) -> None:
    calls: list[int] = []
    model = open_ort(base.SerializeToString())
    mixup_source(base, model, digit_pass, reading, EARLY, lambda label, done, total: calls.append(done))
    assert calls == sorted(calls)
    assert len(calls) > 5


def test_features_are_mixed_by_default(
    digit_model: OrtModel, base: ModelProto, digit_pass: FeaturePass, reading: Reading, found: Mixed
) -> None:
    """Half the image's own feature, half the prototype of the class that it is confused with most."""
    ours = mixed(base, digit_pass, reading, FEATURES)
    assert ours.source.entry.layer == "features"
    assert ours.mixes.names == found.mixes.names
    np.testing.assert_array_equal(ours.mixes.other, found.mixes.other)
    features = digit_model.run({"image": digit_pass.frames[chosen_rows(ours, digit_pass)]})["features"]
    fit = digit_pass.fit
    prototypes = fit.class_sums / fit.class_counts[:, None]
    expected = 0.5 * features + 0.5 * prototypes[ours.mixes.other]
    np.testing.assert_allclose(ours.mixes.features, expected, atol=1e-5, rtol=1e-5)
