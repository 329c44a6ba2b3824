"""PPO in continuous time: the trust region is a path KL in nats (Schulman et al. 2017, arXiv 1707.06347; in continuous
time Zhao, Tang & Yao 2023, arXiv 2305.18901).

The difference J(theta) - J(old) is E_theta of the integral of e^{-rho t} q_old(t, X, a_theta) dt; with the old policy's
own states it is the surrogate

    E_old of the integral of e^{-rho t} q_old(t, X, a_theta) dt,

a concave quadratic in the action, with the slope of J at theta = old. It can be trusted as far as

    KL(P_old || P_theta) = E_old of the integral of ½ |S^-1 B (a_theta - a_old)|² dt

is small, whatever the number of steps. `PPOPenalty` takes lambda times this KL off, and adapts lambda until an epoch
moves the policy by `nats`. `PPOClip` is pointwise, like the clipped ratio: with a^ the action drawn back to where the
KL rate is nats/T,

    min(q_old(t, X, a_theta), q_old(t, X, a^)),   a^ = a_old + (a_theta - a_old) min(1, sqrt((nats/T) / rate)),

so that nothing is to be gained by going further, at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ctrl.algorithms.actor_critic import ActorCritic
from ctrl.algorithms.base import Algorithm, Context, Update, check_noise
from ctrl.fields import Count, Positive
from ctrl.gaussian import Mean
from ctrl.nodes import Nodes
from ctrl.problem import Problem
from ctrl.qvalue import advantage_rate
from ctrl.regularize import adapt_weight, clip_to_kl, kl_rate
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class PPO(Algorithm, ABC):
    """
    Attributes:
        nats: how far an epoch may move the policy, in path KL.
        updates, nodes: optimiser steps of the policy an epoch, and how many nodes each sees, over all processes.
        evaluation: how the critic is fitted: by an actor-critic whose actor stays put.
    """

    nats: Annotated[float, "in (0, inf]"] = 0.5
    updates: Count = 20
    nodes: Count = 1024
    evaluation: ActorCritic = field(
        default_factory=lambda: ActorCritic(critic_updates=20, actor_updates=0, nodes=1024, keep=1)
    )

    learns_value: ClassVar[bool] = True

    @abstractmethod
    def loss(self, run: Context, nodes: Nodes) -> Tensor:
        """(n,), minus the surrogate within its trust region."""

    def learn(self, run: Context) -> Iterator[Update]:
        yield from self.evaluation.learn(run)
        run.record_actions_again(self.nodes)

        def annotate(n: Nodes) -> dict[str, Tensor]:
            return {"grad_v": run.critic.grad(n.t, n.x, n.cond)}

        for nodes in run.minibatches(self.updates, self.nodes, annotate=annotate):
            yield Update("policy", lambda n: self.loss(run, n), nodes, self.nodes)
        run.log_kl_from("step_kl", "a_old")

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        if not self.nats > 0:
            raise ValueError(f"nats must be > 0, got {self.nats}")
        check_noise(problem)
        self.evaluation.check(problem, solver, critic)


@dataclass(frozen=True)
class PPOPenalty(PPO):
    """
    Attributes:
        penalty: lambda in the first epoch, in units of reward per nat.
    """

    penalty: Positive = 1.0

    def loss(self, run: Context, nodes: Nodes) -> Tensor:
        weight = adapt_weight(
            self.penalty, [epoch["step_kl"] for epoch in run.history if "step_kl" in epoch], self.nats
        )
        return penalised_loss(run.problem, run.policy, weight, nodes)


@dataclass(frozen=True)
class PPOClip(PPO):
    """The pointwise trust region."""

    def loss(self, run: Context, nodes: Nodes) -> Tensor:
        return clipped_loss(run.problem, run.policy, self.nats / run.problem.horizon, nodes)


def penalised_loss(problem: Problem, policy: Mean, weight: float, nodes: Nodes) -> Tensor:
    """w [weight ½ |S^-1 B (a - a_old)|² - e^{-rho t} q_old(t, x, a)], (n,)."""
    a = policy(nodes.t, nodes.x, nodes.cond)
    return nodes.w * weight * kl_rate(problem, nodes.t, a, nodes["a_old"]) - _surrogate(problem, nodes, a)


def clipped_loss(problem: Problem, policy: Mean, rate: float, nodes: Nodes) -> Tensor:
    """-w e^{-rho t} min(q_old(t, x, a), q_old(t, x, a^)), (n,); rate: the most nats per unit of time."""
    a, a_old = policy(nodes.t, nodes.x, nodes.cond), nodes["a_old"]
    back = clip_to_kl(problem, nodes.t, a, a_old, rate)
    return -torch.minimum(_surrogate(problem, nodes, a), _surrogate(problem, nodes, back))


def _surrogate(problem: Problem, nodes: Nodes, a: Tensor) -> Tensor:
    """w e^{-rho t} q_old(t, x, a), (n,)."""
    decay = torch.exp(-problem.discount * nodes.t)
    return nodes.w * decay * advantage_rate(problem, nodes.t, a, nodes["a_old"], nodes["a_ref"], nodes["grad_v"])
