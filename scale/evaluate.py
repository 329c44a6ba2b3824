"""What fine-tuning gained and what it paid, on fixed seeds and against the model it began with.

    found = evaluate(pipeline, untuned, prompts, {"reward": r, "other": s}, samples=256, guidance=5.0)
    found.write(Path("runs/mine/evaluation.json"))

For each sampler and number of steps the pipeline's own call draws the same pictures before and after: one noise for a
sample id, whatever the batch. Rewards and their gain are means over samples, the gain's error is of paired differences.
Path KL is Girsanov's, from a rollout at eta = 1, in nats a picture. Diversity is the mean distance, per latent
coordinate, between images of one prompt. Several processes share the work, in the batches of one, so the numbers are
those of one.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from ctrl import Estimate, Heun, Noise, grids, path_kl, rollout
from ctrl.fit import Conditions
from ctrl.noise import INITIAL
from ctrl.problem import ScoreAsAction
from scale.diffusion import Decoded, Prompts, Score, pictures_of, problem
from scale.families import family_of, network_of
from scale.prompts import Prompt
from scale.rewards import Reward, ask
from scale.samplers import sampler

GRID = tuple(product(("ddim", "dpmsolver++", "unipc", "euler"), (10, 25, 50, 100)))
DECODED = 8  # latents at a time
SEED = 1_000_003  # far from those of training
P, R = TypeVar("P"), TypeVar("R")


def shared(pieces: Sequence[P], f: Callable[[P], R]) -> list[R]:
    """f of each piece, in order: every process does its share of them, and has all. What f returns is sent, so it lies
    on the CPU."""
    state = PartialState()
    mine = [(i, f(pieces[i])) for i in range(state.process_index, len(pieces), state.num_processes)]
    return [found for _, found in sorted(gather_object(mine), key=lambda pair: pair[0])]


def batches(n: int, size: int) -> list[range]:
    """The ids 0 ... n - 1, `size` at a time."""
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


def progress(pieces: Sequence[tuple[int, int]]) -> tqdm:
    """A bar on the main process, over all pieces of `steps` steps for n images; `update` it by its own share."""
    state = PartialState()
    total = sum(steps * n for steps, n in pieces[:: state.num_processes])
    return tqdm(total=total, desc="evaluation", unit="step", disable=not state.is_main_process)


@dataclass(frozen=True)
class Pictures:
    """n pictures, in the order of their sample ids.

    Attributes:
        latents: (n, C, H, W).
        images: (n, 3, H', W') in [0, 1], on the CPU.
        prompts: n.
    """

    latents: Tensor
    images: Tensor
    prompts: list[Prompt]

    def rewarded(self, reward: Reward, chunk: int) -> Tensor:
        """(n,)."""
        found = []
        for i in range(0, len(self.images), chunk):
            part = self.prompts[i : i + chunk]
            images = self.images[i : i + chunk].to(self.latents.device)
            found.append(ask(reward, images, part).float().cpu())
        return torch.cat(found)


def diversity(latents: Tensor, prompts: Sequence[Prompt]) -> float | None:
    """Mean distance over pairs of images that have a prompt in common; None where there are none."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt.text, []).append(i)
    distances = [
        torch.pdist(latents[index].flatten(1).float()) / math.sqrt(latents[0].numel())
        for index in groups.values() if len(index) > 1
    ]  # fmt: skip
    return float(torch.cat(distances).mean()) if distances else None


@torch.no_grad()
def draw(
    pipeline: Any, prompts: Sequence[Prompt], ids: Sequence[int], name: str, steps: int, guidance: float,
    batch: int = 16, seed: int = SEED,
) -> Pictures:  # fmt: skip
    """Sample i has prompt i mod P and the noise of its id, by the pipeline's own call with a sampler of its
    family."""
    drawn = copy.copy(pipeline)  # the pipeline keeps its scheduler
    box = sampler(name, pipeline)
    if box.noisy:
        raise ValueError(
            f"sampler {name!r} draws noise as it goes, not by sample id: before and after could not be paired"
        )
    drawn.scheduler = box.scheduler
    drawn.set_progress_bar_config(disable=True)
    device, network = pipeline._execution_device, network_of(pipeline)
    dtype, family = next(network.parameters()).dtype, family_of(pipeline)
    shape = (network.config.in_channels, *family.sides(pipeline))
    noise, latents, images, chosen = Noise(seed), [], [], [prompts[i % len(prompts)] for i in ids]
    for k in range(0, len(ids), batch):
        start = noise.normal(torch.tensor(ids[k : k + batch]), shape, INITIAL)
        text = [p.text for p in chosen[k : k + batch]]
        end = drawn(
            text, num_inference_steps=steps, guidance_scale=guidance, latents=start.to(device, dtype),
            output_type="latent", **family.call_of(len(text)),
        ).images  # fmt: skip
        latents.append(end)
        images += [pictures_of(pipeline.vae, part).float().cpu() for part in end.split(DECODED)]
    return Pictures(torch.cat(latents), torch.cat(images), chosen)


@torch.no_grad()
def nats(
    task: ScoreAsAction, policy: Score, conditions: Conditions, samples: int, steps: int = 50, batch: int = 16
) -> Estimate:
    """Path KL between the guided processes, of pictures drawn at eta = 1 by Heun, evenly in log-SNR."""
    times, device = grids.log_snr(task, steps), next(policy.parameters()).device

    def paid(ids: Tensor) -> Tensor:
        path = rollout(task, policy, times, Noise(SEED), ids, solver=Heun(), cond=conditions(ids))
        return path_kl(task, path, policy).double().cpu()

    return Estimate.of(torch.cat(shared(torch.arange(samples, device=device).split(batch), paid)))


def calls_of_nats(samples: int, steps: int) -> int:
    """Network calls of `nats`, each at one state: Heun's two a step, then policy and reference at the nodes."""
    return samples * (2 * steps + 2 * (steps + 1))


class Written:
    """A dataclass that can be kept as JSON."""

    def write(self, file: Path) -> None:
        """In one move."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self), indent=2, allow_nan=False) + "\n")
        os.replace(part, file)


@dataclass(frozen=True)
class Evaluation(Written):
    """What `evaluation.json` holds; `grid` has a row for each sampler and number of steps, of grid_samples pictures."""

    reward_before: float
    reward_after: float
    gain: float
    gain_se: float
    ceiling: float | None
    other_before: float | None
    other_after: float | None
    path_kl: float
    path_kl_se: float
    diversity_before: float | None
    diversity_after: float | None
    samples: int
    grid_samples: int
    prompt: str
    grid: list[dict[str, Any]]

    def summary(self) -> str:
        """For people."""
        first = (
            f"reward {self.reward_before:.4g} -> {self.reward_after:.4g}, gain {self.gain:.3g} +- {self.gain_se:.2g}"
        )
        if self.ceiling is not None:
            gap = self.ceiling - self.reward_before
            first += f", {self.gain / gap:.0%} +- {self.gain_se / gap:.1%} of the way to {self.ceiling:.4g}"
        pairs = {
            "other reward": (self.other_before, self.other_after),
            "diversity": (self.diversity_before, self.diversity_after),
        }
        return "\n".join([
            first,
            f"path KL {self.path_kl:.3g} +- {self.path_kl_se:.2g} nats a picture",
            *(f"{name} {before:.4g} -> {after:.4g}" for name, (before, after) in pairs.items()
              if before is not None and after is not None),
        ])  # fmt: skip


def evaluate(
    pipeline: Any, untuned: Any, prompts: Sequence[Prompt], rewards: Mapping[str, Reward], *, samples: int,
    guidance: float, grid: Sequence[tuple[str, int]] = GRID, grid_samples: int | None = None,
    headline: tuple[str, int] = ("dpmsolver++", 25), ceiling: float | None = None, batch: int = 16, kl_steps: int = 25,
    kl_samples: int = 128,
) -> Evaluation:  # fmt: skip
    """Before and after. The first of the rewards is the one that was trained on, a second may stand beside it;
    `headline` is the sampler, and the steps, of the figures outside the grid. The grid may have fewer samples, and path
    KL, which differs less from image to image than rewards do."""
    few = grid_samples or samples
    cells = [(headline, samples), *((cell, few) for cell in grid)]
    pieces = [
        (name, steps, p, ids)
        for (name, steps), n in cells for p in (untuned, pipeline) for ids in batches(n, batch)
    ]  # fmt: skip
    with progress([(steps, len(ids)) for _, steps, _, ids in pieces]) as bar:

        def judge(piece: tuple[str, int, Any, range]) -> Judged:
            name, steps, p, ids = piece
            drawn = draw(p, prompts, ids, name, steps, guidance, batch)
            bar.update(steps * len(ids))
            return Judged(drawn.latents.cpu(), {key: drawn.rewarded(r, batch) for key, r in rewards.items()})

        found = iter(shared(pieces, judge))
    rows: list[dict[str, Any]] = []
    spread: list[float | None] = []
    for (name, steps), n in cells:
        sides = [Judged.all_of(islice(found, len(batches(n, batch)))) for _ in ("before", "after")]
        rows.append({"sampler": name, "steps": steps, **_gains(sides)})
        chosen = [prompts[i % len(prompts)] for i in range(n)]
        spread = spread or [diversity(side.latents, chosen) for side in sides]  # the headline comes first
    policy, reference = (Score.of(p, guidance) for p in (pipeline, untuned))
    trained, *others = rewards
    task = problem(reference, Decoded(pipeline.vae, rewards[trained]), beta=1.0)
    kl = nats(task, policy, Prompts.encode(pipeline, prompts), min(samples, kl_samples), kl_steps, batch)
    first, other = rows[0], others[0] if others else None
    return Evaluation(
        reward_before=first[f"{trained}_before"], reward_after=first[f"{trained}_after"],
        gain=first[f"{trained}_gain"], gain_se=first[f"{trained}_gain_se"], ceiling=ceiling,
        other_before=first.get(f"{other}_before"), other_after=first.get(f"{other}_after"),
        path_kl=float(kl.mean), path_kl_se=float(kl.stderr), diversity_before=spread[0],
        diversity_after=spread[1], samples=samples, grid_samples=few, prompt=prompts[0].text, grid=rows[1:],
    )  # fmt: skip


def calls_of_evaluation(
    pipeline: Any, *, samples: int, guidance: float, grid: Sequence[tuple[str, int]], grid_samples: int,
    headline: tuple[str, int], kl_steps: int, kl_samples: int, batch: int,
) -> int:  # fmt: skip
    """Calls of the networks in `evaluate` with these options, each at one latent. The pipeline may be an outline."""
    cells = [(headline, samples), *((cell, grid_samples) for cell in grid)]
    drawn = sum(2 * n * sampler(name, pipeline).asked(steps) for (name, steps), n in cells)
    return (drawn + calls_of_nats(min(samples, kl_samples), kl_steps)) * (1 if guidance == 1 else 2)


@dataclass(frozen=True)
class Judged:
    """What is left of n images once they are rewarded: latents, (n, C, H, W), and rewards by name, (n,)."""

    latents: Tensor
    rewards: dict[str, Tensor]

    @staticmethod
    def all_of(parts: Iterator[Judged]) -> Judged:
        """Several as one."""
        every = list(parts)
        rewards = {key: torch.cat([part.rewards[key] for part in every]) for key in every[0].rewards}
        return Judged(torch.cat([part.latents for part in every]), rewards)


def _gains(sides: Sequence[Judged]) -> dict[str, float]:
    """Means before and after, and of the paired differences."""
    found: dict[str, float] = {}
    for key in sides[0].rewards:
        before, after = (side.rewards[key].double() for side in sides)
        gain = Estimate.of(after - before)
        found |= {f"{key}_before": float(before.mean()), f"{key}_after": float(after.mean()),
                  f"{key}_gain": float(gain.mean), f"{key}_gain_se": float(gain.stderr)}  # fmt: skip
    return found
