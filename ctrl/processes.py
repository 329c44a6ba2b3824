"""What processes send one another: gradients, to be summed, and nodes, so that all have equal shares of a hand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ctrl.replay import Nodes

BUCKET = 32 * 2**20
"""Bytes of gradients in one message, unless a single one has more."""


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
    """Which process is to have each node of each hand, (hands, size): its owner, up to an equal share."""
    share = torch.tensor([(owner.shape[1] + world - 1 - p) // world for p in range(world)])
    held = nn.functional.one_hot(owner, world).cumsum(1)  # nodes so far, by process
    beyond = held.gather(2, owner[..., None])[..., 0] > share[owner]
    short = (share - held[:, -1]).clamp(min=0)
    target = owner.clone()
    target[beyond] = torch.arange(world).repeat(len(owner)).repeat_interleave(short.flatten())
    return target


def share_out(nodes: Nodes, owner: Tensor, accelerator: Accelerator) -> tuple[Nodes, list[int]]:
    """This process's equal share of every hand, hand by hand, and how many nodes of each.

    Args:
        nodes: what this process owns of the hands, hand by hand.
        owner: of each node of each hand, (hands, size).
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
