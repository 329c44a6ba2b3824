"""A KL budget: the weight beta that makes the path KL what it should be, found while another algorithm learns.

For a bound E[r] max subject to KL(P || P_ref) <= nats, beta is the multiplier. At an optimum a - a_ref = R^-1 B' grad V
with R in proportion to beta, so the KL goes about as beta^-2, and each epoch turns beta by a power of the KL measured
over its aim (`ctrl.regularize.adapted`).

A policy follows with a lag, and a beta that is turned meanwhile runs far past its equilibrium. So beta is held while
the KL, going on at its exponential rate of the last epochs, crosses its aim within `ahead` epochs. Let sqrt(KL) follow
its equilibrium with a time constant tau > ahead. beta is lowered only where KL = e^{2u} nats, u < 0, and that rate is
less than -2u/ahead, so where the equilibrium is less than 1 - u tau/ahead times sqrt(KL). e^u (1 - u tau/ahead) is at
most (tau/ahead) e^{ahead/tau - 1}, which is how many times too small beta becomes (the rate being that of the moment).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ctrl.algorithms.base import Around, check_noise
from ctrl.problem import Problem, ScoreAsAction
from ctrl.regularize import adapted
from ctrl.solvers import Solver
from ctrl.value import Critic

if TYPE_CHECKING:
    from ctrl.fit import Run


@dataclass(frozen=True)
class KLBudget(Around):
    """`algorithm`, learning with a beta such that the path KL comes to `nats`; the metric "beta" says which. It starts
    from the problem's own.

    Attributes:
        gain: beta is multiplied by (KL/nats)^gain an epoch.
        limit: at most by this, or its inverse.
        ahead: beta is held while the KL is to cross `nats` within so many epochs.
    """

    nats: float
    gain: float = 0.2
    limit: float = 1.2
    ahead: int = 10

    def learn(self, run: Run) -> None:
        given = run.problem
        assert isinstance(given, ScoreAsAction)
        run.problem = replace(given, beta=self.beta(given.beta, run.history))
        run.log("beta", run.problem.beta)
        try:
            self.algorithm.learn(run)
        finally:
            run.problem = given

    def beta(self, start: float, history: Sequence[dict[str, Any]]) -> float:
        """beta after the epochs of `history`. The first KL, and one of 0, are of a policy that has not learned yet."""
        measured = [epoch["kl"] for epoch in history if "kl" in epoch][1:]
        excess = [math.log(kl) - math.log(self.nats) for kl in measured if kl > 0]
        for i, now in enumerate(excess[1:], 1):
            n = min(i, self.ahead)
            then = now + self.ahead * (now - excess[i - n]) / n
            if now * then >= 0:
                start = adapted(start, [self.nats * math.exp(now)], self.nats, self.gain, self.limit)
        return start

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        if not isinstance(problem, ScoreAsAction) or problem.beta == 0:
            raise ValueError("problem must be a ScoreAsAction with beta > 0, the weight that a KL budget adapts")
        check_noise(problem)
        self.algorithm.check(problem, solver, critic)
