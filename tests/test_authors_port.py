"""The authors' semantics, ported literally: a gradient a sample by autograd, and an exact search of the bank.

Source: arXiv 2312.14427 and `openood/postprocessors/grood.py` (OpenOOD, pull request 301), without what is an accident
of that code: no approximate index, no sampling of the bank, no squared distances. Features and predictions are those
of the demo's network on real digits.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from grood_edge.arrays import Bank, Features64, Labels, Prototypes, Scores64, Vector64
from grood_edge.demo.images import DemoImages
from grood_edge.demo.network import DigitNetwork
from grood_edge.images import find_images, load_image
from grood_edge.scoring import Head, OodHead, class_distances, log_s_of, ood_scores

TOLERANCE = 1e-9  # float64 on both sides; what differs is the order of the operations


@dataclass(frozen=True)
class Digits:
    """Features float64 `[n, 64]`, labels (-1: of no class) and the network's predictions."""

    features: Features64
    labels: Labels
    predictions: Labels


@dataclass(frozen=True)
class Reference:
    """What both sides are given: class prototypes, OOD prototype, and the images of the bank."""

    prototypes: Prototypes
    ood_prototype: Vector64
    bank: Digits


def read_digits(network: DigitNetwork, folders: list[Path], names: list[str]) -> Digits:
    paths = [path for folder in folders for path in find_images(folder)]
    images = np.stack([load_image(path) for path in paths]).transpose(0, 3, 1, 2)
    with torch.no_grad():
        features = network.body(torch.from_numpy(images.astype(np.float32) / 255))
        predictions = network.head(features).argmax(dim=1).numpy()
    known = [names.index(path.parent.name) if path.parent.name in names else -1 for path in paths]
    return Digits(features.double().numpy(), np.array(known), predictions)


@pytest.fixture(scope="module")
def names(digits: DemoImages) -> list[str]:
    return sorted(path.name for path in digits.train.iterdir())


@pytest.fixture(scope="module", params=["mean of the prototypes", "features of noise"])
def reference(request: pytest.FixtureRequest, digits: DemoImages, network: DigitNetwork, names: list[str]) -> Reference:
    fit = read_digits(network, [digits.train], names)
    prototypes = np.stack([fit.features[fit.labels == c].mean(axis=0) for c in range(len(names))])
    noise = read_digits(network, [digits.far_noise], names).features.mean(axis=0)
    correct = fit.labels == fit.predictions
    return Reference(
        prototypes,
        prototypes.mean(axis=0) if request.param.startswith("mean") else noise,
        Digits(fit.features[correct], fit.labels[correct], fit.predictions[correct]),
    )


@pytest.fixture(scope="module")
def scored(digits: DemoImages, network: DigitNetwork, names: list[str]) -> Digits:
    """Test digits, digits of no class, photos and noise."""
    return read_digits(network, [digits.test, digits.near, digits.far_photos, digits.far_noise], names)


def our_head(reference: Reference) -> Head:
    """The one place that builds our side."""
    rows, p_ood = reference.bank.features, reference.ood_prototype
    log_s = log_s_of(class_distances(rows, reference.prototypes), np.linalg.norm(rows - p_ood, axis=1), scale=1.0)
    return Head(reference.prototypes, rows, (OodHead(p_ood, log_s),))


def authors_gradients(samples: Features64, predicted: Labels, reference: Reference) -> Bank:
    """Return d cross_entropy / d p_ood of each sample: one forward and one backward pass a sample, as they do."""
    prototypes = torch.from_numpy(reference.prototypes)
    p_ood = torch.from_numpy(reference.ood_prototype).clone().requires_grad_()
    rows = []
    for h, label in zip(torch.from_numpy(samples), torch.from_numpy(predicted), strict=True):
        logits = -torch.linalg.vector_norm(h - torch.cat([prototypes, p_ood[None]]), dim=1)
        loss = functional.cross_entropy(logits[None], label[None])
        (gradient,) = torch.autograd.grad(loss, [p_ood])
        rows.append(gradient.numpy())
    return np.stack(rows)


def authors_scores(scored: Digits, reference: Reference) -> Scores64:
    """Return S: the plain L2 distance to the nearest gradient of the bank."""
    bank = authors_gradients(reference.bank.features, reference.bank.predictions, reference)
    samples = authors_gradients(scored.features, scored.predictions, reference)
    return np.array([np.linalg.norm(bank - g, axis=1).min() for g in samples])


def test_the_authors_semantics_give_the_same_scores_and_the_same_ranking(reference: Reference, scored: Digits) -> None:
    theirs = authors_scores(scored, reference)
    ours = ood_scores(scored.features, our_head(reference))

    assert len(np.unique(theirs)) > 0.9 * len(theirs)  # a ranking of ties would prove nothing
    assert spearmanr(theirs, ours).statistic == pytest.approx(1.0, abs=TOLERANCE)
    np.testing.assert_allclose(np.exp(ours), theirs, rtol=TOLERANCE)


def test_the_predicted_class_does_not_enter_the_gradient(reference: Reference, scored: Digits) -> None:
    rows = slice(0, 40)
    predicted = scored.predictions[rows]
    another = (predicted + 1) % len(reference.prototypes)

    np.testing.assert_allclose(
        authors_gradients(scored.features[rows], predicted, reference),
        authors_gradients(scored.features[rows], another, reference),
        rtol=TOLERANCE,
    )
