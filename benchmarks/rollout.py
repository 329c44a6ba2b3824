"""What does a rollout cost beyond the network calls and the random numbers it cannot do without?

One interleaved run, A B A B ..., on mixture-2d with the exact reference score as the policy: a very cheap network,
hence a dear overhead. A ratio is the median over the pairs; the two runs of a pair see much the same machine.
One thread unless asked: a pool of threads on a busy machine measures the neighbours.

overhead   `ctrl.rollout` over a bare loop: as many score calls at the same batch and the same keyed normals
           (`Noise.path`), nothing computed from them and nothing kept. The solver's arithmetic, the checks and the
           memory of x, a and xi all count as overhead. The bar is for states in float32; float64 stands beside it.
torchsde   the same Euler-Maruyama over `torchsde.sdeint(method="euler")` on `ctrl.bridge.TorchSDE`, float32, 128 steps.
           torchsde adds up dt, so s_min = 2^-10: dt = (1 - 2^-10)/128 and its multiples are exact in float32, and no
           sliver of a step is left over. torchsde keeps the two ends only, a rollout every node; torchsde calls once
           more, to look at shapes.
normals    our keyed normals over torch.randn, both in float64.

microseconds_per_step is the median of the difference, per step.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torchsde
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks import report
from ctrl import (
    EulerMaruyama,
    Exponential,
    Heun,
    Multistep2,
    Noise,
    ScoreAsAction,
    Solver,
    Trajectory,
    grids,
    rollout,
)  # fmt: skip
from ctrl.bridge import TorchSDE
from toy import catalogue

NAME = "rollout"
BAR = 1.15
SOLVERS: tuple[Solver, ...] = (EulerMaruyama(), Exponential(), Multistep2(), Heun())
TORCHSDE_STEPS = 128


@dataclass(frozen=True)
class Options(report.Options):
    """Options of this benchmark."""

    batch: int = 4096
    steps: int = 100
    repeats: int = 15
    """Pairs; --quick takes 5."""
    threads: int = 1
    """Of torch."""


@dataclass(frozen=True)
class Setting:
    """What both runs of a pair share."""

    problem: ScoreAsAction
    times: Tensor
    noise: Noise
    ids: Tensor
    dtype: torch.dtype

    @staticmethod
    def of(options: Options, steps: int, dtype: torch.dtype) -> Setting:
        """mixture-2d between 2^-10 and 1, on a uniform grid."""
        problem = replace(catalogue.get("mixture-2d").exact, s_min=2.0**-10).problem
        return Setting(problem, grids.uniform(problem, steps), Noise(options.seed), torch.arange(options.batch), dtype)

    def rollout(self, solver: Solver) -> Trajectory:
        """Ours."""
        return rollout(
            self.problem, self.problem.reference, self.times, self.noise, self.ids, solver=solver, dtype=self.dtype
        )

    def bare(self, calls: int) -> None:
        """The score calls and the normals of a rollout, and nothing else."""
        x = self.problem.initial(self.noise, self.ids, None).to(self.dtype)
        t = self.times.to(self.dtype)[:, None].expand(-1, len(self.ids)).unbind()
        for k, _ in enumerate(self.noise.path(self.ids, self.problem.shape, self.times, self.problem.clock)):
            for stage in range(calls):
                self.problem.reference(t[k + stage], x, None)

    def torchsde(self) -> Tensor:
        """The same process by torchsde's Euler-Maruyama."""
        start = self.problem.initial(self.noise, self.ids, None).to(self.dtype)
        ends, dt = self.times[[0, -1]].to(self.dtype), self.problem.horizon / (len(self.times) - 1)
        sde = TorchSDE(self.problem, self.problem.reference)
        return torchsde.sdeint(sde, start, ends, dt=dt, method="euler")

    def normals(self) -> None:
        """The driving path."""
        for _ in self.noise.path(self.ids, self.problem.shape, self.times, self.problem.clock):
            pass

    def randn(self) -> None:
        """As many from torch's own generator."""
        generator = torch.Generator().manual_seed(self.noise.seed)
        for _ in self.times[1:]:
            torch.randn(len(self.ids), *self.problem.shape, dtype=torch.float64, generator=generator)


@dataclass(frozen=True)
class Comparison:
    """Run `ours` against `other`."""

    panel: str
    case: str
    setting: Setting
    ours: Callable[[], object]
    other: Callable[[], object]
    bar: float | None = None
    dtype: torch.dtype | None = None

    def pair(self) -> tuple[float, float]:
        """Seconds of one run of each."""
        return seconds(self.ours), seconds(self.other)

    def row(self, pairs: list[tuple[float, float]]) -> report.Row:
        """The record of all pairs."""
        ratios, steps = [a / b for a, b in pairs], len(self.setting.times) - 1
        return {
            "panel": self.panel, "case": self.case,
            "dtype": str(self.dtype or self.setting.dtype).removeprefix("torch."),
            "batch": len(self.setting.ids), "steps": steps, "repeats": len(pairs), "threads": torch.get_num_threads(),
            "ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios),
            "bar": self.bar, "met": None if self.bar is None else median(ratios) <= self.bar,
            "microseconds_per_step": 1e6 / steps * median(a - b for a, b in pairs),
        }  # fmt: skip


def seconds(f: Callable[[], object]) -> float:
    """Wall-clock time of one call; what it returns is let go after the clock has stopped."""
    began = time.perf_counter()
    kept = f()
    elapsed = time.perf_counter() - began
    del kept
    return elapsed


def overhead(setting: Setting, solver: Solver, bar: float | None) -> Comparison:
    """A rollout against the bare loop with the solver's number of calls."""
    name, calls = type(solver).__name__, solver.calls
    return Comparison("overhead", name, setting, lambda: setting.rollout(solver), lambda: setting.bare(calls), bar)


def comparisons(options: Options) -> list[Comparison]:
    """All of them."""
    single, double = (Setting.of(options, options.steps, dtype) for dtype in (torch.float32, torch.float64))
    dyadic = Setting.of(options, TORCHSDE_STEPS, torch.float32)
    return [
        *[overhead(single, solver, BAR) for solver in SOLVERS],
        *[overhead(double, solver, None) for solver in SOLVERS],
        Comparison("torchsde", "EulerMaruyama", dyadic, lambda: dyadic.rollout(EulerMaruyama()), dyadic.torchsde),
        Comparison("normals", "torch.randn", single, single.normals, single.randn, dtype=torch.float64),
    ]


@torch.no_grad()
def measure(options: Options) -> list[report.Row]:
    """A round of pairs to warm up, then `repeats` rounds of all comparisons."""
    chosen = comparisons(options)
    repeats = range(1 + (5 if options.quick else options.repeats))
    rounds = [[c.pair() for c in chosen] for _ in tqdm(repeats, "rounds", leave=False)]
    return [c.row([r[i] for r in rounds[1:]]) for i, c in enumerate(chosen)]


def main(options: Options) -> None:
    """Measure, print, write."""
    began = time.perf_counter()
    torch.set_num_threads(options.threads)
    rows = measure(options)
    columns = ["panel", "case", "dtype", "ratio", "ratio_min", "ratio_max", "bar", "met", "microseconds_per_step"]
    print(report.table(rows, columns))
    print(f"-> {report.write(NAME, options, rows, began)}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
