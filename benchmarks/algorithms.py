"""How far from the exact optimum does each algorithm end, and what does it cost to get there?

Every algorithm learns every problem at several numbers of steps N, with several seeds, at its own settings (`METHODS`,
one set for all N and all problems). What is measured is the policy against the exact optimum on a fine grid with the
same noise for all (`toy.scoreboard.score`), whatever grid it was trained on:

    regret          (J* - J)/(J* - J_ref), mean over seeds, with the standard error of that mean, its upper 95 % bound
                    (Student's t), and the worst seed
    diverged        seeds that ended with numbers that are not finite, or worse than the reference they started from
    to_10pct, to_5pct   trajectories until the regret is first below 10 % and 5 %, median over seeds
    control_error   KL(P || P*) in nats
    seconds         CPU seconds of learning; seconds_to_10pct until the regret is below 10 %

The results file has these in the panel `regret`; in `curve` the regret on the way, over seeds, by 512 trajectories
of 40 steps; and in `over steps` how far apart final regrets lie over N.

Runs go in parallel, one process each, and each leaves its policy and its figures in OUT/algorithms.runs, so that an
interrupted run goes on where it stopped. `--sweep` asks whether the default algorithm ever diverges. `--tune`
instead searches learning rates on mixtures drawn at random, which are not in the catalogue, with the same budget for
every method. `--algorithm module:Class` puts an algorithm of yours beside them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from scipy.stats import t as student
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.colours import COLOURS
from benchmarks.report import (
    Options,
    Row,
    carried_out,
    command_line,
    digest,
    leave,
    number,
    over_seeds,
    search,
    table,
    those_there,
    with_commits,
    write,
)
from ctrl import (
    Estimate,
    EulerMaruyama,
    IntegratedEuler,
    Multistep2,
    NetworkCritic,
    Noise,
    NotFinite,
    StructuredCritic,
    grids,
    rollout,
)
from ctrl.algorithms import (
    DDPO,
    ActorCritic,
    AdjointMatching,
    Algorithm,
    ForwardMatching,
    PathConsistency,
    PolicyIteration,
    PPOPenalty,
)
from ctrl.bridge import AdaptiveEuler
from ctrl.evaluation import increments, targets
from ctrl.fit import Run, Settings, fit
from ctrl.gaussian import Mean
from ctrl.rollout import with_reward
from ctrl.solvers import Solver
from toy import catalogue
from toy.catalogue import Entry
from toy.networks import Policy, Value
from toy.scoreboard import device_of, reference_regret, score

NAME = "algorithms"
TRAJECTORIES = 10_240
STEPS = (10, 20, 50, 100)
FINAL = 2048  # trajectories of the last score
SWEEP = 10  # seeds of the sweep
CRITIC = 4  # a critic's learning rate over the policy's


@dataclass(frozen=True)
class Method:
    """An algorithm with its settings: the same for every problem and every N."""

    algorithm: Callable[[], Algorithm]
    settings: dict[str, Any] = field(default_factory=dict)
    critic: type[NetworkCritic | StructuredCritic] = NetworkCritic


_LARGE: dict[str, Any] = {"samples": 256}  # trajectories an epoch; DDPO was tried with 64 too, and is no faster
_CHAIN: dict[str, Any] = {**_LARGE, "jitter": 0.0, "solver": EulerMaruyama(), "grid": grids.uniform}
# learning rates other than the default's are what `--tune` found, but for policy iteration's
METHODS: dict[str, Method] = {
    "actor-critic": Method(ActorCritic),
    "actor-critic-structured": Method(ActorCritic, critic=StructuredCritic),
    "actor-critic-torchsde": Method(ActorCritic, {"solver": AdaptiveEuler()}),
    "path-consistency": Method(PathConsistency, _LARGE),
    "policy-iteration": Method(
        PolicyIteration, {**_LARGE, "lr": 1.5e-3, "critic_lr": 6e-3}
    ),  # at the default rates it runs away
    "ppo": Method(PPOPenalty, _LARGE),
    "adjoint-matching": Method(AdjointMatching, {**_LARGE, "lr": 2.5e-3}),
    "forward-matching": Method(
        lambda: ForwardMatching(keep=16, nodes=4096), {**_LARGE, "lr": 2.5e-3, "critic_lr": 1e-2}
    ),  # not searched for yet
    "ddpo-maruyama": Method(DDPO, {**_CHAIN, "lr": 2.5e-3}),
    "ddpo-euler": Method(DDPO, {**_CHAIN, "solver": IntegratedEuler(), "lr": 2.5e-3}),
    "ddpo-2m": Method(DDPO, {**_LARGE, "jitter": 0.0, "solver": Multistep2(), "lr": 5e-3}),
    "ddpo-euler-public": Method(
        lambda: DDPO(chain_kl=True), {**_CHAIN, "solver": EulerMaruyama(left_noise=True), "lr": 5e-3}
    ),
}
MAIN = ("actor-critic", "path-consistency", "ddpo-maruyama", "ddpo-2m")


@dataclass(frozen=True)
class AlgorithmOptions(Options):
    """What this benchmark can be asked for."""

    problem: tuple[str, ...] = ("gaussian-1d", "mixture-1d", "mixture-2d")
    """Names from the catalogue."""
    method: tuple[str, ...] = MAIN
    """Names from METHODS."""
    steps: tuple[int, ...] = (20,)
    """Numbers of steps N to train at."""
    seeds: int = 5
    """Runs of each, with seeds 0, 1, ..."""
    trajectories: int = TRAJECTORIES
    """Training trajectories a run."""
    algorithm: str | None = None
    """module:Class of an algorithm of yours, made without arguments and run at the default settings."""
    full: bool = False
    """What is committed: see `full`."""
    sweep: bool = False
    """Whether the default algorithm ever diverges: every problem, every N, ten seeds. Hours."""
    done: bool = False
    """Only the table and the figure of the runs that are there."""
    tune: bool = False
    """Search learning rates on random mixtures instead."""
    jobs: int = os.cpu_count() or 1
    """Processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [name for name in self.method if name not in METHODS]:
            raise ValueError(f"method must be among {', '.join(METHODS)}, got {', '.join(unknown)}")
        if self.tune and self.done:
            raise ValueError("done cannot be combined with tune: a search reuses its finished runs and continues")
        if self.algorithm is not None and ":" not in self.algorithm:
            raise ValueError(f"algorithm must be module:Class, got {self.algorithm!r}")


@dataclass(frozen=True)
class Job:
    """One training run."""

    problem: str
    method: str
    steps: int
    seed: int
    trajectories: int = TRAJECTORIES
    lr: float | None = None

    @property
    def settings(self) -> Settings:
        """How `fit` makes it."""
        s = Settings(steps=self.steps, seed=self.seed, progress=False, patience=1, **method_of(self.method).settings)
        s = replace(s, epochs=max(self.trajectories // s.samples, 1))
        return s if self.lr is None else replace(s, lr=self.lr, critic_lr=CRITIC * self.lr)

    @property
    def key(self) -> str:
        """Its file's name."""
        method = method_of(self.method)
        words = [str(v).replace(":", ".") for v in asdict(self).values() if v is not None]
        return "_".join([*words, digest(self.settings, method.algorithm(), method.critic, train, FINAL)])


def entry_of(name: str) -> Entry:
    """A catalogue problem, as it is or with another beta or eta (gaussian-1d@beta=2), or random-SEED, a random
    mixture."""
    if name.startswith("random-"):
        return catalogue.random_mixture(int(name.removeprefix("random-")))
    if "@" in name:
        name, _, changes = name.partition("@")
        pairs = (change.partition("=") for change in changes.split(","))
        return catalogue.varied(name, **{key: float(value) for key, _, value in pairs})
    return catalogue.get(name)


def method_of(name: str) -> Method:
    """A method by name, or module:Class."""
    if ":" not in name:
        return METHODS[name]
    module, _, attribute = name.partition(":")
    return Method(getattr(importlib.import_module(module), attribute))


def run(job: Job, store: Path, device: str = "cpu") -> None:
    """Train and leave in the store the policy, and then how it went."""
    row, policy = train(job, device)
    torch.save(policy.state_dict(), store / f"{job.key}.pt")
    leave(row, store, job.key)


def trained(job: Job, store: Path) -> Policy:
    """The policy that a run has left in the store."""
    entry = entry_of(job.problem)
    policy = Policy(entry.problem, classes=entry.classes).requires_grad_(False)
    policy.load_state_dict(torch.load(store / f"{job.key}.pt", map_location="cpu"))
    return policy


def train(job: Job, device: str = "cpu") -> tuple[Row, Policy]:
    """Train, score on the way, and say how it went."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    entry, method, settings = entry_of(job.problem), method_of(job.method), job.settings
    problem = entry.problem
    policy = Policy(problem, classes=entry.classes)
    critic = method.critic(problem, Value(problem, classes=entry.classes))
    accelerator = Accelerator(cpu=device == "cpu")
    where: dict[str, Any] = {"conditions": entry.condition, "accelerator": accelerator}
    idle = replace(settings, steps=2, samples=4, epochs=1, solver=EulerMaruyama())  # what happens once, such as imports
    fit(problem, Policy(problem, classes=entry.classes), DDPO(), settings=idle, **where)
    curve: list[tuple[int, float, float]] = []
    spent, began = 0.0, time.process_time()

    def watch(run: Run, metrics: dict[str, Any]) -> None:
        nonlocal spent, began
        spent += time.process_time() - began
        n = metrics["trajectories"]
        if n % (64 if n <= 512 else 256 if n <= 2048 else 1024) == 0:
            curve.append((n, float(score(entry, run.policy, samples=512, steps=40).relative_regret.mean), spent))
        began = time.process_time()

    try:
        result = fit(problem, policy, method.algorithm(), critic=critic, settings=settings, callbacks=[watch], **where)
    except NotFinite as failure:
        return {**asdict(job), "failed": str(failure)}, policy
    final = score(entry, policy, critic if "critic_loss" in result.history[-1] else None, samples=FINAL, steps=100)
    gradient = final.critic_gradient_error
    last = result.history[-1]
    row = {
        **asdict(job),
        "failed": None,
        "regret": float(final.relative_regret.mean),
        "regret_stderr": float(final.relative_regret.stderr),
        "control_error": float(final.control_error.mean),
        "path_kl": float(final.path_kl.mean),
        "reward": float(final.reward.mean),
        "critic_gradient_error": None if gradient is None else float(gradient.mean),
        "to_10pct": first_below(curve, 0.10, 0),
        "to_5pct": first_below(curve, 0.05, 0),
        "seconds_to_10pct": first_below(curve, 0.10, 2),
        "network_calls": last["network_calls"],
        "reward_calls": last["reward_calls"],
        "seconds": spent,
        "curve": json.dumps([[n, round(r, 5)] for n, r, _ in curve]),
    }
    return row, policy


def first_below(curve: list[tuple[int, float, float]], level: float, column: int) -> float | None:
    """The trajectories (column 0) or seconds (column 2) at the first look with a regret below the level."""
    return next((point[column] for point in curve if point[1] < level), None)


def jobs_of(options: AlgorithmOptions) -> list[Job]:
    """All runs that were asked for."""
    if options.sweep:
        cases = list(product(catalogue.NAMES, ["actor-critic"], STEPS))
    elif options.full:
        cases = full()
    elif options.quick:
        cases = list(product(("gaussian-1d", "mixture-2d"), ("actor-critic", "ddpo-maruyama"), (20,)))
    else:
        methods = (*options.method, options.algorithm) if options.algorithm else options.method
        cases = list(product(options.problem, methods, options.steps))
    seeds, trajectories = (1, 1280) if options.quick else (options.seeds, options.trajectories)
    seeds = SWEEP if options.sweep else seeds
    return [Job(*case, options.seed + seed, trajectories) for seed in range(seeds) for case in cases]


def full() -> list[tuple[str, str, int]]:
    """All methods on mixture-2d at N = 20; the default algorithm and DDPO, in all its variants, there at every N; both
    on every problem at N = 20, DDPO on the Euler chain; and the structured critic on the hard one too."""
    chains = [name for name in METHODS if name.startswith("ddpo")]
    cases = [*product(["mixture-2d"], ["actor-critic", *chains], STEPS)]
    cases += product(catalogue.NAMES, ["actor-critic", "ddpo-maruyama"], [20])
    cases += product(["mixture-2d"], METHODS, [20])
    cases += [("mixture-2d-rare-mode", "actor-critic-structured", 20)]
    return list(dict.fromkeys(cases))


def carry_out(jobs: Sequence[Job], store: Path, workers: int, done: bool = False, device: str = "cpu") -> list[Row]:
    """Every job, from its file where it was done before; with `done`, these alone."""
    store.mkdir(parents=True, exist_ok=True)
    files = {job: store / f"{job.key}.json" for job in jobs}
    if done:
        return [json.loads(file.read_text()) for file in those_there(files, store).values()]
    kept = {job for job, file in files.items() if file.exists() and file.with_suffix(".pt").exists()}
    missing = [job for job in files if job not in kept or ":" in job.method]  # a user's own may have changed
    carried_out(run, [(job, store, device) for job in missing], workers, len(jobs))
    return [json.loads(file.read_text()) for file in files.values()]


def by_seed(runs: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The seeds of each problem, method, N and learning rate."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for r in runs:
        groups.setdefault(tuple(r[k] for k in ("problem", "method", "steps", "lr")), []).append(r)
    return groups


def summarise(runs: Iterable[Row]) -> list[Row]:
    """One row a problem, method and N: the panel `regret`."""
    rows = []
    for (problem, method, steps, lr), group in by_seed(runs).items():
        done = [r for r in group if r["failed"] is None]
        regrets = [number(r, "regret") for r in done]
        row: Row = {"panel": "regret", "problem": problem, "algorithm": method, "steps": steps, "seeds": len(group),
                    "lr": lr, "diverged": len(group) - sum(regret < 1 for regret in regrets),
                    "trajectories": group[0]["trajectories"], **about(regrets)}  # fmt: skip
        if len(done) < len(group):  # no number bounds a seed that failed
            row |= {"regret_upper": None, "regret_worst": None}
        for name in ("to_10pct", "to_5pct", "seconds_to_10pct"):  # a seed that never gets there counts as late
            values = [math.inf if r[name] is None else number(r, name) for r in done] or [math.inf]
            row[name] = None if math.isinf(median(values)) else median(values)
        for name in ("path_kl", "control_error", "critic_gradient_error", "network_calls", "reward_calls", "seconds"):
            values = [number(r, name) for r in done if r[name] is not None]
            row[name] = mean(values) if values else None
        rows.append(row)
    return rows


def learning_curves(runs: Iterable[Row]) -> Iterator[Row]:
    """One row a problem, method, N and look on the way, over the seeds that have not failed: the panel `curve`."""
    for (problem, method, steps, lr), group in by_seed(runs).items():
        looks = [json.loads(str(r["curve"])) for r in group if r["failed"] is None]
        for points in zip(*looks, strict=True):
            yield {"panel": "curve", "problem": problem, "algorithm": method, "steps": steps, "seeds": len(points),
                   "lr": lr, "trajectories": points[0][0], **about([regret for _, regret in points])}  # fmt: skip


def about(regrets: list[float]) -> Row:
    """Mean, its standard error, its upper 95 % bound, the worst."""
    n, found = len(regrets), over_seeds("regret", regrets)
    t = float(student.ppf(0.95, n - 1)) if n > 1 else None
    return {
        **found,
        "regret_upper": None if t is None else number(found, "regret") + t * number(found, "regret_se"),
        "regret_worst": max(regrets, default=None),
    }


@torch.no_grad()
def gain(entry: Entry, policy: Mean, solver: Solver, times: Tensor, samples: int = 4096) -> Estimate:
    """J - J* over J* - J_ref, with the policy's J as that solver and its quadrature see it.

    With p = grad V* the sampled return less V*(0, X_0) has little variance, and at the optimum none but the steps'.
    """
    problem, ids = entry.problem, torch.arange(samples, device=device_of(policy))
    cond = entry.condition(ids)
    path = rollout(problem, policy, times, Noise(997), ids, solver=solver, cond=cond)
    path = with_reward(path, problem.reward(path.x[-1], cond))
    t, x, _ = path.flat()
    everywhere = None if cond is None else cond.repeat(len(times))
    a, a_ref, p = (
        f(t, x, everywhere).unflatten(0, (len(times), samples)).to(x)
        for f in (policy, problem.reference, entry.value.grad)
    )
    steps = increments(problem, path, a, a_ref, a, p, everywhere)
    found = targets(problem, path, None, steps, trace=0)[0] - entry.value.value(t[:samples], path.x[0], cond)
    return Estimate.of(found / reference_regret(entry))


def spread(rows: list[Row]) -> list[Row]:
    """How far apart the final regrets at several N lie, and the errors of J* at these N by solver and quadrature."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["algorithm"] in METHODS and row["regret"] is not None and row["lr"] is None:
            groups.setdefault((str(row["problem"]), str(row["algorithm"])), []).append(row)
    found: list[Row] = []
    for (problem, name), group in groups.items():
        if len(group) > 1:
            entry, settings = entry_of(problem), Settings(**METHODS[name].settings)
            regrets, steps = [number(r, "regret") for r in group], [int(number(r, "steps")) for r in group]
            optimum, solver = entry.optimal_policy, settings.solver
            biases = [float(gain(entry, optimum, solver, settings.grid(entry.problem, n)).mean) for n in steps]
            found.append(
                {"panel": "over steps", "problem": problem, "algorithm": name, "from": min(steps), "to": max(steps),
                 "regret_apart": max(regrets) - min(regrets), "objective_bias_apart": max(biases) - min(biases)}
            )  # fmt: skip
    return found


def tune(options: AlgorithmOptions) -> list[Row]:
    """Learning rates on random mixtures, the same search for every method: mean regret over problems and seeds. It is
    extended beyond these rates until the best lies inside."""
    rates, store = (2.5e-3, 5e-3, 1e-2, 2e-2), options.out / f"{NAME}.runs"
    jobs = [
        Job(f"random-{k}", method, n, k, options.trajectories, lr)
        for method in options.method for lr in rates for n in options.steps for k in range(options.seeds)
    ]  # fmt: skip

    def carried(jobs: Sequence[Job]) -> dict[Job, Row]:
        return dict(zip(jobs, carry_out(jobs, store, options.jobs), strict=True))

    def value(job: Job, r: Row) -> float:
        return -math.inf if r["failed"] else -number(r, "regret")

    runs = search(jobs, carried, value, 2.0, case=lambda job: (job.method, job.steps)).values()
    return with_commits(summarise([{**r, "problem": "random mixtures"} for r in runs]), runs)


def compared(rows: list[Row]) -> list[tuple[str, int]]:
    """The problems and N with more than one method; all, if there are none."""
    methods: dict[tuple[str, int], set[Any]] = {}
    for row in rows:
        if row["panel"] == "regret":
            methods.setdefault((str(row["problem"]), int(number(row, "steps"))), set()).add(row["algorithm"])
    return sorted(p for p, names in methods.items() if len(names) > 1) or sorted(methods)


def draw(rows: list[Row]) -> Figure:
    """Regret against trajectories, a panel a problem and N, a line a method: mean over seeds, and a standard error."""
    panels = compared(rows)
    figure = Figure(figsize=(3.2 * min(len(panels), 4), 2.8 * -(-len(panels) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 4), min(len(panels), 4), squeeze=False).flatten()
    for ax, (problem, steps) in zip(axes, panels, strict=False):
        curves: dict[str, list[Row]] = {}
        for row in rows:
            if (row["panel"], row["problem"], row["steps"]) == ("curve", problem, steps):
                curves.setdefault(str(row["algorithm"]), []).append(row)
        for method, curve in curves.items():
            n, regret = ([number(row, name) for row in curve] for name in ("trajectories", "regret"))
            error = [float(row["regret_se"] or 0) for row in curve]
            colour = COLOURS.get(method, OTHER)
            ax.plot(n, regret, "--" if "public" in method else "-", color=colour, label=method, linewidth=1.3)
            low, high = ([v + sign * e for v, e in zip(regret, error, strict=True)] for sign in (-1, 1))
            ax.fill_between(n, low, high, color=colour, alpha=0.15, lw=0)
        ax.axhline(0.1, color="0.7", linewidth=0.8)
        ax.set(xscale="log", yscale="log", title=f"{problem}, N = {steps}", xlabel="trajectories", ylabel="regret")
        ax.grid(alpha=0.3)
    shown = {name: line for ax in axes for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=4, frameon=False)
    return figure


OTHER = "#999999"
"""The colour of an algorithm of yours."""
COLUMNS = ["problem", "algorithm", "steps", "seeds", "regret", "regret_se", "regret_upper", "regret_worst",
           "diverged", "to_10pct", "to_5pct",
           "seconds_to_10pct", "path_kl", "control_error", "critic_gradient_error", "seconds"]  # fmt: skip


def main(options: AlgorithmOptions) -> None:
    """Train, score, print, write."""
    began = time.perf_counter()
    if options.tune:
        rows = sorted(tune(options), key=lambda r: (str(r["algorithm"]), str(r["steps"]), str(r["lr"])))
        print(table(rows, ["algorithm", "steps", "lr", "seeds", "regret", "regret_se", "regret_worst", "diverged"]))
        print("->", write(NAME, options, rows, began, part="tuning"))
        return
    runs = carry_out(jobs_of(options), options.out / f"{NAME}.runs", options.jobs, options.done)
    rows = sorted(summarise(runs), key=lambda r: (str(r["problem"]), int(number(r, "steps")), r["regret"] or math.inf))
    print(table(rows, COLUMNS))
    if apart := spread(rows):
        print(table(apart, [name for name in apart[0] if name != "panel"]))
    rows += apart
    if options.sweep:
        print("->", write(NAME, options, with_commits(rows, runs), began, part="sweep"))
        return
    rows += learning_curves(runs)
    path = write(NAME, options, with_commits(rows, runs), began)
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    command_line(main, AlgorithmOptions, __doc__)
