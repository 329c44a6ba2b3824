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

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ctrl.algorithms.actor_critic import actor_loss
from ctrl.algorithms.base import Algorithm, Context, Update, check_price
from ctrl.fields import Count
from ctrl.gradient import adjoint, lean_adjoint
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem
from ctrl.qvalue import greedy
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class AdjointMatching(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps an epoch, and how many nodes each sees, over all processes.
        lean: follow the reference; or else the policy.
    """

    updates: Count = 20
    nodes: Count = 1024
    lean: bool = True

    def learn(self, run: Context) -> Iterator[Update]:
        (collection,) = run.collections
        p, *a_ref = self.adjoints(run, collection)
        run.record_actions(*a_ref)
        collection.attach("adjoint", p)

        def annotate(n: Nodes) -> dict[str, Tensor]:
            return {"best": greedy(run.problem, n.t, n["a_ref"], n["adjoint"])}

        for nodes in run.minibatches(self.updates, self.nodes, annotate=annotate, calls=0):
            yield Update("policy", lambda n: actor_loss(run.problem, run.policy, n), nodes, self.nodes)

    def adjoints(self, run: Context, collection: Collection) -> list[Tensor]:
        """p at every node, (N+1, B, *D), and, when it was asked for that, the reference; `settings.micro_batch`
        paths at a time: each holds the graph of a node."""
        parts = []
        for b in torch.arange(collection.samples).split(run.micro_batch):
            path = collection.take(b).trajectory
            path = replace(path, cond=run.conditions(path.ids))
            with run.autocast():
                found = lean_adjoint(run.problem, path) if self.lean else (adjoint(run.problem, path, run.policy),)
            parts.append([v.to(path.x.dtype) for v in found])
        samples = run.samples
        run.count("network_calls", samples * (collection.steps + 1) * (1 if self.lean else 2))  # reference, and policy
        run.count("reward_gradients", samples)
        return [torch.cat(v, 1) for v in zip(*parts, strict=True)]

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_price(problem)
        if not getattr(problem.reward, "differentiable", True):
            raise ValueError("reward must be differentiable for AdjointMatching: a black box needs ActorCritic")
