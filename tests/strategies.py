"""Random well-conditioned problems for hypothesis. A seed draws the matrices; hypothesis draws seed and scalars."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from ctrl import VE, RectifiedFlow, VPCosine, VPLinear, VPTable
from toy.gaussian import GaussianDiffusion, GaussianLaw, QuadraticReward
from toy.lq import LQProblem
from toy.mixture import LogRatioReward, Mixture, MixtureDiffusion, Noised

# (noising, s_min, s_max): every family, cut where lambda is finite
NOISINGS = [
    (VPLinear(0.1, 8.0), 1e-3, 1.0),
    (VPCosine(), 1e-3, 0.98),
    (VPTable([0.1, 0.4, 0.75]), 0.02, 1.0),  # few kinks in g², which cost an ODE solver dearly
    (VE(0.05, 6.0), 0.0, 1.0),
    (RectifiedFlow(), 1e-2, 0.97),
]
SEEDS = st.integers(0, 2**31 - 1)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def spd(g: torch.Generator, d: int, low: float = 0.2, high: float = 1.5) -> Tensor:
    """Symmetric positive definite with eigenvalues in [low, high]."""
    U = torch.linalg.qr(normal(g, d, d)).Q
    c = low + (high - low) * torch.rand(d, generator=g, dtype=torch.float64)
    m = (U * c) @ U.mT
    return (m + m.mT) / 2


@st.composite
def gaussians(draw, etas=st.floats(0.2, 2.0), start="any"):
    """Gaussian data, any noising, eta, dimension 1 to 5, a quadratic reward that is not concave in general."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    d = draw(st.integers(1, 5))
    noising, s_min, s_max = draw(st.sampled_from(NOISINGS))
    C = spd(g, d)
    beta = draw(st.floats(0.3, 2.0))
    G = spd(g, d, -0.25 * beta, 1.0)  # C^-1 >= 1/1.5, so that C_m^-1 + G/beta > 0 for every cut used here
    prior = GaussianLaw(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    law = {"any": draw(st.sampled_from([None, prior])), "marginal": None, "prior": prior}[start]
    return GaussianDiffusion(
        noising, normal(g, d), C, QuadraticReward(G, normal(g, d), 0.3), beta, draw(etas), s_min, s_max, law
    )


@st.composite
def mixtures(draw, eta=1.0):
    """Mixture data, any noising, dimension 1 to 5, 1 to 4 components; a quadratic, linear or log-ratio reward."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    d, K = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    noising, s_min, s_max = draw(st.sampled_from(NOISINGS))
    beta = draw(st.floats(0.3, 2.0))

    def mixture():
        w = torch.rand(K, generator=g, dtype=torch.float64) + 0.1
        return Mixture(w / w.sum(), 1.5 * normal(g, K, d), torch.stack([spd(g, d, 0.05, 0.6) for _ in range(K)]))

    data, kind = mixture(), draw(st.sampled_from(["quadratic", "linear", "ratio"]))
    if kind == "ratio":
        p, q = (Noised(m, noising).at(s_min) for m in (data, mixture()))
        reward = LogRatioReward(q, p, beta)
    else:
        G = spd(g, d, -0.5 * beta, 1.0) if kind == "quadratic" else torch.zeros(d, d, dtype=torch.float64)
        reward = QuadraticReward(G, normal(g, d), 0.2)
    return MixtureDiffusion(noising, data, reward, beta, eta, s_min, s_max)


@st.composite
def lqs(draw, gammas=st.floats(0.01, 0.5), discounts=st.floats(0.0, 0.5)):
    """Linear-quadratic problems with full matrices, n states and m <= n actions, exploring and discounted."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    n = draw(st.integers(1, 5))
    m = draw(st.integers(1, n))
    return LQProblem(
        A=0.7 * normal(g, n, n) / n**0.5, B=normal(g, n, m), S=spd(g, n, 0.3, 1.0) + 0.1 * normal(g, n, n) / n,
        R=spd(g, m, 0.3, 1.5), Q=spd(g, n, 0.0, 1.0), G=spd(g, n, 0.0, 1.0), h=normal(g, n), d=0.3 * normal(g, n),
        mean0=normal(g, n), cov0=spd(g, n, 0.2, 1.0), horizon=draw(st.floats(0.3, 1.5)), gamma=draw(gammas),
        discount=draw(discounts),
    )  # fmt: skip


def states(problem, n: int = 20, seed: int = 0, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Times (n,) inside [0, T] and states (n, *D)."""
    g = torch.Generator().manual_seed(seed)
    t = problem.horizon * torch.rand(n, generator=g, dtype=torch.float64)
    return t, spread * normal(g, n, *problem.shape)
