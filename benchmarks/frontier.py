"""Reward against path KL: how near does each algorithm come to the exact frontier, and how far along it at each beta?

No policy has more reward at as many nats than the optimum at some beta; on mixture-2d these optima are known. Each
algorithm learns at several beta, at its own settings (`METHODS` of algorithms.py, the same for all beta), N = 20.

    path_kl     in nats, on a fine grid
    reward      E r, from J = J* - regret and J = E r - beta KL: the regret needs no difference of noisy J's, and an
                error in KL moves a point along the frontier, whose slope is beta
    short       regret in units of reward: how far below its tangent at that beta, and so below the frontier or on it

each a mean over seeds with its standard error. Runs are kept, and shared with algorithms.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.algorithms import FINAL, METHODS, Job, by_seed, carry_out, entry_of
from benchmarks.report import (
    Row,
    TrainingOptions,
    check_among,
    command_line,
    number,
    over_seeds,
    table,
    with_commits,
    write,
)
from toy import catalogue
from toy.scoreboard import reference_regret

NAME, PROBLEM, STEPS = "frontier", "mixture-2d", 20
BETAS = (2.0, 1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class FrontierOptions(TrainingOptions):
    """What this benchmark can be asked for."""

    method: tuple[str, ...] = ("actor-critic", "path-consistency", "ppo", "adjoint-matching", "ddpo-maruyama")
    """Names from METHODS of algorithms.py."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, method=METHODS)


def at(beta: float) -> str:
    """The problem's name."""
    return f"{PROBLEM}@beta={beta:g}"


def exact() -> Iterator[Row]:
    """The frontier, a row a beta."""
    for beta in np.geomspace(4 * max(BETAS), min(BETAS) / 2, 33):
        optimum = catalogue.varied(PROBLEM, beta=float(beta)).exact
        J, reward = float(optimum.J_optimal().mean), float(optimum.reward_optimal().mean)
        yield {"panel": "exact", "problem": PROBLEM, "beta": float(beta), "reward": reward,
               "path_kl": (reward - J) / beta}  # fmt: skip


def learned(runs: list[Row]) -> Iterator[Row]:
    """A row an algorithm and beta, over the seeds that did not fail."""
    for (problem, method, steps, _), group in by_seed(runs).items():
        entry, done = entry_of(problem), [run for run in group if run["failed"] is None]
        beta, unit = entry.exact.beta, reference_regret(entry, FINAL, 100)
        short, kl = [number(run, "regret") * unit for run in done], [number(run, "path_kl") for run in done]
        rewards = [float(entry.J_optimal.mean) - s + beta * k for s, k in zip(short, kl, strict=True)]
        row: Row = {"panel": "learned", "problem": PROBLEM, "algorithm": method, "beta": beta, "steps": steps,
                    "trajectories": group[0]["trajectories"], "seeds": len(group),
                    "failed": len(group) - len(done)}  # fmt: skip
        yield row | over_seeds("path_kl", kl) | over_seeds("reward", rewards) | over_seeds("short", short)


def main(options: FrontierOptions) -> None:
    """Train, print, write."""
    began = time.perf_counter()
    methods, betas, seeds = (
        (options.method[:1], BETAS[1:3], 1) if options.quick else (options.method, BETAS, options.seeds)
    )
    trajectories = 512 if options.quick else options.trajectories
    jobs = [
        Job(at(beta), method, STEPS, options.seed + seed, trajectories)
        for seed, method, beta in product(range(seeds), methods, betas)
    ]
    runs = carry_out(jobs, options.out / "algorithms.runs", options.jobs, options.done)
    found = list(learned(runs))
    print(table(found, [name for name in found[0] if name not in ("panel", "problem", "steps", "trajectories")]))
    path = write(NAME, options, [*exact(), *with_commits(found, runs)], began)
    print(f"-> {path}; drawn by paper_figures/frontier.py")


if __name__ == "__main__":
    command_line(main, FrontierOptions, __doc__)
