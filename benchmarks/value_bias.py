"""Where does the optimum of a KL-regularised problem end, and how far from the tilted law p e^{r/beta} is that?

With a price on path KL, the optimal control leaves the initial noise as it is: what Y_0 says about Y_T stays said, and
the law at the end is the tilted one only as rho, their correlation under the reference, goes to 0 (the value-function
bias; Adjoint Matching, arXiv 2409.08861). The noise of the sampler, eta, decides on rho. On gaussian-1d, by eta:

    exact       the optimum's law at T in closed form, and its KL to the tilted law
    learned     the law that a trained actor-critic ends with (N = 20), as a Gaussian with its mean and variance, mean
                over seeds with its standard error

Runs are kept, and shared with algorithms.py.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.algorithms import Job, carry_out, entry_of, trained
from benchmarks.report import Row, TrainingOptions, command_line, over_seeds, table, with_commits, write
from ctrl import Heun, Noise, grids, rollout
from toy.catalogue import Entry
from toy.gaussian import GaussianLaw

NAME, PROBLEM, METHOD, STEPS = "value_bias", "gaussian-1d", "actor-critic", 20
ETAS = (0.25, 0.5, 0.75, 1.0, 1.5)
FINE, SAMPLES = 100, 16_384


def at(eta: float) -> str:
    """The problem's name."""
    return f"{PROBLEM}@eta={eta:g}"


def rho(entry: Entry) -> float:
    """The correlation of Y_0 and Y_T under the reference, started where the noised data are."""
    end, start = torch.tensor([entry.exact.s_min, entry.exact.s_max], dtype=torch.float64)
    _, variances = entry.exact.variances(torch.stack([end, start]))
    phi, _, _ = entry.exact.transition(start)
    return float(phi * (variances[1] / variances[0]).sqrt())


def away(m: float, v: float, target: GaussianLaw) -> float:
    """KL(N(m, v) || target) in nats, in one dimension."""
    mu, c = float(target.mean), float(target.covariance)
    return (v / c + (m - mu) ** 2 / c - 1 - math.log(v / c)) / 2


def row(eta: float, entry: Entry, panel: str, laws: list[tuple[float, float]]) -> Row:
    """The mean over laws (mean, variance)."""
    target = entry.exact.tilted_data()
    found: Row = {"panel": panel, "problem": PROBLEM, "eta": eta, "rho": rho(entry), "seeds": len(laws),
                  "target_mean": float(target.mean), "target_variance": float(target.covariance)}  # fmt: skip
    for name, values in {"mean": [m for m, _ in laws], "variance": [v for _, v in laws],
                         "kl_to_target": [away(m, v, target) for m, v in laws]}.items():  # fmt: skip
        found |= over_seeds(name, values)
    return found


def exact() -> Iterator[Row]:
    """A row an eta."""
    for eta in np.geomspace(min(ETAS) / 4, 2 * max(ETAS), 41).tolist():
        entry = entry_of(at(eta))
        law = entry.exact.optimal_law()
        yield row(eta, entry, "exact", [(float(law.mean), float(law.covariance))])


def learned(jobs: list[Job], store: Path) -> Iterator[Row]:
    """A row an eta, over the seeds that are there."""
    for eta in ETAS:
        there = [job for job in jobs if job.problem == at(eta) and (store / f"{job.key}.pt").exists()]
        if there:
            entry = entry_of(at(eta))
            yield row(eta, entry, "learned", [law_of(ends(entry, job, store)) for job in there])


@torch.no_grad()
def ends(entry: Entry, job: Job, store: Path) -> Tensor:
    """Where the trained policy ends, (SAMPLES,)."""
    times = grids.natural(entry.problem, FINE)
    path = rollout(entry.problem, trained(job, store), times, Noise(998), torch.arange(SAMPLES), solver=Heun())
    return path.x[-1][:, 0]


def law_of(y: Tensor) -> tuple[float, float]:
    """Mean and variance."""
    return float(y.mean()), float(y.var())


def main(options: TrainingOptions) -> None:
    """Train, print, write."""
    began = time.perf_counter()
    etas, seeds, trajectories = (ETAS[:1], 1, 512) if options.quick else (ETAS, options.seeds, options.trajectories)
    jobs = [Job(at(eta), METHOD, STEPS, options.seed + seed, trajectories) for seed, eta in product(range(seeds), etas)]
    store = options.out / "algorithms.runs"
    runs = carry_out(jobs, store, options.jobs, options.done)
    found = with_commits(list(learned(jobs, store)), runs)
    print(table(found, [name for name in found[0] if name not in ("panel", "problem")]))
    path = write(NAME, options, [*exact(), *found], began)
    print(f"-> {path}; drawn by paper_figures/value_bias.py")


if __name__ == "__main__":
    command_line(main, TrainingOptions, __doc__)
