"""Gaussian data N(mu, C) under score as action, with r(x) = -½ x'Gx + h'x + r0: in closed form for every eta > 0.

X_s has covariance V_s = alpha² C + sigma² I and score -V_s^-1 (x - alpha mu). Under this reference the reverse process
of the eta family is linear, and because d log(V_s/alpha²)/ds = g² V_s^-1 its transition to the data end s_min
integrates to

    Y_T | Y_t = y ~ N(alpha_m mu + rho (V_m/V_s)^½ (y - alpha_s mu), (1 - rho²) V_m),
    rho = [(C + e^{-lambda_m})/(C + e^{-lambda_s})]^{eta²/2},

all matrices functions of C. Hence V*(t, y) = beta log E[e^{r(Y_T)/beta} | Y_t = y] is a Gaussian integral, and so is
the law that the optimal control leaves at T from any Gaussian start: the tilted law is reached only as rho -> 0
(memoryless noise), and rho = 1 changes nothing (the value-function bias; Domingo-Enrich et al. 2024, arXiv 2409.08861).

The same problem is linear-quadratic in u = a - s_ref; `lq` states it so, and the two routes must agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl.linop import cholesky
from ctrl.noise import INITIAL, Noise
from ctrl.noising import Noising
from ctrl.problem import ScoreAsAction
from ctrl.value import Critic
from toy.lq import LQ, Array, Coefficients, LinearPolicy, remembered


@dataclass(frozen=True)
class QuadraticReward:
    """r(x) = -½ x'Gx + h'x + r0; G: (d, d) symmetric, h: (d,)."""

    G: Tensor
    h: Tensor
    r0: float = 0.0

    def __post_init__(self) -> None:
        if self.G.shape != (len(self.h), len(self.h)) or not torch.allclose(self.G, self.G.mT):
            raise ValueError(f"G must be symmetric of shape {(len(self.h), len(self.h))}, got {tuple(self.G.shape)}")

    def __call__(self, x: Tensor, cond: Any = None) -> Tensor:
        return -((x @ self.G.to(x)) * x).sum(-1) / 2 + x @ self.h.to(x) + self.r0


@dataclass(frozen=True)
class GaussianLaw:
    """N(mean, covariance) as an initial law."""

    mean: Tensor
    covariance: Tensor

    def __call__(self, noise: Noise, ids: Tensor, cond: Any = None) -> Tensor:
        root = cholesky(self.covariance, "covariance").to(ids.device)
        return self.mean.to(ids.device) + noise.normal(ids, self.mean.shape, INITIAL) @ root.mT


@dataclass(frozen=True)
class GaussianDiffusion:
    """Data N(mu, C), a quadratic reward, and the score-as-action problem between s_max and s_min."""

    noising: Noising
    mu: Tensor
    C: Tensor
    reward: QuadraticReward
    beta: float = 1.0
    eta: float = 1.0
    s_min: float = 1e-3
    s_max: float = 1.0
    start: GaussianLaw | None = None
    """The initial law; p_{s_max} by default."""

    def __post_init__(self) -> None:
        cholesky(self.C, "C")
        if self.mu.shape != (len(self.C),) or self.reward.h.shape != self.mu.shape:
            raise ValueError(
                f"mu and reward.h must have shape {(len(self.C),)}, got {tuple(self.mu.shape)} and "
                f"{tuple(self.reward.h.shape)}"
            )
        _, _, w = self.transition(torch.tensor(self.s_max, dtype=torch.float64))  # the widest posterior of Y_T
        G, _ = self._reward(w)
        if float(torch.linalg.eigvalsh(torch.eye(len(w)) + w.sqrt()[:, None] * G * w.sqrt()).min()) <= 0:
            raise ValueError(
                "reward.G: E[e^{r/beta} | Y_0] is infinite: posterior precision + G/beta must be positive definite"
            )

    @cached_property
    def axes(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues c (d,) and axes U (d, d) of C."""
        c, U = torch.linalg.eigh(self.C)
        return c, U

    def variances(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(s), (B, 1), and the eigenvalues of V_s, (B, d)."""
        alpha, sigma = self.noising.alpha(s)[..., None], self.noising.sigma(s)[..., None]
        return alpha, alpha.square() * self.axes[0].to(s) + sigma.square()

    def marginal(self, s: float) -> GaussianLaw:
        """p_s = N(alpha mu, V_s)."""
        alpha, v = self.variances(torch.tensor(s, dtype=torch.float64))
        return GaussianLaw(alpha * self.mu, (self.axes[1] * v) @ self.axes[1].mT)

    def score(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """-V_s^-1 (x - alpha mu) at s = s_max - t, (B, d)."""
        alpha, v = self.variances(self.problem.s(t).to(x.dtype))
        U = self.axes[1].to(x)
        return -(((x - alpha * self.mu.to(x)) @ U) / v) @ U.mT

    @cached_property
    def initial(self) -> GaussianLaw:
        """The law of Y_0."""
        return self.start or self.marginal(self.s_max)

    @cached_property
    def problem(self) -> ScoreAsAction:
        """What an algorithm sees."""
        return ScoreAsAction(
            noising=self.noising, reference=self.score, reward=self.reward, initial=self.initial,
            shape=tuple(self.mu.shape), beta=self.beta, eta=self.eta, s_min=self.s_min, s_max=self.s_max,
        )  # fmt: skip

    def transition(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(phi, shift, variance) of Y_T | Y = y at s under the reference: N(phi y + shift, variance) in U's basis,
        (B, d)."""
        end = s.new_full((), self.s_min)
        alpha, v = self.variances(s)
        alpha_m, v_m = self.variances(end)
        relative = (v_m / alpha_m.square()) / (v / alpha.square())
        rho = relative.clamp(max=1.0) ** (self.eta**2 / 2)
        phi = rho * (v_m / v).sqrt()
        mu = self.mu.to(s) @ self.axes[1].to(s)
        return phi, alpha_m * mu - phi * alpha * mu, v_m * (1 - rho.square())

    def tilted(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(Phi, shift, covariance) of the optimally controlled Y_T | Y = y at s: (B, d, d), (B, d), (B, d, d).

        p(y_T | y) e^{r/beta}, with W the reference's covariance: covariance (W^-1 + G/beta)^-1 = (I + W G/beta)^-1 W.
        """
        (phi, shift, w), (G, h), U = self.transition(s), self._reward(s), self.axes[1].to(s)
        inverse = torch.linalg.inv(torch.eye(len(h), dtype=s.dtype, device=s.device) + w[..., None] * G)
        Phi = U @ (inverse * phi[..., None, :]) @ U.mT
        b = (inverse @ (shift + w * h)[..., None])[..., 0] @ U.mT
        return Phi, b, U @ (inverse * w[..., None, :]) @ U.mT

    def _reward(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """G/beta and h/beta in the axes of C."""
        U = self.axes[1]
        return (U.mT @ self.reward.G @ U / self.beta).to(like), (self.reward.h @ U / self.beta).to(like)

    @cached_property
    def value(self) -> GaussianValue:
        """V*."""
        self._check_noise()
        return GaussianValue(self)

    def optimal_policy(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """a* = s_ref + (2 eta²/(beta (1 + eta²))) grad V*."""
        gain = 2 * self.eta**2 / (self.beta * (1 + self.eta**2))
        return self.score(t, x) + gain * self.value.grad(t, x)

    def _check_noise(self) -> None:
        if self.eta == 0:
            raise ValueError("eta = 0 is an ODE: neither path KL nor V* exists; take eta > 0")

    def optimal_law(self) -> GaussianLaw:
        """The law of Y_T under the optimal control, from the problem's initial law."""
        Phi, b, W = self.tilted(torch.tensor(self.s_max, dtype=torch.float64))
        start = self.initial
        covariance = Phi @ start.covariance @ Phi.mT + W
        return GaussianLaw(Phi @ start.mean + b, (covariance + covariance.mT) / 2)

    def tilted_data(self) -> GaussianLaw:
        """p_{s_min} e^{r/beta} / Z: where a memoryless process arrives."""
        data = self.marginal(self.s_min)
        precision = torch.linalg.inv(data.covariance)
        covariance = torch.linalg.inv(precision + self.reward.G / self.beta)
        return GaussianLaw(covariance @ (precision @ data.mean + self.reward.h / self.beta), covariance)

    @cached_property
    def lq(self) -> LQ:
        """The same problem as linear-quadratic control in matrices."""
        U, mu, eta2 = self.axes[1], self.mu @ self.axes[1], self.eta**2

        def at(t: Array) -> Coefficients:
            s = torch.from_numpy(np.clip(self.s_max - t, self.s_min, self.s_max))
            alpha, v = self.variances(s)
            g2 = self.noising.g2(s).numpy()[:, None, None] * np.eye(len(mu))
            return Coefficients(
                A=-self.noising.f(s).numpy()[:, None, None] * np.eye(len(mu)),
                B=(1 + eta2) / 2 * g2,
                d=np.zeros((len(t), len(mu))),
                SS=eta2 * g2,
                Q=0 * g2,
                R=self.beta * (1 + eta2) ** 2 / (4 * eta2) * g2 if eta2 else np.full_like(g2, np.inf),
                K_ref=(-(U / v[:, None, :]) @ U.mT).numpy(),
                k_ref=((alpha * mu / v) @ U.mT).numpy(),
            )

        start = self.initial
        return LQ(
            remembered(at),
            G=self.reward.G.numpy(),
            h=self.reward.h.numpy(),
            r0=self.reward.r0,
            mean0=start.mean.numpy(),
            cov0=start.covariance.numpy(),
            horizon=self.s_max - self.s_min,
        )

    def perturbed(self, K: float, k: float) -> LinearPolicy:
        """A policy that is not optimal: s_ref + K (t/T) x + k, for checks of estimators."""
        reference, T, identity = self.lq.reference, self.lq.horizon, np.eye(len(self.mu))
        return LinearPolicy(
            K=lambda t: reference.K(t) + K * (t / T)[:, None, None] * identity, k=lambda t: reference.k(t) + k
        )


@dataclass(frozen=True)
class GaussianValue(Critic):
    """V*(t, y) = beta log E[e^{r(Y_T)/beta} | Y_t = y], a Gaussian integral. With Y_T ~ N(m, W), everything over beta,

    V* = ½ (h'm + h'v - m'Gv) - ½ log det A + r0,   A = I + WG,   v = A^-1 (m + Wh) the mean of the tilted law.
    """

    diffusion: GaussianDiffusion

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        p, (s, of) = self.diffusion, self._times(t, x)
        (phi, shift, w), (G, h) = p.transition(s), p._reward(s)
        U = p.axes[1].to(x)
        log_det = torch.linalg.slogdet(torch.eye(len(h), dtype=s.dtype, device=s.device) + w[..., None] * G).logabsdet
        m, v = phi[of] * (x @ U) + shift[of], self._tilted_mean(s, of, x) @ U
        return p.beta * ((h * (m + v) - (m @ G) * v).sum(-1) - log_det[of]) / 2 + p.reward.r0

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """E of grad r under the tilted law, pulled back: phi (h - G v), (B, d)."""
        p, (s, of) = self.diffusion, self._times(t, x)
        U = p.axes[1].to(x)
        slope = p.reward.h.to(x) - self._tilted_mean(s, of, x) @ p.reward.G.to(x)
        return (p.transition(s)[0][of] * (slope @ U)) @ U.mT

    def _tilted_mean(self, s: Tensor, of: Tensor, x: Tensor) -> Tensor:
        Phi, b, _ = self.diffusion.tilted(s)
        return (Phi[of] @ x[..., None])[..., 0] + b[of]

    def _times(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct forward times and which of them each sample has: in a rollout there is one."""
        return torch.unique(self.diffusion.problem.s(t).to(x.dtype), return_inverse=True)
