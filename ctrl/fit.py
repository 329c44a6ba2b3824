"""The one training loop: rollouts, what the algorithm learns from them, metrics, checkpoints.

    result = fit(problem, policy, ActorCritic(), critic=NetworkCritic(problem, network), settings=Settings(steps=20))

A toy problem and Stable Diffusion go through this same function. An epoch is: simulate `samples` trajectories under the
current policy, ask the reward, put them in store, let the algorithm learn. Everything that is drawn is drawn by
(seed, epoch, sample), losses are summed over nodes and divided by the global count, and gradients are added up over
processes; so the run does not depend on micro-batches, on the number of processes, or on having been interrupted.

With a folder to write to, SIGTERM and SIGINT let the epoch end, keep it and exit (`ctrl.stops`); what leaves the
numbers is left out, and kept for inspection (`ctrl.guards`); a reward that fails loses nothing that was learned.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm

from ctrl import checkpoint, grids, guards
from ctrl.algorithms.base import Algorithm
from ctrl.device import check_device, make_accelerator
from ctrl.fields import check_fields
from ctrl.gaussian import GaussianPolicy, Mean
from ctrl.lock import locked
from ctrl.noise import GRID, Noise
from ctrl.precision import FEW, few_of, full, precision_of
from ctrl.problem import Problem
from ctrl.processes import share_out, sum_in_place
from ctrl.regularize import actions_kl
from ctrl.replay import Batch, Nodes, Replay, with_reward
from ctrl.rollout import NotFinite, Trajectory, batch_time, concatenate, rollout
from ctrl.solvers import Heun, Solver
from ctrl.stops import TIME_UP, RunFailed, Stopped, Stops
from ctrl.value import Critic

Conditions = Callable[[Tensor], Any]
"""conditions(ids: (n,)) -> cond: what each sample is conditioned on, as a function of its id."""

Loss = Callable[[Nodes], Tensor]
"""loss(nodes) -> (n,): each node's own share; its mean over nodes is what is minimised."""

Label = Callable[[Nodes], dict[str, Tensor]]
"""label(nodes) -> (n, ...) each: what to lay beside nodes, by name, without a graph."""

Callback = Callable[["Run", dict[str, Any]], None]
"""callback(run, metrics), after every epoch."""


_KINDS = {
    kind for kind in DistributedType
    if kind.name in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU")
}  # fmt: skip
"""Each process has a whole model."""


def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam, all parameters in one kernel."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def linear_decay(progress: float) -> float:
    """From 1 to 0.1 over the run."""
    return 1 - 0.9 * progress


_LIMITS = {
    **dict.fromkeys(
        ("epochs", "samples", "steps", "batch", "micro_batch", "checkpoint_every", "keep_checkpoints", "patience"),
        ">= 1",
    ),
    **dict.fromkeys(("lr", "critic_lr", "reward_lr"), ">= 0"),
    **dict.fromkeys(("max_grad_norm", "max_hours"), "in (0, inf]"),
    "mismatch": "in [0, inf]", "jitter": "in [0, 0.5)", "ema": "in [0, 1)", "seed": ">= 0",
    "warmup": ">= 0",
}  # fmt: skip


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
        seed: of everything that is drawn.
        out: folder for metrics.jsonl and checkpoints; None writes nothing.
        checkpoint_every: epochs between checkpoints; the last epoch always makes one.
        keep_checkpoints: how many of the last are kept; the best one is besides.
        max_hours: end before an epoch that would go over this; the run can be resumed.
        patience: how many times in a row a rollout, or an update of a model, may leave the numbers.
        mismatch: how far apart, in nats on a path, the policy may be in rollouts and in updates, over what rounding
            explains (`ctrl.guards.same_policy`).
        progress: show a bar.
    """

    epochs: int = 160
    samples: int = 64
    steps: int = 20
    solver: Solver = field(default_factory=Heun)
    grid: Callable[[Any, int], Tensor] = grids.natural
    jitter: float = 0.4
    lr: float = 1e-2
    critic_lr: float = 4e-2
    reward_lr: float = 1e-3
    optimizer: Callable[..., torch.optim.Optimizer] = adam
    schedule: Callable[[float], float] = linear_decay
    warmup: int = 0
    max_grad_norm: float = 1.0
    ema: float = 0.0
    batch: int = 4096
    micro_batch: int = 4096
    seed: int = 0
    out: Path | None = None
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    max_hours: float | None = None
    patience: int = 3
    mismatch: float = 1e-3
    progress: bool = True

    def __post_init__(self) -> None:
        out: Any = self.out
        if isinstance(out, str):
            object.__setattr__(self, "out", Path(out))
        check_fields(self, _LIMITS)

    def times(self, problem: Problem, noise: Noise) -> Tensor:
        """The grid, (N+1,), that an epoch with this noise goes along."""
        times = self.grid(problem, self.steps)
        if not self.jitter or self.steps == 1:
            return times
        shift = noise.uniform(torch.zeros(1, dtype=torch.int64), (self.steps - 1,), GRID)[0] - 0.5
        return grids.jitter(times, 2 * self.jitter * shift)


@dataclass
class Learner:
    """A model and its optimiser."""

    model: nn.Module
    optimizer: Any
    lr: float

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def step(self) -> None:
        """Accelerate's only where gradients are scaled: each time it searches the disk for other optimisers, which can
        take as long as a step."""
        (self.optimizer if self.optimizer.scaler else self.optimizer.optimizer).step()


@dataclass(frozen=True)
class Result:
    """What `fit` returns: the trained modules, the averaged policy if asked for, and the metrics of every epoch."""

    policy: nn.Module
    critic: Critic | None
    ema: nn.Module | None
    history: list[dict[str, Any]]


def check_processes(accelerator: Accelerator) -> None:
    """Raise unless the processes see one another."""
    if accelerator.num_processes == 1 < int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"accelerator: there are {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), and each would train alone; "
            f"without a GPU set ACCELERATE_USE_CPU=true"
        )


class Run:
    """The state of a training run, and what an algorithm may do with it."""

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
        if accelerator.distributed_type not in _KINDS:
            raise ValueError(
                f"accelerator: {accelerator.distributed_type} splits a model over processes, and fit adds up whole "
                f"gradients itself: take multi-GPU, and gradient checkpointing, LoRA or offloading for memory"
            )
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "accelerator must have gradient_accumulation_steps = 1: memory is bounded by settings.micro_batch"
            )
        self.problem, self.algorithm, self.settings, self.accelerator = problem, algorithm, settings, accelerator
        self.conditions = conditions or (lambda ids: None)
        self.policy, self._critic = policy, critic
        for model in (problem, policy, critic, *(v for _, v in inspect.getmembers_static(problem))):
            if isinstance(model, nn.Module) and not any(p.is_meta for p in model.parameters()):  # offloaded ones stay
                model.to(accelerator.device)
        self.learners = {"policy": self._learner(policy, settings.lr)}
        others: dict[str, tuple[Any, float]] = {
            "critic": (critic, settings.critic_lr), "reward": (problem.reward, settings.reward_lr),
        }  # fmt: skip
        for name, (model, lr) in others.items():  # what is exact, or given, is no module, and learns nothing
            if isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters()):
                self.learners[name] = self._learner(model, lr)
        frozen = {id(p): p for p in policy.parameters() if not p.requires_grad}  # the average shares them
        self.ema = copy.deepcopy(policy, frozen).requires_grad_(False) if settings.ema else None
        self.replay = Replay(settings.samples, accelerator.process_index, accelerator.num_processes)
        self.epoch = self.kept = 0
        # a network call is policy, reference or critic at one state, with what it calls itself, and with its gradient
        # where that is taken; what a run does to check itself is not counted
        self.counts = {"trajectories": 0, "network_calls": 0, "reward_calls": 0}
        self._acting = 0  # calls in rollouts of this process that are not in the counts yet
        self.history: list[dict[str, Any]] = []
        self.strikes: dict[str, int] = {}
        self.stops = Stops(settings.max_hours, listen=settings.out is not None)
        self._logged: dict[str, list[Tensor]] = {}
        self._deck = torch.Generator()

    @cached_property
    def fixed(self) -> dict[str, str]:
        """Digests of what training does not move."""
        return checkpoint.fixed(self)

    def _learner(self, model: nn.Module, lr: float) -> Learner:
        trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
        if not trained:
            raise ValueError(
                f"policy has nothing to train: it must be a torch.nn.Module with parameters that require a gradient, "
                f"got {type(model).__name__}"
            )
        forward = model.forward
        self.accelerator.prepare_model(model, evaluation_mode=True)
        if self.accelerator.native_amp:  # accelerate's forward would round even where autocast is off
            model.forward = forward
        return Learner(model, self.accelerator.prepare_optimizer(self.settings.optimizer(trained, lr=lr)), lr)

    @property
    def precision(self) -> str:
        """Of the networks' arithmetic: no is float32."""
        return precision_of(self.accelerator)

    @property
    def measured(self) -> int:
        """Paths an epoch along which a KL is measured, over all processes."""
        return self.settings.samples if self.precision == "no" else min(FEW, self.settings.samples)

    @property
    def critic(self) -> Critic:
        """The critic; an algorithm that needs one has said so in its `check`."""
        if self._critic is None:
            raise ValueError("critic must be given to fit: this algorithm uses one")
        return self._critic

    # what an epoch does

    def step_epoch(self) -> dict[str, Any]:
        """Collect, learn, and say how it went. If nothing could be collected, nothing is learned."""
        began, settings = time.perf_counter(), self.settings
        factor = settings.schedule(self.epoch / settings.epochs) * min((self.epoch + 1) / (settings.warmup + 1), 1)
        for learner in self.learners.values():
            for group in learner.optimizer.param_groups:
                group["lr"] = learner.lr * factor
        self._deck.manual_seed(Noise(settings.seed, self.epoch).word(GRID, 1))
        self._logged = {}
        if (batch := self._collected()) is not None:
            guards.same_policy(self, batch)
            self._set_level(batch)
            self.replay.add(batch, self.algorithm.keep)
            self.algorithm.learn(self)
        self._count_what_the_critic_asked()
        self.epoch += 1
        metrics = {"epoch": self.epoch, **self.counts, **self.summary(), "seconds": time.perf_counter() - began}
        self.history.append(metrics)
        return metrics

    def _set_level(self, batch: Batch) -> None:
        """Of a critic that learns: r and r + c must train alike (`ctrl.value`)."""
        assert batch.trajectory.reward is not None
        if "critic" in self.learners:
            self.critic.set_level(self.mean_over_samples(batch.trajectory.reward))

    def _count_what_the_critic_asked(self) -> None:
        """A structured critic asks the reward too, wherever V is wanted."""
        asked = getattr(self._critic, "asked", None)
        if asked is not None:
            self.counts["reward_calls"] += self._of_all(asked)
            self._critic.asked = 0  # type: ignore[union-attr]

    def _of_all(self, count: int) -> int:
        """The sum over processes."""
        return int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device)))

    def _collected(self) -> Batch | None:
        """This process's share of an epoch's trajectories; nothing, if some of any process left the numbers. Any other
        failure ends the run: nothing has moved since the last epoch, which is kept."""
        batch, failure = None, None
        try:
            batch = self.collect()
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            self.save()
            left = failure if isinstance(failure, NotFinite) else None
            if self.any(failure is not left):
                raise failure or RunFailed("another process failed in its rollout or reward: its message says how")
            guards.strike(self, "rollout", left)
            return None
        self.strikes["rollout"] = 0
        assert batch is not None
        self._look_at(batch)
        return batch

    def _look_at(self, batch: Batch) -> None:
        """Metrics of what was collected: the mean and the spread of rewards, and of final states."""
        self.counts["trajectories"] += self.settings.samples
        self.counts["reward_calls"] += self.settings.samples
        self.counts["network_calls"] += self._of_all(self._acting)
        self._acting = 0
        reward, x = batch.trajectory.reward, batch.trajectory.x[-1]
        assert reward is not None
        self.log("reward", reward)
        for name, v in {"reward_std": reward[None], "spread": x.flatten(1).T}.items():
            off_centre = v - self.mean_over_samples(v)[:, None]
            self.log(name, self.mean_over_samples(off_centre.square()).mean().sqrt())

    @torch.no_grad()
    def collect(self) -> Batch:
        """This process's share of an epoch's trajectories, with their rewards."""
        settings, device = self.settings, self.accelerator.device
        noise = Noise(settings.seed, self.epoch)
        times = settings.times(self.problem, noise)
        first = self.epoch * settings.samples
        ids = torch.arange(first + self.replay.rank, first + settings.samples, self.replay.world, device=device)
        behaviour = self.algorithm.behaviour(self.policy)
        if isinstance(behaviour, GaussianPolicy):
            behaviour = replace(behaviour, mean=self._counted(behaviour.mean))
        else:
            behaviour = self._counted(behaviour)
        paths = []
        for part in ids.split(settings.batch):
            with self.accelerator.autocast():
                cond = self.conditions(part)
                path = rollout(self.problem, behaviour, times, noise, part, solver=settings.solver, cond=cond)
                path = with_reward(path, self.problem.reward(path.x[-1], cond))
            paths.append(replace(path, cond=None))
        return Batch(concatenate(paths))

    def _counted(self, mean: Mean) -> Mean:
        """The same, counting its calls: how many a step makes is the solver's affair."""

        def counted(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
            self._acting += len(x)
            return mean(t, x, cond)

        return counted

    def rewarded(self, path: Trajectory) -> Trajectory:
        """The same trajectories with the reward as it is now."""
        self.counts["reward_calls"] += self.settings.samples
        end = batch_time(path.t[-1], path.x.dtype, len(path.ids))
        return with_reward(path, self._evaluate(lambda t, x, c: self.problem.reward(x, c), path.ids, end, path.x[-1]))

    # what an algorithm may ask for

    def at_nodes(
        self, f: Callable[..., Tensor], batch: Batch, *beside: str, samples: int | None = None, size: int | None = None
    ) -> Tensor:
        """f(t, x, *fields, cond) at every node of a batch, (N+1, B, ...), without a graph; the fields are those named
        in `beside`. samples: how many the batch has over all processes, if not an epoch's. size: nodes at a time, by
        default `settings.batch`; `settings.micro_batch` where f itself differentiates a network."""
        t, x, ids = batch.trajectory.flat()
        self.counts["network_calls"] += (samples or self.settings.samples) * (batch.steps + 1)
        fields = [batch.fields[name].flatten(0, 1) for name in beside]
        values = self._evaluate(f, ids, t, x, *fields, size=size)
        return values.unflatten(0, (batch.steps + 1, batch.samples))

    def _evaluate(
        self, f: Callable[..., Tensor], ids: Tensor, t: Tensor, x: Tensor, *fields: Tensor, size: int | None = None
    ) -> Tensor:
        """f(t, x, *fields, cond), `size` nodes at a time (`settings.batch`)."""
        parts, size = [], size or self.settings.batch
        for i in range(0, len(t), size):
            piece = slice(i, i + size)
            with torch.no_grad(), self.accelerator.autocast():
                at, *given = (v[piece].to(self.accelerator.device) for v in (ids, t, x, *fields))
                parts.append(f(*given, self.conditions(at)).to(x.dtype))
        return torch.cat(parts)

    def lay_actions(self, a_ref: Tensor | None = None) -> None:
        """Beside the newest batch: a_old, what the policy did at each node (its mean, if it explores), and a_ref, what
        the reference would do, which is asked unless it is given; where actions have no price nobody asks it, and a_ref
        is a_old. Without noise there is no KL to be logged."""
        batch = self.replay.batches[-1]
        batch.lay("a_old", self._acted(batch))
        if self.problem.free:
            batch.lay("a_ref", batch.fields["a_old"])
            return
        batch.lay("a_ref", self.at_nodes(self.problem.reference, batch) if a_ref is None else a_ref)
        if self.problem.noiseless:
            return
        self._lay_probe(batch)
        self.log_kl("kl", self.probe.fields["a_old"], self.probe.fields["a_ref"])

    def _lay_probe(self, batch: Batch) -> None:
        """What a KL is measured along: the batch, and below float32 a few of its paths, with the actions of policy and
        reference in float32."""
        self.probe = batch
        if self.precision == "no":
            return
        few = few_of(self.settings.samples, Noise(self.settings.seed, self.epoch))
        self.probe = batch.take(few[few % self.replay.world == self.replay.rank] // self.replay.world)
        self.probe.lay("a_old", self.at_probe(self.policy))
        self.probe.lay("a_ref", self.at_probe(self.problem.reference))

    def at_probe(self, f: Mean) -> Tensor:
        """f at the nodes of the paths along which a KL is measured, (N+1, b, *D'), in float32."""
        if self.probe.samples:
            return self.at_nodes(full(self.accelerator.device)(f), self.probe, samples=self.measured)
        self.counts["network_calls"] += self.measured * (self.probe.steps + 1)  # the other processes' calls
        return self.probe.fields["a_old"]

    def log_kl(self, name: str, a: Tensor, other: Tensor) -> None:
        """The path KL between actions at the nodes of `probe`, (N+1, b, *D') each, and its standard error."""
        nats, n = actions_kl(self.problem, self.probe.trajectory, a, other), self.measured
        mean = self.mean_over_samples(nats, n)
        self.log(name, mean)
        if n > 1:
            self.log(f"{name}_se", (self.mean_over_samples((nats - mean).square(), n) / (n - 1)).sqrt())

    def _acted(self, batch: Batch) -> Tensor:
        """The policy at the nodes, (N+1, B, *D'): as the rollout recorded it, and at the last node, where it did not
        act."""
        path = batch.trajectory
        if path.a is None or isinstance(self.algorithm.behaviour(self.policy), GaussianPolicy):
            return self.at_nodes(self.policy, batch)
        self.counts["network_calls"] += self.settings.samples
        t = batch_time(path.t[-1], path.x.dtype, batch.samples)
        return torch.cat([path.a, self._evaluate(self.policy, path.ids, t, path.x[-1])[None]])

    def lay_old_actions(self, size: int) -> None:
        """a_old beside the newest batch once more, as an update of `size` nodes evaluates the policy. In float32 that
        is what it did in the rollout; below, kernels of another shape round differently, which over all dimensions is a
        likelihood ratio far from 1, and a KL. If a kernel's numbers for a node depend on its shape alone, ratio and KL
        before the first update are exactly 1 and 0."""
        if self.precision == "no":
            return
        batch, actions = self.replay.batches[-1], []
        for part, counted in self.parts(self.nodes(Batch(batch.trajectory), range(batch.steps + 1)), size):
            with self.accelerator.autocast():
                actions.append(self.policy(part.t, part.x, part.cond)[:counted].detach())
        self.counts["network_calls"] += self.settings.samples * (batch.steps + 1)
        batch.lay("a_old", torch.cat(actions).to(part.x).unflatten(0, (batch.steps + 1, batch.samples)))

    def nodes(self, batch: Batch, k: range) -> Nodes:
        """All of a batch's nodes k, node by node."""
        index = torch.tensor(list(k)).repeat_interleave(batch.samples)
        return self.gather(batch, index, torch.arange(batch.samples).repeat(len(k)))

    def gather(self, batch: Batch, k: Tensor, b: Tensor) -> Nodes:
        """The nodes k of a batch's trajectories b, (n,) each."""
        return self._ready(batch.gather(k, b))

    def deal(
        self, updates: int, size: int, *, last: int | None = None, label: Label | None = None, calls: int = 1
    ) -> Iterator[Nodes]:
        """`updates` hands of `size` nodes, counted over all processes, from a shuffled deck of what is in store; node
        numbers up to `last` (all). Yields this process's equal share of each.

        label: what to lay beside the nodes; of many hands at once, so it may not depend on what the updates move. It
            may differentiate a network: it is called with `settings.micro_batch` nodes at a time.
        calls: network calls that label makes at a node.
        """
        last, together = self.settings.steps if last is None else last, max(self.settings.batch // size, 1)
        for held, owner in self.replay.deal(updates, size, 0, last, self._deck, together):
            drawn, sizes = share_out(held, owner, self.accelerator)
            nodes = self.labelled(self._ready(drawn), label, calls * owner.numel())
            for n, end in zip(sizes, itertools.accumulate(sizes), strict=True):
                yield nodes.part(slice(end - n, end))

    def labelled(self, nodes: Nodes, label: Label | None, calls: int) -> Nodes:
        """The nodes with what label(nodes) gives for them, in `calls` network calls over all processes."""
        if label is None:
            return nodes
        self.counts["network_calls"] += calls
        parts, micro = [], self.settings.micro_batch
        for i in range(0, len(nodes), micro):
            with torch.no_grad(), self.accelerator.autocast():
                parts.append(label(nodes.part(slice(i, i + micro))))
        names = parts[0] if parts else ()
        laid = {name: torch.cat([part[name] for part in parts]).to(nodes.x.dtype) for name in names}
        return replace(nodes, fields={**nodes.fields, **laid})

    def deal_paths(self, updates: int, size: int) -> Iterator[Batch]:
        """`updates` hands of `size` whole trajectories, counted over all processes, each hand from one epoch, from a
        shuffled deck of what is in store. Yields this process's share of each."""
        return map(self.here, self.replay.deal_paths(updates, size, self._deck))

    def here(self, batch: Batch) -> Batch:
        """A batch on this process's device, whole: to compute with at all of its nodes; `lay` what comes of it beside
        the batch itself."""
        return batch.to(self.accelerator.device)

    def _ready(self, nodes: Nodes) -> Nodes:
        nodes = nodes.each(lambda v: v.to(self.accelerator.device, non_blocking=True))
        return replace(nodes, cond=self.conditions(nodes.ids))

    def update(self, name: str, loss: Loss, nodes: Nodes, size: int, calls: int = 1) -> None:
        """One optimiser step of the model `name` on the mean of loss over `size` nodes, of which this process has
        some; `calls` network calls each. A critic without parameters, such as an exact one, is left as it is."""
        if name not in self.learners:
            return
        learner = self.learners[name]
        total = self.backward(learner, loss, nodes, size)
        self.counts["network_calls"] += calls * size
        self.accelerator.unscale_gradients(learner.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in learner.trained if p.grad is not None])
        if not bool(torch.isfinite(norm + total)):
            if not self._overflowed(total):
                guards.strike(self, name, guards.culprit(self, name, loss, nodes))
            return
        nn.utils.clip_grads_with_norm_(learner.trained, self.settings.max_grad_norm, norm)
        learner.step()
        self.strikes[name] = 0
        if name == "policy" and self.ema is not None:
            for average, p in zip(self.ema.parameters(), self.policy.parameters(), strict=True):
                if p.requires_grad:
                    average.data.lerp_(p.data, 1 - self.settings.ema)
        self.log(f"{name}_loss", total)
        self.log(f"{name}_grad_norm", norm)

    def _overflowed(self, total: Tensor) -> bool:
        """Whether the gradients of a finite loss overflowed float16, and the smaller scale from here on, of at least 1,
        may mend that. accelerate's `step_was_skipped` does not know of a step that a fused optimizer skips."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        before = scaler.get_scale()
        scaler.update()
        if not bool(torch.isfinite(total)) or scaler.get_scale() >= before:
            return False
        self.counts["overflows"] = self.counts.get("overflows", 0) + 1
        return scaler.get_scale() >= 1

    def backward(self, learner: Learner, loss: Loss, nodes: Nodes, size: int) -> Tensor:
        """The mean of loss over `size` nodes of all processes, (); its gradient is left in the model's parameters."""
        learner.optimizer.zero_grad()
        total = torch.zeros((), device=self.accelerator.device)
        for part, counted in self.parts(nodes, size):
            with self.accelerator.autocast():
                losses = loss(part)
            if losses.shape != part.t.shape:
                raise ValueError(f"loss must return one number a node, shape {tuple(part.t.shape)}, got {losses.shape}")
            share = losses[:counted].sum() / size
            self.accelerator.backward(share)
            total += share.detach()
        self._add_up(learner.trained)
        return self.accelerator.reduce(total)

    def parts(self, nodes: Nodes, size: int) -> Iterator[tuple[Nodes, int]]:
        """The nodes as an update of `size` takes them, at most `micro_batch` at a time, and how many of them count.
        Below float32, where kernels of another shape round differently, all parts have one length: the last is
        filled up."""
        length, even = self.settings.micro_batch, self.precision != "no"
        if even:
            length = min(length, -(-size // self.replay.world))
        for i in range(0, len(nodes), length):
            part = nodes.part(slice(i, i + length))
            yield (part.filled(length) if even else part), len(part)

    def _add_up(self, parameters: Sequence[Tensor]) -> None:
        """Gradients summed over processes. Where there is none it is zero, on any number of processes."""
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.accelerator.num_processes > 1:
            sum_in_place([p.grad for p in parameters if p.grad is not None])

    def any(self, here: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device)) > 0)

    def together(self, f: Callable[[], Any]) -> None:
        """Do it on every process; if it fails on one, it has failed on all, and none waits for another."""
        failure = None
        try:
            f()
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            raise failure or RunFailed("it failed on another process, whose message says how")

    def save(self) -> None:
        """Keep the last epoch, if there is a folder and it is not kept yet; every process calls it."""
        if self.settings.out is not None and self.epoch > self.kept:
            checkpoint.save(self)
            self.kept = self.epoch

    def mean_over_samples(self, v: Tensor, samples: int | None = None) -> Tensor:
        """The mean of v, (..., B), over the samples of all processes, (...); `samples` of them, if not an epoch's."""
        return self.accelerator.reduce(v.sum(-1)) / (samples or self.settings.samples)

    def mean_over_others(self, v: Tensor, group: int) -> Tensor:
        """For each sample the mean of v, (..., B), over the others of its group: `group` samples with ids in a row, on
        whatever processes they are."""
        ids = self.replay.batches[-1].trajectory.ids
        which = (ids - self.epoch * self.settings.samples) // group
        sums = v.new_zeros(*v.shape[:-1], -(-self.settings.samples // group))
        sums.index_add_(-1, which, v)
        return (self.accelerator.reduce(sums)[..., which] - v) / (group - 1)

    def log(self, name: str, value: Tensor | float) -> None:
        """A metric of this epoch: (B,) is averaged over samples, () is taken as it is; repeated ones are averaged. None
        is read from the device before the epoch ends."""
        value = torch.as_tensor(value).detach().to(self.accelerator.device, non_blocking=True, copy=True)
        self._logged.setdefault(name, []).append(self.mean_over_samples(value) if value.ndim else value)

    def summary(self) -> dict[str, float]:
        """The metrics of this epoch so far."""
        read = {name: torch.stack(values).tolist() for name, values in self._logged.items()}
        return {name: sum(values) / len(values) for name, values in read.items()}


def fit(
    problem: Problem,
    policy: nn.Module,
    algorithm: Algorithm,
    *,
    critic: Critic | None = None,
    conditions: Conditions | None = None,
    settings: Settings = Settings(),
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    accelerator: Accelerator | None = None,
) -> Result:
    """Train a policy.

    Args:
        policy: mean(t, x, cond) -> (B, *D) as a module; it is trained in place. It, the critic and every module that
            is an attribute of the problem are moved to the accelerator's device, unless their weights are offloaded.
        critic: learned or exact; see the algorithm.
        conditions: (n,) sample ids -> cond, anything that policy, reference and reward understand and `cond[index]`
            can pick from.
        callbacks: callback(run, metrics) after every epoch, on every process.
        resume: go on from the newest whole checkpoint in `settings.out`, if there is one.
        overwrite: begin anew in a folder that holds a run; what that left is deleted.
        accelerator: for devices, precision and processes; that of `ctrl.device.make_accelerator` by default.
    """

    if accelerator is None:
        accelerator = make_accelerator()
    else:
        accelerator.free_memory()  # what an earlier run left there would go into this one's checkpoints
    algorithm.check(problem, settings.solver, critic)
    if resume and settings.out is None:
        raise ValueError("resume needs settings.out, the folder with the checkpoints")
    run = Run(problem, policy, algorithm, critic, conditions, settings, accelerator)
    with locked(settings.out, accelerator):
        _compare(run, lambda: run.fixed)
        _begin(run, resume, overwrite)
        _compare(run, lambda: checkpoint.moving(run))
        _train(run, callbacks)
    return Result(policy, critic, run.ema, run.history)


def _compare(run: Run, digests: Callable[[], dict[str, str]]) -> None:
    """Raise unless all processes have the same weights."""
    if run.accelerator.num_processes == 1:
        return
    first, *others = gather_object([digests()])
    if apart := [name for name in first if any(other.get(name) != first[name] for other in others)]:
        raise ValueError(
            f"{', '.join(apart)} must be the same on all {len(others) + 1} processes, and differ: call "
            f"torch.manual_seed(seed) before the models are made"
        )


def _begin(run: Run, resume: bool, overwrite: bool) -> None:
    """Go on from what the folder holds, or begin anew."""
    out = run.settings.out
    if out is None:
        return
    if not (resume or overwrite) and checkpoint.folders(out):
        raise ValueError(
            f"settings.out = {out} holds checkpoints already: pass resume=True, overwrite=True, or another folder"
        )
    if overwrite and not resume:
        checkpoint.clear(run)
    checkpoint.load_newest(run)
    checkpoint.check_room(run)


def _train(run: Run, callbacks: Sequence[Callback]) -> None:
    """The epochs that are left."""
    settings = run.settings
    bar = tqdm(
        total=settings.epochs, initial=run.epoch, disable=not (settings.progress and run.accelerator.is_main_process)
    )
    with bar, run.stops:
        while run.epoch < settings.epochs:
            metrics = run.step_epoch()
            run.together(lambda m=metrics: _write(run, m))  # type: ignore[misc]
            if run.epoch % settings.checkpoint_every == 0 or run.epoch == settings.epochs:
                run.save()
            _show(bar, metrics, settings.samples)
            for callback in callbacks:
                callback(run, metrics)
            if run.epoch < settings.epochs:
                run.stops.epoch_ends()
            _stop_if_asked(run)


def _show(bar: tqdm, metrics: dict[str, Any], samples: int) -> None:
    """What a bar says of an epoch."""
    shown: dict[str, str] = {name: f"{metrics[name]:.3g}" for name in ("reward", "kl") if name in metrics}
    with suppress(OSError):  # nobody reads it any more
        bar.update()
        bar.set_postfix({**shown, "samples/s": f"{samples / metrics['seconds']:.3g}"})


def _stop_if_asked(run: Run) -> None:
    """If any process was asked to: keep this epoch, and exit."""
    if not run.any(bool(run.stops.code)):
        return
    run.save()
    why = run.stops.why or "another process was asked to stop"
    with suppress(OSError):
        run.accelerator.print(
            f"{why}: stopped after epoch {run.epoch} of {run.settings.epochs}, which is kept; resume goes on"
        )
    raise Stopped(run.stops.code or TIME_UP)


def _write(run: Run, metrics: dict[str, Any]) -> None:
    """One line of metrics.jsonl."""
    if run.settings.out is None or not run.accelerator.is_main_process:
        return
    run.settings.out.mkdir(parents=True, exist_ok=True)
    try:
        with (run.settings.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as wrong:
        raise RunFailed(
            f"metrics.jsonl could not be written to {run.settings.out}: {wrong}. The checkpoints are whole: make room, "
            f"and resume"
        ) from wrong
