"""Solvers: one short step each, on any grid.

A solver plans the coefficients of all steps at once (`plan`), then takes them one by one (`step`). xi is the
standardised increment of the driving path over the step, so the noise carries the exact integral of g²; a = act(t_k,
x_k) is given, and `act` evaluates the policy at further stages. `memory` is what a multistep method carries along.

A solver whose step is Gaussian given the past (`GaussianStep`) says so by its `transition`; the density of a discrete
chain, and with it likelihood ratios, exists for these alone.

The exponential steps share one form. With x0hat = (x + sigma_0² a)/alpha_0, eps = -sigma_0 a and a variance v,

    x_1 = alpha_1 x0hat + sqrt(sigma_1² - v) eps + sqrt(v) xi                       (DDIM, arXiv 2010.02502)

    v = sigma_1² (1 - e^{-eta² dlambda})    : the SDE with this eta, x0hat frozen over the step
    v = ddim_eta² sigma_1² (1 - e^{-dlambda}): DDIM's own eta

which agree at eta = 0 and 1 only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from ctrl import grids
from ctrl.gaussian import Gaussian
from ctrl.linop import LinOp, Matrix, Scalar, broadcast
from ctrl.problem import Problem, ScoreAsAction, Velocity

Act = Callable[[Tensor, Tensor], Tensor]
"""act(t: (), x: (B, *D)) -> (B, *D)."""


def held(a: Tensor) -> Act:
    """An action drawn once and kept over the step."""
    return lambda t, x: a


class Solver(ABC):
    """One step of a numerical method."""

    calls: ClassVar[int] = 1
    """Policy evaluations a step."""
    multistep: ClassVar[bool] = False
    """Whether `carry` hands anything on."""

    def quadrature(self, problem: Problem, times: Tensor) -> Tensor:
        """The quadrature weights, (2, N), whose order matches the method's weak order."""
        return grids.left(problem, times)

    @abstractmethod
    def plan(self, problem: Problem, times: Tensor) -> list[Any]:
        """The coefficients of the N steps of a grid (N+1,)."""

    @abstractmethod
    def step(
        self, problem: Problem, c: Any, x: Tensor, a: Tensor, xi: Tensor, act: Act, memory: Tensor | None
    ) -> Tensor:
        """x_{k+1} from x_k, a_k = act(t_k, x_k) and what the step before carried along (None at the first)."""

    def carry(self, c: Any, x: Tensor, a: Tensor) -> Tensor | None:
        """What step k hands to step k + 1: nothing, for a one-step method."""
        return None


class GaussianStep(Solver):
    """A solver whose x_{k+1} is Gaussian given the past."""

    @abstractmethod
    def transition(self, problem: Problem, c: Any, x: Tensor, a: Tensor, memory: Tensor | None) -> Gaussian:
        """The law of x_{k+1}."""

    def step(
        self, problem: Problem, c: Any, x: Tensor, a: Tensor, xi: Tensor, act: Act, memory: Tensor | None
    ) -> Tensor:
        return self.transition(problem, c, x, a, memory).sample(xi)


def stack_steps(plan: list[Any], device: torch.device) -> Any:
    """The coefficients of all N steps as one: each is (N,)."""

    def column(values: list[Any]) -> Any:
        if isinstance(values[0], Scalar):
            return Scalar(column([v.c for v in values]))
        if isinstance(values[0], Matrix):
            return Matrix(torch.stack([v.m for v in values]).to(device))
        stacked = torch.stack(values) if isinstance(values[0], Tensor) else torch.tensor(values, dtype=torch.float64)
        return stacked.to(device)

    return type(plan[0])(*(column([getattr(c, f.name) for c in plan]) for f in fields(plan[0])))


def at_steps(steps: Any, k: Tensor) -> Any:
    """Those of steps k, (n,), so that `transition` takes shuffled steps at once."""

    def pick(v: Any) -> Any:
        if isinstance(v, Scalar):
            return Scalar(pick(v.c))
        return Matrix(v.m[k]) if isinstance(v, Matrix) else v[k]

    return type(steps)(*(pick(getattr(steps, f.name)) for f in fields(steps)))


def _add(x: Tensor, v: Tensor, c: float | Tensor) -> Tensor:
    """x + c v, c a number or (B,)."""
    return x + broadcast(c, v) * v if isinstance(c, Tensor) else torch.add(x, v, alpha=c)


@dataclass(frozen=True)
class _EulerStep:
    t: Tensor
    dt: float | Tensor
    root: LinOp


def _euler_plan(problem: Problem, times: Tensor, variance: Tensor) -> list[_EulerStep]:
    dt, spread = times.diff().tolist(), variance.sqrt().tolist()
    return [_EulerStep(t, h, problem.root.scale(w)) for t, h, w in zip(times[:-1].unbind(), dt, spread, strict=True)]


@dataclass(frozen=True)
class EulerMaruyama(GaussianStep):
    """x_{k+1} = x_k + dt (b0 + B a) + L dW~. Weak and (additive noise) strong order 1. With `left_noise` the variance
    is g²(t_k) dt, as in public codes, in place of the integral of g²."""

    left_noise: bool = False

    def plan(self, problem: Problem, times: Tensor) -> list[_EulerStep]:
        exact = problem.clock(times).diff()
        return _euler_plan(problem, times, problem.rate(times[:-1]) * times.diff() if self.left_noise else exact)

    def transition(self, problem: Problem, c: _EulerStep, x: Tensor, a: Tensor, memory: Tensor | None) -> Gaussian:
        return Gaussian(_add(x, problem.velocity(c.t, x, a), c.dt), c.root)


@dataclass(frozen=True)
class _IntegratedStep:
    drift: float | Tensor
    control: float | Tensor
    root: LinOp


@dataclass(frozen=True)
class IntegratedEuler(GaussianStep):
    """x_{k+1} = x_k + <b0> + <B> a + L dW~ for score as action, with the integrals of f and kappa over the step in
    place of their left values times dt. Weak order 1, with a smaller error than Euler's where g² is steep."""

    def plan(self, problem: Problem, times: Tensor) -> list[_IntegratedStep]:
        diffusion = _diffusion(problem, self)
        span, log_alpha = problem.clock(times).diff(), diffusion.noising.log_alpha(diffusion.s(times))
        columns = (log_alpha.diff(), (1 + diffusion.eta**2) / 2 * span, span.sqrt())
        drift, control, spread = (v.tolist() for v in columns)
        return [
            _IntegratedStep(f, kappa, problem.root.scale(w)) for f, kappa, w in zip(drift, control, spread, strict=True)
        ]

    def transition(self, problem: Problem, c: _IntegratedStep, x: Tensor, a: Tensor, memory: Tensor | None) -> Gaussian:
        return Gaussian(_add(_add(x, x, c.drift), a, c.control), c.root)


@dataclass(frozen=True)
class _HeunStep:
    first: Velocity
    second: Velocity
    dt: float | Tensor
    t_next: Tensor
    root: LinOp


@dataclass(frozen=True)
class Heun(Solver):
    """x' = Euler's step; x_{k+1} = x_k + dt/2 [F(t_k, x_k) + F(t_{k+1}, x')] + L dW~, F = b0 + B a.

    Weak order 2 for additive noise when dW~ carries the exact integral of g²; strong order 1. No transition density.
    """

    calls: ClassVar[int] = 2

    def quadrature(self, problem: Problem, times: Tensor) -> Tensor:
        return grids.trapezoid(problem, times)

    def plan(self, problem: Problem, times: Tensor) -> list[_HeunStep]:
        euler, velocities = _euler_plan(problem, times, problem.clock(times).diff()), problem.velocities(times)
        return [
            _HeunStep(first, second, c.dt, t_next, c.root)
            for (first, second), c, t_next in zip(pairwise(velocities), euler, times[1:].unbind(), strict=True)
        ]

    def step(
        self, problem: Problem, c: _HeunStep, x: Tensor, a: Tensor, xi: Tensor, act: Act, memory: Tensor | None
    ) -> Tensor:
        first = c.first(x, a)
        start = x + c.root.apply(xi)
        ahead = _add(start, first, c.dt)
        second = c.second(ahead, act(c.t_next, ahead))
        return _add(start, first + second, c.dt / 2)


@dataclass(frozen=True)
class _ExponentialStep:
    from_x: float | Tensor
    from_a: float | Tensor
    root: Scalar


class _Exponential(GaussianStep):
    """x_1 = alpha_1 x0hat + rho sigma_1 eps + sigma_1 sqrt(1 - rho²) xi, rho the part of eps that is kept."""

    @abstractmethod
    def log_kept(self, problem: ScoreAsAction, dlambda: Tensor) -> Tensor:
        """log rho, rho² = 1 - v/sigma_1²."""

    def plan(self, problem: Problem, times: Tensor) -> list[_ExponentialStep]:
        diffusion = _diffusion(problem, self)
        alpha, sigma, dlambda = _schedule(diffusion, times)
        log_rho = self.log_kept(diffusion, dlambda)
        from_x = alpha[1:] / alpha[:-1]
        from_a = -from_x * sigma[:-1].square() * torch.expm1(log_rho - dlambda / 2)
        spread = sigma[1:] * (-torch.expm1(2 * log_rho)).sqrt()
        return [
            _ExponentialStep(cx, ca, Scalar(w))
            for cx, ca, w in zip(from_x.tolist(), from_a.tolist(), spread.tolist(), strict=True)
        ]

    def transition(
        self, problem: Problem, c: _ExponentialStep, x: Tensor, a: Tensor, memory: Tensor | None
    ) -> Gaussian:
        return Gaussian(_add(Scalar(c.from_x).apply(x), a, c.from_a), c.root)


@dataclass(frozen=True)
class Exponential(_Exponential):
    """The SDE's first-order exponential step: exact in the linear part, x0hat frozen. Uses the problem's eta."""

    def log_kept(self, problem: ScoreAsAction, dlambda: Tensor) -> Tensor:
        return -(problem.eta**2) / 2 * dlambda if problem.eta else torch.zeros_like(dlambda)  # dlambda may be infinite


@dataclass(frozen=True)
class DDIM(_Exponential):
    """DDIM's step with its own ddim_eta in [0, 1] (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16)."""

    ddim_eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ddim_eta <= 1:
            raise ValueError(f"ddim_eta must lie in [0, 1], got {self.ddim_eta}")

    def log_kept(self, problem: ScoreAsAction, dlambda: Tensor) -> Tensor:
        return torch.log1p(self.ddim_eta**2 * torch.expm1(-dlambda)) / 2


@dataclass(frozen=True)
class _MultistepStep:
    tweedie_x: float | Tensor
    tweedie_a: float | Tensor
    from_x: float | Tensor
    from_x0: float | Tensor
    extrapolate: float | Tensor
    root: Scalar


@dataclass(frozen=True)
class Multistep2(GaussianStep):
    """2M: SDE-DPM-Solver++(2M) at any eta, weak order 2 with one call a step (Lu et al. 2022, arXiv 2211.01095).

    x_1 = (sigma_1/sigma_0) e^{-eta² dl/2} x + alpha_1 (1 - e^{-(1+eta²) dl/2}) D + sigma_1 sqrt(1 - e^{-eta² dl}) xi,
    D = x0hat + (dl/(2 dl_-)) (x0hat - x0hat_-), dl the step in lambda, minus the step before. Gaussian given (x_k,
    x_{k-1}).
    """

    multistep: ClassVar[bool] = True

    def quadrature(self, problem: Problem, times: Tensor) -> Tensor:
        return grids.clock_trapezoid(problem, times)

    def plan(self, problem: Problem, times: Tensor) -> list[_MultistepStep]:
        diffusion = _diffusion(problem, self)
        alpha, sigma, dlambda = _schedule(diffusion, times)
        if not bool(torch.isfinite(dlambda).all()):
            raise ValueError("2M extrapolates in log-SNR, which must be finite at both ends: take s_min > 0")
        noise = diffusion.eta**2 * dlambda
        extrapolate = torch.cat([dlambda.new_zeros(1), dlambda[1:] / (2 * dlambda[:-1])])
        columns = (
            1 / alpha[:-1],
            sigma[:-1].square() / alpha[:-1],
            sigma[1:] / sigma[:-1] * torch.exp(-noise / 2),
            -alpha[1:] * torch.expm1(-(dlambda + noise) / 2),
            extrapolate,
            sigma[1:] * (-torch.expm1(-noise)).sqrt(),
        )
        return [
            _MultistepStep(x, a, kept, x0, e, Scalar(w)) for x, a, kept, x0, e, w in torch.stack(columns, 1).tolist()
        ]

    def transition(self, problem: Problem, c: _MultistepStep, x: Tensor, a: Tensor, memory: Tensor | None) -> Gaussian:
        x0hat = self.carry(c, x, a)
        target = x0hat if memory is None else _add(x0hat, x0hat - memory, c.extrapolate)
        return Gaussian(_add(Scalar(c.from_x).apply(x), target, c.from_x0), c.root)

    def carry(self, c: _MultistepStep, x: Tensor, a: Tensor) -> Tensor:
        """x0hat."""
        return _add(Scalar(c.tweedie_x).apply(x), a, c.tweedie_a)


def _diffusion(problem: Problem, solver: Solver) -> ScoreAsAction:
    if not isinstance(problem, ScoreAsAction):
        raise ValueError(f"solver {type(solver).__name__} needs a ScoreAsAction problem, got {type(problem).__name__}")
    return problem


def _schedule(problem: ScoreAsAction, times: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma (N+1,) and the steps in lambda (N,)."""
    s = problem.s(times)
    return problem.noising.alpha(s), problem.noising.sigma(s), problem.noising.log_snr(s).diff()


@dataclass(frozen=True)
class LinearStep:
    """x_1 = phi x + shift + L xi; phi: (d, d), shift: (d,)."""

    phi: Tensor
    shift: Tensor
    root: LinOp


@dataclass(frozen=True)
class Exact(Solver):
    """The exact transitions of a linear-Gaussian closed loop, exact in law on any grid.

    `between(t0, t1)` is the transition of the problem *with its policy built in* (for example `toy.lq.LQ.closed_loop`):
    give `rollout` that same policy; it is called for the record, and does not steer. Not for exploring policies.
    """

    between: Callable[[float, float], LinearStep]

    def quadrature(self, problem: Problem, times: Tensor) -> Tensor:
        return grids.trapezoid(problem, times)

    def plan(self, problem: Problem, times: Tensor) -> list[LinearStep]:
        return [self.between(t0, t1) for t0, t1 in pairwise(times.tolist())]

    def step(
        self, problem: Problem, c: LinearStep, x: Tensor, a: Tensor, xi: Tensor, act: Act, memory: Tensor | None
    ) -> Tensor:
        return Gaussian(Matrix(c.phi).apply(x) + c.shift.to(x), c.root).sample(xi)
