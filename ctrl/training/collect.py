"""An epoch's trajectories, with their rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ctrl.gaussian import GaussianPolicy, Mean
from ctrl.nodes import Collection, Conditions
from ctrl.noise import Noise
from ctrl.problem import Problem
from ctrl.rollout import concatenate, rollout, with_reward
from ctrl.training.settings import Settings


class Collector:
    """
    Attributes:
        calls: of the policy, so far; how many a step makes is the solver's affair.
    """

    def __init__(self, problem: Problem, conditions: Conditions, settings: Settings, accelerator: Accelerator) -> None:
        self.problem, self.conditions, self.settings, self.accelerator = problem, conditions, settings, accelerator
        self.calls = 0

    @torch.no_grad()
    def collect(self, behaviour: Mean | GaussianPolicy, noise: Noise, ids: Tensor) -> Collection:
        """The trajectories of these samples, `settings.batch` at a time."""
        settings = self.settings
        times = settings.times(self.problem, noise)
        if isinstance(behaviour, GaussianPolicy):
            behaviour = replace(behaviour, mean=self._counted(behaviour.mean))
        else:
            behaviour = self._counted(behaviour)
        paths = []
        for part in ids.to(self.accelerator.device).split(settings.batch):
            with self.accelerator.autocast():
                cond = self.conditions(part)
                path = rollout(self.problem, behaviour, times, noise, part, solver=settings.solver, cond=cond)
                path = with_reward(path, self.problem.reward(path.x[-1], cond))
            paths.append(replace(path, cond=None))
        return Collection(concatenate(paths))

    def _counted(self, mean: Mean) -> Mean:
        """The same, counting its calls."""

        def counted(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
            self.calls += len(x)
            return mean(t, x, cond)

        return counted
