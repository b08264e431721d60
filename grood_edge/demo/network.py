"""The demo's classifier: a small CNN, trained in seconds."""

from pathlib import Path

import numpy as np

from grood_edge.errors import MissingExtraError
from grood_edge.images import find_images, load_image
from grood_edge.progress import Progress, silent

try:
    import torch
    from torch import nn
except ImportError as error:
    raise MissingExtraError("torch", "demo", "The demo") from error

__all__ = ["DigitNetwork", "trained_network"]

EPOCHS = 20
BATCH = 64


class DigitNetwork(nn.Module):
    """Grey images `[N, 1, 32, 32]`, pixel / 255, to logits `[N, classes]`; 64 features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        logits: torch.Tensor = self.head(self.body(images))
        return logits


def trained_network(train: Path, seed: int = 0, progress: Progress = silent) -> DigitNetwork:
    """Train on class folders of 32x32 grey PNG; returns the network in eval mode."""
    names = sorted(p.name for p in train.iterdir())
    paths = [(path, label) for label, name in enumerate(names) for path in find_images(train / name)]
    frames = np.stack([load_image(path) for path, _ in paths]).transpose(0, 3, 1, 2)
    images = torch.from_numpy(frames.astype(np.float32) / 255)
    labels = torch.tensor([label for _, label in paths])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DigitNetwork(len(names)).train()
        optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
        for epoch in range(EPOCHS):
            for rows in torch.split(torch.randperm(len(images)), BATCH):
                loss = nn.functional.cross_entropy(network(images[rows]), labels[rows])
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            progress("training the demo's network", epoch + 1, EPOCHS)
    return network.eval()
