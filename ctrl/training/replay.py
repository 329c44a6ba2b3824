"""The trajectories in store, and minibatches of their nodes.

Every random choice here is made for the whole run at once and is the same on every process; a process then keeps the
nodes whose trajectories it holds. So what one process, two or four learn from is the same set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctrl.nodes import Collection, Nodes, concatenate, join

ON_DEVICE = 2**30
"""Bytes of trajectories that may stay on an accelerator; older epochs are in host memory, and their nodes travel when
they are used."""


def epoch_bytes(samples: int, steps: int, shape: Sequence[int]) -> int:
    """Of an epoch's trajectories in store: x, a, xi and four fields of their nodes."""
    return 7 * samples * (steps + 1) * math.prod(shape) * torch.get_default_dtype().itemsize


@dataclass
class Replay:
    """What was collected in the last epochs, oldest first. `samples` is the number of trajectories an epoch over all
    processes; this process, `rank` of `world`, holds those at places rank, rank + world, ..."""

    samples: int
    rank: int = 0
    world: int = 1
    collections: list[Collection] = field(default_factory=list)

    def ids(self, epoch: int) -> Tensor:
        """Of this process's samples of an epoch."""
        first = epoch * self.samples
        return torch.arange(first + self.rank, first + self.samples, self.world)

    def add(self, collection: Collection, keep: int) -> None:
        """Append one, and forget all but the last `keep`."""
        self.collections = [*self.collections, collection][-keep:]
        self.place(collection.trajectory.x.device)

    def place(self, device: torch.device) -> None:
        """The newest one on the device, older ones too while all of them have at most ON_DEVICE bytes, the rest in
        host memory."""
        size = 0
        for i in reversed(range(len(self.collections))):
            size += sum(v.nbytes for v in self.collections[i].tensors.values())
            newest = i == len(self.collections) - 1
            self.collections[i] = self.collections[i].to(device if newest or size <= ON_DEVICE else "cpu")

    def minibatches(
        self, updates: int, size: int, last: int, generator: torch.Generator, together: int = 1
    ) -> Iterator[tuple[Nodes, Tensor]]:
        """`updates` minibatches of `size` nodes up to number `last` (counted over all processes), from a shuffle of
        every node in store; a new shuffle when one is used up. Yields what this process holds of `together` minibatches
        at a time, one after the other, and which process holds each of their nodes, (minibatches, size)."""
        nodes = last + 1
        population, left = nodes * self.samples * len(self.collections), torch.empty(0, dtype=torch.int64)
        for done in range(0, updates, together):
            count = size * min(together, updates - done)
            while len(left) < count:
                left = torch.cat([left, torch.randperm(population, generator=generator)])
            drawn, left = left[:count], left[count:]
            k, sample = drawn % nodes, drawn // nodes
            owner = sample % self.samples % self.world
            mine = owner == self.rank
            yield self._mine(k[mine], sample[mine]), owner.view(-1, size)

    def path_minibatches(self, updates: int, size: int, generator: torch.Generator) -> Iterator[Collection]:
        """`updates` minibatches of `size` whole trajectories (counted over all processes) of one epoch, since these
        share their times, from a shuffle of all in store; a new shuffle when one is used up. Yields what this process
        holds of each."""
        left: list[tuple[Collection, Tensor]] = []
        for _ in range(updates):
            if not left:
                parts = [
                    (collection, part)
                    for collection in self.collections
                    for part in torch.randperm(self.samples, generator=generator).split(size)
                    if len(part) == size
                ]
                left = [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]
            collection, part = left.pop()
            yield collection.take(part[part % self.world == self.rank] // self.world)

    def _mine(self, k: Tensor, sample: Tensor) -> Nodes:
        """Nodes k of samples of this process, counted through all collections."""
        slot, b = sample // self.samples, sample % self.samples // self.world
        places = [(slot == i).nonzero()[:, 0] for i in range(len(self.collections))]
        here = self.collections[-1].trajectory.x.device
        parts = [one.gather(k[at], b[at]) for one, at in zip(self.collections, places, strict=True)]
        nodes = concatenate([part.each(lambda v: v.to(here)) for part in parts])
        order = torch.cat(places).argsort().to(here, non_blocking=True)
        return nodes.each(lambda v: v[order])

    def state_dict(self, keep: int) -> dict[str, Tensor]:
        """The last `keep` of them."""
        kept = self.collections[max(0, len(self.collections) - keep) :]
        return {f"{i}.{name}": v for i, one in enumerate(kept) for name, v in one.tensors.items()}

    def load_state_dict(self, *parts: dict[str, Tensor]) -> None:
        """What this process had; or what each of another number of processes had, of which it takes its own."""
        slots = 1 + max((int(name.partition(".")[0]) for name in parts[0]), default=-1)
        self.collections = [self._joined(i, parts) for i in range(slots)]

    def _joined(self, slot: int, parts: tuple[dict[str, Tensor], ...]) -> Collection:
        held = [
            Collection.of({n.partition(".")[2]: v for n, v in part.items() if n.startswith(f"{slot}.")})
            for part in parts
        ]
        whole = join(held)
        ids = whole.trajectory.ids
        order = ids.argsort()
        return whole.take(order[ids[order] % self.samples % self.world == self.rank])
