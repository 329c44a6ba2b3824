"""Gaussians N(mean, L L'): exploratory policies and the transitions of discrete chains.

Everything is a sum over dimensions, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctrl.linop import LinOp, Matrix, cholesky, dot

Mean = Callable[[Tensor, Tensor, Any], Tensor]
"""mean(t: (B,), x: (B, *D), cond) -> (B, *D): a policy, a reference, an exact optimum. cond is opaque: cond[idx]."""


@dataclass(frozen=True)
class Gaussian:
    """N(mean, L L') on (B, *D); `root` is L."""

    mean: Tensor
    root: LinOp

    @staticmethod
    def of(mean: Tensor, covariance: Tensor) -> Gaussian:
        """N(mean, covariance), mean (B, d), covariance (d, d) or (B, d, d); it must be positive definite."""
        return Gaussian(mean, Matrix(cholesky(covariance, "covariance")))

    @property
    def dim(self) -> int:
        """Number of dimensions D, flattened."""
        return self.mean[0].numel()

    def sample(self, xi: Tensor) -> Tensor:
        """mean + L xi, for standard normal xi (B, *D)."""
        return self.mean + self.root.apply(xi)

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; mean, L L'), summed over dimensions: (B, *D) -> (B,)."""
        if x.shape != self.mean.shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, the Gaussian {tuple(self.mean.shape)}")
        self._check_density()
        z = self.root.solve(x - self.mean)
        return -dot(z, z) / 2 - self.root.logabsdet(self.dim) - self.dim / 2 * math.log(2 * math.pi)

    def entropy(self) -> Tensor:
        """½ d log(2 pi e) + log |det L|, (B,)."""
        self._check_density()
        entropy = self.dim / 2 * math.log(2 * math.pi * math.e) + self.root.logabsdet(self.dim)
        return entropy.expand(len(self.mean))

    def kl(self, other: Gaussian) -> Tensor:
        """KL(self || other) in nats, (B,).

        ½ tr(C'^-1 C) - ½ d + ½ |L'^-1 (m - m')|² + log |det L'| - log |det L|, primes for `other`.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"other has shape {tuple(other.mean.shape)}, the Gaussian {tuple(self.mean.shape)}")
        self._check_density()
        other._check_density()
        z = other.root.solve(self.mean - other.mean)
        trace = self.root.ratio(other.root, self.dim)
        return (trace - self.dim + dot(z, z)) / 2 + other.root.logabsdet(self.dim) - self.root.logabsdet(self.dim)

    def _check_density(self) -> None:
        if bool((self.root.logabsdet(self.dim) == -math.inf).any()):
            raise ValueError("root (the standard deviation) is zero: a deterministic policy or step has no density")


@dataclass(frozen=True)
class GaussianPolicy:
    """pi(. | t, x) = N(mean(t, x), L(t) L(t)'): exploration around any mean."""

    mean: Mean
    root: Callable[[Tensor], LinOp]

    def __call__(self, t: Tensor, x: Tensor, cond: Any = None) -> Gaussian:
        """The action's law at times t (B,) and states x (B, *D)."""
        return Gaussian(self.mean(t, x, cond), self.root(t))
