"""The controlled diffusion, and the two things it is here for: score as action, and anything else of the same form.

    dX = [b0(t, X) + B(t) a] dt + S(t) dW,   t in [0, T],
    J  = E[ e^{-rho T} r(X_T) - integral of e^{-rho t} c(t, X, a) dt ],
    c  = l(t, x) + ½ <a - a_ref(t, x), R(t) (a - a_ref(t, x))>  (- gamma Ent(pi) if the policy explores).

B, S and R are linear operators (a scalar or a matrix). The noise runs in its own clock, S(t) dW = L dW~(clock(t)) with
a constant L, so that increments carry the exact integral of S². With R = beta (S^-1 B)'(S^-1 B) the action's cost is
beta times the rate of path KL (Girsanov), and that is score as action (arXiv 2502.01819).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ctrl.gaussian import Mean
from ctrl.linop import LinOp, Scalar, broadcast, dot, same_shape
from ctrl.noise import INITIAL, Noise
from ctrl.noising import Noising

Initial = Callable[[Noise, Tensor, Any], Tensor]
"""initial(noise, ids: (B,), cond) -> X_0, (B, *D): the initial law, keyed by sample."""

Reward = Callable[[Tensor, Any], Tensor]
"""reward(x: (B, *D), cond) -> (B,)."""

Velocity = Callable[[Tensor, Tensor], Tensor]
"""velocity(x: (B, *D), a: (B, *D')) -> (B, *D)."""


class Problem(ABC):
    """A controlled diffusion with a quadratic price on actions. Times t are () or (B,); states x are (B, *D)."""

    horizon: float
    """T."""
    shape: Sequence[int]
    """*D."""
    initial: Initial
    """The law of X_0."""
    reference: Mean
    """a_ref(t, x, cond): the action that costs nothing."""
    reward: Reward
    """r(X_T, cond)."""
    gamma: float = 0.0
    """Entropy temperature of an exploratory policy, in units of reward per nat."""
    discount: float = 0.0
    """rho, per unit of time."""

    @abstractmethod
    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        """b0(t, x), (B, *D)."""

    @abstractmethod
    def control(self, t: Tensor) -> LinOp:
        """B(t)."""

    @abstractmethod
    def clock(self, t: Tensor) -> Tensor:
        """The noise's own clock, increasing from clock(0) = 0."""

    @abstractmethod
    def rate(self, t: Tensor) -> Tensor:
        """d clock / dt."""

    @property
    @abstractmethod
    def root(self) -> LinOp:
        """The constant L of S(t) dW = L dW~(clock)."""

    @abstractmethod
    def penalty(self, t: Tensor) -> LinOp:
        """R(t), symmetric positive definite."""

    def velocity(self, t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        """b0(t, x) + B(t) a."""
        return self.drift(t, x) + self.control(t).apply(a)

    def velocities(self, times: Tensor) -> Sequence[Velocity]:
        """The same at each of the times, (N+1,), as functions of x and a whose coefficients are at hand."""
        return [partial(self.velocity, t) for t in times.unbind()]

    def state_cost(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """l(t, x), (B,)."""
        return x.new_zeros(len(x))

    def endpoint(self, t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        """Where X_t = x ends under the action a held, as far as that is known without a simulation, (B, *D), right at
        t = T: the state itself, unless more is known."""
        return x

    @property
    def actions_are_free(self) -> bool:
        """Whether actions have no price, R = 0: then the reference does not matter."""
        return False

    @property
    def noiseless(self) -> bool:
        """Whether S = 0: then path laws are singular, and there is no KL between them."""
        return isinstance(self.root, Scalar) and bool(self.root.c == 0)

    def diffusion(self, t: Tensor) -> LinOp:
        """S(t) = sqrt(d clock/dt) L."""
        return self.root.scale(self.rate(t).sqrt())

    def running_cost(self, t: Tensor, x: Tensor, a: Tensor, a_ref: Tensor, cond: Any = None) -> Tensor:
        """c(t, x, a) without the entropy, (B,)."""
        same_shape(a=a, a_ref=a_ref)
        difference = a - a_ref
        return self.state_cost(t, x, cond) + dot(difference, self.penalty(t).apply(difference)) / 2

    def check_times(self, times: Tensor) -> None:
        """Raise unless times (N+1,) increase strictly within [0, T]."""
        if times.ndim != 1 or len(times) < 2 or not bool((times[1:] > times[:-1]).all()):
            raise ValueError("times must be a 1-D tensor of at least two strictly increasing values")
        if float(times[0]) < 0 or float(times[-1]) > self.horizon * (1 + 1e-6):
            raise ValueError(f"times must lie in [0, {self.horizon}], got [{float(times[0])}, {float(times[-1])}]")


@dataclass(frozen=True)
class IsotropicNormal:
    """The initial law N(0, std² I) that samplers start from."""

    shape: Sequence[int]
    std: float = 1.0

    def __call__(self, noise: Noise, ids: Tensor, cond: Any = None) -> Tensor:
        return self.std * noise.normal(ids, self.shape, INITIAL)


@dataclass(frozen=True)
class ScoreAsAction(Problem):
    """Sampling from a diffusion model as a control problem whose action is the score (arXiv 2502.01819).

    On the reverse clock t = s_max - s, with all coefficients at s:

        dY = [-f Y + kappa a] dt + eta g dW,   kappa = (1 + eta²) g²/2.

    If Y_0 ~ p_{s_max} and a is the score of X_s, the marginals are those of X_s at every eta >= 0; eta = 0 is the
    probability-flow ODE. J = E[r(Y_T)] - beta KL(P || P_ref), the KL between path laws (undiscounted, deterministic
    policy), so R = beta kappa²/(eta² g²) = beta (1 + eta²)² g²/(4 eta²).

    Attributes:
        noising: alpha, sigma, g² on the forward clock s.
        reference: the pretrained model's score s_ref(t, x, cond): (B,), (B, *D) -> (B, *D).
        reward: r(x, cond), (B, *D) -> (B,), at the data end s_min.
        initial: the law of Y_0; N(0, I) and p_{s_max} differ, and the difference is part of the problem.
        shape: D.
        beta: KL weight, in units of reward per nat; 0 for none.
        eta: how much noise the reverse process takes.
        s_min, s_max: where the problem is cut; lambda is finite in between.
        gamma, discount: as in `Problem`.
        error_gain: variance of a rounding error of the score over that of one network evaluation: the sum of squares
            of the weights with which evaluations are mixed into the score.
    """

    noising: Noising
    reference: Mean
    reward: Reward
    initial: Initial
    shape: Sequence[int]
    beta: float = 1.0
    eta: float = 1.0
    s_min: float = 1e-3
    s_max: float = 1.0
    gamma: float = 0.0
    discount: float = 0.0
    error_gain: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.s_min < self.s_max <= self.noising.s_max:
            raise ValueError(
                f"s_min and s_max must satisfy 0 <= s_min < s_max <= {self.noising.s_max}, "
                f"got {self.s_min}, {self.s_max}"
            )
        if float(self.noising.g2(torch.tensor(self.s_min, dtype=torch.float64))) <= 0:
            raise ValueError(f"s_min = {self.s_min}: g² vanishes there, and with it noise and control; take s_min > 0")
        for name, least in (("beta", 0.0), ("eta", 0.0), ("gamma", 0.0), ("discount", 0.0), ("error_gain", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")

    @property
    def horizon(self) -> float:  # type: ignore[override]
        """T = s_max - s_min."""
        return self.s_max - self.s_min

    @property
    def actions_are_free(self) -> bool:
        return self.beta == 0

    def s(self, t: Tensor) -> Tensor:
        """The forward time s = s_max - t, kept within [s_min, s_max] against rounding."""
        return (self.s_max - t).clamp(self.s_min, self.s_max)

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        return -broadcast(self.noising.f(self.s(t)), x) * x

    def kappa(self, t: Tensor) -> Tensor:
        """(1 + eta²) g²/2."""
        return (1 + self.eta**2) / 2 * self.noising.g2(self.s(t))

    def control(self, t: Tensor) -> LinOp:
        return Scalar(self.kappa(t))

    def velocities(self, times: Tensor) -> Sequence[Velocity]:
        """From numbers; of a subclass with a drift or a control of its own, from these."""
        if type(self).drift is not ScoreAsAction.drift or type(self).control is not ScoreAsAction.control:
            return super().velocities(times)
        drift, control = -self.noising.f(self.s(times)), self.kappa(times)
        return [partial(_linear, f, kappa) for f, kappa in zip(drift.tolist(), control.tolist(), strict=True)]

    def clock(self, t: Tensor) -> Tensor:
        return self.noising.int_g2(t.new_full((), self.s_max)) - self.noising.int_g2(self.s(t))

    def rate(self, t: Tensor) -> Tensor:
        return self.noising.g2(self.s(t))

    @property
    def root(self) -> LinOp:
        return Scalar(self.eta)

    def penalty(self, t: Tensor) -> LinOp:
        if self.eta == 0:
            raise ValueError("eta = 0 is an ODE: no path KL exists; take eta > 0, or ProbabilityFlow and its price")
        return Scalar(self.beta * (1 + self.eta**2) ** 2 / (4 * self.eta**2) * self.rate(t))

    def endpoint(self, t: Tensor, x: Tensor, a: Tensor) -> Tensor:
        """The Tweedie mean E[X_{s_min} | X_s = x] if a is the score there."""
        return self.noising.tweedie(self.s(t), x, a, self.s_min)


def _linear(f: float, kappa: float, x: Tensor, a: Tensor) -> Tensor:
    return x * f + a * kappa


@dataclass(frozen=True)
class ProbabilityFlow(ScoreAsAction):
    """Score as action without noise: eta = 0, where the KL between paths is infinite. beta weighs the score divergence,

        E of the integral of ½ (kappa²/g²) |a - a_ref|² dt,   R = beta kappa²/g² = beta g²/4,

    which is the KL that the same drift would cost if the noise were there.
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta != 0:
            raise ValueError(f"eta must be 0, got {self.eta}: with noise take ScoreAsAction")

    def penalty(self, t: Tensor) -> LinOp:
        return Scalar(self.beta / 4 * self.rate(t))
