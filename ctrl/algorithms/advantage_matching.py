"""The field's own forward-process methods: the denoising loss on fresh samples, each weighted by its advantage, against
the policy that drew them. Reward values alone, at eta = 1, as `ForwardMatching` has it.

Both take an epoch's ends x_T, noise them anew to x, and see one loss a node. A is the reward less the mean over other
samples of its condition. The papers divide A by a deviation; Adam does not see the scale of a loss, so that here the
price of a nat, beta, stays in units of the reward instead. With e = sigma (s(x | x_T) - a), which is eps_theta - eps:

    AWM   ℓ = -w ½ |e|²/D,  rho = exp(ℓ - ℓ_old):  -D min(rho A, clip(rho, 1 - clip, 1 + clip) A)
          + w beta ½ |sigma (a - a_ref)|², uniformly over log-SNR, w as `ForwardMatching` has it
          (Advantage Weighted Matching, arXiv 2509.25050, without its pull to an average of the weights)
    NFT   with x0hat± = x0hat_old ± step (x0hat - x0hat_old) and r = ½ (1 + clip(A/(most s), ±1)), s the deviation of
          rewards,  most s/step [r |x0hat+ - x_T|²/w+ + (1 - r) |x0hat- - x_T|²/w-] + beta |sigma (a - a_ref)|²,
          means over dimensions, w± the mean of |x0hat± - x_T|, uniformly over the sampler's own times
          (DiffusionNFT, arXiv 2509.16117, whose old policy is here the one before the epoch's updates)

Without w± the brackets are step |x0hat - x0hat_old|² - 2 (2r - 1) <x0hat - x0hat_old, x_T - x0hat_old>/step and a
constant: AWM's gradient at the old policy, and a pull back to it. The pull to the reference leaves out what later
actions cost, as the anchored target of `ForwardMatching` does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ctrl.algorithms.base import Algorithm, Context, Update
from ctrl.algorithms.forward_matching import attach_advantages, check_reversal, regression_weight, renoise
from ctrl.fields import Count, Positive
from ctrl.forward import bridge_score
from ctrl.linop import broadcast, dot
from ctrl.nodes import Nodes
from ctrl.problem import Problem, ScoreAsAction
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class AdvantageMatching(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps per epoch, and how many nodes each sees, over all processes.
    """

    updates: Count = 20
    nodes: Count = 1024

    def learn(self, run: Context) -> Iterator[Update]:
        problem, (collection,) = run.problem, run.collections
        assert isinstance(problem, ScoreAsAction)
        run.record_actions()
        collection.attach("return", collection.rewards.expand(collection.steps + 1, -1))
        renoise(problem, collection, run.noise)
        attach_advantages(run)
        collection.attach("a_old", run.at_nodes(run.policy, collection))
        run.record_actions_again(self.nodes)
        deviation = run.logged("reward_std")
        left = collection.steps / (collection.steps + 1)  # of the nodes, those that are drawn

        def annotate(n: Nodes) -> dict[str, Tensor]:
            return {"a_ref": problem.reference(n.t, n.x, n.cond)}

        def loss(n: Nodes) -> Tensor:
            return left * self.loss(problem, run.policy(n.t, n.x, n.cond), n, deviation)

        for nodes in run.minibatches(self.updates, self.nodes, last=collection.steps - 1, annotate=annotate):
            yield Update("policy", loss, nodes, self.nodes)

    @abstractmethod
    def loss(self, problem: ScoreAsAction, a: Tensor, n: Nodes, deviation: float) -> Tensor:
        """(n,), at actions a; its mean over nodes is minimised. deviation: that of the epoch's rewards."""

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_reversal(problem, type(self).__name__)


@dataclass(frozen=True)
class AWM(AdvantageMatching):
    """
    Attributes:
        clip: half-width of the ratio's interval. The ratio is that of means over dimensions: the nats that an interval
            allows grow with their number.
        weight: in which prediction the regression is uniform over log-SNR, eps or x0hat. The paper's is in the velocity
            of a rectified flow, uniform in its time: at the noise end that is x0hat's.
    """

    clip: Positive = 1e-3
    weight: Literal["eps", "x0hat"] = "x0hat"

    def loss(self, problem: ScoreAsAction, a: Tensor, n: Nodes, deviation: float) -> Tensor:
        score, dim = bridge_score(problem, n.t, n.x, n["end"]), a[0].numel()
        variance = problem.noising.sigma(problem.s(n.t)).square()
        square = regression_weight(problem, n.t, self.weight) * variance
        now, old = (-square * dot(score - v, score - v) / (2 * dim) for v in (a, n["a_old"]))
        ratio, A, off = (now - old).exp(), n["advantage"], a - n["a_ref"]
        gain = torch.minimum(ratio * A, ratio.clamp(1 - self.clip, 1 + self.clip) * A)
        log_snr = n.w * problem.rate(n.t) / variance  # what a node stands for
        return log_snr * (problem.beta * square * dot(off, off) / 2 - dim * gain)


@dataclass(frozen=True)
class DiffusionNFT(AdvantageMatching):
    """
    Attributes:
        step: how far from the old policy the two implicit ones lie, in units of the policy's own distance.
        most: deviations of the rewards at which advantages are cut.
    """

    step: Positive = 1.0
    most: Positive = 5.0

    def loss(self, problem: ScoreAsAction, a: Tensor, n: Nodes, deviation: float) -> Tensor:
        end, most = n["end"], self.most * max(deviation, torch.finfo(a.dtype).tiny)
        old = problem.endpoint(n.t, n.x, n["a_old"])
        moved = self.step * (problem.endpoint(n.t, n.x, a) - old)
        good = (1 + (n["advantage"] / most).clamp(-1, 1)) / 2
        pull = good * relative_miss(old + moved - end) + (1 - good) * relative_miss(old - moved - end)
        off = broadcast(problem.noising.sigma(problem.s(n.t)), a) * (a - n["a_ref"])
        return most / self.step * pull + problem.beta * dot(off, off) / a[0].numel()


def relative_miss(miss: Tensor) -> Tensor:
    """The mean square over dimensions, relative to the mean absolute value as it is now, (n,)."""
    flat = miss.flatten(1)
    return flat.square().mean(1) / flat.detach().abs().mean(1).clamp(min=1e-5)
