"""What gradient estimators expect, exactly: the moments of every solver's chain on a linear-Gaussian problem, and the
continuous-time answers to hold them against. No sampling, no training.

`discretization_error.py` says what each estimator is and prints what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ctrl import (
    DDIM,
    EulerMaruyama,
    Exact,
    Exponential,
    Heun,
    IntegratedEuler,
    Multistep2,
    Problem,
    ScoreAsAction,
    Solver,
    Trajectory,
    chain_kl,
)
from ctrl.gaussian import Mean
from ctrl.gradient import critic_slope, directions, surrogate
from ctrl.linop import cholesky
from ctrl.solvers import GaussianStep
from toy import catalogue
from toy.chain import ChainMoments, chain_moments
from toy.gaussian import GaussianDiffusion
from toy.lq import LQ, Array, Coefficients, LinearPolicy, QuadraticValue
from toy.scoreboard import Perturbed, perturbed

CALLS = (5, 10, 20, 40, 80, 160, 320)


@dataclass(frozen=True)
class Case:
    """A linear-Gaussian problem, the perturbed policy, and the continuous-time answers."""

    name: str
    kl: bool
    problem: Problem
    lq: LQ
    start: tuple[Tensor, Tensor]
    policy: LinearPolicy
    value: QuadraticValue
    gradient: Tensor

    @staticmethod
    def of(name: str, kl: bool = True) -> Case:
        """The catalogue's problem of that name; kl = False leaves the price on actions out."""
        entry = catalogue.get(name)
        exact, problem = entry.exact, entry.problem
        if isinstance(exact, GaussianDiffusion):
            lq, start = exact.lq, (exact.initial.mean, exact.initial.covariance)
        else:
            lq, start = exact.exact, (exact.mean0, exact.cov0)
        if not kl:
            assert isinstance(problem, ScoreAsAction)
            problem, lq = dataclasses.replace(problem, beta=0.0), without_price(lq)
        lq = dataclasses.replace(lq, gamma=0.0)  # the perturbed policy does not explore
        policy, features = perturbed(lq)
        gradient = torch.from_numpy(lq.grad_J(policy, features))
        return Case(name, kl, problem, lq, start, policy, lq.value(policy), gradient)

    def moments(self, solver: Solver, times: Tensor, policy: Mean | None = None) -> ChainMoments:
        """Of the solver's chain under the policy, differentiable in its parameters; by default the perturbed one, which
        is not."""
        policy = policy or Perturbed(self.problem).requires_grad_(False)
        return chain_moments(self.problem, policy, times, solver, *self.start)


def without_price(lq: LQ) -> LQ:
    """R = 0."""

    def at(t: Array) -> Coefficients:
        c = lq.at(t)
        return dataclasses.replace(c, R=0 * c.R)

    return dataclasses.replace(lq, at=at)


def points(mean: Tensor, covariance: Tensor) -> Tensor:
    """2d points with this mean and covariance, (n, d), (n, d, d) -> (n, 2d, d): they average any quadratic exactly."""
    columns = len(mean[0]) ** 0.5 * cholesky(covariance, "covariance").mT
    return mean[:, None] + torch.cat([columns, -columns], 1)


def trajectory(problem: Problem, solver: Solver, times: Tensor, chain: ChainMoments) -> Trajectory:
    """The chain's law at each node, as a trajectory of `points`."""
    x = points(chain.mean, chain.covariance)
    return Trajectory(t=times, x=x, a=None, xi=None, w=solver.quadrature(problem, times), ids=torch.arange(x.shape[1]))


# ------------------------------------------------------------------------------------------ what estimators expect


def expected(case: Case, path: Trajectory) -> Tensor:
    """E of the continuous-time estimator on these laws of the state: `ctrl.gradient`'s own code, on points."""
    policy = Perturbed(case.problem)
    slope = directions(case.problem, path, policy, critic_slope(case.value, path))
    (grad,) = torch.autograd.grad(surrogate(case.problem, path, policy, slope).mean(), policy.theta)
    return grad


def continuous(solver: Solver, case: Case, times: Tensor) -> Tensor:
    """At all nodes, or at any random subset of them."""
    return expected(case, trajectory(case.problem, solver, times, case.moments(solver, times)))


def exact_transitions(case: Case, times: Tensor) -> Tensor:
    """No error of the law: what is left is that of the trapezoid."""
    return continuous(Exact(case.lq.closed_loop(case.policy)), case, times)


def random_times(solver: Solver, case: Case, times: Tensor) -> Tensor:
    """One time in each step, at the same random place u in all: the mean over u by Gauss-Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    h, total = times.diff(), torch.zeros(2)
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        at = torch.cat([times[:1], times[:-1] + u * h])
        path = trajectory(case.problem, solver, at, case.moments(solver, at))
        right = dataclasses.replace(path, w=torch.stack([0 * h, h]))
        total = total + w * expected(case, right)
    return total


Cost = Callable[[Case, Solver, Trajectory, Mean], Tensor]


def by_quadrature(case: Case, solver: Solver, path: Trajectory, policy: Mean) -> Tensor:
    """The integral of the discounted c by the path's own quadrature, (B,)."""
    problem = case.problem

    def cost(t: Tensor, x: Tensor, cond: None) -> Tensor:
        decay = torch.exp(-problem.discount * t)
        return decay * problem.running_cost(t, x, policy(t, x, cond), problem.reference(t, x, cond), cond)

    return path.integrate(cost)


def girsanov(case: Case, solver: Solver, path: Trajectory, policy: Mean) -> Tensor:
    """The left sum of c with the exact integral of the noise's rate, (B,); on 2M, its own trapezoid in the clock."""
    if solver.multistep:
        return by_quadrature(case, solver, path, policy)
    span = case.problem.clock(path.t).diff() / case.problem.rate(path.t[:-1])
    return by_quadrature(case, solver, dataclasses.replace(path, w=torch.stack([span, 0 * span])), policy)


def own_kl(case: Case, solver: Solver, path: Trajectory, policy: Mean) -> Tensor:
    """beta times the KL of the chain's own transitions, (B,)."""
    assert isinstance(case.problem, ScoreAsAction) and isinstance(solver, GaussianStep)
    return case.problem.beta * chain_kl(case.problem, solver, path, policy)


def objective(solver: Solver, cost: Cost, case: Case, policy: Mean, times: Tensor) -> Tensor:
    """J as the N-step chain has it, (), differentiable in the policy's parameters."""
    problem = case.problem
    path = trajectory(problem, solver, times, case.moments(solver, times, policy))
    reward = torch.exp(-problem.discount * path.t[-1]) * problem.reward(path.x[-1], None)
    return (reward - cost(case, solver, path, policy)).mean()


def ddpo(solver: GaussianStep, cost: Cost, case: Case, times: Tensor) -> Tensor:
    """The gradient of the chain's own objective, by differentiating its exact moments."""
    policy = Perturbed(case.problem)
    (grad,) = torch.autograd.grad(objective(solver, cost, case, policy, times), policy.theta)
    return grad


def integrated(problem: Problem) -> GaussianStep:
    """Euler with integrated coefficients; those of a linear-quadratic problem are constant."""
    return IntegratedEuler() if isinstance(problem, ScoreAsAction) else EulerMaruyama()


def best_euler(case: Case, times: Tensor) -> Tensor:
    """DDPO on Euler's chain at its best."""
    return ddpo(integrated(case.problem), girsanov, case, times)


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator in expectation."""

    gradient: Callable[[Case, Tensor], Tensor]
    calls: int = 1
    """Network calls a step."""
    diffusion: bool = True
    """Defined for score as action alone."""
    most: int = CALLS[-1]
    """Calls beyond which it takes long."""


ESTIMATORS: dict[str, Estimator] = {
    "ddpo-euler-public": Estimator(partial(ddpo, EulerMaruyama(left_noise=True), own_kl)),
    "ddpo-ddim-public": Estimator(partial(ddpo, DDIM(), own_kl)),
    "ddpo-maruyama": Estimator(partial(ddpo, EulerMaruyama(), girsanov)),
    "ddpo-euler": Estimator(best_euler, diffusion=False),
    "ddpo-ddim": Estimator(partial(ddpo, DDIM(), girsanov)),
    "ddpo-2m": Estimator(partial(ddpo, Multistep2(), girsanov)),
    "Euler, left": Estimator(partial(continuous, EulerMaruyama()), diffusion=False),
    "DDIM, left": Estimator(partial(continuous, Exponential())),
    "Heun": Estimator(partial(continuous, Heun()), calls=2, diffusion=False),
    "2M": Estimator(partial(continuous, Multistep2())),
    "exact transitions": Estimator(exact_transitions, diffusion=False, most=40),
    "random times, Heun": Estimator(partial(random_times, Heun()), calls=2, diffusion=False),
}
