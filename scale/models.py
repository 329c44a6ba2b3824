"""Load a Stable Diffusion 1.x or 2.x pipeline, or say what is wrong with what was asked for, before any training.

    pipeline = load("stable-diffusion-v1-5/stable-diffusion-v1-5")      # a hub name, or a folder in diffusers' format

Weights come from safetensors alone, and in float32: they are what is trained. The safety checker, which would black out
pictures in training, stays out.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD15_UNET: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
"""SD v1.5's architecture, for checks and measurements at full size without its weights."""
PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
COMPANIONS = ("safety_checker", "feature_extractor")
"""What a pipeline is saved with and training has no part in."""


def load(name: str, revision: str | None = None, variant: str | None = None) -> StableDiffusionPipeline:
    """The pipeline, checked."""
    where = Path(name)
    if where.exists():
        _check_folder(where)
    options = {"revision": revision} if revision else {}
    try:
        index = StableDiffusionPipeline.load_config(name, **options)
        _check_kind(name, index)
        pipeline = StableDiffusionPipeline.from_pretrained(
            name, use_safetensors=True, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            variant=variant, **options,
        )  # fmt: skip
    except OSError as wrong:
        raise ValueError(not_there(name, where, variant, wrong)) from wrong
    except ValueError as wrong:
        if variant and "variant" in str(wrong):
            raise ValueError(f"variant {variant!r}: {name} has no such weights; leave variant out") from wrong
        raise
    _check_parts(name, pipeline)
    return pipeline.to(torch.float32)  # transformers keeps the precision of the file


def companions(
    pipeline: StableDiffusionPipeline, name: str, revision: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """The model's safety checker and feature extractor, in host memory, if it has them. Where they cannot be loaded a
    warning says so, and the pipeline goes without."""
    index = StableDiffusionPipeline.load_config(name, revision=revision)
    there = [part for part in COMPANIONS if (index.get(part) or [None])[0]]
    if not there:
        return {}
    parts = {part: v for part, v in pipeline.components.items() if part not in there}
    try:
        whole = StableDiffusionPipeline.from_pretrained(
            name, revision=revision, variant=variant, use_safetensors=True, **parts
        ).to(torch.float32)  # fmt: skip
    except (OSError, ValueError, ImportError, AttributeError) as wrong:  # of a file, of a class
        first = str(wrong).strip().splitlines()[0]
        warnings.warn(f"model: {name} is saved without its {' and '.join(there)}: {first}", stacklevel=2)
        return {}
    return {part: getattr(whole, part) for part in there}


def untrained(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    """SD v1.5's architecture at full size, with random weights and a tokenizer of any vocabulary."""
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
        vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, UNet2DConditionModel.from_config(SD15_UNET), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _check_folder(where: Path) -> None:
    if not (where / "model_index.json").is_file():
        hint = " (a single .safetensors or .ckpt file must be converted to a folder first)" if where.is_file() else ""
        raise ValueError(f"model must be a folder in diffusers' format; {where} has no model_index.json{hint}")
    if missing := [part for part in PARTS if not (where / part).is_dir()]:
        raise ValueError(f"model: the folder {where} lacks {', '.join(missing)}; copy it again")


def _check_kind(name: str, index: Any) -> None:
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if kind != "StableDiffusionPipeline":
        raise ValueError(f"model must be a StableDiffusionPipeline, SD 1.x or 2.x; {name} is a {kind}")


def _check_parts(name: str, pipeline: StableDiffusionPipeline) -> None:
    if (channels := pipeline.unet.config.in_channels) != pipeline.vae.config.latent_channels:
        raise ValueError(
            f"model: the UNet of {name} takes {channels} channels where its VAE makes "
            f"{pipeline.vae.config.latent_channels}: a model for inpainting needs more than text"
        )
    check_prediction(name, pipeline)


def check_prediction(name: str, pipeline: DiffusionPipeline) -> None:
    """Raise unless the network predicts what is known here."""
    prediction = pipeline.scheduler.config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"model: {name} predicts {prediction!r}; only 'epsilon' and 'v_prediction' are known here")


SAFE = "safetensors are needed, pickles are not read"


def not_there(name: str, where: Path, variant: str | None, wrong: OSError, hint: str = SAFE) -> str:
    """What to do about a model that cannot be had; the hint is for a folder that is there."""
    first = str(wrong).strip().splitlines()[0]
    if where.exists():
        files = f" for variant {variant!r}" if variant else ""
        return f"model: {where} is not whole{files} ({first}); {hint}"
    return (
        f"model: {name} cannot be had ({first}). Is the name right? Where there is no network, run "
        f"`hf download {name}` on a machine that has one, and give the folder it prints"
    )
