"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): a transformer trained on a rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from ctrl.noising import RectifiedFlow
from ctrl.problem import ScoreAsAction
from scale.families.base import Encoded, Family, Widths, vae_factor

CUT = 0.02
"""The process goes from s = 1 - CUT to CUT. At s = 1 the noise is infinite, at s = 0 the price of a change of the
velocity; log-SNR goes from -7.8 to 7.8, where Stable Diffusion 1.5 has -5.4 to 7.1. What is lost is a mean of CUT E[x0]
at the start, and a noise of CUT at the end, less than the .03 that Stable Diffusion 1.5 leaves."""
T5_TOKENS = 256
"""That diffusers gives the T5, or zeros in its place."""


class StableDiffusion3(Family):
    """The transformer is given the last states but one of both CLIPs, side by side, followed by those of the T5, or by
    zeros where it is absent, and both pooled vectors. The scheduler's `shift` is a grid, not another process.

    Args:
        t5_tokens: of a prompt (`max_sequence_length` of the pipeline's call). A model without a T5 that was trained
            without its zeros has 0.
    """

    title = "Stable Diffusion 3"
    pipeline = StableDiffusion3Pipeline
    network = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional = ("text_encoder_3",)
    left_out = {"image_encoder": None, "feature_extractor": None}  # noqa: RUF012
    lora_targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    )  # fmt: skip
    samplers = {  # noqa: RUF012
        "euler": (FlowMatchEulerDiscreteScheduler, {}),
        "heun": (FlowMatchHeunDiscreteScheduler, {}),
        "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        "unipc": (UniPCMultistepScheduler, {}),
    }
    headline = "euler"

    def __init__(
        self, size: tuple[int, int] | None = None, negative_prompt: str = "", t5_tokens: int = T5_TOKENS
    ) -> None:
        super().__init__(size, negative_prompt)
        self.t5_tokens = t5_tokens

    @property
    def call(self) -> dict[str, Any]:
        return {**super().call, "max_sequence_length": self.t5_tokens}

    def encode(self, pipeline: Any, texts: Sequence[str]) -> Encoded:
        given = list(texts)
        embeds, _, pooled, _ = pipeline.encode_prompt(
            given, given, given, do_classifier_free_guidance=False, max_sequence_length=self.t5_tokens
        )
        return Encoded(embeds, pooled, pooled)

    def widths(self, outline: Any) -> Widths:
        clips = [getattr(outline, name).config for name in self.encoders[:2]]
        pooled = sum(clip.projection_dim for clip in clips)
        tokens = clips[0].max_position_embeddings + self.t5_tokens
        return Widths(tokens, outline.transformer.config.joint_attention_dim, pooled, pooled)

    def predict(self, network: nn.Module, x: Tensor, k: Tensor, embeds: Tensor, vectors: Tensor) -> Tensor:
        return network(
            x, timestep=k, encoder_hidden_states=embeds, pooled_projections=vectors, return_dict=False
        )[0]  # fmt: skip

    def noising(self, scheduler: Any) -> RectifiedFlow:
        return RectifiedFlow(1 - CUT)

    def s_min(self, scheduler: Any) -> float:
        return CUT

    def time(self, s: Tensor, scheduler: Any) -> Tensor:
        return s * scheduler.config.num_train_timesteps

    def prediction(self, scheduler: Any) -> str:
        return "flow"

    def sampler(self, name: str, scheduler: Any) -> Any:
        """Under the pipeline's own shift."""
        kind, changes = self.samplers[name]
        config, shift = {"num_train_timesteps": scheduler.config.num_train_timesteps}, scheduler.config.shift
        if kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
            flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
            return kind(**config, **flow, **changes)
        return kind(**config, shift=shift, **changes)

    def timesteps(self, scheduler: Any, task: ScoreAsAction, steps: int) -> Tensor:
        """The grid that is even before the scheduler's shift, s = shift u / (1 + (shift - 1) u)."""
        shift, ends = scheduler.config.shift, torch.tensor([task.s_max, task.s_min], dtype=torch.float64)
        first, last = (ends / (shift - (shift - 1) * ends)).tolist()
        u = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        times = task.s_max - shift * u / (1 + (shift - 1) * u)
        times[0], times[-1] = 0.0, task.horizon
        return times

    def lora_layers(self, layers: dict[str, Tensor]) -> dict[str, Tensor]:
        return layers

    def check(self, name: str, outline: Any) -> None:
        if not isinstance(outline.transformer.config.sample_size, int):
            raise ValueError(f"model: the transformer of {name} must have one sample_size, a number")
        config = outline.transformer.config
        self.check_latents(name, outline, config.patch_size)
        if max(self.sides(outline)) > (most := config.patch_size * config.pos_embed_max_size):
            raise ValueError(f"size must be at most {most * vae_factor(outline.vae)} pixels a side for {name}")
        if outline.scheduler.config.get("use_dynamic_shifting"):
            raise ValueError(f"model: the scheduler of {name} shifts by the image's size, which is not known here")
