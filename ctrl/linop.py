"""Linear operators B(t), S(t), R(t): one interface for a scalar times the identity and for a matrix.

A 1-D Gaussian, a matrix LQ problem and an 860 M-parameter UNet use the same formulas; only the operators differ.
Coefficients may be plain numbers, 0-d tensors, or carry a batch of times (B,).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def broadcast(c: Tensor, v: Tensor) -> Tensor:
    """Append axes to a coefficient c, () or (B,), so that it multiplies v, (B, *D)."""
    return c.to(v.dtype).reshape(c.shape + (1,) * (v.ndim - c.ndim)) if c.ndim else c


def dot(u: Tensor, v: Tensor) -> Tensor:
    """<u, v> summed over all dimensions but the batch: (B, *D), (B, *D) -> (B,). A sum, never a mean."""
    return (u * v).flatten(1).sum(1)


def _tensor(c: Tensor | float) -> Tensor:
    """A number as a 0-d float64 tensor: exact, and it never promotes what it multiplies."""
    return c if isinstance(c, Tensor) else torch.tensor(c, dtype=torch.float64)


def same_shape(**tensors: Tensor) -> None:
    """Raise unless all have one shape: what broadcasts by mistake does not fail, it is wrong."""
    if len({v.shape for v in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in tensors.items())
        raise ValueError(f"these must have the same shape: {shapes}")


class LinOp(ABC):
    """v -> M v on (B, *D). `dim` is the number of dimensions D flattened."""

    @abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """M v."""

    @abstractmethod
    def adjoint(self, v: Tensor) -> Tensor:
        """M' v."""

    @property
    @abstractmethod
    def T(self) -> LinOp:
        """M'."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """M^-1 v."""

    @abstractmethod
    def scale(self, c: Tensor | float) -> LinOp:
        """c M."""

    @abstractmethod
    def inverse_root(self) -> LinOp:
        """L with L L' = M^-1, for symmetric positive definite M."""

    @abstractmethod
    def logabsdet(self, dim: int) -> Tensor:
        """log |det M|."""

    @abstractmethod
    def ratio(self, other: LinOp, dim: int) -> Tensor:
        """|other^-1 M|_F² = tr[(other other')^-1 M M'], the trace term of a Gaussian KL."""

    @abstractmethod
    def trace_of(self, root: LinOp, dim: int) -> Tensor:
        """tr(M L L') for a root L: the mean of <xi, M xi> under xi ~ N(0, L L')."""


@dataclass(frozen=True)
class Scalar(LinOp):
    """c times the identity; c is a number, () or (B,)."""

    c: Tensor | float

    def apply(self, v: Tensor) -> Tensor:
        return v * (broadcast(self.c, v) if isinstance(self.c, Tensor) else self.c)

    adjoint = apply

    @property
    def T(self) -> Scalar:
        return self

    def solve(self, v: Tensor) -> Tensor:
        return v / (broadcast(self.c, v) if isinstance(self.c, Tensor) else self.c)

    def scale(self, c: Tensor | float) -> Scalar:
        return Scalar(self.c * c)

    def inverse_root(self) -> Scalar:
        return Scalar(_tensor(self.c).rsqrt())

    def logabsdet(self, dim: int) -> Tensor:
        return dim * _tensor(self.c).abs().log()

    def ratio(self, other: LinOp, dim: int) -> Tensor:
        if isinstance(other, Matrix):
            return Matrix(torch.eye(dim, dtype=other.m.dtype, device=other.m.device)).scale(self.c).ratio(other, dim)
        assert isinstance(other, Scalar)
        return dim * _tensor(self.c / other.c).square()

    def trace_of(self, root: LinOp, dim: int) -> Tensor:
        return _tensor(self.c) * root.ratio(Scalar(1.0), dim)


@dataclass(frozen=True)
class Matrix(LinOp):
    """A matrix m, (n, n') or (B, n, n'), acting on vectors (B, n')."""

    m: Tensor

    def apply(self, v: Tensor) -> Tensor:
        return (self.m.to(v) @ v[..., None])[..., 0]

    def adjoint(self, v: Tensor) -> Tensor:
        return (self.m.mT.to(v) @ v[..., None])[..., 0]

    @property
    def T(self) -> Matrix:
        return Matrix(self.m.mT)

    def solve(self, v: Tensor) -> Tensor:
        return torch.linalg.solve(self.m.to(v), v[..., None])[..., 0]

    def scale(self, c: Tensor | float) -> Matrix:
        if not isinstance(c, Tensor):
            return Matrix(c * self.m)
        return Matrix(c.to(self.m.dtype)[..., None, None] * self.m.to(c.device))

    def inverse_root(self) -> Matrix:
        return Matrix(torch.linalg.inv(torch.linalg.cholesky(self.m)).mT)

    def logabsdet(self, dim: int) -> Tensor:
        return torch.linalg.slogdet(self.m).logabsdet

    def ratio(self, other: LinOp, dim: int) -> Tensor:
        if isinstance(other, Scalar):
            return self.m.square().sum((-2, -1)) / _tensor(other.c).square()
        assert isinstance(other, Matrix)
        # of one rank: solve would read (n, n) against (n, n, n) as a batch of vectors
        return torch.linalg.solve(*torch.broadcast_tensors(other.m, self.m)).square().sum((-2, -1))

    def trace_of(self, root: LinOp, dim: int) -> Tensor:
        if isinstance(root, Scalar):
            return self.m.diagonal(dim1=-2, dim2=-1).sum(-1) * _tensor(root.c).square()
        assert isinstance(root, Matrix)
        return (self.m @ root.m @ root.m.mT).diagonal(dim1=-2, dim2=-1).sum(-1)


def cholesky(covariance: Tensor, name: str) -> Tensor:
    """Lower Cholesky factor; a ValueError naming the argument if it is not symmetric positive definite."""
    if covariance.ndim < 2 or covariance.shape[-1] != covariance.shape[-2]:
        raise ValueError(f"{name} must be a square matrix, got shape {tuple(covariance.shape)}")
    slack = max(1e-8, 32 * torch.finfo(covariance.dtype).eps) * covariance.abs().amax((-2, -1), keepdim=True)
    if not bool(((covariance - covariance.mT).abs() <= slack).all()):
        raise ValueError(f"{name} must be symmetric")
    factor, info = torch.linalg.cholesky_ex(covariance)
    if bool((info != 0).any()) or not math.isfinite(float(factor.detach().sum())):
        raise ValueError(
            f"{name} must be positive definite; the smallest eigenvalue is "
            f"{float(torch.linalg.eigvalsh(covariance).min()):.3g}"
        )
    return factor
