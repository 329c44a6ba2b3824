"""What a run watches in itself: that what acts is what is trained, that numbers are numbers, that nothing collapses."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ctrl.gaussian import GaussianPolicy
from ctrl.linop import dot
from ctrl.problem import Problem, ScoreAsAction
from ctrl.regularize import kl_rate
from ctrl.replay import Batch, Nodes
from ctrl.rollout import NotFinite

if TYPE_CHECKING:
    from ctrl.fit import Loss, Run

UNIT = {"no": 2.0**-24, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-9}
"""Rounding of one number, by accelerate's name of the precision; tf32 is what CUDA's convolutions take for float32."""


def same_policy(run: Run, batch: Batch) -> None:
    """Raise unless the policy, called as an update calls it, does what it did in the rollout: else likelihood ratios
    and on-policy gradients are those of another policy. Both are compared at each time step, for samples of a chunk of
    the rollout, the whole chunk at a time, so that kernels see the shapes they saw then, and no activations are kept:

        E of the integral of ½ g² |a - a_rollout|² dt = E of the integral of ½ |d eps|² d lambda,

    at eta = 1 their path KL, in nats; without noise, in units of the price of actions. Dropout, statistics of a batch
    (a call has nodes of all times), a condition that changes from call to call, or an adapter that is on in one of them
    alone, show up here.
    """
    path = batch.trajectory
    if path.a is None or isinstance(run.algorithm.behaviour(run.policy), GaussianPolicy):
        return
    chunk = min(batch.samples, run.settings.batch)
    place = torch.arange(-(-batch.steps // chunk) * chunk)
    k, b = place % batch.steps, place % chunk
    nodes = run.gather(batch, k, b)
    apart = _apart(run, nodes, path.a[k.to(path.x.device), b.to(path.x.device)], chunk)
    apart = apart / k.bincount()[k].to(apart)  # of the nodes at a time step, the mean
    total, worst = float(apart.sum()), int(apart.argmax())
    allowed = run.settings.mismatch + rounding(run.problem, run.precision)
    if run.any(not total <= allowed):
        raise ValueError(
            f"the policy that is trained is not the one that acted: {total:.3g} nats apart on a path, where "
            f"{allowed:.3g} are allowed (settings.mismatch), most at t = {float(nodes.t[worst]):.4g} of sample id "
            f"{int(nodes.ids[worst])}. Look for dropout, batch statistics, conditions or adapters that change"
        )


def _apart(run: Run, nodes: Nodes, acted: Tensor, size: int) -> Tensor:
    """Each node's share of its path's KL between the actions of the rollout and those of an update, (n,)."""
    parts = []
    for i in range(0, len(nodes), size):
        n = nodes.part(slice(i, i + size))
        with run.accelerator.autocast(), torch.autograd.graph.saved_tensors_hooks(_forget, _forget):
            a = run.policy(n.t, n.x, n.cond)
        miss = a.detach().to(acted) - acted[i : i + size]
        if run.problem.noiseless:
            rate = dot(miss, run.problem.penalty(n.t).apply(miss)) / 2
        else:
            rate = kl_rate(run.problem, n.t, miss, torch.zeros_like(miss))
        parts.append(n.w.to(rate) / (run.settings.steps + 1) * rate)
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


def culprit(run: Run, name: str, loss: Loss, nodes: Nodes) -> NotFinite:
    """Where an update of the model `name` left the numbers: the first node whose loss did, or else the parameter whose
    gradient did; with the nodes, to be looked at."""
    size, losses = run.settings.micro_batch, torch.zeros(0)
    with torch.no_grad(), run.accelerator.autocast():
        for i in range(0, len(nodes), size):
            losses = torch.cat([losses.to(nodes.x), loss(nodes.part(slice(i, i + size))).to(nodes.x)])
    bad = (~losses.isfinite()).nonzero()
    parameters = run.learners[name].model.named_parameters()
    gradients = [n for n, p in parameters if p.grad is not None and not bool(p.grad.isfinite().all())]
    if len(bad):
        i = int(bad[0])
        place = f"step {int(nodes.k[i])} (t = {float(nodes.t[i]):.4g}) of sample id {int(nodes.ids[i])}"
        where = f"the loss is {float(losses[i])} at {place}"
    else:
        where = (
            f"the gradient of {gradients[0]} is not finite"
            if gradients
            else "a sum is not finite, or another process's"
        )
    kept = {"t": nodes.t, "x": nodes.x, "ids": nodes.ids, "losses": losses, **nodes.fields}
    return NotFinite(f"{name}: {where}; take a smaller learning rate, or look at what the {name} returns there", **kept)


def strike(run: Run, name: str, found: NotFinite | None) -> None:
    """Something left the numbers, here or on another process. It is kept for inspection and left out, with a warning;
    `patience` times in a row, and the run ends."""
    run.strikes[name] = run.strikes.get(name, 0) + 1
    found = found or NotFinite(f"{name}: on another process")
    epoch, times = run.epoch + 1, run.strikes[name]
    kept = keep(run, name, found)
    said = f"epoch {epoch}: {found}{kept} ({times} in a row)"
    if times >= run.settings.patience:
        raise NotFinite(said) from found
    warnings.warn(f"{said}; this {'epoch' if name == 'rollout' else 'update'} is left out", stacklevel=3)


def keep(run: Run, name: str, found: NotFinite) -> str:
    """Write what was there to OUT/not-finite, and say where."""
    if run.settings.out is None or not found.tensors:
        return ""
    place = f"epoch-{run.epoch + 1:06d}-{name}-{run.strikes[name]}-{run.replay.rank}.safetensors"
    file = run.settings.out / "not-finite" / place
    tensors = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in found.tensors.items()}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, {"message": str(found)})
    except (OSError, SafetensorError) as wrong:
        return f", not kept: {wrong}"
    return f", kept in {file}"


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

    def __call__(self, run: Run, metrics: dict[str, Any]) -> None:
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
