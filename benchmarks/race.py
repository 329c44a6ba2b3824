"""Beside TRL's DDPOTrainer on the embedded Stable Diffusion, for `benchmarks/throughput.py`.

peer     one epoch of the same work: same steps, batches, guidance, reward, threads, one optimiser step; interleaved.
race     time in training until the mean reward of JUDGED pictures, drawn by the pipeline's own call in N steps of DDIM
         from one noise, has grown by GAIN, and the path KL that was paid by then. Looks are EVERY pictures apart, their
         time does not count, and the moment is interpolated. A side has the learning rate of RATES that got there first
         within NATS of path KL, or furthest, tried with a seed of its own (`--tune`). TRL's is DDPO as it is, on N
         steps; ours is adjoint matching with the options of the default run, in epochs of as many pictures and half its
         nodes, on TEN steps whatever N: the policy is of continuous time.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm

from benchmarks.peer import PROMPTS, Work, started
from benchmarks.report import Row, kept, leave, number, over_seeds
from benchmarks.timing import ratio
from scale import models, prompts, sd15, shapes
from scale.diffusion import Prompts, Score, problem
from scale.evaluate import draw, nats

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


GAIN, JUDGED, EVERY = 0.08, 128, 128
STEPS = (20, 50)
TEN = 10
NATS = 4.0
IMAGES = 1024
"""After which a run is given up."""
RATES = (2.5e-6, 7e-6, 2e-5, 6e-5, 1.8e-4)
RATE = {"ours": 6e-5, "trl": 7e-6}
OWN = ADJOINT | {"options": ["nodes=64", "updates=6"], "steps": TEN}
SAME = Work(samples=32, batch=32, guidance=2.0)
RUN = {"ours": replace(SAME, own=OWN), "trl": SAME}


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


def race(python: str, seeds: int, store: Path, jobs_at_once: int, tune: bool = False) -> list[Row]:
    """Every run; and the ratios."""
    cases = product(RATES, (1000,), STEPS[:1]) if tune else product((None,), range(seeds), STEPS)
    jobs = [
        Job(side, steps, seed, lr or RATE[side], {"ours": "", "trl": python}[side])
        for lr, seed, steps in cases for side in ("ours", "trl")
    ]  # fmt: skip
    runs = kept(run, jobs, store, jobs_at_once)
    if tune:
        return ends(runs, "tuning")
    looks: list[Row] = [
        {"panel": "looks", "case": f"{job.side}, N = {job.steps}", "seed": job.seed, **look}
        for job, r in runs.items() for look in r["looks"]
    ]  # fmt: skip
    return ends(runs, "race") + [shorter(steps, runs) for steps in STEPS] + looks


def ends(runs: dict[Job, Any], panel: str) -> list[Row]:
    """Where each side was when it ended, over seeds."""
    rows: list[Row] = []
    for steps, lr, side in dict.fromkeys((job.steps, job.lr, job.side) for job in runs):
        group = [r for job, r in runs.items() if (job.steps, job.lr, job.side) == (steps, lr, side)]
        within = mean(r["path_kl"] for r in group) <= NATS
        rows.append({
            "panel": panel, "case": f"{side}, N = {steps}", "lr": lr, "seeds": len(group),
            "reached": sum(r["reached"] for r in group), **over_seeds("seconds", [r["seconds"] for r in group]),
            **{name: mean(r[name] for r in group) for name in ("images", "gain", "path_kl")}, "within": within,
            "goal": GAIN,
        })  # fmt: skip
    return rows


def shorter(steps: int, runs: dict[Job, Any]) -> Row:
    """Our time over TRL's, seed by seed. Met only if ours have reached the reward, and at no more path KL; a run of
    TRL's that was given up stands with what it had taken and paid by then."""
    times = {side: {j.seed: r for j, r in runs.items() if (j.side, j.steps) == (side, steps)} for side in RATE}
    ratios = [times["ours"][seed]["seconds"] / times["trl"][seed]["seconds"] for seed in times["ours"]]
    row: Row = {"panel": "race", "case": f"ours over TRL, N = {steps}", **ratio(ratios, 1 / 3), "seeds": len(ratios)}
    reached = all(r["reached"] for r in times["ours"].values())
    ours, theirs = (mean(r["path_kl"] for r in times[side].values()) for side in ("ours", "trl"))
    return row | {"met": bool(row["met"]) and reached and ours <= theirs}


def run(job: Job, store: Path) -> None:
    """Until the reward is there, or the pictures are used up."""
    work = replace(RUN[job.side], steps=job.steps, seed=job.seed, lr=job.lr)
    before = rewarded(untuned(), job.steps)
    looks = [Look(0, 0.0, 0.0)]
    with tempfile.TemporaryDirectory() as folder, started(job.side, work, job.python) as ask:
        while looks[-1].gain < GAIN and looks[-1].images < IMAGES:
            spent = sum(number(ask("epoch"), "seconds") for _ in range(EVERY // work.samples))
            ask(f"save {folder}")
            tuned: Any = untuned()
            tuned.unet = UNet2DConditionModel.from_pretrained(folder)
            gain = rewarded(tuned, job.steps) - before
            looks.append(Look(looks[-1].images + EVERY, looks[-1].seconds + spent, gain))
    reached = looks[-1].gain >= GAIN
    end = crossing(*looks[-2:]) if reached else looks[-1]
    leave({**asdict(end), "reached": reached, "path_kl": paid(tuned), "looks": [asdict(look) for look in looks]},
          store, job.key)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What has been gained, and at what cost."""

    images: float
    seconds: float
    gain: float


def crossing(first: Look, last: Look) -> Look:
    """The moment in between at which GAIN was reached, on a straight line."""
    share = (GAIN - first.gain) / (last.gain - first.gain)
    return Look(
        first.images + share * (last.images - first.images),
        first.seconds + share * (last.seconds - first.seconds),
        GAIN,
    )


def untuned() -> StableDiffusionPipeline:
    """The embedded pipeline."""
    return models.load(str(sd15.Settings.embedded.with_suffix("")))


def rewarded(pipeline: StableDiffusionPipeline, steps: int) -> float:
    """The mean over the pictures that are judged."""
    pictures = draw(pipeline, prompts.read(PROMPTS), range(JUDGED), "ddim", steps, SAME.guidance, JUDGED)
    return float(pictures.rewarded(shapes.following_soft, JUDGED).mean())


def paid(tuned: StableDiffusionPipeline, samples: int = 64) -> float:
    """Path KL, in nats a picture."""
    policy, reference = (Score.of(p, SAME.guidance) for p in (tuned, untuned()))
    task = problem(reference.frozen(), lambda x, cond: x.sum((1, 2, 3)), beta=1.0)
    conditions = Prompts.encode(tuned, prompts.read(PROMPTS))
    return float(nats(task, policy, conditions, samples, 25, samples).mean)
