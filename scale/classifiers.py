"""Two small classifiers of CIFAR-10: the log-probability of a class under one is a reward, the other judges.

    frechet(Moments.of(features(images)), Moments.embedded())

They differ in layers, in where they halve the picture and in the order of what they saw: what fools one need not fool
the other. `scale/recipes/make_classifiers.py` trains them. Sets of pictures are compared by the Frechet distance
between Gaussians fitted to the judge's last features, before its linear layer. It is no FID, which takes an Inception
network's features: `scale.pixels.fid` computes that where its weights can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scale import data

ASSETS = Path(__file__).with_name("assets")
MOMENTS = ASSETS / "cifar10-moments.safetensors"
LAYERS: dict[str, tuple[tuple[int, int], ...]] = {
    "reward": ((32, 1), (64, 2), (96, 2), (128, 2)), "judge": ((24, 1), (48, 2), (96, 1), (128, 2), (160, 2)),
}  # fmt: skip
"""Channels and stride of each convolution."""


class Classifier(nn.Module):
    """Logits (n, 10) of pictures in [0, 1], (n, 3, 32, 32)."""

    def __init__(self, layers: Sequence[tuple[int, int]], classes: int = len(data.CLASSES)) -> None:
        super().__init__()
        widths = [3, *(width for width, _ in layers)]
        self.convolutions = nn.Sequential(*(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU())
            for a, b, (_, stride) in zip(widths, widths[1:], layers, strict=False)
        ))  # fmt: skip
        self.last = nn.Linear(widths[-1], classes)

    def features(self, images: Tensor) -> Tensor:
        """(n, F)."""
        return self.convolutions(4 * images - 2).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.features(images))


@cache
def load(name: str) -> Classifier:
    """The embedded one of that name, reward or judge; it is not trained any more."""
    model = Classifier(LAYERS[name])
    weights = load_file(ASSETS / f"cifar10-{name}.safetensors")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return model.eval().requires_grad_(False)


class LogProbability:
    """log p(class | picture) under the embedded classifier: a reward with a gradient."""

    differentiable = True

    def __init__(self, name: str | None) -> None:
        if name not in data.CLASSES:
            raise ValueError(
                f"cifar10-class needs a class, cifar10-class=NAME: {', '.join(data.CLASSES)}; got {name!r}"
            )
        self.index, self.__name__ = data.CLASSES.index(name), f"cifar10-class={name}"

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        """(n, 3, 32, 32) in [0, 1] -> (n,)."""
        return load("reward").to(images.device)(images.float()).log_softmax(1)[:, self.index]

    def ceiling(self, prompts: Sequence[str]) -> float:
        """Of a picture that is surely one."""
        return 0.0


# ------------------------------------------------------------------------------------------ sets of pictures


@torch.no_grad()
def features(images: Tensor, batch: int = 256) -> Tensor:
    """The judging classifier's last, (n, F), on the CPU."""
    judge = load("judge").to(images.device)
    return torch.cat([judge.features(part).cpu() for part in images.split(batch)])


@dataclass(frozen=True)
class Moments:
    """Mean (F,) and covariance (F, F) of n pictures' features, in float64."""

    mean: Tensor
    covariance: Tensor
    n: int

    @staticmethod
    def of(found: Tensor) -> Moments:
        """Of features, (n, F)."""
        mean = found.double().mean(0)
        away = found.double() - mean
        return Moments(mean, away.T @ away / (len(found) - 1), len(found))

    @staticmethod
    def embedded() -> Moments:
        """Of the CIFAR-10 pictures that the embedded model was trained on."""
        kept = load_file(MOMENTS)
        return Moments(kept["mean"].double(), kept["covariance"].double(), int(kept["n"]))

    def save(self, file: Path) -> None:
        """In float32, readable by everyone."""
        tensors = {"mean": self.mean.float(), "covariance": self.covariance.float(), "n": torch.tensor(self.n)}
        save_file(tensors, file)
        file.chmod(0o644)


def frechet(a: Moments, b: Moments) -> float:
    """|m_a - m_b|² + tr (C_a + C_b - 2 (C_a^½ C_b C_a^½)^½): of Gaussians, the squared 2-Wasserstein distance."""
    values, axes = torch.linalg.eigh(a.covariance)
    root = (axes * values.clamp(min=0).sqrt()) @ axes.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean - b.mean).square().sum()
    return float(apart + a.covariance.trace() + b.covariance.trace() - 2 * cross)


@torch.no_grad()
def histogram(images: Tensor, batch: int = 256) -> list[float]:
    """The share of pictures that the judge takes for each class: one that goes to zero, or to one, is a collapse."""
    judge = load("judge").to(images.device)
    named = torch.cat([judge(part).argmax(1).cpu() for part in images.split(batch)])
    return (named.bincount(minlength=10) / len(named)).tolist()


def diversity(found: Tensor) -> float:
    """Mean distance over pairs of pictures, in the judge's features, (n, F)."""
    return float(torch.pdist(found[:2000].float()).mean())
