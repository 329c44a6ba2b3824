"""How a run is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ctrl import grids
from ctrl.fields import Amount, Count, NotNegative, check_fields
from ctrl.noise import GRID, Noise
from ctrl.problem import Problem
from ctrl.solvers import Heun, Solver


def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam, all parameters in one kernel."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def linear_decay(progress: float) -> float:
    """From 1 to 0.1 over the run."""
    return 1 - 0.9 * progress


def cosine_decay(progress: float) -> float:
    """From 1 to 0.1 over the run, level at both ends."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """1 throughout, so that a run can be resumed with more epochs."""
    return 1.0


@dataclass(frozen=True)
class Settings:
    """How a run is made. Nothing here is about the problem or the algorithm.

    Attributes:
        epochs: of one collection and one round of learning each.
        samples: trajectories an epoch, over all processes.
        steps: N, time steps a trajectory.
        solver: how trajectories are simulated.
        grid: grid(problem, steps) -> (N+1,) times.
        jitter: how far, in steps, the interior times move at random each epoch, so that a continuous-time policy is
            trained at all times; below ½, and 0 for a fixed grid.
        lr, critic_lr: learning rates of the two optimisers; the policy's is the smaller, so that the critic keeps up.
        reward_lr: that of a reward which is learned (`ctrl.algorithms.InverseRL`).
        optimizer: optimizer(parameters, lr=) -> torch.optim.Optimizer.
        schedule: the factor on the learning rates as a function of the fraction of the run that is done.
        warmup: epochs before the learning rates have their full size; Adam's first steps have, whatever the gradient.
        max_grad_norm: gradients longer than this are shortened to it.
        ema: decay per optimiser step of the averaged policy; 0 keeps none.
        batch: trajectories simulated at a time, and nodes evaluated at a time, on a process.
        micro_batch: nodes in one backward pass on a process, through the policy, or through reference and critic to
            the state; only memory and speed depend on it.
        split: hold policy, reference and critic in shares, one on each process (FSDP2), for models that do not fit one
            device. Without it every process has them whole, which is faster.
        seed: of everything that is drawn.
        out: folder for metrics.jsonl and checkpoints; None writes nothing.
        checkpoint_every: epochs between checkpoints; the last epoch always makes one.
        keep_checkpoints: how many of the last are kept; the best one is besides.
        max_hours: end before an epoch that would go over this; the run can be resumed.
        patience: how many rollouts, or updates of a model, in a row may be not finite before the run ends.
        mismatch: how far apart, in nats on a path, the policy may be in rollouts and in updates, over what rounding
            explains (`ctrl.training.guards.check_on_policy`).
        progress: show a bar.
    """

    epochs: Count = 160
    samples: Count = 64
    steps: Count = 20
    solver: Solver = field(default_factory=Heun)
    grid: Callable[[Any, int], Tensor] = grids.natural
    jitter: Annotated[float, "in [0, 0.5)"] = 0.4
    lr: NotNegative = 1e-2
    critic_lr: NotNegative = 4e-2
    reward_lr: NotNegative = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] = adam
    schedule: Callable[[float], float] = linear_decay
    warmup: Amount = 0
    max_grad_norm: Annotated[float, "in (0, inf]"] = 1.0
    ema: Annotated[float, "in [0, 1)"] = 0.0
    batch: Count = 4096
    micro_batch: Count = 4096
    split: bool = False
    seed: Amount = 0
    out: Path | None = None
    checkpoint_every: Count = 10
    keep_checkpoints: Count = 2
    max_hours: Annotated[float | None, "in (0, inf]"] = None
    patience: Count = 3
    mismatch: Annotated[float, "in [0, inf]"] = 1e-3
    progress: bool = True

    def __post_init__(self) -> None:
        out: Any = self.out
        if isinstance(out, str):
            object.__setattr__(self, "out", Path(out))
        check_fields(self)

    def times(self, problem: Problem, noise: Noise) -> Tensor:
        """The grid, (N+1,), that an epoch with this noise goes along."""
        times = self.grid(problem, self.steps)
        if not self.jitter or self.steps == 1:
            return times
        shift = noise.uniform(torch.zeros(1, dtype=torch.int64), (self.steps - 1,), GRID)[0] - 0.5
        return grids.jitter(times, 2 * self.jitter * shift)
