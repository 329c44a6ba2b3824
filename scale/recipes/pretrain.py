"""Train a small diffusion model of pictures, a `DDPMPipeline` as diffusers loads it, from nothing.

    python scale/cifar10.py pretrain --data data --download --out runs/cifar10-model

v-prediction (Salimans & Ho 2022, arXiv 2202.00512) on DDPM's linear betas, weighted by min-SNR (Hang et al. 2023, arXiv
2303.09556), times stratified, pictures flipped at random, weights averaged. The learning rate is warmed up, stays, and
falls to zero over the last fifth, so that a run may be gone on with for longer from where it had not begun to fall.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from ctrl.fields import check_fields
from ctrl.noise import INITIAL, Noise
from ctrl.training.device import check_device, make_accelerator
from scale import data, report
from scale.models import readable

TIMES = 1000
PROGRESS = "progress.json"
FALL = 0.2
"""Part of the run over which the learning rate falls."""
LIMITS = {
    **dict.fromkeys(("layers", "steps", "batch", "checkpoint_every", "attention_at"), ">= 1"), "lr": "> 0",
    "ema": "in [0, 1)", "seed": ">= 0",
}  # fmt: skip


@dataclass(frozen=True)
class Pretrain:
    """A model of one's own pictures, trained from nothing. The defaults are the embedded model's."""

    data: Path = Path("data")
    """CIFAR-10 in any of its layouts, or a folder of pictures of one size."""
    download: bool = False
    """Fetch CIFAR-10 to `data` first."""
    out: Path = Path("runs/cifar10-model")
    """Where the pipeline goes."""
    channels: tuple[int, ...] = (16, 48, 96, 128)
    """Of the UNet at each resolution, the picture's own first, each multiples of 8."""
    layers: int = 1
    """Residual blocks at each resolution."""
    attention_at: int = 8
    """The side at which there is attention."""
    steps: int = 2400
    """Optimiser steps."""
    batch: int = 64
    """Pictures a step, over all processes."""
    lr: float = 1.5e-3
    """The largest learning rate, for AdamW."""
    ema: float = 0.999
    """Decay a step of the averaged weights, which are those kept."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the arithmetic; weights are float32."""
    checkpoint_every: int = 500
    """Steps between checkpoints, and between grids of pictures."""
    resume: bool = False
    """Go on from the last checkpoint."""
    seed: int = 0
    """Of everything that is drawn."""

    def __post_init__(self) -> None:
        check_fields(self, LIMITS)
        if not self.channels or any(c < 8 or c % 8 for c in self.channels):
            raise ValueError(f"channels must be multiples of 8, got {self.channels}")


def unet_of(s: Pretrain, side: int) -> UNet2DModel:
    """Attention at one resolution and in the middle."""
    if side % 2 ** (len(s.channels) - 1):
        raise ValueError(f"channels: pictures of {side} x {side} cannot be halved {len(s.channels) - 1} times")
    attend = [side // 2**i == s.attention_at for i in range(len(s.channels))]
    attending = [c for c, a in zip(s.channels, attend, strict=True) if a] + [s.channels[-1]]
    return UNet2DModel(
        sample_size=side, in_channels=3, out_channels=3, layers_per_block=s.layers, block_out_channels=s.channels,
        norm_num_groups=8, attention_head_dim=min(32, *attending),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attend),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attend)),
    )  # fmt: skip


def scheduler() -> DDPMScheduler:
    """Linear betas, as google/ddpm-cifar10-32 has them; a few steps begin at the last timestep."""
    return DDPMScheduler(
        num_train_timesteps=TIMES, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", variance_type="fixed_small",
        prediction_type="v_prediction", clip_sample=True, timestep_spacing="trailing",
    )  # fmt: skip


def factor(steps: int) -> Callable[[int], float]:
    """Of the learning rate: up over a fiftieth of the run, level, and down to zero."""
    return lambda step: min(1.0, 50 * (step + 1) / steps, (steps - step) / (FALL * steps))


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """Over about the last ninth of what there is at first, then with this decay."""

    @torch.no_grad()
    def move(average: list[Tensor], new: list[Tensor], n: Tensor) -> None:
        torch._foreach_lerp_(average, new, 1 - min(decay, (1 + int(n)) / (10 + int(n))))

    return move


def loss_of(unet: nn.Module, kept: Tensor, x0: Tensor, k: Tensor, noise: Tensor) -> Tensor:
    """min(snr, 5)/(snr + 1) |v_theta - v|², (B,), at timesteps k, (B,); kept is alpha²."""
    a2 = kept[k][:, None, None, None]
    x, v = a2.sqrt() * x0 + (1 - a2).sqrt() * noise, a2.sqrt() * noise - (1 - a2).sqrt() * x0
    snr = kept[k] / (1 - kept[k])
    out = unet(x, k, return_dict=False)[0].float()
    return (out - v).square().mean((1, 2, 3)) * snr.clamp(max=5) / (snr + 1)


def batch_of(pictures: data.Pictures, s: Pretrain, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, timesteps, one in each of B equal parts, and noise of a step, whatever was drawn before."""
    rng = torch.Generator().manual_seed(s.seed * 1_000_003 + step)
    index = torch.randint(len(pictures), (s.batch,), generator=rng)
    x0 = pictures.batch(index, torch.rand(s.batch, generator=rng) < 0.5)
    k = (torch.arange(s.batch) + torch.rand((), generator=rng)) * TIMES / s.batch
    return x0, k.long().clamp(max=TIMES - 1), torch.randn(x0.shape, generator=rng)


def pretrain(s: Pretrain) -> DDPMPipeline:
    """Train, with checkpoints and pictures on the way, and save the pipeline in half precision."""
    last = s.out / "checkpoint"
    if s.out.exists() and not s.resume:
        raise ValueError(f"out: {s.out} is there already; go on with --resume, or take another folder")
    if s.resume and not last.is_dir():
        raise ValueError(f"resume: {s.out} has no checkpoint to go on from")
    progress = json.loads((last / PROGRESS).read_text()) if s.resume else {"step": 0, "seconds": 0.0}
    check_resumed(s, progress)
    accelerator = make_accelerator(mixed_precision=None if s.precision == "no" else s.precision)
    check_device(accelerator)
    if s.batch < accelerator.num_processes:
        raise ValueError(f"batch must be at least one for each of {accelerator.num_processes} processes, got {s.batch}")
    with accelerator.main_process_first():
        pictures = data.read_or_download(s.data, s.download)
    torch.manual_seed(s.seed)
    unet, noising = unet_of(s, pictures.pixels.shape[-1]), scheduler()
    average = AveragedModel(unet, multi_avg_fn=averaging(s.ema)).to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=s.lr, weight_decay=1e-2, betas=(0.9, 0.98))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, factor(s.steps))
    model, optimizer = accelerator.prepare(unet, optimizer)
    accelerator.register_for_checkpointing(average, rates)
    if s.resume:
        accelerator.load_state(last)
    first = progress["step"]
    kept, began = noising.alphas_cumprod.to(accelerator.device), time.monotonic() - progress["seconds"]
    mine = slice(accelerator.process_index, None, accelerator.num_processes)
    bar = tqdm(range(first, s.steps), "model", initial=first, total=s.steps, disable=not accelerator.is_main_process)
    for step in bar:
        x0, k, noise = (v[mine].to(accelerator.device) for v in batch_of(pictures, s, step))
        loss = loss_of(model, kept, x0, k, noise).mean()
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        average.update_parameters(unet)
        if step % 25 == 24:
            bar.set_postfix(loss=f"{float(loss):.4f}")
        if (step + 1) % s.checkpoint_every == 0 or step + 1 == s.steps:
            keep(s, accelerator, average.module, step + 1, time.monotonic() - began)
    pipeline = DDPMPipeline(average.module.eval(), scheduler())
    if accelerator.is_main_process:
        save(s, pipeline, time.monotonic() - began)
    accelerator.wait_for_everyone()
    return pipeline


def check_resumed(s: Pretrain, progress: dict[str, Any]) -> None:
    """Raise unless a run that is gone on with is made as it was, but for its length, before its rate began to fall."""
    for name, before in progress.get("recipe", {}).items():
        now = recipe(s)[name]
        level = progress["step"] <= (1 - FALL) * min(before, now) if name == "steps" else False
        if now != before and not level:
            hint = ": its learning rate has begun to fall" if name == "steps" else ""
            raise ValueError(f"{name} is {now}, and was {before} in {s.out}{hint}; resume with the same")


def keep(s: Pretrain, accelerator: Accelerator, average: nn.Module, step: int, seconds: float) -> None:
    """A checkpoint in place of the last one, and what the model draws now, always from the same noise."""
    part, last, old = (s.out / f"checkpoint{end}" for end in (".part", "", ".old"))
    accelerator.save_state(part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (part / PROGRESS).write_text(json.dumps({"step": step, "seconds": seconds, "recipe": recipe(s)}))
        if last.exists():
            os.replace(last, old)
        os.replace(part, last)
        shutil.rmtree(old, ignore_errors=True)
        report.keep(report.grid(drawn(average, range(32))), s.out / "pictures" / f"step-{step:07d}.png")
    accelerator.wait_for_everyone()


@torch.no_grad()
def drawn(unet: Any, ids: Sequence[int], steps: int = 25) -> Tensor:
    """Pictures in [0, 1], (n, 3, H, W), by DDIM."""
    box = DDIMScheduler.from_config(scheduler().config)
    box.set_timesteps(steps)
    size = unet.config.sample_size
    x = Noise(0).normal(torch.tensor(ids), (3, size, size), INITIAL).to(unet.device, unet.dtype)
    for k in box.timesteps:
        x = box.step(unet(x, k).sample, k, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1).cpu()


def save(s: Pretrain, pipeline: DDPMPipeline, seconds: float) -> None:
    """In half precision, readable by everyone, with its recipe; what is handed in is rounded to it too."""
    pipeline.to(torch.float16).save_pretrained(s.out, safe_serialization=True)
    pipeline.to(torch.float32)
    readable(s.out)
    told = {"recipe": recipe(s), "seconds": round(seconds), "parameters": pipeline.unet.num_parameters()}
    (s.out / "recipe.json").write_text(json.dumps(told, indent=2) + "\n")


def recipe(s: Pretrain) -> dict[str, Any]:
    """What makes the model what it is."""
    left = ("data", "out", "resume", "download", "checkpoint_every")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(s).items() if k not in left}
