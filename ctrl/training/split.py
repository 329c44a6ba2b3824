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
"""One over the largest share of a network's weights in a part, where its modules are as small as that."""
LISTS = (nn.ModuleList, nn.ModuleDict)


def check_split(samples: int, processes: int, precision: str) -> None:
    """Raise unless models can be split so."""
    if samples % processes:
        raise ValueError(f"samples must be a multiple of the {processes} processes if models are split, got {samples}")
    if precision == "fp16":
        raise ValueError("split supports precision bf16 and no: the gradient scaler of fp16 needs whole models")


def splits(asked: bool, accelerator: Accelerator) -> bool:
    """Whether models are split: one process has them whole in any case."""
    return asked and accelerator.num_processes > 1


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
    for part in (*parts_of(network), network):
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # so that parameters are shares between calls
    if own := [n for n, p in model.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]:
        raise ValueError(f"split: {name} has weights beside its network ({own[0]}), which cannot be split with it")
    model.to(accelerator.device)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _network(model: nn.Module) -> nn.Module:
    """The module that has nearly all weights: what wraps it may be another's too, as a model and the same one without
    adapters have it. A list of modules is none, which is not called."""
    child = max(model.children(), key=_count, default=None)
    if child is None or isinstance(child, LISTS) or _count(child) <= 0.9 * _count(model):
        return model
    return _network(child)


def parts_of(network: nn.Module) -> list[nn.Module]:
    """The modules that are whole only while they compute. The rest of the network is whole while all of it does."""
    return list(_parts(network, _count(network) // PARTS))


def whole_at_once(model: nn.Module) -> int:
    """The most weights that a process has whole: those in no part, and two parts, as the next one is on its way."""
    network = _network(model)
    sizes = sorted(map(_count, parts_of(network)))
    return _count(network) - sum(sizes) + sum(sizes[-2:])


def _parts(module: nn.Module, most: int) -> Iterator[nn.Module]:
    """The largest modules of at most `most` weights. Those with less than a quarter of that are left to what is around
    them, since each part is a message to all processes."""
    for child in module.children():
        holds = any(_count(inner) for inner in child.children())
        if isinstance(child, LISTS) or (holds and _count(child) > most):
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
    """Slices of n items, at most `size` long, each with whether it counts. If models are split, the first slice is
    repeated, without counting, until all processes have had equally many."""
    pieces = -(-n // size)
    most = pieces
    if split:
        counts = accelerator.gather(torch.tensor([pieces], device=accelerator.device))
        most = int(counts.max())
        if not int(counts.min()) and most:
            raise ValueError(
                f"nodes: an update must have at least one for each of the {len(counts)} processes if models are split"
            )
    for i in range(most):
        place = i if i < pieces else 0
        yield slice(place * size, (place + 1) * size), i < pieces
