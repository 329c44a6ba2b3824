"""Actor-critic in continuous time, on and off policy: the default.

Critic: regression on the targets of `ctrl.evaluation`, for every trajectory still in store, whoever made it.
Actor: with the critic's grad V, the advantage rate is a concave quadratic in the action,

    q(t, x, a) = const - ½ |a - a*(t, x)|²_R,   a* = a_ref + R^-1 B' grad V,

so the actor regresses on the greedy action a* in the norm that q itself sets: one gradient step from on-policy states
is the policy gradient (arXiv 2502.01819), many are a step of policy iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ctrl.algorithms.base import Algorithm, Context, Update, check_critic, check_noise, check_price
from ctrl.evaluation import control_is_square, increments, policy_slope, targets
from ctrl.fields import Amount, Count, NotNegative
from ctrl.gaussian import Mean
from ctrl.linop import dot
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem
from ctrl.qvalue import greedy
from ctrl.regularize import clip_to_kl
from ctrl.solvers import Solver
from ctrl.value import Critic


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

    critic_updates: Amount = 12
    actor_updates: Amount = 12
    nodes: Count = 256
    keep: Count = 16
    trace: NotNegative = 3.0
    critic_control: bool = False
    nats: Annotated[float, "in (0, inf]"] = 8.0
    learns_value: ClassVar[bool] = True

    def learn(self, run: Context) -> Iterator[Update]:
        run.record_actions()
        *older, newest = run.collections
        newest.attach("a", newest.fields["a_old"])  # nothing has moved since it acted
        for collection in older:
            collection.attach("a", run.at_nodes(run.policy, collection))
        for collection in run.collections:
            collection.attach("target", self.targets(run, run.here(collection)))
        for nodes in run.minibatches(self.critic_updates, self.nodes):
            yield Update("critic", lambda n: critic_loss(run.critic, n), nodes, self.nodes)
        yield from improve(run, self.actor_updates, self.nodes, self.nats)

    def targets(self, run: Context, collection: Collection) -> Tensor:
        """What the critic is to be at each node, (N+1, B)."""
        a, a_ref, a_old = (collection.fields[name] for name in ("a", "a_ref", "a_old"))
        if self.critic_control or not control_is_square(run.problem):
            p = run.at_nodes(run.critic.grad, collection, size=run.micro_batch)
        else:
            t, _, _ = collection.trajectory.flat()
            p = policy_slope(run.problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).reshape(
                collection.trajectory.x.shape
            )
        value = run.at_nodes(run.critic.value_given_reference, collection, "a_ref") if self.trace else None
        _, _, ids = collection.trajectory.flat()
        cond = run.conditions(ids)
        steps = increments(run.problem, collection.trajectory, a, a_ref, a_old, p, cond)
        return targets(run.problem, collection.trajectory, value, steps, self.trace)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_critic(self, critic)
        check_price(problem)
        if self.actor_updates and self.nats < math.inf:
            check_noise(problem)


def critic_loss(critic: Critic, nodes: Nodes) -> Tensor:
    """|target - V|², (n,)."""
    return (nodes["target"] - critic.value_given_reference(nodes.t, nodes.x, nodes["a_ref"], nodes.cond)).square()


def improve(run: Context, updates: int, size: int, nats: float = math.inf) -> Iterator[Update]:
    """The policy regresses on the action that is greedy for the critic, `nats` from its own at most: `updates`
    optimiser steps of `size` nodes."""
    rate = nats / run.problem.horizon

    def annotate(n: Nodes) -> dict[str, Tensor]:
        best = greedy(run.problem, n.t, n["a_ref"], run.critic.grad(n.t, n.x, n.cond))
        return {"best": clip_to_kl(run.problem, n.t, best, n["a"], rate)}

    for nodes in run.minibatches(updates, size, annotate=annotate):
        yield Update("policy", lambda n: actor_loss(run.problem, run.policy, n), nodes, size)


def actor_loss(problem: Problem, policy: Mean, nodes: Nodes) -> Tensor:
    """w ½ e^{-rho t} |a - best|²_R, (n,)."""
    miss = policy(nodes.t, nodes.x, nodes.cond) - nodes["best"]
    decay = torch.exp(-problem.discount * nodes.t)
    return nodes.w * decay * dot(miss, problem.penalty(nodes.t).apply(miss)) / 2
