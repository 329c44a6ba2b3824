"""What does the step size do to the gradient that reinforcement learning follows, and to what it learns?

First the gradient, exactly (`moments.py`). On a linear-Gaussian problem every solver's chain has exact moments
(`toy.chain`), so the *expectation* of a gradient estimator is exact too, and so is the gradient it is meant to estimate
(`toy.lq`). The policy is the reference plus -0.3 (t/T) x + 0.6, the gradient is in these two numbers. At equal network
calls, with the KL term and without:

    DDPO        the gradient of the N-step chain's own objective, which is what it follows in expectation, on the chains
                of Euler, DDIM and 2M. `-public` is as public codes have it, with g²(t_k) dt and the KL of the chain's
                own transitions; the others are DDPO at its best: coefficients integrated exactly, and Girsanov's KL.
                `ddpo-maruyama` has the exact integral of g² alone, the other coefficients as at the left end.
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

So far grad V is exact everywhere: what is shown is the bias of law and quadrature. Then policies are trained, with
learned critics: the panels `transfer`, `invariance`, `drift`, `cost` and `black_box` (`trained.py`). A series has an
order only where two successive local slopes agree within 0.1 and the error keeps its sign: it is that of the
finest such three points. The column `signed` is the error's part along the gradient.
"""

from __future__ import annotations

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks import trained
from benchmarks.colours import COLOURS
from benchmarks.estimators import copies
from benchmarks.moments import CALLS, ESTIMATORS, Case, integrated, trajectory
from benchmarks.report import Options, Row, command_line, number, table, with_commits, write
from ctrl import (
    DDIM,
    Estimate,
    EulerMaruyama,
    Exponential,
    Heun,
    Multistep2,
    Problem,
    ScoreAsAction,
    Solver,
    chain_kl,
    fit_order,
    grids,
    path_kl,
)  # fmt: skip
from ctrl.algorithms import DDPO, ActorCritic, Algorithm
from ctrl.fit import Settings
from toy import catalogue
from toy.catalogue import Entry
from toy.gaussian import GaussianDiffusion
from toy.lq import LQProblem
from toy.scoreboard import Perturbed, gradients

NAME = "discretization_error"
GRIDS: dict[str, Callable[[Any, int], Tensor]] = {"uniform": grids.uniform, "log-SNR": grids.log_snr}


@dataclass(frozen=True)
class BiasOptions(Options):
    """What this benchmark can be asked for."""

    problem: tuple[str, ...] = ("lq-1d", "gaussian-1d", "gaussian-16d")
    """Linear-Gaussian names from the catalogue."""
    steps: tuple[int, ...] = CALLS
    """Network calls a trajectory, in the exact panels."""
    seeds: int = 2
    """Trained policies of each kind; 3 with `--full`."""
    full: bool = False
    """What is committed: longer training, at more numbers of steps."""
    device: str = "cpu"
    """Where policies are trained, but for the probability flow's: cpu or cuda. What is exact stays on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device = cuda, but torch sees no GPU: take --device cpu")
        for name in self.problem:
            if not isinstance(catalogue.get(name).exact, GaussianDiffusion | LQProblem):
                raise ValueError(f"problem must be linear-Gaussian, where chains have exact moments; {name} is not")


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
    if not calls:
        return
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
        "ddpo": ("ddpo-maruyama", "ddpo-euler", "ddpo-ddim"),
        "ddpo-2m": ("ddpo-2m",),
        "continuous": ("Heun", "2M"),
    }
    for (problem, kl), n in product(dict.fromkeys((r["problem"], r["kl"]) for r in rows), calls):
        line: Row = {"panel": "best", "problem": problem, "kl": kl, "nfe": n}
        for kind, names in kinds.items():
            wanted = {"panel": "bias", "problem": problem, "kl": kl, "nfe": n}
            found = [r for r in rows if wanted.items() <= r.items() and r["estimator"] in names]
            least = min(found, key=lambda r: number(r, "relative_error"), default=None)
            line[kind] = None if least is None else least["relative_error"]
            line[f"{kind}_by"] = None if least is None else f"{least['estimator']}, {least['grid']}"
        if line["ddpo"] is not None and line["continuous"] is not None:
            yield {**line, "ratio": number(line, "continuous") / number(line, "ddpo")}


def ddpo_wins(rows: Sequence[Row]) -> Iterator[Row]:
    """Where no continuous-time estimator has less bias than every DDPO, by calls and grid."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["panel"] == "bias" and row["estimator"] != "exact transitions":
            groups.setdefault(tuple(row[k] for k in ("problem", "kl", "grid", "nfe")), []).append(row)
    for (problem, kl, grid, n), group in groups.items():
        theirs, ours = ([r for r in group if str(r["estimator"]).startswith("ddpo") is ddpo] for ddpo in (True, False))
        if theirs and ours:
            t, o = (min(side, key=lambda r: number(r, "relative_error")) for side in (theirs, ours))
            if number(t, "relative_error") < number(o, "relative_error"):
                where = f"{problem}, {'KL' if kl else 'reward alone'}, {grid} grid, {n} calls"
                yield {"what": "bias", "where": where, "ddpo": t["relative_error"], "by": t["estimator"],
                       "continuous": o["relative_error"], "with": o["estimator"]}  # fmt: skip


def ddpo_is_cheaper(rows: Sequence[Row]) -> Iterator[Row]:
    """Where a trained actor-critic costs more a trajectory, or ends with more regret in the limit, than DDPO."""
    measures = {"cost": ("seconds_per_1000", "network_calls_per_trajectory"), "transfer": ("regret",)}
    for panel, columns in measures.items():
        cases: dict[tuple[Any, ...], dict[str, Row]] = {}
        for row in rows:
            if row["panel"] == panel and row.get("at", "limit") == "limit" and row["estimator"] in trained.TRAINED:
                cases.setdefault((row["problem"], row["steps"]), {})[str(row["estimator"])] = row
        for ((problem, steps), pair), column in product(cases.items(), columns):
            theirs, ours = (number(pair[name], column) for name in reversed(trained.TRAINED))
            if theirs < ours:
                where = f"{problem}, trained at N = {steps}"
                yield {"what": column, "where": where, "ddpo": theirs, "by": trained.TRAINED[1], "continuous": ours,
                       "with": trained.TRAINED[0]}  # fmt: skip


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
    "ddpo-maruyama": (DDPO(), EulerMaruyama()),
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


GROWTH = {"ddpo-maruyama": 2, "ddpo-ddim": 2, "Heun": 1, "2M": 1}
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
    plan: trained.Plan
    drifts: Sequence[str]
    boxes: bool


def size(options: BiasOptions) -> Size:
    """What was asked for, or as much of it as takes a minute."""
    store = options.out / ("algorithms.runs" if options.device == "cpu" else f"algorithms-{options.device}.runs")
    if options.quick:
        calls = [n for n in options.steps if n in (10, 20, 80)]
        plan = trained.Plan(["gaussian-1d"], (10, 20), 1, 256, store, options.device, options.seed)
        return Size(["gaussian-1d"], ["uniform"], calls, ["gaussian-1d"], 256, 6, (1, 4, 16), plan, [], False)
    sampled = [*options.problem, "mixture-2d"]
    exact = (options.problem, list(GRIDS), options.steps, sampled, 1024, 24, (1, 4, 16, 64, 256))
    problems = ["gaussian-1d", "mixture-2d"]
    if options.full:
        seeds = max(options.seeds, 3)
        plan = trained.Plan(problems, (5, 10, 20, 50, 100), seeds, 10_240, store, options.device, options.seed)
        return Size(*exact, plan, list(trained.OBJECTIVES), True)
    plan = trained.Plan(problems, (10, 20, 50), options.seeds, 2560, store, options.device, options.seed)
    return Size(*exact, plan, ["ddpo-euler", "Heun"], True)


def measure(n: Size, seed: int) -> list[Row]:
    """Every problem, estimator and grid."""
    work = list[Callable[[], Iterator[Row]]]()
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
        work += [partial(monte_carlo, name, e, n.samples, n.epochs, seed) for e in names]
    work += [partial(dimension, e, n.dimensions, 128, n.epochs, seed) for e in GROWTH]
    return [row for series in tqdm(work, "chains", leave=False) for row in series()]


def learn(n: Size) -> list[Row]:
    """Policies, and what the step size has left in them."""
    runs = n.plan.train()
    of_runs: list[Callable[[], Iterator[Row]]] = [
        *(partial(trained.transfer, n.plan, runs, *case) for case in product(n.plan.problems, trained.TRAINED)),
        *(partial(panel, n.plan, runs) for panel in (trained.invariance, trained.cost)),
    ]
    others: list[Callable[[], Iterator[Row]]] = [
        *(
            partial(trained.drift, "gaussian-1d", e, steps)
            for e, steps in product(n.drifts, n.plan.steps)
            if steps >= trained.FINE
        ),
        *([partial(trained.black_box, n.plan), partial(trained.flow, n.plan, "gaussian-1d")] if n.boxes else []),
    ]
    found = [row for panel in tqdm(of_runs, "panels of runs", leave=False) for row in panel()]
    more = [row for panel in tqdm(others, "panels", leave=False) for row in panel()]
    return with_commits(found, runs.values()) + more


def is_diffusion(name: str) -> bool:
    """Whether the problem is score as action."""
    return isinstance(catalogue.get(name).problem, ScoreAsAction)


def wide(rows: Sequence[Row], panel: str, across: str, value: str, keys: Sequence[str]) -> list[Row]:
    """One line for each value of the keys, one column for each of `across`."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row["panel"] == panel:
            line = lines.setdefault(tuple(row[k] for k in keys), {k: row[k] for k in keys})
            line[str(row[across])] = row[value]
    columns = dict.fromkeys(name for line in lines.values() for name in line)
    return [{name: line.get(name) for name in columns} for line in lines.values()]


SHOWN = [name for name in ESTIMATORS if name not in ("Euler, left", "exact transitions", "ddpo-maruyama")]


def draw(rows: Sequence[Row]) -> Figure:
    """Bias of the gradient against calls, a row a problem, with KL and without; below, what it leaves in policies.
    DDPO is dashed."""
    problems = list(dict.fromkeys(str(r["problem"]) for r in rows if r["panel"] == "bias" and r["kl"] is False))
    problems = problems or list(dict.fromkeys(str(r["problem"]) for r in rows if r["panel"] == "bias"))
    figure = Figure(figsize=(8.2, 3.1 * (len(problems) + 1) + 0.9), layout="constrained")
    *upper, lower = figure.subplots(len(problems) + 1, 2, squeeze=False)
    for axes, problem in zip(upper, problems, strict=True):
        for ax, kl in zip(axes, (True, False), strict=True):
            draw_bias(ax, rows, problem, kl)
        axes[0].set_ylabel("bias of the gradient (relative)")
    draw_transfer(lower[0], rows)
    draw_drift(lower[1], rows)
    lower[0].set_ylabel("regret (relative)")
    handles, labels = upper[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize="small")
    return figure


def draw_bias(ax: Axes, rows: Sequence[Row], problem: str, kl: bool) -> None:
    """On the uniform grid."""
    for name in SHOWN:
        wanted = {"panel": "bias", "problem": problem, "kl": kl, "estimator": name, "grid": "uniform"}
        line(ax, [r for r in rows if wanted.items() <= r.items()], "nfe", "relative_error", name)
    frame(ax, f"{problem}, {'with KL' if kl else 'reward alone'}", "network calls a trajectory", rows, "bias", "nfe")


def draw_transfer(ax: Axes, rows: Sequence[Row]) -> None:
    """In the limit, against the calls a policy was trained with; one standard error."""
    marks = dict(zip(dict.fromkeys(r["problem"] for r in rows if r["panel"] == "transfer"), "o^s", strict=False))
    for (problem, mark), name in product(marks.items(), trained.TRAINED):
        wanted = {"panel": "transfer", "problem": problem, "estimator": name, "at": "limit"}
        chosen = [r for r in rows if wanted.items() <= r.items()]
        shown = name if name.startswith("ddpo") else "Heun"
        ax.errorbar([number(r, "nfe") for r in chosen], [number(r, "regret") for r in chosen],
                    [float(r["regret_se"] or 0) for r in chosen],
                    linestyle="--" if name.startswith("ddpo") else "-", color=COLOURS[shown], marker=mark,
                    markersize=4, linewidth=1.3, capsize=2, label=f"{name}, {problem}")  # fmt: skip
    ax.legend(frameon=False, fontsize="x-small")
    frame(ax, "policies trained so, regret in the limit", "network calls a trajectory", rows, "transfer", "nfe")


def draw_drift(ax: Axes, rows: Sequence[Row]) -> None:
    """Where the objective's own optimum lies."""
    for name in SHOWN:
        line(ax, [r for r in rows if r["panel"] == "drift" and r["estimator"] == name], "nfe", "regret", name)
    frame(ax, "optimum of the N-step objective, gaussian-1d", "network calls a trajectory", rows, "drift", "nfe")


def line(ax: Axes, chosen: Sequence[Row], x: str, y: str, name: str) -> None:
    """One series in its colour; DDPO dashed, what public codes do with hollow squares."""
    public = "public" in name
    ax.plot([number(r, x) for r in chosen], [number(r, y) for r in chosen], "--" if name.startswith("ddpo") else "-",
            color=COLOURS[name], marker="s" if public else "o", markersize=3.5, linewidth=1.3,
            markerfacecolor="none" if public else None, label=name)  # fmt: skip


def frame(ax: Axes, title: str, xlabel: str, rows: Sequence[Row], panel: str, x: str) -> None:
    """Both axes logarithmic, a tick at each x of the panel; nothing where there is nothing to show."""
    if not np.isfinite(ax.dataLim.get_points()).all():
        ax.set_axis_off()
        return
    ax.set(xscale="log", yscale="log", xlabel=xlabel)
    ax.set_title(title, fontsize="medium")
    ticks = sorted({int(number(r, x)) for r in rows if r["panel"] == panel and r[x] is not None})
    ax.set_xticks(ticks, labels=[str(n) for n in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)


def show(rows: Sequence[Row], panel: str, title: str, columns: Sequence[str]) -> None:
    """A panel's rows as a table."""
    if chosen := [{c: r.get(c) for c in columns} for r in rows if r["panel"] == panel]:
        print(f"\n{title}")
        print(table(chosen, columns))


def main(options: BiasOptions) -> None:
    """Measure, print, write."""
    began, n = time.perf_counter(), size(options)
    rows = measure(n, options.seed)
    for panel, title in (
        ("bias", "bias of the gradient, relative, at n network calls"),
        ("chain_kl", "error of the path KL on the DDIM chain"),
    ):
        if lines := wide(rows, panel, "nfe", "relative_error", ("problem", "kl", "estimator", "grid", "order")):
            print(f"\n{title}")
            print(table(lines, list(lines[0])))
    show(rows, "monte_carlo", "by sampling, 20 steps; z-scores against the exact expectation and against the truth",
         ["problem", "kl", "estimator", "trajectories", "relative_error", "z_expected", "z_truth", "sd"])  # fmt: skip
    show(rows, "dimension", "variance of one trajectory's share on d copies of gaussian-1d, and its order in d",
         ["estimator", "dimension", "variance", "growth", "theory"])  # fmt: skip
    rows += best(rows, options.steps)
    show(rows, "best", "the least bias, with the grid it is reached on; ratio = continuous / first-order ddpo",
         ["problem", "kl", "nfe", "ddpo", "ddpo_by", "ddpo-2m", "continuous", "continuous_by", "ratio"])  # fmt: skip
    write(NAME, options, rows, began)  # what is exact is kept, whatever happens in training
    rows += learn(n)
    print("\ntrained at N steps, sampled elsewhere: regret")
    lines = wide(rows, "transfer", "at", "regret", ("problem", "estimator", "steps", "nfe", "trajectories"))
    print(table(lines, list(lines[0])))
    show(rows, "invariance", "how far apart over N: final regrets, and learning curves on the mean",
         ["problem", "estimator", "seeds", "best_steps", "best", "worst_steps", "worst", "apart", "by_chance",
          "curves_apart"])  # fmt: skip
    if lines := wide(rows, "drift", "steps", "regret", ("estimator",)):
        print("\nregret of the N-step objective's own optimum on gaussian-1d")
        print(table(lines, list(lines[0])))
    show(rows, "black_box", "solvers without a density",
         ["problem", "solver", "estimator", "seeds", "trajectories", "regret", "regret_se", "why"])  # fmt: skip
    lost = [*ddpo_wins(rows), *ddpo_is_cheaper(rows)]
    print("\nwhere the continuous-time form does not win")
    print(table(lost, list(lost[0])) if lost else "nowhere in what was run")
    path = write(NAME, options, rows, began, options.device)
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    command_line(main, BiasOptions, __doc__)
