"""The runs that are timed, and the networks whose passes are the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.speed.timing import Profile
from ctrl import NetworkCritic, Noise, ScoreAsAction, rollout
from ctrl.algorithms import ActorCritic, Context, Update
from ctrl.algorithms.base import Wrapper
from ctrl.fit import Run
from ctrl.fit import Settings as FitSettings
from scale import tuning
from toy import catalogue
from toy.networks import Policy, Value


@dataclass(frozen=True)
class Subject:
    """A training run, and the networks whose passes are the limit."""

    name: str
    run: Run
    networks: tuple[nn.Module, ...]
    bar: float
    """What a rollout may take over its bare passes."""
    before: int = 1
    """Epochs after which all have as much to do."""

    def rollout(self, samples: int) -> Callable[[], object]:
        """As an epoch begins."""
        run, settings = self.run, self.run.settings
        times, ids = settings.grid(run.problem, settings.steps), torch.arange(samples)
        cond = run.conditions(ids)
        return lambda: rollout(run.problem, run.policy, times, Noise(0), ids, solver=settings.solver, cond=cond)

    def update(self) -> Callable[[], object]:
        """The first of the policy's in an epoch."""
        epoch = self.run.begin_epoch()
        assert epoch is not None
        first = next(update for update in self.run.algorithm.learn(epoch) if update.name == "policy")
        return lambda: self.run.engine.step(first)

    def profile(self, work: Callable[[], object]) -> dict[str, float]:
        """Seconds of some of its work by part; slopes go back through the reward and the decoder too."""
        run, (policy, reference) = self.run, self.networks
        noting = run.algorithm
        assert isinstance(noting, Noting)
        parts: list[tuple[Any, str, Any]] = [
            (policy, "forward", "policy"), (reference, "forward", "reference"),
            (run.accelerator, "backward", lambda *_: f"backward, {noting.now[0]}"),
            (torch.autograd, "grad", "backward, slopes"), (Noise, "_normals", "random numbers"),
            (run.problem, "reward", "reward and decoding"),
            *((learner.optimizer.optimizer, "step", "optimiser") for learner in run.engine.learners.values()),
        ]  # fmt: skip
        if isinstance(run.critic, NetworkCritic):
            parts.append((run.critic.network, "forward", "critic"))
        return Profile(parts).run(work, "arithmetic, memory and Python")


@dataclass(frozen=True)
class Noting(Wrapper):
    """An algorithm that notes which model it updates."""

    now: list[str] = field(default_factory=lambda: ["policy"])

    def learn(self, run: Context) -> Iterator[Update]:
        for update in self.algorithm.learn(run):
            self.now[0] = update.name
            yield update


class Called(nn.Module):
    """A function that is counted among the networks."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, *args: Any) -> Any:
        return self.f(*args)


def mixture() -> Subject:
    """mixture-2d as `ctrl.fit` has it by default: the actor-critic, a network of 64 x 64, Heun's method."""
    exact: ScoreAsAction = catalogue.get("mixture-2d").exact.problem
    torch.manual_seed(0)
    policy, reference = Policy(exact), Called(exact.reference)
    problem = replace(exact, reference=reference)
    critic = NetworkCritic(problem, Value(problem))
    settings = FitSettings(epochs=10**6, progress=False)
    algorithm = ActorCritic()
    run = Run(problem, policy, Noting(algorithm), critic, None, settings, Accelerator(cpu=True))
    return Subject("mixture-2d", run, (policy, reference), 1.15, before=algorithm.keep)


def embedded(name: str, module: Any, folder: Path, bar: float, **changes: Any) -> Subject:
    """One of `scale`'s commands on its embedded model, with its default settings except for the number of images."""
    given = {"out": folder, "log_with": "none", "epochs": 10**6, **changes}
    return fine_tuning(name, module, replace(module.Settings.read(module.Settings.embedded), **given), bar)


def fine_tuning(name: str, module: Any, s: Any, bar: float) -> Subject:
    """One of `scale`'s commands by these settings."""
    s = s.resolved()
    accelerator = tuning.accelerator_of(s)
    task = module.assemble(s, None, accelerator)
    run = Run(
        task.problem, task.learner, Noting(task.algorithm), task.critic, task.conditions, replace(task.fit, out=None),
        accelerator,
    )  # fmt: skip
    return Subject(name, run, (task.policy.network, task.problem.reference.network), bar)
