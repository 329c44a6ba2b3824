"""Load a pipeline of any family that is known, or say what is wrong with what was asked for, before any training.

    pipeline = load("stable-diffusion-v1-5/stable-diffusion-v1-5")      # a hub name, or a folder in diffusers' format

Weights come from safetensors alone, and in float32: they are what is trained. What training has no part in, such as a
safety checker, stays out.
"""

from __future__ import annotations

import dataclasses
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scale.diffusion import PREDICTIONS
from scale.families import FAMILIES, Family, Widths, family_of

SD15_UNET: dict[str, Any] = {
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "cross_attention_dim": 768,
    "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
"""SD v1.5's architecture, for checks and measurements at full size without its weights."""


def load(name: str, revision: str | None = None, variant: str | None = None, **options: Any) -> Any:
    """The pipeline, checked. options: of its family."""
    found = outline(name, revision, variant, **options)
    family = found.family
    try:
        pipeline = family.pipeline.from_pretrained(
            name,
            use_safetensors=True,
            variant=variant,
            revision=revision,
            **family.left_out,
            **family.absent(found),
        )
    except OSError as wrong:
        raise ValueError(not_there(name, variant, wrong)) from wrong
    except ValueError as wrong:
        if variant and "variant" in str(wrong):
            raise ValueError(no_variant(name, variant)) from wrong
        raise
    pipeline.family = family
    return pipeline.to(torch.float32)  # transformers keeps the precision of the file


def companions(
    pipeline: Any, name: str, revision: str | None = None, variant: str | None = None
) -> dict[str, Any]:  # fmt: skip
    """What the model has and was not loaded with, such as a safety checker, in host memory. Where it cannot be loaded a
    warning says so, and the pipeline goes without."""
    family = family_of(pipeline)
    index = family.pipeline.load_config(name, revision=revision)
    there = [part for part in family.companions if (index.get(part) or [None])[0]]
    if not there:
        return {}
    parts = {part: v for part, v in pipeline.components.items() if part not in there}
    try:
        whole = family.pipeline.from_pretrained(
            name, revision=revision, variant=variant, use_safetensors=True, **parts
        ).to(torch.float32)  # fmt: skip
    except (OSError, ValueError, ImportError, AttributeError) as wrong:  # of a file, of a class
        first = str(wrong).strip().splitlines()[0]
        warnings.warn(f"model: {name} is saved without its {' and '.join(there)}: {first}", stacklevel=2)
        return {}
    return {part: getattr(whole, part) for part in there}


def readable(folder: Path) -> None:
    """Let everyone read a folder's weights: safetensors come as the writer's alone."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)


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


# ------------------------------------------------------------------------------------------ what can be wrong


@dataclass(frozen=True)
class Outline:
    """A pipeline as its configs have it, without weights: the networks are on the meta device, and cannot be called.

    Attributes:
        family: as which it would be loaded.
        parts: by their names in a pipeline, which are attributes too; None is one that is absent.
        widths: of what its text encoders make of a prompt.
    """

    family: Family
    parts: Mapping[str, Any]
    widths: Widths

    def __getattr__(self, name: str) -> Any:
        if name != "parts" and name in self.parts:
            return self.parts[name]
        raise AttributeError(name)

    def replace(self, **parts: Any) -> Outline:
        """With other parts."""
        return dataclasses.replace(self, parts={**self.parts, **parts})


def outline(name: str, revision: str | None = None, variant: str | None = None, **options: Any) -> Outline:
    """Raise at what is wrong with a model's kind, files and configs, before its weights are loaded. options: of its
    family."""
    check_place(name)
    try:
        index = DiffusionPipeline.load_config(name, revision=revision)
        family = family_named(name, index.get("_class_name"), options)
        encoders = [part for part in family.encoders if part not in family.optional or (index.get(part) or [None])[0]]
        needed = [family.network, "vae", *encoders]
        if os.path.isdir(name):
            folders = ["scheduler", *needed, *(e.replace("text_encoder", "tokenizer") for e in encoders)]
            if missing := [part for part in sorted(folders) if not (Path(name) / part).is_dir()]:
                raise ValueError(f"model: the folder {name} lacks {', '.join(missing)}; copy it again")
            check_weights([Path(name) / part for part in needed], variant)
        with init_empty_weights():
            parts = {part: empty(index, part, name, part, revision) for part in needed}
        parts["scheduler"] = empty(index, "scheduler", name, "scheduler", revision)
    except OSError as wrong:
        raise ValueError(not_there(name, variant, wrong)) from wrong
    found = Outline(family, dict.fromkeys(family.encoders) | parts, Widths())
    family.check(name, found)
    check_prediction(name, family.prediction(found.scheduler))
    return dataclasses.replace(found, widths=family.widths(found))


def family_named(name: str, kind: str | None, options: Mapping[str, Any]) -> Family:
    """The family of a pipeline of a model, by the class in its model_index.json."""
    known = {kind: family for kind, family in FAMILIES.items() if family.encoders}
    if kind not in known:
        titles = ", ".join(family.title for family in known.values())
        raise ValueError(f"model must be one of {titles}; {name} is a {kind}")
    return known[kind](**known[kind].own(options))


def check_place(name: str) -> None:
    """Raise unless a name is a folder in diffusers' format, or could be one of the hub's."""
    if os.path.exists(name):
        if not os.path.isfile(os.path.join(name, "model_index.json")):
            hint = " (a single .safetensors or .ckpt file must be converted to a folder first)"
            raise ValueError(
                f"model must be a folder in diffusers' format; {name} has no model_index.json"
                f"{hint if os.path.isfile(name) else ''}"
            )
        return
    try:
        validate_repo_id(name)
    except HFValidationError as wrong:
        raise ValueError(f"model: there is no folder {name}") from wrong


def check_weights(folders: Sequence[Path], variant: str | None, kinds: Sequence[str] = (".safetensors",)) -> None:
    """Raise unless each folder has weights that are read, of the variant or, beside others of the variant, of none."""
    found = {folder: _variants(folder, kinds) for folder in folders}
    for folder, there in found.items():
        if not there:
            raise ValueError(f"model: {folder} has no weights in {' or '.join(kinds)}; {SAFE}")
        if not there & {"", variant}:
            raise ValueError(f"model: {folder} has weights of variant {min(there)} alone: pass --variant {min(there)}")
    if variant and not any(variant in there for there in found.values()):
        raise ValueError(no_variant(str(folders[0].parent), variant))


def _variants(folder: Path, kinds: Sequence[str]) -> set[str]:
    """Of the weights in a folder: fp16 of NAME.fp16.safetensors, and "" of NAME.safetensors, in pieces or not."""
    stems = (file.name.removesuffix(file.suffix) for file in folder.iterdir() if file.suffix in kinds)
    return {re.sub(r"-\d{5}-of-\d{5}", "", stem).partition(".")[2] for stem in stems}


def empty(index: dict[str, Any], part: str, name: str, subfolder: str | None, revision: str | None) -> Any:
    """A part of a pipeline by its config alone; its class must be one of diffusers' or transformers'."""
    library, kind = index[part]
    made = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), kind, None)
    if made is None:
        raise ValueError(f"model: the {part} of {name} is a {library}.{kind}, which diffusers does not have")
    if library == "transformers":
        return made(made.config_class.from_pretrained(name, subfolder=subfolder, revision=revision))
    return made.from_config(made.load_config(name, subfolder=subfolder, revision=revision))


def check_prediction(name: str, prediction: str) -> None:
    """Raise unless what the network predicts is known here."""
    if prediction not in PREDICTIONS:
        raise ValueError(f"model: {name} predicts {prediction!r}; only 'epsilon' and 'v_prediction' are known here")


SAFE = "safetensors are needed, pickles are not read"


def no_variant(name: str, variant: str) -> str:
    """What to do without it."""
    return f"variant {variant!r}: {name} has no such weights; leave variant out"


def not_there(name: str, variant: str | None, wrong: OSError, hint: str = SAFE) -> str:
    """What to do about a model that could not be loaded; the hint is for a folder that is there."""
    first = str(wrong).strip().splitlines()[0]
    if os.path.exists(name):
        files = f" for variant {variant!r}" if variant else ""
        return f"model: {name} is not whole{files} ({first}); {hint}"
    return (
        f"model: there is no folder {name}, and the hub's could not be loaded ({first}). Is the name right? Where "
        f"there is no network, run `hf download {name}` on a machine that has one, and give the folder it prints"
    )
