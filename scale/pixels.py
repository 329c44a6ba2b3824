"""Unconditional diffusion models of pictures: load one, draw from it, and see how far what it draws is from real ones.

    pipeline = load("google/ddpm-cifar10-32")             # or a folder; a `DDPMPipeline` as diffusers has it
    images = draw(pipeline, range(1000), "ancestral", 10)   # (n, 3, H, W) in [0, 1], each from the noise of its id

`scale.classifiers` compares sets of pictures; here are what needs real ones: the nearest of them, and the FID.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ctrl import Estimate
from ctrl.fields import one_of
from scale.classifiers import Moments, diversity, features, frechet, histogram
from scale.data import Pictures
from scale.diffusion import NO_PROMPT, Decoded, Score, problem
from scale.evaluate import SEED, Written, batches, calls_of_nats, nats, progress, shared
from scale.families import Ddpm, Widths
from scale.models import Outline, check_place, check_prediction, check_weights, empty, not_there
from scale.rewards import Reward, ask

SAMPLERS: dict[str, Any] = {
    "ancestral": DDPMScheduler, "ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler,
    "sde-dpmsolver++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler,
}  # fmt: skip
NOISY: dict[str, dict[str, str]] = {
    "ancestral": {"variance_type": "fixed_small"},  # the posterior's, which is the SDE's
    "sde-dpmsolver++": {"algorithm_type": "sde-dpmsolver++"},
}
"""Those that draw noise in every step, and what makes them the SDE's."""
KL_STEPS = 25
"""Of Heun, for the path KL."""


def load(name: str, revision: str | None = None, variant: str | None = None) -> DDPMPipeline:
    """The pipeline, checked, in float32: it is what is trained."""
    outline(name, revision, variant)
    try:
        pipeline = DDPMPipeline.from_pretrained(name, revision=revision, variant=variant)
    except OSError as wrong:
        raise ValueError(not_there(name, variant, wrong, "copy it again")) from wrong
    return pipeline.to(torch.float32)


def outline(name: str, revision: str | None = None, variant: str | None = None) -> Outline:
    """Raise at what is wrong with a model's kind, files and configs, before its weights are loaded."""
    check_place(name)
    try:
        index = DDPMPipeline.load_config(name, revision=revision)
        if (kind := index.get("_class_name")) not in ("DDPMPipeline", "DDIMPipeline"):
            raise ValueError(f"model must be a DDPMPipeline of pictures; {name} is a {kind}")
        with init_empty_weights():
            unet = _empty(index, "unet", name, revision)
        box = _empty(index, "scheduler", name, revision)
    except OSError as wrong:
        raise ValueError(not_there(name, variant, wrong, "copy it again")) from wrong
    if os.path.isdir(name):
        own = Path(name) / "unet"
        check_weights([own if own.is_dir() else Path(name)], variant, (".safetensors", ".bin"))
    if not isinstance(unet, UNet2DModel):
        raise ValueError(f"model must have a UNet2DModel; {name} has a {type(unet).__name__}")
    found = Outline(Ddpm(), {"unet": unet, "vae": None, "scheduler": box}, Widths())
    found.family.check(name, found)
    check_prediction(name, box.config.prediction_type)
    return found


def _empty(index: dict[str, Any], part: str, name: str, revision: str | None) -> Any:
    """From a folder of its own; the hub's oldest models have all parts in one."""
    try:
        return empty(index, part, name, part, revision)
    except OSError:
        return empty(index, part, name, None, revision)


def scheduler(name: str, pipeline: DDPMPipeline) -> Any:
    """The sampler of that name under the pipeline's schedule; few steps begin at the last timestep."""
    one_of("sampler", name, SAMPLERS)
    return SAMPLERS[name].from_config(pipeline.scheduler.config, timestep_spacing="trailing", **NOISY.get(name, {}))


def generator(seed: int, i: int) -> torch.Generator:
    """Of picture i's noise."""
    return torch.Generator().manual_seed((seed * 1_000_003 + i) % 2**32)


@torch.no_grad()
def draw(
    pipeline: DDPMPipeline, ids: Sequence[int], name: str, steps: int, batch: int = 64, seed: int = SEED
) -> Tensor:
    """Pictures in [0, 1] on the CPU, (n, 3, H, W), as diffusers' own pipelines draw them; each has its own noise."""
    unet, box, found = pipeline.unet, scheduler(name, pipeline), []
    size, device = unet.config.sample_size, pipeline._execution_device
    for k in range(0, len(ids), batch):
        rngs = [generator(seed, i) for i in ids[k : k + batch]]
        box.set_timesteps(steps)
        noise = {"generator": rngs} if name in NOISY else {}
        start = randn_tensor((len(rngs), 3, size, size), generator=rngs, device=device, dtype=unet.dtype)
        x = start * box.init_noise_sigma
        for t in box.timesteps:
            out = unet(box.scale_model_input(x, t), t, return_dict=False)[0]
            x = box.step(out, t, x, **noise).prev_sample
        found.append((x / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(found)


# ------------------------------------------------------------------------------------------ against real ones


@torch.no_grad()
def nearest(images: Tensor, real: Tensor, batch: int = 500) -> Tensor:
    """Each picture's distance to the nearest real one or its mirror image, per pixel and channel, (n,); pictures in
    [0, 1]. Near zero: it is a copy."""
    flat = images.flatten(1)
    best = flat.new_full((len(flat),), torch.inf)
    for part in real.split(batch):
        for side in (part, part.flip(3)):
            best = torch.minimum(best, torch.cdist(flat, side.flatten(1)).amin(1))
    return best / flat.shape[1] ** 0.5


def fid(images: Tensor, real: Tensor, weights: Path) -> float:
    """The Frechet Inception distance (Heusel et al. 2017, arXiv 1706.08500) by torch-fidelity, which has the original
    TensorFlow network's weights and resizing, as published figures have them. weights: their file."""
    try:
        import torch_fidelity
    except ImportError as missing:
        raise ValueError("fid needs torch-fidelity: pip install torch-fidelity") from missing
    sets = [_Bytes(part) for part in (images, real)]
    found = torch_fidelity.calculate_metrics(
        input1=sets[0], input2=sets[1], fid=True, cuda=torch.cuda.is_available(), verbose=False,
        feature_extractor_weights_path=str(weights),
    )  # fmt: skip
    return float(found["frechet_inception_distance"])


class _Bytes(torch.utils.data.Dataset[Tensor]):
    """Pictures as torch-fidelity wants them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        return (self.images[i] * 255).round().byte()


# ------------------------------------------------------------------------------------------ before and after


@dataclass(frozen=True)
class Evaluation(Written):
    """What `evaluation.json` holds: the untuned model by `sampler` (before), by the best of SAMPLERS at as many steps
    (best_untuned), and the tuned one (after), on the same noise. The gain is over the best of the untuned. `grid` has a
    row for each sampler and number of steps, of grid_samples pictures."""

    sampler: str
    steps: int
    samples: int
    reward_before: float
    reward_best_untuned: float
    best_untuned: str
    reward_after: float
    gain: float
    gain_se: float
    path_kl: float
    path_kl_se: float
    frechet_in: str
    frechet_before: float
    frechet_best_untuned: float
    frechet_best_untuned_by: str
    frechet_after: float
    fid_before: float | None
    fid_after: float | None
    diversity_before: float
    diversity_after: float
    classes_before: list[float]
    classes_after: list[float]
    nearest_before: float | None
    nearest_after: float | None
    untuned: dict[str, dict[str, float]]
    grid_samples: int
    grid: list[dict[str, Any]]

    def summary(self) -> str:
        """For people."""
        distance = f"Frechet distance in {self.frechet_in}, {self.samples} pictures"
        before = f"{self.reward_before:.4g} untuned by {self.sampler}"
        best = f"{self.reward_best_untuned:.4g} by {self.best_untuned}, the best"
        nearer = f"{self.frechet_best_untuned:.4g} by {self.frechet_best_untuned_by}, the best"
        lines = [
            f"reward at {self.steps} steps: {before}, {best} -> {self.reward_after:.4g}",
            f"gain {self.gain:.3g} +- {self.gain_se:.2g} over the best untuned sampler",
            f"path KL {self.path_kl:.3g} +- {self.path_kl_se:.2g} nats a picture",
            f"{distance}: {self.frechet_before:.4g} untuned, {nearer} -> {self.frechet_after:.4g}",
            f"diversity {self.diversity_before:.4g} -> {self.diversity_after:.4g}",
            f"largest class {max(self.classes_before):.0%} -> {max(self.classes_after):.0%} of pictures",
        ]
        if self.nearest_after is not None:
            lines.append(
                f"nearest real picture of the nearest 1 %: {self.nearest_before:.3g} -> {self.nearest_after:.3g}"
            )
        if self.fid_after is not None:
            lines.append(f"FID, {self.samples} pictures: {self.fid_before:.4g} -> {self.fid_after:.4g}")
        return "\n".join(lines)


def evaluate(
    pipeline: DDPMPipeline, untuned: DDPMPipeline, reward: Reward, *, samples: int, headline: tuple[str, int],
    grid: Sequence[tuple[str, int]] = (), grid_samples: int = 64, pictures: Pictures | None = None,
    fid_weights: Path | None = None, batch: int = 64, kl_samples: int = 128,
) -> Evaluation:  # fmt: skip
    """Before and after, on the same noise; the untuned model by every sampler at the headline's number of steps."""
    name, steps = headline
    cells, device = list(dict.fromkeys(grid)), pipeline._execution_device
    sets = [(untuned, by, steps, samples) for by in SAMPLERS] + [(pipeline, name, steps, samples)]
    sets += [(p, by, n, grid_samples) for by, n in cells for p in (untuned, pipeline)]
    pieces = [(p, by, n_steps, ids) for p, by, n_steps, n in sets for ids in batches(n, batch)]
    with progress([(n_steps, len(ids)) for _, _, n_steps, ids in pieces]) as bar:

        def drawn(piece: tuple[DDPMPipeline, str, int, range]) -> tuple[Tensor, Tensor]:
            p, by, n_steps, ids = piece
            images = draw(p, ids, by, n_steps, batch)
            bar.update(n_steps * len(ids))
            return images, rewarded(reward, images, device)

        found = iter(shared(pieces, drawn))

    every: list[tuple[Tensor, Tensor]] = []
    for *_, n in sets:
        images, rewards = zip(*islice(found, len(batches(n, batch))), strict=True)
        every.append((torch.cat(images), torch.cat(rewards)))
    before = {by: images for by, (images, _) in zip(SAMPLERS, every, strict=False)}
    started = {by: rewards for by, (_, rewards) in zip(SAMPLERS, every, strict=False)}
    (after, ended), *sides = every[len(SAMPLERS) :]
    held = None if pictures is None else pictures.batch(torch.arange(len(pictures))) / 2 + 0.5
    real = Moments.embedded() if held is None else Moments.of(features(held))
    rows = [
        {"sampler": by, "steps": n, **_gains(*pair, real)}
        for (by, n), *pair in zip(cells, sides[::2], sides[1::2], strict=True)
    ]
    seen, seen_after = {by: features(images) for by, images in before.items()}, features(after)
    away = {by: frechet(Moments.of(f), real) for by, f in seen.items()}
    best = max(started, key=lambda by: float(started[by].mean()))
    nearer = min(away, key=lambda by: away[by])
    task = problem(Score.of(untuned), Decoded(None, reward), beta=1.0)
    kl = nats(task, Score.of(pipeline), lambda ids: None, min(samples, kl_samples), KL_STEPS, batch)
    gain = Estimate.of(ended - started[best])
    shown = (before[name], after)
    copies = [None if held is None else float(nearest(images, held).quantile(0.01)) for images in shown]
    fids = [None if held is None or fid_weights is None else fid(images, held, fid_weights) for images in shown]
    return Evaluation(
        sampler=name, steps=steps, samples=samples, reward_before=float(started[name].mean()),
        reward_best_untuned=float(started[best].mean()), best_untuned=best, reward_after=float(ended.mean()),
        gain=float(gain.mean), gain_se=float(gain.stderr), path_kl=float(kl.mean), path_kl_se=float(kl.stderr),
        frechet_in=f"the judging classifier's features, to {'CIFAR-10' if held is None else 'the data'}",
         frechet_before=away[name], frechet_best_untuned=away[nearer],
        frechet_best_untuned_by=nearer, frechet_after=frechet(Moments.of(seen_after), real), fid_before=fids[0],
        fid_after=fids[1], diversity_before=diversity(seen[name]), diversity_after=diversity(seen_after),
        classes_before=histogram(before[name]), classes_after=histogram(after), nearest_before=copies[0],
        nearest_after=copies[1],
        untuned={by: {"reward": float(r.mean()), "frechet": away[by]} for by, r in started.items()},
        grid_samples=grid_samples, grid=rows,
    )  # fmt: skip


def calls_of_evaluation(
    *, samples: int, headline: tuple[str, int], grid: Sequence[tuple[str, int]], grid_samples: int, kl_samples: int,
    batch: int,
) -> int:  # fmt: skip
    """Calls of the UNets in `evaluate` with these options, each at one image."""
    drawn = samples * headline[1] * (len(SAMPLERS) + 1) + 2 * grid_samples * sum(n for _, n in dict.fromkeys(grid))
    return drawn + calls_of_nats(min(samples, kl_samples), KL_STEPS)


@torch.no_grad()
def rewarded(reward: Reward, images: Tensor, device: torch.device, batch: int = 64) -> Tensor:
    """(n,), in float64."""
    parts = [ask(reward, part.to(device), [NO_PROMPT] * len(part)) for part in images.split(batch)]
    return torch.cat(parts).double().cpu()


def _gains(before: tuple[Tensor, Tensor], tuned: tuple[Tensor, Tensor], real: Moments) -> dict[str, float]:
    """Means before and after, of paired differences, and Frechet distances, of images and their rewards."""
    (_, first), (_, last) = before, tuned
    away, after = (frechet(Moments.of(features(images)), real) for images, _ in (before, tuned))
    gain = Estimate.of(last - first)
    return {
        "reward_before": float(first.mean()), "reward_after": float(last.mean()), "reward_gain": float(gain.mean),
        "reward_gain_se": float(gain.stderr), "frechet_before": away, "frechet_after": after,
    }  # fmt: skip
