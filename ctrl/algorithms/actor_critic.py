"""Actor-critic in continuous time, on and off policy: the default.

Critic: regression on the targets of `ctrl.evaluation`, for every trajectory still in store, whoever made it.
Actor: with the critic's grad V, the advantage rate is a concave quadratic in the action,

    q(t, x, a) = const - ½ |a - a*(t, x)|²_R,   a* = a_ref + R^-1 B' grad V,

so the actor regresses on the greedy action a* in the norm that q itself sets: one gradient step from on-policy states
is the policy gradient (arXiv 2502.01819), many are a step of policy iteration.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctrl.algorithms.base import Algorithm, check_noise, check_price
from ctrl.evaluation import determined, increments, policy_slope, targets
from ctrl.gaussian import Mean
from ctrl.linop import dot
from ctrl.problem import Problem
from ctrl.qvalue import greedy
from ctrl.regularize import drawn_back
from ctrl.replay import Batch, Nodes
from ctrl.solvers import Solver
from ctrl.value import Critic

if TYPE_CHECKING:
    from ctrl.fit import Run


@dataclass(frozen=True)
class ActorCritic(Algorithm):
    """
    Attributes:
        critic_updates, actor_updates: optimiser steps an epoch.
        nodes: how many nodes each step sees, over all processes.
        keep: epochs of trajectories kept.
        trace: decay of the critic's own values in its targets, in units of 1/T (`ctrl.evaluation.targets`).
        critic_control: take the critic's gradient for the control variate and the off-policy correction, one more
            critic gradient a node, instead of the policy's own slope. It is taken anyway where actions do not determine
            grad V, because B is not square.
        nats: trust region: the action that the actor regresses on is drawn back to where its KL rate from the present
            one is nats/T, so that no node of an untrustworthy critic outweighs the rest. Where it binds, a step is
            shorter than the gradient's.
    """

    critic_updates: int = 12
    actor_updates: int = 12
    nodes: int = 256
    keep: int = 16
    trace: float = 3.0
    critic_control: bool = False
    nats: float = 8.0

    def learn(self, run: Run) -> None:
        run.lay_actions()
        *older, newest = run.replay.batches
        newest.lay("a", newest.fields["a_old"])  # nothing has moved since it acted
        for batch in older:
            batch.lay("a", run.at_nodes(run.policy, batch))
        for batch in run.replay.batches:
            batch.lay("target", self.targets(run, run.here(batch)))
        for nodes in run.deal(self.critic_updates, self.nodes):
            run.update("critic", lambda n: critic_loss(run.critic, n), nodes, self.nodes)
        improve(run, self.actor_updates, self.nodes, self.nats)

    def targets(self, run: Run, batch: Batch) -> Tensor:
        """What the critic is to be at each node, (N+1, B)."""
        a, a_ref, a_old = (batch.fields[name] for name in ("a", "a_ref", "a_old"))
        if self.critic_control or not determined(run.problem):
            p = run.at_nodes(run.critic.grad, batch, size=run.settings.micro_batch)
        else:
            t, _, _ = batch.trajectory.flat()
            p = policy_slope(run.problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).reshape(batch.trajectory.x.shape)
        value = run.at_nodes(run.critic.value_beside, batch, "a_ref") if self.trace else None
        _, _, ids = batch.trajectory.flat()
        cond = run.conditions(ids)
        steps = increments(run.problem, batch.trajectory, a, a_ref, a_old, p, cond)
        return targets(run.problem, batch.trajectory, value, steps, self.trace)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        if critic is None:
            raise ValueError("critic must be given: ActorCritic learns V (see ctrl.NetworkCritic)")
        check_price(problem)
        if self.actor_updates and self.nats < math.inf:
            check_noise(problem)


def critic_loss(critic: Critic, nodes: Nodes) -> Tensor:
    """|target - V|², (n,)."""
    return (nodes["target"] - critic.value_beside(nodes.t, nodes.x, nodes["a_ref"], nodes.cond)).square()


def improve(run: Run, updates: int, size: int, nats: float = math.inf) -> None:
    """The policy regresses on the action that is greedy for the critic, `nats` from its own at most: `updates`
    optimiser steps of `size` nodes."""
    rate = nats / run.problem.horizon

    def label(n: Nodes) -> dict[str, Tensor]:
        best = greedy(run.problem, n.t, n["a_ref"], run.critic.grad(n.t, n.x, n.cond))
        return {"best": drawn_back(run.problem, n.t, best, n["a"], rate)}

    for nodes in run.deal(updates, size, label=label):
        run.update("policy", lambda n: actor_loss(run.problem, run.policy, n), nodes, size)


def actor_loss(problem: Problem, policy: Mean, nodes: Nodes) -> Tensor:
    """w ½ e^{-rho t} |a - best|²_R, (n,)."""
    miss = policy(nodes.t, nodes.x, nodes.cond) - nodes["best"]
    decay = torch.exp(-problem.discount * nodes.t)
    return nodes.w * decay * dot(miss, problem.penalty(nodes.t).apply(miss)) / 2
