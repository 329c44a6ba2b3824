"""Models that are split over processes (FSDP2): each holds a share of the weights, their gradients and the optimiser's
state, and has a part of the network whole only while it computes with that part.

Every process must then call a model as often as every other one: `in_step` makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

PARTS = 16
"""A part that is whole at a time has at most this share of a network's weights, if its modules are as small."""


def is_split(model: nn.Module) -> bool:
    """Whether it is."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def split(model: nn.Module, name: str, accelerator: Accelerator) -> None:
    """Split a model over all processes, in place; one that is split already stays so. Weights go to the process's
    device, a part at a time."""
    if is_split(model):
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    network = _network(model)
    for part in (*_parts(network, _count(network) // PARTS), network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # so that parameters are shares whenever it is asked
    if own := [n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]:
        raise ValueError(f"split: {name} has weights beside its network ({own[0]}), which cannot be split with it")
    model.to(accelerator.device)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _network(model: nn.Module) -> nn.Module:
    """The module that has nearly all weights: what wraps it may be another's too, as a model and the same one without
    adapters have it."""
    child = max(model.children(), key=_count, default=None)
    return _network(child) if child is not None and _count(child) > 0.9 * _count(model) else model


def _parts(module: nn.Module, most: int) -> Iterator[nn.Module]:
    """The largest modules in it of at most so many weights, but for those with less than a quarter, which stay with
    what is around them: each part is a message to all processes."""
    for child in module.children():
        holds = any(_count(inner) for inner in child.children())
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or (holds and _count(child) > most):
            yield from _parts(child, most)
        elif _count(child) > most // 4:
            yield child


def whole(v: Any) -> Any:
    """A tensor, or what a dictionary holds, whole; every process asks for it."""
    if isinstance(v, dict):
        return {name: whole(inner) for name, inner in v.items()}
    return v.full_tensor().cpu() if isinstance(v, DTensor) else v


def shared_like(v: Tensor, model: Any) -> Tensor:
    """A whole tensor, split as `model` is."""
    if not isinstance(model, DTensor):
        return v
    return distribute_tensor(v.to(model.device), model.device_mesh, model.placements, src_data_rank=None)


def in_step(n: int, size: int, accelerator: Accelerator, split: bool) -> Iterator[tuple[slice, bool]]:
    """Of n things `size` at a time, and whether these count. If models are split, the first are taken once more until
    all processes have taken as often."""
    pieces = -(-n // size)
    most = pieces
    if split:
        counts = accelerator.gather(torch.tensor([pieces], device=accelerator.device))
        most = int(counts.max())
        if not int(counts.min()) and most:
            raise ValueError(f"split: an update of so few nodes leaves some of {len(counts)} processes none: take more")
    for i in range(most):
        place = i if i < pieces else 0
        yield slice(place * size, (place + 1) * size), i < pieces
