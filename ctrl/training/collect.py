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
from ctrl.rollout import Trajectory, concatenate, rollout, with_reward
from ctrl.training.processes import any_of
from ctrl.training.settings import Settings
from ctrl.training.split import splits


class Collector:
    """
    Attributes:
        calls: of the policy, so far; how many a step makes is the solver's affair.
    """

    def __init__(self, problem: Problem, conditions: Conditions, settings: Settings, accelerator: Accelerator) -> None:
        self.problem, self.conditions, self.settings, self.accelerator = problem, conditions, settings, accelerator
        self.calls = 0

    @torch.no_grad()
    def collect(self, behaviour: Mean | GaussianPolicy, noise: Noise, ids: Tensor) -> Collection | None:
        """The trajectories of these samples, `settings.batch` at a time. None, where models are split and another
        process failed: it would not take part in the next rollout."""
        if isinstance(behaviour, GaussianPolicy):
            behaviour = replace(behaviour, mean=self._counted(behaviour.mean))
        else:
            behaviour = self._counted(behaviour)
        times, paths = self.settings.times(self.problem, noise), []
        for part in ids.to(self.accelerator.device).split(self.settings.batch):
            try:
                paths.append(self._simulate(behaviour, times, noise, part))
            except Exception:
                self._failed_anywhere(True)
                raise
            if self._failed_anywhere(False):
                return None
        return Collection(concatenate(paths))

    def _simulate(self, behaviour: Mean | GaussianPolicy, times: Tensor, noise: Noise, ids: Tensor) -> Trajectory:
        with self.accelerator.autocast():
            cond = self.conditions(ids)
            path = rollout(self.problem, behaviour, times, noise, ids, solver=self.settings.solver, cond=cond)
            return replace(with_reward(path, self.problem.reward(path.x[-1], cond)), cond=None)

    def _failed_anywhere(self, here: bool) -> bool:
        return splits(self.settings.split, self.accelerator) and any_of(self.accelerator, here)

    def _counted(self, mean: Mean) -> Mean:
        """The same, counting its calls."""

        def counted(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
            self.calls += len(x)
            return mean(t, x, cond)

        return counted
