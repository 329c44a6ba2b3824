"""How fast does policy iteration converge, and is it quadratic or at the linear rate that PI-FT guarantees?

An iteration evaluates a policy and turns greedy for its value: V_n of a_n, then a_{n+1} = a_ref + R^-1 B' grad V_n,
from the reference on. Nothing is sampled but in the last panel. The regret is no difference of two J's but

    J* - J_n = E_n of the integral of e^{-rho t} ½ |a_n - a*|²_R dt,

exact down to 1e-20. Two numbers an iteration: ratio, regret_{n+1} / regret_n, constant where convergence is linear; and
order, log(regret_{n+1} / regret_n) / log(regret_n / regret_{n-1}), 1 where it is linear, 2 where it is quadratic.

newton      linear-quadratic problems, where this is Newton's method for the Riccati equation (Kleinman 1968): by ODEs.
pde         mixture-1d for several prices of KL, by the backward equation (`toy.pde`), the optimum on the same mesh.
            Policy iteration is Newton's method for the Hamilton-Jacobi-Bellman equation, too: J* - J_{n+1} is quadratic
            in grad V_n - grad V*, and no linear rate is tight for long.
pi-ft       the discrete-time algorithm of PI-FT (Han, Razaviyayn & Xu 2025, arXiv 2412.18164) on Euler's chain of the
            same problem, as its pseudocode's number of iterations for each step is read here: from the last step to the
            first, it iterates n times in each

                a <- a_ref + R^-1 B' E grad V_{k+1}(x + dt (b0 + B a) + L dW~),

            from a_ref on, before it goes to the step before: an action moves the state at which grad V is taken, so in
            discrete time the greedy action is a fixed point. The paper proves a linear rate globally, and finds it
            faster for larger beta. Its constant was not at hand, so the bound here is derived: one iteration is a
            contraction by dt |R^-1 B' (E hess V_{k+1}) B|, in one dimension

                rho = max over k and x of dt eta² g² |E V*''_{k+1}| / beta,

            along the chain's optimum over |x| <= 3, and a regret is quadratic in the action's error: bound = rho². It
            goes with dt and vanishes in continuous time, where the greedy action is explicit and what is left to
            iterate is the pde panel. The first ratio is ten to a hundred times below it; later ones rise to 0.5
            to 0.85 of it: the bound is tight late. J* of the chain comes from the same iteration, damped. At N = 100
            and beta = 0.25 a single iteration is at the edge of what converges: on much finer meshes than this one the
            curvature of its V grows from step to step without end. Other figures changed by less than 3 % where finer
            meshes were tried.
q-learning  `ctrl.algorithms.QLearning` on lq-1d, whose policy starts at the reference with twice the optimal standard
            deviation: by epoch, the regret of the policy with its exploration, J* - J = E of the integral of e^{-rho t}
            (½ |m - m*|²_R + gamma KL(Sigma || gamma R^-1)) dt; value_error, the root mean square of V - V* over the
            nodes of the optimal policy's paths, over the standard deviation of V* there; variance_ratio, the mean over
            time of Sigma / (gamma R^-1). Means over three seeds with their standard errors. Learning rate 2e-3,
            and the policy's own slope for control variate: at the default 6e-3, or with the critic's gradient, one seed
            of three ran away from the optimum again.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import Options, Row, number, table, write
from ctrl import Estimate, Heun, Mean, NetworkCritic, Noise, ScoreAsAction, greedy_policy, grids, rollout
from ctrl.algorithms import GaussianNetwork, QLearning
from ctrl.fit import Run, Settings, fit
from toy import catalogue, pde
from toy.lq import LQ, Array, Coefficients, LinearPolicy
from toy.mixture import MixtureDiffusion
from toy.networks import Policy, Value
from toy.scoreboard import score

NAME = "policy_iteration"
LINEAR = ("lq-1d", "gaussian-1d", "gaussian-16d")
MIXTURE = "mixture-1d"
BETAS = (0.25, 0.5, 1.0, 2.0)
STEPS = (100, 200)
FLOOR = {"newton": 1e-18, "pde": 1e-12, "pi-ft": 1e-11}
"""Iterations end at this regret: what is below is rounding, or the equation's tolerance."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def record(panel: str, problem: str, iteration: int, regret: float, **more: Any) -> Row:
    """One iteration; ratio and order come from its neighbours."""
    row: Row = {"panel": panel, "problem": problem, "beta": None, "steps": None, "iteration": iteration,
                "regret": regret, "regret_se": 0.0, "ratio": None, "order": None, "bound": None, "value_error": None,
                "value_error_se": None, "variance_ratio": None, "variance_ratio_se": None}  # fmt: skip
    return {**row, **more}


def with_rates(rows: list[Row]) -> list[Row]:
    """The rows of one run of policy iteration, with ratio and order."""
    regrets = [number(row, "regret") for row in rows]
    logs = [math.log(after / before) for before, after in pairwise(regrets)]
    for n, row in enumerate(rows[1:]):
        row["ratio"] = math.exp(logs[n])
        row["order"] = logs[n] / logs[n - 1] if n else None
    return rows


# ------------------------------------------------------------------------------------------ linear-quadratic


def linear_problem(name: str) -> LQ:
    """The catalogue's problem of that name as matrices."""
    exact = catalogue.get(name).exact
    lq: LQ = exact.exact if name.startswith("lq") else exact.lq
    return lq


def regret_of(lq: LQ, policy: LinearPolicy, best: LinearPolicy) -> float:
    """J* - J of a policy whose covariance is the optimum's: -J of the problem with the optimum for its reference, the
    same price of actions, and nothing else in it."""

    def at(t: Array) -> Coefficients:
        c = lq.at(t)
        return replace(c, Q=0 * c.Q, K_ref=best.K(t), k_ref=best.k(t))

    alone = replace(lq, at=at, G=0 * lq.G, h=0 * lq.h, r0=0.0)
    return -alone.J(replace(policy, Sigma=None))


def newton(name: str) -> Iterator[Row]:
    """Newton-Kleinman from the reference."""
    lq = linear_problem(name)
    best = lq.optimal_policy()
    policy = replace(lq.reference, Sigma=best.Sigma)
    for n in range(10):
        regret = regret_of(lq, policy, best)
        yield record("newton", name, n, regret)
        if regret < FLOOR["newton"]:
            return
        policy = lq.greedy(lq.value(policy))


# ------------------------------------------------------------------------------------------ mixture, continuous time


def mixture(beta: float) -> MixtureDiffusion:
    """The catalogue's mixture at another price of KL."""
    exact: MixtureDiffusion = replace(catalogue.get(MIXTURE).exact, beta=beta)
    return exact


@dataclass
class Remembered:
    """A mean that is asked again for what it has just answered: the equation's terms take policy and reference twice at
    each time."""

    mean: Mean
    asked: tuple[Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        if self.asked is None or not (torch.equal(t, self.asked[0]) and torch.equal(x, self.asked[1])):
            self.asked, self.answer = (t, x), self.mean(t, x, cond)
        return self.answer


def log_start(x: Tensor) -> Tensor:
    """log N(x; 0, 1), the initial law."""
    return -x[:, 0].square() / 2 - math.log(2 * math.pi) / 2


def by_pde(beta: float, mesh: pde.Mesh, iterations: int) -> Iterator[Row]:
    """Policy iteration by the backward equation."""
    exact = mixture(beta)
    problem = replace(exact.problem, reference=Remembered(exact.score))
    best = greedy_policy(problem, pde.optimum(problem, mesh)).mean
    policy: Mean = problem.reference
    for n in range(iterations + 1):

        def rate(t: Tensor, x: Tensor, policy: Mean = policy) -> Tensor:
            miss = policy(t, x, None) - best(t, x, None)
            return problem.penalty(t).apply(miss.square())[:, 0] / 2

        regret = pde.objective(problem, pde.expectation(problem, policy, rate, mesh=mesh), log_start)
        if regret < FLOOR["pde"]:
            return
        yield record("pde", MIXTURE, n, regret, beta=beta)
        if n == iterations:
            return
        value = pde.evaluate(problem, policy, mesh)
        policy = Remembered(greedy_policy(problem, value).mean)


# ------------------------------------------------------------------------------------------ PI-FT on a chain


class Chain:
    """Euler's chain in one dimension on a mesh: V_{k+1} a cubic spline, its mean over a step by Gauss-Hermite."""

    def __init__(self, problem: ScoreAsAction, steps: int, nodes: int = 401, points: int = 32) -> None:
        self.x = np.linspace(-5.5, 5.5, nodes)
        z, w = np.polynomial.hermite_e.hermegauss(points)
        self.z, self.w = z, w / w.sum()
        x = torch.from_numpy(self.x)[:, None]
        self.times = times = grids.uniform(problem, steps)
        self.dt, self.spread = times.diff().numpy(), problem.eta * problem.clock(times).diff().sqrt().numpy()
        t = times[:-1]
        self.kappa, self.price = problem.kappa(t).numpy(), problem.penalty(t).apply(torch.ones(steps, 1))[:, 0].numpy()
        self.reference = [problem.reference(s.expand(nodes), x, None)[:, 0].numpy() for s in t]
        self.free = [
            self.x + h * problem.drift(s.expand(nodes), x)[:, 0].numpy() for s, h in zip(t, self.dt, strict=True)
        ]
        self.reward = problem.reward(x, None).numpy()

    def expected(self, V: CubicSpline, k: int, a: Array, derivative: int = 0) -> Array:
        """E of a derivative of V_{k+1} after a step with the actions a, on the mesh."""
        mean = self.free[k] + self.dt[k] * self.kappa[k] * a
        found: Array = V(mean[:, None] + self.spread[k] * self.z, derivative) @ self.w
        return found

    def solve(self, iterations: int, share: float = 1.0) -> tuple[float, float]:
        """(J, rho of this V) after so many iterations in each step; share < 1 damps them. J = -inf if they diverge."""
        value, rho, inside = self.reward, 0.0, abs(self.x) <= 3
        for k in reversed(range(len(self.dt))):
            V, a = CubicSpline(self.x, value), self.reference[k]
            for _ in range(iterations):
                best = self.reference[k] + self.kappa[k] / self.price[k] * self.expected(V, k, a, 1)
                a = a + share * (best - a)
            if not abs(a).max() < 1e3:
                return -math.inf, math.inf
            slope = self.dt[k] * self.kappa[k] ** 2 / self.price[k] * self.expected(V, k, a, 2)
            rho = max(rho, float(abs(slope[inside]).max()))
            value = self.expected(V, k, a) - self.dt[k] * self.price[k] / 2 * (a - self.reference[k]) ** 2
        mass = np.exp(-(self.x**2) / 2)
        return float((mass * value).sum() / mass.sum()), rho


def pi_ft(beta: float, steps: int, iterations: int) -> Iterator[Row]:
    """PI-FT with ever more iterations in each step."""
    chain = Chain(mixture(beta).problem, steps)
    best, rho = chain.solve(50, share=0.5)
    for n in range(iterations + 1):
        regret = best - chain.solve(n)[0]
        if not FLOOR["pi-ft"] < regret < 1e3:
            return
        yield record("pi-ft", MIXTURE, n, regret, beta=beta, steps=steps, bound=rho**2)


# ------------------------------------------------------------------------------------------ q-learning


def q_learning_run(epochs: int, seed: int) -> Tensor:
    """(regret, value_error, variance_ratio) before and after each epoch, (epochs + 1, 3)."""
    entry = catalogue.get("lq-1d")
    problem = entry.problem
    torch.manual_seed(seed)
    policy = GaussianNetwork(problem, Policy(problem), width=2.0)
    critic = NetworkCritic(problem, Value(problem))
    path = rollout(
        problem, entry.optimal_policy, grids.uniform(problem, 40), Noise(998), torch.arange(256), solver=Heun()
    )
    t, x, _ = path.flat()
    V = entry.value.value(t, x)
    found: list[Tensor] = []

    @torch.no_grad()
    def look() -> None:
        u = torch.linspace(0.0, problem.horizon, 101)
        one = torch.ones(101, 1)
        ratio = policy.root(u).apply(one).square()[:, 0] * problem.penalty(u).apply(one)[:, 0] / problem.gamma
        mean_regret = score(entry, policy, samples=256, steps=40).regret.mean
        width = problem.gamma * problem.horizon * float((ratio - 1 - ratio.log()).mean()) / 2
        error = (critic.value(t, x) - V).square().mean().sqrt() / V.std()
        found.append(torch.stack([mean_regret + width, error, ratio.mean()]))

    def watch(run: Run, metrics: dict[str, Any]) -> None:
        look()

    look()
    settings = Settings(epochs=epochs, samples=256, lr=5e-3, critic_lr=2e-2, seed=seed, progress=False)
    fit(problem, policy, QLearning(), critic=critic, settings=settings, callbacks=[watch])
    return torch.stack(found).double()


def q_learning(epochs: int, seeds: int, first: int) -> Iterator[Row]:
    """By epoch, over seeds."""
    e = Estimate.of(torch.stack([q_learning_run(epochs, first + seed) for seed in range(seeds)]))
    for n, (mean, se) in enumerate(zip(e.mean.tolist(), e.stderr.tolist(), strict=True)):
        yield record("q-learning", "lq-1d", n, mean[0], regret_se=se[0], value_error=mean[1], value_error_se=se[1],
                     variance_ratio=mean[2], variance_ratio_se=se[2])  # fmt: skip


# ------------------------------------------------------------------------------------------ all of it


def measure(options: Options) -> list[Row]:
    """Every panel, run by run."""
    if options.quick:
        mesh = pde.Mesh(-6.0, 6.0, 101, 1e-4)
        runs = [partial(newton, "gaussian-1d"), partial(by_pde, 2.0, mesh, 1), partial(pi_ft, 2.0, 50, 3)]
        learning = partial(q_learning, 2, 2, options.seed)
    else:
        mesh = pde.Mesh(-7.0, 7.0, 241, 1e-8)
        runs = [partial(newton, name) for name in LINEAR]
        runs += [partial(by_pde, beta, mesh, 8) for beta in BETAS]
        runs += [partial(pi_ft, beta, steps, 8) for beta in BETAS for steps in STEPS]
        learning = partial(q_learning, 40, 3, options.seed)
    rows = [row for run in tqdm(runs, "policy iteration", leave=False) for row in with_rates(list(run()))]
    return rows + list(learning())


def lines(rows: list[Row], panel: str) -> dict[tuple[Any, ...], list[Row]]:
    """The runs of a panel: its rows by problem, beta and steps."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["panel"] == panel:
            found.setdefault((row["problem"], row["beta"], row["steps"]), []).append(row)
    return found


def draw(rows: list[Row]) -> Figure:
    """Regret against iteration, a panel each for the three kinds of policy iteration; q-learning by epoch."""
    figure = Figure(figsize=(9.6, 7.2), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    titles = {
        "newton": "linear-quadratic: Newton-Kleinman",
        "pde": f"{MIXTURE}, continuous time: policy iteration",
        "pi-ft": f"{MIXTURE}, Euler's chain: PI-FT in each step",
    }
    for ax, (panel, title) in zip(axes, titles.items(), strict=False):
        for (problem, beta, steps), run in lines(rows, panel).items():
            colour = COLOURS[LINEAR.index(problem) if panel == "newton" else BETAS.index(beta)]
            n, regret = [number(r, "iteration") for r in run], [number(r, "regret") for r in run]
            label = problem if panel == "newton" else f"β = {beta:g}" if steps != STEPS[1] else None
            fill = "none" if steps == STEPS[1] else colour
            ax.plot(n, regret, "o-", color=colour, markersize=4.5, markerfacecolor=fill, linewidth=1.3, label=label)
            if panel == "pi-ft":
                bound = [regret[0] * number(run[0], "bound") ** i for i in n]
                ax.plot(n, bound, "-." if steps == STEPS[1] else ":", color=colour, linewidth=1.0)
        ax.set(yscale="log", title=title, xlabel="iteration", ylabel="regret $J^* - J$")
        ax.legend(frameon=False, fontsize="small")
    axes[2].set_xlabel("iterations in each step\n(full: N = 100, bound dotted; open: N = 200, bound dash-dotted)")
    axes[2].set_ylim(bottom=FLOOR["pi-ft"] / 3)
    _draw_q_learning(axes[3], [row for row in rows if row["panel"] == "q-learning"])
    for ax in axes:
        ax.grid(alpha=0.3)
    return figure


def _draw_q_learning(ax: Any, rows: list[Row]) -> None:
    n = [number(r, "iteration") for r in rows]
    series = {
        "regret": ([number(r, "regret") for r in rows], [number(r, "regret_se") for r in rows]),
        "error of V (relative)": (
            [number(r, "value_error") for r in rows], [number(r, "value_error_se") for r in rows]
        ),
        "variance / (γ R⁻¹) - 1": (
            [abs(number(r, "variance_ratio") - 1) for r in rows], [number(r, "variance_ratio_se") for r in rows]
        ),
    }  # fmt: skip
    for (label, (mean, se)), colour in zip(series.items(), COLOURS, strict=False):
        ax.errorbar(n, mean, yerr=se, color=colour, linewidth=1.3, elinewidth=0.7, label=label)
    ax.set(yscale="log", title="lq-1d: q-learning", xlabel="epoch (256 trajectories)")
    ax.legend(frameon=False, fontsize="small")


def main(options: Options) -> None:
    """Measure, print, write."""
    began = time.perf_counter()
    rows = measure(options)
    exact = [row for row in rows if row["panel"] != "q-learning"]
    print(table(exact, ["panel", "problem", "beta", "steps", "iteration", "regret", "ratio", "order", "bound"]))
    learned = [row for row in rows if row["panel"] == "q-learning"]
    columns = [
        "iteration",
        "regret",
        "regret_se",
        "value_error",
        "value_error_se",
        "variance_ratio",
        "variance_ratio_se",
    ]
    print(table(learned[:: max(len(learned) // 8, 1)], ["panel", "problem", *columns]))
    path = write(NAME, options, rows, began)
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
