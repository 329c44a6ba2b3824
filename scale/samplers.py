"""Any diffusers scheduler as a solver: a black box from one network input to the next.

    box = sampler("dpmsolver++", pipeline)
    fit(task, policy, ..., settings=Settings(solver=box, grid=box.grid, steps=10, jitter=0.0))

A scheduler steps its own latents, scaled as it likes; what it hands to the network, and when, is a state of the process
in common coordinates, and these are the nodes. Between two of them it may do what it wants: there is no density.
A deterministic one solves the probability flow, whose problem is `ctrl.ProbabilityFlow`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from ctrl import grids
from ctrl.fields import one_of
from ctrl.problem import Problem, ScoreAsAction
from ctrl.solvers import Act, Solver
from scale.families import family_of
from scale.families.base import SAMPLERS

REFUSED = {
    "lcm": "it denoises to the end and noises again, for models distilled to that, and solves no process of this one",
    "pndm": "it asks for one time twice",
    "euler-ancestral": "it draws its noise itself, not by sample",
    "dpmsolver-sde": "it draws its noise itself, not by sample",
}


def known(name: str, among: Iterable[str] = SAMPLERS) -> None:
    """Raise unless there is such a sampler, and it can serve."""
    if name in REFUSED:
        raise ValueError(f"sampler {name!r} is of no use here: {REFUSED[name]}")
    one_of("sampler", name, among)


def sampler(name: str, pipeline: Any) -> BlackBox:
    """By name, under the pipeline's own process; a pipeline may be an outline."""
    family = family_of(pipeline)
    known(name, family.samplers)
    return BlackBox(family.sampler(name, pipeline.scheduler))


@dataclass
class _State:
    """What a scheduler carries through one rollout."""

    scheduler: Any
    latents: Tensor | None = None


@dataclass(frozen=True)
class _Call:
    """A step: one timestep, or two of a method of two stages, and the one that follows."""

    state: _State
    timesteps: Tensor
    following: Tensor | None


class BlackBox(Solver):
    """A diffusers scheduler; it is copied for every rollout, since it remembers."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.calls = scheduler.order  # type: ignore[misc]
        self.noisy = str(scheduler.config.get("algorithm_type", "")).startswith("sde")

    def grid(self, problem: ScoreAsAction, steps: int) -> Tensor:
        """The times at which it asks the network, and the end, (N+1,)."""
        asked = self._prepared(steps).timesteps[:: self.calls]
        inner = _time(problem, asked)
        end = torch.tensor([problem.horizon], dtype=torch.float64)
        times = torch.cat([torch.zeros(1, dtype=torch.float64), inner[1:], end])
        if isinstance(self.scheduler, DDIMScheduler) and self.scheduler.config.num_train_timesteps % steps:
            raise ValueError(
                f"steps must divide {self.scheduler.config.num_train_timesteps} for DDIM, got {steps}: diffusers' DDIM "
                f"steps by whole timesteps, and would fall behind the times it asks at"
            )
        if abs(float(inner[0])) > 1e-6 or not bool((times.diff() > 0).all()):
            raise ValueError(
                f"{type(self.scheduler).__name__} must go from the last timestep of training to one above 0, in order; "
                f"it asks at {asked.tolist()}: take timestep_spacing='trailing', and fewer steps than timesteps"
            )
        return times

    def asked(self, steps: int) -> int:
        """Network calls for an image."""
        return len(self._prepared(steps).timesteps)

    def quadrature(self, problem: Problem, times: Tensor) -> Tensor:
        return grids.trapezoid(problem, times)

    def plan(self, problem: Problem, times: Tensor) -> list[_Call]:
        assert isinstance(problem, ScoreAsAction)
        steps = len(times) - 1
        if self.noisy != (not problem.noiseless) or (self.noisy and problem.eta != 1):
            raise ValueError(
                f"{type(self.scheduler).__name__} {'takes' if self.noisy else 'has no'} noise, and needs a problem "
                f"with eta = {int(self.noisy)}, got eta = {problem.eta}"
            )
        if not torch.allclose(times.cpu(), self.grid(problem, steps)):
            raise ValueError("grid must be the sampler's own, without jitter: Settings(grid=box.grid, jitter=0.0)")
        state = _State(self._prepared(steps))
        firsts = state.scheduler.timesteps.split(self.calls)
        following = [*(part[0] for part in firsts[1:]), None]
        return [_Call(state, part, after) for part, after in zip(firsts, following, strict=True)]

    def step(
        self, problem: Problem, c: _Call, x: Tensor, a: Tensor, xi: Tensor, act: Act, memory: Tensor | None
    ) -> Tensor:
        assert isinstance(problem, ScoreAsAction)
        state, scheduler = c.state, c.state.scheduler
        if state.latents is None:
            state.latents = x / scheduler.scale_model_input(x.new_ones(()), c.timesteps[0])
        for stage, timestep in enumerate(c.timesteps):
            if stage:
                x = scheduler.scale_model_input(state.latents, timestep)
                a = act(_time(problem, timestep).to(x.device), x)
            out = self._output(problem, timestep, x, a)
            noise = {"variance_noise": xi} if self.noisy else {}
            state.latents = scheduler.step(out, timestep, state.latents, **noise).prev_sample.to(x.dtype)
        return state.latents if c.following is None else scheduler.scale_model_input(state.latents, c.following)

    def _prepared(self, steps: int) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        return scheduler

    def _output(self, problem: ScoreAsAction, timestep: Tensor, x: Tensor, a: Tensor) -> Tensor:
        """What the scheduler expects of a network, eps or v, from the score."""
        s = problem.s(_time(problem, timestep))
        sigma, alpha = problem.noising.sigma(s).to(x), problem.noising.alpha(s).to(x)
        eps = -sigma * a
        return eps if self.scheduler.config.prediction_type == "epsilon" else (eps - sigma * x) / alpha


def _time(problem: ScoreAsAction, timestep: Tensor) -> Tensor:
    """The time on the reverse clock of a timestep k of K, at which s = (k + 1)/K; s_min is timestep 0."""
    return problem.s_max - (timestep.double() + 1) * problem.s_min
