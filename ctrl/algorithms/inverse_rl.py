"""Maximum-entropy inverse reinforcement learning: the reward is what tells data from samples, and is learned too (DxMI,
Yoon et al. 2024, arXiv 2406.19464).

With an energy e = -r, in turn: the energy descends

    E_data[e] - E_samples[e] + squares (E_data[e²] + E_samples[e²]),

the reward of the newest samples is asked again, and another algorithm learns from it. Where both stand still, data and
samples have the same mean of every direction de/dphi in which the energy can move (up to what the squares do). The
squares also say where the energy is zero: without them a constant in it changes nothing, neither here nor in what the
other algorithm learns.

The problem's reward must be a module (x, cond) -> (B,); `fit` then has an optimiser for it (`Settings.reward_lr`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ctrl.algorithms.base import Context, Update, Wrapper
from ctrl.fields import Count, NotNegative
from ctrl.nodes import Nodes
from ctrl.problem import Problem
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class InverseRL(Wrapper):
    """`algorithm`, learning from the reward as it is now.

    Attributes:
        data: data(ids) -> (n, *D), one datum for each id; an update has ids that no other has.
        squares: weight of the energies' squares, which keeps them in bounds.
        updates: optimiser steps of the reward an epoch.
    """

    data: Callable[[Tensor], Tensor]
    squares: NotNegative = 0.1
    updates: Count = 1

    def learn(self, run: Context) -> Iterator[Update]:
        collection = run.collections[-1]
        ends = run.nodes(collection, range(collection.steps, collection.steps + 1))
        for i in range(self.updates):
            yield Update("reward", partial(self.loss, run, i), ends, run.samples, calls=0)
        run.count("reward_calls", self.updates * 2 * run.samples)  # of samples and of data
        collection.trajectory = run.with_present_reward(collection.trajectory)
        yield from self.algorithm.learn(run)

    def loss(self, run: Context, i: int, ends: Nodes) -> Tensor:
        """(n,), of final states and as many data, others in each update."""
        samples = run.problem.reward(ends.x, ends.cond)
        data = run.problem.reward(self.data(self.updates * ends.ids + i).to(ends.x), ends.cond)
        return samples - data + self.squares * (samples.square() + data.square())

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        reward = problem.reward
        if not isinstance(reward, nn.Module) or not any(p.requires_grad for p in reward.parameters()):
            raise ValueError("problem.reward must be a torch.nn.Module with parameters: InverseRL trains it")
        if self.algorithm.keep > 1:
            raise ValueError(
                f"algorithm must keep one epoch of trajectories, since older ones have another reward; it keeps "
                f"{self.algorithm.keep}: keep=1"
            )
        self.algorithm.check(problem, solver, critic)
