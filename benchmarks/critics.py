"""What does the design of a critic change: what it is made of, and what it looks at?

The actor-critic at its own settings learns mixture-2d at N = 20, the same but for the critic:

    network     V = F, on the noisy state x, on the reference's Tweedie mean x0hat, or on both
    cosine      V = cos(pi u/2) r(x0hat) + sin(pi u/2) F, u the time to go (Score as Action, arXiv 2502.01819)
    linear      V = (1 - u) r(x0hat) + u F
    constant    V = r(x0hat) + u F

The panel `curve` has, by trajectories and over seeds with standard errors,

    critic_loss     as it was minimised, the mean over an epoch's updates
    critic_error    the regret that the critic's greedy policy would have, over that of the reference
    regret          of the policy, over that of the reference

and `field` what the network on both has learned in the first seed beside the exact answers, on a lattice at three times
to go: V, and beta (a - s_ref), which is grad V at the optimum. Runs are kept in OUT/critics.runs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import (
    Row,
    TrainingOptions,
    check_among,
    command_line,
    digest,
    kept,
    leave,
    over_seeds,
    table,
    with_commits,
    write,
)
from ctrl import COSINE, LINEAR, NetworkCritic, Skip, StructuredCritic
from ctrl.algorithms import ActorCritic
from ctrl.fit import Run, Settings, fit
from ctrl.value import LearnedCritic
from toy import catalogue
from toy.networks import Policy, Value
from toy.scoreboard import score

NAME, PROBLEM, STEPS = "critics", "mixture-2d", 20
MEASURES = ("critic_loss", "critic_error", "regret")
CONSTANT = Skip(torch.ones_like, lambda u: u)
SKIPS = {"network": None, "cosine": COSINE, "linear": LINEAR, "constant": CONSTANT}
INPUTS = ("x", "x0hat", "both")
DESIGNS = (*(f"network, {sees}" for sees in INPUTS), *(f"cosine, {sees}" for sees in INPUTS), "linear, both",
           "constant, both")  # fmt: skip
SHOWN = "network, both"
"""Whose fields are kept."""
TIMES_TO_GO, EXTENT, LATTICE = (0.6, 0.3, 0.1), 2.6, 17


@dataclass(frozen=True)
class CriticOptions(TrainingOptions):
    """What this benchmark can be asked for."""

    design: tuple[str, ...] = DESIGNS
    """SKIP, INPUT: network, cosine, linear or constant, and x, x0hat or both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, design=[", ".join(pair) for pair in product(SKIPS, INPUTS)])


@dataclass(frozen=True)
class Job:
    """One run."""

    design: str
    seed: int
    trajectories: int

    @property
    def settings(self) -> Settings:
        """How `fit` makes it."""
        return Settings(steps=STEPS, seed=self.seed, epochs=self.trajectories // Settings.samples, progress=False)

    @property
    def key(self) -> str:
        """Its file's name."""
        made = digest(self.settings, PROBLEM, SKIPS[self.design.split(", ")[0]], run, critic_of, fields, Seeing)
        return f"{self.design.replace(', ', '-')}-{self.seed}-{self.trajectories}-{made}"


class Seeing(nn.Module):
    """A critic's network that sees the state, the Tweedie mean, or both."""

    def __init__(self, network: nn.Module, sees: str) -> None:
        super().__init__()
        self.network, self.sees = network, sees

    def forward(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any = None) -> Tensor:
        x, x0hat = {"x": (x, x), "x0hat": (x0hat, x0hat), "both": (x, x0hat)}[self.sees]
        return self.network(t, x, x0hat, cond)


def critic_of(design: str) -> LearnedCritic:
    """By its name."""
    (made, sees), problem = design.split(", "), catalogue.get(PROBLEM).problem
    network, skip = Seeing(Value(problem), sees), SKIPS[made]
    return NetworkCritic(problem, network) if skip is None else StructuredCritic(problem, network, skip)


def run(job: Job, store: Path) -> None:
    """Train, look on the way, and leave a file."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    entry, looks = catalogue.get(PROBLEM), []
    policy, critic = Policy(entry.problem), critic_of(job.design)

    def look(run: Run, metrics: dict[str, Any]) -> None:
        if (n := metrics["trajectories"]) & (n - 1) == 0 or n % 1024 == 0:
            found = score(entry, run.policy, critic, samples=512, steps=40)
            assert found.critic_gradient_error is not None
            errors = (metrics["critic_loss"], found.critic_gradient_error.mean, found.relative_regret.mean)
            looks.append({"trajectories": n} | dict(zip(MEASURES, map(float, errors), strict=True)))

    fit(entry.problem, policy, ActorCritic(), critic=critic, settings=job.settings, callbacks=[look])
    field = list(fields(policy, critic)) if job.design == SHOWN else []
    leave({"looks": looks, "field": field}, store, job.key)


def fields(policy: nn.Module, critic: LearnedCritic) -> Iterator[Row]:
    """Learned and exact, on the lattice."""
    entry = catalogue.get(PROBLEM)
    problem, side = entry.problem, torch.linspace(-EXTENT, EXTENT, LATTICE)
    x = torch.cartesian_prod(side, side)
    for u in TIMES_TO_GO:
        t = torch.full((len(x),), (1 - u) * problem.horizon)
        with torch.no_grad():
            a_ref = problem.reference(t, x, None)
            pushes = [entry.exact.beta * (f(t, x, None) - a_ref) for f in (policy, entry.optimal_policy)]
            values = [f.value(t, x) for f in (critic, entry.value)]
        for i, (x1, x2) in enumerate(x.tolist()):
            (a1, a2), (b1, b2) = (push[i].tolist() for push in pushes)
            yield {"panel": "field", "to_go": u, "x1": x1, "x2": x2, "V": float(values[0][i]),
                   "V_exact": float(values[1][i]), "push1": a1, "push2": a2, "push1_exact": b1,
                   "push2_exact": b2}  # fmt: skip


def curves(found: dict[Job, dict[str, Any]]) -> Iterator[Row]:
    """One row a design and look, over seeds."""
    for design in dict.fromkeys(job.design for job in found):
        looks = [run["looks"] for job, run in found.items() if job.design == design]
        for points in zip(*looks, strict=True):
            row: Row = {"panel": "curve", "problem": PROBLEM, "design": design, "steps": STEPS, "seeds": len(points),
                        "trajectories": points[0]["trajectories"]}  # fmt: skip
            for name in MEASURES:
                row |= over_seeds(name, [point[name] for point in points])
            yield row


def main(options: CriticOptions) -> None:
    """Train, print, write."""
    began = time.perf_counter()
    designs, seeds = (DESIGNS[:1], 1) if options.quick else (options.design, options.seeds)
    trajectories = 512 if options.quick else options.trajectories
    jobs = [Job(design, options.seed + seed, trajectories) for seed in range(seeds) for design in designs]
    found = kept(run, jobs, options.out / f"{NAME}.runs", options.jobs, done=options.done)
    rows = list(curves(found))
    last = [row for row in rows if row["trajectories"] == trajectories]
    print(table(last, ["design", "seeds", *(f"{name}{end}" for name in MEASURES for end in ("", "_se"))]))
    shown: list[Row] = next((run["field"] for job, run in found.items() if job.design == SHOWN), [])
    path = write(NAME, options, with_commits([*rows, *shown], found.values()), began)
    print(f"-> {path}; drawn by paper_figures/critic_designs.py and learned_fields.py")


if __name__ == "__main__":
    command_line(main, CriticOptions, __doc__)
