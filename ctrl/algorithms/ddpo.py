"""DDPO, the discrete-time baseline (Black et al. 2023, arXiv 2305.13301): PPO on the chain's own likelihood ratios.

The chain is the solver's, x_{k+1} ~ N(m_theta(x_k), S_k), and an epoch's transitions are visited in shuffled order:

    loss = cost - min(rho A, clip(rho, 1 - clip, 1 + clip) A),   rho = p_theta(x_{k+1} | x_k) / p_old(x_{k+1} | x_k).

The cost of a step is the left sum of c, for score as action beta times Girsanov's KL with the exact integral of g²; or
beta times the KL of the chain's own transitions. A is the return to go less its mean over other samples at this step.
Only baselines are subtracted: dividing A by its standard deviation, as the public codes do, multiplies beta by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrl.algorithms.base import Algorithm, Context, Update, check_noise
from ctrl.fields import Amount, Count, Positive
from ctrl.gaussian import Gaussian, Mean
from ctrl.nodes import Collection, Nodes
from ctrl.problem import Problem, ScoreAsAction
from ctrl.solvers import GaussianStep, Solver, at_steps, stack_steps
from ctrl.value import Critic


@dataclass(frozen=True)
class DDPO(Algorithm):
    """
    Attributes:
        passes: how often an epoch's transitions are visited.
        nodes: transitions an optimiser step sees, over all processes.
        clip: half-width of the ratio's interval. The ratio is per step, so its meaning changes with N.
        mean_over_dimensions: the public codes' option: the mean of the log-density over dimensions in place of the
            sum, which turns the ratio into its D-th root.
        chain_kl: the KL of the chain's own transitions in place of Girsanov's.
        group: the baseline is the mean over this many samples with ids in a row, which may share a condition; 0 takes
            all of an epoch's.
    """

    passes: Count = 2
    nodes: Count = 1024
    clip: Positive = 0.2
    mean_over_dimensions: bool = False
    chain_kl: bool = False
    group: Amount = 0

    def learn(self, run: Context) -> Iterator[Update]:
        samples = run.samples
        if (group := self.group or samples) < 2 or samples % group:
            raise ValueError(f"group must be at least 2 and divide the {samples} samples of an epoch, got {group}")
        run.record_actions()
        run.record_actions_again(self.nodes)
        (collection,) = run.collections
        path, steps = collection.trajectory, collection.steps
        chain = Chain(run.problem, gaussian(run.solver, "DDPO"), path.t)
        collection.attach("x_next", path.x[1:])
        chain.attach_before(collection)
        with torch.no_grad():
            left = run.nodes(collection, range(steps))
            cost = self.cost(chain, left, left["a_old"], chain.law(left, left["a_old"], left["a_old_before"]))
        assert path.reward is not None
        decay = torch.exp(-run.problem.discount * path.t[-1]).to(path.x)
        gain = decay * path.reward - cost.view(steps, -1).flip(0).cumsum(0).flip(0)
        collection.attach("advantage", gain - run.mean_over_others(gain, group))
        for nodes in run.minibatches(self.passes * -(-steps * samples // self.nodes), self.nodes, last=steps - 1):
            yield Update("policy", lambda n: self.loss(chain, run.policy, n), nodes, self.nodes, chain.calls)

    def loss(self, chain: Chain, policy: Mean, nodes: Nodes) -> Tensor:
        """(n,), N times each transition's loss: the mean over nodes estimates the sum over steps."""
        a = policy(nodes.t, nodes.x, nodes.cond)
        law = chain.law(nodes, a, chain.act_before(policy, nodes))
        old = chain.law(nodes, nodes["a_old"], nodes["a_old_before"])
        log_ratio = law.log_prob(nodes["x_next"]) - old.log_prob(nodes["x_next"])
        if self.mean_over_dimensions:
            log_ratio = log_ratio / law.dim
        ratio, A = log_ratio.exp(), nodes["advantage"]
        gain = torch.minimum(ratio * A, ratio.clamp(1 - self.clip, 1 + self.clip) * A)
        return len(chain.plan) * (self.cost(chain, nodes, a, law) - gain)

    def cost(self, chain: Chain, nodes: Nodes, a: Tensor, law: Gaussian) -> Tensor:
        """Discounted cost of each step at the actions a, (n,); law is that of x_{k+1} under them."""
        if self.chain_kl:
            assert isinstance(chain.problem, ScoreAsAction)
            return chain.problem.beta * law.kl(chain.law(nodes, nodes["a_ref"], nodes["a_ref_before"]))
        return step_cost(chain, nodes, a)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        gaussian(solver, "DDPO")
        check_noise(problem)
        if self.chain_kl and not isinstance(problem, ScoreAsAction):
            raise ValueError("chain_kl needs a ScoreAsAction problem: elsewhere the running cost is not a KL")


class Chain:
    """A solver's transitions at nodes in any order."""

    def __init__(self, problem: Problem, solver: GaussianStep, times: Tensor) -> None:
        self.problem, self.solver, self.times = problem, solver, times
        self.plan: list[Any] = solver.plan(problem, times)
        self.steps = stack_steps(self.plan, times.device)

    @property
    def calls(self) -> int:
        """Of the policy, for the law of a step."""
        return 2 if self.solver.multistep else 1

    def attach_before(self, collection: Collection) -> None:
        """Beside the nodes, what was at the one before."""
        collection.attach("x_before", collection.trajectory.x.roll(1, 0))
        for name in ("a_old", "a_ref"):
            collection.attach(f"{name}_before", collection.fields[name].roll(1, 0))

    def law(self, nodes: Nodes, a: Tensor, a_before: Tensor) -> Gaussian:
        """Of x_{k+1}, given x_k and what the step before carried along."""
        before = at_steps(self.steps, (nodes.k - 1).clamp(min=0))
        memory = self.solver.carry(before, nodes["x_before"], a_before)
        return self.solver.transition(self.problem, at_steps(self.steps, nodes.k), nodes.x, a, memory)

    def act_before(self, policy: Mean, nodes: Nodes) -> Tensor:
        """The policy at step k - 1, where a multistep method needs it; at k = 0 there is none, and it has no weight."""
        if not self.solver.multistep:
            return nodes["a_old_before"]
        t = self.times[(nodes.k - 1).clamp(min=0)].to(nodes.t)
        return policy(t, nodes["x_before"], nodes.cond)

    def span(self, nodes: Nodes) -> Tensor:
        """Each step's length in the noise's clock over the rate at its left node: exact for h proportional to the
        rate."""
        span = self.problem.clock(self.times).diff() / self.problem.rate(self.times[:-1])
        return span[nodes.k].to(nodes.t)


def step_cost(chain: Chain, nodes: Nodes, a: Tensor) -> Tensor:
    """Discounted running cost of each step at the actions a, a left sum, (n,)."""
    problem = chain.problem
    decay = torch.exp(-problem.discount * nodes.t)
    return decay * chain.span(nodes) * problem.running_cost(nodes.t, nodes.x, a, nodes["a_ref"], nodes.cond)


def gaussian(solver: Solver, who: str) -> GaussianStep:
    """The solver, if its steps have a density."""
    if not isinstance(solver, GaussianStep):
        raise ValueError(
            f"solver {type(solver).__name__} has no transition density, which {who} needs: take EulerMaruyama, DDIM, "
            f"Exponential or Multistep2"
        )
    return solver
