"""Beside TRL's trainers on the embedded Stable Diffusion, for `benchmarks/throughput.py`.

peer     one epoch of DDPO, the same work: same steps, batches, guidance, reward, threads, one optimiser step;
         interleaved.
race     time in training until the mean reward of JUDGED pictures, drawn by the pipeline's own call in N steps of DDIM
         from one noise, has grown by GAIN, and the path KL that was paid by then. Looks are EVERY pictures apart, their
         time does not count, and the moment is interpolated. By the reward's values alone forward matching races with
         TRL's DDPO, by its gradient adjoint matching with TRL's AlignProp. TRL's trainers are used unchanged, on N
         steps. Ours have the options of the default runs, epochs of as many pictures and half as many nodes; they train
         on TEN steps whatever N is, since their policy is defined in continuous time. A search with its own seed
         (`--tune`) finds learning rates and TRL's updates per epoch; RACERS lists what it has not covered yet.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from tqdm import tqdm

from benchmarks.report import Row, digest, kept, leave, number, over_seeds, with_commits
from benchmarks.speed.peer import PINNED, PROMPTS, Work, started
from benchmarks.speed.timing import ratio
from scale import finetune, models, prompts, shapes
from scale.diffusion import Prompts, Score, problem
from scale.evaluate import draw, nats

ADJOINT: dict[str, Any] = {
    "algorithm": "adjoint-matching", "options": ["nodes=128", "updates=6"], "beta": 0.1, "solver": "2m",
    "grid": "log-snr", "jitter": 0.4, "warmup": 0, "micro_batch": 64,
}  # fmt: skip
FORWARD = ADJOINT | {"algorithm": "forward-matching", "options": ["nodes=128", "updates=8"], "kl": 1.5, "warmup": 3}
EPOCH = Work(samples=16, batch=16, guidance=5.0)


def peer(python: str, repeats: int, threads: int) -> list[Row]:
    """An epoch of each, in turn."""
    work = replace(EPOCH, threads=threads)
    sides: dict[str, tuple[str, Work, str]] = {
        "TRL": ("ddpo", work, python),
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
"""Of path KL: in the search a side is to stay within."""
IMAGES, IMAGES_TRIED = 1536, 1024
"""After which a run is given up, and one of the search."""
RATES = (2.5e-6, 7e-6, 2e-5, 6e-5, 1.8e-4)
SAME = Work(samples=32, batch=32, guidance=2.0)


@dataclass(frozen=True)
class Racer:
    """Who takes part."""

    side: str
    """Of `benchmarks.speed.peer.SIDES`."""
    updates: tuple[int, ...]
    """An epoch, tried in the search, each with all RATES."""
    taken: tuple[float, int]
    """Of these: learning rate, and updates."""
    own: dict[str, Any] = field(default_factory=dict)
    """Settings, if it is ours."""


RACERS = {
    "forward matching": Racer("ours", (8,), (6e-5, 8), FORWARD),
    "TRL's DDPO": Racer("ddpo", (1, 4), (7e-6, 4)),
    "adjoint matching": Racer("ours", (6,), (2e-5, 6), ADJOINT),
    "TRL's AlignProp": Racer("alignprop", (1, 4), (7e-6, 1)),
}
"""TRL's DDPO got furthest in the search within NATS. Adjoint matching was fastest there at 6e-5, within too, but tried
on the race's seeds it paid twice the nats of 2e-5, which is taken. Forward matching and AlignProp are still to be
searched for."""
PAIRS = {"values": ("forward matching", "TRL's DDPO"), "gradient": ("adjoint matching", "TRL's AlignProp")}
"""Who races with whom, by what they take of the reward."""


@dataclass(frozen=True)
class Job:
    """One run, of so many images at most; `python` is what it runs in."""

    racer: str
    steps: int
    seed: int
    lr: float
    updates: int
    images: int
    python: str
    beside: int = 1
    """Runs at a time, this one among them: its seconds depend on it."""

    @property
    def key(self) -> str:
        """Its file's name."""
        made = digest(self, self.work, GAIN, JUDGED, EVERY, PROMPTS, PINNED, run, rewarded, paid)
        return f"race-{self.racer.replace(' ', '-')}-{self.steps}-{self.seed}-{made}"

    @property
    def work(self) -> Work:
        """An epoch."""
        same = replace(SAME, steps=self.steps, seed=self.seed, lr=self.lr, updates=self.updates)
        if own := RACERS[self.racer].own:
            own = own | {"steps": TEN, "options": ["nodes=64", f"updates={self.updates}"]}
        return replace(same, own=own)


def race(python: str, by: Sequence[str], seeds: int, store: Path, jobs_at_once: int, tune: bool = False) -> list[Row]:
    """Every run of the pairs that race by these; and the ratios."""
    racers = {name: RACERS[name] for pair in by for name in PAIRS[pair]}
    where = {name: "" if r.side == "ours" else python for name, r in racers.items()}
    if tune:
        jobs = [
            Job(name, STEPS[0], 1000, *tried, IMAGES_TRIED, where[name])
            for name, r in racers.items() for tried in product(RATES, r.updates)
        ]  # fmt: skip
    else:
        cases = product(range(seeds), STEPS, racers)
        jobs = [Job(name, steps, seed, *RACERS[name].taken, IMAGES, where[name]) for seed, steps, name in cases]
    runs = kept(run, [replace(job, beside=jobs_at_once) for job in jobs], store, jobs_at_once)
    if tune:
        return with_commits(ends(runs, "tuning"), runs.values())
    looks: list[Row] = [
        {"panel": "looks", "case": f"{job.racer}, N = {job.steps}", "seed": job.seed, **look}
        for job, r in runs.items() for look in r["looks"]
    ]  # fmt: skip
    rows = ends(runs, "race") + [shorter(pair, steps, runs) for pair in by for steps in STEPS] + looks
    return with_commits(rows, runs.values())


def ends(runs: dict[Job, Any], panel: str) -> list[Row]:
    """Where each side was when it ended, over seeds."""
    rows: list[Row] = []
    for case in dict.fromkeys(replace(job, seed=0) for job in runs):
        group = [r for job, r in runs.items() if replace(job, seed=0) == case]
        within = mean(r["path_kl"] for r in group) <= NATS
        rows.append({
            "panel": panel, "case": f"{case.racer}, N = {case.steps}", "lr": case.lr, "updates": case.updates,
            "seeds": len(group), "reached": sum(r["reached"] for r in group),
            **over_seeds("seconds", [r["seconds"] for r in group]),
            **{name: mean(r[name] for r in group) for name in ("images", "gain", "path_kl")}, "within": within,
            "goal": GAIN,
        })  # fmt: skip
    return rows


def shorter(pair: str, steps: int, runs: dict[Job, Any]) -> Row:
    """Our time over TRL's, seed by seed, of those that race by `pair`. Met only if ours have reached the reward, and at
    no more path KL. A run of TRL's that was given up stands with what it had taken and paid by then: with less reward
    for more of both it is behind, whatever it would have got later."""
    ours, theirs = (
        {job.seed: r for job, r in runs.items() if (job.racer, job.steps) == (name, steps)} for name in PAIRS[pair]
    )
    found = ratio([ours[seed]["seconds"] / theirs[seed]["seconds"] for seed in ours], 1 / 3)
    reached = all(r["reached"] for r in ours.values())
    cheaper = mean(r["path_kl"] for r in ours.values()) <= mean(r["path_kl"] for r in theirs.values())
    return {
        "panel": "race", "case": f"ours over TRL by {pair}, N = {steps}", **found, "seeds": len(ours),
        "met": bool(found["met"]) and reached and cheaper,
    }  # fmt: skip


def run(job: Job, store: Path) -> None:
    """Until the reward is there, or the pictures are used up."""
    before = rewarded(untuned(), job.steps)
    looks = [Look(0, 0.0, 0.0, 0.0)]
    with tempfile.TemporaryDirectory() as folder, started(RACERS[job.racer].side, job.work, job.python) as ask:
        while looks[-1].gain < GAIN and looks[-1].images < job.images:
            spent = sum(number(ask("epoch"), "seconds") for _ in range(EVERY // SAME.samples))
            ask(f"save {folder}")
            tuned: Any = untuned()
            tuned.unet = UNet2DConditionModel.from_pretrained(folder)
            gain = rewarded(tuned, job.steps) - before
            looks.append(Look(looks[-1].images + EVERY, looks[-1].seconds + spent, gain, paid(tuned)))
    reached = looks[-1].gain >= GAIN
    end = crossing(*looks[-2:]) if reached else looks[-1]
    leave({**asdict(end), "reached": reached, "looks": [asdict(look) for look in looks]}, store, job.key)


@dataclass(frozen=True)
class Look:
    """What has been gained, and at what cost."""

    images: float
    seconds: float
    gain: float
    path_kl: float


def crossing(first: Look, last: Look) -> Look:
    """The moment in between at which GAIN was reached, on a straight line."""
    share = (GAIN - first.gain) / (last.gain - first.gain)
    return Look(*(a + share * (b - a) for a, b in zip(astuple(first), astuple(last), strict=True)))


def untuned() -> StableDiffusionPipeline:
    """The embedded pipeline."""
    return models.load(str(finetune.Settings.embedded.with_suffix("")))


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
