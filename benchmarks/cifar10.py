"""On the embedded CIFAR-10 model as a sampler of ten steps: which form of the update learns the data's energy best?

DxMI's loop (arXiv 2406.19464): energy, value and sampler in turn (`ctrl.algorithms.InverseRL`). The sampler's update is
the gradient form <grad V, B a> (actor-critic), the TD form, DxMI's own next value, or DDPO; each from the same
settings, in as many pictures, its learning rate from the same search (`--tune`). `--data` is a folder of CIFAR-10.

    frechet         between the judging classifier's features of JUDGED new pictures and of the training data's,
                    no FID; drawn by the sampler that is trained: 2M in ten steps of log-SNR, jittered
    frechet_ode     the same of pictures by DPM-Solver++, which is not trained
    best untuned    the least of the untuned model's by any sampler at ten steps (SAMPLERS of scale/pixels.py, and 2M)

Runs are kept in OUT/cifar10.runs, each with its pipeline, so that an interrupted benchmark goes on.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import (
    Options,
    Row,
    check_among,
    command_line,
    device,
    digest,
    kept,
    leave,
    over_seeds,
    search,
    table,
    with_commits,
    write,
)
from ctrl import Noise, NotFinite, rollout
from scale import cifar10, pixels, tuning
from scale.cifar10 import Settings, Task
from scale.classifiers import Moments, diversity, features, frechet, histogram
from scale.diffusion import Score, pictures_of
from scale.evaluate import SEED, nats

NAME = "cifar10"
LEARNED: dict[str, Any] = {
    "beta": 0.05, "energy_updates": 40, "energy_squares": 0.5, "critic": "structured", "critic_width": 32, "ema": 0.8,
}  # fmt: skip
"""Of the embedded settings, what an energy wants otherwise: it must learn faster than the policy follows it."""
METHODS: dict[str, dict[str, Any]] = {
    "actor-critic": {"options": ("nodes=64", "critic_updates=8", "actor_updates=6", "keep=1", "nats=inf")},
    "td-form": {"options": ("nodes=64", "updates=6", "evaluation.critic_updates=8", "evaluation.nodes=64")},
    "next-value": {"options": ("nodes=64", "updates=6", "evaluation.critic_updates=8", "evaluation.nodes=64")},
    "ddpo": {"options": ("nodes=64", "passes=1", "clip=0.2"), "critic": "network"},
}
TRAINED = "2m"
"""The sampler that is trained."""
RATES, FACTOR = (1e-5, 2e-5, 5e-5), 2.0
"""Of the search, which is extended by this factor until the best lies inside."""
RATE = {"actor-critic": 2e-5, "td-form": 5e-5, "next-value": 2e-5, "ddpo": 2e-5}
"""What the search found by frechet_ode (results/cifar10_tuning.json)."""
WINDOW = 4
"""Epochs whose pictures make one point of the curve."""


@dataclass(frozen=True)
class CIFAROptions(Options):
    """What this benchmark can be asked for."""

    data: Path | None = None
    """CIFAR-10 in any of its layouts."""
    method: tuple[str, ...] = tuple(METHODS)
    """actor-critic, td-form, next-value, ddpo."""
    seeds: int = 3
    """Runs of each, with seeds 0, 1, ..."""
    images: int = 512
    """Drawn in each run."""
    judged: int = 2000
    """Pictures that are judged at the end of each."""
    tune: bool = False
    """Try the learning rates, with one seed that is not among the others, instead."""
    done: bool = False
    """Only the table of the runs that are there."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each on one thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, method=METHODS)
        if self.tune and self.done:
            raise ValueError("done cannot be combined with tune: a search reuses its finished runs and continues")
        if self.data is None:
            raise ValueError("data must be given: --data FOLDER with CIFAR-10, whose energy is learned")


@dataclass(frozen=True)
class Job:
    """One run; without a method, the untuned model by every sampler."""

    method: str | None
    seed: int
    images: int
    judged: int
    data: Path | None
    lr: float | None = None

    @property
    def key(self) -> str:
        """Its file's name."""
        made = digest(self.settings(Path()).plain(), run, sampled, judged, Seen, WINDOW)
        return f"{self.method or 'untuned'}-{self.seed}-{self.images}-{self.judged}-{made}"

    def settings(self, out: Path) -> Settings:
        """The embedded model's, with what is the method's own."""
        s, method = Settings.read(Settings.embedded), self.method or "ddpo"  # any serves the untuned
        return replace(
            s, reward=cifar10.ENERGY, data=self.data, seed=self.seed, out=out, log_with="none", pictures_every=0,
            algorithm=method, lr=RATE[method] if self.lr is None else self.lr, warmup=0,
            epochs=max(1, self.images // s.samples), **(LEARNED | METHODS[method]),
        )  # fmt: skip


def run(job: Job, store: Path) -> None:
    """Train, judge, and leave a file."""
    torch.set_num_threads(1)
    out = store / f"{job.key}.run"
    shutil.rmtree(out, ignore_errors=True)
    began, s = time.process_time(), job.settings(out).resolved()
    accelerator, seen = tuning.accelerator_of(s), Seen()
    task = cifar10.assemble(s, None, accelerator)
    if job.method is None:
        drawn = {by: pixels.draw(task.pipeline, range(job.judged), by, s.steps, s.batch) for by in pixels.SAMPLERS}
        drawn[TRAINED] = sampled(task, s, job.judged)
        leave({"by": {by: judged(images) for by, images in drawn.items()}}, store, job.key)
        return
    tuning.begin(s, task, accelerator)
    try:
        history = tuning.learn(s, task, accelerator, seen)
    except NotFinite as failure:
        if job.lr is None:
            raise
        leave({"failed": str(failure)}, store, job.key)
        return
    seconds, last = time.process_time() - began, history[-1]
    task.pipeline.save_pretrained(out / "pipeline")
    ode = pixels.draw(task.pipeline, range(job.judged), s.eval_sampler, s.steps, s.batch)
    kl = nats(task.problem, Score.of(task.pipeline), lambda ids: None, s.batch, 25, s.batch)
    row = {"failed": None, **judged(sampled(task, s, job.judged)), "frechet_ode": judged(ode)["frechet"],
           "path_kl": float(kl.mean), "seconds": seconds, "network_calls": last["network_calls"],
           "curve": seen.curve}  # fmt: skip
    leave(row, store, job.key)
    shutil.rmtree(out / "checkpoints")


def sampled(task: Task, s: Settings, n: int) -> Tensor:
    """Pictures by the sampler that is trained, the jitter of its steps as well; each has its own noise, which was not
    trained on, and 64 share their steps."""
    device = next(task.policy.parameters()).device
    return torch.cat([
        pictures_of(None, rollout(
            task.problem, task.policy, task.fit.times(task.problem, Noise(SEED, k)), Noise(SEED), ids,
            solver=task.fit.solver,
        ).x[-1])
        for k, ids in enumerate(torch.arange(n, device=device).split(s.batch))
    ])  # fmt: skip


class Seen:
    """A callback: the Frechet distance of the last WINDOW epochs' pictures."""

    def __init__(self) -> None:
        self.features: list[Tensor] = []
        self.curve: list[tuple[int, float]] = []

    def __call__(self, run: Any, metrics: dict[str, Any]) -> None:
        self.features.append(features(pictures_of(None, run.replay.collections[-1].trajectory.x[-1])))
        if len(self.features) >= WINDOW:
            found = Moments.of(torch.cat(self.features[-WINDOW:]))
            self.curve.append((metrics["trajectories"], frechet(found, Moments.embedded())))


def judged(images: Tensor) -> dict[str, Any]:
    """What is said of pictures."""
    found = features(images)
    return {"frechet": frechet(Moments.of(found), Moments.embedded()), "diversity": diversity(found),
            "largest_class": max(histogram(images))}  # fmt: skip


def jobs_of(o: CIFAROptions) -> list[Job]:
    """All that were asked for; the untuned model first."""
    if o.tune:
        return [Job(name, 1000, o.images, o.judged, o.data, lr) for name in o.method for lr in RATES]
    seeds, images, n = (1, 128, 64) if o.quick else (o.seeds, o.images, o.judged)
    return [Job(None, 0, 0, n, o.data)] + [
        Job(name, o.seed + seed, images, n, o.data) for seed in range(seeds) for name in o.method
    ]


def summarise(runs: dict[Job, Any]) -> Iterator[Row]:
    """A row a sampler of the untuned model, one a method (panel `forms`), and the curves."""
    for job, r in runs.items():
        if job.method is None:
            for name, found in r["by"].items():
                yield {"panel": "untuned", "sampler": name, "judged": job.judged, **found}
    for method in dict.fromkeys(job.method for job in runs if job.method):
        group = [r for job, r in runs.items() if job.method == method]
        found = [r["frechet"] for r in group]
        yield {
            "panel": "forms", "algorithm": method, "seeds": len(group), "lr": RATE[method],
            "images": max(job.images for job in runs if job.method == method), **over_seeds("frechet", found),
            **over_seeds("frechet_ode", [r["frechet_ode"] for r in group]),
            **{name: mean(r[name] for r in group)
               for name in ("path_kl", "diversity", "largest_class", "network_calls", "seconds")},
        }  # fmt: skip
    for job, r in runs.items():
        for images, value in r["curve"] if job.method else ():
            yield {"panel": "curve", "algorithm": job.method, "seed": job.seed, "images": images, "frechet": value}


def nearness(job: Job, found: dict[str, Any]) -> float:
    """What the search maximises; a run that diverged is the worst."""
    return -math.inf if found["failed"] else -float(found["frechet_ode"])


def main(o: CIFAROptions) -> None:
    """Train, print, write."""
    began = time.perf_counter()
    carry_out = partial(kept, run, store=o.out / f"{NAME}.runs", workers=o.jobs, done=o.done)
    if o.tune:
        runs = search(jobs_of(o), carry_out, nearness, FACTOR, case=lambda job: job.method)
        rows: list[Row] = [
            {"algorithm": j.method, "lr": j.lr, "failed": runs[j]["failed"],
             **{name: runs[j].get(name) for name in ("frechet", "frechet_ode", "path_kl")}}
            for j in sorted(runs, key=lambda j: (list(METHODS).index(j.method), j.lr))
        ]  # fmt: skip
        print(table(rows, list(rows[0])))
        print("->", write(NAME, o, with_commits(rows, runs.values()), began, device(), part="tuning"))
        return
    runs = carry_out(jobs_of(o))
    rows = with_commits(list(summarise(runs)), runs.values())
    for panel in ("untuned", "forms"):
        shown = [r for r in rows if r["panel"] == panel]
        print(table(shown, [name for name in shown[0] if name != "panel"]) if shown else f"no {panel}")
    print(f"-> {write(NAME, o, rows, began, device())}; drawn by paper_figures/cifar10.py")


if __name__ == "__main__":
    command_line(main, CIFAROptions, __doc__)
