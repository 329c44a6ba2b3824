"""Forward matching: the policy gradient from values of the reward, through the noising instead of the path
(`ctrl.forward`), at eta = 1.

Ends x_T are noised anew to x = A x_T + sqrt(S2) eps, so that one call of the reward makes many nodes, and the policy
follows

    loss = E of the integral over log-SNR of  w ½ G' |sigma (s(x | x_T) - a_theta)|²,   G' = G - baseline,

the usual denoising loss on its own samples (s = grad_x log p(x | x_T), so sigma (s - a) is eps_theta - eps), times how
much better than expected they are. Two returns:

    soft      G = r - beta log dP_a/dP_ref, the log-ratio from noised ends of its own (`ctrl.forward`), whatever the
              sampler. If the policy is the score of its own law, this is the gradient of J.
    anchored  G = r, and + w beta ½ |sigma (a - a_ref)|² in the loss: what public codes have (Reinforce Adjoint
              Matching, arXiv 2605.10759, and its relatives). It stops short of the optimum, by a few per cent of the
              regret, for it lacks what later actions cost.

A weight w(lambda) alone leaves the fixed point where it is. w = 1 is natural, a regression on eps that is uniform over
log-SNR; with w = e^-lambda = sigma²/alpha² it is one on x0hat, w |eps_theta - eps|² = |x0hat_theta - x_T|². A reward
that is decided early has its signal at small log-SNR; where lambda is large there is the noise of eps alone. `damping`
is added to the w of the anchor, so that a - a_ref = w/(w + damping) grad V/beta is shrunk there.

E[s - a | x] = 0 holds for a policy that is the score of its own law alone, and off it a baseline other than E[G | x]
pushes the policy further off. So the baseline is a critic, fitted to G at earlier epochs' nodes, or else the mean of G
over other samples, of the same condition as far as conditions are known to differ. G' is clipped at `hold` beta, and as
much is added to it: zero in the mean where the policy is the score of its own law, and elsewhere a pull to it, with a
loss that is bounded from below. Where the clip cuts, the step is shorter than the gradient's; at the optimum it
cuts the noise of the log-ratio alone, on both sides of zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ctrl.algorithms.base import Algorithm, Context, Update, check_critic, check_price
from ctrl.fields import Amount, Count, NotNegative
from ctrl.forward import bridge_score, log_ratio_rate, renoised_path
from ctrl.linop import dot
from ctrl.nodes import Collection, Nodes
from ctrl.noise import Noise
from ctrl.problem import Problem, ScoreAsAction
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class ForwardMatching(Algorithm):
    """
    Attributes:
        updates, nodes: optimiser steps per epoch, and how many nodes each sees, over all processes.
        keep: epochs of ends kept; each epoch noises them all anew.
        target: soft or anchored.
        weight: in which prediction the regression is uniform over log-SNR, eps or x0hat.
        damping: added to the weight of the anchor.
        hold: pull to the score of the policy's own law, and clip of G', in units of beta; with 0 there is neither.
        critic_updates: of the critic, the baseline, per epoch, with as many nodes; with 0 no critic is asked, and the
            baseline is the mean over other samples.
    """

    updates: Count = 20
    nodes: Count = 1024
    keep: Count = 4
    target: Literal["soft", "anchored"] = "soft"
    weight: Literal["eps", "x0hat"] = "eps"
    damping: NotNegative = 0.0
    hold: NotNegative = 1.0
    critic_updates: Amount = 20

    @property
    def learns_value(self) -> bool:  # type: ignore[override]
        """With a critic as the baseline."""
        return self.critic_updates > 0

    def learn(self, run: Context) -> Iterator[Update]:
        problem, last = run.problem, run.steps - 1
        assert isinstance(problem, ScoreAsAction)
        run.record_actions()
        self.attach_returns(run, run.collections[-1])
        for collection in run.collections:
            renoise(problem, collection, run.noise)
        if not self.critic_updates:
            attach_advantages(run)

        def annotate(n: Nodes) -> dict[str, Tensor]:
            found = {}
            if self.critic_updates:
                found["advantage"] = n["return"] - run.critic.value(n.t, n.x, n.cond)
            if self.target == "anchored":
                found["a_ref"] = problem.reference(n.t, n.x, n.cond)
            return found

        def critic_loss(n: Nodes) -> Tensor:
            return (n["return"] - run.critic.value(n.t, n.x, n.cond)).square()

        calls = (self.critic_updates > 0) + (self.target == "anchored")
        for nodes in run.minibatches(
            self.updates, self.nodes, last=last, annotate=annotate if calls else None, calls=calls
        ):
            yield Update("policy", lambda n: self.loss(run, n), nodes, self.nodes)
        for nodes in run.minibatches(self.critic_updates, self.nodes, last=last):
            yield Update("critic", critic_loss, nodes, self.nodes)

    def attach_returns(self, run: Context, collection: Collection) -> None:
        """Beside every node its sample's G."""
        problem, G = run.problem, collection.trajectory.reward
        assert isinstance(problem, ScoreAsAction) and G is not None
        if self.target == "soft":
            G = G - problem.beta * log_ratio(run, collection)
        collection.attach("return", G.expand(collection.steps + 1, -1))

    def loss(self, run: Context, n: Nodes) -> Tensor:
        """(n,): the mean over nodes estimates the integral."""
        problem = run.problem
        assert isinstance(problem, ScoreAsAction)
        a = run.policy(n.t, n.x, n.cond)
        miss = bridge_score(problem, n.t, n.x, n["end"]) - a
        w = regression_weight(problem, n.t, self.weight)
        gain = n["advantage"]
        if self.hold:
            gain = gain.clamp(-self.hold * problem.beta, self.hold * problem.beta) + self.hold * problem.beta
        loss = w * gain * dot(miss, miss) / 2
        if self.target == "anchored":
            off = a - n["a_ref"]
            loss = loss + (w + self.damping) * problem.beta * dot(off, off) / 2
        left = run.steps / (run.steps + 1)  # of the nodes, those that are drawn
        return left * n.w * problem.rate(n.t) * loss

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        check_reversal(problem, "ForwardMatching")
        check_critic(self, critic)


def check_reversal(problem: Problem, who: str) -> None:
    """Raise unless the process is the time reversal of the noising, and actions have a price."""
    if not isinstance(problem, ScoreAsAction) or problem.eta != 1 or problem.discount:
        raise ValueError(
            f"problem must be ScoreAsAction with eta = 1 and discount = 0 for {who}: only then is the process the time "
            f"reversal of the noising; elsewhere take ActorCritic"
        )
    check_price(problem)


def regression_weight(problem: ScoreAsAction, t: Tensor, weight: str) -> Tensor:
    """w, (n,), at times t: with it the regression is uniform over log-SNR in eps, or in x0hat."""
    return (-problem.noising.log_snr(problem.s(t))).exp() if weight == "x0hat" else torch.ones_like(t)


def renoise(problem: ScoreAsAction, collection: Collection, noise: Noise) -> None:
    """From here on the states of the collection are its ends, noised anew; the ends themselves lie beside them."""
    path, end = collection.trajectory, collection.trajectory.x[-1]
    x = renoised_path(problem, path.t, end, noise, path.ids)
    x[-1] = end
    collection.trajectory = replace(path, x=x, a=None, xi=None)
    collection.fields = {"return": collection.fields["return"]}
    collection.attach("end", end.expand_as(x))


def log_ratio(run: Context, collection: Collection) -> Tensor:
    """log dP_a/dP_ref of the ends of a collection under the policy as it is, (B,), from nodes that nothing else is
    learned from. What stands at the last node is what stands at the one before, where noise is left."""
    problem, path = run.problem, collection.trajectory
    assert isinstance(problem, ScoreAsAction)
    x = renoised_path(problem, path.t, path.x[-1], run.noise, path.ids, turn=1)
    nodes = Collection(replace(path, x=x, a=None, xi=None))
    a, a_ref = (run.at_nodes(f, nodes) for f in (run.policy, problem.reference))
    t = nodes.trajectory.flat()[0][: collection.steps * collection.samples]
    states = (v[:-1].flatten(0, 1) for v in (x, path.x[-1:].expand_as(x), a, a_ref))
    rate = log_ratio_rate(problem, t, *states).view(collection.steps, -1)
    return nodes.integrate(torch.cat([rate, rate[-1:]]))


def attach_advantages(run: Context) -> None:
    """To every node: the sample's return less what others of its condition lead one to expect."""
    newest = run.collections[-1].trajectory.x.device
    y = torch.cat([one.fields["return"][0].to(newest) for one in run.collections])
    ids = torch.cat([one.trajectory.ids.to(newest) for one in run.collections])
    group = group_of(run.conditions(ids), len(y)).to(newest)
    every = torch.tensor(sorted({g for part in run.gather(group.tolist()) for g in part}), device=newest)
    advantage = y - others_mean(y, torch.searchsorted(every, group), run.total, len(every))
    for one, part in zip(run.collections, advantage.split([one.samples for one in run.collections]), strict=True):
        one.attach("advantage", part.expand(one.steps + 1, -1))


def group_of(cond: Any, n: int) -> Tensor:
    """Which of `n` samples share a condition, (n,): by the condition if it is whole numbers or has them as `index`."""
    index = cond if torch.is_tensor(cond) else getattr(cond, "index", None)
    if index is None or index.is_floating_point() or index.shape != (n,):
        return torch.zeros(n, dtype=torch.int64)
    return index.long()


def others_mean(y: Tensor, group: Tensor, total: Callable[[Tensor], Tensor], groups: int) -> Tensor:
    """The expected y of each sample, (n,), from the other ones: their mean over its group, shrunk to that over all by
    how much groups are known to differ.

    With variance `between` of the groups' means and `within` of samples about them, both by the analysis of variance,
    the m others of a group are trusted to between m/(between m + within), as E[y | others] has it for normal y.
    total: adds up over processes.
    """
    zero, one = y.new_zeros(groups), torch.ones_like(y)
    n = total(zero.index_add(0, group, one))
    centre = total(zero.index_add(0, group, y)).sum() / n.sum()  # or the squares of a large constant are all there is
    y = y - centre
    S, Q = (total(zero.index_add(0, group, v)) for v in (y, y.square()))
    within = (Q - S.square() / n.clamp(min=1)).sum() / (n.sum() - (n > 0).sum()).clamp(min=1)
    between = (Q.sum() / (n.sum() - 1).clamp(min=1) - within).clamp(min=0)
    m, overall = n[group] - 1, (S.sum() - y) / (n.sum() - 1).clamp(min=1)
    trust = between * m / (between * m + within).clamp(min=torch.finfo(y.dtype).tiny)
    return centre + overall + trust * ((S[group] - y) / m.clamp(min=1) - overall)
