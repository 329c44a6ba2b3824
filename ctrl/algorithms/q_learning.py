"""q-learning in continuous time (Jia & Zhou 2023, arXiv 2207.00713): V and q together, from actions that were sampled.

For any behaviour, and with the cost c of the action that was taken (no entropy in it),

    V(t, X_t) - integral of (c + rho V + q)(u, X, a) du is a martingale, and the mean of q - gamma log pi over pi is 0,

characterise V and q of pi; if pi is proportional to e^{q/gamma}, they are the optimal ones. Here pi = N(m, L L') is a
network and q = gamma log pi, so the second condition and the third hold by construction, and the first, the
orthogonality E of the integral of xi (dV - (c + rho V + q) dt) = 0, determines pi and V. Over one step,

    e_k = V_{k+1} - V_k - integral over the step of (c + rho V + q) dt - <p, S dW>,   y_k = q(t_k, X_k, a_k) + e_k / dt,

says what q should have been there, and q regresses on y (xi = dq/dpsi), as V does on its targets (`ctrl.evaluation`).
On policy, with V the value of pi, the gradient of that regression over gamma is the policy gradient,

    grad J = E of the integral of e^{-rho t} grad log pi(a) (q_pi - gamma log pi)(t, X, a) dt.

The term in dW has mean zero for any p that is known at t_k. With p = `policy_slope` it takes the noise out where pi is
greedy for V, and e_k then vanishes path by path at the optimum: path consistency, with sampled actions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ctrl.algorithms.actor_critic import critic_loss
from ctrl.algorithms.base import Algorithm, Context, Update, check_critic
from ctrl.evaluation import control_is_square, martingale, policy_slope, targets
from ctrl.fields import Amount, Count, NotNegative
from ctrl.gaussian import Gaussian, GaussianPolicy, Mean
from ctrl.linop import LinOp
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem
from ctrl.solvers import Solver
from ctrl.value import Critic


class GaussianNetwork(nn.Module):
    """pi = N(mean(t, x), e^{2 s(t)} gamma R(t)^-1), s a learned polynomial in t/T; as a function, its mean.

    Args:
        mean: the module (t, x, cond) -> (B, *D').
        degree: of s.
        width: e^s before training; 1 is the optimum's.
    """

    def __init__(self, problem: Problem, mean: nn.Module, degree: int = 2, width: float = 1.0) -> None:
        super().__init__()
        if not problem.gamma > 0:
            raise ValueError(_NO_GAMMA)
        self.problem, self.mean = problem, mean
        self.log_width = nn.Parameter(torch.tensor([width] + [1.0] * degree).log())

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.mean(t, x, cond)

    def root(self, t: Tensor) -> LinOp:
        """L(t)."""
        u = (t / self.problem.horizon).to(self.log_width)[..., None]
        s = (self.log_width * u ** torch.arange(len(self.log_width), device=u.device)).sum(-1)
        return self.problem.penalty(t).inverse_root().scale(self.problem.gamma**0.5 * s.exp())


@dataclass(frozen=True)
class QLearning(Algorithm):
    """The policy must be a `GaussianNetwork`.

    Attributes:
        critic_updates, q_updates: optimiser steps an epoch.
        nodes: how many nodes each sees, over all processes.
        keep: epochs of trajectories kept. The conditions hold for any behaviour, but V and q then move each other:
            with many old actions in store they may run away.
        trace: as in `ctrl.evaluation`.
        critic_control: p = grad V of the critic, one more critic gradient a node; or else the policy's own slope.
    """

    critic_updates: Amount = 40
    q_updates: Amount = 40
    nodes: Count = 1024
    keep: Count = 2
    trace: NotNegative = 3.0
    critic_control: bool = True
    learns_value: ClassVar[bool] = True

    def learn(self, run: Context) -> Iterator[Update]:
        run.record_actions()
        policy = _network(run.policy)
        spent = [self.spent(run, policy, collection) for collection in run.collections]
        self.attach_targets(run, spent)
        for nodes in run.minibatches(self.critic_updates, self.nodes):
            yield Update("critic", lambda n: critic_loss(run.critic, n), nodes, self.nodes)
        self.attach_targets(run, spent)
        for nodes in run.minibatches(self.q_updates, self.nodes, last=run.steps - 1):
            yield Update("policy", lambda n: q_loss(run.problem, policy, n), nodes, self.nodes)

    @torch.no_grad()
    def spent(self, run: Context, policy: GaussianNetwork, collection: Collection) -> Tensor:
        """The integral of e^{-rho t} [(c + q) dt + <p, S dW>] over each step, (N, B), its action held. Beside the left
        nodes go the action, q(t_k, X_k, a_k), and dt times the number of steps."""
        problem, here = run.problem, run.here(collection)
        path, a_ref = here.trajectory, here.fields["a_ref"]
        assert path.a is not None
        a, mean, (t, _, ids) = path.a, run.at_nodes(policy, here), path.flat()
        if self.critic_control:
            p = run.at_nodes(run.critic.grad, here, size=run.micro_batch)
        else:
            p = policy_slope(problem, t, mean.flatten(0, 1), a_ref.flatten(0, 1)).view_as(path.x)

        def cost_and_q(nodes: slice) -> tuple[Tensor, Tensor]:
            """c and q of the actions, where time, state and policy are those of these N nodes, (N, B) each."""
            at, x, m, u_ref = (v[nodes].flatten(0, 1) for v in (t.view(len(path.t), -1), path.x, mean, a_ref))
            c = problem.running_cost(at, x, a.flatten(0, 1), u_ref, run.conditions(ids[: len(at)]))
            q = problem.gamma * Gaussian(m, policy.root(at)).log_prob(a.flatten(0, 1))
            return c.view(a.shape[:2]), q.to(c).view(a.shape[:2])

        (c0, q0), (c1, q1) = cost_and_q(slice(0, -1)), cost_and_q(slice(1, None))
        decay, (left, right) = torch.exp(-problem.discount * path.t).to(q0)[:, None], path.w.to(q0)[..., None]
        collection.attach("a_sampled", a)
        collection.attach("q", q0)
        collection.attach("dt", (collection.steps * path.t.diff()).to(q0)[:, None].expand_as(q0))
        rate = left * decay[:-1] * (c0 + q0) + right * decay[1:] * (c1 + q1)
        return rate + decay[:-1] * martingale(problem, path, p)

    def attach_targets(self, run: Context, spent: list[Tensor]) -> None:
        """What V and q are to be, of all that is in store."""
        for collection, steps in zip(run.collections, spent, strict=True):
            here = run.here(collection)
            path, value = here.trajectory, run.at_nodes(run.critic.value_given_reference, here, "a_ref")
            collection.attach("target", targets(run.problem, path, value, steps, self.trace))
            e = (targets(run.problem, path, value, steps, math.inf) - value)[:-1]
            collection.attach("q_target", here.fields["q"][:-1] + e / path.t.diff().to(e)[:, None])

    def behaviour(self, policy: Mean) -> GaussianPolicy:
        return GaussianPolicy(policy, _network(policy).root)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        if not problem.gamma > 0:
            raise ValueError(_NO_GAMMA)
        check_critic(self, critic)
        if not self.critic_control and not control_is_square(problem):
            raise ValueError("critic_control must be True: B is not square, so no p has B'p = R (a - a_ref)")


_NO_GAMMA = (
    "gamma must be > 0: q-learning learns from actions drawn around the mean. Take dataclasses.replace(problem, "
    "gamma=...); since the optimal covariance gamma R^-1 does not depend on the state, the optimal mean stays the same"
)


def _network(policy: Any) -> GaussianNetwork:
    if not isinstance(policy, GaussianNetwork):
        raise ValueError(
            f"policy must be a GaussianNetwork, which learns how widely to explore too, got {type(policy).__name__}: "
            f"take GaussianNetwork(problem, policy)"
        )
    return policy


def q_loss(problem: Problem, policy: GaussianNetwork, nodes: Nodes) -> Tensor:
    """dt e^{-rho t} |y - gamma log pi(a)|² / (2 gamma), (n,)."""
    mean = policy(nodes.t, nodes.x, nodes.cond)
    q = problem.gamma * Gaussian(mean, policy.root(nodes.t)).log_prob(nodes["a_sampled"])
    return nodes["dt"] * torch.exp(-problem.discount * nodes.t) * (nodes["q_target"] - q).square() / (2 * problem.gamma)
