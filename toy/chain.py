"""Exact moments of a solver's discrete chain on a linear-Gaussian problem, without sampling.

On a linear problem with a linear policy every solver's step is affine in the state, in what it carries along and in
the noise:

    z_{k+1} = Phi_k z_k + b_k + Gamma_k xi_k,   z = (x, memory).

The step itself says what Phi, b and Gamma are: it is run on zero and on the basis vectors. So the moments are those of
the solver as it is used, and no formula is written twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl.gaussian import GaussianPolicy, Mean
from ctrl.problem import Problem
from ctrl.solvers import Act, Solver, held


@dataclass(frozen=True)
class AffineStep:
    """z_{k+1} = phi z_k + b + gamma xi_k; phi: (2d, 2d), b: (2d,), gamma: (2d, d) or, exploring, (2d, d + m)."""

    phi: Tensor
    b: Tensor
    gamma: Tensor


@dataclass(frozen=True)
class ChainMoments:
    """Of x_0 ... x_N: mean (N+1, d), covariance (N+1, d, d), and the steps that made them."""

    mean: Tensor
    covariance: Tensor
    steps: list[AffineStep]


def affine_steps(problem: Problem, policy: Mean | GaussianPolicy, times: Tensor, solver: Solver) -> list[AffineStep]:
    """The affine maps of the N steps of a grid (N+1,). As in `ctrl.rollout`, a `GaussianPolicy` explores."""
    (d,) = problem.shape
    mean = policy.mean if isinstance(policy, GaussianPolicy) else policy
    m = 0
    if isinstance(policy, GaussianPolicy):
        m = mean(times[:1], torch.zeros(1, d, dtype=torch.float64), None).shape[1]
    basis = torch.cat([torch.zeros(1, 3 * d + m), torch.eye(3 * d + m)]).double()
    x, memory, xi, exploration = basis.split([d, d, d, m], dim=1)

    def act(t: Tensor, x: Tensor) -> Tensor:
        return mean(t.expand(len(x)), x, None)

    steps = []
    for k, c in enumerate(solver.plan(problem, times)):
        a = act(times[k], x)
        stage: Act = act
        if isinstance(policy, GaussianPolicy):
            a = a + policy.root(times[k]).apply(exploration)
            stage = held(a)
        after = solver.step(problem, c, x, a, xi, stage, memory if k else None)
        carried = solver.carry(c, x, a)
        z = torch.cat([after, torch.zeros_like(after) if carried is None else carried], 1)
        columns = (z[1:] - z[0]).mT
        steps.append(AffineStep(columns[:, : 2 * d], z[0], columns[:, 2 * d :]))
    return steps


def chain_moments(
    problem: Problem, policy: Mean | GaussianPolicy, times: Tensor, solver: Solver, mean0: Tensor, cov0: Tensor
) -> ChainMoments:
    """Moments of the chain started at N(mean0, cov0); float64."""
    (d,) = problem.shape
    steps = affine_steps(problem, policy, times, solver)
    m = torch.cat([mean0, torch.zeros_like(mean0)])
    C = torch.block_diag(cov0, torch.zeros_like(cov0))
    means, covariances = [mean0], [cov0]
    for step in steps:
        m, C = step.phi @ m + step.b, step.phi @ C @ step.phi.mT + step.gamma @ step.gamma.mT
        means.append(m[:d])
        covariances.append(C[:d, :d])
    return ChainMoments(torch.stack(means), torch.stack(covariances), steps)
