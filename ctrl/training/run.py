"""A training run: its parts, and an epoch of it."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from accelerate import Accelerator
from torch import nn

from ctrl.algorithms.base import Algorithm, Update
from ctrl.gaussian import GaussianPolicy
from ctrl.nodes import Collection, Conditions
from ctrl.noise import Noise
from ctrl.problem import Problem
from ctrl.rollout import NotFinite
from ctrl.training import checkpoint, files, guards
from ctrl.training.collect import Collector
from ctrl.training.device import check_device
from ctrl.training.engine import Engine, learns
from ctrl.training.epoch import Epoch
from ctrl.training.interrupts import RunFailed, Stops
from ctrl.training.metrics import Metrics
from ctrl.training.processes import any_of, check_processes, check_same
from ctrl.training.replay import Replay
from ctrl.training.settings import Settings
from ctrl.training.split import check_split, split, splits, whole
from ctrl.training.state import Weights, frozen_digest, identity
from ctrl.value import Critic


class Run:
    """A training run: its parts, and what they do in an epoch.

    Attributes:
        epoch: how many are done.
        kept: of which epoch there is a checkpoint.
        strikes: how many updates of each model, or rollouts, in a row were not finite.
    """

    def __init__(
        self,
        problem: Problem,
        policy: nn.Module,
        algorithm: Algorithm,
        critic: Critic | None,
        conditions: Conditions | None,
        settings: Settings,
        accelerator: Accelerator,
    ) -> None:
        check_processes(accelerator)
        check_device(accelerator)
        if settings.samples < accelerator.num_processes:
            raise ValueError(
                f"samples must be at least one for each of the {accelerator.num_processes} processes, "
                f"got {settings.samples}"
            )
        if settings.split:
            check_split(settings.samples, accelerator.num_processes, accelerator.mixed_precision)
        self.problem, self.algorithm, self.settings, self.accelerator = problem, algorithm, settings, accelerator
        self.policy, self.critic, self.conditions = policy, critic, conditions or (lambda ids: None)
        self._place()
        self.metrics = Metrics(settings.samples, accelerator)
        self.engine = Engine(policy, critic, problem.reward, settings, self.metrics, accelerator)
        if self.engine.split and isinstance(reference := getattr(problem, "reference", None), nn.Module):
            split(reference, "reference", accelerator)  # after the policy, which it may be without its adapters
        self.collector = Collector(problem, self.conditions, settings, accelerator)
        self.replay = Replay(settings.samples, accelerator.process_index, accelerator.num_processes)
        self.stops = Stops(settings.max_hours, listen=settings.out is not None)
        self.epoch = self.kept = 0
        self.strikes: dict[str, int] = {}

    def _place(self) -> None:
        """Models to the device; those that are split go there later, a part at a time."""
        problem, accelerator = self.problem, self.accelerator
        held = dict(inspect.getmembers_static(problem))
        held |= {"problem": problem, "policy": self.policy, "critic": self.critic}
        modules = {name: v for name, v in held.items() if isinstance(v, nn.Module)}
        if splits(self.settings.split, accelerator):
            weights = {f"weights of {name}": files.digest(whole(m.state_dict())) for name, m in modules.items()}
            check_same(accelerator, lambda: weights | self.fixed)  # which later are each process's own
            modules = {name: m for name, m in modules.items() if name != "reference" and not learns(m)}
        for model in modules.values():
            if not any(p.is_meta for p in model.parameters()):  # offloaded ones stay
                model.to(accelerator.device)

    @property
    def history(self) -> list[dict[str, Any]]:
        """The metrics of every epoch."""
        return self.metrics.history

    @property
    def ema(self) -> nn.Module | None:
        """The averaged policy, if asked for."""
        return self.engine.ema

    @cached_property
    def fixed(self) -> dict[str, str]:
        """Digests of what training does not move, by the words for it in messages."""
        models: dict[str, Any] = {"policy": self.policy, "critic": self.critic, "reward": self.problem.reward}
        frozen = {f"frozen weights of {name}": frozen_digest(m) for name, m in models.items() if learns(m)}
        return {"reference": identity(getattr(self.problem, "reference", None)), **frozen}

    def moving(self) -> dict[str, str]:
        """Digests of what training moves, likewise."""
        learners = self.engine.learners.items()
        return {f"weights of {name}": files.digest(Weights(v.model).state_dict()) for name, v in learners}

    # an epoch

    def step_epoch(self) -> dict[str, Any]:
        """Collect, learn, and say how it went. If nothing could be collected, nothing is learned."""
        began = time.perf_counter()
        epoch = self.begin_epoch()
        if epoch is not None:
            for update in self._updates(epoch):
                self._settle(update.name, self.engine.step(update))
        self._count_rewards_of_critic()
        self.epoch += 1
        m = self.metrics
        metrics = {"epoch": self.epoch, **m.counts, **m.summary(), "seconds": time.perf_counter() - began}
        self.history.append(metrics)
        return metrics

    def begin_epoch(self) -> Epoch | None:
        """Collect, and put in store; what an algorithm may then ask for. None if nothing could be collected."""
        s = self.settings
        self.engine.set_rates(s.schedule(self.epoch / s.epochs) * min((self.epoch + 1) / (s.warmup + 1), 1))
        self.metrics.begin()
        collection = self._collected()
        if collection is None:
            return None
        epoch = Epoch(
            self.problem, self.policy, self.critic, self._explores, self.conditions, s, Noise(s.seed, self.epoch),
            self.engine, self.metrics, self.replay,
        )  # fmt: skip
        off_policy = guards.check_on_policy(epoch, collection)
        if any_of(self.accelerator, off_policy is not None):
            raise ValueError(off_policy or "the policy that is trained is not the one that acted on another process")
        if "critic" in self.engine.learners and self.critic is not None:  # r and r + c must train alike (`ctrl.value`)
            self.critic.set_level(self.metrics.mean(collection.rewards))
        self.replay.add(collection, self.algorithm.keep)
        return epoch

    def _updates(self, epoch: Epoch) -> Iterator[Update]:
        updates = self.algorithm.learn(epoch)
        if not isinstance(updates, Iterator):
            raise TypeError(
                f"{type(self.algorithm).__name__}.learn must yield what is to be updated, as in "
                f'`yield Update("policy", loss, nodes, size)`, got {type(updates).__name__}'
            )
        return updates

    @property
    def _explores(self) -> bool:
        return isinstance(self.algorithm.behaviour(self.policy), GaussianPolicy)

    def _collected(self) -> Collection | None:
        """This process's share of an epoch's trajectories, or None if those of any process are not finite. Any other
        failure ends the run: nothing has moved since the last epoch, which is kept."""
        collection, failure, ids = None, None, self.replay.ids(self.epoch)
        try:
            behaviour = self.algorithm.behaviour(self.policy)
            collection = self.collector.collect(behaviour, Noise(self.settings.seed, self.epoch), ids)
        except Exception as error:
            failure = error
        if any_of(self.accelerator, failure is not None):
            self.save()
            left = failure if isinstance(failure, NotFinite) else None
            if any_of(self.accelerator, failure is not left):
                raise failure or RunFailed("another process failed in its rollout or reward: its message says how")
            self._settle("rollout", left or NotFinite("rollout: on another process"))
            return None
        self._settle("rollout", None)
        assert collection is not None
        self._measure(collection)
        return collection

    def _measure(self, collection: Collection) -> None:
        """The mean and the spread of rewards, and the spread of final states."""
        m, samples = self.metrics, self.settings.samples
        m.count("trajectories", samples)
        m.count("reward_calls", samples)
        m.count_here("network_calls", self.collector.calls)
        self.collector.calls = 0
        m.log("reward", collection.rewards)
        m.log_spread("reward_std", collection.rewards[None])
        m.log_spread("spread", collection.trajectory.x[-1].flatten(1).T)

    def _count_rewards_of_critic(self) -> None:
        """A structured critic asks the reward too, wherever V is wanted."""
        asked = getattr(self.critic, "asked", None)
        if asked is not None:
            self.metrics.count_here("reward_calls", asked)
            self.critic.asked = 0  # type: ignore[union-attr]

    def _settle(self, name: str, failure: NotFinite | None) -> None:
        """Count a failure: keep a copy of what was not finite, here or on another process, and warn that it is skipped.
        After `patience` in a row, end the run."""
        if failure is None:
            self.strikes[name] = 0
            return
        self.strikes[name] = times = self.strikes.get(name, 0) + 1
        epoch, out, kept = self.epoch + 1, self.settings.out, ""
        if out is not None and failure.tensors:
            file = f"epoch-{epoch:06d}-{name}-{times}-{self.replay.rank}.safetensors"
            kept = guards.keep(out / "not-finite" / file, failure)
        said = f"epoch {epoch}: {failure}{kept} ({times} in a row)"
        if times >= self.settings.patience:
            raise NotFinite(said) from failure
        warnings.warn(f"{said}; this {'epoch' if name == 'rollout' else 'update'} is left out", stacklevel=3)

    def save(self) -> None:
        """Keep the last epoch, if there is a folder and it is not kept yet; every process calls it."""
        if self.settings.out is not None and self.epoch > self.kept:
            checkpoint.save(self)
            self.kept = self.epoch
