"""Policy evaluation: what a critic regresses on.

For the policy a, along a trajectory whose actions were a_old (its own, or another's), Ito's formula for V gives, with
p = grad V,

    V(t_k, X_k) = r(X_T) - integral over [t_k, T] of [c(t, X, a) + <B (a_old - a), p>] dt - integral of <S' p, dW>,

path by path: the second term moves the drift from the old policy to the new, the third takes the noise out. So with
any p the stochastic integral costs no bias, and with p = grad V the target's variance vanishes with the step; off
policy p must be near grad V, for the second term has its error. At an optimum B'p = R (a - a_ref) (`policy_slope`):
then p needs no critic at all, the increments are beta d log(dP/dP_ref), and regressing on the target is path
consistency.

Over part of the path the critic's own values stand in for the rest: with delta_k = V_{k+1} - V_k - increment_k,

    target_k = V_k + sum_{j >= k} e^{-trace (t_j - t_k)/T} delta_j,

Monte Carlo at trace = 0 and TD(0) at trace = infinity: TD(lambda) with its decay per unit of time, not per step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctrl.gaussian import Gaussian
from ctrl.linop import Matrix, dot, same_shape
from ctrl.problem import Problem
from ctrl.qvalue import over_steps
from ctrl.rollout import Trajectory


def control_is_square(problem: Problem) -> bool:
    """Whether actions determine grad V at an optimum: B(t) is square."""
    B = problem.control(torch.zeros(1))
    return not isinstance(B, Matrix) or B.m.shape[-2] == B.m.shape[-1]


def policy_slope(problem: Problem, t: Tensor, a: Tensor, a_ref: Tensor) -> Tensor:
    """p with B'p = R (a - a_ref), (n, *D): grad V if the policy is greedy for its own value, as the optimum is."""
    same_shape(a=a, a_ref=a_ref)
    adjoint = problem.control(t).T
    if isinstance(adjoint, Matrix) and adjoint.m.shape[-1] != adjoint.m.shape[-2]:
        raise ValueError("actions do not determine grad V without a square B(t): take p from a critic")
    return adjoint.solve(problem.penalty(t).apply(a - a_ref))


def soft_cost(problem: Problem, t: Tensor, x: Tensor, a: Tensor, a_ref: Tensor, cond: Any = None) -> Tensor:
    """c of the policy N(a, gamma R^-1), (n,): with its entropy, and the price of its exploration, gamma dim/2."""
    cost = problem.running_cost(t, x, a, a_ref, cond)
    if not problem.gamma:
        return cost
    explored = Gaussian(a, problem.penalty(t).inverse_root().scale(problem.gamma**0.5))
    return cost + problem.gamma * (explored.dim / 2 - explored.entropy().to(cost))


def increments(
    problem: Problem, trajectory: Trajectory, a: Tensor, a_ref: Tensor, a_old: Tensor, p: Tensor, cond: Any = None
) -> Tensor:
    """What V loses over each step but for its own change, (N, B): the two integrals above, discounted to t = 0.

    a, a_ref, a_old: actions at the nodes, (N+1, B, *D'); p: (N+1, B, *D); cond: of the flattened nodes.
    """
    same_shape(a=a, a_ref=a_ref, a_old=a_old)
    same_shape(p=p, x=trajectory.x)
    n, batch = p.shape[:2]
    t, x, _ = trajectory.flat()
    slope, u, u_ref, u_old = (v.flatten(0, 1) for v in (p, a, a_ref, a_old))
    rate = soft_cost(problem, t, x, u, u_ref, cond) + dot(problem.control(t).apply(u_old - u), slope)
    decay = _discount(problem, trajectory, p)
    return over_steps(trajectory, decay * rate.reshape(n, batch)) + decay[:-1] * martingale(problem, trajectory, p)


def martingale(problem: Problem, trajectory: Trajectory, p: Tensor) -> Tensor:
    """The integral of <S' p, dW> over each step, (N, B), p (N+1, B, *D) taken at its left node; without noise, zero."""
    same_shape(p=p, x=trajectory.x)
    if problem.noiseless:
        return p.new_zeros(len(p) - 1, p.shape[1])
    if trajectory.xi is None:
        raise ValueError("trajectory has no noise increments xi: policy evaluation needs them")
    spread = problem.clock(trajectory.t).diff().sqrt().to(p)[:, None]
    pull = problem.root.adjoint(p[:-1].flatten(0, 1))
    return spread * dot(pull, trajectory.xi.flatten(0, 1)).view(len(trajectory.xi), -1)


def targets(problem: Problem, trajectory: Trajectory, value: Tensor | None, steps: Tensor, trace: float) -> Tensor:
    """The target at every node, (N+1, B). value: V of the critic at the nodes, (N+1, B), for trace > 0; steps: the
    `increments`, (N, B)."""
    if trajectory.reward is None:
        raise ValueError("trajectory has no reward: see Trajectory.reward")
    nodes = trajectory.x.flatten(2)[..., 0]
    same_shape(steps=steps, of_the_trajectory=nodes[1:])
    decay = _discount(problem, trajectory, steps)
    end = decay[-1] * trajectory.reward
    if trace == 0:
        spent = steps.flip(0).cumsum(0).flip(0)
        return torch.cat([end - spent, end[None]]) / decay
    if value is None:
        raise ValueError("value must be given: with trace > 0 the critic's values stand in for the rest of the path")
    same_shape(value=value, nodes=nodes)
    V = torch.cat([decay[:-1] * value[:-1], end[None]])
    delta = V.diff(dim=0) - steps
    kept = torch.exp(-trace * trajectory.t.diff() / problem.horizon).to(steps).tolist()
    total = torch.zeros_like(V)
    for k in range(len(delta) - 1, -1, -1):
        total[k] = delta[k] + kept[k] * total[k + 1]
    return (V + total) / decay


def _discount(problem: Problem, trajectory: Trajectory, like: Tensor) -> Tensor:
    """e^{-rho t_k}, (N+1, 1)."""
    return torch.exp(-problem.discount * trajectory.t.to(like))[:, None]
