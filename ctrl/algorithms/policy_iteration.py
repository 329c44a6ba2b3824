"""Policy iteration (PI-FT; Han, Razaviyayn & Xu 2025, arXiv 2412.18164): evaluate, then improve, each to its end.

    V_n the value of a_n,   a_{n+1} = a_ref + R^-1 B' grad V_n,

which converges at a linear rate if actions are dear enough, and quadratically on linear-quadratic problems, where it is
the Newton-Kleinman iteration. It is actor-critic whose critic is fitted to trajectories of the newest policy alone,
without its own values in the targets, and whose two halves take many steps. With the critic's own gradient as their
control variate the targets lose their noise as the fit gets better; `rounds` of targets and fit make use of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from ctrl.algorithms.actor_critic import ActorCritic, improve
from ctrl.algorithms.base import Algorithm, Context, Update
from ctrl.fields import Amount, Count
from ctrl.problem import Problem
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class PolicyIteration(Algorithm):
    """
    Attributes:
        rounds: how often the critic's targets are made anew in an iteration.
        critic_updates, actor_updates: optimiser steps a round and an iteration.
        nodes: how many nodes each step sees, over all processes.
    """

    rounds: Count = 2
    critic_updates: Amount = 50
    actor_updates: Amount = 100
    nodes: Count = 1024
    learns_value: ClassVar[bool] = True

    @property
    def evaluation(self) -> ActorCritic:
        """A round: an actor-critic whose actor stays put."""
        return ActorCritic(self.critic_updates, 0, self.nodes, keep=1, trace=0.0, critic_control=True)

    def learn(self, run: Context) -> Iterator[Update]:
        for _ in range(self.rounds):
            yield from self.evaluation.learn(run)
        yield from improve(run, self.actor_updates, self.nodes)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        self.evaluation.check(problem, solver, critic)
