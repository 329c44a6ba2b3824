"""What is left of the step size in a policy that was trained at N steps: the trained panels of
`discretization_error.py`.

    transfer    policies trained at each N, sampled at every N by the solver they were trained with, by 2M at 20 calls,
                by the probability-flow ODE (with the path KL of the SDE), and in the limit: regret against the optimum,
                the reward and the cost as that sampler has them. The optimum itself, sampled so, stands beside them.
    invariance  one setting for all N: how far learning curves (their mean distance) and final regrets lie apart over N.
    drift       what of that the objective alone explains. Start at the optimum, maximise the N-step objective itself
                (exact moments, Newton to convergence) over a* + p(t) x + q(t), with cubic p and q: the regret of
                where it ends. A policy that is right at all N would not move.
    black_box   learning from trajectories of solvers without a transition density: stochastic Heun, torchsde's adaptive
                scheme, and the probability flow (`ctrl.ProbabilityFlow`, with a price of its own on actions) by Heun.

Runs are kept, and shared with `algorithms.py`. DDPO has LONGER times the trajectories, since it learns more slowly.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.polynomial.chebyshev import chebvander
from scipy.integrate import quad
from scipy.stats import norm as normal
from torch import Tensor, nn

from benchmarks.algorithms import METHODS, Job, carry_out, entry_of, gain, trained
from benchmarks.moments import Case, Cost, by_quadrature, girsanov, objective, own_kl
from benchmarks.report import Row, number, with_commits
from ctrl import (
    DDIM,
    Estimate,
    EulerMaruyama,
    Heun,
    IntegratedEuler,
    Multistep2,
    NetworkCritic,
    Noise,
    ProbabilityFlow,
    ScoreAsAction,
    grids,
    rollout,
)
from ctrl.algorithms import DDPO, ActorCritic
from ctrl.fit import Settings, fit
from ctrl.gaussian import Mean
from ctrl.solvers import Solver
from toy import catalogue
from toy.catalogue import Entry
from toy.gaussian import GaussianDiffusion
from toy.lq import LQ, Array, LinearPolicy
from toy.networks import Policy, Value
from toy.scoreboard import reference_regret, score

TRAINED = ("actor-critic", "ddpo-euler")
LONGER = 4
ODE_SAMPLES, ODE_STEPS = 16_384, 50


@dataclass(frozen=True)
class Plan:
    """Which policies are trained."""

    problems: Sequence[str]
    steps: Sequence[int]
    seeds: int
    trajectories: int
    store: Path
    device: str
    first: int = 0
    """The first seed."""
    workers: int = os.cpu_count() or 1

    def job(self, problem: str, method: str, steps: int, seed: int) -> Job:
        """One run."""
        more = LONGER if method.startswith("ddpo") else 1
        return Job(problem, method, steps, seed, more * self.trajectories)

    def jobs(self, problem: str, method: str, steps: int) -> list[Job]:
        """Its seeds."""
        return [self.job(problem, method, steps, seed) for seed in range(self.first, self.first + self.seeds)]

    def train(self) -> dict[Job, Row]:
        """All runs for `transfer`, `invariance` and `cost`."""
        return self.carried_out(
            [job for case in product(self.problems, TRAINED, self.steps) for job in self.jobs(*case)]
        )

    def carried_out(self, jobs: list[Job]) -> dict[Job, Row]:
        """How each went, from its file where it was done before."""
        runs = dict(zip(jobs, carry_out(jobs, self.store, self.workers, device=self.device), strict=True))
        if failed := {job.key: row["failed"] for job, row in runs.items() if row["failed"]}:
            raise ValueError(f"runs that failed, in {self.store}: {failed}")
        return runs


def calls_of(method: str, steps: int) -> int:
    """Network calls a trajectory."""
    return steps * Settings(**METHODS[method].settings).solver.calls


def over_seeds(found: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean over seeds and its standard error, from (value, error) each; all have the same noise, so theirs stays."""
    values, noise = [value for value, _ in found], mean(error for _, error in found)
    return mean(values), math.hypot(stdev(values) / len(values) ** 0.5, noise) if len(values) > 1 else noise


# transfer


def transfer(plan: Plan, runs: dict[Job, Row], problem: str, method: str) -> Iterator[Row]:
    """The regret of each policy wherever it is sampled, one row an N and place, and that of the optimum there."""
    about: Row = {"panel": "transfer", "problem": problem}
    optimum = sampled_at(problem, method, entry_of(problem).optimal_policy, plan.steps)
    for at, (regret, se) in optimum.items():
        yield {**about, "estimator": f"optimum by {solver_of(method)}", "steps": None, "seeds": None, "nfe": None,
               "trajectories": None, "at": at, "regret": regret, "regret_se": se}  # fmt: skip
    for steps in plan.steps:
        jobs = plan.jobs(problem, method, steps)
        places = [sampled_at(problem, method, trained(job, plan.store), plan.steps) for job in jobs]
        found = {at: over_seeds([place[at] for place in places]) for at in optimum}
        found["limit"] = over_seeds([(number(runs[j], "regret"), number(runs[j], "regret_stderr")) for j in jobs])
        for at, (regret, error) in found.items():
            yield {**about, "estimator": method, "steps": steps, "seeds": len(jobs), "nfe": calls_of(method, steps),
                   "trajectories": jobs[0].trajectories, "at": at, "regret": regret, "regret_se": error}  # fmt: skip


def solver_of(method: str) -> str:
    """The name of the solver it is trained with."""
    return type(Settings(**METHODS[method].settings).solver).__name__


def sampled_at(problem: str, method: str, policy: Mean, steps: Sequence[int]) -> dict[str, tuple[float, float]]:
    """Place -> regret and its standard error."""
    entry, settings = entry_of(problem), Settings(**METHODS[method].settings)
    found = {f"N = {n}": gain(entry, policy, settings.solver, settings.grid(entry.problem, n), 2048) for n in steps}
    found["2M, 20 calls"] = gain(entry, policy, Multistep2(), grids.natural(entry.problem, 20), 2048)
    places = {at: (-float(estimate.mean), float(estimate.stderr)) for at, estimate in found.items()}
    return {**places, "ODE": by_ode(entry, policy)}


@torch.no_grad()
def by_ode(entry: Entry, policy: Mean) -> tuple[float, float]:
    """Regret with the reward of the probability-flow ODE and the path KL of the SDE."""
    problem = entry.problem
    assert isinstance(problem, ScoreAsAction)
    ode, ids = dataclasses.replace(problem, eta=0.0), torch.arange(ODE_SAMPLES)
    times, noise = grids.natural(problem, ODE_STEPS), Noise(996)
    path = rollout(ode, policy, times, noise, ids, solver=Heun(), cond=entry.condition(ids))
    reward = problem.reward(path.x[-1], path.cond)
    kl, unit = score(entry, policy, steps=60).path_kl, reference_regret(entry)
    regret = float(entry.J_optimal.mean) - float(reward.mean() - problem.beta * kl.mean)
    return regret / unit, math.hypot(float(reward.std()) / ODE_SAMPLES**0.5, problem.beta * float(kl.stderr)) / unit


def cost(plan: Plan, runs: dict[Job, Row]) -> Iterator[Row]:
    """What learning costs, one row a problem, method and N."""
    for problem, method, steps in product(plan.problems, TRAINED, plan.steps):
        jobs = plan.jobs(problem, method, steps)
        spent = ("seconds", "network_calls")
        seconds, calls = (mean(number(runs[j], name) / j.trajectories for j in jobs) for name in spent)
        yield {"panel": "cost", "problem": problem, "estimator": method, "steps": steps,
               "seconds_per_1000": 1000 * seconds, "network_calls_per_trajectory": calls}  # fmt: skip


# invariance


def invariance(plan: Plan, runs: dict[Job, Row]) -> Iterator[Row]:
    """How far apart over N, one row a problem and method; `by_chance` is how far the final regrets would be expected to
    lie apart if N made no difference."""
    for problem, method in product(plan.problems, TRAINED):
        jobs = {n: plan.jobs(problem, method, n) for n in plan.steps}
        finals = {
            n: over_seeds([(number(runs[j], "regret"), number(runs[j], "regret_stderr")) for j in seeds])
            for n, seeds in jobs.items()
        }
        low, high = (pick(finals, key=lambda n: finals[n][0]) for pick in (min, max))
        error = mean(se**2 for _, se in finals.values()) ** 0.5
        curves = torch.tensor([[regrets(runs[j]) for j in seeds] for seeds in jobs.values()]).mean(1)
        yield {"panel": "invariance", "problem": problem, "estimator": method, "from": min(plan.steps),
               "to": max(plan.steps), "seeds": plan.seeds, "best_steps": low, "best": finals[low][0],
               "worst_steps": high, "worst": finals[high][0], "apart": finals[high][0] - finals[low][0],
               "by_chance": expected_range(len(finals)) * error,
               "curves_apart": float((curves.amax(0) - curves.amin(0)).mean())}  # fmt: skip


def expected_range(n: int) -> float:
    """E of largest less least of n standard normals: the integral of 1 - F^n - (1 - F)^n."""
    return float(quad(lambda x: 1 - normal.cdf(x) ** n - normal.sf(x) ** n, -8, 8)[0])


def regrets(run: Row) -> list[float]:
    """Its learning curve."""
    return [regret for _, regret in json.loads(str(run["curve"]))]


DEGREE = 3
FINE = 2 * (DEGREE + 1)
"""Steps, at least, for a chain to see what the polynomials are."""


class Around(nn.Module):
    """a* + p(t) x + q(t): p and q are Chebyshev sums of degree DEGREE with coefficients theta, (2, DEGREE + 1)."""

    def __init__(self, optimum: LinearPolicy, horizon: float) -> None:
        super().__init__()
        self.optimum, self.horizon = optimum, horizon
        self.theta = nn.Parameter(torch.zeros(2, DEGREE + 1, dtype=torch.float64))

    def basis(self, t: Array) -> Array:
        return chebvander(2 * t / self.horizon - 1, DEGREE)

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        p, q = self.theta @ torch.from_numpy(self.basis(t.numpy())).mT
        return self.optimum(t, x, cond) + p[:, None] * x + q[:, None]

    def linear(self) -> LinearPolicy:
        """For exact answers."""
        (p, q), best = self.theta.detach().numpy(), self.optimum
        return LinearPolicy(
            lambda t: best.K(t) + (self.basis(t) @ p)[:, None, None] * np.eye(best.K(t).shape[1]),
            lambda t: best.k(t) + (self.basis(t) @ q)[:, None],
        )


OBJECTIVES: dict[str, tuple[Solver, Cost]] = {
    "ddpo-euler-public": (EulerMaruyama(left_noise=True), own_kl),
    "ddpo-ddim-public": (DDIM(), own_kl),
    "ddpo-maruyama": (EulerMaruyama(), girsanov),
    "ddpo-euler": (IntegratedEuler(), girsanov),
    "ddpo-ddim": (DDIM(), girsanov),
    "ddpo-2m": (Multistep2(), girsanov),
    "Heun": (Heun(), by_quadrature),
}


def climb(value: Callable[[], Tensor], theta: nn.Parameter) -> None:
    """To a maximum of value(): quasi-Newton until near, then Newton steps, the last of which is only rounding."""
    near = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        near.zero_grad()
        loss = -value()
        loss.backward()
        return loss

    near.step(loss)
    for _ in range(NEWTON):
        (slope,) = torch.autograd.grad(value(), theta, create_graph=True)
        rows = [torch.autograd.grad(s, theta, retain_graph=True)[0].flatten() for s in slope.flatten()]
        curvature = torch.linalg.eigvalsh(torch.stack(rows))
        step = torch.linalg.solve(torch.stack(rows), slope.detach().flatten())
        with torch.no_grad():
            theta.sub_(step.view_as(theta))
    if float(curvature.max()) >= 0 or float(step.norm()) > 1e-8 * float(theta.detach().norm()):
        raise RuntimeError(f"no maximum: the last Newton step is {float(step.norm()):.1e} long")


NEWTON = 4


def drift(problem: str, estimator: str, steps: int) -> Iterator[Row]:
    """The regret that maximising the N-step objective makes of the optimum, over J* - J_ref; exact."""
    case, (solver, cost) = Case.of(problem), OBJECTIVES[estimator]
    policy, times = Around(case.lq.optimal_policy(), case.lq.horizon), grids.uniform(case.problem, steps)
    best, worst = case.lq.J_optimal(), case.lq.J(case.lq.reference)
    climb(lambda: objective(solver, cost, case, policy, times), policy.theta)
    regret = (best - case.lq.J(policy.linear())) / (best - worst)
    yield {"panel": "drift", "problem": problem, "estimator": estimator, "steps": steps,
            "nfe": steps * solver.calls, "regret": regret}  # fmt: skip


# black box


@cache
def without_noise(name: str) -> tuple[ProbabilityFlow, LQ]:
    """A Gaussian problem of the catalogue on the ODE, and its exact answers: Riccati does not see the noise."""
    exact = catalogue.get(name).exact
    assert isinstance(exact, GaussianDiffusion)
    fields = {f.name: getattr(exact.problem, f.name) for f in dataclasses.fields(exact.problem)}

    def at(t: Array) -> Any:
        c = exact.lq.at(t)  # kappa = g² and R = beta g² there; half and a quarter of these here
        return dataclasses.replace(c, B=c.B / 2, SS=0 * c.SS, R=c.R / 4)

    return ProbabilityFlow(**{**fields, "eta": 0.0}), dataclasses.replace(exact.lq, at=at)


BOXES = {"stochastic Heun": "actor-critic", "torchsde, adaptive": "actor-critic-torchsde"}
"""Solvers without a density, and the methods that learn from their trajectories."""


def black_box(plan: Plan, steps: int = 20) -> Iterator[Row]:
    """The regret that the actor-critic reaches with each, and what DDPO says."""
    jobs = {case: plan.jobs(*case, steps) for case in product(plan.problems, BOXES.values())}
    runs = plan.carried_out([job for some in jobs.values() for job in some])
    for problem, (box, method) in product(plan.problems, BOXES.items()):
        some = jobs[problem, method]
        yield refusal(problem, box, METHODS[method].settings.get("solver", Heun()), steps)
        regret, se = over_seeds([(number(runs[j], "regret"), number(runs[j], "regret_stderr")) for j in some])
        row: Row = {"panel": "black_box", "problem": problem, "solver": box, "steps": steps,
                    "estimator": "actor-critic", "seeds": len(some), "trajectories": plan.trajectories,
                    "regret": regret, "regret_se": se}  # fmt: skip
        yield from with_commits([row], [runs[j] for j in some])


def refusal(problem: str, box: str, solver: Solver, steps: int) -> Row:
    """DDPO's row."""
    try:
        DDPO().check(catalogue.get(problem).problem, solver, None)
    except ValueError as said:
        return {"panel": "black_box", "problem": problem, "solver": box, "steps": steps, "estimator": "ddpo",
                "regret": None, "why": str(said)}  # fmt: skip
    raise AssertionError(f"{box} has a density")


def flow(plan: Plan, name: str, steps: int = 20) -> Iterator[Row]:
    """The same on the probability flow."""
    box = "probability flow, Heun"
    yield refusal(name, box, Heun(), steps)
    seeds = range(plan.first, plan.first + plan.seeds)
    regret, se = over_seeds([on_the_ode(name, seed, plan.trajectories, steps) for seed in seeds])
    yield {"panel": "black_box", "problem": name, "solver": box, "steps": steps, "estimator": "actor-critic",
           "seeds": plan.seeds, "trajectories": plan.trajectories, "regret": regret, "regret_se": se}  # fmt: skip


def on_the_ode(name: str, seed: int, trajectories: int, steps: int) -> tuple[float, float]:
    """(J* - J)/(J* - J_ref) by Heun in 100 steps, and its standard error: differences from the same starts."""
    torch.manual_seed(seed)
    problem, lq = without_noise(name)
    policy, critic = Policy(problem), NetworkCritic(problem, Value(problem))
    algorithm = ActorCritic(nats=math.inf)  # without noise there is no KL to be measured in
    settings = Settings(steps=steps, seed=seed, progress=False)
    settings = dataclasses.replace(settings, epochs=max(trajectories // settings.samples, 1))
    fit(problem, policy, algorithm, critic=critic, settings=settings, accelerator=Accelerator(cpu=True))

    @torch.no_grad()
    def returns(mean: Mean) -> Tensor:
        ids, times = torch.arange(4096), grids.natural(problem, 100)
        path = rollout(problem, mean, times, Noise(995), ids, solver=Heun())

        def cost(t: Tensor, x: Tensor, cond: None) -> Tensor:
            return problem.running_cost(t, x, mean(t, x, cond), problem.reference(t, x, cond))

        return problem.reward(path.x[-1], None) - path.integrate(cost)

    best, unit = returns(lq.optimal_policy()), lq.J_optimal() - lq.J(lq.reference)
    regret = Estimate.of(best - returns(policy))
    return float(regret.mean) / unit, float(regret.stderr) / unit
