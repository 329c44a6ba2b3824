"""What an algorithm is: it says which updates are to be made, and can be checked at fixed parameters.

    class Plain(Algorithm):
        def learn(self, run: Context) -> Iterator[Update]:
            run.record_actions()
            for nodes in run.minibatches(40, 1024):
                yield Update("policy", loss, nodes, 1024)

The loop (`ctrl.fit`) makes each update before it asks for the next one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ctrl.fields import check_fields
from ctrl.gaussian import GaussianPolicy, Mean
from ctrl.nodes import Collection, Conditions, Nodes
from ctrl.noise import Noise
from ctrl.problem import Problem
from ctrl.regularize import path_kl
from ctrl.rollout import Trajectory
from ctrl.solvers import Solver
from ctrl.value import Critic

Loss = Callable[[Nodes], Tensor]
"""loss(nodes) -> (n,): each node's own share; its mean over nodes is what is minimised."""

Annotate = Callable[[Nodes], dict[str, Tensor]]
"""annotate(nodes) -> (n, ...) each: what to attach to nodes, by name, without a graph."""


@dataclass(frozen=True)
class Update:
    """One optimiser step.

    Attributes:
        name: of the model: policy, critic or reward. A critic without parameters, such as an exact one, is left as it
            is.
        loss: the mean over `size` nodes is minimised.
        nodes: this process's share of them.
        size: how many there are over all processes.
        calls: network calls that the loss makes at a node.
    """

    name: str
    loss: Loss
    nodes: Nodes
    size: int
    calls: int = 1


class Context(Protocol):
    """What an algorithm may ask of the run that it learns in. Numbers of samples and nodes count over all processes."""

    # what is given

    @property
    def problem(self) -> Problem: ...
    @property
    def policy(self) -> Any:
        """The module mean(t, x, cond)."""

    @property
    def critic(self) -> Critic:
        """The critic. An algorithm that needs one sets `learns_value`."""

    @property
    def conditions(self) -> Conditions: ...
    @property
    def solver(self) -> Solver: ...
    @property
    def samples(self) -> int:
        """Trajectories an epoch."""

    @property
    def steps(self) -> int:
        """N."""

    @property
    def micro_batch(self) -> int:
        """How many nodes, or paths, may be differentiated at a time."""

    @property
    def noise(self) -> Noise:
        """Of this epoch."""

    @property
    def history(self) -> Sequence[dict[str, Any]]:
        """Metrics of the epochs before."""

    @property
    def collections(self) -> Sequence[Collection]:
        """What is in store, newest last."""

    def with_problem(self, problem: Problem) -> Context:
        """The same run on another problem."""

    # nodes

    def record_actions(self, a_ref: Tensor | None = None) -> None:
        """Attach to the newest collection a_old, what the policy did at each node (its mean, if it explores), and
        a_ref, what the reference would do, which is asked unless it is given; where actions have no price nobody asks
        it, and a_ref is a_old. Their path KL is logged; without noise there is none."""

    def record_actions_again(self, size: int) -> None:
        """Attach a_old once more, as an update of `size` nodes evaluates the policy. In float32 that is what it did in
        the rollout; below, kernels of another shape round differently, which over all dimensions is a likelihood ratio
        far from 1, and a KL. If a kernel's numbers for a node depend on its shape alone, ratio and KL before the first
        update are exactly 1 and 0."""

    def nodes(self, collection: Collection, k: range) -> Nodes:
        """All nodes k of a collection, node by node."""

    def at_nodes(
        self,
        f: Callable[..., Tensor],
        collection: Collection,
        *fields: str,
        samples: int | None = None,
        size: int | None = None,
    ) -> Tensor:
        """f(t, x, *fields, cond) at every node of a collection, (N+1, B, ...), without a graph.

        fields: names of what is attached.
        samples: how many the collection has over all processes, if not an epoch's.
        size: nodes at a time; `micro_batch` where f itself differentiates a network.
        """

    def minibatches(
        self, updates: int, size: int, *, last: int | None = None, annotate: Annotate | None = None, calls: int = 1
    ) -> Iterator[Nodes]:
        """`updates` minibatches of `size` nodes from a shuffle of what is in store; node numbers up to `last` (all).
        Yields this process's equal share of each.

        annotate: what to attach to the nodes; of many minibatches at once, so it may not depend on what the updates
            move. It may differentiate a network: it is called with `micro_batch` nodes at a time.
        calls: network calls that annotate makes at a node.
        """

    def path_minibatches(self, updates: int, size: int) -> Iterator[Collection]:
        """`updates` minibatches of `size` whole trajectories, each from one epoch, from a shuffle of what is in store.
        Yields this process's share of each."""

    def here(self, collection: Collection) -> Collection:
        """A collection on this process's device, whole: to compute with at all of its nodes; attach what comes of it to
        the collection itself."""

    def with_present_reward(self, path: Trajectory) -> Trajectory:
        """The same trajectories with the reward as it is now."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The networks' arithmetic."""

    # over processes

    def total(self, v: Tensor) -> Tensor:
        """The sum over processes."""

    def gather(self, v: Any) -> list[Any]:
        """What each process has."""

    def mean_over_others(self, v: Tensor, group: int) -> Tensor:
        """For each sample, the mean of v, (..., B), over the other samples of its group: `group` samples with
        consecutive ids, on any process."""

    # metrics

    def count(self, name: str, n: int) -> None:
        """Add to network_calls, reward_calls, or another count of the whole run, over all processes."""

    def log(self, name: str, value: Tensor | float) -> None:
        """A metric of this epoch: (B,) is averaged over samples, () is taken as it is; repeated ones are averaged."""

    def log_kl_from(self, name: str, field: str) -> None:
        """Log the path KL, with its standard error, between the policy as it is and the actions attached as `field`."""

    def logged(self, name: str) -> float:
        """A metric of this epoch so far."""


class Algorithm(ABC):
    """One epoch of learning.

    An update of the policy has a loss with -J's gradient: the first one of an epoch, before anything has moved, is the
    algorithm's estimate of -grad J, and `kl` is what it believes KL to be. Both can be held against the exact ones.
    """

    keep: int = 1
    """Epochs of trajectories that stay in store."""
    learns_value: ClassVar[bool] = False
    """Whether it needs a critic."""

    def __post_init__(self) -> None:
        """A dataclass's own numbers are checked by name."""
        check_fields(self)

    @abstractmethod
    def learn(self, run: Context) -> Iterator[Update]:
        """The updates of an epoch, from what is in store."""

    def kl(self, problem: Problem, trajectory: Trajectory, policy: Mean) -> Tensor:
        """(B,): each trajectory's KL to the reference in nats, as the algorithm counts it."""
        return path_kl(problem, trajectory, policy)

    def behaviour(self, policy: Mean) -> Mean | GaussianPolicy:
        """What acts in rollouts."""
        return policy

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:  # noqa: B027
        """Raise, before anything expensive, if this cannot learn from that."""


@dataclass(frozen=True)
class Wrapper(Algorithm):
    """One that changes what another, `algorithm`, learns from, and leaves the rest to it."""

    algorithm: Algorithm

    @property
    def keep(self) -> int:  # type: ignore[override]
        """As the algorithm has it."""
        return self.algorithm.keep

    @property
    def learns_value(self) -> bool:  # type: ignore[override]
        """As the algorithm has it."""
        return self.algorithm.learns_value

    def kl(self, problem: Problem, trajectory: Trajectory, policy: Mean) -> Tensor:
        return self.algorithm.kl(problem, trajectory, policy)

    def behaviour(self, policy: Mean) -> Mean | GaussianPolicy:
        return self.algorithm.behaviour(policy)


def check_critic(algorithm: Algorithm, critic: Critic | None) -> None:
    """Raise unless there is one where it is needed."""
    if algorithm.learns_value and critic is None:
        raise ValueError(f"critic must be given: {type(algorithm).__name__} learns V (see ctrl.NetworkCritic)")


def check_price(problem: Problem) -> None:
    """Raise unless actions have a price: without one no action is greedy, and V is not fixed by a KL."""
    problem.penalty(torch.zeros(1))  # eta = 0 has no path KL, and says so
    if problem.actions_are_free:
        raise ValueError("beta must be > 0: without a price on actions no action is greedy")


def check_noise(problem: Problem) -> None:
    """Raise unless paths have a KL between them."""
    if problem.noiseless:
        raise ValueError("problem has no noise (eta = 0), so no KL along its paths: take ActorCritic(nats=math.inf)")
