"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752): a UNet, one text encoder, eps or v."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import StableDiffusionPipeline

from scale.families.base import Encoded, Family, Widths


class StableDiffusion(Family):
    """The UNet is given the last states of the text encoder. The safety checker, which would black out pictures in
    training, stays out."""

    title = "Stable Diffusion 1.x or 2.x"
    pipeline = StableDiffusionPipeline
    encoders = ("text_encoder",)
    left_out = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}  # noqa: RUF012
    companions = ("safety_checker", "feature_extractor")

    def encode(self, pipeline: Any, texts: Sequence[str]) -> Encoded:
        encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
        tokens = tokenizer(
            list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        states = encoder(tokens.to(encoder.device))
        embeds = states.last_hidden_state
        return Encoded(embeds, embeds.new_zeros(len(embeds), 0), states.pooler_output)

    def widths(self, outline: Any) -> Widths:
        text = outline.text_encoder.config
        return Widths(text.max_position_embeddings, text.hidden_size, 0, text.hidden_size)

    def whole(self, pipeline: Any, companions: Mapping[str, Any]) -> Any:
        parts = {**pipeline.components, **companions}
        return self.pipeline(**parts, requires_safety_checker="safety_checker" in companions)

    def check(self, name: str, outline: Any) -> None:
        self.check_latents(name, outline)
        if outline.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                f"model: {name} is distilled to few steps (time_cond_proj_dim is set): it is not the score of a process"
            )
        sides = outline.unet.config.sample_size
        if not (isinstance(sides, int) or (isinstance(sides, list | tuple) and len(sides) == 2)):
            raise ValueError(f"model: the UNet of {name} must have a sample_size, a number or two, got {sides!r}")
