"""What a learner sees of its trajectories: nodes, flat and shuffled, from the epochs it still keeps.

Every random choice here is made for the whole run at once and is the same on every process; a process then keeps the
nodes whose trajectories it holds. So what one process, two or four learn from is the same set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ctrl.grids import node_weights
from ctrl.rollout import NotFinite, Trajectory

ON_DEVICE = 2**30
"""Bytes of trajectories that may stay on an accelerator; older epochs are in host memory, and their nodes travel when
they are used."""


def epoch_bytes(samples: int, steps: int, shape: Sequence[int]) -> int:
    """Of an epoch's trajectories in store: x, a, xi and four fields beside the nodes."""
    return 7 * samples * (steps + 1) * math.prod(shape) * torch.get_default_dtype().itemsize


@dataclass(frozen=True)
class Nodes:
    """n places on trajectories, in any order.

    Attributes:
        t: times, (n,).
        x: states, (n, *D).
        w: quadrature weights times the number of nodes of a trajectory, (n,): the mean of w h over evenly drawn nodes
            estimates the integral of h along a trajectory.
        k: which node of its trajectory, (n,).
        ids: global sample ids, (n,).
        cond: the condition of each.
        fields: what else the algorithm laid beside the nodes, by name, (n, ...).
    """

    t: Tensor
    x: Tensor
    w: Tensor
    k: Tensor
    ids: Tensor
    cond: Any
    fields: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.t)

    def __getitem__(self, name: str) -> Tensor:
        return self.fields[name]

    def each(self, f: Callable[[Tensor], Tensor]) -> Nodes:
        """f of every tensor, the condition left out."""
        fields = {name: f(v) for name, v in self.fields.items()}
        return Nodes(f(self.t), f(self.x), f(self.w), f(self.k), f(self.ids), None, fields)

    def part(self, piece: slice | Tensor) -> Nodes:
        """Some of the nodes."""
        return replace(self.each(lambda v: v[piece]), cond=None if self.cond is None else self.cond[piece])

    def filled(self, n: int) -> Nodes:
        """The nodes, and the last of them again until there are n."""
        if len(self) >= n:
            return self
        return self.part(torch.arange(n, device=self.t.device).clamp(max=len(self) - 1))


@dataclass
class Batch:
    """One epoch's trajectories on this process, and what is laid beside their nodes: fields[name] is (N+1, B, ...)."""

    trajectory: Trajectory
    fields: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.trajectory.t) - 1

    @property
    def samples(self) -> int:
        """B."""
        return len(self.trajectory.ids)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that are there; those beside the nodes as at.NAME."""
        path = {name: getattr(self.trajectory, name) for name in ("t", "x", "a", "xi", "w", "ids", "reward")}
        beside = {f"at.{name}": v for name, v in self.fields.items()}
        return {name: v for name, v in (path | beside).items() if v is not None}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Batch:
        """From what `tensors` gave."""
        fields = {name.removeprefix("at."): v for name, v in tensors.items() if name.startswith("at.")}
        path = {"a": None, "xi": None, **{name: v for name, v in tensors.items() if not name.startswith("at.")}}
        return Batch(Trajectory(**path), fields)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Batch:
        """The same there, without its condition."""
        return Batch.of({name: v.to(device) for name, v in self.tensors.items()})

    def lay(self, name: str, value: Tensor) -> None:
        """Put value, (N+1, B, ...) or (N, B, ...), beside the nodes; the last node of the latter is zero."""
        if len(value) == self.steps:
            value = torch.cat([value, torch.zeros_like(value[:1])])
        if value.shape[:2] != (self.steps + 1, self.samples):
            raise ValueError(
                f"{name} must be given at the nodes, shape ({self.steps + 1}, {self.samples}, ...), "
                f"got {tuple(value.shape)}"
            )
        self.fields[name] = value.to(self.trajectory.x.device)

    def integrate(self, value: Tensor) -> Tensor:
        """The integral along each trajectory of what is given at the nodes, (N+1, B) -> (B,)."""
        return (node_weights(self.trajectory.w).to(value)[:, None] * value).sum(0)

    def take(self, b: Tensor) -> Batch:
        """The trajectories b, (n,), and what is laid beside them."""
        path = self.trajectory
        b = b.to(path.x.device, non_blocking=True)
        a, xi = (None if v is None else v[:, b] for v in (path.a, path.xi))
        reward = None if path.reward is None else path.reward[b]
        part = replace(path, x=path.x[:, b], a=a, xi=xi, ids=path.ids[b], reward=reward)
        return Batch(part, {name: v[:, b] for name, v in self.fields.items()})

    def gather(self, k: Tensor, b: Tensor) -> Nodes:
        """The nodes k of samples b, (n,) each; they come without their condition."""
        path = self.trajectory
        k, b = (v.to(path.x.device, non_blocking=True) for v in (k, b))
        w = node_weights(path.w)[k] * (self.steps + 1)
        dtype = torch.promote_types(path.x.dtype, torch.float32)
        fields = {name: v[k, b] for name, v in self.fields.items()}
        return Nodes(path.t[k].to(dtype), path.x[k, b], w.to(dtype), k, path.ids[b], None, fields)


def concatenate(parts: list[Nodes]) -> Nodes:
    """Nodes of several batches as one."""
    if len(parts) == 1:
        return parts[0]
    t, x, w, k, ids = (torch.cat([getattr(p, name) for p in parts]) for name in ("t", "x", "w", "k", "ids"))
    return Nodes(t, x, w, k, ids, None, {name: torch.cat([p[name] for p in parts]) for name in parts[0].fields})


@dataclass
class Replay:
    """The batches of the last epochs, oldest first. `samples` is the number of trajectories an epoch over all
    processes; this process, `rank` of `world`, holds those at places rank, rank + world, ..."""

    samples: int
    rank: int = 0
    world: int = 1
    batches: list[Batch] = field(default_factory=list)

    def add(self, batch: Batch, keep: int) -> None:
        """Append a batch, and forget all but the last `keep`."""
        self.batches = [*self.batches, batch][-keep:]
        self.place(batch.trajectory.x.device)

    def place(self, device: torch.device) -> None:
        """The newest batch on the device, older ones too while all of them have at most ON_DEVICE bytes, the rest in
        host memory."""
        size = 0
        for i in reversed(range(len(self.batches))):
            size += sum(v.nbytes for v in self.batches[i].tensors.values())
            newest = i == len(self.batches) - 1
            self.batches[i] = self.batches[i].to(device if newest or size <= ON_DEVICE else "cpu")

    def deal(
        self, updates: int, size: int, first: int, last: int, generator: torch.Generator, together: int = 1
    ) -> Iterator[tuple[Nodes, Tensor]]:
        """`updates` hands of `size` nodes between `first` and `last` (counted over all processes), from a shuffled
        deck of every node in store; a new deck when one is used up. Yields what this process holds of `together` hands
        at a time, one after the other, and which process holds each of their nodes, (hands, size)."""
        nodes = last - first + 1
        population, deck = nodes * self.samples * len(self.batches), torch.empty(0, dtype=torch.int64)
        for done in range(0, updates, together):
            cards = size * min(together, updates - done)
            while len(deck) < cards:
                deck = torch.cat([deck, torch.randperm(population, generator=generator)])
            hands, deck = deck[:cards], deck[cards:]
            k, sample = hands % nodes + first, hands // nodes
            owner = sample % self.samples % self.world
            mine = owner == self.rank
            yield self._mine(k[mine], sample[mine]), owner.view(-1, size)

    def deal_paths(self, updates: int, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """`updates` hands of `size` whole trajectories (counted over all processes) of one epoch, since these share
        their times, from a shuffled deck of all in store; a new deck when one is used up. Yields what this process
        holds of each."""
        deck: list[tuple[Batch, Tensor]] = []
        for _ in range(updates):
            if not deck:
                hands = [
                    (batch, hand)
                    for batch in self.batches
                    for hand in torch.randperm(self.samples, generator=generator).split(size)
                    if len(hand) == size
                ]
                deck = [hands[i] for i in torch.randperm(len(hands), generator=generator).tolist()]
            batch, hand = deck.pop()
            yield batch.take(hand[hand % self.world == self.rank] // self.world)

    def _mine(self, k: Tensor, sample: Tensor) -> Nodes:
        """Nodes k of samples of this process, counted through all batches."""
        slot, b = sample // self.samples, sample % self.samples // self.world
        places = [(slot == i).nonzero()[:, 0] for i in range(len(self.batches))]
        here = self.batches[-1].trajectory.x.device
        parts = [batch.gather(k[at], b[at]) for batch, at in zip(self.batches, places, strict=True)]
        nodes = concatenate([part.each(lambda v: v.to(here)) for part in parts])
        order = torch.cat(places).argsort().to(here, non_blocking=True)
        return nodes.each(lambda v: v[order])


def with_reward(path: Trajectory, reward: Tensor) -> Trajectory:
    """The trajectory with its reward, (B,), checked."""
    shape = tuple(reward.shape) if torch.is_tensor(reward) else type(reward).__name__
    if shape != path.ids.shape:
        raise ValueError(
            f"reward must return one number a sample, a tensor of shape {tuple(path.ids.shape)}, got {shape}"
        )
    reward = reward.detach().to(path.x)
    bad = ~torch.isfinite(reward)
    if bool(bad.any()):
        raise NotFinite(
            f"reward is not finite for sample id {int(path.ids[bad][0])}: it must be a number for every x",
            x=path.x[-1][bad], ids=path.ids[bad], reward=reward[bad],
        )  # fmt: skip
    return replace(path, reward=reward)
