"""Small networks of the three kinds that people deploy, for grey 32x32 images: residual, depthwise, attention.

Their backbones are random and seeded; batch norms have seen the images, and the last layer is fitted to them by least
squares. That takes a second and classifies digits well enough to be exported.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

__all__ = ["BACKBONES", "fitted_network"]


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class _Inverted(nn.Module):
    """Expand by 1x1, depthwise 3x3, project by 1x1; ReLU6 and hard-swish."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        wide = 4 * channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, 1, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.Hardswish(),
            nn.Conv2d(wide, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        return x + y


class _Attention(nn.Module):
    """A pre-norm transformer block with two heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = x.shape[2]
        q, k, v = (part.unflatten(2, (2, width // 2)).transpose(1, 2) for part in self.qkv(self.norm_1(x)).chunk(3, 2))
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        y: torch.Tensor = x + self.mlp(self.norm_2(x))
        return y


class _Tokens(nn.Module):
    """4x4 patches of a 32x32 image with their positions: `[N, 64, width]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return tokens


class _MeanToken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(1)


def _resnet() -> nn.Sequential:
    stem = (nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*stem, _Residual(16, 32, 1), _Residual(32, 96, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _mobilenet() -> nn.Sequential:
    stem = (nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish())
    down = (nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
    last = (nn.Conv2d(32, 96, 1, bias=False), nn.BatchNorm2d(96), nn.Hardswish())
    return nn.Sequential(*stem, _Inverted(16), *down, _Inverted(32), *last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _vit() -> nn.Sequential:
    return nn.Sequential(_Tokens(96), _Attention(96), _Attention(96), nn.LayerNorm(96), _MeanToken())


BACKBONES: dict[str, Callable[[], nn.Sequential]] = {"resnet": _resnet, "mobilenet": _mobilenet, "vit": _vit}


@torch.no_grad()
def fitted_network(name: str, frames: np.ndarray, labels: np.ndarray) -> nn.Sequential:
    """Return a network of `BACKBONES` with its last layer fitted to frames `[n, 32, 32, 1]` and their labels."""
    images = torch.from_numpy(frames.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = BACKBONES[name]()
    for part in backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # the statistics of all batches seen, equally
    backbone.train()(images)
    features = backbone.eval()(images)
    mean, std = features.mean(0), features.std(0) + 1e-3
    unit = (features - mean) / std
    wanted = nn.functional.one_hot(torch.from_numpy(labels)).to(unit.dtype) - 1 / 7
    ridge = unit.T @ unit + 0.01 * len(unit) * torch.eye(unit.shape[1])
    weight = 8 * torch.linalg.solve(ridge, unit.T @ wanted).T / std
    last = nn.Linear(unit.shape[1], len(weight))
    last.weight.copy_(weight)
    last.bias.copy_(-weight @ mean)
    return nn.Sequential(*backbone, last).eval()
