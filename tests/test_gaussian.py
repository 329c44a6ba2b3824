"""Gaussians against scipy, torch.distributions and numerical integration: sums over dimensions, in nats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ctrl import Gaussian, GaussianPolicy, Matrix, Scalar

seeds = st.integers(0, 2**31)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def roots(n, B, seed=0):
    """Every kind of root on (B, n) and its covariance (B, n, n); the matrices are not triangular."""
    eye = torch.eye(n, dtype=torch.float64)
    c = torch.linspace(0.5, 1.5, B, dtype=torch.float64)
    one, many = normal(n, n, seed=seed) + 2 * eye, normal(B, n, n, seed=seed + 1) + 2 * eye
    return {
        "number": (Scalar(0.7), (0.49 * eye).expand(B, n, n)),
        "scalar": (Scalar(torch.tensor(1.3, dtype=torch.float64)), (1.69 * eye).expand(B, n, n)),
        "scalars": (Scalar(c), c[:, None, None] ** 2 * eye),
        "matrix": (Matrix(one), (one @ one.mT).expand(B, n, n)),
        "matrices": (Matrix(many), many @ many.mT),
    }


KINDS = list(roots(1, 1))


def close(a, b, rtol=1e-10, atol=1e-10):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n, B", [(1, 2), (3, 4), (3, 3)])
def test_density_and_entropy(kind, n, B):
    """log N(x; m, LL') and ½ log det(2 pi e LL'), by scipy and by torch.distributions."""
    root, C = roots(n, B)[kind]
    m, x = normal(B, n, seed=3), normal(B, n, seed=4)
    law, theirs = Gaussian(m, root), MultivariateNormal(m, C)
    scipys = [stats.multivariate_normal(m[i].numpy(), C[i].numpy()) for i in range(B)]
    close(law.log_prob(x), torch.stack([torch.as_tensor(p.logpdf(x[i].numpy())) for i, p in enumerate(scipys)]))
    close(law.log_prob(x), theirs.log_prob(x))
    close(law.entropy(), torch.tensor([p.entropy() for p in scipys], dtype=torch.float64))
    close(law.entropy(), theirs.entropy())
    assert law.entropy().shape == law.log_prob(x).shape == (B,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", KINDS)
def test_kl(kind, of):
    """KL between every pair of kinds of root, by torch.distributions; B = n would hide a transposed broadcast."""
    for n, B in ((3, 4), (3, 3)):
        (p_root, p_C), (q_root, q_C) = roots(n, B)[kind], roots(n, B, seed=7)[of]
        p_mean, q_mean = normal(B, n, seed=3), normal(B, n, seed=4)
        kl = Gaussian(p_mean, p_root).kl(Gaussian(q_mean, q_root))
        assert kl.shape == (B,)
        close(kl, kl_divergence(MultivariateNormal(p_mean, p_C), MultivariateNormal(q_mean, q_C)))


def test_by_numerical_integration():
    """∫ p = 1, Ent = -∫ p log p and KL = ∫ p (log p - log q) on a plane grid, spectrally accurate."""
    axis = torch.linspace(-12, 12, 401, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)
    p = Gaussian(torch.tensor([[0.3, -0.5]]).expand(len(x), 2), Matrix(torch.tensor([[1.0, 0.0], [0.6, 0.8]])))
    q = Gaussian(torch.tensor([[-0.4, 0.2]]).expand(len(x), 2), Scalar(1.5))
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    mass = log_p.exp() * float(axis[1] - axis[0]) ** 2
    close(mass.sum(), 1.0)
    close(-(mass * log_p).sum(), p.entropy()[0])
    close((mass * (log_p - log_q)).sum(), p.kl(q)[0])
    close((mass[:, None] * x).sum(0), p.mean[0])


@given(D=st.integers(1, 50), x=st.floats(-3, 3), y=st.floats(-3, 3), c=st.floats(0.2, 3))
def test_everything_is_a_sum_over_dimensions(D, x, y, c):
    """D iid dimensions have D times the log-density, entropy and KL of one, in whatever shape they come."""
    p, q = Normal(y, c), Normal(0.1, 2.0)
    for shape in ((2, D), (2, D, 1), (2, 1, 1, D)):
        law = Gaussian(torch.full(shape, y), Scalar(c))
        assert law.dim == D
        close(law.log_prob(torch.full(shape, x)), (D * p.log_prob(torch.tensor(x))).expand(2))
        close(law.entropy(), (D * p.entropy()).expand(2))
        close(law.kl(Gaussian(torch.full(shape, 0.1), Scalar(2.0))), (D * kl_divergence(p, q)).expand(2))


@given(seed=seeds, kind=st.sampled_from(KINDS), of=st.sampled_from(KINDS))
def test_kl_is_positive_and_zero_between_equals(seed, kind, of):
    """KL(p || q) >= 0 and KL(p || p) = 0; a shifted mean alone gives ½ |L^-1 shift|² > 0."""
    p = Gaussian(normal(3, 2, seed=seed), roots(2, 3, seed)[kind][0])
    q = Gaussian(normal(3, 2, seed=seed + 1), roots(2, 3, seed + 5)[of][0])
    assert bool((p.kl(q) > 0).all())
    close(p.kl(p), torch.zeros(3), 0, 1e-11)
    shift = normal(3, 2, seed=seed + 2)
    C = roots(2, 3, seed)[kind][1]
    half = torch.einsum("bi,bi->b", shift, torch.linalg.solve(C, shift)) / 2
    close(Gaussian(p.mean + shift, p.root).kl(p), half, 1e-6, 1e-9)


@given(seed=seeds, kind=st.sampled_from(KINDS))
def test_kl_is_the_mean_log_ratio(seed, kind):
    """KL = -Ent(p) - E_p log q, and E_p of a quadratic is exact on the sigma points m ± sqrt(n) L e_j."""
    n, B = 2, 3
    (p_root, _), (q_root, _) = roots(n, B, seed)[kind], roots(n, B, seed + 9)["matrices"]
    p, q = Gaussian(normal(B, n, seed=seed), p_root), Gaussian(normal(B, n, seed=seed + 1), q_root)
    points = [s * math.sqrt(n) * e.expand(B, n) for e in torch.eye(n) for s in (-1, 1)]
    cross = torch.stack([q.log_prob(p.sample(xi)) for xi in points]).mean(0)
    close(p.kl(q), -p.entropy() - cross, 1e-7, 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_sample(kind):
    """x = m + L xi: |L^-1 (x - m)|² = |xi|², and L (not L') for a matrix."""
    root, C = roots(3, 4)[kind]
    law, xi = Gaussian(normal(4, 3, seed=3), root), normal(4, 3, seed=5)
    close(law.log_prob(law.sample(xi)), MultivariateNormal(law.mean, C).log_prob(law.mean) - xi.square().sum(1) / 2)
    columns = torch.stack([law.sample(e.expand(4, 3)) - law.mean for e in torch.eye(3)], -1)
    close(columns @ columns.mT, C)


def test_of_covariance():
    """Gaussian.of takes the covariance itself, (d, d) or (B, d, d)."""
    m, x = normal(4, 3), normal(4, 3, seed=1)
    for C in (roots(3, 4)["matrix"][1][0], roots(3, 4)["matrices"][1]):
        close(Gaussian.of(m, C).log_prob(x), MultivariateNormal(m, C).log_prob(x))
    with pytest.raises(ValueError, match="covariance must be positive definite"):
        Gaussian.of(m, torch.diag(torch.tensor([1.0, 1.0, -1e-3])))
    with pytest.raises(ValueError, match="covariance must be symmetric"):
        Gaussian.of(m, torch.eye(3) + torch.ones(3, 3).triu(1))


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0), torch.tensor([1.0, 0.0]), "matrix"])
def test_no_density_without_noise(zero):
    """A deterministic step has samples, but neither density nor entropy nor KL."""
    root = Matrix(torch.zeros(3, 3)) if isinstance(zero, str) else Scalar(zero)
    m = normal(2, 3)
    law, other = Gaussian(m, root), Gaussian(m, Scalar(1.0))
    close(law.sample(torch.zeros(2, 3)), m)
    for h in (lambda: law.log_prob(m), law.entropy, lambda: law.kl(other), lambda: other.kl(law)):
        with pytest.raises(ValueError, match="root"):
            h()


@pytest.mark.parametrize("shape", [(2, 1), (1, 3), (2, 3, 1), (3,), (2, 4)])
def test_shapes_must_agree(shape):
    """Nothing is broadcast: a (B, 1) mistaken for (B, 3) would give the density of another law."""
    law = Gaussian(normal(2, 3), Scalar(1.0))
    with pytest.raises(ValueError, match="shape"):
        law.log_prob(normal(*shape))
    with pytest.raises(ValueError, match="shape"):
        law.kl(Gaussian(normal(*shape), Scalar(1.0)))


def test_policy_is_a_gaussian_around_its_mean():
    """pi(. | t, x) = N(mean(t, x, cond), L(t) L(t)'), t: (B,)."""
    policy = GaussianPolicy(lambda t, x, cond: t[:, None] * x + (0 if cond is None else cond), lambda t: Scalar(1 + t))
    t, x, a = torch.tensor([0.0, 0.5]), normal(2, 3), normal(2, 3, seed=1)
    for cond in (None, 0.3):
        law = policy(t, x) if cond is None else policy(t, x, cond)
        truth = stats.norm(t[:, None].numpy() * x.numpy() + (cond or 0), 1 + t[:, None].numpy())
        close(law.log_prob(a), np.sum(truth.logpdf(a.numpy()), 1))
