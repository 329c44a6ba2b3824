"""What an algorithm may ask of an epoch of a run: `ctrl.algorithms.base.Context`, which says what each is for."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ctrl.algorithms.base import Annotate
from ctrl.gaussian import Mean
from ctrl.nodes import Collection, Conditions, Nodes
from ctrl.noise import GRID, Noise
from ctrl.problem import Problem
from ctrl.regularize import actions_kl
from ctrl.rollout import Trajectory, batch_time, with_reward
from ctrl.training.engine import Engine
from ctrl.training.metrics import Metrics
from ctrl.training.precision import FEW, few_of, full
from ctrl.training.processes import share_out
from ctrl.training.replay import Replay
from ctrl.training.settings import Settings
from ctrl.value import Critic


class Epoch:
    """One epoch of a run.

    Attributes:
        explores: whether the policy acts around its mean.
        noise: keyed by the epoch.
        shuffle: of minibatches.
        probe: the paths along which a KL is measured, with the actions of policy and reference in float32.
    """

    probe: Collection

    def __init__(
        self,
        problem: Problem,
        policy: Any,
        critic: Critic | None,
        explores: bool,
        conditions: Conditions,
        settings: Settings,
        noise: Noise,
        engine: Engine,
        metrics: Metrics,
        replay: Replay,
    ) -> None:
        self.problem, self.policy, self._critic, self.explores = problem, policy, critic, explores
        self.conditions, self.settings, self.noise = conditions, settings, noise
        self.engine, self.metrics, self.replay, self.accelerator = engine, metrics, replay, engine.accelerator
        self.solver, self.samples, self.steps = settings.solver, settings.samples, settings.steps
        self.micro_batch, self.history = settings.micro_batch, metrics.history
        self.count, self.log = metrics.count, metrics.log
        self.autocast, self.total = self.accelerator.autocast, self.accelerator.reduce
        self.shuffle = torch.Generator().manual_seed(noise.word(GRID, 1))

    @property
    def collections(self) -> list[Collection]:
        return self.replay.collections

    @property
    def critic(self) -> Critic:
        if self._critic is None:
            raise ValueError("critic must be given to fit: this algorithm uses one")
        return self._critic

    def with_problem(self, problem: Problem) -> Epoch:
        other = copy.copy(self)  # with the same shuffle
        other.problem = problem
        return other

    # nodes

    def record_actions(self, a_ref: Tensor | None = None) -> None:
        newest = self.collections[-1]
        newest.attach("a_old", self._acted(newest))
        if self.problem.actions_are_free:
            newest.attach("a_ref", newest.fields["a_old"])
            return
        newest.attach("a_ref", self.at_nodes(self.problem.reference, newest) if a_ref is None else a_ref)
        if not self.problem.noiseless:
            self._choose_probe(newest)
            self._log_kl("kl", self.probe.fields["a_old"], self.probe.fields["a_ref"])

    def _acted(self, collection: Collection) -> Tensor:
        """The policy at the nodes, (N+1, B, *D'): as the rollout recorded it, and at the last node, where it did not
        act."""
        path = collection.trajectory
        if path.a is None or self.explores:
            return self.at_nodes(self.policy, collection)
        self.count("network_calls", self.samples)
        t = batch_time(path.t[-1], path.x.dtype, collection.samples)
        return torch.cat([path.a, self._evaluate(self.policy, path.ids, t, path.x[-1])[None]])

    def record_actions_again(self, size: int) -> None:
        if self.engine.precision == "no":
            return
        newest, actions = self.collections[-1], []
        nodes = self.nodes(Collection(newest.trajectory), range(newest.steps + 1))
        for part, counted in self.engine.micro_batches(nodes, size):
            with self.autocast():
                actions.append(self.policy(part.t, part.x, part.cond)[:counted].detach())
        self.count("network_calls", self.samples * (newest.steps + 1))
        newest.attach("a_old", torch.cat(actions).to(part.x).unflatten(0, (newest.steps + 1, newest.samples)))

    def nodes(self, collection: Collection, k: range) -> Nodes:
        index = torch.tensor(list(k)).repeat_interleave(collection.samples)
        return self.gather_nodes(collection, index, torch.arange(collection.samples).repeat(len(k)))

    def gather_nodes(self, collection: Collection, k: Tensor, b: Tensor) -> Nodes:
        """The nodes k of a collection's trajectories b, (n,) each."""
        return self._ready(collection.gather(k, b))

    def _ready(self, nodes: Nodes) -> Nodes:
        nodes = nodes.each(lambda v: v.to(self.accelerator.device, non_blocking=True))
        return replace(nodes, cond=self.conditions(nodes.ids))

    def at_nodes(
        self,
        f: Callable[..., Tensor],
        collection: Collection,
        *fields: str,
        samples: int | None = None,
        size: int | None = None,
    ) -> Tensor:
        t, x, ids = collection.trajectory.flat()
        self.count("network_calls", (samples or self.samples) * (collection.steps + 1))
        given = [collection.fields[name].flatten(0, 1) for name in fields]
        values = self._evaluate(f, ids, t, x, *given, size=size)
        return values.unflatten(0, (collection.steps + 1, collection.samples))

    def _evaluate(
        self, f: Callable[..., Tensor], ids: Tensor, t: Tensor, x: Tensor, *fields: Tensor, size: int | None = None
    ) -> Tensor:
        """f(t, x, *fields, cond), `size` nodes at a time (`settings.batch`)."""
        parts = []
        for piece, counts in self.engine.pieces(len(t), size or self.settings.batch):
            with torch.no_grad(), self.autocast():
                at, *given = (v[piece].to(self.accelerator.device) for v in (ids, t, x, *fields))
                found = f(*given, self.conditions(at)).to(x.dtype)
            parts += [found] if counts else []
        return torch.cat(parts)

    def minibatches(
        self, updates: int, size: int, *, last: int | None = None, annotate: Annotate | None = None, calls: int = 1
    ) -> Iterator[Nodes]:
        last, together = self.steps if last is None else last, max(self.settings.batch // size, 1)
        for held, owner in self.replay.minibatches(updates, size, last, self.shuffle, together):
            drawn, sizes = share_out(held, owner, self.accelerator)
            nodes = self.annotated(self._ready(drawn), annotate, calls * owner.numel())
            for n, end in zip(sizes, itertools.accumulate(sizes), strict=True):
                yield nodes.part(slice(end - n, end))

    def annotated(self, nodes: Nodes, annotate: Annotate | None, calls: int) -> Nodes:
        """The nodes with what annotate(nodes) gives for them, in `calls` network calls over all processes."""
        if annotate is None:
            return nodes
        self.count("network_calls", calls)
        parts = []
        for piece, counts in self.engine.pieces(len(nodes), self.micro_batch):
            with torch.no_grad(), self.autocast():
                found = annotate(nodes.part(piece))
            parts += [found] if counts else []
        names = parts[0] if parts else ()
        fields = {name: torch.cat([part[name] for part in parts]).to(nodes.x.dtype) for name in names}
        return replace(nodes, fields={**nodes.fields, **fields})

    def path_minibatches(self, updates: int, size: int) -> Iterator[Collection]:
        if self.engine.split:
            raise ValueError(
                "algorithm: split models need equal shares, and processes have unequal ones of whole trajectories"
            )
        return map(self.here, self.replay.path_minibatches(updates, size, self.shuffle))

    def here(self, collection: Collection) -> Collection:
        return collection.to(self.accelerator.device)

    def with_present_reward(self, path: Trajectory) -> Trajectory:
        self.count("reward_calls", self.samples)
        end = batch_time(path.t[-1], path.x.dtype, len(path.ids))
        return with_reward(path, self._evaluate(lambda t, x, c: self.problem.reward(x, c), path.ids, end, path.x[-1]))

    # over processes

    def gather(self, v: Any) -> list[Any]:
        return list(gather_object([v]))

    def mean_over_others(self, v: Tensor, group: int) -> Tensor:
        ids = self.collections[-1].trajectory.ids
        which = (ids - self.noise.epoch * self.samples) // group
        sums = v.new_zeros(*v.shape[:-1], -(-self.samples // group))
        sums.index_add_(-1, which, v)
        return (self.total(sums)[..., which] - v) / (group - 1)

    # metrics

    def logged(self, name: str) -> float:
        return self.metrics.summary()[name]

    def log_kl_from(self, name: str, field: str) -> None:
        self._log_kl(name, self._at_probe(self.policy), self.probe.fields[field])

    @property
    def _measured(self) -> int:
        """Paths along which a KL is measured, over all processes."""
        world = self.replay.world if self.engine.split else 1  # of which every one then has as many
        return self.samples if self.engine.precision == "no" else min(-(-FEW // world) * world, self.samples)

    def _choose_probe(self, collection: Collection) -> None:
        """All paths, or below float32 a few of them."""
        self.probe = collection
        if self.engine.precision == "no":
            return
        rank, world = self.replay.rank, self.replay.world
        few = few_of(self.samples, self.noise, self._measured)
        self.probe = collection.take(few[few % world == rank] // world)
        self.probe.attach("a_old", self._at_probe(self.policy))
        self.probe.attach("a_ref", self._at_probe(self.problem.reference))

    def _at_probe(self, f: Mean) -> Tensor:
        """f at the nodes of the paths along which a KL is measured, (N+1, b, *D'), in float32."""
        if self.probe.samples:
            return self.at_nodes(full(self.accelerator.device)(f), self.probe, samples=self._measured)
        self.count("network_calls", self._measured * (self.probe.steps + 1))  # the other processes' calls
        return self.probe.fields["a_old"]

    def _log_kl(self, name: str, a: Tensor, other: Tensor) -> None:
        """The path KL between actions at the nodes of `probe`, (N+1, b, *D') each, and its standard error."""
        nats, n = actions_kl(self.problem, self.probe.trajectory, a, other), self._measured
        mean = self.metrics.mean(nats, n)
        self.log(name, mean)
        if n > 1:
            self.log(f"{name}_se", (self.metrics.mean((nats - mean).square(), n) / (n - 1)).sqrt())
