"""How fast: against the network passes that the work contains, against peers, and how time and memory grow.

Each panel is measured side by side, A B A B ..., and a row's ratio is the median over the pairs (ratio_min, ratio_max
their range); what falls short of its bar says so.

limit     a rollout, an update of the policy and a whole epoch over the bare passes of policy and reference that they
          contain: same batches, same precision, forward and backward, nothing around them. Critic, decoding, reward,
          random numbers, arithmetic, optimiser and Python all count as overhead; `profile` says where it is. On
          mixture-2d the policy is its reference, the exact score, and a small network.
solvers   our rollout over torchsde.sdeint's on mixture-2d, and over the call of diffusers' own pipeline on the embedded
          Stable Diffusion, at equal steps.
scaling   an epoch's time and memory against batch, steps, nodes, dimension, width and processes: the exponent of each.
gpu       full fine-tuning at SD v1.5's size with random weights (benchmarks/speed/gpu.py): it needs an accelerator.
peer      an epoch of full fine-tuning beside TRL's DDPOTrainer, in its own environment (benchmarks/speed/race.py).
race      the time to a reward, ours and TRL's, by the reward's values or by its gradient; hours.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torchsde

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import Options, Row, check_among, command_line, device, earlier, others, table, write
from benchmarks.speed.gpu import OUT_OF_MEMORY, gpu
from benchmarks.speed.peer import environment
from benchmarks.speed.race import PAIRS, peer, race
from benchmarks.speed.scaling import scaling
from benchmarks.speed.subjects import Subject, embedded, mixture
from benchmarks.speed.timing import Comparison, Passes, interleaved
from ctrl import DDIM, EulerMaruyama, Noise, ScoreAsAction, grids, rollout
from ctrl.bridge import TorchSDE
from scale import cifar10, finetune, models
from scale.diffusion import Prompts, Score
from scale.diffusion import problem as diffusion_problem
from scale.families import family_of
from scale.samplers import sampler
from toy import catalogue

NAME = "throughput"
TORCHSDE_STEPS = 128


@dataclass(frozen=True)
class ThroughputOptions(Options):
    """What this benchmark can be asked for."""

    panel: tuple[str, ...] = ("limit", "solvers", "scaling", "gpu")
    """limit, solvers, scaling, gpu, peer, race. What was measured of the others before stays in the file."""
    peer_env: Path | None = None
    """Folder of TRL's environment, for the panels peer and race; it is made where there is none."""
    by: tuple[str, ...] = tuple(PAIRS)
    """Who races: those who take the reward's values, gradient, or both."""
    seeds: int = 3
    """Runs of each side in the race, with seeds 0, 1, ..."""
    tune: bool = False
    """Try the race's learning rates, with one seed that is not among the others, instead."""
    jobs: int = 1
    """Runs of the race at a time; beside one another all are slower alike."""
    repeats: int = 5
    """Pairs; --quick takes 2."""
    threads: int = 1
    """Of torch, but for the panels race and scaling, which have one: a pool of threads on a busy machine measures its
    neighbours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, panel=PANELS, by=PAIRS)
        if self.quick and "race" in self.panel:
            raise ValueError("quick must be left out for the race, which ends when the reward is there")
        if self.peer_env is None and {"peer", "race"} & set(self.panel):
            raise ValueError("peer_env must be given for peer and race: --peer-env FOLDER, where TRL is, or will be")


def subjects(folder: Path, quick: bool) -> list[Subject]:
    """The three."""
    few = {"samples": 4, "options": ("nodes=8", "updates=2")}
    sd = few if quick else {"samples": 32, "options": ("nodes=64", "updates=6")}
    cifar = few if quick else {"samples": 16, "options": ("nodes=32", "updates=6")}
    return [
        mixture(),
        embedded("cifar10", cifar10, folder, 1.10, **cifar),
        embedded("sd15", finetune, folder, 1.05, **sd),
    ]


# ------------------------------------------------------------------------------------------ limit


def limit(o: ThroughputOptions, folder: Path) -> list[Row]:
    """Rollout, update and epoch over their bare passes; and where the rest of rollout and epoch goes."""
    rows: list[Row] = []
    for subject in subjects(folder, o.quick):
        for _ in range(subject.before):
            subject.run.step_epoch()
        samples = [64, 4096] if subject.name == "mixture-2d" else [subject.run.settings.samples]
        works: list[tuple[str, Callable[[], object], float | None]] = [
            (f"rollout of {n}", subject.rollout(n), subject.bar) for n in samples
        ]
        works += [("update", subject.update(), None), ("epoch", subject.run.step_epoch, None)]
        rows += interleaved([over_bare(subject, *work) for work in works], repeats(o), subject.name)
        rows += [row for what, work, _ in works if what != "update" for row in shares(subject, what, work)]
    return rows


def shares(subject: Subject, what: str, work: Callable[[], object]) -> list[Row]:
    """A row a part."""
    spent = subject.profile(work)
    about: Row = {"panel": "profile", "case": f"{subject.name}, {what}"}
    return [about | {"part": part, "share": s / sum(spent.values())} for part, s in spent.items()]


def over_bare(subject: Subject, what: str, work: Callable[[], object], bar: float | None) -> Comparison:
    """Some work against its passes."""
    with Passes(*subject.networks) as passes:
        work()
    about: Row = {"passes": passes.samples, "threads": torch.get_num_threads()}
    return Comparison("limit", f"{subject.name}, {what}", work, passes.run, bar, about)


def repeats(o: ThroughputOptions) -> int:
    """Pairs."""
    return 2 if o.quick else o.repeats


# ------------------------------------------------------------------------------------------ solvers


def solvers(o: ThroughputOptions) -> list[Row]:
    """Beside other people's."""
    pairs = [beside_torchsde(64 if o.quick else 4096), *(beside_pipeline(2 if o.quick else 16, w) for w in (1.0, 5.0))]
    return interleaved(pairs, repeats(o), "solvers")


def beside_torchsde(samples: int) -> Comparison:
    """Euler-Maruyama on mixture-2d under the exact score, float32. torchsde adds up dt, so s_min = 2^-10: dt = (1 -
    2^-10)/128 and its multiples are exact in float32, and no sliver of a step is left over. torchsde keeps the two ends
    only, a rollout every node; it calls once more, to look at shapes."""
    problem: ScoreAsAction = replace(catalogue.get("mixture-2d").exact, s_min=2.0**-10).problem
    times, noise, ids = grids.uniform(problem, TORCHSDE_STEPS), Noise(0), torch.arange(samples)
    sde, ends = TorchSDE(problem, problem.reference), times[[0, -1]].float()

    def theirs() -> object:
        with torch.no_grad():
            start = problem.initial(noise, ids, None).float()
            return torchsde.sdeint(sde, start, ends, dt=problem.horizon / TORCHSDE_STEPS, method="euler")

    def ours() -> object:
        return rollout(problem, problem.reference, times, noise, ids, solver=EulerMaruyama(), dtype=torch.float32)

    return Comparison("solvers", "mixture-2d, torchsde", ours, theirs, None, {"steps": TORCHSDE_STEPS})


def beside_pipeline(samples: int, guidance: float, steps: int = 20) -> Comparison:
    """The embedded pipeline's own call by DDIM with eta = 1, to latents; it keeps the last ones only."""
    pipeline = models.load(str(finetune.Settings.embedded.with_suffix("")))
    pipeline.set_progress_bar_config(disable=True)
    policy = Score.of(pipeline, guidance)
    task = diffusion_problem(policy, lambda x, cond: x.sum((1, 2, 3)), beta=1.0)
    pipeline.scheduler = sampler("ddim", pipeline).scheduler
    times = family_of(pipeline).timesteps(pipeline.scheduler, task, steps)
    ids, noise = torch.arange(samples), Noise(0)
    cond = Prompts.encode(pipeline, ["a red circle on a white ground"])(ids)
    generator = torch.Generator().manual_seed(0)

    def theirs() -> object:
        return pipeline(
            prompt_embeds=cond.embeds, negative_prompt_embeds=cond.empty[0], num_inference_steps=steps,
            guidance_scale=guidance, eta=1.0, generator=generator, output_type="latent",
        )  # fmt: skip

    def ours() -> object:
        return rollout(task, policy, times, noise, ids, solver=DDIM(), cond=cond)

    return Comparison("solvers", f"sd15 at guidance {guidance:g}, diffusers", ours, theirs, None, {"steps": steps})


# ------------------------------------------------------------------------------------------ the whole


PANELS: dict[str, Callable[[ThroughputOptions, Path, str], list[Row]]] = {
    "limit": lambda o, folder, _: limit(o, folder), "solvers": lambda o, folder, _: solvers(o),
    "scaling": lambda o, *_: scaling(o.quick), "gpu": lambda o, *_: gpu(o.quick),
    "peer": lambda o, _, python: peer(python, repeats(o), o.threads),
    "race": lambda o, _, python: race(python, o.by, o.seeds, o.out / f"{NAME}.runs", o.jobs, o.tune),
}  # fmt: skip
TABLES = {
    "ratio": ("panel", "case", "ratio", "ratio_min", "ratio_max", "bar", "met", "seconds"),
    "share": ("panel", "case", "part", "share"),
    "at": ("panel", "case", "at", "seconds", "mebibytes"),
    "lr": ("panel", "case", "lr", "updates", "seeds", "reached", "seconds", "images", "gain", "path_kl", "within"),
    "device": (
        "panel",
        "case",
        "images_per_second",
        "network_calls",
        "gibibytes",
        "fits_in",
        "fits",
        "utilisation",
        "failed",
    ),
}
"""What is printed of the rows that have such a column."""


def main(o: ThroughputOptions) -> None:
    """Measure, print, and write after every panel."""
    began = time.perf_counter()
    torch.set_num_threads(o.threads)
    python = environment(o.peer_env) if o.peer_env else ""  # if it cannot be made, nothing is measured
    part = "tuning" if o.tune else ""
    rows = earlier(NAME, o, part)
    broken: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for panel in o.panel:
            found = PANELS[panel](o, Path(folder), python)
            for what, columns in TABLES.items():
                if some := [{c: row.get(c) for c in columns} for row in found if what in row]:
                    print(table(some, columns))
            rows = others(rows, found, by=("panel", "case") if panel == "race" else ("panel",)) + found
            broken += [str(row["case"]) for row in found if row.get("failed") not in (None, OUT_OF_MEMORY)]
            written = write(NAME, o, rows, began, device(), part=part)
    print("->", written)
    if broken:
        raise ValueError(f"gpu: failed, for the reasons above: {'; '.join(broken)}")


if __name__ == "__main__":
    command_line(main, ThroughputOptions, __doc__)
