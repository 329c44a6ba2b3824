"""What processes send one another: gradients, to be summed; nodes, so that all have equal shares of a minibatch; and
whether all is well."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from ctrl.nodes import Nodes
from ctrl.training.interrupts import RunFailed

BUCKET = 32 * 2**20
"""Bytes of gradients in one message, unless a single one has more."""
_KINDS = {
    kind for kind in DistributedType
    if kind.name in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_SDAA", "MULTI_MUSA", "MULTI_XPU")
}  # fmt: skip
"""Where processes are alike, and nobody else splits a model."""


def check_processes(accelerator: Accelerator) -> None:
    """Raise unless the processes see one another, and nobody else splits models."""
    if accelerator.num_processes == 1 < int(os.environ.get("WORLD_SIZE", "1")):
        raise ValueError(
            f"accelerator: there are {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), and each would train alone; "
            f"without a GPU set ACCELERATE_USE_CPU=true"
        )
    if accelerator.distributed_type not in _KINDS:
        raise ValueError(
            f"accelerator: {accelerator.distributed_type} splits models in its own way, which fit does not know: "
            f"launch with multi-GPU, and set settings.split, which holds them in shares (FSDP2)"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            "accelerator must have gradient_accumulation_steps = 1: memory is bounded by settings.micro_batch"
        )


def check_same(accelerator: Accelerator, digests: Callable[[], dict[str, str]]) -> None:
    """Raise unless all processes have the same weights."""
    if accelerator.num_processes == 1:
        return
    first, *others = gather_object([digests()])
    if apart := [name for name in first if any(other.get(name) != first[name] for other in others)]:
        raise ValueError(
            f"{', '.join(apart)} must be the same on all {len(others) + 1} processes, and differ: call "
            f"torch.manual_seed(seed) before the models are made"
        )


def any_of(accelerator: Accelerator, here: bool) -> bool:
    """Whether it is so on any process."""
    return bool(accelerator.reduce(torch.tensor(float(here), device=accelerator.device)) > 0)


def together(accelerator: Accelerator, f: Callable[[], Any]) -> None:
    """Do it on every process; if it fails on one, it has failed on all, and none waits for another."""
    failure = None
    try:
        f()
    except Exception as error:
        failure = error
    if any_of(accelerator, failure is not None):
        raise failure or RunFailed("it failed on another process, whose message says how")


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Sum each over processes."""
    for bucket in _buckets(tensors):
        flat = torch.cat([v.flatten() for v in bucket])
        torch.distributed.all_reduce(flat)
        for v, total in zip(bucket, flat.split([v.numel() for v in bucket]), strict=True):
            v.copy_(total.view_as(v))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, of one dtype and at most BUCKET bytes, or one larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for v in sorted(tensors, key=lambda v: str(v.dtype)):
        if bucket and (v.dtype != bucket[0].dtype or size + v.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(v)
        size += v.nbytes
    yield bucket


def equal_shares(owner: Tensor, world: int) -> Tensor:
    """Which process is to have each node of each minibatch, (minibatches, size): its owner, up to an equal share."""
    share = torch.tensor([(owner.shape[1] + world - 1 - p) // world for p in range(world)])
    held = nn.functional.one_hot(owner, world).cumsum(1)  # nodes so far, by process
    beyond = held.gather(2, owner[..., None])[..., 0] > share[owner]
    short = (share - held[:, -1]).clamp(min=0)
    target = owner.clone()
    target[beyond] = torch.arange(world).repeat(len(owner)).repeat_interleave(short.flatten())
    return target


def share_out(nodes: Nodes, owner: Tensor, accelerator: Accelerator) -> tuple[Nodes, list[int]]:
    """This process's equal share of every minibatch, one by one, and how many nodes of each.

    Args:
        nodes: what this process owns of them, one by one.
        owner: of each node of each minibatch, (minibatches, size).
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    target = equal_shares(owner, world)
    sizes, owner, target = (target == rank).sum(1).tolist(), owner.flatten(), target.flatten()
    travels, mine, wanted = owner != target, owner == rank, target == rank
    sent = owner[travels].bincount(minlength=world)
    if not (most := int(sent.max())):
        return nodes, sizes
    row = torch.zeros_like(owner)  # of each node that travels, in the packets of all processes
    for process, n in enumerate(sent.tolist()):
        row[travels & (owner == process)] = process * most + torch.arange(n)
    order = torch.cat([_where(wanted & mine), _where(wanted & ~mine)]).argsort()
    indices = _where(wanted[mine]), _where(travels[mine]), row[wanted & ~mine], order
    stay, leave, come, order = (v.to(nodes.x.device, non_blocking=True) for v in indices)

    def exchanged(v: Tensor) -> Tensor:
        packet = v.new_zeros(most, *v.shape[1:])
        packet[: len(leave)] = v[leave]
        return torch.cat([v[stay], accelerator.gather(packet)[come]])[order]

    return nodes.each(exchanged), sizes


def _where(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]
