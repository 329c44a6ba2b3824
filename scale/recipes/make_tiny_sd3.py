"""Train the embedded Stable Diffusion 3: its classes and file formats, small enough to ship and to run on a CPU.

    python scale/recipes/make_tiny_sd3.py --out scale/assets/tiny-sd3

1. The tokenizer of `make_tiny_sd`, for both text encoders, and the autoencoder that it trained.
2. An SD3Transformer2DModel and two CLIPTextModelWithProjection together, on latents and captions of `scale.shapes`: a
   rectified flow (Esser et al. 2024, arXiv 2403.03206). x = (1 - s) x0 + s eps, and eps - x0 is predicted at time
   1000 s; s is logit-normal and stratified, one caption in ten is left out for guidance (Ho & Salimans 2022,
   arXiv 2207.12598), weights are averaged.

There is no T5. The pipeline puts zeros in place of its states: 256 unless `max_sequence_length` says otherwise, as many
as a prompt has tokens in older diffusers. Tokens that are alike stay alike, so that one of them, counted often enough,
stands for all (`Counted`). How often is drawn anew for each picture, from 0 to 512, so that the model draws as well
with any number of them: with `max_sequence_length=0` it is fastest.

The captions of a few compositions (`shapes.DOUBTFUL`) are wrong half the time, as they are in `make_tiny_sd`.

It writes the pipeline in half precision, and beside it `recipe.json`: settings, seconds, and how well it follows its
prompts. To load it, diffusers must be told that there is no T5: `text_encoder_3=None, tokenizer_3=None`.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it stands beside the package, not in it

from scale import shapes
from scale.recipes.make_tiny_sd import LENGTH, TIMES, autoencoder, encode, follows, save, schedule, scores, tokenizer

WIDTHS = (48, 64)
"""Of the two text encoders."""
POOLED = (32, 48)
"""Of what each makes of a whole prompt."""
LAYERS = (3, 2)
"""The last of them serves the pooled vector alone: the pipeline takes the states before it."""
MOST = 512
"""Zeros that the pipeline can be asked for."""
TRAINED = ("transformer", "text_encoder", "text_encoder_2")
"""The pipeline's parts that are trained here."""


@dataclass(frozen=True)
class Recipe:
    """How the embedded model is made."""

    out: Path = Path("scale/assets/tiny-sd3")
    """Where the pipeline goes."""
    vae: Path = Path("scale/assets/tiny-sd")
    """Whose autoencoder it takes."""
    pictures: int = 24_000
    """Pictures drawn, once."""
    steps: int = 4800
    """Optimiser steps."""
    batch: int = 64
    """Latents a step."""
    lr: float = 1.5e-3
    """The largest learning rate."""
    logit_mean: float = 0.5
    """Of log s / (1 - s): above 0, since the sampler's shift of 3 takes most steps where there is much noise."""
    logit_std: float = 1.5
    """Its standard deviation: 3 in 100 times are above .98, where sampling begins."""
    judged: int = 4
    """Times each prompt is drawn to be judged; the doubtful ones, of which there are fewer, three times as often."""
    seed: int = 0
    """Of everything that is drawn."""


# ------------------------------------------------------------------------------------------ the parts


def text_encoder(words: int, which: int) -> CLIPTextModelWithProjection:
    """The first or the second."""
    encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=words, hidden_size=WIDTHS[which], intermediate_size=2 * WIDTHS[which],
            num_hidden_layers=LAYERS[which], num_attention_heads=4, max_position_embeddings=LENGTH,
            projection_dim=POOLED[which], bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    for name, table in encoder.named_parameters():
        if "embedding" in name:  # CLIP's .02 would drown beside the biases: these states are not normalised
            nn.init.normal_(table, std=0.5)
    return encoder


def transformer(channels: int = 4) -> SD3Transformer2DModel:
    """A picture is 16 tokens, of 2 x 2 latents each. Each block, and the whole, begins with doing nothing."""
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=4, num_layers=5, num_attention_heads=4,
        attention_head_dim=32, joint_attention_dim=sum(WIDTHS), caption_projection_dim=128,
        pooled_projection_dim=sum(POOLED), pos_embed_max_size=4,
    )  # fmt: skip
    gates = [block.norm1.linear for block in model.transformer_blocks]
    gates += [block.norm1_context.linear for block in model.transformer_blocks if not block.context_pre_only]
    for layer in (*gates, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def assembled(vae: AutoencoderKL, words: CLIPTokenizer, parts: nn.ModuleDict) -> StableDiffusion3Pipeline:
    """A pipeline of these. Its formula for decoding needs a number for shift_factor, which older autoencoders lack."""
    vae.register_to_config(shift_factor=0.0)
    return StableDiffusion3Pipeline(
        vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMES, shift=3.0), tokenizer=words,
        tokenizer_2=words, tokenizer_3=None, text_encoder_3=None, **parts,
    )  # fmt: skip


def untrained_parts(words: int) -> nn.ModuleDict:
    """By their names."""
    made = (transformer(), text_encoder(words, 0), text_encoder(words, 1))
    return nn.ModuleDict(dict(zip(TRAINED, made, strict=True)))


def untrained() -> StableDiffusion3Pipeline:
    """With the first weights."""
    words = tokenizer()
    return assembled(autoencoder(), words, untrained_parts(len(words)))


# ------------------------------------------------------------------------------------------ training


class Counted:
    """Joint attention of image and text, as the transformer's own, but that tokens can count more than once: to be seen
    n times is to be seen once with log n added to the score."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """attention_mask: log n of each token."""
        image = (attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states))
        given = encoder_hidden_states
        text = (attn.add_q_proj(given), attn.add_k_proj(given), attn.add_v_proj(given))
        both = (torch.cat(pair, 1) for pair in zip(image, text, strict=True))
        both = [part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in both]
        seen = functional.scaled_dot_product_attention(*both, attn_mask=attention_mask).transpose(1, 2).flatten(2)
        of_image, of_text = seen.split([hidden_states.shape[1], given.shape[1]], 1)
        return attn.to_out[0](of_image), of_text if attn.context_pre_only else attn.to_add_out(of_text)


def velocity(parts: nn.ModuleDict, x: Tensor, s: Tensor, tokens: Tensor, zeros: Tensor) -> Tensor:
    """What the pipeline would compute with `zeros` (n,) in place of a T5's states, by Counted. tokens: (n, LENGTH)."""
    encoded = [parts[name](tokens, output_hidden_states=True) for name in TRAINED[1:]]
    states = torch.cat([part.hidden_states[-2] for part in encoded], -1)
    pooled = torch.cat([part.text_embeds for part in encoded], -1)
    of_image = x[0, 0].numel() // parts["transformer"].config.patch_size ** 2
    count = x.new_zeros(len(x), 1, 1, of_image + LENGTH + 1)
    count[..., -1] = zeros.log()[:, None, None]
    return parts["transformer"](
        x, timestep=TIMES * s, encoder_hidden_states=functional.pad(states, (0, 0, 0, 1)), pooled_projections=pooled,
        joint_attention_kwargs={"attention_mask": count}, return_dict=False,
    )[0]  # fmt: skip


def train(latents: Tensor, tokens: Tensor, empty: Tensor, parts: nn.ModuleDict, recipe: Recipe,
          rng: torch.Generator) -> nn.ModuleDict:  # fmt: skip
    """Transformer and text encoders, and their average, which is what comes back."""
    parts["transformer"].set_attn_processor(Counted())
    optimizer, rates = schedule(parts.parameters(), recipe.lr, recipe.steps)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    bar = tqdm(range(recipe.steps), "transformer")
    for step in bar:
        pick = torch.randint(len(latents), (recipe.batch,), generator=rng)
        words = torch.where(torch.rand(recipe.batch, 1, generator=rng) < 0.1, empty, tokens[pick])
        zeros = (MOST + 1) ** torch.rand(recipe.batch, generator=rng) - 1
        u = (torch.arange(recipe.batch) + torch.rand(recipe.batch, generator=rng)) / recipe.batch
        s = (recipe.logit_mean + recipe.logit_std * torch.special.ndtri(u)).sigmoid()
        noise, level = torch.randn(latents[pick].shape, generator=rng), s[:, None, None, None]
        out = velocity(parts, (1 - level) * latents[pick] + level * noise, s, words, zeros)
        loss = (out - (noise - latents[pick])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        rates.step()
        average.update_parameters(parts)
        if step % 50 == 49:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
    assert isinstance(average.module, nn.ModuleDict)
    return average.module.eval().requires_grad_(False)


def tokenized(words: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """(n, LENGTH)."""
    return words(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids


# ------------------------------------------------------------------------------------------ judging


@torch.no_grad()
def apart(pipeline: StableDiffusion3Pipeline, prompts: list[str], zeros: int) -> float:
    """The largest difference between `velocity`, which is trained, and what the pipeline computes."""
    rng = torch.Generator().manual_seed(0)
    x, s = torch.randn(len(prompts), 4, 8, 8, generator=rng), torch.rand(len(prompts), generator=rng)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=zeros
    )
    theirs = pipeline.transformer(
        x, timestep=TIMES * s, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
    )[0]
    count = torch.full((len(prompts),), float(embeds.shape[1] - LENGTH))
    own = pipeline.transformer.attn_processors
    pipeline.transformer.set_attn_processor(Counted())
    parts = nn.ModuleDict({name: getattr(pipeline, name) for name in TRAINED})
    ours = velocity(parts, x, s, tokenized(pipeline.tokenizer, prompts), count)
    pipeline.transformer.set_attn_processor(own)
    return float((ours - theirs).abs().max())


def judged(recipe: Recipe, seconds: float) -> dict[str, Any]:
    """What is told of a pipeline that was saved. It is drawn without zeros, and once, to compare, with 256."""
    loaded = StableDiffusion3Pipeline.from_pretrained(recipe.out, text_encoder_3=None, tokenizer_3=None)
    sure = [str(scene) for scene in shapes.one_object(doubtful=False)]
    return {
        "recipe": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(recipe).items() if k != "out"},
        "seconds": round(seconds),
        "parameters": {name: getattr(loaded, name).num_parameters() for name in (*TRAINED, "vae")},
        "megabytes": round(sum(f.stat().st_size for f in recipe.out.rglob("*.safetensors")) / 1e6, 2),
        "apart_from_the_pipeline": apart(loaded, sure, 256),
        "follows_its_prompts": scores(loaded, recipe.judged, max_sequence_length=0),
        "with_256_zeros": {"3.0": follows(loaded, sure, 3.0, max_sequence_length=256)},
    }


# ------------------------------------------------------------------------------------------ all of it


def main(recipe: Recipe) -> None:
    """Draw, train, save, judge."""
    began = time.perf_counter()
    rng = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    captions = shapes.draw_scenes(recipe.pictures, rng)
    images, words = shapes.render([shapes.shown(scene, rng) for scene in captions], rng), tokenizer()
    vae = AutoencoderKL.from_pretrained(recipe.vae, subfolder="vae").eval().requires_grad_(False)
    latents = encode(vae, images) * vae.config.scaling_factor
    tokens, empty = tokenized(words, [str(scene) for scene in captions]), tokenized(words, [""])
    parts = train(latents, tokens, empty, untrained_parts(len(words)), recipe, rng)
    seconds = time.perf_counter() - began
    save(assembled(vae, words, parts), recipe.out)
    report = judged(recipe, seconds)
    (recipe.out / "recipe.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
