"""Two other ways in which a critic moves a policy, to be compared with the gradient form of `actor_critic`.

    gradient     <grad V(t, X_t), B a> dt                                          actor_critic (arXiv 2502.01819)
    TD           <p, B a> dt,  p = L'^-1 xi (V_{k+1} - V_k - c dt)/sqrt(d clock)   `TDForm` (arXiv 2111.11232)
    next value   V(t_{k+1}, X_{k+1}(a)),  X_{k+1} reparametrised                   `NextValue` (DxMI, arXiv 2406.19464)

each less the price of a. The TD form needs no gradient of V, and pays with variance, which grows as 1/dt; the next
value is what a discrete chain has in place of the gradient, and differs from it by O(dt): it looks at V where the step
ends. Their critics learn as the actor-critic's does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctrl.algorithms.actor_critic import ActorCritic
from ctrl.algorithms.base import Algorithm, check_noise
from ctrl.algorithms.ddpo import Chain, gaussian, step_cost
from ctrl.gradient import td_slope
from ctrl.linop import dot
from ctrl.problem import Problem
from ctrl.replay import Batch, Nodes
from ctrl.solvers import Solver
from ctrl.value import Critic

if TYPE_CHECKING:
    from ctrl.fit import Run


@dataclass(frozen=True)
class TDForm(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps of the policy an epoch, and how many nodes each sees, over all processes.
        evaluation: how the critic is fitted: by an actor-critic whose actor stays put.
    """

    updates: int = 1
    nodes: int = 1024
    evaluation: ActorCritic = field(default_factory=lambda: ActorCritic(actor_updates=0, keep=1))

    def learn(self, run: Run) -> None:
        self.evaluation.learn(run)
        (batch,) = run.replay.batches
        batch.lay("p", self.slopes(run, batch))
        dt = batch.steps * batch.trajectory.t.diff().to(batch.trajectory.x)
        batch.lay("dt", dt[:, None].expand(-1, batch.samples))
        for nodes in run.deal(self.updates, self.nodes, last=batch.steps - 1):
            run.update("policy", lambda n: self.loss(run, n), nodes, self.nodes)

    def slopes(self, run: Run, batch: Batch) -> Tensor:
        """p at the left nodes, (N, B, *D); V at the end is the reward."""
        path, (t, x, ids) = batch.trajectory, batch.trajectory.flat()
        assert path.reward is not None
        value = run.at_nodes(run.critic.value_beside, batch, "a_ref")
        value = torch.cat([value[:-1], path.reward[None]])
        a, a_ref = (batch.fields[name].flatten(0, 1) for name in ("a_old", "a_ref"))
        cost = run.problem.running_cost(t, x, a, a_ref, run.conditions(ids)).view(value.shape)
        return td_slope(run.problem, path, value, cost)

    def loss(self, run: Run, n: Nodes) -> Tensor:
        """(n,)."""
        problem, a = run.problem, run.policy(n.t, n.x, n.cond)
        price = problem.running_cost(n.t, n.x, a, n["a_ref"], n.cond)
        return n["dt"] * torch.exp(-problem.discount * n.t) * (price - dot(problem.control(n.t).apply(a), n["p"]))

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_noise(problem)
        self.evaluation.check(problem, solver, critic)


@dataclass(frozen=True)
class NextValue(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps of the policy an epoch, and how many transitions each sees, over all processes.
        evaluation: how the critic is fitted: by an actor-critic whose actor stays put.
    """

    updates: int = 1
    nodes: int = 1024
    evaluation: ActorCritic = field(default_factory=lambda: ActorCritic(actor_updates=0, keep=1))

    def learn(self, run: Run) -> None:
        self.evaluation.learn(run)
        (batch,) = run.replay.batches
        chain, path = (
            Chain(run.problem, gaussian(run.settings.solver, "NextValue"), batch.trajectory.t),
            batch.trajectory,
        )
        assert path.xi is not None
        chain.lay_before(batch)
        batch.lay("xi", path.xi)
        for nodes in run.deal(self.updates, self.nodes, last=batch.steps - 1):
            run.update("policy", lambda n: self.loss(run, chain, n), nodes, self.nodes)

    def loss(self, run: Run, chain: Chain, n: Nodes) -> Tensor:
        """(n,), N times each step's: the mean over nodes estimates the sum over steps. The gradient of V(t', x') in x'
        is taken where the step ends, and held."""
        a = run.policy(n.t, n.x, n.cond)
        x_next = chain.law(n, a, chain.act_before(run.policy, n)).sample(n["xi"])
        t_next = chain.times.to(n.t)[n.k + 1]
        slope = run.critic.grad(t_next, x_next.detach(), n.cond)
        gain = torch.exp(-run.problem.discount * t_next) * dot(slope, x_next)
        return len(chain.plan) * (step_cost(chain, n, a) - gain)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        gaussian(solver, "NextValue")
        check_noise(problem)
        self.evaluation.check(problem, solver, critic)
