"""A KL budget: the weight beta that makes the path KL what it should be, found while another algorithm learns.

For a bound E[r] max subject to KL(P || P_ref) <= nats, beta is the multiplier. The optimum's law is P_ref tilted by
e^{r/beta}; where the reward is Gaussian under P_ref, with standard deviation s, its KL is s²/(2 beta²). So beta starts
at s/sqrt(2 nats), s being the first epoch's, and a reward in other units, c r + c', is learned the same way.

A policy follows beta with a lag. Let y = sqrt(KL/nats) go a tau-th of the way to its equilibrium beta*/beta an epoch:
then y + tau y' = beta*/beta is known at once, from what y does, and

    (log beta)' = gain (y + ahead y' - 1)

comes to beta* at rate gain without running past it, if ahead is tau. For small deviations it is stable for any tau,
and damped as (1 + gain ahead)/(2 sqrt(gain tau)). The rate of change of y adds up to y itself, and with it the error
of each epoch's KL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from ctrl.algorithms.base import Context, Update, Wrapper, check_noise
from ctrl.fields import Count, Positive
from ctrl.problem import Problem, ScoreAsAction
from ctrl.solvers import Solver
from ctrl.value import Critic


@dataclass(frozen=True)
class KLBudget(Wrapper):
    """`algorithm`, learning with a beta such that the path KL comes to `nats`; the metric "beta" says which. If all
    rewards of the first epoch are the same, it starts from the problem's own.

    Attributes:
        gain: of the difference between sqrt(KL/nats) and 1, what goes to log beta in an epoch.
        limit: beta is multiplied at most by this in an epoch, or by its inverse.
        ahead: epochs that a policy is taken to need to follow beta.
    """

    nats: Annotated[float, "in (0, inf]"]
    gain: Positive = 0.5
    limit: Annotated[float, "> 1"] = 1.5
    ahead: Count = 4

    def learn(self, run: Context) -> Iterator[Update]:
        given = run.problem
        assert isinstance(given, ScoreAsAction)
        beta = self.beta(run.history, run.logged("reward_std")) or given.beta
        run.log("beta", beta)
        yield from self.algorithm.learn(run.with_problem(replace(given, beta=beta)))

    def beta(self, history: Sequence[dict[str, Any]], spread: float) -> float:
        """beta after the epochs of `history`; without any, from the standard deviation of rewards."""
        learned = [epoch for epoch in history if "kl" in epoch]
        if not learned:
            return spread / math.sqrt(2 * self.nats)
        y = [math.sqrt(epoch["kl"] / self.nats) for epoch in learned[-2:]]
        turn = self.gain * (y[0] + self.ahead * (y[-1] - y[0]) - 1) if len(y) > 1 else 0.0
        most = math.log(self.limit)
        return float(learned[-1]["beta"] * math.exp(min(max(turn, -most), most)))

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        if not isinstance(problem, ScoreAsAction) or problem.beta == 0:
            raise ValueError("problem must be a ScoreAsAction with beta > 0, the weight that a KL budget adapts")
        check_noise(problem)
        self.algorithm.check(problem, solver, critic)
