"""What a learner sees of trajectories: nodes, in any order, and an epoch's trajectories with what is attached to them.

What an algorithm attaches to nodes has one name for one quantity, (n, ...) at nodes and (N+1, B, ...) at those of an
epoch; D are a state's dimensions, D' an action's.

a_old        D'  what the policy did when it acted (its mean, if it explores)
a_ref        D'  what the reference does
a            D'  what the policy does now
a_sampled    D'  the action that was drawn around the mean
best         D'  the action to regress on
target           what a critic is to be
return           the reward from here on, of a path or of a noised end
advantage        a return less its baseline
adjoint      D   of the reward, along the path
grad_v       D   of the critic
end          D   the noised end
x_next       D   the state a step later; x_before, a_old_before, a_ref_before: a step earlier
xi           D   the step's noise
score_delta  D   the score of a step in its mean, times what the value and the cost made of the step
of_h, of_p       what path consistency multiplies a cost and a slope by; of_p is D
q, q_target      q of the sampled action, and what it is to be
dt               a step's length times the number of steps
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ctrl.grids import node_weights
from ctrl.rollout import Trajectory

Conditions = Callable[[Tensor], Any]
"""conditions(ids: (n,)) -> cond: what each sample is conditioned on, as a function of its id."""


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
        fields: what else the algorithm attached to the nodes, by name, (n, ...).
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
class Collection:
    """One epoch's trajectories on this process, and what is attached to their nodes: fields[name] is (N+1, B, ...)."""

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
    def rewards(self) -> Tensor:
        """r(X_T), (B,)."""
        assert self.trajectory.reward is not None
        return self.trajectory.reward

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All that are there; those attached to nodes as at.NAME."""
        path = {name: getattr(self.trajectory, name) for name in ("t", "x", "a", "xi", "w", "ids", "reward")}
        attached = {f"at.{name}": v for name, v in self.fields.items()}
        return {name: v for name, v in (path | attached).items() if v is not None}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> Collection:
        """From what `tensors` gave."""
        fields = {name.removeprefix("at."): v for name, v in tensors.items() if name.startswith("at.")}
        path = {"a": None, "xi": None, **{name: v for name, v in tensors.items() if not name.startswith("at.")}}
        return Collection(Trajectory(**path), fields)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> Collection:
        """The same there, without its condition."""
        return Collection.of({name: v.to(device) for name, v in self.tensors.items()})

    def attach(self, name: str, value: Tensor) -> None:
        """Attach value, (N+1, B, ...) or (N, B, ...), to the nodes; the last node of the latter is zero."""
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

    def take(self, b: Tensor) -> Collection:
        """The trajectories b, (n,), and what is attached to them."""
        path = self.trajectory
        b = b.to(path.x.device, non_blocking=True)
        a, xi = (None if v is None else v[:, b] for v in (path.a, path.xi))
        reward = None if path.reward is None else path.reward[b]
        part = replace(path, x=path.x[:, b], a=a, xi=xi, ids=path.ids[b], reward=reward)
        return Collection(part, {name: v[:, b] for name, v in self.fields.items()})

    def gather(self, k: Tensor, b: Tensor) -> Nodes:
        """The nodes k of samples b, (n,) each; they come without their condition."""
        path = self.trajectory
        k, b = (v.to(path.x.device, non_blocking=True) for v in (k, b))
        w = node_weights(path.w)[k] * (self.steps + 1)
        dtype = torch.promote_types(path.x.dtype, torch.float32)
        fields = {name: v[k, b] for name, v in self.fields.items()}
        return Nodes(path.t[k].to(dtype), path.x[k, b], w.to(dtype), k, path.ids[b], None, fields)


def concatenate(parts: Sequence[Nodes]) -> Nodes:
    """Nodes of several collections as one."""
    if len(parts) == 1:
        return parts[0]
    t, x, w, k, ids = (torch.cat([getattr(p, name) for p in parts]) for name in ("t", "x", "w", "k", "ids"))
    return Nodes(t, x, w, k, ids, None, {name: torch.cat([p[name] for p in parts]) for name in parts[0].fields})


def join(parts: Sequence[Collection]) -> Collection:
    """The trajectories of one epoch, of several processes, and what is attached to them."""
    tensors = [part.tensors for part in parts]
    shared = {"t", "w"}
    along = {"ids": 0, "reward": 0}  # where samples lie; elsewhere behind the nodes
    return Collection.of(
        {
            name: v if name in shared else torch.cat([part[name] for part in tensors], along.get(name, 1))
            for name, v in tensors[0].items()
        }
    )
