"""A KL budget: the weight beta that makes the path KL what it should be, found while another algorithm learns.

For a bound E[r] max subject to KL(P || P_ref) <= nats, beta is the multiplier. At an optimum the KL falls as beta
rises, so each epoch turns beta by a power of the KL it measured over its aim (`ctrl.regularize.adapted`).
"""

from __future__ import annotations

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
        limit: at most by this, or its inverse: a policy needs some epochs to follow.
    """

    nats: float
    gain: float = 0.2
    limit: float = 1.2

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
        """beta after the epochs of `history`."""
        return adapted(start, [epoch["kl"] for epoch in history if "kl" in epoch], self.nats, self.gain, self.limit)

    def check(self, problem: Problem, solver: Solver, critic: Critic | None) -> None:
        if not isinstance(problem, ScoreAsAction) or problem.beta == 0:
            raise ValueError("problem must be a ScoreAsAction with beta > 0, the weight that a KL budget adapts")
        check_noise(problem)
        self.algorithm.check(problem, solver, critic)
