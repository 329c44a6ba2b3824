"""What a run watches in itself: that what acts is what is trained, that numbers are numbers, that nothing collapses."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ctrl.linop import dot
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem, ScoreAsAction
from ctrl.regularize import kl_rate
from ctrl.rollout import NotFinite
from ctrl.training.epoch import Epoch
from ctrl.training.interrupts import Stops

UNIT = {"no": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-9}
"""Rounding of one number, by accelerate's name of the precision; tf32 is what CUDA's convolutions take for float32."""


def check_on_policy(run: Epoch, collection: Collection) -> str | None:
    """What is wrong unless the policy, called as an update calls it, does what it did in the rollout: else likelihood
    ratios and on-policy gradients are those of another policy. Both are compared at each time step, for samples of a
    chunk of the rollout, the whole chunk at a time, so that kernels see the shapes they saw then, and no activations
    are kept:

        E of the integral of ½ g² |a - a_rollout|² dt = E of the integral of ½ |d eps|² d lambda,

    at eta = 1 their path KL, in nats; without noise, in units of the price of actions. Dropout, statistics of a batch
    (a call has nodes of all times), a condition that changes from call to call, or an adapter that is on in one of them
    alone, show up here.
    """
    path = collection.trajectory
    if path.a is None or run.explores:
        return None
    chunk = min(collection.samples, run.settings.batch)
    place = torch.arange(-(-collection.steps // chunk) * chunk)
    k, b = place % collection.steps, place % chunk
    nodes = run.gather_nodes(collection, k, b)
    apart = _apart(run, nodes, path.a[k.to(path.x.device), b.to(path.x.device)], chunk)
    apart = apart / k.bincount()[k].to(apart)  # of the nodes at a time step, the mean
    total, worst = float(apart.sum()), int(apart.argmax())
    allowed = run.settings.mismatch + rounding(run.problem, run.engine.precision)
    if total <= allowed:
        return None
    return (
        f"the policy that is trained is not the one that acted: {total:.3g} nats apart on a path, where "
        f"{allowed:.3g} are allowed (settings.mismatch), most at t = {float(nodes.t[worst]):.4g} of sample id "
        f"{int(nodes.ids[worst])}. Look for dropout, batch statistics, conditions or adapters that change"
    )


def _apart(run: Epoch, nodes: Nodes, acted: Tensor, size: int) -> Tensor:
    """Each node's share of its path's KL between the actions of the rollout and those of an update, (n,)."""
    parts = []
    for i in range(0, len(nodes), size):
        n = nodes.part(slice(i, i + size))
        with run.autocast(), torch.autograd.graph.saved_tensors_hooks(_forget, _forget):
            a = run.policy(n.t, n.x, n.cond)
        miss = a.detach().to(acted) - acted[i : i + size]
        if run.problem.noiseless:
            rate = dot(miss, run.problem.penalty(n.t).apply(miss)) / 2
        else:
            rate = kl_rate(run.problem, n.t, miss, torch.zeros_like(miss))
        parts.append(n.w.to(rate) / (run.steps + 1) * rate)
    return torch.cat(parts)


def _forget(_: Tensor) -> Tensor:
    """In place of what autograd would keep."""
    return torch.empty(0)


def rounding(problem: Problem, precision: str) -> float:
    """What the same network in a kernel of another shape may differ by, in nats: eight roundings in each of the D
    numbers of an evaluation, ½ D (8u)² (lambda(T) - lambda(0)) if the score is one, times `error_gain`."""
    if not isinstance(problem, ScoreAsAction):
        return 0.0
    ends = torch.tensor([problem.s_min, problem.s_max], dtype=torch.float64)
    span = float(-problem.noising.log_snr(ends).diff())
    one = 0.5 * math.prod(problem.shape) * (8 * UNIT.get(precision, UNIT["bf16"])) ** 2 * span
    return problem.error_gain * one


def keep(file: Path, found: NotFinite) -> str:
    """Write what was there to a file, and say where."""
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in found.tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, {"message": str(found)})
    except (OSError, SafetensorError) as wrong:
        return f", not kept: {wrong}"
    return f", kept in {file}"


class Watched(Protocol):
    """Of a run, what a guard looks at."""

    @property
    def history(self) -> list[dict[str, Any]]: ...
    @property
    def stops(self) -> Stops: ...


@dataclass(frozen=True)
class Guards:
    """A callback that warns of collapse, or ends the run: the best checkpoint is kept.

    Attributes:
        kl: nats a sample that the path KL should not exceed.
        reward_std: the rewards of an epoch should spread by more than this.
        diversity: the final states should spread by more than this part of what they did in the first epoch.
        stop: end the run, with exit status 1, instead of warning only.
    """

    kl: float = math.inf
    reward_std: float = 0.0
    diversity: float = 0.5
    stop: bool = False

    def __call__(self, run: Watched, metrics: dict[str, Any]) -> None:
        first = next((epoch for epoch in run.history if "spread" in epoch), metrics)
        for fault in self.faults(metrics, first):
            warnings.warn(f"epoch {metrics['epoch']}: {fault}", stacklevel=2)
            if self.stop:
                run.stops.ask(1, fault)

    def faults(self, now: dict[str, Any], first: dict[str, Any]) -> list[str]:
        """What is wrong by an epoch's metrics."""
        if "reward" not in now:
            return []
        found = []
        if now.get("kl", 0.0) > self.kl:
            found.append(
                f"the path KL is {now['kl']:.3g} nats, over {self.kl:g}: raise beta, or lower the learning rate"
            )
        if now["reward_std"] <= self.reward_std:
            found.append(f"all rewards are {now['reward']:.4g}: there is nothing to learn from")
        if now["spread"] < self.diversity * first["spread"]:
            found.append(
                f"samples spread by {now['spread']:.3g}, {now['spread'] / first['spread']:.0%} of what they did: the "
                f"policy has collapsed"
            )
        return found
