"""Path consistency: the optimum is where a residual vanishes on every path, whoever made it (Nachum et al. 2017, arXiv
1702.08892, for soft Bellman equations; here in continuous time).

V* = beta log E_ref[e^{r/beta}] and the path measure tilted by e^{r/beta} give, almost surely and at every t,

    r(X_T) - V*(t, X_t) - beta log (dP*/dP_ref)[t, T] = 0.

With the state's own cost, a discount, or an action's cost that is not a KL, the third term is what `increments` sums
up over [t, T], with p = `policy_slope` in place of grad V. So V and the policy share the squares of the residuals

    delta_k = r(X_T) - V(t_k, X_k) - sum of the increments of a_theta over [t_k, T]

on replayed trajectories, and need the values of the reward alone. V regresses on its target, delta_k + V. The policy
follows minus the mean over k <= j of delta_k, times the derivative of increment j, summed over j: of the gradient of
the squares this differs in what node j weighs, where they have its rank, j + 1, and vanishes where they do. On policy
delta_k is the integral of <S'(grad V - p), dW> over [t_k, T] if V is the policy's value, and the derivative of
increment j is <S'(dp/dtheta), dW_j>; hence, with the price beta of a nat divided out, it is the policy gradient.

Two passes make this exact in any micro-batches: residuals of whole trajectories without a graph, then single nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl.algorithms.actor_critic import critic_loss
from ctrl.algorithms.base import Algorithm, Context, Update, check_critic, check_noise, check_price
from ctrl.evaluation import control_is_square, increments, policy_slope, soft_cost, targets
from ctrl.fields import Count
from ctrl.gaussian import Mean
from ctrl.grids import node_weights
from ctrl.linop import dot
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem
from ctrl.regularize import kl_rate
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class PathConsistency(Algorithm):
    """
    Attributes:
        updates: optimiser steps of policy and critic an epoch.
        paths: trajectories each sees, over all processes.
        keep: epochs of trajectories kept.
    """

    updates: Count = 80
    paths: Count = 64
    keep: Count = 40
    learns_value: ClassVar[bool] = True

    def learn(self, run: Context) -> Iterator[Update]:
        run.record_actions()
        paths = min(self.paths, run.samples)
        for collection in run.path_minibatches(self.updates, paths):
            if collection.samples:
                self.attach_residuals(run, collection, paths)
            else:  # what the other processes call
                run.count("network_calls", 2 * paths * (collection.steps + 1))
            nodes, size = run.nodes(collection, range(collection.steps + 1)), paths * (collection.steps + 1)
            yield Update("policy", lambda n: policy_loss(run.problem, run.policy, n), nodes, size)
            yield Update("critic", lambda n: critic_loss(run.critic, n), nodes, size)

    def attach_residuals(self, run: Context, collection: Collection, paths: int) -> None:
        """Beside each node: V's target, and what the policy's h and p there are multiplied by."""
        problem, path = run.problem, collection.trajectory
        a, a_ref = run.at_nodes(run.policy, collection, samples=paths), collection.fields["a_ref"]
        t, _, ids = path.flat()
        p = policy_slope(problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).reshape(path.x.shape)
        steps = increments(problem, path, a, a_ref, collection.fields["a_old"], p, run.conditions(ids))
        target = targets(problem, path, None, steps, trace=0)
        decay = torch.exp(-problem.discount * path.t).to(target)[:, None]
        residual = decay * (target - run.at_nodes(run.critic.value_given_reference, collection, "a_ref", samples=paths))
        w = node_weights(path.w).to(residual)[:, None]
        so_far = (steps.shape[0] + 1) * (w * residual).cumsum(0) / w.cumsum(0)  # times N+1: a mean over nodes is a sum
        left, right = path.w.to(residual)[..., None]
        zero = torch.zeros_like(so_far[:1])
        collection.attach("target", target)
        collection.attach("of_h", torch.cat([left * so_far[:-1], zero]) + torch.cat([zero, right * so_far[:-1]]))
        spread = problem.clock(path.t).diff().sqrt().to(residual)[:, None]
        assert path.xi is not None
        noise = problem.root.apply(path.xi.flatten(0, 1)).view_as(path.x[1:])
        collection.attach("of_p", (spread * so_far[:-1]).reshape(so_far[:-1].shape + (1,) * len(problem.shape)) * noise)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_critic(self, critic)
        check_price(problem)
        check_noise(problem)
        if not control_is_square(problem):
            raise ValueError("B must be square: else actions do not determine grad V, and no residual vanishes")


def policy_loss(problem: Problem, policy: Mean, nodes: Nodes) -> Tensor:
    """-[<of_p, p> + of_h h]/beta, h = c(t, x, a) + <B (a_old - a), p>, (n,): the mean residual up to each node times
    the increment there, as a function of a. beta is the price of a nat, ½|u|²_R over its KL rate."""
    t, a_ref = nodes.t, nodes["a_ref"]
    a = policy(t, nodes.x, nodes.cond)
    p = policy_slope(problem, t, a, a_ref)
    h = soft_cost(problem, t, nodes.x, a, a_ref, nodes.cond)
    h = h + dot(problem.control(t).apply(nodes["a_old"] - a), p)
    unit = torch.ones_like(a)
    beta = dot(unit, problem.penalty(t).apply(unit)) / 2 / kl_rate(problem, t, unit, torch.zeros_like(unit))
    return -(nodes["of_h"] * h + dot(nodes["of_p"], p)) / beta
