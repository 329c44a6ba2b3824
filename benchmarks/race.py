"""Beside TRL's DDPOTrainer on the embedded Stable Diffusion, for `benchmarks/throughput.py`.

peer     one epoch of the same work: same steps, batches, guidance, reward, threads, one optimiser step; interleaved.
race     wall time until the reward has grown to TARGET, the mean over the pictures of the last WINDOW epochs, and the
         path KL that was paid by then. A side has the learning rate that was the fastest of RATES, tried with a seed of
         its own (`--tune`). Ours is adjoint matching with the options of the default run, TRL's is DDPO as it is.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from diffusers import UNet2DConditionModel
from tqdm import tqdm

from benchmarks.peer import PROMPTS, Work, started
from benchmarks.report import Row, kept, leave, number, over_seeds
from benchmarks.timing import ratio
from scale import models, prompts, sd15
from scale.diffusion import Prompts, Score, problem
from scale.evaluate import nats

ADJOINT: dict[str, Any] = {
    "algorithm": "adjoint-matching", "options": ["nodes=128", "updates=6"], "beta": 0.1, "solver": "2m",
    "grid": "log-snr", "jitter": 0.4, "micro_batch": 64,
}  # fmt: skip
EPOCH = Work(samples=16, batch=16, guidance=5.0)


def peer(python: str, repeats: int, threads: int) -> list[Row]:
    """An epoch of each, in turn."""
    work = replace(EPOCH, threads=threads)
    sides: dict[str, tuple[str, Work, str]] = {
        "TRL": ("trl", work, python),
        "ddpo, KL off": ("ours", work, ""),
        "ddpo with KL": ("ours", replace(work, own={"beta": 0.1}), ""),
        "adjoint matching": ("ours", replace(work, own=ADJOINT | {"options": ["nodes=128", "updates=2"]}), ""),
    }
    with ExitStack() as stack:
        asks = {name: stack.enter_context(started(*side)) for name, side in sides.items()}
        rounds = [
            {name: ask("epoch") for name, ask in asks.items()} for _ in tqdm(range(1 + repeats), "beside TRL")
        ][1:]  # fmt: skip
    rows: list[Row] = []
    known = rounds[0]["TRL"]["mebibytes"] is not None
    for name in sides:
        about: Row = {
            "images_per_second": median(r[name]["images"] / r[name]["seconds"] for r in rounds),
            "mebibytes": max(r[name]["mebibytes"] for r in rounds) if known else None,
            "network_calls": rounds[-1][name]["network_calls"], "repeats": repeats,
        }  # fmt: skip
        for what, bar in {"seconds": 1 / 0.95, **({"mebibytes": 1.0} if known else {})}.items():
            found = ratio([r[name][what] / r["TRL"][what] for r in rounds], bar if name == "ddpo, KL off" else None)
            rows.append({"panel": "peer", "case": f"{name}, {what}", **found, **about})
    return rows


# ------------------------------------------------------------------------------------------ to a reward


TARGET, WINDOW = 0.65, 4
STEPS = (20, 50)
IMAGES = 1920
"""After which a run is given up."""
RATES = (6e-5, 1.8e-4, 5.4e-4)
RATE = {"ours": 1.8e-4, "trl": 1.8e-4}
RUN = Work(samples=64, batch=64, guidance=2.0)


@dataclass(frozen=True)
class Job:
    """One run; `python` is what it runs in."""

    side: str
    steps: int
    seed: int
    lr: float
    python: str

    @property
    def key(self) -> str:
        """Its file's name."""
        return f"race-{self.side}-{self.steps}-{self.seed}-{self.lr:g}"


def race(python: str, seeds: int, store: Path, tune: bool = False) -> list[Row]:
    """Every run, one at a time; and the ratios."""
    cases = product(RATES, (1000,), STEPS[:1]) if tune else product((None,), range(seeds), STEPS)
    jobs = [
        Job(side, steps, seed, lr or RATE[side], {"ours": "", "trl": python}[side])
        for lr, seed, steps in cases for side in ("ours", "trl")
    ]  # fmt: skip
    runs = kept(run, jobs, store, 1)
    rows: list[Row] = []
    for steps, lr, side in dict.fromkeys((job.steps, job.lr, job.side) for job in jobs):
        group = [r for job, r in runs.items() if (job.steps, job.lr, job.side) == (steps, lr, side)]
        rows.append({
            "panel": "tuning" if tune else "race", "case": f"{side}, N = {steps}", "lr": lr, "seeds": len(group),
            "reached": sum(r["reached"] for r in group), **over_seeds("seconds", [r["seconds"] for r in group]),
            **{name: mean(r[name] for r in group) for name in ("images", "reward", "path_kl")},
        })  # fmt: skip
    return rows if tune else rows + [shorter(steps, runs) for steps in STEPS]


def shorter(steps: int, runs: dict[Job, Any]) -> Row:
    """Our time over TRL's, seed by seed; a run of TRL's that was given up would have taken longer still. Met only if
    ours have reached the reward, and at no more path KL."""
    times = {side: {j.seed: r for j, r in runs.items() if (j.side, j.steps) == (side, steps)} for side in RATE}
    ratios = [times["ours"][seed]["seconds"] / times["trl"][seed]["seconds"] for seed in times["ours"]]
    row: Row = {"panel": "race", "case": f"ours over TRL, N = {steps}", **ratio(ratios, 1 / 3), "seeds": len(ratios)}
    reached = all(r["reached"] for r in times["ours"].values())
    ours, theirs = (mean(r["path_kl"] for r in times[side].values()) for side in ("ours", "trl"))
    return row | {"met": bool(row["met"]) and reached and ours <= theirs}


def run(job: Job, store: Path) -> None:
    """Until the reward is there, or the pictures are used up."""
    own = ADJOINT | {"epochs": IMAGES // RUN.samples} if job.side == "ours" else {}
    work = replace(RUN, steps=job.steps, seed=job.seed, lr=job.lr, own=own)
    rewards: list[float] = []
    spent, reached = 0.0, False
    with tempfile.TemporaryDirectory() as folder, started(job.side, work, job.python) as ask:
        while not reached and len(rewards) < IMAGES // RUN.samples:
            epoch = ask("epoch")
            spent += number(epoch, "seconds")
            rewards.append(number(epoch, "reward"))
            reached = len(rewards) >= WINDOW and mean(rewards[-WINDOW:]) >= TARGET
        ask(f"save {folder}")
        kl = paid(Path(folder))
    leave({"seconds": spent, "reached": reached, "images": len(rewards) * RUN.samples, "curve": rewards,
           "reward": mean(rewards[-WINDOW:]), "path_kl": kl}, store, job.key)  # fmt: skip


def paid(folder: Path, samples: int = 64) -> float:
    """Path KL of a tuned UNet, in nats a picture."""
    pipeline = models.load(str(sd15.Settings.embedded.with_suffix("")))
    reference = Score.of(pipeline, RUN.guidance).frozen()
    pipeline.unet = UNet2DConditionModel.from_pretrained(folder)
    task = problem(reference, lambda x, cond: x.sum((1, 2, 3)), beta=1.0)
    conditions = Prompts.encode(pipeline, prompts.read(PROMPTS))
    return float(nats(task, Score.of(pipeline, RUN.guidance), conditions, samples, 25, samples).mean)
