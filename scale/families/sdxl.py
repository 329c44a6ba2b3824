"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952): two text encoders, sizes as conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn

from scale.families.base import Encoded, Widths, vae_factor
from scale.families.stable_diffusion import StableDiffusion

SIZES = 6
"""Numbers that say which size the image was cut from, where, and which size it has."""


class StableDiffusionXL(StableDiffusion):
    """The UNet is given the last states but one of both text encoders, the second one's pooled vector, and sizes:
    those of its images, not cut."""

    title = "Stable Diffusion XL"
    pipeline = StableDiffusionXLPipeline
    encoders = ("text_encoder", "text_encoder_2")
    left_out = {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}  # noqa: RUF012
    companions = ()

    def encode(self, pipeline: Any, texts: Sequence[str]) -> Encoded:
        embeds, _, pooled, _ = pipeline.encode_prompt(list(texts), do_classifier_free_guidance=False)
        height, width = (vae_factor(pipeline.vae) * side for side in self.sides(pipeline))
        sizes = pooled.new_tensor([height, width, 0, 0, height, width]).expand(len(pooled), SIZES)
        return Encoded(embeds, torch.cat([pooled, sizes], 1), pooled)

    def empty(self, pipeline: Any, encoded: Encoded) -> Encoded:
        """Zeros where the pipeline has it so, but for the sizes."""
        if self.negative_prompt or not pipeline.config.force_zeros_for_empty_prompt:
            return encoded
        vectors = encoded.vectors.clone()
        vectors[:, :-SIZES] = 0
        return Encoded(torch.zeros_like(encoded.embeds), vectors, torch.zeros_like(encoded.pooled))

    def widths(self, outline: Any) -> Widths:
        first, second = outline.text_encoder.config, outline.text_encoder_2.config
        width = first.hidden_size + second.hidden_size
        return Widths(first.max_position_embeddings, width, second.projection_dim + SIZES, second.projection_dim)

    def predict(self, network: nn.Module, x: Tensor, k: Tensor, embeds: Tensor, vectors: Tensor) -> Tensor:
        given = {"text_embeds": vectors[:, :-SIZES], "time_ids": vectors[:, -SIZES:]}
        return network(x, k, encoder_hidden_states=embeds, added_cond_kwargs=given, return_dict=False)[0]

    def whole(self, pipeline: Any, companions: Mapping[str, Any]) -> Any:
        zeros = pipeline.config.force_zeros_for_empty_prompt
        parts = {**pipeline.components, **companions}
        return self.pipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)

    def check(self, name: str, outline: Any) -> None:
        super().check(name, outline)
        if not isinstance(outline.unet.config.sample_size, int):
            raise ValueError(f"model: the UNet of {name} must have one sample_size, a number")
        if outline.vae.config.get("latents_mean") is not None:
            raise ValueError(f"model: the VAE of {name} has latents_mean, which is not known here")
