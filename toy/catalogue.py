"""Named, frozen problems with their exact answers: tests, benchmarks and figures all draw on these.

    entry = catalogue.get("mixture-2d")
    entry.problem                                  what an algorithm sees
    entry.optimal_policy(t, x, cond)               a*
    entry.value.value(t, x, cond), .grad(...)      V* as an exact critic
    entry.J_optimal                                J*, with a standard error where it is an average over samples
    entry.exact                                    everything else: see toy.lq, toy.gaussian, toy.mixture

The numbers are part of the names: changing one is a new problem. All are VP with g² linear in s and beta = 0.5 unless
said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ctrl.estimate import Estimate
from ctrl.gaussian import Mean
from ctrl.noising import VPLinear
from ctrl.problem import Problem
from ctrl.value import Critic
from toy.gaussian import GaussianDiffusion, GaussianLaw, QuadraticReward
from toy.lq import LQProblem
from toy.mixture import GuidedMixture, LogRatioReward, Mixture, MixtureDiffusion, Noised


@dataclass(frozen=True)
class Entry:
    """A problem and its exact optimum."""

    name: str
    problem: Problem
    optimal_policy: Mean
    value: Critic
    J_optimal: Estimate
    exact: Any
    """LQProblem, GaussianDiffusion, MixtureDiffusion or GuidedMixture."""

    def condition(self, ids: Tensor) -> Tensor | None:
        """A condition for each sample, (B,), spread evenly; None where the problem has none."""
        return ids % self.classes if self.classes else None

    @property
    def classes(self) -> int:
        """How many conditions there are; 0 where the problem has none."""
        return len(self.exact.classes) if isinstance(self.exact, GuidedMixture) else 0


def _f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _eye(d: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)


def _quadratic(G: Any, h: Any) -> QuadraticReward:
    return QuadraticReward(_f64(G), _f64(h))


def _lq(name: str, problem: LQProblem) -> Entry:
    lq = problem.exact
    value, J = lq.optimal_value(), _f64(lq.J_optimal())
    return Entry(name, problem, lq.optimal_policy(), value, Estimate(J, torch.zeros_like(J), 1), problem)


def _gaussian(name: str, exact: GaussianDiffusion) -> Entry:
    J = _f64(exact.lq.J_optimal())
    return Entry(name, exact.problem, exact.optimal_policy, exact.value, Estimate(J, torch.zeros_like(J), 1), exact)


def _mixture(name: str, exact: MixtureDiffusion | GuidedMixture) -> Entry:
    return Entry(name, exact.problem, exact.optimal_policy, exact.value, exact.J_optimal(), exact)


def _prior(d: int) -> Mixture:
    return Mixture(_f64([1.0]), torch.zeros(1, d, dtype=torch.float64), _eye(d)[None])


def lq_1d() -> Entry:
    """An unstable state steered to the right, exploring at gamma = 0.1."""
    problem = LQProblem(
        A=_f64([[0.5]]), B=_f64([[1.0]]), S=_f64([[0.8]]), R=_f64([[0.5]]), Q=_f64([[1.0]]), G=_f64([[2.0]]),
        h=_f64([1.5]), d=_f64([-0.3]), mean0=_f64([0.5]), cov0=_f64([[0.5]]), horizon=1.0, gamma=0.1,
    )  # fmt: skip
    return _lq("lq-1d", problem)


def lq_4d() -> Entry:
    """Two coupled oscillators pushed through their velocities, correlated noise, discounted, exploring."""
    problem = LQProblem(
        A=_f64([[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -0.2, 0], [1, -2, 0, -0.2]]),
        B=_f64([[0, 0], [0, 0], [1, 0.3], [0, 1]]),
        S=_f64([[0.3, 0, 0, 0], [0, 0.3, 0, 0], [0.1, 0, 0.5, 0], [0, 0.1, 0.2, 0.5]]),
        R=_f64([[0.5, 0.1], [0.1, 0.8]]),
        Q=_f64([[1, 0.2, 0, 0], [0.2, 1, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 0.1]]),
        G=2 * _eye(4), h=_f64([1.0, -1.0, 0.0, 0.0]), d=_f64([0.0, 0.0, 0.2, 0.0]),
        mean0=_f64([1.0, 0.0, 0.0, -0.5]), cov0=0.3 * _eye(4), horizon=2.0, gamma=0.05, discount=0.2,
    )  # fmt: skip
    return _lq("lq-4d", problem)


def gaussian_1d() -> Entry:
    """Data N(1, 0.25), g² from 0.1 to 8, r = -(x - 1.5)²/2, Y_0 ~ N(0, 1)."""
    reward = QuadraticReward(_f64([[1.0]]), _f64([1.5]), -1.125)
    start = GaussianLaw(_f64([0.0]), _eye(1))
    return _gaussian(
        "gaussian-1d",
        GaussianDiffusion(VPLinear(0.1, 8.0), _f64([1.0]), _f64([[0.25]]), reward, beta=0.5, start=start),
    )


def gaussian_16d() -> Entry:
    """Correlated data (eigenvalues 0.05 to 2, one per axis of a random rotation), a pull towards a random point."""
    d = 16
    U = torch.linalg.qr(_random(16, d, d)).Q
    C = (U * torch.logspace(-1.3, 0.3, d, dtype=torch.float64)) @ U.mT
    target = _random(17, d)
    reward = QuadraticReward(0.5 * _eye(d), 0.5 * target)
    start = GaussianLaw(torch.zeros(d, dtype=torch.float64), _eye(d))
    return _gaussian(
        "gaussian-16d",
        GaussianDiffusion(VPLinear(0.1, 8.0), 0.5 * _random(18, d), (C + C.mT) / 2, reward, beta=0.5, start=start),
    )


def mixture_1d() -> Entry:
    """Two modes of unequal width; the reward favours the lighter one."""
    data = Mixture(_f64([0.7, 0.3]), _f64([[-1.0], [1.2]]), _f64([[[0.1]], [[0.05]]]))
    return _mixture(
        "mixture-1d",
        MixtureDiffusion(VPLinear(0.1, 12.0), data, _quadratic([[0.4]], [1.0]), beta=0.5, start=_prior(1)),
    )


def mixture_2d() -> Entry:
    """Three modes, weights .5 .3 .2; r = -.3 |x|² - x_1 - .5 x_2 moves them to about .01 .25 .74."""
    data = Mixture(
        _f64([0.5, 0.3, 0.2]),
        _f64([[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.5]]),
        _f64([[[0.05, 0], [0, 0.05]], [[0.08, 0], [0, 0.08]], [[0.1, 0.03], [0.03, 0.05]]]),
    )
    reward = _quadratic([[0.6, 0.0], [0.0, 0.6]], [-1.0, -0.5])
    return _mixture("mixture-2d", MixtureDiffusion(VPLinear(0.1, 12.0), data, reward, beta=0.5, start=_prior(2)))


def mixture_2d_rare_mode() -> Entry:
    """The target is the same three modes with the weights .98 .01 .01 turned to .1 .1 .8: a rare mode must be found."""
    mu = _f64([[1.5, 0.0], [-1.0, 1.2], [-0.5, -1.5]])
    C = 0.06 * _eye(2).expand(3, 2, 2)
    noising, s_min, beta = VPLinear(0.1, 12.0), 1e-3, 0.5
    data, target = (Mixture(_f64(w), mu, C) for w in ([0.98, 0.01, 0.01], [0.1, 0.1, 0.8]))
    p, q = (Noised(m, noising).at(s_min) for m in (data, target))
    reward = LogRatioReward(q, p, beta)
    return _mixture(
        "mixture-2d-rare-mode", MixtureDiffusion(noising, data, reward, beta=beta, s_min=s_min, start=_prior(2))
    )


def mixture_2d_conditional() -> Entry:
    """Three classes that move x_1 by -2, 0.5 and 2, guided at weight 1.5; two modes in x_2 common to all; each class
    has its own target."""
    data = Mixture(
        _f64([0.6, 0.4]), _f64([[0.0, -1.0], [0.0, 1.0]]), _f64([[[0.2, 0], [0, 0.05]], [[0.2, 0], [0, 0.1]]])
    )
    shifts = _f64([[-2.0, 0.0], [0.5, 0.0], [2.0, 0.0]])
    rewards = tuple(_quadratic([[0.3, 0.0], [0.0, 0.3]], h) for h in ([-0.5, 1.0], [1.0, -1.0], [0.0, 1.0]))
    base = MixtureDiffusion(VPLinear(0.1, 12.0), data, rewards[0], beta=0.5, start=_prior(2))
    return _mixture("mixture-2d-conditional", GuidedMixture(base, shifts, rewards, guidance=1.5))


def mixture_32d() -> Entry:
    """Five modes in 32 dimensions at random places, with random covariances; a linear reward along a random
    direction."""
    d, K = 32, 5
    roots = _random(32, K, d, d) / d**0.5
    C = 0.05 * roots @ roots.mT + 0.05 * _eye(d)
    direction = _random(34, d)
    reward = QuadraticReward(torch.zeros(d, d, dtype=torch.float64), direction / direction.norm())
    data = Mixture(_f64([0.3, 0.3, 0.2, 0.1, 0.1]), 0.6 * _random(33, K, d), (C + C.mT) / 2)
    return _mixture("mixture-32d", MixtureDiffusion(VPLinear(0.1, 12.0), data, reward, beta=0.5, start=_prior(d)))


def random_mixture(seed: int, d: int = 2) -> Entry:
    """Not in the catalogue: a mixture and a quadratic reward drawn at random, to tune on."""
    g = torch.Generator().manual_seed(seed)
    K = int(torch.randint(2, 5, (), generator=g))
    roots = 0.2 * torch.randn(K, d, d, generator=g, dtype=torch.float64)
    w = 0.1 + torch.rand(K, generator=g, dtype=torch.float64)
    mu = 1.2 * torch.randn(K, d, generator=g, dtype=torch.float64)
    data = Mixture(w / w.sum(), mu, roots @ roots.mT + 0.04 * _eye(d))
    reward = QuadraticReward(0.5 * _eye(d), torch.randn(d, generator=g, dtype=torch.float64))
    diffusion = MixtureDiffusion(VPLinear(0.1, 12.0), data, reward, beta=0.5, start=_prior(d))
    return _mixture(f"random-mixture-{seed}", diffusion)


_ENTRIES: dict[str, Callable[[], Entry]] = {
    "lq-1d": lq_1d,
    "lq-4d": lq_4d,
    "gaussian-1d": gaussian_1d,
    "gaussian-16d": gaussian_16d,
    "mixture-1d": mixture_1d,
    "mixture-2d": mixture_2d,
    "mixture-2d-rare-mode": mixture_2d_rare_mode,
    "mixture-2d-conditional": mixture_2d_conditional,
    "mixture-32d": mixture_32d,
}

NAMES = tuple(_ENTRIES)


@cache
def get(name: str) -> Entry:
    """The problem of that name; `NAMES` lists them."""
    if name not in _ENTRIES:
        raise ValueError(f"unknown problem {name!r}; the catalogue has {', '.join(NAMES)}")
    return _ENTRIES[name]()


@cache
def varied(name: str, *, beta: float | None = None, eta: float | None = None) -> Entry:
    """The diffusion of that name at another beta or eta, which is a problem of its own with exact answers too."""
    exact = get(name).exact
    if not (isinstance(exact, GaussianDiffusion | MixtureDiffusion) and isinstance(exact.reward, QuadraticReward)):
        raise ValueError(f"{name} has no beta or eta that can be varied: it has none, or a reward made for them")
    made = dataclasses.replace(exact, beta=exact.beta if beta is None else beta, eta=exact.eta if eta is None else eta)
    name = f"{name}@beta={made.beta:g},eta={made.eta:g}"
    return _gaussian(name, made) if isinstance(made, GaussianDiffusion) else _mixture(name, made)
