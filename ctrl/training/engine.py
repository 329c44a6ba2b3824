"""The models that learn, and how an update becomes one optimiser step of one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctrl.algorithms.base import Update
from ctrl.nodes import Nodes
from ctrl.rollout import NotFinite
from ctrl.training.metrics import Metrics
from ctrl.training.precision import precision_of
from ctrl.training.processes import sum_in_place
from ctrl.training.settings import Settings
from ctrl.training.split import in_step, split, splits, whole


def learns(model: Any) -> bool:
    """Whether it is a module with something to train."""
    return isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())


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


class Engine:
    """Losses are summed over nodes and divided by the global count, and gradients are added up over processes; so a
    step does not depend on micro-batches or on the number of processes.

    Attributes:
        learners: by name: policy; critic and reward, where they have parameters that learn.
        ema: the averaged policy, if asked for.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: Any,
        reward: Any,
        settings: Settings,
        metrics: Metrics,
        accelerator: Accelerator,
    ) -> None:
        self.settings, self.metrics, self.accelerator = settings, metrics, accelerator
        self.policy = policy
        if not learns(policy):
            raise ValueError(
                f"policy has nothing to train: it must be a torch.nn.Module with parameters that require a gradient, "
                f"got {type(policy).__name__}"
            )
        self.split = splits(settings.split, accelerator)
        self.ema = self._average_of(policy) if settings.ema else None
        self.learners = {"policy": self._learner("policy", policy, settings.lr)}
        for name, model, lr in (("critic", critic, settings.critic_lr), ("reward", reward, settings.reward_lr)):
            if learns(model):
                self.learners[name] = self._learner(name, model, lr)

    def _average_of(self, policy: nn.Module) -> nn.Module:
        """A copy, which shares the frozen weights unless it is split."""
        frozen = {} if self.split else {id(p): p for p in policy.parameters() if not p.requires_grad}
        average = copy.deepcopy(policy, frozen).requires_grad_(False)
        if self.split:
            split(average, "the averaged policy", self.accelerator)
        return average

    def _learner(self, name: str, model: nn.Module, lr: float) -> Learner:
        if self.split:
            split(model, name, self.accelerator)
        trained = [p for p in model.parameters() if p.requires_grad]
        forward = model.forward
        self.accelerator.prepare_model(model, evaluation_mode=True)
        if self.accelerator.native_amp:  # accelerate's forward would round even where autocast is off
            model.forward = forward
        return Learner(model, self.accelerator.prepare_optimizer(self.settings.optimizer(trained, lr=lr)), lr)

    @property
    def precision(self) -> str:
        """Of the networks' arithmetic: no is float32."""
        return precision_of(self.accelerator)

    def set_rates(self, factor: float) -> None:
        """Learning rates, relative to their full size."""
        for learner in self.learners.values():
            for group in learner.optimizer.param_groups:
                group["lr"] = learner.lr * factor

    def step(self, update: Update) -> NotFinite | None:
        """One optimiser step; or nothing, and where a number was none."""
        learner = self.learners.get(update.name)
        if learner is None:
            return None
        loss = self.differentiate(update)
        self.metrics.count("network_calls", update.calls * update.size)
        self.accelerator.unscale_gradients(learner.optimizer)
        norm = whole(nn.utils.get_total_norm([p.grad for p in learner.trained if p.grad is not None]))
        if not bool(torch.isfinite(norm + loss)):
            return None if self._overflowed(loss) else self.locate_nonfinite(update)
        nn.utils.clip_grads_with_norm_(learner.trained, self.settings.max_grad_norm, norm)
        learner.step()
        if update.name == "policy":
            self._average()
        self.metrics.log(f"{update.name}_loss", loss)
        self.metrics.log(f"{update.name}_grad_norm", norm)
        return None

    def differentiate(self, update: Update) -> Tensor:
        """The mean of the loss over the nodes of all processes, (); its gradient is left in the model's parameters."""
        learner = self.learners[update.name]
        learner.optimizer.zero_grad()
        total = torch.zeros((), device=self.accelerator.device)
        for part, counted in self.micro_batches(update.nodes, update.size):
            with self.accelerator.autocast():
                losses = update.loss(part)
            if losses.shape != part.t.shape:
                raise ValueError(f"loss must return one number a node, shape {tuple(part.t.shape)}, got {losses.shape}")
            share = losses[:counted].sum() / update.size
            self.accelerator.backward(share * self.accelerator.num_processes if self.split else share)  # it divides
            total += share.detach()
        self._add_up(learner.trained)
        return self.accelerator.reduce(total)

    def micro_batches(self, nodes: Nodes, size: int) -> Iterator[tuple[Nodes, int]]:
        """The nodes as an update of `size` takes them, at most `settings.micro_batch` at a time, and how many of them
        count. Below float32, where kernels of another shape round differently, all parts have one length: the last is
        filled up."""
        length, even = self.settings.micro_batch, self.precision != "no"
        if even:
            length = min(length, -(-size // self.accelerator.num_processes))
        for piece, counts in self.pieces(len(nodes), length):
            part = nodes.part(piece)
            yield (part.filled(length) if even else part), len(part) if counts else 0

    def pieces(self, n: int, size: int) -> Iterator[tuple[slice, bool]]:
        """Of n things `size` at a time, as often on every process as models that are split ask for, and whether these
        count."""
        return in_step(n, size, self.accelerator, self.split)

    def _add_up(self, parameters: list[nn.Parameter]) -> None:
        """Gradients summed over processes. Where there is none it is zero, on any number of processes."""
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if self.accelerator.num_processes > 1 and not self.split:
            sum_in_place([p.grad for p in parameters if p.grad is not None])

    def _average(self) -> None:
        """torch's own average would hold the frozen weights a second time."""
        if self.ema is None:
            return
        for average, p in zip(self.ema.parameters(), self.policy.parameters(), strict=True):
            if p.requires_grad:
                average.data.lerp_(p.data, 1 - self.settings.ema)

    def _overflowed(self, loss: Tensor) -> bool:
        """Whether the gradients of a finite loss overflowed float16, and the smaller scale from here on, of at least 1,
        may mend that. accelerate's `step_was_skipped` does not know of a step that a fused optimizer skips."""
        scaler = self.accelerator.scaler
        if scaler is None:
            return False
        before = scaler.get_scale()
        scaler.update()
        if not bool(torch.isfinite(loss)) or scaler.get_scale() >= before:
            return False
        self.metrics.count("overflows", 1)
        return scaler.get_scale() >= 1

    def locate_nonfinite(self, update: Update) -> NotFinite:
        """What is not finite in an update: the first node with such a loss, or else the first parameter with such a
        gradient. The nodes are attached."""
        name, nodes, losses = update.name, update.nodes, torch.zeros(0)
        size = self.settings.micro_batch
        with torch.no_grad(), self.accelerator.autocast():
            for piece, counts in self.pieces(len(nodes), size):
                found = update.loss(nodes.part(piece)).to(nodes.x)
                losses = torch.cat([losses.to(nodes.x), found]) if counts else losses
        bad = (~losses.isfinite()).nonzero()
        parameters = self.learners[name].model.named_parameters()
        gradients = [n for n, p in parameters if p.grad is not None and not bool(whole(p.grad.isfinite().all()))]
        if len(bad):
            i = int(bad[0])
            place = f"step {int(nodes.k[i])} (t = {float(nodes.t[i]):.4g}) of sample id {int(nodes.ids[i])}"
            where = f"the loss is {float(losses[i])} at {place}"
        elif gradients:
            where = f"the gradient of {gradients[0]} is not finite"
        else:
            where = "a sum is not finite, or another process's"
        kept = {"t": nodes.t, "x": nodes.x, "ids": nodes.ids, "losses": losses, **nodes.fields}
        said = f"{name}: {where}; take a smaller learning rate, or look at what the {name} returns there"
        return NotFinite(said, **kept)
