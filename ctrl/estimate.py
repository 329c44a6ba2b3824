"""Monte-Carlo figures with their standard error, z-scores with a false-alarm budget, and orders of convergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over n independent samples, with the standard error of that mean."""

    mean: Tensor
    stderr: Tensor
    n: int

    @staticmethod
    def of(samples: Tensor) -> Estimate:
        """Mean over the first axis of samples, (n, ...), n >= 2."""
        if len(samples) < 2:
            raise ValueError(f"samples must hold at least 2 independent draws, got {len(samples)}")
        return Estimate(samples.mean(0), samples.std(0) / math.sqrt(len(samples)), len(samples))

    def z(self, truth: Tensor | float) -> Tensor:
        """(mean - truth) / stderr."""
        return (self.mean - truth) / self.stderr


def z_bound(tests: int, false_alarm: float = 1e-6) -> float:
    """The |z| that `tests` correct estimates all stay under, but for a probability `false_alarm` (Bonferroni)."""
    return NormalDist().inv_cdf(1 - false_alarm / (2 * tests))


def fit_order(steps: Sequence[int], errors: Sequence[float]) -> float:
    """p of error ~ C steps^-p by least squares in logarithms."""
    x = torch.tensor(steps, dtype=torch.float64).log()
    y = torch.tensor(errors, dtype=torch.float64).abs().log()
    return -float(torch.dot(x - x.mean(), y) / torch.dot(x - x.mean(), x - x.mean()))
