"""Where along its paths is a reward decided?

Without running costs V(t, X_t) = E[r(X_T) | X_t] is a martingale under the policy whose value it is, so

    Var V(t, X_t) = Var V(0, X_0) + integral of E |S' grad V|² over [0, t]

grows from what start and condition decide to Var r, at the power of the signal that a policy gradient looks for. Two
completions r, r' of one state are independent given it: Var V(t, X_t) = Cov(r, r'), from values of the reward alone.

What is not decided yet, Var r - Var V(t, X_t), is the noise that is left to a critic of the state as a baseline; the
mean of a condition leaves Var r - Var V(0, X_0), one number for all leaves Var r. So a reward that is decided where the
condition is known asks for a baseline by condition, and one that is decided late in time asks for a critic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctrl.estimate import Estimate
from ctrl.gaussian import Mean
from ctrl.noise import Noise
from ctrl.problem import Problem
from ctrl.rollout import rollout
from ctrl.solvers import Solver


@torch.no_grad()
def complete(
    problem: Problem,
    policy: Mean,
    times: Tensor,
    nodes: Sequence[int],
    noise: Noise,
    ids: Tensor,
    *,
    solver: Solver,
    cond: Any = None,
) -> Tensor:
    """(1 + K, B): the reward of each sample's path, and of ends that are drawn once more from its states at `nodes`,
    numbers from 0 to N - 1 of the grid `times`."""
    path = rollout(problem, policy, times, noise, ids, solver=solver, cond=cond)
    rewards, anew = [problem.reward(path.x[-1], cond)], replace(noise, epoch=noise.epoch + 1)
    for k in nodes:
        again = rollout(problem, policy, times[k:], anew, ids, solver=solver, cond=cond, start=path.x[k])
        rewards.append(problem.reward(again.x[-1], cond))
    return torch.stack(rewards)


def decided_share(rewards: Tensor) -> Estimate:
    """Var V(t, X_t)/Var r at the nodes, (K,), from what `complete` returns.

    With m the mean of r and r', c = (r - m)(r' - m) and v = ½ (r - m)² + ½ (r' - m)² the share is E c/E v, and its
    standard error that of the mean of (c - share v)/E v.
    """
    first, again = rewards[:1], rewards[1:]
    m = (first + again).mean(1, keepdim=True) / 2
    c, v = (first - m) * (again - m), ((first - m).square() + (again - m).square()) / 2
    if not bool((v > 0).any(1).all()):
        raise ValueError("rewards must vary: all completions have the same reward")
    share = c.sum(1) / v.sum(1)
    error = Estimate.of(((c - share[:, None] * v) / v.mean(1, keepdim=True)).T)
    return Estimate(share, error.stderr, error.n)
