"""What a run needs, found before any weights are loaded: memory, disk and work.

Calls of the network are counted in a rehearsal: `ctrl.fit` itself, on states of one pixel, with networks of one weight.
The cost of a call is measured on tensors without data (torch's FakeTensorMode), with the model's own passes at full
size: the bytes that are alive at a time, and the floating-point operations.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from ctrl.fit import Run, fit
from ctrl.training import checkpoint
from ctrl.training.replay import ON_DEVICE, epoch_bytes
from ctrl.training.split import whole_at_once
from ctrl.value import StructuredCritic
from scale.diffusion import Score, WithoutAdapters, images_at_a_time, pictures_of
from scale.families import Widths, network_of
from scale.models import Outline
from scale.rewards import Reward, unmade
from scale.settings import Tuning
from scale.tuning import Task, alone

Parts = Callable[[Outline, Reward], Task]
"""parts(outline, reward of images) -> what `fit` is handed."""
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
RATES = {
    "bf16": (125.0, "40 % of an A100's peak in half precision"),
    "no": (60.0, "40 % of an A100's peak in TensorFloat-32"),
    "cpu": (0.05, "two CPU cores"),
}
"""TFLOP/s that are assumed to be sustained."""


# ------------------------------------------------------------------------------------------ how often


AT_A_TIME = 4096
"""Nodes in a rehearsal."""


class Rows(nn.Module):
    """A network of one weight in place of the model's. It counts the rows that it is given, those whose gradient
    reaches its output, and those whose gradient reaches its weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(in_channels=channels, sample_size=1)
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: Counter[str] = Counter()

    def forward(self, x: Tensor, *_: Any, **options: Any) -> tuple[Tensor]:
        n, weight = len(x), self.weight * 1
        self.seen["forward"] += n
        out = weight * x
        for name, v in {"back": out, "weights": weight}.items():
            if v.requires_grad:
                v.register_hook(lambda _, name=name: self.seen.update({name: n}))  # type: ignore[misc]
        return (out,)


class Judged:
    """In place of a reward of images, and of a VAE before it. It counts likewise."""

    def __init__(self, differentiable: bool) -> None:
        self.differentiable = differentiable
        self.seen: Counter[str] = Counter()

    def __call__(self, images: Tensor, *_: Any) -> Tensor:
        n = len(images)
        self.seen["images"] += n
        if images.requires_grad:
            images.register_hook(lambda _: self.seen.update({"image_slopes": n}))
        return images.flatten(1).sum(1)


def rehearsed(
    s: Tuning, outline: Outline, parts: Parts, differentiable: bool, accelerator: Accelerator
) -> list[Counter]:
    """Every epoch's counts over all processes, those of the critic alone first: the rows of the networks, the images
    that are rewarded, and ctrl's own network calls. All epochs are the same once the store is full."""
    reward = Judged(differentiable)
    rows, small = (
        Rows(network_of(outline).config.in_channels),
        Widths(1, 1, 1, 1) if outline.widths.tokens else Widths(),
    )
    counting = outline.replace(**{outline.family.network: rows}, vae=None)
    task = parts(dataclasses.replace(counting, widths=small), reward)
    found = _epochs(alone(s, task), s.pretrain, reward, accelerator) if s.pretrain else []
    return found + _epochs(task, s.epochs, reward, accelerator)


def _epochs(task: Task, epochs: int, reward: Judged, accelerator: Accelerator) -> list[Counter]:
    unets = [cast(Rows, score.network) for score in (task.policy, task.problem.reference)]
    counts = [Counter[str]()]

    def look(run: Run, metrics: dict[str, Any]) -> None:
        here = sum((part.seen for part in (*unets, reward)), Counter[str]())
        counts.append(sum(gather_object([here]), Counter({"network_calls": metrics["network_calls"]})))

    for part in (*unets, reward):
        part.seen.clear()
    made = dataclasses.replace(
        task.fit, epochs=min(epochs, task.algorithm.keep + 1), out=None, max_hours=None, progress=False, split=False,
        lr=0.0, critic_lr=0.0, reward_lr=0.0, batch=AT_A_TIME, micro_batch=AT_A_TIME,
    )  # fmt: skip
    fit(
        task.problem, task.learner, task.algorithm, critic=task.critic, conditions=task.conditions, settings=made,
        callbacks=[look], accelerator=accelerator,
    )  # fmt: skip
    found = [after - before for before, after in pairwise(counts)]
    return found + [found[-1]] * (epochs - len(found))


# ------------------------------------------------------------------------------------------ what each costs


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
_ATTENTION_BACK = torch.ops.aten._scaled_dot_product_flash_attention_backward
FLOPS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATTENTION],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[_ATTENTION_BACK],
}


class Meter(TorchDispatchMode):
    """While it is entered: `flops`, and `most`, the most bytes of tensors alive at a time that were made within."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.most = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see((args, kwargs), made=False)
        out = func(*args, **kwargs)
        self.see(out, made=True)
        if formula := FLOPS.get(func._overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def see(self, tree: Any, made: bool) -> None:
        """What is an argument before it was the result of anything was there before."""
        for v in tree_iter(tree):
            if isinstance(v, Tensor) and (key := (storage := v.untyped_storage())._cdata) not in self.alive:
                self.alive[key] = storage.nbytes() if made else 0
                self.now += self.alive[key]
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, key)

    def drop(self, key: int) -> None:
        """A storage is freed."""
        self.now -= self.alive.pop(key)


@dataclass(frozen=True)
class Cost:
    """Of a pass of some rows: the most bytes alive at a time besides what was there before, and the operations for each
    row."""

    peak: int = 0
    flops: float = 0.0

    @staticmethod
    def of(rows: int, work: Callable[[], Any]) -> Cost:
        """Measured."""
        with Meter() as meter:
            work()
        return Cost(meter.most, meter.flops / rows)


def measured(s: Tuning, task: Task, vae: nn.Module | None, counts: Counter[str]) -> dict[str, Cost]:
    """The cost of what is counted: forward, of policy or reference at `batch` nodes without a graph; update, of the
    policy with the gradient to its weights, and slope, of the reference with the gradient to the state, at
    `micro_batch` nodes; image and image_slope, of images decoded at a time. The task is of an outline: its networks and
    the VAE have no data, before and after."""
    half = PRECISIONS.get(s.precision)
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy, reference = cast(Score, task.policy), cast(Score, task.problem.reference)
        for network in (policy, reference, vae):
            if network is not None and next(network.parameters()).is_meta:  # the reference may be the policy's network
                _fill(network)
        for p in policy.parameters():  # they are there from the second part of an update on
            p.grad = torch.zeros_like(p) if p.requires_grad else None

        def out(score: Score, n: int) -> tuple[Tensor, Tensor]:
            cond = None if task.conditions is None else task.conditions(torch.zeros(n, dtype=torch.int64))
            x = torch.zeros(n, *task.problem.shape).requires_grad_(score is reference)
            with torch.autocast("cpu", half, enabled=half is not None):
                return score(torch.full((n,), 0.5), x, cond).sum(), x

        def decoded(gradient: bool) -> None:
            z = torch.zeros(images, *task.problem.shape).requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                brightness = pictures_of(vae, z).sum()
            if gradient:
                torch.autograd.grad(brightness, z)

        calls, micro = policy.calls, s.micro_batch
        found = {
            "forward": Cost.of(s.batch * calls, lambda: torch.no_grad()(out)(policy, s.batch)),
            "update": Cost.of(micro * calls, lambda: torch.autograd.backward(out(policy, micro)[0])),
        }
        if counts["back"] > counts["weights"]:
            found["slope"] = Cost.of(micro * calls, lambda: torch.autograd.grad(*out(reference, micro)))
        if vae is not None:
            images = min(micro, images_at_a_time(vae, torch.zeros(1, *task.problem.shape)))
            found["image"] = Cost.of(images, lambda: decoded(False))
            if counts["image_slopes"]:
                once = Cost.of(images, lambda: decoded(True))
                again = found["image"].flops if images < micro else 0.0  # `Decoded` decodes each piece twice
                found["image_slope"] = Cost(once.peak, once.flops + again)
    return found


def _fill(network: nn.Module) -> None:
    """Tensors that say they have data, in place of those of an outline. (`to_empty` swaps tensors, which fails where
    anything has a weak reference to one.)"""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
        for name, v in module._buffers.items():
            if v is not None:
                module._buffers[name] = torch.empty_like(v, device="cpu")


# ------------------------------------------------------------------------------------------ what it comes to


def operations(counts: Counter[str], costs: Mapping[str, Cost]) -> float:
    """Of all that is counted."""
    slopes, image_slopes = counts["back"] - counts["weights"], counts["image_slopes"]
    times = {
        "forward": counts["forward"] - counts["back"], "update": counts["weights"], "slope": slopes,
        "image": counts["images"] - image_slopes, "image_slope": image_slopes,
    }  # fmt: skip
    return sum(times[name] * cost.flops for name, cost in costs.items())


def learning(task: Task) -> dict[str, nn.Module]:
    """The models that have something to learn, by the names that a run has for them."""
    models = {"policy": task.learner, "critic": task.critic, "reward": task.problem.reward}
    return {
        name: model for name, model in models.items()
        if isinstance(model, nn.Module) and any(p.requires_grad for p in model.parameters())
    }  # fmt: skip


def size_of(networks: Iterable[nn.Module]) -> int:
    """Bytes of their weights."""
    return sum(p.numel() * p.element_size() for network in networks for p in network.parameters())


def memory(
    s: Tuning, task: Task, costs: Mapping[str, Cost], others: Mapping[str, int], processes: int
) -> dict[str, int]:  # fmt: skip
    """Bytes on a device, by what they are for. task: of the outline; others: what is there besides."""
    models = learning(task)
    trained = sum(p.numel() for model in models.values() for p in model.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in task.learner.parameters() if p.requires_grad or s.split)  # whose copy is whole
    network = size_of([task.policy])
    shared = isinstance(cast(Score, task.problem.reference).network, WithoutAdapters)
    epoch = epoch_bytes(-(-s.samples // processes), s.steps, task.problem.shape)
    working = {name: cost.peak for name, cost in costs.items()}
    if s.offload_reference and "slope" in working:
        working["slope"] += network  # the graph holds what was brought
    if isinstance(task.critic, StructuredCritic) and "image_slope" in working:
        working["slope"] += working["image_slope"]  # grad V goes through both
    held = {
        "weights": size_of(models.values()), "gradients": 4 * trained, "optimiser": (2 if s.eight_bit else 8) * trained,
        "untuned weights": 0 if shared or s.offload_reference else network, "average": 4 * averaged if s.ema else 0,
    }  # fmt: skip
    if s.split and processes > 1:
        at_once = 4 * whole_at_once(task.policy)
        held = {name: v // processes for name, v in held.items()} | {"weights whole at once": at_once}
    return {
        **held, **others, "trajectories": epoch * max(1, min(task.algorithm.keep, ON_DEVICE // epoch)),
        "activations": max(working.values()),
    }  # fmt: skip


def text(
    s: Tuning, outline: Outline, parts: Parts, accelerator: Accelerator, *, differentiable: bool, evaluation: int,
    others: Mapping[str, int],
) -> str:  # fmt: skip
    """What `--dry-run` prints after the settings, as comments.

    Args:
        differentiable: whether the reward has a gradient.
        evaluation: network calls of the evaluation, each at one state.
        others: bytes of what is on the device besides the networks and the critic, by name.
    """
    epochs = rehearsed(s, outline, parts, differentiable, accelerator)
    task, processes = parts(outline, unmade), accelerator.num_processes
    disk = checkpoint.size(
        learning(task), bool(s.ema), epoch_bytes(s.samples, s.steps, task.problem.shape), task.algorithm.keep
    )
    total = sum(epochs, Counter())
    costs = measured(s, task, outline.vae, total)
    held = memory(s, task, costs, others, processes)
    sizes = ", ".join(f"{name} {_size(v)}" for name, v in held.items() if v)
    last, slopes = epochs[-1], epochs[-1]["back"] - epochs[-1]["weights"]
    said = f"""memory of a device: {_size(sum(held.values()))}: {sizes}. Besides: the reward's own, and the driver's
disk: {checkpoint.most(s.keep_checkpoints)} checkpoints of {disk / 1e9:.2f} GB (the last, the best, one being written)
network calls per epoch: {last["forward"]:,}, of them {last["weights"]:,} with the gradient to the weights and \
{slopes:,} with that to the state
training: {total["forward"]:,} network calls, {_time(operations(total, costs) / processes, s.precision, accelerator)}
evaluation: {evaluation:,} network calls, {_time(evaluation * costs["forward"].flops / processes, "no", accelerator)}
hours are at an assumed rate, and leave out the reward's own time"""
    return "\n".join(f"# {line}" for line in said.splitlines())


def _size(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def _time(flops: float, precision: str, accelerator: Accelerator) -> str:
    """Of so many operations on each process."""
    rate, whose = RATES.get("cpu" if accelerator.device.type == "cpu" else precision, RATES["bf16"])
    return f"{flops / 1e12:,.3g} TFLOP on a device: {flops / rate / 3.6e15:.2g} hours at {rate:g} TFLOP/s ({whose})"
