"""Gaussian mixtures under score as action: exact at eta = 1, in any dimension.

Data sum_i w_i N(mu_i, C_i), noised: p_s = sum_i w_i N(alpha mu_i, alpha² C_i + sigma² I), with closed score, posterior
and Tweedie mean. At eta = 1 the reverse process under the exact score is the time reversal of the noising, so Y_T | Y_t
= y is the posterior of X_{s_min} given X_s = y. If e^{r/beta} tilts p_{s_min} to another mixture p~ with normaliser Z,
then

    V*(t, y) = beta log E[e^{r/beta} | y] = beta (log Z + log p~_s(y) - log p_s(y)),
    a*(t, y) = s_ref + grad V*/beta       = grad log p~_s(y),

p~_s being the tilted mixture noised from s_min to s (arXiv 2502.01819; Uehara et al. 2024, arXiv 2402.15194). At other
eta the reference has the same marginals but another joint law, and V* is not this: take `toy.pde` in one dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl.estimate import Estimate
from ctrl.linop import cholesky
from ctrl.noise import INITIAL, Noise
from ctrl.noising import Noising
from ctrl.problem import Reward, ScoreAsAction
from ctrl.value import Critic
from toy.gaussian import QuadraticReward


@dataclass(frozen=True)
class Mixture:
    """sum_i w_i N(mu_i, C_i); w: (K,), mu: (K, d), C: (K, d, d). As an initial law it is sampled by sample id."""

    w: Tensor
    mu: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        K, d = self.mu.shape
        if self.w.shape != (K,) or self.C.shape != (K, d, d):
            raise ValueError(
                f"w, mu, C must have shapes (K,), (K, d), (K, d, d), got {tuple(self.w.shape)}, "
                f"{tuple(self.mu.shape)}, {tuple(self.C.shape)}"
            )
        if not bool((self.w > 0).all()) or abs(float(self.w.sum()) - 1) > 1e-9:
            raise ValueError(f"w must be positive and sum to 1, got {self.w.tolist()}")
        _ = self.root  # or says what is wrong with C

    @cached_property
    def root(self) -> Tensor:
        """Lower factors of the covariances, (K, d, d)."""
        return cholesky(self.C, "C")

    def __call__(self, noise: Noise, ids: Tensor, cond: Any = None) -> Tensor:
        """Samples, (B, d), keyed by id."""
        mu, root, w = (v.to(ids.device) for v in (self.mu, self.root, self.w))
        i = torch.searchsorted(w.cumsum(0), noise.uniform(ids, (), INITIAL, 1)).clamp(max=len(w) - 1)
        xi = noise.normal(ids, mu.shape[1:], INITIAL)
        return mu[i] + (root[i] @ xi[..., None])[..., 0]

    @property
    def mean(self) -> Tensor:
        """(d,)."""
        return self.w @ self.mu

    @property
    def covariance(self) -> Tensor:
        """(d, d)."""
        centred = self.mu - self.mean
        return torch.einsum("k,kij->ij", self.w, self.C) + torch.einsum("k,ki,kj->ij", self.w, centred, centred)

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues (K, d) and axes U (K, d, d) of the covariances, and the means in these axes (K, d)."""
        c, U = torch.linalg.eigh(self.C)
        return c, U, torch.einsum("kd,kde->ke", self.mu, U)

    def components(self, x: Tensor, alpha: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the law of alpha X + N(0, variance I), alpha and variance (B,), each component in its own axes:
        x - alpha mu_i (B, K, d), variances (B, K, d), log of w_i N(x) without (2 pi)^{-d/2} (B, K)."""
        c, U, mu = (v.to(x) for v in self.axes)
        alpha, variance = (v.to(x)[..., None, None] for v in (alpha, variance))
        y = torch.einsum("bd,kde->bke", x, U) - alpha * mu
        v = alpha.square() * c + variance
        return y, v, self.w.to(x).log() - (y.square() / v + v.log()).sum(-1) / 2

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x), (B,)."""
        *_, log_w = self.components(x, x.new_ones(len(x)), x.new_zeros(len(x)))
        return log_w.logsumexp(-1) - x.shape[-1] / 2 * math.log(2 * math.pi)

    def shifted(self, delta: Tensor) -> Mixture:
        """All means moved by delta, (d,)."""
        return Mixture(self.w, self.mu + delta, self.C)


@dataclass(frozen=True)
class LogRatioReward:
    """r(x) = scale (log q(x) - log p(x)) for two mixtures at the data end; with scale = beta the optimum is q
    itself."""

    q: Mixture
    p: Mixture
    scale: float

    def __call__(self, x: Tensor, cond: Any = None) -> Tensor:
        return self.scale * (self.q.log_prob(x) - self.p.log_prob(x))


def tilt(p: Mixture, reward: Reward, beta: float) -> tuple[Mixture, Tensor]:
    """(p e^{r/beta} / Z, log Z)."""
    if isinstance(reward, LogRatioReward):
        if any(not torch.equal(u, v) for u, v in ((reward.p.w, p.w), (reward.p.mu, p.mu), (reward.p.C, p.C))):
            raise ValueError("reward.p is not the law of the data at s_min: take `MixtureDiffusion.p.at(s_min)`")
        if reward.scale != beta:
            raise ValueError(f"reward.scale = {reward.scale} differs from beta = {beta}: q^(scale/beta) is no mixture")
        return reward.q, torch.zeros((), dtype=p.mu.dtype)
    if not isinstance(reward, QuadraticReward):
        raise ValueError(
            f"reward of type {type(reward).__name__} has no closed form: use QuadraticReward or "
            f"LogRatioReward, or toy.pde in one dimension"
        )
    G, h = reward.G.to(p.mu) / beta, reward.h.to(p.mu) / beta
    precision = torch.linalg.inv(p.C) + G
    if float(torch.linalg.eigvalsh(precision).min()) <= 0:
        raise ValueError("reward.G: E e^{r/beta} is infinite; C_i^-1 + G/beta must be positive definite for every i")
    C = torch.linalg.inv(precision)
    A = torch.eye(len(h), dtype=h.dtype) + p.C @ G
    mu = torch.linalg.solve(A, (p.mu + p.C @ h)[..., None])[..., 0]
    log_z = (h * (p.mu + mu) - (p.mu @ G) * mu).sum(-1) / 2 - torch.linalg.slogdet(A).logabsdet / 2
    log_w = p.w.log() + log_z
    total = log_w.logsumexp(0)
    return Mixture((log_w - total).softmax(0), mu, (C + C.mT) / 2), total + reward.r0 / beta


@dataclass(frozen=True)
class Noised:
    """A mixture at s0, or of clean data (s0 = None), noised to s: log-density, score, posterior."""

    base: Mixture
    noising: Noising
    s0: float | None = None

    def log_prob(self, s: Tensor, x: Tensor) -> Tensor:
        """log p_s(x), (B,)."""
        *_, log_w = self.base.components(x, *self.noising.between(s, self.s0))
        return log_w.logsumexp(-1) - x.shape[-1] / 2 * math.log(2 * math.pi)

    def score(self, s: Tensor, x: Tensor) -> Tensor:
        """grad log p_s(x), (B, d)."""
        y, v, log_w = self.base.components(x, *self.noising.between(s, self.s0))
        return -torch.einsum("bk,bke,kde->bd", log_w.softmax(-1), y / v, self.base.axes[1].to(x))

    def posterior(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p(X_{s0} | X_s = x), a mixture for each sample: weights (B, K), means (B, K, d), covariances (B, K, d, d)."""
        alpha, variance = self.noising.between(s, self.s0)
        y, v, log_w = self.base.components(x, alpha, variance)
        (c, U, mu), alpha = (u.to(x) for u in self.base.axes), alpha.to(x)[..., None, None]
        means = torch.einsum("bke,kde->bkd", mu + alpha * c * y / v, U)
        covariances = torch.einsum("kde,bke,kfe->bkdf", U, c - alpha.square() * c.square() / v, U)
        return log_w.softmax(-1), means, covariances

    def posterior_mean(self, s: Tensor, x: Tensor) -> Tensor:
        """E[X_{s0} | X_s = x], (B, d): Tweedie's mean, by Bayes."""
        w, means, _ = self.posterior(s, x)
        return (w[..., None] * means).sum(1)

    def at(self, s: float) -> Mixture:
        """p_s as a mixture."""
        alpha, variance = self.noising.between(torch.tensor(s, dtype=torch.float64), self.s0)
        eye = torch.eye(self.base.mu.shape[1], dtype=self.base.mu.dtype)
        return Mixture(self.base.w, alpha * self.base.mu, alpha.square() * self.base.C + variance * eye)


@dataclass(frozen=True)
class MixtureDiffusion:
    """Mixture data, a reward that tilts mixtures, and the score-as-action problem between s_max and s_min."""

    noising: Noising
    data: Mixture
    reward: Reward
    beta: float = 1.0
    eta: float = 1.0
    s_min: float = 1e-3
    s_max: float = 1.0
    start: Mixture | None = None
    """The initial law; p_{s_max} by default."""

    @cached_property
    def p(self) -> Noised:
        """The noised data: p_s."""
        return Noised(self.data, self.noising)

    def score(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """The reference: grad log p_s, (B, d)."""
        return self.p.score(self.problem.s(t), x)

    @cached_property
    def initial(self) -> Mixture:
        """The law of Y_0."""
        return self.start or self.p.at(self.s_max)

    @cached_property
    def problem(self) -> ScoreAsAction:
        """What an algorithm sees."""
        return ScoreAsAction(
            noising=self.noising, reference=self.score, reward=self.reward, initial=self.initial,
            shape=(self.data.mu.shape[1],), beta=self.beta, eta=self.eta, s_min=self.s_min, s_max=self.s_max,
        )  # fmt: skip

    @cached_property
    def tilted(self) -> tuple[Noised, Tensor]:
        """(the tilted mixture, ready to be noised from s_min; log Z). At eta = 1 only."""
        if self.eta != 1:
            raise ValueError(
                f"eta = {self.eta}: a mixture has closed V*, optimum and law at eta = 1 only, because elsewhere "
                f"the reference is not the time reversal of the noising; use toy.pde in one dimension"
            )
        mixture, log_z = tilt(self.p.at(self.s_min), self.reward, self.beta)
        return Noised(mixture, self.noising, self.s_min), log_z

    @cached_property
    def value(self) -> MixtureValue:
        """V*."""
        return MixtureValue(self, *self.tilted)

    def optimal_policy(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """a* = the score of the tilted mixture, (B, d)."""
        return self.tilted[0].score(self.problem.s(t), x)

    def sample_optimum(self, noise: Noise, ids: Tensor, cond: Any = None) -> Tensor:
        """Y_T under the optimal control, exactly: Y_0 from the initial law, then the tilted posterior given Y_0, (B,
        d)."""
        y = self.initial(noise, ids)
        w, means, C = self.tilted[0].posterior(y.new_full((len(ids),), self.s_max), y)
        u = noise.uniform(ids, (1,), INITIAL, 2)
        i = torch.searchsorted(w.cumsum(1), u)[:, 0].clamp(max=w.shape[1] - 1)
        rows = torch.arange(len(ids), device=ids.device)
        xi = noise.normal(ids, self.problem.shape, INITIAL, 3)
        return means[rows, i] + (torch.linalg.cholesky(C[rows, i]) @ xi[..., None])[..., 0]

    def J_optimal(self) -> Estimate:
        """J* = E V*(0, Y_0): by Gauss-Hermite quadrature up to two dimensions (no error), else from 65,536 samples."""
        return expect(self.initial, lambda y: self.value.value(y.new_zeros(len(y)), y))

    def reward_optimal(self) -> Estimate:
        """E r(Y_T) under the optimal control, of a quadratic reward; the optimum's path KL is (E r - J*)/beta."""
        r = self.reward
        if not isinstance(r, QuadraticReward):
            raise ValueError(f"a reward of type {type(r).__name__} has no closed mean: use QuadraticReward")

        def given(y: Tensor) -> Tensor:
            w, means, C = self.tilted[0].posterior(y.new_full((len(y),), self.s_max), y)
            return (w * (r(means) - torch.einsum("bkij,ij->bk", C, r.G.to(C)) / 2)).sum(1)

        return expect(self.initial, given)


def expect(law: Mixture, f: Any, order: int = 60) -> Estimate:
    """E f(Y), Y ~ law; f: (n, d) -> (n,)."""
    d = law.mu.shape[1]
    if d > 2:
        return Estimate.of(f(law(Noise(seed=0), torch.arange(65_536))))
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(order))
    grid = torch.cartesian_prod(*[nodes] * d).reshape(-1, d)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * d).reshape(-1, d).prod(1)
    y = law.mu[:, None] + torch.einsum("kij,nj->kni", torch.linalg.cholesky(law.C), grid)
    mean = (law.w[:, None] * mass * f(y.flatten(0, 1)).reshape(len(law.w), -1)).sum()
    return Estimate(mean, torch.zeros_like(mean), len(grid))


@dataclass(frozen=True)
class MixtureValue(Critic):
    """V*(t, y) = beta (log Z + log p~_s(y) - log p_s(y)), and its gradient beta (grad log p~_s - grad log p_s)."""

    diffusion: MixtureDiffusion
    tilted: Noised
    log_z: Tensor

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        s = self.diffusion.problem.s(t)
        ratio = self.tilted.log_prob(s, x) - self.diffusion.p.log_prob(s, x)
        return self.diffusion.beta * (self.log_z.to(x) + ratio)

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        s = self.diffusion.problem.s(t)
        return self.diffusion.beta * (self.tilted.score(s, x) - self.diffusion.p.score(s, x))


@dataclass(frozen=True)
class GuidedMixture:
    """Classes with classifier-free guidance, exact for every class and every guidance weight.

    Class c moves all means by shifts[c]; the null class leaves them. The shift is along directions in which every
    component has the same mean and the same variance, uncorrelated with the rest; there the score is linear and
    guidance, (1 - w) s(x) + w s(x | c), is the score of the mixture moved by w shifts[c]. cond: (B,) integer classes.
    """

    base: MixtureDiffusion
    shifts: Tensor
    rewards: tuple[Reward, ...]
    guidance: float = 1.0

    def __post_init__(self) -> None:
        data = self.base.data
        if len(self.rewards) != len(self.shifts):
            raise ValueError(f"rewards must be one for each of the {len(self.shifts)} classes, got {len(self.rewards)}")
        pull = torch.einsum("kde,cd->kce", torch.linalg.inv(data.C), self.shifts)
        level = torch.einsum("kce,ke->kc", pull, data.mu)
        variance = torch.einsum("kde,cd->kce", data.C, self.shifts)
        parallel = torch.einsum("kce,ce->kc", variance, self.shifts) / self.shifts.square().sum(1)
        same = all(torch.allclose(v, v[:1].expand_as(v)) for v in (pull, level))
        if not same or not torch.allclose(variance, parallel[..., None] * self.shifts):
            raise ValueError(
                "shifts must be along directions in which all components share mean and variance and which are "
                "uncorrelated with the rest: elsewhere a guided score is the score of no mixture"
            )

    @cached_property
    def classes(self) -> tuple[MixtureDiffusion, ...]:
        """The exact problem of each class at this guidance."""
        return tuple(
            replace(
                self.base, data=self.base.data.shifted(self.guidance * shift), reward=reward, start=self.base.initial
            )
            for shift, reward in zip(self.shifts, self.rewards, strict=True)
        )

    def _by_class(self, f: Any, cond: Tensor, *args: Tensor) -> Tensor:
        if cond is None or cond.dtype.is_floating_point or not bool(((cond >= 0) & (cond < len(self.classes))).all()):
            raise ValueError(f"cond must hold classes 0 ... {len(self.classes) - 1}")
        if len(cond) != len(args[-1]):
            raise ValueError(f"cond must hold one class for each of the {len(args[-1])} samples, got {len(cond)}")
        values = torch.stack([f(diffusion)(*args) for diffusion in self.classes])
        return values[cond, torch.arange(len(cond), device=cond.device)]

    def score(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """The guided reference, combined from the null class and the class as a guided network does, (B, d)."""
        s = self.base.problem.s(t)
        alpha = self.base.noising.alpha(s).to(x)[:, None]
        null = self.base.p.score(s, x)
        of_class = self.base.p.score(s, x - alpha * self.shifts.to(x)[cond])
        return null + self.guidance * (of_class - null)

    def reward(self, x: Tensor, cond: Any = None) -> Tensor:
        """r_c(x), (B,)."""
        return self._by_class(lambda d: d.reward, cond, x)

    @cached_property
    def problem(self) -> ScoreAsAction:
        """What an algorithm sees."""
        b = self.base
        return ScoreAsAction(
            noising=b.noising, reference=self.score, reward=self.reward, initial=b.initial,
            shape=b.problem.shape, beta=b.beta, eta=b.eta, s_min=b.s_min, s_max=b.s_max,
        )  # fmt: skip

    @cached_property
    def value(self) -> GuidedValue:
        """V*."""
        return GuidedValue(self)

    def optimal_policy(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """a*, (B, d)."""
        return self._by_class(lambda d: d.optimal_policy, cond, t, x)

    def J_optimal(self) -> Estimate:
        """J* over classes drawn evenly."""
        of_class = [d.J_optimal() for d in self.classes]  # on common samples: their errors may add up
        mean, stderr = (torch.stack([getattr(J, name) for J in of_class]).mean() for name in ("mean", "stderr"))
        return Estimate(mean, stderr, of_class[0].n)


@dataclass(frozen=True)
class GuidedValue(Critic):
    """V* of each sample's class."""

    guided: GuidedMixture

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.guided._by_class(lambda d: d.value.value, cond, t, x)

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.guided._by_class(lambda d: d.value.grad, cond, t, x)
