"""q-values: advantage rates in continuous time, their greedy policy, and the martingale conditions that define them.

For a policy pi = N(s, Sigma) with value V (entropy included), Jia & Zhou (2023, arXiv 2207.00713) define

    q(t, x, a) = dV/dt + H(t, x, a, grad V, hess V) - rho V,

and with the quadratic price on actions of `ctrl.problem` it needs grad V alone, since q - gamma log pi averages to
zero over pi:

    q = <B (a - s), grad V> - ½ (|a - a_ref|²_R - |s - a_ref|²_R) + ½ tr(R Sigma) - gamma Ent(pi).

q is quadratic in a, so the soft-greedy policy, proportional to exp(q/gamma), is Gaussian:
N(a_ref + R^-1 B' grad V, gamma R^-1). Where V is optimal, q = gamma log pi*.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctrl.gaussian import Gaussian, GaussianPolicy
from ctrl.linop import LinOp, dot, same_shape
from ctrl.problem import Problem
from ctrl.rollout import Trajectory
from ctrl.value import Critic


def advantage_rate(
    problem: Problem, t: Tensor, a: Tensor, s: Tensor, a_ref: Tensor, grad_v: Tensor, root: LinOp | None = None
) -> Tensor:
    """q(t, x, a), (B,), of the policy N(s, L L'), L = `root`; without a root, of the deterministic policy s.

    t: (B,); a, s, a_ref: actions (B, *D'); grad_v: (B, *D), the gradient of the value of the policy itself.
    """
    B, R = problem.control(t), problem.penalty(t)
    same_shape(a=a, s=s, a_ref=a_ref)
    u, v, push = a - a_ref, s - a_ref, B.apply(a - s)
    same_shape(grad_v=grad_v, Ba=push)
    q = dot(push, grad_v) - (dot(u, R.apply(u)) - dot(v, R.apply(v))) / 2
    if root is None:
        return q
    policy = Gaussian(s, root)
    q = q + R.trace_of(root, policy.dim) / 2
    return q - problem.gamma * policy.entropy() if problem.gamma else q


def greedy(problem: Problem, t: Tensor, a_ref: Tensor, grad_v: Tensor) -> Tensor:
    """a_ref + R^-1 B' grad V, (B, *D): the action that maximises q. For score as action with eta = 1 and V = V*,
    s_ref + grad V*/beta."""
    step = problem.penalty(t).solve(problem.control(t).adjoint(grad_v))
    same_shape(a_ref=a_ref, step=step)
    return a_ref + step


def greedy_policy(problem: Problem, critic: Critic) -> GaussianPolicy:
    """The soft-greedy policy N(a_ref + R^-1 B' grad V, gamma R^-1): one step of policy iteration, and its fixed point
    is the optimum. Needs gamma > 0 for its density; its mean serves at gamma = 0."""

    def mean(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return greedy(problem, t, problem.reference(t, x, cond), critic.grad(t, x, cond))

    return GaussianPolicy(mean, lambda t: problem.penalty(t).inverse_root().scale(problem.gamma**0.5))


def martingale_residual(
    problem: Problem, trajectory: Trajectory, reward: Tensor, value: Tensor, cost: Tensor
) -> Tensor:
    """e^{-rho (T - t_k)} r(X_T) - integral of e^{-rho (u - t_k)} c du over [t_k, T] - V(t_k, X_k), (N+1, B).

    On policy it has mean zero given X_k, at every k, if and only if V is the policy's value (Jia & Zhou 2022). The
    integral is the trajectory's own quadrature. reward: r(X_T), (B,); value, cost: V and c (entropy included) at the
    nodes, (N+1, B).
    """
    same_shape(value=value, cost=cost, nodes=trajectory.x.flatten(2)[..., 0])
    same_shape(reward=reward, ids=trajectory.ids)
    if abs(float(trajectory.t[-1]) / problem.horizon - 1) > 1e-6:
        raise ValueError(
            f"trajectory ends at t = {float(trajectory.t[-1])}: its last state has no reward before {problem.horizon}"
        )
    decay = torch.exp(-problem.discount * trajectory.t.to(value))[:, None]
    spent = over_steps(trajectory, decay * cost).flip(0).cumsum(0).flip(0)
    return (decay[-1] * reward - torch.cat([spent, torch.zeros_like(spent[:1])])) / decay - value


def td_residual(problem: Problem, trajectory: Trajectory, value: Tensor, cost: Tensor) -> Tensor:
    """V_{k+1} - V_k - integral of (c + rho V) dt over a step, (N, B): the increment of the martingale, with the
    trajectory's own quadrature. value, cost: (N+1, B)."""
    same_shape(value=value, cost=cost, nodes=trajectory.x.flatten(2)[..., 0])
    return value.diff(dim=0) - over_steps(trajectory, cost + problem.discount * value)


def over_steps(trajectory: Trajectory, h: Tensor) -> Tensor:
    """The integral of h, (N+1, B), over each step, (N, B)."""
    left, right = trajectory.w.to(h)[..., None]
    return left * h[:-1] + right * h[1:]
