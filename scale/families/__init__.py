"""The families of models that can be fine-tuned; a new one is a file here and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from scale.families.base import Encoded, Family, Widths
from scale.families.ddpm import Ddpm
from scale.families.sd3 import StableDiffusion3
from scale.families.sdxl import StableDiffusionXL
from scale.families.stable_diffusion import StableDiffusion

FAMILIES: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "DDPMPipeline": Ddpm,
    "DDIMPipeline": Ddpm,
}
"""By the name of a pipeline in model_index.json."""


def family_of(pipeline: Any) -> Family:
    """The one that a pipeline, or an outline, was loaded as; else the one of its class."""
    return getattr(pipeline, "family", None) or FAMILIES[type(pipeline).__name__]()


def network_of(pipeline: Any) -> Any:
    """The part of a pipeline that is trained."""
    return getattr(pipeline, family_of(pipeline).network)


__all__ = ["FAMILIES", "Ddpm", "Encoded", "Family", "Widths", "family_of", "network_of"]
