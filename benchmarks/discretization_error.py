"""What does the step size do to the gradient that reinforcement learning follows? Exact, without sampling.

On a linear-Gaussian problem every solver's chain has exact moments (`toy.chain`), so the *expectation* of a gradient
estimator is exact too, and so is the gradient it is meant to estimate (`toy.lq`). The policy is the reference plus
-0.3 (t/T) x + 0.6, the gradient is in these two numbers. At equal network calls, with the KL term and without:

    DDPO        the gradient of the N-step chain's own objective, which is what it follows in expectation, on the chains
                of Euler, DDIM and 2M. `-public` is as public codes have it, with g²(t_k) dt and the KL of the chain's
                own transitions; the others are DDPO at its best: coefficients integrated exactly, and Girsanov's KL.
    continuous  E of the integral of (da/dtheta)' [B' grad V - R (a - a_ref)], grad V exact, states from any solver with
                its quadrature: Euler and DDIM with a left sum, Heun and exact transitions with the trapezoid, 2M with
                that in the clock. A random subset of nodes has the expectation of all of them. "random times" are one
                uniform time in each of N strata, by Heun: no error of quadrature at all.

The panel `chain_kl` is the path KL of the policy as the DDIM chain's own transitions count it,
½ (e^{dlambda} - 1) E|d eps|² a step where continuous time has ½ dlambda E|d eps|²: dlambda is large at the data end, so
it blows up at few calls. Beside it Girsanov's KL on the same chain.

`monte_carlo` is the same at 20 steps by sampling, with `ctrl.algorithms`' own code from rollout to loss: the mean of
the first update's gradient against its exact expectation and against the truth (the larger of two z-scores each), and
the standard deviation of one trajectory's share. On mixture-2d the policy is the optimum, the truth is zero, and with
the exact critic every trajectory says so. `dimension` is that variance on d independent copies of gaussian-1d. A sum of
d independent terms has a variance of order d, which is the continuous form's; DDPO multiplies a return and a log-ratio
that are such sums both, and has order d².

grad V is exact everywhere: what is shown is the bias of law and quadrature; no learned critic, no training. A series
has an order only where two successive local slopes agree within 0.1 and the error keeps its sign: it is that of the
finest such three points. The column `signed` is the error's part along the gradient.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.estimators import copies
from benchmarks.report import Options, Row, table, write
from ctrl import (
    DDIM,
    Estimate,
    EulerMaruyama,
    Exact,
    Exponential,
    Heun,
    IntegratedEuler,
    Multistep2,
    Problem,
    ScoreAsAction,
    Solver,
    Trajectory,
    chain_kl,
    fit_order,
    grids,
    path_kl,
)  # fmt: skip
from ctrl.algorithms import DDPO, ActorCritic, Algorithm
from ctrl.fit import Settings
from ctrl.gradient import critic_slope, directions, surrogate
from ctrl.linop import cholesky
from ctrl.solvers import GaussianStep
from toy import catalogue
from toy.catalogue import Entry
from toy.chain import ChainMoments, chain_moments
from toy.gaussian import GaussianDiffusion
from toy.lq import LQ, Array, Coefficients, LinearPolicy, QuadraticValue
from toy.scoreboard import Perturbed, gradients, perturbed

NAME = "discretization_error"
CALLS = (5, 10, 20, 40, 80, 160, 320)
GRIDS: dict[str, Callable[[Any, int], Tensor]] = {"uniform": grids.uniform, "log-SNR": grids.log_snr}


@dataclass(frozen=True)
class BiasOptions(Options):
    """What this benchmark can be asked for."""

    problem: tuple[str, ...] = ("lq-1d", "gaussian-1d", "gaussian-16d")
    """Linear-Gaussian names from the catalogue."""
    steps: tuple[int, ...] = CALLS
    """Network calls a trajectory."""


# ------------------------------------------------------------------------------------------ what is exact


@dataclass(frozen=True)
class Case:
    """A linear-Gaussian problem, the perturbed policy, and the continuous-time answers."""

    name: str
    kl: bool
    problem: Problem
    lq: LQ
    start: tuple[Tensor, Tensor]
    policy: LinearPolicy
    value: QuadraticValue
    gradient: Tensor

    @staticmethod
    def of(name: str, kl: bool = True) -> Case:
        """The catalogue's problem of that name; kl = False leaves the price on actions out."""
        entry = catalogue.get(name)
        exact, problem = entry.exact, entry.problem
        if isinstance(exact, GaussianDiffusion):
            lq, start = exact.lq, (exact.initial.mean, exact.initial.covariance)
        else:
            lq, start = exact.exact, (exact.mean0, exact.cov0)
        if not kl:
            assert isinstance(problem, ScoreAsAction)
            problem, lq = dataclasses.replace(problem, beta=0.0), without_price(lq)
        lq = dataclasses.replace(lq, gamma=0.0)  # the perturbed policy does not explore
        policy, features = perturbed(lq)
        gradient = torch.from_numpy(lq.grad_J(policy, features))
        return Case(name, kl, problem, lq, start, policy, lq.value(policy), gradient)

    def moments(self, solver: Solver, times: Tensor, policy: Perturbed | None = None) -> ChainMoments:
        """Of the solver's chain under the perturbed policy, differentiable in its parameters if it is given."""
        policy = policy or Perturbed(self.problem).requires_grad_(False)
        return chain_moments(self.problem, policy, times, solver, *self.start)


def without_price(lq: LQ) -> LQ:
    """R = 0."""

    def at(t: Array) -> Coefficients:
        c = lq.at(t)
        return dataclasses.replace(c, R=0 * c.R)

    return dataclasses.replace(lq, at=at)


def points(mean: Tensor, covariance: Tensor) -> Tensor:
    """2d points with this mean and covariance, (n, d), (n, d, d) -> (n, 2d, d): they average any quadratic exactly."""
    columns = len(mean[0]) ** 0.5 * cholesky(covariance, "covariance").mT
    return mean[:, None] + torch.cat([columns, -columns], 1)


def trajectory(problem: Problem, solver: Solver, times: Tensor, chain: ChainMoments) -> Trajectory:
    """The chain's law at each node, as a trajectory of `points`."""
    x = points(chain.mean, chain.covariance)
    return Trajectory(t=times, x=x, a=None, xi=None, w=solver.quadrature(problem, times), ids=torch.arange(x.shape[1]))


# ------------------------------------------------------------------------------------------ what estimators expect


def expected(case: Case, path: Trajectory) -> Tensor:
    """E of the continuous-time estimator on these laws of the state: `ctrl.gradient`'s own code, on points."""
    policy = Perturbed(case.problem)
    slope = directions(case.problem, path, policy, critic_slope(case.value, path))
    (grad,) = torch.autograd.grad(surrogate(case.problem, path, policy, slope).mean(), policy.theta)
    return grad


def continuous(solver: Solver, case: Case, times: Tensor) -> Tensor:
    """At all nodes, or at any random subset of them."""
    return expected(case, trajectory(case.problem, solver, times, case.moments(solver, times)))


def exact_transitions(case: Case, times: Tensor) -> Tensor:
    """No error of the law: what is left is that of the trapezoid."""
    return continuous(Exact(case.lq.closed_loop(case.policy)), case, times)


def random_times(solver: Solver, case: Case, times: Tensor) -> Tensor:
    """One time in each step, at the same random place u in all: the mean over u by Gauss-Legendre."""
    nodes, weights = np.polynomial.legendre.leggauss(4)
    h, total = times.diff(), torch.zeros(2)
    for u, w in zip((nodes + 1) / 2, weights / 2, strict=True):
        at = torch.cat([times[:1], times[:-1] + u * h])
        path = trajectory(case.problem, solver, at, case.moments(solver, at))
        right = dataclasses.replace(path, w=torch.stack([0 * h, h]))
        total = total + w * expected(case, right)
    return total


Cost = Callable[[Case, GaussianStep, Trajectory, Perturbed], Tensor]


def girsanov(case: Case, solver: GaussianStep, path: Trajectory, policy: Perturbed) -> Tensor:
    """The left sum of c with the exact integral of the noise's rate, (B,); on 2M, its own trapezoid in the clock."""
    problem = case.problem

    def cost(t: Tensor, x: Tensor, cond: None) -> Tensor:
        decay = torch.exp(-problem.discount * t)
        return decay * problem.running_cost(t, x, policy(t, x), problem.reference(t, x, cond), cond)

    if solver.multistep:
        return path.integrate(cost)
    span = problem.clock(path.t).diff() / problem.rate(path.t[:-1])
    return dataclasses.replace(path, w=torch.stack([span, 0 * span])).integrate(cost)


def own_kl(case: Case, solver: GaussianStep, path: Trajectory, policy: Perturbed) -> Tensor:
    """beta times the KL of the chain's own transitions, (B,)."""
    assert isinstance(case.problem, ScoreAsAction)
    return case.problem.beta * chain_kl(case.problem, solver, path, policy)


def ddpo(solver: GaussianStep, cost: Cost, case: Case, times: Tensor) -> Tensor:
    """The gradient of the chain's own objective, by differentiating its exact moments."""
    policy, problem = Perturbed(case.problem), case.problem
    path = trajectory(problem, solver, times, case.moments(solver, times, policy))
    reward = torch.exp(-problem.discount * path.t[-1]) * problem.reward(path.x[-1], None)
    (grad,) = torch.autograd.grad((reward - cost(case, solver, path, policy)).mean(), policy.theta)
    return grad


def integrated(problem: Problem) -> GaussianStep:
    """Euler with integrated coefficients; those of a linear-quadratic problem are constant."""
    return IntegratedEuler() if isinstance(problem, ScoreAsAction) else EulerMaruyama()


def best_euler(case: Case, times: Tensor) -> Tensor:
    """DDPO on Euler's chain at its best."""
    return ddpo(integrated(case.problem), girsanov, case, times)


@dataclass(frozen=True)
class Estimator:
    """A gradient estimator in expectation."""

    gradient: Callable[[Case, Tensor], Tensor]
    calls: int = 1
    """Network calls a step."""
    diffusion: bool = True
    """Defined for score as action alone."""
    most: int = CALLS[-1]
    """Calls beyond which it takes long."""


ESTIMATORS: dict[str, Estimator] = {
    "ddpo-euler-public": Estimator(partial(ddpo, EulerMaruyama(left_noise=True), own_kl)),
    "ddpo-ddim-public": Estimator(partial(ddpo, DDIM(), own_kl)),
    "ddpo-euler": Estimator(best_euler, diffusion=False),
    "ddpo-ddim": Estimator(partial(ddpo, DDIM(), girsanov)),
    "ddpo-2m": Estimator(partial(ddpo, Multistep2(), girsanov)),
    "Euler, left": Estimator(partial(continuous, EulerMaruyama()), diffusion=False),
    "DDIM, left": Estimator(partial(continuous, Exponential())),
    "Heun": Estimator(partial(continuous, Heun()), calls=2, diffusion=False),
    "2M": Estimator(partial(continuous, Multistep2())),
    "exact transitions": Estimator(exact_transitions, diffusion=False, most=40),
    "random times, Heun": Estimator(partial(random_times, Heun()), calls=2, diffusion=False),
}


# ------------------------------------------------------------------------------------------ the table


def order(calls: Sequence[int], signed: Sequence[float]) -> float | None:
    """Of the finest three points whose two local slopes agree within 0.1; None where the sign changes or there are
    none."""
    for i in range(len(calls) - 3, -1, -1):
        n, e = calls[i : i + 3], signed[i : i + 3]
        size = [abs(v) for v in e]
        if min(e) * max(e) > 0 and abs(fit_order(n[:2], size[:2]) - fit_order(n[1:], size[1:])) <= 0.1:
            return fit_order(n, size)
    return None


def bias(case: Case, name: str, grid: str, calls: Sequence[int]) -> Iterator[Row]:
    """One series: |E g - grad J| / |grad J|."""
    estimator = ESTIMATORS[name]
    calls = [n for n in calls if n % estimator.calls == 0 and n <= estimator.most]
    times = [GRIDS[grid](case.problem, n // estimator.calls) for n in calls]
    misses = torch.stack([estimator.gradient(case, t) - case.gradient for t in times])
    size = (misses.norm(dim=1) / case.gradient.norm()).tolist()
    along = (misses @ case.gradient / case.gradient.square().sum()).tolist()
    fitted = order(calls, [math.copysign(*pair) for pair in zip(size, along, strict=True)])
    about: Row = {"panel": "bias", "problem": case.name, "kl": case.kl, "estimator": name, "grid": grid}
    for n, error, signed in zip(calls, size, along, strict=True):
        yield {**about, "steps": n // estimator.calls, "nfe": n, "relative_error": error, "signed": signed,
               "order": fitted}  # fmt: skip


def kl_of_chains(case: Case, grid: str, calls: Sequence[int]) -> Iterator[Row]:
    """The relative error of the path KL, as the DDIM chain counts it and by Girsanov on the same chain."""
    assert isinstance(case.problem, ScoreAsAction)
    solver, policy, truth = DDIM(), Perturbed(case.problem).requires_grad_(False), case.lq.path_kl(case.policy)
    for n in calls:
        times = GRIDS[grid](case.problem, n)
        path = trajectory(case.problem, solver, times, case.moments(solver, times))
        for name, kl in (
            ("own", chain_kl(case.problem, solver, path, policy)),
            ("girsanov", path_kl(case.problem, path, policy)),
        ):
            yield {"panel": "chain_kl", "problem": case.name, "kl": True, "estimator": name, "grid": grid,
                   "steps": n, "nfe": n, "relative_error": abs(float(kl.mean()) / truth - 1),
                   "signed": float(kl.mean()) / truth - 1, "order": None}  # fmt: skip


def best(rows: Sequence[Row], calls: Sequence[int]) -> Iterator[Row]:
    """The least bias of theirs, on first-order chains and on 2M, and of ours, at equal calls, each on its best grid."""
    kinds = {
        "ddpo": ("ddpo-euler", "ddpo-ddim"),
        "ddpo-2m": ("ddpo-2m",),
        "continuous": ("Heun", "2M"),
    }
    for (problem, kl), n in product(dict.fromkeys((r["problem"], r["kl"]) for r in rows), calls):
        line: Row = {"panel": "best", "problem": problem, "kl": kl, "nfe": n}
        for kind, names in kinds.items():
            wanted = {"panel": "bias", "problem": problem, "kl": kl, "nfe": n}
            found = [r for r in rows if wanted.items() <= r.items() and r["estimator"] in names]
            least = min(found, key=lambda r: float(str(r["relative_error"])), default=None)
            line[kind] = None if least is None else least["relative_error"]
            line[f"{kind}_by"] = None if least is None else f"{least['estimator']}, {least['grid']}"
        if line["ddpo"] is not None and line["continuous"] is not None:
            yield {**line, "ratio": float(str(line["continuous"])) / float(str(line["ddpo"]))}


def ddpo_wins(rows: Sequence[Row]) -> list[Row]:
    """Where no continuous-time estimator has less bias than every DDPO, by calls and grid."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["panel"] == "bias" and row["estimator"] != "exact transitions":
            groups.setdefault(tuple(row[k] for k in ("problem", "kl", "grid", "nfe")), []).append(row)
    found: list[Row] = []
    for (problem, kl, grid, n), group in groups.items():
        theirs, ours = ([r for r in group if str(r["estimator"]).startswith("ddpo") is ddpo] for ddpo in (True, False))
        if theirs and ours:
            t, o = (min(side, key=lambda r: float(str(r["relative_error"]))) for side in (theirs, ours))
            if float(str(t["relative_error"])) < float(str(o["relative_error"])):
                found.append({"problem": problem, "kl": kl, "grid": grid, "nfe": n,
                              "ddpo": t["relative_error"], "ddpo_by": t["estimator"],
                              "continuous": o["relative_error"], "continuous_by": o["estimator"]})  # fmt: skip
    return found


# ------------------------------------------------------------------------------------------ by sampling


class AroundTheOptimum(nn.Module):
    """a* + theta_0 (t/T) x + theta_1 at theta = 0."""

    def __init__(self, entry: Entry) -> None:
        super().__init__()
        self.entry, self.theta = entry, nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        K, k = self.theta.to(x.dtype)
        return self.entry.optimal_policy(t, x, cond) + K * (t / self.entry.problem.horizon)[:, None].to(x.dtype) * x + k


SAMPLED: dict[str, tuple[Algorithm, Solver | Callable[[Problem], Solver]]] = {
    "ddpo-euler-public": (DDPO(chain_kl=True), EulerMaruyama(left_noise=True)),
    "ddpo-ddim-public": (DDPO(chain_kl=True), DDIM()),
    "ddpo-euler": (DDPO(), integrated),
    "ddpo-ddim": (DDPO(), DDIM()),
    "ddpo-2m": (DDPO(), Multistep2()),
    "Euler, left": (ActorCritic(nats=math.inf), EulerMaruyama()),
    "DDIM, left": (ActorCritic(nats=math.inf), Exponential()),
    "Heun": (ActorCritic(nats=math.inf), Heun()),
    "2M": (ActorCritic(nats=math.inf), Multistep2()),
}


def monte_carlo(name: str, estimator: str, samples: int, epochs: int, seed: int, steps: int = 20) -> Iterator[Row]:
    """One estimator, sampled. With the KL term; without it for DDPO on 2M where there is an expectation to hold it
    against, since DDPO's cost is a left sum and the exact panel has the trapezoid."""
    (algorithm, chain), exact = SAMPLED[estimator], not name.startswith("mixture")
    solver = chain if isinstance(chain, Solver) else chain(catalogue.get(name).problem)
    kl = not (exact and estimator == "ddpo-2m")
    settings = Settings(samples=samples, steps=steps, solver=solver, grid=grids.uniform, jitter=0.0, seed=seed)
    row: Row = {"panel": "monte_carlo", "problem": name, "kl": kl, "estimator": estimator, "grid": "uniform",
                "steps": steps, "nfe": steps * solver.calls, "trajectories": samples * epochs}  # fmt: skip
    if not exact:
        entry = catalogue.get(name)
        g = gradients(entry.problem, AroundTheOptimum(entry), algorithm, entry.value, settings, epochs)
        mean = Estimate.of(g)
        sd = _sd(g, samples)
        z = float(mean.z(torch.zeros(2)).abs().max()) if sd > 1e-9 else None  # or it is rounding over rounding
        yield {**row, "z_truth": z, "sd": sd}
        return
    case = Case.of(name, kl)
    mean = Estimate.of(g := gradients(case.problem, Perturbed(case.problem), algorithm, case.value, settings, epochs))
    expectation = ESTIMATORS[estimator].gradient(case, grids.uniform(case.problem, steps))
    scale = float(case.gradient.norm())
    yield {**row, "relative_error": float((mean.mean - case.gradient).norm()) / scale,
           "z_expected": float(mean.z(expectation).abs().max()), "z_truth": float(mean.z(case.gradient).abs().max()),
           "sd": _sd(g, samples) / scale}  # fmt: skip


GROWTH = {"ddpo-euler": 2, "ddpo-ddim": 2, "Heun": 1, "2M": 1}
"""What theory says of the variance's order in d."""


def dimension(estimator: str, dimensions: Sequence[int], samples: int, epochs: int, seed: int) -> Iterator[Row]:
    """The variance of one trajectory's share of the gradient on d copies of gaussian-1d, and its order in d."""
    algorithm, chain = SAMPLED[estimator]
    variances = []
    for case in map(copies, dimensions):
        solver = chain if isinstance(chain, Solver) else chain(case.problem)
        settings = Settings(samples=samples, steps=20, solver=solver, grid=grids.uniform, jitter=0.0, seed=seed)
        g = gradients(case.problem, Perturbed(case.problem), algorithm, case.value, settings, epochs)
        variances.append(_sd(g, samples) ** 2)
    growth = float(np.polyfit(np.log(dimensions), np.log(variances), 1)[0])
    for d, variance in zip(dimensions, variances, strict=True):
        yield {"panel": "dimension", "problem": "gaussian-1d, copies", "kl": True, "estimator": estimator,
               "grid": "uniform", "steps": 20, "trajectories": samples * epochs, "dimension": d, "variance": variance,
               "growth": growth, "theory": GROWTH[estimator]}  # fmt: skip


def _sd(g: Tensor, samples: int) -> float:
    """Of one trajectory's share, from the means over `samples`, (E, P)."""
    return float(g.var(0).sum() * samples) ** 0.5


# ------------------------------------------------------------------------------------------ the run


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    problems: Sequence[str]
    grids: Sequence[str]
    calls: Sequence[int]
    sampled: Sequence[str]
    samples: int
    epochs: int
    dimensions: Sequence[int]


def size(options: BiasOptions) -> Size:
    """What was asked for, or as much of it as takes a minute."""
    if options.quick:
        calls = [n for n in options.steps if n in (10, 20, 80)]
        return Size(["gaussian-1d"], ["uniform"], calls, ["gaussian-1d"], 256, 8, (1, 4, 16))
    sampled = [*options.problem, "mixture-2d"]
    return Size(options.problem, list(GRIDS), options.steps, sampled, 1024, 24, (1, 4, 16, 64, 256))


def measure(options: BiasOptions) -> list[Row]:
    """Every problem, estimator and grid."""
    n, work = size(options), list[Callable[[], Iterator[Row]]]()
    for name in n.problems:
        diffusion = is_diffusion(name)
        for kl, grid in product((True, False) if diffusion else (True,), n.grids if diffusion else ("uniform",)):
            case = Case.of(name, kl)
            names = [e for e, kind in ESTIMATORS.items() if diffusion or not kind.diffusion]
            work += [partial(bias, case, e, grid, n.calls) for e in names]
            if kl and diffusion:
                work.append(partial(kl_of_chains, case, grid, n.calls))
    for name in n.sampled:
        names = [e for e in SAMPLED if is_diffusion(name) or not ESTIMATORS[e].diffusion]
        work += [partial(monte_carlo, name, e, n.samples, n.epochs, options.seed) for e in names]
    work += [partial(dimension, e, n.dimensions, 128, n.epochs, options.seed) for e in GROWTH]
    return [row for series in tqdm(work, "chains", leave=False) for row in series()]


def is_diffusion(name: str) -> bool:
    """Whether the problem is score as action."""
    return isinstance(catalogue.get(name).problem, ScoreAsAction)


def wide(rows: Sequence[Row], panel: str) -> list[Row]:
    """One line a series, one column a number of calls."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["panel"] == panel:
            key = ("problem", "kl", "estimator", "grid", "order")
            line = lines.setdefault(tuple(row[k] for k in key[:4]), {k: row[k] for k in key})
            line[str(row["nfe"])] = row["relative_error"]
    columns = dict.fromkeys(name for line in lines.values() for name in line)
    return [{name: line.get(name) for name in columns} for line in lines.values()]


COLOURS = dict(zip(ESTIMATORS, ["#D55E00", "#882255", "#D55E00", "#882255", "#CC79A7", "#999999", "#E69F00", "#0072B2",
                                "#009E73", "#000000", "#56B4E9"], strict=True))  # fmt: skip
SHOWN = [name for name in ESTIMATORS if name not in ("Euler, left", "exact transitions")]


def draw(rows: Sequence[Row]) -> Figure:
    """Relative error against calls, on the uniform grid: a row a problem, with KL and without; DDPO dashed."""
    problems = list(dict.fromkeys(str(r["problem"]) for r in rows if r["panel"] == "bias" and r["kl"] is False))
    problems = problems or list(dict.fromkeys(str(r["problem"]) for r in rows))
    figure = Figure(figsize=(8.2, 3.1 * len(problems) + 0.9), layout="constrained")
    grid = figure.subplots(len(problems), 2, squeeze=False, sharex=True)
    for axes, problem in zip(grid, problems, strict=True):
        for ax, kl in zip(axes, (True, False), strict=True):
            for name in SHOWN:
                wanted = {"panel": "bias", "problem": problem, "kl": kl, "estimator": name, "grid": "uniform"}
                chosen = [r for r in rows if wanted.items() <= r.items()]
                style = "--" if name.startswith("ddpo") else "-"
                ax.plot([r["nfe"] for r in chosen], [r["relative_error"] for r in chosen], style, color=COLOURS[name],
                        marker="s" if "public" in name else "o", markersize=3.5, linewidth=1.3,
                        markerfacecolor="none" if "public" in name else None, label=name)  # fmt: skip
            ax.set(xscale="log", yscale="log", title=f"{problem}, {'with KL' if kl else 'reward alone'}")
            ticks = sorted({int(str(r["nfe"])) for r in rows if r["panel"] == "bias"})
            ax.set_xticks(ticks, labels=[str(n) for n in ticks])
            ax.minorticks_off()
            ax.grid(alpha=0.3)
        axes[0].set_ylabel("bias of the gradient (relative)")
    for ax in grid[-1]:
        ax.set_xlabel("network calls a trajectory")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def main(options: BiasOptions) -> None:
    """Measure, print, write."""
    began = time.perf_counter()
    rows = measure(options)
    for panel, title in (
        ("bias", "bias of the gradient, relative, at n network calls"),
        ("chain_kl", "error of the path KL on the DDIM chain"),
    ):
        if lines := wide(rows, panel):
            print(f"\n{title}")
            print(table(lines, list(lines[0])))
    print("\nby sampling, 20 steps; z-scores against the exact expectation and against the truth")
    columns = ["problem", "kl", "estimator", "trajectories", "relative_error", "z_expected", "z_truth", "sd"]
    print(table([{c: r.get(c) for c in columns} for r in rows if r["panel"] == "monte_carlo"], columns))
    print("\nvariance of one trajectory's share on d copies of gaussian-1d, and its order in d")
    columns = ["estimator", "dimension", "variance", "growth", "theory"]
    print(table([{c: r.get(c) for c in columns} for r in rows if r["panel"] == "dimension"], columns))
    if found := list(best(rows, options.steps)):
        print("\nthe least bias, with the grid it is reached on; ratio = continuous / first-order ddpo")
        print(table(found, [name for name in found[0] if name != "panel"]))
        rows += found
    if lost := ddpo_wins(rows):
        print("\nwhere DDPO on some chain has the least bias")
        print(table(lost, list(lost[0])))
    path = write(NAME, options, rows, began)
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(tyro.cli(BiasOptions, description=__doc__))
