"""Scalar and matrix operators: the two agree where they overlap, and both agree with dense numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl import Matrix, Scalar
from ctrl.linop import broadcast, cholesky, dot

EPS = torch.finfo(torch.float64).eps


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def spd(*shape, seed=0):
    """Symmetric positive definite, condition number below about 100."""
    a = normal(*shape, seed=seed)
    return a @ a.mT / shape[-1] + 0.5 * torch.eye(shape[-1], dtype=torch.float64)


def close(a, b, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def operators(n=3, B=4):
    """Every kind of operator on (B, n), and its dense (B, n, n) form."""
    eye = torch.eye(n, dtype=torch.float64)
    c = torch.linspace(0.5, 2.0, B, dtype=torch.float64)
    one, many = spd(n, n), spd(B, n, n, seed=1)
    return {
        "number": (Scalar(-1.7), (-1.7 * eye).expand(B, n, n)),
        "scalar": (Scalar(torch.tensor(0.3, dtype=torch.float64)), (0.3 * eye).expand(B, n, n)),
        "scalars": (Scalar(c), c[:, None, None] * eye),
        "matrix": (Matrix(one), one.expand(B, n, n)),
        "matrices": (Matrix(many), many),
        "skew": (Matrix(normal(n, n, seed=5) + 3 * eye), (normal(n, n, seed=5) + 3 * eye).expand(B, n, n)),
    }


KINDS = list(operators())
POSITIVE = [k for k in KINDS if k not in ("number", "skew")]


@pytest.mark.parametrize("kind", KINDS)
def test_against_dense(kind):
    """apply, adjoint, solve and log |det| by numpy, row by row; <Mu, v> = <u, M'v>; M^-1 M = 1."""
    op, dense = operators()[kind]
    u, v = normal(4, 3, seed=2), normal(4, 3, seed=3)
    m = dense.numpy()
    close(op.apply(u), np.stack([a @ b for a, b in zip(m, u.numpy(), strict=True)]))
    close(op.adjoint(u), np.stack([a.T @ b for a, b in zip(m, u.numpy(), strict=True)]))
    close(op.solve(u), np.stack([np.linalg.solve(a, b) for a, b in zip(m, u.numpy(), strict=True)]))
    close(op.logabsdet(3).expand(4), np.log(np.abs(np.linalg.det(m))))
    close(dot(op.apply(u), v), dot(u, op.adjoint(v)))
    close(op.T.apply(u), op.adjoint(u), 0, 0)
    close(op.T.adjoint(u), op.apply(u), 0, 0)
    close(op.T.solve(u), np.stack([np.linalg.solve(a.T, b) for a, b in zip(m, u.numpy(), strict=True)]))
    close(op.solve(op.apply(u)), u)


@given(c=st.floats(0.1, 10), n=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_scalar_is_a_multiple_of_the_identity(c, n, seed):
    """Scalar(c) and Matrix(c 1) agree on everything."""
    scalar, matrix = Scalar(c), Matrix(c * torch.eye(n, dtype=torch.float64))
    v = normal(2, n, seed=seed)
    for h in (
        lambda m: m.apply(v),
        lambda m: m.adjoint(v),
        lambda m: m.solve(v),
        lambda m: m.scale(0.7).apply(v),
        lambda m: m.inverse_root().apply(v),
        lambda m: m.logabsdet(n),
        lambda m: m.ratio(Scalar(0.3), n),
        lambda m: m.ratio(Matrix(spd(n, n)), n),
        lambda m: m.trace_of(Scalar(0.3), n),
        lambda m: m.trace_of(Matrix(normal(n, n)), n),
    ):
        close(h(scalar), h(matrix), rtol=64 * n * EPS, atol=64 * n * c * EPS)


@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B", [3, 4])
def test_ratio_and_trace(kind, of, B):
    """ratio = tr[(K K')^-1 M M'], trace_of = tr(M K K'), every pair of kinds, by numpy; also where B = n = 3."""
    op, dense = operators(3, B)[kind]
    other, second = operators(3, B)[of]
    m, k = dense.numpy(), second.numpy()
    mmt, kkt = m @ m.transpose(0, 2, 1), k @ k.transpose(0, 2, 1)
    close(op.ratio(other, 3).expand(B), np.trace(np.linalg.solve(kkt, mmt), axis1=1, axis2=2), 1e-11)
    close(op.trace_of(other, 3).expand(B), np.trace(m @ kkt, axis1=1, axis2=2), 1e-11)


@pytest.mark.parametrize("kind", POSITIVE)
def test_inverse_root(kind):
    """L L' = M^-1."""
    op, dense = operators()[kind]
    root = op.inverse_root()
    columns = [root.apply(root.adjoint(torch.eye(3, dtype=torch.float64)[j].expand(4, 3))) for j in range(3)]
    close(torch.stack(columns, -1), np.linalg.inv(dense.numpy()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("B, n", [(4, 3), (3, 3), (2, 1)])
def test_scale(kind, B, n):
    """c M for a number, () and (B,), also where B = n could be mistaken for the rows of M."""
    op, dense = operators(n, B)[kind]
    v, c = normal(B, n, seed=2), torch.linspace(0.3, 1.9, B, dtype=torch.float64)
    for factor in (2.5, torch.tensor(2.5, dtype=torch.float64), c):
        truth = torch.as_tensor(factor).reshape(-1, 1) * torch.einsum("bij,bj->bi", dense, v)
        close(op.scale(factor).apply(v), truth)


def test_images_and_float32():
    """A scalar acts on (B, *D) of any rank, and the state's dtype survives a float64 coefficient."""
    v = normal(2, 3, 4, 5).float()
    c = torch.tensor([2.0, 3.0], dtype=torch.float64)
    assert Scalar(c).apply(v).dtype == Scalar(c).solve(v).dtype == torch.float32
    close(Scalar(c).apply(v), torch.stack([2 * v[0], 3 * v[1]]), 1e-6)
    close(Scalar(c).solve(v), torch.stack([v[0] / 2, v[1] / 3]), 1e-6)
    assert Matrix(spd(3, 3)).apply(v[0, 0, :, :3]).dtype == torch.float32
    assert broadcast(c, v).shape == (2, 1, 1, 1)


def test_dot_is_a_sum():
    """<u, v> over every dimension but the first."""
    u, v = normal(2, 2, 3), normal(2, 2, 3, seed=1)
    close(dot(u, v), np.einsum("bij,bij->b", u.numpy(), v.numpy()))
    close(dot(torch.ones(2, 2, 3), torch.ones(2, 2, 3)), torch.full((2,), 6.0), 0, 0)


@given(n=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_cholesky(n, seed):
    """Lower triangular, L L' = C; also for a covariance that rounding made slightly asymmetric, in either precision."""
    C = spd(n, n, seed=seed)
    L = cholesky(C, "C")
    close(L @ L.mT, C)
    close(L, L.tril(), 0, 0)
    Q = torch.linalg.qr(normal(n, n, seed=seed))[0]
    for dtype in (torch.float32, torch.float64):
        D = (Q.to(dtype) * torch.linspace(1, 2, n).to(dtype)) @ Q.to(dtype).mT
        close(cholesky(D, "D") @ cholesky(D, "D").mT, D, 100 * torch.finfo(dtype).eps, 100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    "bad, why",
    [
        (torch.ones(2, 3), "square"),
        (torch.ones(2), "square"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 0.5], [0.4, 1.0]]) * 1e-14, "symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "positive definite; the smallest eigenvalue is -1"),
        (torch.zeros(2, 2), "positive definite"),
        (torch.stack([torch.eye(2), -torch.eye(2)]), "positive definite"),
        (torch.full((2, 2), float("nan")), ""),
    ],
)
def test_cholesky_names_what_is_wrong(bad, why):
    with pytest.raises(ValueError, match=f"Q must be .*{why}"):
        cholesky(bad.double(), "Q")


@pytest.mark.parametrize("shape", [(3, 2), (4, 3, 2)])
def test_transpose_of_a_rectangle(shape):
    """M' of the control's shape: states to actions, and back to M."""
    M, v = normal(*shape), normal(4, 3, seed=1)
    close(Matrix(M).T.apply(v), torch.einsum("...ij,...i->...j", M, v))
    close(Matrix(M).T.T.apply(v[:, :2]), Matrix(M).apply(v[:, :2]), 0, 0)
