"""On the embedded Stable Diffusion: from how many pictures is a reward learned, at what path KL, and does what was
learned survive other samplers and step sizes?

Continuous-time forward matching, actor-critic and adjoint matching, and the field's AWM, DiffusionNFT, Flow-GRPO and
DDPO: full fine-tuning by `scale/sd15.py` from the same settings but for those of `METHODS`, the learning rate of each
from the same search (`--tune`). Two rewards:

    following-soft        prompt-following where the model's captions were wrong half the time, on other prompts of that
                          kind than those trained on; `other` is the same with hard edges. Adjoint matching has its
                          gradient, the others its values; forward matching has a budget of path KL here too
    jpeg-compressibility  a black box, at a budget of path KL, on prompts that the model follows; `other` is what became
                          of following

Training rewards are means over the last SMOOTH epochs. `images_to` is how many pictures were drawn until that mean was
at DDPO's final one, the mean over its seeds; `kept` the mean gain over samplers and steps (rows of the panel
`samplers`) relative to that of DDIM with as many steps as in training, on the same pictures. The panel `half` has the
best of the continuous-time methods again, in runs of half the images: what is to be held against DDPO's gain from
all of them.
Runs are kept in OUT/sd_tiny.runs, so that an interrupted run goes on. Rows of rewards and methods that are not asked
for stay as they are, with the commit that they were made at.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.colours import COLOURS
from benchmarks.report import (
    Options,
    Row,
    check_among,
    command_line,
    device,
    digest,
    earlier,
    kept,
    leave,
    number,
    others,
    search,
    table,
    with_commits,
    write,
)
from ctrl import NotFinite
from scale import sd15
from scale.settings import EMBEDDED, Settings

NAME = "sd_tiny"
SMOOTH = 5
REWARDS: dict[str, dict[str, Any]] = {
    "following-soft": {"reward": "following-soft", "other_reward": "following"},
    "jpeg-compressibility": {
        "reward": "jpeg-compressibility", "other_reward": "following", "prompts": "shapes", "eval_prompts": "shapes",
        "kl": 2.0, "beta": 0.01,
    },
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "actor-critic": {
        "algorithm": "actor-critic", "critic": "network", "pretrain": 8,
        "options": ("nodes=128", "critic_updates=40", "actor_updates=6", "keep=3", "nats=1"),
    },
    "adjoint-matching": {"algorithm": "adjoint-matching", "options": ("nodes=128", "updates=6")},
    "forward-matching": {"algorithm": "forward-matching", "options": (), "kl": 1.5, "ema": 0.97, "warmup": 3},
    "awm": {"algorithm": "awm", "options": ("clip=2.5e-3",), "kl": 3.0, "ema": 0.97, "warmup": 3},
    "diffusion-nft": {"algorithm": "diffusion-nft", "options": (), "kl": 3.0, "ema": 0.97, "warmup": 3},
    "flow-grpo": {
        "algorithm": "ddpo", "solver": "ddim", "jitter": 0.0, "eta": 0.49, "in_a_row": 4, "kl": 3.0, "ema": 0.97,
        "warmup": 3, "options": ("nodes=64", "group=4", "passes=2", "clip=0.2", "chain_kl=True"),
    },
    "ddpo": {
        "algorithm": "ddpo", "solver": "ddim", "jitter": 0.0, "in_a_row": 4,
        "options": ("nodes=64", "group=4", "passes=2", "clip=0.2"),
    },
}  # fmt: skip
_FOLLOWING_ALONE = ("adjoint-matching", "awm", "diffusion-nft", "flow-grpo")
CASES = [case for case in product(REWARDS, METHODS) if case[0] == "following-soft" or case[1] not in _FOLLOWING_ALONE]
"""Reward and method; a black box has no adjoint."""
HALVED = (
    ("following-soft", "adjoint-matching"), ("following-soft", "forward-matching"),
    ("jpeg-compressibility", "actor-critic"),
)  # fmt: skip
"""What is run with half the images too: the best of the continuous-time methods by the search, on following by the
reward's gradient and by its values."""
RATES, FACTOR = (2e-5, 6e-5, 1.8e-4), 3.0
"""Of the search, which is extended by this factor until the best lies inside. DDPO with two optimiser steps
per epoch, as public codes have it, was tried at 6e-5, 1.8e-4 and 5.4e-4 too, and gained less, at more KL."""
MOST_KL = {"forward-matching": 3.0}
"""Nats that a method may pay in the search; the others, which it is held against, take their largest gain at any KL."""
RATE = {
    ("following-soft", "actor-critic"): 6e-5, ("following-soft", "adjoint-matching"): 1.8e-4,
    ("following-soft", "forward-matching"): 6e-5, ("following-soft", "ddpo"): 1.8e-4,
    ("following-soft", "diffusion-nft"): 1.8e-4, ("following-soft", "awm"): 6e-5,
    ("following-soft", "flow-grpo"): 6e-5,
    ("jpeg-compressibility", "actor-critic"): 6e-5, ("jpeg-compressibility", "forward-matching"): 6e-5,
    ("jpeg-compressibility", "ddpo"): 6e-5,
}  # fmt: skip
"""What the search found: the largest gain, to three digits, on the prompts of training (results/sd_tiny_tuning.json).
DDPO has the same at 2e-5 and at 6e-5 on JPEG size, for 5.1 and 3.2 nats."""


@dataclass(frozen=True)
class SDTinyOptions(Options):
    """What this benchmark can be asked for."""

    reward: tuple[str, ...] = tuple(REWARDS)
    """following-soft, jpeg-compressibility."""
    method: tuple[str, ...] = tuple(dict.fromkeys(method for _, method in RATE))
    """actor-critic, adjoint-matching, forward-matching, diffusion-nft, awm, flow-grpo, ddpo."""
    seeds: int = 3
    """Runs of each, with seeds 0, 1, ..."""
    images: int = 1600
    """Drawn in each run, those that a critic is pretrained on included."""
    tune: bool = False
    """Try the learning rates, with one seed that is not among the others, instead."""
    done: bool = False
    """Only the table and the figure of the runs that are there."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each on one thread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, reward=REWARDS, method=METHODS)
        if self.tune and self.done:
            raise ValueError("done cannot be combined with tune: a search reuses its finished runs and continues")
        known = {method for _, method in RATE}
        if not self.tune and (new := [method for method in self.method if method not in known]):
            raise ValueError(
                f"method: {new[0]} has no learning rate yet: --tune finds it, and RATE is where it belongs"
            )


@dataclass(frozen=True)
class Job:
    """One run."""

    reward: str
    method: str
    seed: int
    images: int
    quick: bool
    lr: float | None = None
    half: bool = False
    """Of the pictures, and of those that a critic is pretrained on."""

    @property
    def key(self) -> str:
        """Its file's name."""
        return f"{self.reward}-{self.method}-{self.seed}-{self.images}-{digest(self.settings(Path()).plain(), run)}"

    def settings(self, out: Path) -> Settings:
        """The embedded model's, with what is the reward's and the method's own."""
        lr = RATE[self.reward, self.method] if self.lr is None else self.lr
        about = {**METHODS[self.method], **REWARDS[self.reward], "lr": lr}  # a reward's budget is all methods'
        s = replace(Settings.read(EMBEDDED), seed=self.seed, out=out, log_with="none", pictures_every=0, **about)
        if self.half:
            s = replace(s, pretrain=s.pretrain // 2)
        if self.lr is not None:  # what the methods are compared on is not what they are tuned on
            s = replace(s, eval_prompts=s.prompts, eval_steps=())
        if self.quick:
            s = replace(s, samples=8, steps=4, pretrain=min(s.pretrain, 1), eval_samples=8, eval_headline=4,
                        eval_grid_samples=4, eval_steps=(4,))  # fmt: skip
        return replace(s, epochs=self.images // s.samples - s.pretrain)


def run(job: Job, store: Path) -> None:
    """Train, evaluate, and leave a file."""
    torch.set_num_threads(1)
    out = store / f"{job.key}.run"
    shutil.rmtree(out, ignore_errors=True)
    began, s = time.process_time(), job.settings(out)
    try:
        found = sd15.train(s)
    except NotFinite as failure:
        if job.lr is None:
            raise
        leave({"failed": str(failure), "evaluation": {}}, store, job.key)
        return
    assert found.evaluation is not None
    row = {
        "failed": None, "seconds": time.process_time() - began,
        "evaluation": json.loads((out / "evaluation.json").read_text()),
        "curve": [[s.pretrain * s.samples + m["trajectories"], m["reward"], m.get("kl")] for m in found.history],
    }  # fmt: skip
    leave(row, store, job.key)
    shutil.rmtree(out / "checkpoints")


def jobs_of(o: SDTinyOptions) -> list[Job]:
    """All that were asked for."""
    cases = [case for case in CASES if case[0] in o.reward and case[1] in o.method]
    if o.tune:
        return [Job(*case, 1000, o.images, o.quick, lr) for case in cases for lr in RATES]
    seeds, images = (1, 24) if o.quick else (o.seeds, o.images)
    whole = [Job(*case, o.seed + seed, images, o.quick) for seed in range(seeds) for case in cases]
    return whole + [replace(job, images=images // 2, half=True) for job in whole if (job.reward, job.method) in HALVED]


def smoothed(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """(pictures, mean reward over the last SMOOTH epochs)."""
    return [(curve[i][0], mean(r for _, r, _ in curve[max(0, i - SMOOTH + 1) : i + 1])) for i in range(len(curve))]


def kept_of(grid: Sequence[dict[str, Any]]) -> float:
    """The mean gain over an evaluation's grid, relative to that by DDIM at the fewest steps, those of training."""
    first = min((row for row in grid if row["sampler"] == "ddim"), key=lambda row: row["steps"])
    return mean(row["reward_gain"] for row in grid) / first["reward_gain"]


def summarise(runs: dict[Job, Any], panel: str) -> Iterator[Row]:
    """One row a reward and method: the panel `learning`, or `half`."""
    for reward, method in dict.fromkeys((job.reward, job.method) for job in runs):
        level = [smoothed(r["curve"])[-1][1] for j, r in runs.items() if (j.reward, j.method) == (reward, "ddpo")]
        group = [r for j, r in runs.items() if (j.reward, j.method) == (reward, method)]
        found = [r["evaluation"] for r in group]
        to = [next((n for n, v in smoothed(r["curve"]) if level and v >= mean(level)), None) for r in group]
        diverse = [f["diversity_after"] for f in found if f["diversity_after"] is not None]
        gains, n = [f["gain"] for f in found], len(found)
        spread = stdev(gains) / n**0.5 if n > 1 else found[0]["gain_se"]
        yield {
            "panel": panel, "reward": reward, "algorithm": method, "seeds": n, "images": group[0]["curve"][-1][0],
            "images_to": None if None in to else mean(v for v in to if v is not None),
            "before": found[0]["reward_before"], "gain": mean(gains), "gain_se": spread,
            "path_kl": mean(f["path_kl"] for f in found), "other_before": found[0]["other_before"],
            "other_after": mean(f["other_after"] for f in found),
            "diversity_before": found[0]["diversity_before"],
            "diversity_after": mean(diverse) if diverse else None,
            "kept": mean(kept_of(f["grid"]) for f in found),
            "seconds": mean(r["seconds"] for r in group),
        }  # fmt: skip


def curves(runs: dict[Job, Any]) -> Iterator[Row]:
    """The panel `curve`: what training had come to after so many pictures."""
    for job, r in runs.items():
        for (images, value), (_, _, kl) in zip(smoothed(r["curve"]), r["curve"], strict=True):
            yield {"panel": "curve", "reward": job.reward, "algorithm": job.method, "seed": job.seed, "images": images,
                   "value": value, "kl": kl}  # fmt: skip


def by_sampler(runs: dict[Job, Any]) -> Iterator[Row]:
    """One row a reward, method, sampler and number of steps, the mean over seeds."""
    cells: dict[tuple[Any, ...], list[float]] = {}
    for job, r in runs.items():
        for row in r["evaluation"]["grid"]:
            cells.setdefault((job.reward, job.method, row["sampler"], row["steps"]), []).append(row["reward_gain"])
    for (reward, method, sampler, steps), gains in cells.items():
        se = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        yield {"panel": "samplers", "reward": reward, "algorithm": method, "sampler": sampler, "steps": steps,
               "gain": mean(gains), "gain_se": se}  # fmt: skip


def draw(rows: Sequence[Row]) -> Figure:
    """A row a reward: what was learned from how many pictures, a line a seed, and what is left of it by sampler and
    steps."""
    rewards = list(dict.fromkeys(str(r["reward"]) for r in rows))
    figure = Figure(figsize=(8.5, 3.1 * len(rewards)), layout="constrained")
    for (left, right), reward in zip(figure.subplots(len(rewards), 2, squeeze=False), rewards, strict=True):
        learned: dict[tuple[str, Any], list[Row]] = {}
        for r in rows:
            if r["panel"] == "curve" and r["reward"] == reward:
                learned.setdefault((str(r["algorithm"]), r["seed"]), []).append(r)
        for (method, _), curve in learned.items():
            shown = method in left.get_legend_handles_labels()[1]
            left.plot([number(r, "images") for r in curve], [number(r, "value") for r in curve], color=COLOURS[method],
                      linewidth=1.2, label=None if shown else method)  # fmt: skip
        for method, marks in product(METHODS, (("ddim", "o"), ("dpmsolver++", "s"), ("unipc", "^"), ("euler", "v"))):
            line = [r for r in rows if r["panel"] == "samplers" and (r["reward"], r["algorithm"], r["sampler"])
                    == (reward, method, marks[0])]  # fmt: skip
            right.errorbar([number(r, "steps") for r in line], [number(r, "gain") for r in line],
                           [float(r["gain_se"] or 0) for r in line], color=COLOURS[method], marker=marks[1],
                           markersize=4, linewidth=1, capsize=2)  # fmt: skip
        left.set(title=reward, xlabel="pictures", ylabel=f"reward in training, mean of {SMOOTH} epochs")
        right.set(title="ddim o, dpmsolver++ □, unipc △, euler ▽", ylabel="gain ± s.e. over seeds", xscale="log")
        steps = sorted({int(number(r, "steps")) for r in rows if r["panel"] == "samplers"})
        right.set_xticks(steps, labels=[str(n) for n in steps])
        right.minorticks_off()
        right.set_xlabel("steps")
        left.legend(frameon=False)
        for ax in (left, right):
            ax.grid(alpha=0.3)
    return figure


def gain_of(job: Job, found: dict[str, Any]) -> float:
    """What the search maximises; a run that diverged, or paid more than it may, is the worst."""
    evaluation = found["evaluation"]
    if found["failed"] or evaluation["path_kl"] > MOST_KL.get(job.method, math.inf):
        return -math.inf
    return float(evaluation["gain"])


def tried(runs: dict[Job, Any]) -> Iterator[Row]:
    """One row per run of the search, by reward, method and learning rate."""
    for j in sorted(runs, key=lambda j: (CASES.index((j.reward, j.method)), j.lr)):
        r = runs[j]
        yield {"reward": j.reward, "algorithm": j.method, "lr": j.lr, "failed": r["failed"],
               "last": None if r["failed"] else smoothed(r["curve"])[-1][1],
               **{name: r["evaluation"].get(name) for name in ("gain", "gain_se", "path_kl")}}  # fmt: skip


def main(o: SDTinyOptions) -> None:
    """Train, print, write."""
    began = time.perf_counter()
    carry_out = partial(kept, run, store=o.out / f"{NAME}.runs", workers=o.jobs, done=o.done)
    if o.tune:
        runs = search(jobs_of(o), carry_out, gain_of, FACTOR, case=lambda job: (job.reward, job.method))
        rows = list(tried(runs))
        print(table(rows, list(rows[0])))
        rows = with_commits(rows, runs.values())
        rows = others(earlier(NAME, o, "tuning"), rows, by=("reward", "algorithm")) + rows
        print("->", write(NAME, o, rows, began, device(), part="tuning"))
        return
    runs = carry_out(jobs_of(o))
    whole, half = ({job: r for job, r in runs.items() if job.half == is_half} for is_half in (False, True))
    learning = [*summarise(whole, "learning"), *summarise(half, "half")]
    samplers = list(by_sampler(whole))
    print(table(learning, list(learning[0])))
    print(table(samplers, [name for name in samplers[0] if name != "panel"]))
    rows = with_commits([*learning, *samplers, *curves(whole)], runs.values())
    rows = others(earlier(NAME, o), rows, by=("reward", "algorithm")) + rows
    path = write(NAME, o, rows, began, device())
    draw(rows).savefig(path.with_suffix(".png"), dpi=150)
    print(f"-> {path}, {path.with_suffix('.png').name}")


if __name__ == "__main__":
    command_line(main, SDTinyOptions, __doc__)
