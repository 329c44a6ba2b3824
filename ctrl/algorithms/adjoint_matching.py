"""Adjoint Matching (Domingo-Enrich et al. 2025, arXiv 2409.08861): regress on the action that is greedy for an adjoint.

    loss = E of the integral of ½ e^{-rho t} |a_theta - a_ref - R^-1 B' p|²_R dt,   along paths of a_theta itself,

where -dp/dt = (grad_x [b0 + B a_ref])' p - grad_x l - rho p, p(T) = grad r, is the lean adjoint: it follows the
reference, so no network but the reference's is differentiated. At the optimum E[p_t | X_t] = grad V*, so the loss is
stationary there; elsewhere p is the gradient of no value, and the step no policy gradient. With `lean` = False p is the
full adjoint, whose mean given X_t is grad V of a_theta: then it is one, and the regression is policy iteration without
a critic.

The paper's memoryless noise is eta = 1 on a noising whose alpha(s_max) vanishes: then Y_0 and Y_T are independent under
the reference, and the optimum samples e^{r/beta} times the data. Otherwise the optimum itself is biased by the initial
law (its value function differs from one start to another), which no algorithm removes: it belongs to the problem.

Needs a reward and a reference that are differentiable in x; no critic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctrl.algorithms.actor_critic import actor_loss
from ctrl.algorithms.base import Algorithm, check_price
from ctrl.gradient import adjoint, lean_adjoint
from ctrl.problem import Problem
from ctrl.qvalue import greedy
from ctrl.replay import Batch, Nodes
from ctrl.solvers import Solver
from ctrl.value import Critic

if TYPE_CHECKING:
    from ctrl.fit import Run


@dataclass(frozen=True)
class AdjointMatching(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps an epoch, and how many nodes each sees, over all processes.
        lean: follow the reference; or else the policy.
    """

    updates: int = 20
    nodes: int = 1024
    lean: bool = True

    def learn(self, run: Run) -> None:
        (batch,) = run.replay.batches
        p, *a_ref = self.adjoints(run, batch)
        run.lay_actions(*a_ref)
        batch.lay("p", p)

        def label(n: Nodes) -> dict[str, Tensor]:
            return {"best": greedy(run.problem, n.t, n["a_ref"], n["p"])}

        for nodes in run.deal(self.updates, self.nodes, label=label, calls=0):
            run.update("policy", lambda n: actor_loss(run.problem, run.policy, n), nodes, self.nodes)

    def adjoints(self, run: Run, batch: Batch) -> list[Tensor]:
        """p at every node, (N+1, B, *D), and, when it was asked for that, the reference; `settings.micro_batch`
        paths at a time: each holds the graph of a node."""
        parts = []
        for b in torch.arange(batch.samples).split(run.settings.micro_batch):
            path = batch.take(b).trajectory
            path = replace(path, cond=run.conditions(path.ids))
            with run.accelerator.autocast():
                found = lean_adjoint(run.problem, path) if self.lean else (adjoint(run.problem, path, run.policy),)
            parts.append([v.to(path.x.dtype) for v in found])
        samples = run.settings.samples
        run.counts["network_calls"] += samples * (batch.steps + 1) * (1 if self.lean else 2)  # reference, and policy
        run.counts["reward_gradients"] = run.counts.get("reward_gradients", 0) + samples
        return [torch.cat(v, 1) for v in zip(*parts, strict=True)]

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_price(problem)
        if not getattr(problem.reward, "differentiable", True):
            raise ValueError("reward must be differentiable for AdjointMatching: a black box needs ActorCritic")
