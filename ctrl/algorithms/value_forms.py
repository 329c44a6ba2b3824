"""Two other ways in which a critic moves a policy, to be compared with the gradient form of `actor_critic`.

    gradient     <grad V(t, X_t), B a> dt                                    actor_critic (arXiv 2502.01819)
    TD           <L^-T xi (V_{k+1} - V_k - c), m(a)>,  X_{k+1} = m(a) + L xi  `TDForm` (arXiv 2111.11232)
    next value   V(t_{k+1}, m(a) + L xi)                                     `NextValue` (DxMI, arXiv 2406.19464)

each less the price of a; m and L are those of the solver's own step. The TD form needs no gradient of V, and pays with
variance, which grows as 1/dt; the next value is what a discrete chain has in place of the gradient, and differs from it
by O(dt): it looks at V where the step ends. What is DxMI's here is this update: its price of an action is an entropy,
ours KL to the reference, and its value learns by TD(0), ours as the actor-critic's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ctrl.algorithms.actor_critic import ActorCritic
from ctrl.algorithms.base import Algorithm, Context, Update, check_noise
from ctrl.algorithms.ddpo import Chain, gaussian, step_cost
from ctrl.fields import Count
from ctrl.linop import dot
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class _ByValues(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps of the policy an epoch, and how many transitions each sees, over all processes.
        evaluation: how the critic is fitted: by an actor-critic whose actor stays put.
    """

    updates: Count = 1
    nodes: Count = 1024
    evaluation: ActorCritic = field(default_factory=lambda: ActorCritic(actor_updates=0, keep=1))
    learns_value: ClassVar[bool] = True
    more_calls: ClassVar[int] = 0
    """Networks that `gain` asks at a node."""

    def learn(self, run: Context) -> Iterator[Update]:
        yield from self.evaluation.learn(run)
        (collection,) = run.collections
        chain = Chain(run.problem, gaussian(run.solver, type(self).__name__), collection.trajectory.t)
        chain.attach_before(collection)
        self.attach(run, chain, collection)
        for nodes in run.minibatches(self.updates, self.nodes, last=collection.steps - 1):
            calls = chain.calls + self.more_calls
            yield Update("policy", lambda n: self.loss(run, chain, n), nodes, self.nodes, calls)

    def attach(self, run: Context, chain: Chain, collection: Collection) -> None:
        """What `gain` needs beside the left nodes."""
        raise NotImplementedError

    def gain(self, run: Context, chain: Chain, n: Nodes, mean: Tensor) -> Tensor:
        """(n,), of a step whose mean is m(a)."""
        raise NotImplementedError

    def loss(self, run: Context, chain: Chain, n: Nodes) -> Tensor:
        """(n,), N times each step's: the mean over nodes estimates the sum over steps."""
        a = run.policy(n.t, n.x, n.cond)
        mean = chain.law(n, a, chain.act_before(run.policy, n)).mean
        return len(chain.plan) * (step_cost(chain, n, a) - self.gain(run, chain, n, mean))

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        gaussian(solver, type(self).__name__)
        check_noise(problem)
        if self.evaluation.actor_updates or self.evaluation.keep > 1:
            raise ValueError(
                f"evaluation must have actor_updates = 0 and keep = 1, as it only fits the critic, got "
                f"{self.evaluation.actor_updates} and {self.evaluation.keep}"
            )
        self.evaluation.check(problem, solver, critic)


@dataclass(frozen=True)
class TDForm(_ByValues):
    """The score of each step, times what the value and the cost made of it."""

    @torch.no_grad()
    def attach(self, run: Context, chain: Chain, collection: Collection) -> None:
        path, steps = collection.trajectory, collection.steps
        assert path.reward is not None and path.xi is not None
        value = run.at_nodes(run.critic.value_given_reference, collection, "a_ref")
        value = torch.cat([value[:-1], path.reward[None]])
        left = run.nodes(collection, range(steps))
        law = chain.law(left, left["a_old"], left["a_old_before"])
        cost = step_cost(chain, left, left["a_old"]).view(steps, -1)
        decay = torch.exp(-run.problem.discount * path.t).to(value)[:, None]
        delta = (decay * value).diff(dim=0) - cost
        score = law.root.T.solve(path.xi.flatten(0, 1)).view(path.xi.shape)
        collection.attach("score_delta", score * delta.view(*delta.shape, *[1] * (score.ndim - 2)))

    def gain(self, run: Context, chain: Chain, n: Nodes, mean: Tensor) -> Tensor:
        return dot(n["score_delta"], mean)


@dataclass(frozen=True)
class NextValue(_ByValues):
    """V where the step ends; at the end of the path that is the reward, if it has a gradient."""

    more_calls: ClassVar[int] = 1

    def attach(self, run: Context, chain: Chain, collection: Collection) -> None:
        assert collection.trajectory.xi is not None
        collection.attach("xi", collection.trajectory.xi)

    def gain(self, run: Context, chain: Chain, n: Nodes, mean: Tensor) -> Tensor:
        """Its slope is taken where the step ends, and held."""
        noise = chain.law(n, n["a_old"], n["a_old_before"]).root.apply(n["xi"])
        x, t = (mean + noise).detach(), chain.times.to(n.t)[n.k + 1]
        slope, last = run.critic.grad(t, x, n.cond), n.k == len(chain.plan) - 1
        if getattr(run.problem.reward, "differentiable", False) and bool(last.any()):
            slope[last] = reward_slope(run.problem, x[last], None if n.cond is None else n.cond[last])
        return torch.exp(-run.problem.discount * t) * dot(slope, mean)


def reward_slope(problem: Problem, x: Tensor, cond: object) -> Tensor:
    """grad r, (n, *D)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(problem.reward(x, cond).sum(), x)[0]
