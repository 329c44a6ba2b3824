"""Unconditional models of images (Ho et al. 2020, arXiv 2006.11239): a UNet, no prompts, no VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers import DDPMPipeline
from torch import Tensor, nn

from scale.families.base import Encoded, Family, Widths


class Ddpm(Family):
    """States are images in [-1, 1]."""

    title = "DDPM"
    pipeline = DDPMPipeline

    def encode(self, pipeline: Any, texts: Sequence[str]) -> Encoded:
        raise ValueError("prompts are not supported by an unconditional model")

    def widths(self, outline: Any) -> Widths:
        return Widths()

    def check(self, name: str, outline: Any) -> None:
        config = outline.unet.config
        if (config.in_channels, config.out_channels) != (3, 3) or not isinstance(config.sample_size, int):
            raise ValueError(
                f"model must take and return square images of 3 channels; {name} takes {config.in_channels}, returns "
                f"{config.out_channels}, of size {config.sample_size}"
            )

    def predict(self, network: nn.Module, x: Tensor, k: Tensor, embeds: Tensor, vectors: Tensor) -> Tensor:
        raise ValueError("prompts are not supported by an unconditional model")
