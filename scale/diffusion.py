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
from diffusers import AutoencoderKL
from diffusers.models.embeddings import Timesteps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrl.linop import broadcast
from ctrl.problem import IsotropicNormal, ProbabilityFlow, Reward, ScoreAsAction
from scale.families import Encoded, Family, family_of, network_of
from scale.families.base import vae_factor
from scale.prompts import Prompt
from scale.rewards import Reward as PictureReward
from scale.rewards import ask

NO_PROMPT = Prompt("")
DECODED = 512 * 512
"""Pixels of the images that a VAE decodes at a time: one of Stable Diffusion's, whose graph takes 5.5 GiB."""

ENCODED = 512
"""Prompts that a text encoder takes at a time."""
ON_DEVICE = 2**28
"""Bytes of embeddings that may stay on an accelerator, 1,100 prompts of Stable Diffusion v1.5; more are in host memory,
and their rows travel when they are used."""


@dataclass(frozen=True)
class Prompts:
    """P prompts and what the text encoders make of them, once. As `conditions` it gives sample i the prompt
    i // in_a_row mod P.

    Attributes:
        prompts: P of them, with what a reward may want to know beside the text.
        encoded: of each; `pooled` has mean 0 and variance 1 over the prompts: text encoders give all prompts nearly the
            same, and a critic must tell them apart.
        empty: of the empty prompt, or the negative one, for guidance, one row.
        in_a_row: samples of one prompt before the next one comes.
    """

    prompts: Sequence[Prompt]
    encoded: Encoded
    empty: Encoded
    in_a_row: int = 1

    @staticmethod
    @torch.no_grad()
    def encode(pipeline: Any, prompts: Sequence[Prompt | str], in_a_row: int = 1) -> Prompts:
        """Run the text encoders, which are not needed afterwards."""
        known = tuple(Prompt(p) if isinstance(p, str) else p for p in prompts)
        warn_of_cut(pipeline.tokenizer, known)
        family = family_of(pipeline)
        texts = [family.negative_prompt, *(p.text for p in known)]
        widths, encoder = family.widths(pipeline), pipeline.text_encoder
        size = len(texts) * widths.tokens * widths.embeds * encoder.dtype.itemsize
        home, parts = encoder.device if size <= ON_DEVICE else torch.device("cpu"), []
        for k in range(0, len(texts), ENCODED):
            part = family.encode(pipeline, texts[k : k + ENCODED])
            parts.append((part.embeds.to(home), part.vectors, part.pooled))
        every = Encoded(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))
        empty, found = every[:1], every[1:]
        pooled = (found.pooled - found.pooled.mean(0)) / found.pooled.std(0, correction=0).clamp(min=1e-6)
        given = Encoded(found.embeds, found.vectors, pooled)
        at_hand = Encoded(empty.embeds.to(encoder.device), empty.vectors, empty.pooled)
        return Prompts(known, given, family.empty(pipeline, at_hand), in_a_row)

    @property
    def width(self) -> int:
        """Of the pooled vectors."""
        return self.encoded.pooled.shape[1]

    def __call__(self, ids: Tensor) -> Cond:
        """The conditions of samples ids, (n,)."""
        return Cond(self, ids // self.in_a_row % len(self.prompts))


def warn_of_cut(tokenizer: Any, prompts: Sequence[Prompt]) -> None:
    """Of prompts that are longer than the first text encoder takes."""
    longest = tokenizer.model_max_length
    for p in prompts:
        if len(tokenizer(p.text).input_ids) > longest:
            warnings.warn(f"a prompt is cut to {longest} tokens: {p.text[:60]!r} ...", stacklevel=3)


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
        return self._rows(self.table.encoded.embeds)

    @property
    def vectors(self) -> Tensor:
        """(n, V)."""
        return self._rows(self.table.encoded.vectors)

    @property
    def pooled(self) -> Tensor:
        """(n, P)."""
        return self._rows(self.table.encoded.pooled)

    @property
    def empty(self) -> tuple[Tensor, Tensor]:
        """Embeds and vectors of the empty prompt, n times."""
        rows = (self.table.empty.embeds, self.table.empty.vectors)
        return tuple(row.to(self.index.device).expand(len(self), *row.shape[1:]) for row in rows)

    def _rows(self, table: Tensor) -> Tensor:
        return table[self.index.to(table.device)].to(self.index.device)


PREDICTIONS = {
    "epsilon": lambda out, x, alpha, sigma: out,
    "v_prediction": lambda out, x, alpha, sigma: alpha * out + sigma * x,
    "flow": lambda out, x, alpha, sigma: x + alpha * out,
}
"""eps from what a network predicts: eps itself; alpha eps - sigma x0 (Salimans & Ho 2022); or, where alpha = 1 - s and
sigma = s, the velocity eps - x0."""


class Score(nn.Module):
    """mean(t, x, cond) -> score, (B, C, H, W): a network, with classifier-free guidance where there are prompts.

    Args:
        network: predicts as its family says; it computes in its own precision, the score comes out in that of x.
        scheduler: of the pipeline, with the process that the network was trained on.
        family: which says how the network is asked.
        sides: height and width of the states.
        guidance: w in out = out(empty) + w (out(prompt) - out(empty)); at 1 the empty prompt is not evaluated.
    """

    def __init__(
        self, network: Any, scheduler: Any, family: Family, sides: tuple[int, int], guidance: float = 1.0
    ) -> None:
        super().__init__()
        self.network, self.scheduler, self.family, self.sides = network, scheduler, family, sides
        self.guidance = guidance
        self.noising, self.s_min = family.noising(scheduler), family.s_min(scheduler)
        self.prediction = PREDICTIONS[family.prediction(scheduler)]
        config = scheduler.config
        self.clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else math.inf

    @staticmethod
    def of(pipeline: Any, guidance: float = 1.0) -> Score:
        """The pipeline's own network, not a copy, under the pipeline's schedule."""
        family = family_of(pipeline)
        return Score(network_of(pipeline), pipeline.scheduler, family, family.sides(pipeline), guidance)

    def frozen(self) -> Score:
        """The reference, which is not trained: a copy, or of a network with adapters the same one without them."""
        if getattr(self.network, "peft_config", None):
            plain = WithoutAdapters(self.network)
            return Score(plain, self.scheduler, self.family, self.sides, self.guidance)
        return copy.deepcopy(self).requires_grad_(False)

    @torch.no_grad()
    def stretch(self, reference: Score, ratio: float) -> None:
        """Go on with the weights, w_ref + ratio (w - w_ref), in place; the reference's may be offloaded. Adapters
        begin with a product B A of zero, and their B is what goes on."""
        if isinstance(reference.network, WithoutAdapters):
            for name, p in self.network.named_parameters():
                if "lora_B" in name:
                    p.mul_(ratio)
            return
        for module, before in zip(self.network.modules(), reference.network.modules(), strict=True):
            with align_module_device(before):
                for p, p_ref in zip(module.parameters(False), before.parameters(False), strict=True):
                    p.copy_(torch.lerp(p_ref.to(p), p, ratio))

    @property
    def error_gain(self) -> float:
        """w² + (1 - w)²: out = w out(prompt) + (1 - w) out(empty), whose rounding errors are independent."""
        return self.guidance**2 + (1 - self.guidance) ** 2

    @property
    def calls(self) -> int:
        """Of the network for a state that has a prompt."""
        return 1 if self.guidance == 1 else 2

    def forward(self, t: Tensor, x: Tensor, cond: Cond | None = None) -> Tensor:
        """t: (B,) on the reverse clock; x: (B, C, H, W)."""
        s = (self.noising.s_max - t).clamp(self.s_min, self.noising.s_max)
        out = self.predict(s, x, cond)
        alpha, sigma = (broadcast(c(s).to(x.dtype), x) for c in (self.noising.alpha, self.noising.sigma))
        eps = self.prediction(out, x, alpha, sigma)
        if self.clip < math.inf:
            x0hat = ((x - sigma * eps) / alpha).clamp(-self.clip, self.clip)
            eps = (x - alpha * x0hat) / sigma
        return -eps / sigma

    def predict(self, s: Tensor, x: Tensor, cond: Cond | None) -> Tensor:
        """What the network predicts at forward times s, (B,), guided."""
        k = self.family.time(s, self.scheduler)
        dtype = next(self.network.parameters()).dtype  # diffusers' own `dtype` walks through all of them
        if cond is None:
            return self.network(x.to(dtype), k, return_dict=False)[0].to(x.dtype)

        def out(k: Tensor, x: Tensor, *given: Tensor) -> Tensor:
            return self.family.predict(self.network, x.to(dtype), k, *(v.to(dtype) for v in given)).to(x.dtype)

        given = cond.embeds, cond.vectors
        if self.guidance == 1:
            return out(k, x, *given)
        both = [torch.cat(rows) for rows in zip(cond.empty, given, strict=True)]
        empty, prompted = out(torch.cat([k, k]), torch.cat([x, x]), *both).chunk(2)
        return empty + self.guidance * (prompted - empty)


class WithoutAdapters(nn.Module):
    """A network as it was before adapters were added. If it checkpoints activations, it then does so by
    `checkpointed`."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        if network.is_gradient_checkpointing:
            network.enable_gradient_checkpointing(checkpointed)

    def __getattr__(self, name: str) -> Any:
        """As a pipeline asks its parts."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "network":
                raise
            return getattr(self.network, name)

    def forward(self, *args: Any, **options: Any) -> Any:
        self.network.disable_adapters()
        try:
            return self.network(*args, **options)
        finally:
            self.network.enable_adapters()


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


def problem(reference: Score, reward: Reward, *, beta: float, eta: float = 1.0, gamma: float = 0.0) -> ScoreAsAction:
    """Sampling from the reference as a control problem, from pure noise to the least that it was trained on; at eta = 0
    the probability flow. Data of variance 1 have the initial law's."""
    noising, shape = reference.noising, (reference.network.config.in_channels, *reference.sides)
    end = torch.tensor(noising.s_max, dtype=torch.float64)
    std = round(math.hypot(noising.alpha(end), noising.sigma(end)), 12)
    kind = ScoreAsAction if eta else ProbabilityFlow
    return kind(
        noising=noising, reference=reference, reward=reward, initial=IsotropicNormal(shape, std), shape=shape,
        beta=beta, eta=eta, gamma=gamma, s_min=reference.s_min, s_max=noising.s_max,
        error_gain=reference.error_gain,
    )  # fmt: skip


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
        latents = x / vae.config.scaling_factor
        if shift := vae.config.get("shift_factor"):
            latents = latents + shift
        latents = latents.to(vae.dtype)
        parts = [vae.decode(part, return_dict=False)[0] for part in latents.split(images_at_a_time(vae, x))]
        return (torch.cat(parts).to(x.dtype) / 2 + 0.5).clamp(0, 1)


def images_at_a_time(vae: AutoencoderKL, x: Tensor) -> int:
    """How many latents, (n, C, H, W), are decoded at a time."""
    return max(1, DECODED // (vae_factor(vae) ** 2 * x.shape[-2] * x.shape[-1]))


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
