"""Diffusers' models for `ctrl`: the one place where its classes are turned into what the core asks for.

    pipeline = scale.models.load("folder or name")
    policy = Score.of(pipeline, guidance=7.0)           # trained in place: it holds the pipeline's own UNet
    prompts = Prompts.encode(pipeline, ["a fox", "a hare"])
    reward = Decoded(pipeline.vae, image_reward, differentiable=True)
    task = problem(policy.frozen(), reward, beta=0.1)
    fit(task, policy, ActorCritic(), critic=StructuredCritic(task, Value(4, 64, prompts.width)), conditions=prompts)
    pipeline.save_pretrained("tuned")

States are latents, D = (C, H, W); of a `DDPMPipeline`, which has no VAE and no prompts, they are pictures in [-1, 1],
with `Decoded(None, reward)` and no conditions. The scheduler's table of K betas is the noising, made continuous: its
timestep k = 0 ... K-1 sits at the forward time s = (k+1)/K, and a UNet is asked at the fractional timestep K s - 1. The
problem is cut at s_min = 1/K, timestep 0: the least noise the UNet was trained on, where log-SNR and g² are finite, and
where Stable Diffusion itself stops (`set_alpha_to_one=False`), so its images are rewarded as it would make them. (DDPM
makes one more call there, and shows x0hat: sigma = .01 moves a pixel by about one of 256 levels.)
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import align_module_device
from diffusers import AutoencoderKL, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrl.linop import broadcast
from ctrl.noising import VPTable
from ctrl.problem import IsotropicNormal, ProbabilityFlow, Reward, ScoreAsAction
from scale.prompts import Prompt
from scale.rewards import Reward as PictureReward
from scale.rewards import ask

NO_PROMPT = Prompt("")
DECODED = 512 * 512
"""Pixels of the images that a VAE decodes at a time: one of Stable Diffusion's, whose graph takes 5.5 GiB."""

ENCODED = 512
"""Prompts that the text encoder takes at a time."""
ON_DEVICE = 2**28
"""Bytes of embeddings that may stay on an accelerator, 1,100 prompts of Stable Diffusion v1.5; more are in host memory,
and their rows travel when they are used."""


@dataclass(frozen=True)
class Prompts:
    """P prompts and what the text encoder makes of them, once. As `conditions` it gives sample i the prompt
    i // in_a_row mod P.

    Attributes:
        prompts: P of them, with what a reward may want to know beside the text.
        embeds: one state per token, (P, L, E).
        pooled: one vector per prompt, (P, E'), for critics, of mean 0 and variance 1 over the prompts: text encoders
            give all prompts nearly the same, and a critic must tell them apart.
        empty: the embedding of the empty prompt, for guidance, (1, L, E).
        in_a_row: samples of one prompt before the next one comes.
    """

    prompts: Sequence[Prompt]
    embeds: Tensor
    pooled: Tensor
    empty: Tensor
    in_a_row: int = 1

    @staticmethod
    @torch.no_grad()
    def encode(pipeline: StableDiffusionPipeline, prompts: Sequence[Prompt | str], in_a_row: int = 1) -> Prompts:
        """Run the text encoder, which is not needed afterwards."""
        known = tuple(Prompt(p) if isinstance(p, str) else p for p in prompts)
        tokens = pipeline.tokenizer(
            ["", *(p.text for p in known)],
            padding="max_length",
            max_length=pipeline.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        longest = pipeline.tokenizer.model_max_length
        for p in known:
            if len(pipeline.tokenizer(p.text).input_ids) > longest:
                warnings.warn(f"a prompt is cut to {longest} tokens: {p.text[:60]!r} ...", stacklevel=2)
        encoder = pipeline.text_encoder
        size = tokens.numel() * encoder.config.hidden_size * encoder.dtype.itemsize
        home, parts = encoder.device if size <= ON_DEVICE else torch.device("cpu"), []
        for part in tokens.split(ENCODED):
            states = encoder(part.to(encoder.device))
            parts.append((states.last_hidden_state.to(home), states.pooler_output))
        embeds, pooled = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
        empty, pooled = embeds[:1].to(encoder.device), pooled[1:]
        pooled = (pooled - pooled.mean(0)) / pooled.std(0, correction=0).clamp(min=1e-6)
        return Prompts(known, embeds[1:], pooled, empty, in_a_row)

    @property
    def width(self) -> int:
        """E', of the pooled vectors."""
        return self.pooled.shape[1]

    def __call__(self, ids: Tensor) -> Cond:
        """The conditions of samples ids, (n,)."""
        return Cond(self, ids // self.in_a_row % len(self.prompts))


@dataclass(frozen=True)
class Cond:
    """Rows of a table of prompts, looked up when they are used: a condition weighs one number a node."""

    table: Prompts
    index: Tensor
    """(n,)."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, piece: slice | Tensor) -> Cond:
        return Cond(self.table, self.index[piece])

    @property
    def prompts(self) -> list[Prompt]:
        """n of them."""
        return [self.table.prompts[i] for i in self.index.tolist()]

    @property
    def embeds(self) -> Tensor:
        """(n, L, E)."""
        return self._rows(self.table.embeds)

    @property
    def pooled(self) -> Tensor:
        """(n, E')."""
        return self._rows(self.table.pooled)

    @property
    def empty(self) -> Tensor:
        """(n, L, E), the same row n times."""
        return self.table.empty.to(self.index.device).expand(len(self), -1, -1)

    def _rows(self, table: Tensor) -> Tensor:
        return table[self.index.to(table.device)].to(self.index.device)


class Score(nn.Module):
    """mean(t, x, cond) -> score, (B, C, H, W): a UNet, with classifier-free guidance where there are prompts.

    Args:
        unet: predicts eps or v; it computes in its own precision, the score comes out in that of x.
        noising: the scheduler's.
        prediction: "epsilon" or "v_prediction", as in the scheduler's config.
        guidance: w in out = out(empty) + w (out(prompt) - out(empty)); at 1 the empty prompt is not evaluated.
        clip: x0hat is kept in [-clip, clip], as `clip_sample` has it; infinite for latents.
    """

    def __init__(
        self, unet: UNet2DConditionModel | UNet2DModel, noising: VPTable, prediction: str = "epsilon",
        guidance: float = 1.0, clip: float = math.inf,
    ) -> None:  # fmt: skip
        super().__init__()
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction must be 'epsilon' or 'v_prediction', got {prediction!r}")
        self.unet, self.noising, self.prediction, self.guidance, self.clip = unet, noising, prediction, guidance, clip

    @staticmethod
    def of(pipeline: StableDiffusionPipeline | DDPMPipeline, guidance: float = 1.0) -> Score:
        """The pipeline's own UNet, not a copy, under the pipeline's schedule."""
        scheduler, config = pipeline.scheduler, pipeline.scheduler.config
        noising = VPTable(scheduler.betas.double().tolist())
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else math.inf
        return Score(pipeline.unet, noising, config.prediction_type, guidance, clip)

    def frozen(self) -> Score:
        """The reference, which is not trained: a copy, or of a UNet with adapters the same one without them."""
        if getattr(self.unet, "peft_config", None):
            return Score(WithoutAdapters(self.unet), self.noising, self.prediction, self.guidance, self.clip)
        return copy.deepcopy(self).requires_grad_(False)

    @torch.no_grad()
    def stretch(self, reference: Score, ratio: float) -> None:
        """Go on with the weights, w_ref + ratio (w - w_ref), in place; the reference's may be offloaded. Adapters
        begin with a product B A of zero, and their B is what goes on."""
        if isinstance(reference.unet, WithoutAdapters):
            for name, p in self.unet.named_parameters():
                if "lora_B" in name:
                    p.mul_(ratio)
            return
        for module, before in zip(self.unet.modules(), reference.unet.modules(), strict=True):
            with align_module_device(before):
                for p, p_ref in zip(module.parameters(False), before.parameters(False), strict=True):
                    p.copy_(torch.lerp(p_ref.to(p), p, ratio))

    @property
    def error_gain(self) -> float:
        """w² + (1 - w)²: out = w out(prompt) + (1 - w) out(empty), whose rounding errors are independent."""
        return self.guidance**2 + (1 - self.guidance) ** 2

    @property
    def calls(self) -> int:
        """Of the UNet for a state that has a prompt."""
        return 1 if self.guidance == 1 else 2

    @property
    def s_min(self) -> float:
        """1/K."""
        return 1 / len(self.noising.betas)

    def forward(self, t: Tensor, x: Tensor, cond: Cond | None = None) -> Tensor:
        """t: (B,) on the reverse clock; x: (B, C, H, W)."""
        s = (self.noising.s_max - t).clamp(self.s_min, self.noising.s_max)
        out = self.predict(s, x, cond)
        alpha, sigma = (broadcast(c(s).to(x.dtype), x) for c in (self.noising.alpha, self.noising.sigma))
        eps = out if self.prediction == "epsilon" else alpha * out + sigma * x
        if self.clip < math.inf:
            x0hat = ((x - sigma * eps) / alpha).clamp(-self.clip, self.clip)
            eps = (x - alpha * x0hat) / sigma
        return -eps / sigma

    def predict(self, s: Tensor, x: Tensor, cond: Cond | None) -> Tensor:
        """What the UNet predicts at forward times s, (B,), guided."""
        k = s * len(self.noising.betas) - 1
        if cond is None:
            return self._unet(k, x)
        text = cond.embeds
        if self.guidance == 1:
            return self._unet(k, x, text)
        out = self._unet(torch.cat([k, k]), torch.cat([x, x]), torch.cat([cond.empty, text]))
        empty, prompted = out.chunk(2)
        return empty + self.guidance * (prompted - empty)

    def _unet(self, k: Tensor, x: Tensor, text: Tensor | None = None) -> Tensor:
        dtype = next(self.unet.parameters()).dtype  # diffusers' own `dtype` walks through all of them
        given = {} if text is None else {"encoder_hidden_states": text.to(dtype)}
        return self.unet(x.to(dtype), k, return_dict=False, **given)[0].to(x.dtype)


class WithoutAdapters(nn.Module):
    """A UNet as it was before adapters were added. If it checkpoints activations, it then does so by `checkpointed`."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config
        if unet.is_gradient_checkpointing:
            unet.enable_gradient_checkpointing(checkpointed)

    @property
    def device(self) -> torch.device:
        """As a pipeline asks its parts."""
        return self.unet.device

    def forward(self, *args: Any, **options: Any) -> Any:
        self.unet.disable_adapters()
        try:
            return self.unet(*args, **options)
        finally:
            self.unet.enable_adapters()


def checkpointed(module: nn.Module, *args: Any) -> Any:
    """module(*args), its activations computed again in the backward pass: then all adapters are on, and those that were
    off in the forward pass must be off again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    off = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer) and layer.disable_adapters]
    return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _disabled(off)))


@contextmanager
def _disabled(layers: Sequence[Any]) -> Iterator[None]:
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def sides_of(unet: UNet2DConditionModel | UNet2DModel) -> tuple[int, int]:
    """Height and width of its latents."""
    size = unet.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def problem(reference: Score, reward: Reward, *, beta: float, eta: float = 1.0, gamma: float = 0.0) -> ScoreAsAction:
    """Sampling from the reference as a control problem, from pure noise to timestep 0; at eta = 0, the probability
    flow."""
    shape = (reference.unet.config.in_channels, *sides_of(reference.unet))
    kind = ScoreAsAction if eta else ProbabilityFlow
    return kind(
        noising=reference.noising, reference=reference, reward=reward, initial=IsotropicNormal(shape), shape=shape,
        beta=beta, eta=eta, gamma=gamma, s_min=reference.s_min, s_max=reference.noising.s_max,
        error_gain=reference.error_gain,
    )  # fmt: skip


def timesteps(task: ScoreAsAction, steps: int) -> Tensor:
    """The grid of whole timesteps at which diffusers' samplers ask (`trailing`), and the end, (N+1,)."""
    K = round(1 / task.s_min)
    s = (K - torch.arange(steps, dtype=torch.float64) * K / steps).round() / K
    if float(s[-1]) <= task.s_min or float(s[0]) > task.s_max:
        raise ValueError(
            f"steps on the grid of whole timesteps must begin where there is a signal left, and end above timestep 0, "
            f"where the process ends; {steps} of {K} do not: take fewer, or another grid"
        )
    return torch.cat([task.s_max - s, torch.tensor([task.horizon], dtype=torch.float64)])


class Decoded:
    """r(latents, cond): a reward of images becomes one of latents. No module, so that a critic built around the reward
    does not take the VAE for its own.

    Its gradient is taken piece by piece, as many images as are decoded at a time: each piece is decoded and rewarded
    again, so that one piece's graph is in memory. The reward must give the same numbers again.

    Args:
        vae: the pipeline's; its weights are set not to be trained. None where states are pictures.
        reward: of images, prompts and their metadata: see `scale.rewards`.
        differentiable: whether the reward's gradient is to reach the latents, through the VAE.
        chunk: images rewarded at a time, without a gradient.
    """

    def __init__(
        self, vae: AutoencoderKL | None, reward: PictureReward, *, differentiable: bool = False, chunk: int = 8
    ) -> None:
        self.vae, self.reward = None if vae is None else vae.requires_grad_(False), reward
        self.differentiable, self.chunk = differentiable, chunk

    def __call__(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, C, H, W) -> (B,)."""
        prompts = [NO_PROMPT] * len(x) if cond is None else cond.prompts
        gradient = self.differentiable and torch.is_grad_enabled() and x.requires_grad
        size = self.chunk if self.vae is None or not gradient else images_at_a_time(self.vae, x)
        pieces = [slice(i, i + size) for i in range(0, len(x), size)]
        with torch.set_grad_enabled(gradient):
            if gradient and self.vae is not None and len(pieces) > 1:
                again = partial(checkpoint, self.rewarded, use_reentrant=False)
                return torch.cat([again(x[p], prompts[p]) for p in pieces])
            return torch.cat([self.rewarded(x[p], prompts[p]) for p in pieces])

    def rewarded(self, x: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(n, C, H, W) -> (n,)."""
        return ask(self.reward, self.images(x), prompts).to(x)

    def images(self, x: Tensor) -> Tensor:
        """(n, C, H, W) -> (n, 3, H', W') in [0, 1]; the VAE follows the latents to their device."""
        return pictures_of(self.vae if self.vae is None else self.vae.to(x.device), x)


def pictures_of(vae: AutoencoderKL | None, x: Tensor) -> Tensor:
    """(n, C, H, W) latents, or pictures in [-1, 1] -> (n, 3, H', W') in [0, 1], as the pipeline shows them. The VAE
    works in its own precision: in half of it, as in autocast, some have no finite images."""
    if vae is None:
        return (x / 2 + 0.5).clamp(0, 1)
    with torch.autocast(x.device.type, enabled=False):
        latents = (x / vae.config.scaling_factor).to(vae.dtype)
        parts = [vae.decode(part, return_dict=False)[0] for part in latents.split(images_at_a_time(vae, x))]
        return (torch.cat(parts).to(x.dtype) / 2 + 0.5).clamp(0, 1)


def images_at_a_time(vae: AutoencoderKL, x: Tensor) -> int:
    """How many latents, (n, C, H, W), are decoded at a time."""
    side = 2 ** (len(vae.config.block_out_channels) - 1)
    return max(1, DECODED // (side**2 * x.shape[-2] * x.shape[-1]))


class Tower(nn.Module):
    """Convolutions from latents (B, C, H, W) and features (B, E), if there are any, to numbers (B,). The last layer
    starts at zero.

    Latents of `size` a side are halved h times, until at most 4 x 4 places are left, and at least three times; a place
    then sees 2^(h+1) + 1 latents a side, and the mean over places is taken.
    """

    def __init__(self, channels: int, size: int, features: int, width: int = 64) -> None:
        super().__init__()
        halvings = max(3, math.ceil(math.log2(size / 4)))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.shift = nn.Linear(features, width) if features else None
        halve = [(nn.SiLU(), nn.Conv2d(width, width, 3, stride=2, padding=1)) for _ in range(halvings)]
        self.down = nn.Sequential(*(layer for pair in halve for layer in pair), nn.SiLU())
        self.last = nn.Linear(width, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        h = self.first(x)
        h = h if self.shift is None else h + self.shift(features)[..., None, None]
        return self.last(self.down(h).mean((2, 3)))[:, 0]


class Value(nn.Module):
    """F(t, x, x0hat, cond), (B,), for a critic: sees both latents, `size` a side, the time and, where there is one, the
    pooled prompt."""

    def __init__(self, channels: int, size: int, pooled: int = 0, width: int = 64) -> None:
        super().__init__()
        self.time = Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
        self.tower = Tower(2 * channels, size, width + pooled, width)

    def forward(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Cond | None = None) -> Tensor:
        features = [self.time(t).to(x)] if cond is None else [self.time(t).to(x), cond.pooled.to(x)]
        return self.tower(torch.cat([x, x0hat], 1), torch.cat(features, 1))


class StandIn(nn.Module):
    """(x, cond) -> (B,), x of `size` a side: a learned stand-in for a reward without gradient, for
    `ctrl.StructuredCritic`; or a reward that is learned itself, for `ctrl.algorithms.InverseRL`."""

    differentiable = True

    def __init__(self, channels: int, size: int, pooled: int = 0, width: int = 64) -> None:
        super().__init__()
        self.tower = Tower(channels, size, pooled, width)

    def forward(self, x: Tensor, cond: Cond | None = None) -> Tensor:
        return self.tower(x, None if cond is None else cond.pooled.to(x))
