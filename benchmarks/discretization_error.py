"""How much of a policy's reward and KL is the solver's error? Exact, without sampling.

Data are Gaussian, the policy is the reference score plus -0.3 (t/T) x + 0.6. Every solver's chain is then Gaussian with
moments known exactly (`toy.chain`), and so is the continuous-time answer (`toy.lq`). Two relative errors, at equal
numbers of network calls (Heun takes half as many steps):

    reward   E r(X_T)
    kl       the path KL to the reference, as `ctrl.path_kl` reports it from the chain with the solver's own quadrature;
             and beside it the sum of the KLs of the DDIM chain's own transitions, as `ctrl.chain_kl` reports it:
             ½ (e^{dlambda} - 1) E|d eps|² a step where continuous time has ½ dlambda E|d eps|². dlambda is large at the
             data end, so this one blows up at few calls.

What it shows is the bias of the law and of the KL, no more: no gradient, no learned critic, no sampling error, no
training. The exponential step at eta = 1 is DDIM's with ddim_eta = 1 (arXiv 2010.02502). A series has an order only if
the two local slopes of its three finest points agree within 0.1; it is fitted to these three.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import Options, Row, table, write
from ctrl import (
    EulerMaruyama,
    Exponential,
    Heun,
    Mean,
    Multistep2,
    ScoreAsAction,
    Solver,
    Trajectory,
    chain_kl,
    fit_order,
    grids,
    path_kl,
)  # fmt: skip
from ctrl.linop import cholesky
from toy import catalogue
from toy.chain import ChainMoments, chain_moments
from toy.gaussian import GaussianDiffusion

NAME = "discretization_error"
CALLS = (10, 20, 40, 80, 160, 320)
SOLVERS: dict[str, Solver] = {
    "Euler-Maruyama": EulerMaruyama(), "exponential (DDIM)": Exponential(), "Heun": Heun(), "2M": Multistep2(),
}  # fmt: skip
CHAIN = "DDIM, chain's own KL"
GRIDS: dict[str, Callable[[ScoreAsAction, int], Tensor]] = {"uniform": grids.uniform, "log-SNR": grids.log_snr}
COLOURS = dict(zip([*SOLVERS, CHAIN], ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"], strict=True))
MARKERS = dict(zip(COLOURS, "os^Dv", strict=True))


@dataclass(frozen=True)
class Case:
    """A Gaussian problem, the perturbed policy, and the two continuous-time answers."""

    name: str
    exact: GaussianDiffusion
    policy: Mean
    reward: float
    kl: float

    @staticmethod
    def of(name: str) -> Case:
        """The catalogue's problem of that name."""
        p: GaussianDiffusion = catalogue.get(name).exact
        policy, end = p.perturbed(-0.3, 0.6), torch.tensor([p.lq.horizon], dtype=torch.float64).numpy()
        moments = p.lq.moments(policy)
        law = (torch.from_numpy(m(end)) for m in (moments.mean, moments.covariance))
        reward, kl = float(p.reward(points(*law)[0]).mean()), p.lq.path_kl(policy)
        # all states of a node share its time: one gain serves them all
        return Case(name, p, lambda t, x, cond: policy(t[:1], x), reward, kl)


def points(mean: Tensor, covariance: Tensor) -> Tensor:
    """2d points with this mean and covariance, (n, d), (n, d, d) -> (n, 2d, d): they average any quadratic exactly."""
    columns = len(mean[0]) ** 0.5 * cholesky(covariance, "covariance").mT
    return mean[:, None] + torch.cat([columns, -columns], 1)


def trajectory(problem: ScoreAsAction, solver: Solver, times: Tensor, chain: ChainMoments) -> Trajectory:
    """The chain's law at each node, as a trajectory of `points`."""
    x = points(chain.mean, chain.covariance)
    return Trajectory(t=times, x=x, a=None, xi=None, w=solver.quadrature(problem, times), ids=torch.arange(x.shape[1]))


def chain_errors(case: Case, solver: Solver, grid: str, calls: int) -> dict[str, float]:
    """Relative errors at this number of calls: reward, kl, and for the exponential step the chain's own KL."""
    p, problem = case.exact, case.exact.problem
    times = GRIDS[grid](problem, calls // solver.calls)
    path = trajectory(
        problem, solver, times, chain_moments(problem, case.policy, times, solver, p.initial.mean, p.initial.covariance)
    )
    estimates = {
        "reward": (problem.reward(path.x[-1], path.cond), case.reward),
        "kl": (path_kl(problem, path, case.policy), case.kl),
    }
    if isinstance(solver, Exponential):
        estimates[CHAIN] = (chain_kl(problem, solver, path, case.policy), case.kl)
    return {name: abs(float(samples.mean()) / truth - 1) for name, (samples, truth) in estimates.items()}


def order(calls: list[int], errors: list[float]) -> float | None:
    """The order of the three finest points, if they lie on a line."""
    calls, errors = calls[-3:], errors[-3:]
    straight = abs(fit_order(calls[:2], errors[:2]) - fit_order(calls[1:], errors[1:])) <= 0.1
    return fit_order(calls, errors) if straight else None


def series(case: Case, solver_name: str, grid: str, calls: list[int]) -> list[Row]:
    """All errors of one solver on one grid."""
    solver = SOLVERS[solver_name]
    found = [chain_errors(case, solver, grid, n) for n in calls]
    rows: list[Row] = []
    for key in found[0]:
        errors = [f[key] for f in found]
        panel, label = ("kl", CHAIN) if key == CHAIN else (key, solver_name)
        fitted = order(calls, errors)
        rows += [
            {"panel": panel, "problem": case.name, "solver": label, "grid": grid, "nfe": n, "steps": n // solver.calls,
             "error": error, "order": fitted}
            for n, error in zip(calls, errors, strict=True)
        ]  # fmt: skip
    return rows


def measure(problems: list[str], calls: list[int]) -> list[Row]:
    """Every problem, solver and grid."""
    work = [(case, solver, grid) for case in map(Case.of, problems) for solver in SOLVERS for grid in GRIDS]
    bar = tqdm(work, "chains", leave=False)
    return [row for case, solver, grid in bar for row in series(case, solver, grid, calls)]


def wide(rows: list[Row]) -> list[dict[str, Any]]:
    """One line a series, one column a number of calls."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[k] for k in ("problem", "panel", "solver", "grid"))
        line = lines.setdefault(key, {k: row[k] for k in ("problem", "panel", "solver", "grid", "order")})
        line[str(row["nfe"])] = row["error"]
    return [lines[key] for key in sorted(lines, key=lambda k: (k[0], k[1] == "kl"))]


def draw(rows: list[Row], problem: str) -> Figure:
    """Error against calls, a panel each for reward and KL; solid lines on the uniform grid, dashed in log-SNR."""
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots(1, 2)
    titles = {"reward": "mean reward $E\\,r(X_T)$", "kl": "path KL to the reference"}
    for ax, (panel, title) in zip(axes, titles.items(), strict=True):
        for label in COLOURS:
            for grid, style in (("uniform", "-"), ("log-SNR", "--")):
                wanted = {"panel": panel, "problem": problem, "solver": label, "grid": grid}
                chosen = [row for row in rows if wanted.items() <= row.items()]
                ax.plot([r["nfe"] for r in chosen], [r["error"] for r in chosen], style, color=COLOURS[label],
                        marker=MARKERS[label], markersize=4, linewidth=1.3,
                        label=label if grid == "uniform" else None)  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="network calls", title=title)
        ax.set_xticks(sorted({int(str(r["nfe"])) for r in rows}), labels=sorted({int(str(r["nfe"])) for r in rows}))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("relative error")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{problem}: solid, grid uniform in t; dashed, uniform in log-SNR", fontsize="medium")
    return figure


def main(options: Options) -> None:
    """Measure, print, write."""
    began = time.perf_counter()
    problems = ["gaussian-1d"] if options.quick else ["gaussian-1d", "gaussian-16d"]
    calls = list(CALLS[:4] if options.quick else CALLS)
    rows = measure(problems, calls)
    print("relative error at n network calls")
    print(table(wide(rows), ["problem", "panel", "solver", "grid", *map(str, calls), "order"]))
    path = write(NAME, options, rows, began)
    draw(rows, problems[0]).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
