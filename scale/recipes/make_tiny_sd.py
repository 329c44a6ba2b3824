"""Train the embedded Stable Diffusion: SD v1.5's classes and file formats, small enough to ship and to run on a CPU.

    python scale/recipes/make_tiny_sd.py --out scale/assets/tiny-sd

1. A tokenizer whose merges make one token of each word in a caption; other words are spelled.
2. An AutoencoderKL, 32 x 32 x 3 to 8 x 8 x 4 latents, on pictures of `scale.shapes`.
3. A UNet2DConditionModel and a CLIPTextModel together, on the latents and captions: eps-prediction on SD v1.5's
   schedule, weighted by min-SNR (Hang et al. 2023, arXiv 2303.09556), times stratified, one caption in ten left out for
   guidance (Ho & Salimans 2022, arXiv 2207.12598), weights averaged.

The captions of a few compositions (`shapes.DOUBTFUL`) are wrong half the time, so that the model follows them about
half the time: there a reward has something to teach. (Left out of training altogether, they are composed all the same:
98 % of them were drawn right.)

It writes the pipeline in half precision, and beside it `recipe.json`: settings, seconds, and how well it follows its
prompts.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it stands beside the package, not in it

from scale import shapes
from scale.models import load, readable

WORDS = (
    "a on and ground at the left right top bottom "
    + " ".join((*shapes.SIZES, *shapes.COLOURS, *shapes.SHAPES, *shapes.PATTERNS, *shapes.GROUNDS))
).split()
LENGTH = 16
"""Tokens of a prompt."""
TIMES = 1000


@dataclass(frozen=True)
class Recipe:
    """How the embedded model is made."""

    out: Path = Path("scale/assets/tiny-sd")
    """Where the pipeline goes."""
    pictures: int = 24_000
    """Pictures drawn, once."""
    vae_steps: int = 2400
    """Optimiser steps of the autoencoder."""
    vae_batch: int = 16
    """Pictures a step."""
    vae_lr: float = 3e-3
    """Its largest learning rate."""
    unet_steps: int = 4800
    """Optimiser steps of UNet and text encoder."""
    unet_batch: int = 64
    """Latents a step."""
    unet_lr: float = 2e-3
    """Their largest learning rate."""
    judged: int = 4
    """Times each prompt is drawn to be judged; the doubtful ones, of which there are fewer, three times as often."""
    seed: int = 0
    """Of everything that is drawn."""


# ------------------------------------------------------------------------------------------ the parts


def tokenizer() -> CLIPTokenizer:
    """Each of WORDS is one token: merges are added, the newest with the least priority, until it is."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(pieces := merged(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, merges=merges, model_max_length=LENGTH)


def merged(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): the pair that was merged first is merged first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while pairs := [p for p in merges if p in pairwise(pieces)]:
        i = list(pairwise(pieces)).index(pairs[0])
        pieces[i : i + 2] = ["".join(pairs[0])]
    return pieces


def text_encoder(words: int) -> CLIPTextModel:
    """64 wide, two layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=LENGTH, projection_dim=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip


def autoencoder() -> AutoencoderKL:
    """Two halvings, as 32 to 8."""
    return AutoencoderKL(
        block_out_channels=(32, 48, 64), layers_per_block=1, norm_num_groups=1, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )  # fmt: skip


def unet(channels: int = 4) -> UNet2DConditionModel:
    """Cross-attention at 4 x 4 and in the middle."""
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=4, layers_per_block=1, block_out_channels=(64, 80),
        norm_num_groups=8, cross_attention_dim=64, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def scheduler() -> PNDMScheduler:
    """SD v1.5's."""
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=TIMES, steps_offset=1,
        skip_prk_steps=True, set_alpha_to_one=False,
    )  # fmt: skip


def assembled(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, words: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """A pipeline of these."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=words, unet=unet, scheduler=scheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def untrained() -> StableDiffusionPipeline:
    """With the first weights."""
    words = tokenizer()
    return assembled(autoencoder(), text_encoder(len(words)), words, unet())


# ------------------------------------------------------------------------------------------ training


def schedule(parameters: Iterator[nn.Parameter], lr: float, steps: int) -> tuple[Any, Any]:
    """AdamW, warmed up over a twentieth of the steps, then a cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-2, betas=(0.9, 0.98))

    def factor(step: int) -> float:
        return min(1.0, 20 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vae(images: Tensor, recipe: Recipe, rng: torch.Generator) -> AutoencoderKL:
    """Absolute error, and a KL that only keeps the latents' size in bounds; then scaled to unit variance."""
    vae = autoencoder()
    optimizer, rates = schedule(vae.parameters(), recipe.vae_lr, recipe.vae_steps)
    bar = tqdm(range(recipe.vae_steps), "autoencoder")
    for step in bar:
        x = 2 * images[torch.randint(len(images), (recipe.vae_batch,), generator=rng)] - 1
        law = vae.encode(x).latent_dist
        back = vae.decode(law.mean + law.std * torch.randn(law.mean.shape, generator=rng)).sample
        loss = (back - x).abs().mean() + (back - x).square().mean() + 1e-6 * law.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 50 == 49:
            bar.set_postfix(dB=f"{psnr(x, back.detach()):.1f}")
    latents = encode(vae, images[:2048])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae.eval().requires_grad_(False)


def psnr(x: Tensor, y: Tensor) -> float:
    """In dB, of pictures in [-1, 1]."""
    return float(-10 * ((x - y.clamp(-1, 1)).square().mean() / 4).log10())


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Mean latents, not scaled."""
    return torch.cat([vae.encode(2 * part - 1).latent_dist.mean for part in images.split(256)])


def train_unet(latents: Tensor, tokens: Tensor, empty: Tensor, parts: nn.ModuleDict, recipe: Recipe,
               rng: torch.Generator) -> nn.ModuleDict:  # fmt: skip
    """UNet and text encoder, and their average, which is what comes back."""
    optimizer, rates = schedule(parts.parameters(), recipe.unet_lr, recipe.unet_steps)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    kept = scheduler().alphas_cumprod
    bar = tqdm(range(recipe.unet_steps), "UNet")
    for step in bar:
        pick = torch.randint(len(latents), (recipe.unet_batch,), generator=rng)
        words = torch.where(torch.rand(recipe.unet_batch, 1, generator=rng) < 0.1, empty, tokens[pick])
        shift = torch.rand((), generator=rng)
        k = ((torch.arange(recipe.unet_batch) + shift) * TIMES / recipe.unet_batch).long().clamp(max=TIMES - 1)
        noise, kept_k = torch.randn(latents[pick].shape, generator=rng), kept[k][:, None, None, None]
        x = kept_k.sqrt() * latents[pick] + (1 - kept_k).sqrt() * noise
        out = parts["unet"](x, k, encoder_hidden_states=parts["text_encoder"](words).last_hidden_state).sample
        snr = kept[k] / (1 - kept[k])
        loss = ((out - noise).square().mean((1, 2, 3)) * snr.clamp(max=5) / snr).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        rates.step()
        average.update_parameters(parts)
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss):.3f}")
    assert isinstance(average.module, nn.ModuleDict)
    return average.module.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ judging


def follows(pipeline: DiffusionPipeline, prompts: list[str], guidance: float, seed: int = 1,
            **options: Any) -> dict[str, float]:  # fmt: skip
    """The share of pictures that show what was asked for, and the mean score. options: of the pipeline's call."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.cat([
        torch.from_numpy(
            pipeline(prompts[i : i + 64], num_inference_steps=25, guidance_scale=guidance, generator=rng,
                     output_type="np", **options).images
        ).permute(0, 3, 1, 2)
        for i in range(0, len(prompts), 64)
    ])  # fmt: skip
    right = [shapes.judge(image, shapes.parse(prompt)).right for image, prompt in zip(images, prompts, strict=True)]
    return {"right": sum(right) / len(right), "score": float(shapes.following(images, prompts).mean())}


def scores(pipeline: DiffusionPipeline, times: int, **options: Any) -> dict[str, Any]:
    """At several guidances, on prompts of one object: those that are sure, and those that are doubtful."""
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {}
    for name, doubtful, n in (("sure", False, times), ("doubtful", True, 3 * times)):
        prompts = [str(scene) for scene in shapes.one_object(doubtful)] * n
        each = {str(w): follows(pipeline, prompts, w, **options) for w in (1.0, 3.0, 5.0)}
        found[name] = {"prompts": len(prompts), **each}
    return found


def save(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Files in half precision, under configs of float32: transformers, unlike diffusers, loads a text encoder in the
    precision that its config names, and a pipeline cannot mix both."""
    pipeline.save_pretrained(folder)
    for file in folder.glob("*/*.safetensors"):
        save_file({name: v.half() for name, v in load_file(file).items()}, file, {"format": "pt"})
    readable(folder)


def main(recipe: Recipe) -> None:
    """Draw, train, save, judge."""
    began = time.perf_counter()
    rng = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    captions = shapes.draw_scenes(recipe.pictures, rng)
    images, words = shapes.render([shapes.shown(scene, rng) for scene in captions], rng), tokenizer()
    vae = train_vae(images, recipe, rng)
    fresh, vae_seconds = shapes.render(shapes.draw_scenes(512, rng), rng), time.perf_counter()
    quality = psnr(2 * fresh - 1, vae.decode(encode(vae, fresh)).sample)
    latents = encode(vae, images) * vae.config.scaling_factor
    options: dict[str, Any] = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "pt"}
    tokens, empty = words([str(s) for s in captions], **options).input_ids, words([""], **options).input_ids
    parts = nn.ModuleDict({"unet": unet(), "text_encoder": text_encoder(len(words))})
    parts = train_unet(latents, tokens, empty, parts, recipe, rng)
    unet_seconds = time.perf_counter()
    save(assembled(vae, parts["text_encoder"], words, parts["unet"]), recipe.out)
    loaded = load(str(recipe.out))
    loaded.scheduler = DDIMScheduler.from_config({**loaded.scheduler.config, "clip_sample": False})
    report = {
        "recipe": {k: v for k, v in asdict(recipe).items() if k != "out"},
        "seconds": {"autoencoder": round(vae_seconds - began), "unet": round(unet_seconds - vae_seconds)},
        "autoencoder_dB": round(quality, 2),
        "parameters": {name: getattr(loaded, name).num_parameters() for name in ("unet", "vae", "text_encoder")},
        "megabytes": round(sum(f.stat().st_size for f in recipe.out.rglob("*.safetensors")) / 1e6, 2),
        "follows_its_prompts": scores(loaded, recipe.judged),
    }  # fmt: skip
    (recipe.out / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
