"""What a family of models must say of itself, so that one command fine-tunes them all.

A family is a kind of pipeline that diffusers knows: which part of it is trained, what it is given of a prompt, at which
time it is asked, which noising it was trained on, and by which samplers it draws. It has no formula of control theory:
`scale.diffusion` makes a score of what it says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor, nn

from ctrl.noising import Noising, VPTable
from ctrl.problem import ScoreAsAction

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""What a sampler takes over from the pipeline: the process, and none of its own scheduler's habits."""
SAMPLERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "sde-dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
}
"""Of the models trained on a table of betas."""


@dataclass(frozen=True)
class Encoded:
    """What the text encoders make of n prompts.

    Attributes:
        embeds: one state per token, (n, L, E).
        vectors: what the network is given besides, (n, V); V is 0 where that is nothing.
        pooled: one vector per prompt, for critics, (n, P).
    """

    embeds: Tensor
    vectors: Tensor
    pooled: Tensor

    def __getitem__(self, piece: slice | Tensor) -> Encoded:
        return Encoded(self.embeds[piece], self.vectors[piece], self.pooled[piece])

    @staticmethod
    def zeros(n: int, widths: Widths) -> Encoded:
        """Of prompts that nothing is known of but their shapes."""
        return Encoded(
            torch.zeros(n, widths.tokens, widths.embeds), torch.zeros(n, widths.vectors), torch.zeros(n, widths.pooled)
        )


@dataclass(frozen=True)
class Widths:
    """The shapes of `Encoded`: L, E, V, P."""

    tokens: int = 0
    embeds: int = 0
    vectors: int = 0
    pooled: int = 0


def vae_factor(vae: Any) -> int:
    """Pixels of an image to a side of a latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


class Family(ABC):
    """A kind of diffusers pipeline.

    Attributes:
        title: what its models are called.
        pipeline: its class.
        network: the part that is trained.
        encoders: its text encoders; those in `optional` may be absent.
        left_out: options of from_pretrained that leave out what training has no part in.
        companions: what is left out, and put back where a pipeline is saved.
        lora_targets: layers that get adapters.
        samplers: by name, a scheduler's class and what is set in it.
        headline: the sampler of the evaluation's headline.

    Args:
        size: height and width of images, in pixels; by default the model's own.
        negative_prompt: what guidance leads away from, in policy and reference alike.
    """

    title: str
    pipeline: type
    network: str = "unet"
    encoders: Sequence[str] = ()
    optional: Sequence[str] = ()
    left_out: Mapping[str, Any] = {}
    companions: Sequence[str] = ()
    lora_targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    samplers: Mapping[str, tuple[type, dict[str, Any]]] = SAMPLERS
    headline: str = "dpmsolver++"

    def __init__(self, size: tuple[int, int] | None = None, negative_prompt: str = "") -> None:
        self.size, self.negative_prompt = size, negative_prompt

    @classmethod
    def own(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the options of all families that this one is made with."""
        return {name: value for name, value in options.items() if name in signature(cls).parameters}

    @property
    def call(self) -> dict[str, Any]:
        """Options of the pipeline's own call for one prompt."""
        size = {} if self.size is None else dict(zip(("height", "width"), self.size, strict=True))
        return size | ({"negative_prompt": self.negative_prompt} if self.negative_prompt else {})

    def call_of(self, n: int) -> dict[str, Any]:
        """The same for n prompts."""
        return {k: [v] * n if k == "negative_prompt" else v for k, v in self.call.items()}

    def sides(self, pipeline: Any) -> tuple[int, int]:
        """Height and width of the states of a pipeline, or an outline."""
        if self.size is None or pipeline.vae is None:
            own = getattr(pipeline, self.network).config.sample_size
            return (own, own) if isinstance(own, int) else tuple(own)
        factor = vae_factor(pipeline.vae)
        return self.size[0] // factor, self.size[1] // factor

    @abstractmethod
    def encode(self, pipeline: Any, texts: Sequence[str]) -> Encoded:
        """What its text encoders make of prompts, as the pipeline's own call has it."""

    def empty(self, pipeline: Any, encoded: Encoded) -> Encoded:
        """The empty prompt of guidance, from what the encoders make of it."""
        return encoded

    @abstractmethod
    def widths(self, outline: Any) -> Widths:
        """The shapes of what `encode` makes."""

    def predict(self, network: nn.Module, x: Tensor, k: Tensor, embeds: Tensor, vectors: Tensor) -> Tensor:
        """What the network predicts of states x at its own times k, (n,), given n prompts."""
        return network(x, k, encoder_hidden_states=embeds, return_dict=False)[0]

    def noising(self, scheduler: Any) -> Noising:
        """The process that the models are trained on; a scheduler's table of betas is made continuous."""
        return VPTable(scheduler.betas.double().tolist())

    def s_min(self, scheduler: Any) -> float:
        """The least noise that the network was trained on, where the process ends."""
        return 1 / len(scheduler.betas)

    def time(self, s: Tensor, scheduler: Any) -> Tensor:
        """The network's own time at forward times s: a table's entry k = 0 ... K-1 sits at s = (k+1)/K."""
        return s * len(scheduler.betas) - 1

    def prediction(self, scheduler: Any) -> str:
        """What the network predicts: a name of `scale.diffusion.PREDICTIONS`."""
        return scheduler.config.prediction_type

    def sampler(self, name: str, scheduler: Any) -> Any:
        """The scheduler of that name under the pipeline's own process, with steps spread from the first timestep on
        (`trailing`)."""
        kind, changes = self.samplers[name]
        given = scheduler.config
        config = {key: given[key] for key in SCHEDULE if given.get(key) is not None}
        return kind(**config, timestep_spacing="trailing", **changes)

    def timesteps(self, scheduler: Any, task: ScoreAsAction, steps: int) -> Tensor:
        """The grid of whole timesteps at which diffusers' samplers ask (`trailing`), and the end, (N+1,)."""
        K = len(scheduler.betas)
        s = (K - torch.arange(steps, dtype=torch.float64) * K / steps).round() / K
        if float(s[-1]) <= task.s_min or float(s[0]) > task.s_max:
            raise ValueError(
                f"steps on the grid of whole timesteps must begin where there is a signal left, and end above timestep "
                f"0, where the process ends; {steps} of {K} do not: take fewer, or another grid"
            )
        return torch.cat([task.s_max - s, torch.tensor([task.horizon], dtype=torch.float64)])

    def absent(self, pipeline: Any) -> dict[str, None]:
        """What from_pretrained must be told that the pipeline, or an outline, has not."""
        names = [name for name in self.optional if getattr(pipeline, name) is None]
        return dict.fromkeys([*names, *(name.replace("text_encoder", "tokenizer") for name in names)])

    def lora_layers(self, layers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Adapters under the names that the pipeline's `save_lora_weights` takes, from peft's."""
        return convert_state_dict_to_diffusers(layers)

    def whole(self, pipeline: Any, companions: Mapping[str, Any]) -> Any:
        """The pipeline with what it was loaded without."""
        return self.pipeline(**{**pipeline.components, **companions})

    @abstractmethod
    def check(self, name: str, outline: Any) -> None:
        """Raise unless a model of this family is, by its configs, one that is known."""

    def check_latents(self, name: str, outline: Any, multiple: int = 1) -> None:
        """Raise unless the network takes what the VAE makes, of the size that is asked for."""
        config, factor = getattr(outline, self.network).config, vae_factor(outline.vae)
        if config.in_channels != outline.vae.config.latent_channels:
            raise ValueError(
                f"model: the network of {name} takes {config.in_channels} channels where its VAE makes "
                f"{outline.vae.config.latent_channels}: a model for inpainting needs more than text"
            )
        if self.size is not None and any(side % (factor * multiple) for side in self.size):
            raise ValueError(
                f"size must be a multiple of {factor * multiple} pixels, got {self.size[1]}x{self.size[0]}"
            )
