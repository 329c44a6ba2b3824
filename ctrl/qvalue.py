"""q-values: advantage rates in continuous time, their greedy policy, and the martingale conditions that define them.

For a policy pi = N(s, Sigma) with value V (entropy included), Jia & Zhou (2023, arXiv 2207.00713) define

    q(t, x, a) = dV/dt + H(t, x, a, grad V, hess V) - rho V,

and with the quadratic price on actions of `ctrl.problem` it needs grad V alone, since q averages to zero over pi:

    q = <B (a - s), grad V> - ½ (|a - a_ref|²_R - |s - a_ref|²_R) + ½ tr(R Sigma) - gamma Ent(pi).

q is quadratic in a, so the soft-greedy policy, proportional to exp(q/gamma), is Gaussian:
N(a_ref + R^-1 B' grad V, gamma R^-1). Where V is optimal, q = gamma log pi*.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctrl.gaussian import Gaussian, GaussianPolicy
from ctrl.linop import LinOp, dot
from ctrl.problem import Problem
from ctrl.rollout import Trajectory
from ctrl.value import Critic


def advantage_rate(
    problem: Problem, t: Tensor, a: Tensor, s: Tensor, a_ref: Tensor, grad_v: Tensor, root: LinOp | None = None
) -> Tensor:
    """q(t, x, a), (B,), of the policy N(s, L L'), L = `root`; without a root, of the deterministic policy s.

    t: (B,); a, s, a_ref: actions (B, *D'); grad_v: (B, *D), the gradient of the value of the policy itself.
    """
    if not a.shape == s.shape == a_ref.shape or len(grad_v) != len(a):
        raise ValueError(
            f"a, s and a_ref must agree in shape, and grad_v in length, got "
            f"{[tuple(v.shape) for v in (a, s, a_ref, grad_v)]}"
        )
    B, R = problem.control(t), problem.penalty(t)
    u, v = a - a_ref, s - a_ref
    q = dot(B.apply(a - s), grad_v) - (dot(u, R.apply(u)) - dot(v, R.apply(v))) / 2
    if root is None:
        return q
    policy = Gaussian(s, root)
    q = q + R.trace_of(root, policy.dim) / 2
    return q - problem.gamma * policy.entropy() if problem.gamma else q


def greedy(problem: Problem, t: Tensor, a_ref: Tensor, grad_v: Tensor) -> Tensor:
    """a_ref + R^-1 B' grad V, (B, *D): the action that maximises q. For score as action with eta = 1 and V = V*,
    s_ref + grad V*/beta."""
    return a_ref + problem.penalty(t).solve(problem.control(t).adjoint(grad_v))


def greedy_policy(problem: Problem, critic: Critic) -> GaussianPolicy:
    """The soft-greedy policy N(a_ref + R^-1 B' grad V, gamma R^-1): one step of policy iteration, and its fixed point
    is the optimum. Needs gamma > 0 for its density; its mean serves at gamma = 0."""

    def mean(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return greedy(problem, t, problem.reference(t, x, cond), critic.grad(t, x, cond))

    return GaussianPolicy(mean, lambda t: problem.penalty(t).inverse_root().scale(problem.gamma**0.5))


def martingale_residual(problem: Problem, trajectory: Trajectory, value: Tensor, cost: Tensor) -> Tensor:
    """e^{-rho (T - t_k)} r(X_T) - integral of e^{-rho (u - t_k)} c du over [t_k, T] - V(t_k, X_k), (N+1, B).

    On policy it has mean zero given X_k, at every k, if and only if V is the policy's value (Jia & Zhou 2022).
    value: V at the nodes, (N+1, B); cost: c at the nodes, entropy included, (N+1, B). Time-major trapezoid in t.
    """
    t = trajectory.t.to(value)[:, None]
    decay = torch.exp(-problem.discount * t)
    spent = torch.cumulative_trapezoid(decay * cost, t.expand_as(cost), dim=0)
    spent = torch.cat([torch.zeros_like(cost[:1]), spent])
    reward = problem.terminal_reward(trajectory.x[-1], trajectory.cond)
    return (decay[-1] * reward - (spent[-1] - spent)) / decay - value


def td_residual(problem: Problem, trajectory: Trajectory, value: Tensor, cost: Tensor) -> Tensor:
    """V_{k+1} - V_k - (c_k + rho V_k) dt_k, (N, B): the increment of the martingale, left point."""
    dt = trajectory.t.diff().to(value)[:, None]
    return value.diff(dim=0) - dt * (cost[:-1] + problem.discount * value[:-1])
