"""Bias and variance of every policy-gradient estimator, a trajectory and a CPU second.

The policy is a_theta = s_ref + theta_1 (t/T) x + theta_2 at a theta that is not optimal (`THETA`); what is estimated is
its grad J, two numbers, which are exact for Gaussian data (`toy.lq`) and by the backward equation for mixture-1d
(`toy.pde`). Every estimator of `ctrl.gradient` gives one gradient a trajectory, from the same noise for all, on a grid
of N steps (`grids.natural`, the default of `fit`). All of these are over |grad J|:

    bias            |mean - grad J|, with bias_se the standard error of that vector; what is below 2 bias_se is not seen
    sd              of one trajectory, the root of the sum over the two parameters of their variances, with sd_se
    microseconds_per_trajectory     CPU time of one thread, rollout and gradient together, median over batches of 2048
    variance_times_seconds          sd² times the seconds a trajectory takes: what the variance of the mean is after one
                                    CPU second. Times are those of cheap closed-form scores: with a large network it is
                                    calls that count, two a step for Heun's method and one for the rest
    largest_share   of the sum of squares, what the single largest trajectory has. Light tails: some thousandths. Where
                    it is much more, sd is no stable figure: between far modes the sensitivity of a path to its state
                    has so heavy a tail that adjoint and pathwise gradients of mixture-1d have none worth the name

The continuous-time estimators run on Heun's method (trapezoid), the critic's form on Euler (left sum) and 2M, too. Two
are discrete-time: "pathwise" differentiates through the whole rollout, "chain" is the discrete chain's own likelihood
ratio (DDPO) with the exact integral of g², Girsanov's KL and a mean baseline. A mean baseline is that over the other
trajectories of the batch. "q-weighted" explores with standard deviation 0.4 in each action.

Critics: the exact V of this policy, or learned ones, structured (`ctrl.StructuredCritic`) and plain
(`ctrl.NetworkCritic`, the same network), fitted by `ctrl.fit` with the critic's updates of `ctrl.ActorCritic` and none
of the actor: each epoch regresses on `ctrl.evaluation.targets` of fresh trajectories of this same policy, Monte Carlo
(trace 0) with the critic's own gradient for control variate. A critic's error is bias in the critic's form and in the
TD form; as a baseline it costs variance alone. The time of the fit is not in the figures.

The last panel is sd against the dimension d: d independent copies of gaussian-1d's data and reward, N = 20. Where a
gradient is made coordinate by coordinate (critic, adjoint), sd over |grad J| falls as d^-1/2; where one number for the
whole path multiplies every coordinate's noise (td, q-weighted, likelihood ratios), it levels off.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.colours import COLOURS
from benchmarks.report import Options, Row, number, table, write
from ctrl import (
    DDIM,
    Critic,
    EulerMaruyama,
    GaussianPolicy,
    Heun,
    Mean,
    Multistep2,
    Noise,
    Scalar,
    ScoreAsAction,
    Solver,
    StructuredCritic,
    Trajectory,
    advantage_rate,
    grids,
    rollout,
)  # fmt: skip
from ctrl.algorithms import ActorCritic
from ctrl.fit import Settings, fit
from ctrl.gradient import (
    adjoint,
    chain_surrogate,
    critic_slope,
    directions,
    likelihood_ratio_slope,
    pathwise,
    q_direction,
    returns,
    surrogate,
    td_slope,
)  # fmt: skip
from ctrl.rollout import batch_times
from ctrl.value import NetworkCritic
from toy import catalogue, pde
from toy.gaussian import GaussianDiffusion, GaussianLaw, QuadraticReward
from toy.networks import Value
from toy.scoreboard import Perturbed, perturbed

NAME = "estimators"
BATCH = 2048
EXPLORATION = 0.4
THETA = {"gaussian-1d": (-0.3, 0.6), "gaussian-16d": (-0.3, 0.6), "mixture-1d": (-0.3, -0.3)}


# ------------------------------------------------------------------------------------------ problems


def policy_at(problem: ScoreAsAction, theta: Tensor) -> Mean:
    """s_ref + theta_1 (t/T) x + theta_2; theta: (2,), or one a sample, (B, 2)."""

    def mean(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        K, k = theta.to(x.dtype)[..., None].unbind(-2)
        return problem.reference(t, x, cond) + K * (t / problem.horizon)[:, None].to(x.dtype) * x + k

    return mean


@dataclass(frozen=True)
class Case:
    """A problem, the policy's theta, and the exact V and grad J of that policy."""

    name: str
    problem: ScoreAsAction
    theta: Tensor
    value: Critic
    grad_J: Tensor

    @property
    def dimension(self) -> int:
        return self.problem.shape[0]


def gaussian_case(name: str, exact: GaussianDiffusion, theta: tuple[float, float]) -> Case:
    """Exact by the ODEs of linear-quadratic control."""
    lq = exact.lq
    policy, features = perturbed(lq, theta)
    grad_J = torch.from_numpy(lq.grad_J(policy, features))
    return Case(name, exact.problem, torch.tensor(theta, dtype=torch.float64), lq.value(policy), grad_J)


def mixture_case(name: str, mesh: pde.Mesh) -> Case:
    """Exact by the backward equation."""
    problem, theta = catalogue.get(name).exact.problem, torch.tensor(THETA[name], dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    found = pde.gradient(
        problem,
        lambda theta, t, x: policy_at(problem, theta)(t, x, None),
        theta,
        lambda x: normal.log_prob(x)[:, 0],
        mesh,
    )
    return Case(name, problem, theta, found.value, found.grad)


def case(name: str) -> Case:
    """The catalogue's problem of that name."""
    if name == "mixture-1d":
        return mixture_case(name, pde.Mesh(-8.0, 8.0, 401, 1e-6))
    return gaussian_case(name, catalogue.get(name).exact, THETA[name])


@dataclass(frozen=True)
class Copies(Critic):
    """V of independent copies of a problem in one dimension: the sum over coordinates."""

    one: Critic

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.one.value(t.repeat_interleave(x.shape[1]), x.reshape(-1, 1)).view_as(x).sum(1)

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.one.grad(t.repeat_interleave(x.shape[1]), x.reshape(-1, 1)).view_as(x)


@cache
def copies(d: int) -> Case:
    """d independent copies of gaussian-1d: V is a sum over them, and grad J d times that of one."""
    one, law = case("gaussian-1d"), catalogue.get("gaussian-1d").exact
    eye, ones = torch.eye(d, dtype=torch.float64), torch.ones(d, dtype=torch.float64)
    reward = QuadraticReward(law.reward.G * eye, law.reward.h * ones, d * law.reward.r0)
    exact = GaussianDiffusion(
        law.noising, law.mu * ones, law.C * eye, reward, beta=law.beta, start=GaussianLaw(0 * ones, eye)
    )
    return Case("gaussian-1d, copies", exact.problem, one.theta, Copies(one.value), d * one.grad_J)


def learned(case: Case, kind: str, epochs: int, seed: int) -> Critic:
    """A critic fitted to trajectories of the policy itself."""
    torch.manual_seed(seed)
    network = Value(case.problem)
    critic = StructuredCritic(case.problem, network) if kind == "structured" else NetworkCritic(case.problem, network)
    algorithm = ActorCritic(critic_updates=40, actor_updates=0, keep=1, trace=0.0, critic_control=True)
    settings = Settings(epochs=epochs, samples=512, steps=40, critic_lr=1e-2, seed=seed, progress=False)
    first, second = case.theta.tolist()
    fit(case.problem, Perturbed(case.problem, (first, second)), algorithm, critic=critic, settings=settings)
    return critic


# ------------------------------------------------------------------------------------------ estimators


@dataclass(frozen=True)
class Batch:
    """Trajectories of one case, and what estimators make of them; nothing is shared between estimators."""

    case: Case
    critic: Critic
    solver: Solver
    times: Tensor
    noise: Noise
    ids: Tensor

    @property
    def problem(self) -> ScoreAsAction:
        return self.case.problem

    @property
    def policy(self) -> Mean:
        return policy_at(self.problem, self.case.theta)

    def rollout(self, policy: Mean | GaussianPolicy, differentiable: bool = False) -> Trajectory:
        return rollout(
            self.problem, policy, self.times, self.noise, self.ids, solver=self.solver, differentiable=differentiable
        )

    @cached_property
    def path(self) -> Trajectory:
        return self.rollout(self.policy)

    @torch.no_grad()
    def value(self) -> Tensor:
        """V at the nodes, (N+1, B)."""
        return self.path.at_nodes(self.critic.value)

    @cached_property
    def cost(self) -> Tensor:
        """c at the nodes, (N+1, B)."""

        def rate(t: Tensor, x: Tensor, cond: Any) -> Tensor:
            a_ref = self.problem.reference(t, x, cond)
            return self.problem.running_cost(t, x, self.policy(t, x, cond), a_ref, cond)

        return self.path.at_nodes(rate)

    @cached_property
    def reward(self) -> Tensor:
        """r(X_T), (B,)."""
        return self.problem.reward(self.path.x[-1], None)

    def mean_of_others(self) -> Tensor:
        """The mean return to go over the other trajectories, (N, B)."""
        gain = returns(self.problem, self.path, self.reward, self.cost)
        return (gain.sum(1, keepdim=True) - gain) / (gain.shape[1] - 1)

    def per_sample(self, f: Callable[[Mean], Tensor]) -> Tensor:
        """df_b/dtheta, (B, 2), for f(policy): (B,): each sample has a theta of its own."""
        theta = self.case.theta.to(torch.get_default_dtype()).repeat(len(self.ids), 1).requires_grad_()
        return torch.autograd.grad(f(policy_at(self.problem, theta)).sum(), theta)[0]

    def weighted(self, path: Trajectory, ways: Tensor) -> Tensor:
        return self.per_sample(lambda policy: surrogate(self.problem, path, policy, ways))

    def with_slope(self, slope: Tensor) -> Tensor:
        return self.weighted(self.path, directions(self.problem, self.path, self.policy, slope))


def by_critic(b: Batch) -> Tensor:
    return b.with_slope(critic_slope(b.critic, b.path))


def by_adjoint(b: Batch) -> Tensor:
    return b.with_slope(adjoint(b.problem, b.path, b.policy))


def by_td(b: Batch) -> Tensor:
    return b.with_slope(td_slope(b.problem, b.path, b.value(), b.cost))


def by_ratio(b: Batch) -> Tensor:
    return b.with_slope(likelihood_ratio_slope(b.problem, b.path, b.reward, b.cost))


def by_ratio_mean(b: Batch) -> Tensor:
    return b.with_slope(likelihood_ratio_slope(b.problem, b.path, b.reward, b.cost, b.mean_of_others()))


def by_ratio_value(b: Batch) -> Tensor:
    return b.with_slope(likelihood_ratio_slope(b.problem, b.path, b.reward, b.cost, b.value()[:-1]))


def by_pathwise(b: Batch) -> Tensor:
    return b.per_sample(lambda policy: pathwise(b.problem, b.rollout(policy, differentiable=True), policy))


def by_q(b: Batch) -> Tensor:
    explore = GaussianPolicy(b.policy, lambda t: Scalar(EXPLORATION))
    path = b.rollout(explore)
    assert path.a is not None
    rates = []
    with torch.no_grad():
        for t, x, a in zip(batch_times(path.t, path.x.dtype, len(path.ids)), path.x, path.a, strict=False):
            s, a_ref, slope = b.policy(t, x, None), b.problem.reference(t, x, None), b.critic.grad(t, x)
            rates.append(advantage_rate(b.problem, t, a, s, a_ref, slope, explore.root(t)))
    return b.weighted(path, q_direction(path, explore, torch.stack(rates)))


def by_chain(b: Batch) -> Tensor:
    advantage = returns(b.problem, b.path, b.reward, b.cost) - b.mean_of_others()
    solver: Any = b.solver
    ratio = b.per_sample(lambda policy: chain_surrogate(b.problem, solver, b.path, policy, advantage))
    return ratio + b.with_slope(torch.zeros_like(b.path.x))


@dataclass(frozen=True)
class Line:
    """An estimator with its critic (exact, structured, network or none) and solver."""

    estimator: str
    gradient: Callable[[Batch], Tensor]
    critic: str | None
    solver: str

    @property
    def label(self) -> str:
        critic = f", {self.critic} V" if self.critic else ""
        return f"{self.estimator}{critic}, {self.solver}"


SOLVERS: dict[str, Solver] = {"Euler": EulerMaruyama(), "Heun": Heun(), "2M": Multistep2(), "DDIM": DDIM()}
LINES = (
    Line("critic", by_critic, "exact", "Heun"),
    Line("critic", by_critic, "exact", "2M"),
    Line("critic", by_critic, "exact", "Euler"),
    Line("critic", by_critic, "structured", "Heun"),
    Line("critic", by_critic, "network", "Heun"),
    Line("td", by_td, "exact", "Heun"),
    Line("td", by_td, "structured", "Heun"),
    Line("td", by_td, "network", "Heun"),
    Line("q-weighted", by_q, "exact", "Heun"),
    Line("adjoint", by_adjoint, None, "Heun"),
    Line("pathwise", by_pathwise, None, "Heun"),
    Line("likelihood ratio, V baseline", by_ratio_value, "exact", "Heun"),
    Line("likelihood ratio, V baseline", by_ratio_value, "structured", "Heun"),
    Line("likelihood ratio, mean baseline", by_ratio_mean, None, "Heun"),
    Line("likelihood ratio", by_ratio, None, "Heun"),
    Line("chain, mean baseline", by_chain, None, "Euler"),
    Line("chain, mean baseline", by_chain, None, "DDIM"),
    Line("chain, mean baseline", by_chain, None, "2M"),
)
BY_DIMENSION = tuple(LINES[i] for i in (0, 5, 8, 9, 11, 13))


# ------------------------------------------------------------------------------------------ measuring


def measured(
    panel: str, case: Case, critics: dict[str, Critic], line: Line, steps: int, trajectories: int, seed: int
) -> Row:
    """One estimator on one problem."""
    critic = critics[line.critic or "exact"]
    times, noise = grids.natural(case.problem, steps), Noise(seed)
    found, seconds = [], []
    for ids in torch.arange(trajectories).split(BATCH):
        began = time.process_time()
        found.append(line.gradient(Batch(case, critic, SOLVERS[line.solver], times, noise, ids)))
        seconds.append((time.process_time() - began) / len(ids))
    g, second, norm = torch.cat(found).double(), median(seconds), float(case.grad_J.norm())
    n, square = trajectories, (g - g.mean(0)).square().sum(1)
    variance = float(square.sum()) / (n - 1)
    return {
        "panel": panel, "problem": case.name, "dimension": case.dimension, "estimator": line.estimator,
        "critic": line.critic, "solver": line.solver, "steps": steps, "trajectories": n,
        "bias": float((g.mean(0) - case.grad_J).norm()) / norm, "bias_se": (variance / n) ** 0.5 / norm,
        "sd": variance**0.5 / norm, "sd_se": float(square.std()) / (2 * (n * variance) ** 0.5) / norm,
        "largest_share": float(square.max() / square.sum()), "microseconds_per_trajectory": 1e6 * second,
        "variance_times_seconds": variance / norm**2 * second,
    }  # fmt: skip


def measure(options: Options) -> Iterator[Row]:
    """Every problem and N, then every dimension."""
    quick = options.quick
    for name in ("gaussian-1d",) if quick else THETA:
        found = case(name)
        critics = {"exact": found.value}
        for kind in ("structured", "network"):
            critics[kind] = learned(found, kind, 2 if quick else 25, options.seed)
        n = 512 if quick else BATCH * (2 if found.dimension > 1 else 4)
        work = [(line, steps) for steps in ((20,) if quick else (20, 100)) for line in LINES]
        for line, steps in tqdm(work, name, leave=False):
            yield measured("estimators", found, critics, line, steps, n, options.seed)
    for d in (1, 4) if quick else (1, 4, 16, 64):
        found = copies(d)
        for line in tqdm(BY_DIMENSION, f"dimension {d}", leave=False):
            yield measured(
                "dimension", found, {"exact": found.value}, line, 20, 512 if quick else 2 * BATCH, options.seed
            )


@contextmanager
def one_thread() -> Iterator[None]:
    """CPU time of a pool of threads would measure the pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------ figure

PROBLEMS = {"gaussian-1d": "#0072B2", "gaussian-16d": "#E69F00", "mixture-1d": "#009E73"}


def draw(rows: list[Row]) -> Figure:
    """A line an estimator: bias, sd and variance times seconds; below, sd against dimension."""
    figure = Figure(figsize=(11.0, 9.6), layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=[2.1, 1.0])
    titles = {
        "bias": "bias / |∇J|",
        "sd": "sd of a trajectory / |∇J|",
        "variance_times_seconds": "variance × CPU seconds",
    }
    first = None
    for i, (column, title) in enumerate(titles.items()):
        ax = first = figure.add_subplot(grid[0, i], sharey=first)
        _draw_column(ax, [row for row in rows if row["panel"] == "estimators"], column)
        ax.set(xscale="log", title=title)
        ax.tick_params(labelleft=i == 0)
        ax.grid(alpha=0.3)
    assert first is not None
    first.set_yticks(range(len(LINES)), [line.label for line in LINES], fontsize="small")
    first.invert_yaxis()
    below, key = figure.add_subplot(grid[1, :2]), figure.add_subplot(grid[1, 2])
    _draw_dimension(below, [row for row in rows if row["panel"] == "dimension"])
    key.axis("off")
    marks = [
        Line2D([], [], marker="o", linestyle="none", color=colour, label=name) for name, colour in PROBLEMS.items()
    ]
    meaning = {"N = 20": ("o", "k"), "N = 100": ("o", "none"), "bias below 2 standard errors": ("<", "k"),
               "heavy tails: largest share > 0.1": ("X", "k")}  # fmt: skip
    marks += [
        Line2D([], [], marker=marker, linestyle="none", color="k", markerfacecolor=fill, label=label)
        for label, (marker, fill) in meaning.items()
    ]
    key.legend(handles=marks, loc="upper left", frameon=False, fontsize="small")
    return figure


def _draw_column(ax: Any, rows: list[Row], column: str) -> None:
    """One figure of every estimator."""
    for row in rows:
        name = tuple(row[key] for key in ("estimator", "critic", "solver"))
        y = next(i for i, line in enumerate(LINES) if (line.estimator, line.critic, line.solver) == name)
        value, unseen = number(row, column), 2 * number(row, "bias_se")
        hidden = column == "bias" and value < unseen
        colour = PROBLEMS[str(row["problem"])]
        ax.plot(unseen if hidden else value, y + 0.22 * (list(PROBLEMS).index(str(row["problem"])) - 1),
                "<" if hidden else "X" if number(row, "largest_share") > 0.1 else "o", color=colour, markersize=5,
                markerfacecolor=colour if row["steps"] == 20 else "none")  # fmt: skip


def _draw_dimension(ax: Any, rows: list[Row]) -> None:
    for line in BY_DIMENSION:
        chosen = [row for row in rows if row["estimator"] == line.estimator]
        d, sd = [number(r, "dimension") for r in chosen], [number(r, "sd") for r in chosen]
        error = [number(r, "sd_se") for r in chosen]
        ax.errorbar(d, sd, yerr=error, fmt="o-", color=COLOURS[line.estimator], markersize=4, linewidth=1.3,
                    label=line.estimator)  # fmt: skip
    dimensions = sorted({int(number(row, "dimension")) for row in rows})
    ax.set(xscale="log", yscale="log", xlabel="dimension d (copies of gaussian-1d, exact V, N = 20)",
           ylabel="sd / |∇J|")  # fmt: skip
    ax.set_xticks(dimensions, labels=dimensions)
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize="small", loc="lower left")


COLUMNS = ["problem", "dimension", "steps", "estimator", "critic", "solver", "bias", "bias_se", "sd", "sd_se",
           "largest_share", "microseconds_per_trajectory", "variance_times_seconds"]  # fmt: skip


def main(options: Options) -> None:
    """Measure, print, write."""
    began = time.perf_counter()
    with one_thread():
        rows = list(measure(options))
    print(table(rows, COLUMNS))
    path = write(NAME, options, rows, began)
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
