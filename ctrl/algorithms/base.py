"""What an algorithm is: it learns from a run, and can be checked at fixed parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ctrl.fields import check_fields
from ctrl.gaussian import GaussianPolicy, Mean
from ctrl.problem import Problem
from ctrl.regularize import path_kl
from ctrl.rollout import Trajectory
from ctrl.solvers import Solver
from ctrl.value import Critic

if TYPE_CHECKING:
    from ctrl.fit import Run


_LIMITS = {
    **dict.fromkeys(("nodes", "keep", "updates", "passes", "paths", "rounds", "ahead"), ">= 1"),
    **dict.fromkeys(
        ("critic_updates", "actor_updates", "q_updates", "trace", "group", "squares", "damping", "hold"), ">= 0"
    ),
    **dict.fromkeys(("clip", "penalty", "gain", "step", "most"), "> 0"), "limit": "> 1", "nats": "in (0, inf]",
}  # fmt: skip


class Algorithm(ABC):
    """One epoch of learning.

    `learn` calls `run.update("policy", loss, nodes, size)`, whose loss has -J's gradient: the first such call of an
    epoch, before anything has moved, is the algorithm's estimate of -grad J, and `kl` is what it believes KL to be.
    Both can be held against the exact ones.
    """

    keep: int = 1
    """Epochs of trajectories that stay in store."""

    def __post_init__(self) -> None:
        """A dataclass's own numbers are checked by name."""
        check_fields(self, _LIMITS)

    @abstractmethod
    def learn(self, run: Run) -> None:
        """Update policy (and critic) from `run.replay`, newest batch last."""

    def kl(self, problem: Problem, trajectory: Trajectory, policy: Mean) -> Tensor:
        """(B,): each trajectory's KL to the reference in nats, as the algorithm counts it."""
        return path_kl(problem, trajectory, policy)

    def behaviour(self, policy: Mean) -> Mean | GaussianPolicy:
        """What acts in rollouts."""
        return policy

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:  # noqa: B027
        """Raise, before anything expensive, if this cannot learn from that."""


@dataclass(frozen=True)
class Around(Algorithm):
    """One that changes what another, `algorithm`, learns from, and leaves the rest to it."""

    algorithm: Algorithm

    @property
    def keep(self) -> int:  # type: ignore[override]
        """As the algorithm has it."""
        return self.algorithm.keep

    def kl(self, problem: Problem, trajectory: Trajectory, policy: Mean) -> Tensor:
        return self.algorithm.kl(problem, trajectory, policy)

    def behaviour(self, policy: Mean) -> Mean | GaussianPolicy:
        return self.algorithm.behaviour(policy)


def check_price(problem: Problem) -> None:
    """Raise unless actions have a price: without one no action is greedy, and V is not fixed by a KL."""
    problem.penalty(torch.zeros(1))  # eta = 0 has no path KL, and says so
    if problem.free:
        raise ValueError("beta must be > 0: without a price on actions no action is greedy")


def check_noise(problem: Problem) -> None:
    """Raise unless paths have a KL between them."""
    if problem.noiseless:
        raise ValueError("problem has no noise (eta = 0), so no KL along its paths: take ActorCritic(nats=math.inf)")
