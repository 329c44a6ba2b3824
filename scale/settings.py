"""What a fine-tuning is made with, read by the command line, from a file, or made in Python.

`Tuning` is what every command here has; `Settings` is Stable Diffusion's.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import yaml
from accelerate.utils import parse_flag_from_env

from ctrl import DDIM, Exponential, Heun, Multistep2, Solver, grids
from ctrl.algorithms import (
    AWM,
    DDPO,
    ActorCritic,
    AdjointMatching,
    Algorithm,
    DiffusionNFT,
    ForwardMatching,
    NextValue,
    PathConsistency,
    PolicyIteration,
    PPOClip,
    PPOPenalty,
    QLearning,
    TDForm,
)
from ctrl.fields import check_fields, one_of
from ctrl.training.settings import constant, cosine_decay, linear_decay
from scale.rewards import names_of
from scale.samplers import known

ASSETS = Path(__file__).with_name("assets")
EMBEDDED = ASSETS / "tiny-sd.yaml"
"""Settings for the embedded model, which is trained where there is no CUDA."""
_CRITIC = ActorCritic(critic_updates=16, actor_updates=0, nodes=128, keep=1)
ALGORITHMS: dict[str, Algorithm] = {
    "actor-critic": ActorCritic(critic_updates=16, actor_updates=8, nodes=128, keep=4),
    "ddpo": DDPO(passes=1, nodes=320, clip=0.9),
    "ppo": PPOPenalty(updates=8, nodes=128, evaluation=_CRITIC),
    "ppo-clip": PPOClip(updates=8, nodes=128, evaluation=_CRITIC),
    "path-consistency": PathConsistency(updates=4, paths=16, keep=4),
    "policy-iteration": PolicyIteration(rounds=1, critic_updates=32, actor_updates=16, nodes=128),
    "q-learning": QLearning(critic_updates=16, q_updates=8, nodes=128),
    "adjoint-matching": AdjointMatching(updates=8, nodes=128),
    "forward-matching": ForwardMatching(
        updates=8, nodes=128, keep=12, target="anchored", weight="x0hat", damping=3.0, hold=0.0, critic_updates=0
    ),
    "awm": AWM(updates=8, nodes=128, clip=4e-5),
    "diffusion-nft": DiffusionNFT(updates=8, nodes=128),
    "td-form": TDForm(evaluation=_CRITIC),
    "next-value": NextValue(evaluation=_CRITIC),
}
"""Each with what a large UNet can pay for, where `ctrl`'s own defaults are for toy problems. Drawing 64 images in 20
steps under guidance takes 2,560 passes of SD v1.5's UNet, the reference at their 1,344 nodes 2,688. An update takes
three a node and half of guidance (forward, and backward to activations and weights), the slope of a critic two of the
reference's; an epoch that is kept is asked anew for another 2,688. In passes per epoch of 64 images, in thousands:

    actor-critic  23.7 (ctrl's own: 76.4)    policy-iteration  31.2 (1,043)    path-consistency  16.1 (866)
    ddpo          20.7 (54.6)                q-learning        30.2 (270)      td-form           17.7 (17.7)
    ppo           18.3 (213)                 adjoint-matching  14.1 (131)      next-value        21.8 (21.8)
    forward-matching  13.6 (169)     awm               16.3 (134)     diffusion-nft     16.3 (134)

DDPO's clip is the standard deviation of a step's log-ratio at a path KL of ½ N clip² = 8 nats in 20 steps, the trust
region of the actor-critic. (Public codes clip the mean over 16,384 dimensions at 1e-4, which is the sum at 1.6.) AWM's
is the published 1e-5 at four times the dimensions.
"""


def algorithm_named(name: str) -> Algorithm:
    """One of `ALGORITHMS`, or module:Class, one of the user's own, made without arguments."""
    module, _, attribute = name.partition(":")
    if not attribute:
        one_of("algorithm", name, ALGORITHMS)
        return ALGORITHMS[name]
    try:
        made = getattr(import_module(module), attribute)()
    except (ImportError, AttributeError, TypeError) as wrong:
        raise ValueError(f"algorithm: {name} cannot be made: {wrong}") from wrong
    if not isinstance(made, Algorithm):
        raise ValueError(f"algorithm: {name} must be a ctrl.algorithms.Algorithm, got {type(made).__name__}")
    return made


SCHEDULES = {"linear": linear_decay, "cosine": cosine_decay, "constant": constant}
SOLVERS: dict[str, Callable[[], Solver]] = {"heun": Heun, "2m": Multistep2, "ddim": DDIM, "exponential": Exponential}
BOXED = "diffusers/"
PREFERENCES = {"pickscore", "hpsv2", "hpsv2.1", "imagereward", "aesthetic"}
"""Rewards that were learned from people's choices."""
GRIDS = {
    "log-snr": grids.log_snr, "natural": grids.natural, "uniform": grids.uniform,
}  # fmt: skip
"""Besides `timesteps`, which a model's family has."""
LIMITS = {
    **dict.fromkeys(
        ("critic_width", "epochs", "samples", "batch", "micro_batch", "checkpoint_every", "keep_checkpoints",
         "patience"), ">= 1",
    ),
    **dict.fromkeys(("pretrain", "pictures_every", "reward_retries", "seed", "warmup"), ">= 0"),
    **dict.fromkeys(("beta", "eta", "gamma", "critic_lr", "reward_lr"), ">= 0"),
    **dict.fromkeys(("lr", "kl", "max_hours", "reward_timeout", "max_kl"), "> 0"),
    **dict.fromkeys(("steps", "eval_samples", "eval_kl_samples", "eval_grid_samples"), ">= 2"),
    "mismatch": "in [0, inf]", "jitter": "in [0, 0.5)", "ema": "in [0, 1)", "min_diversity": "in [0, 1]",
}  # fmt: skip

FREE = frozenset((
    "out", "resume", "overwrite", "checkpoint_every", "keep_checkpoints", "max_hours", "max_kl", "min_diversity",
    "stop_on_collapse", "patience", "mismatch", "reward_retries", "reward_timeout", "reward_python", "pictures_every",
    "log_with", "eval", "quick", "dry_run", "batch", "micro_batch", "gradient_checkpointing", "offload_reference",
    "channels_last", "compile", "split",
))  # fmt: skip
"""What may change when a run is gone on with."""


def processes() -> int:
    """How many there are, by whoever launched them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def precision_here() -> str:
    """As accelerate launch has it; else bf16 where the accelerator is a CUDA device that knows it."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return launched
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is trained, on what, and how, whatever the model. A subclass adds what its models have besides, says where
    its small model is, and may extend `limits`, `free` and `conflicts`."""

    limits: ClassVar[dict[str, str]] = LIMITS
    """By field, as `ctrl.fields.check_fields` has them."""
    free: ClassVar[frozenset[str]] = FREE
    """Fields that may change when a run is gone on with; so may those that begin with eval_."""
    embedded: ClassVar[Path | None]
    """Settings for the embedded model, which is a folder of the same name beside them; None where there is none."""
    events: ClassVar[str]
    """Folder of the tracker's events in the run's."""

    model: str
    """Hub name, or folder in diffusers' format; or embedded, the small one."""

    reward: str
    """What is to grow."""
    reward_python: str | None = None
    """Another environment's interpreter, for a reward whose packages do not get along with these."""
    reward_retries: int = 0
    """How often a reward that fails is asked again before the run ends (what was learned is kept)."""
    reward_timeout: float | None = None
    """Seconds that a reward may take for a batch. Processes wait that much longer for one another than half an hour."""

    algorithm: str = "forward-matching"
    """forward-matching; actor-critic, ppo, ppo-clip, path-consistency, policy-iteration, q-learning, td-form,
    next-value; adjoint-matching (differentiable rewards); or, for comparison, awm, diffusion-nft, and the
    discrete-time ddpo; or module:Class, a ctrl.algorithms.Algorithm of yours."""
    options: tuple[str, ...] = ()
    """The algorithm's own, over those listed under --help, by the names in ctrl/algorithms, such as
    `--options nodes=64 keep=4`; those of a part, such as `evaluation.critic_updates=8` of td-form."""
    critic: Literal["structured", "network"] = "network"
    """network: of state, time and prompt; structured: r(x0hat) plus that. A reward with a gradient is then asked, and
    differentiated through the network (and a VAE), at every node, which costs accordingly; for a black box a network
    stands in for it."""
    critic_width: int = 64
    """Channels of the critic's networks."""
    pretrain: int = 0
    """Epochs in which the critic alone learns, before the policy moves."""
    beta: float = 0.1
    """Reward that a nat of path KL to the untuned model is worth; it depends on the reward's scale, kl does not. With
    0, for ddpo alone, the untuned model is not asked, and the KL is not known before the evaluation."""
    gamma: float = 0.0
    """Weight of the policy's entropy in reward, for q-learning alone: the variance of its actions is gamma/R."""
    kl: float | None = None
    """Path KL to come to, in nats an image, the mean over the prompts trained on: beta is found for it, whatever the
    reward's scale, in place of the value above, and what is saved is brought to it."""

    solver: str = "2m"
    """How pictures are drawn in training: 2m, heun (two calls a step), ddim, exponential, or diffusers/NAME for one of
    diffusers' own (ddim, dpmsolver++, sde-dpmsolver++, unipc, euler, heun), a black box."""
    steps: int = 20
    """Time steps of a picture."""
    grid: Literal["log-snr", "natural", "uniform", "timesteps"] = "log-snr"
    """Where the time steps lie: log-snr spends them evenly on the path KL; uniform is even in time, natural in between;
    timesteps are whole ones, where diffusers' samplers ask. Such a sampler has its own, and no jitter."""
    eta: float = 1.0
    """Noise of the process: 1 is the reverse SDE. Deterministic diffusers samplers set it to 0."""
    jitter: float = 0.4
    """How far times move from epoch to epoch, in steps, so that the policy is trained at all of them."""

    epochs: int = 100
    """How often pictures are drawn and learned from; a run whose learning rate falls cannot be made longer."""
    samples: int = 64
    """Pictures an epoch, over all processes."""
    lr: float | None = None
    """Learning rate of the network, for AdamW. None is 1e-5, or 1e-4 for adapters."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How learning rates go over the run: linear and cosine fall to a tenth. A run that is constant may be resumed with
    more epochs."""
    warmup: int = 3
    """Epochs before the learning rates have their full size; Adam's first steps have, whatever the gradient."""
    critic_lr: float = 1e-3
    """Learning rate of the critic."""
    reward_lr: float = 1e-3
    """Learning rate of a reward that is itself learned."""
    ema: float = 0.0
    """Decay an update of the averaged network, which then is what is evaluated and kept; 0 keeps none."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Of the networks' arithmetic in training; no is float32. auto is what accelerate launch --mixed_precision asks
    for, else bf16 on CUDA and float32 elsewhere; config.json has what it came to. Weights, log-densities and the
    evaluation are float32 in any case, on CUDA with TensorFloat-32 (NVIDIA_TF32_OVERRIDE=0 turns it off)."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    eight_bit: bool = False
    """Adam's moments in 8 bits (bitsandbytes)."""
    offload_reference: bool = False
    """The untuned network's weights stay in host memory and are brought layer by layer."""
    channels_last: bool = False
    """Lay out the network's weights as convolutions on most devices prefer them."""
    compile: bool = False
    """Compile the networks (torch.compile): the first epoch takes minutes longer, later ones less time."""
    split: bool = False
    """Hold the networks and the critic in shares, one on each process (FSDP2), where training does not fit one device;
    slower. Afterwards, to evaluate, each process has them whole."""
    batch: int = 8
    """Pictures drawn, and nodes evaluated, at a time on a device."""
    micro_batch: int = 4
    """Nodes in one backward pass on a device; memory and speed depend on it, nothing else."""

    seed: int = 0
    """Of everything that is drawn in training; evaluations have one of their own."""
    out: Path
    """The run's folder."""
    resume: bool = False
    """Go on from the run's last whole checkpoint, with the same settings."""
    overwrite: bool = False
    """Begin anew in a folder that holds a run; what that left is deleted."""
    checkpoint_every: int = 10
    """Epochs between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the last are kept, besides the best."""
    max_hours: float | None = None
    """End before an epoch that would go over this, as if by SIGTERM: the epoch is kept, `--resume` goes on."""
    patience: int = 3
    """How many rollouts, or updates, in a row may be not finite before the run ends."""
    mismatch: float = 1e-3
    """How far apart, in nats on a path, the policy may be in rollouts and in updates, over what rounding explains."""
    max_kl: float | None = None
    """Path KL in nats over which a run warns."""
    min_diversity: float = 0.5
    """Part of its first value below which the spread of what is drawn makes a run warn: it has collapsed."""
    stop_on_collapse: bool = False
    """End the run where it would warn; the best checkpoint is kept."""
    pictures_every: int = 10
    """Epochs between grids of pictures, always from the same noise; 0 draws none."""
    log_with: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics and pictures go besides the folder."""
    eval: bool = True
    """Evaluate against the untuned model at the end, in float32, on all processes; `evaluate --run` does so later."""
    eval_samples: int = 128
    """Images for each figure of the headline of the evaluation."""
    eval_kl_samples: int = 32
    """Images of them for its path KL, which differs less from one to another, and costs as much as 100 steps each."""
    eval_samplers: tuple[str, ...] = ("ddim", "dpmsolver++", "unipc", "euler")
    """The evaluation's grid: these samplers ..."""
    eval_steps: tuple[int, ...] = (10, 25)
    """... at these numbers of steps; none leaves the grid out."""
    eval_grid_samples: int = 16
    """Images for each figure in the grid."""
    quick: bool = False
    """A trial of everything from loading to report, in OUT-quick, which is overwritten: two epochs of eight images, and
    figures of four."""
    dry_run: bool = False
    """Only print these settings, and what they would need: memory, disk, calls of the network, and hours."""

    def __post_init__(self) -> None:
        if self.model == "embedded":
            if self.embedded is None:
                raise ValueError("model: no small model of this family is embedded: give a hub name or a folder")
            object.__setattr__(self, "model", str(self.embedded.with_suffix("")))
        if isinstance(self.out, str):
            object.__setattr__(self, "out", Path(self.out))
        check_fields(self, self.limits)
        algorithm_named(self.algorithm)
        if self.solver.startswith(BOXED):
            known(self.solver.removeprefix(BOXED))
        else:
            one_of("solver", self.solver, SOLVERS)
        for name in self.eval_samplers:
            self.check_sampler(name)
        self._check_together()

    def resolved(self) -> Self:
        """What is left to be chosen is chosen: the settings of a run on this machine, as its config.json has them."""
        precision = precision_here() if self.precision == "auto" else self.precision
        chosen = dataclasses.replace(self, precision=precision, lr=self.usual_lr if self.lr is None else self.lr)
        return chosen.small() if self.quick else chosen

    def small(self) -> Self:
        """The same for a trial."""
        return dataclasses.replace(
            self, quick=False, out=self.out.with_name(f"{self.out.name}-quick"), overwrite=not self.resume,
            epochs=min(self.epochs, 2), pretrain=min(self.pretrain, 1), samples=max(8, processes()), pictures_every=1,
            eval_samples=4, eval_kl_samples=4, eval_grid_samples=4, eval_samplers=self.eval_samplers[:1],
            eval_steps=self.eval_steps[:1],
        )  # fmt: skip

    @property
    def usual_lr(self) -> float:
        """Of the kind of training."""
        return 1e-5

    def check_sampler(self, name: str) -> None:
        """Raise unless the evaluation can draw by it."""
        known(name)
        if name.startswith("sde"):
            raise ValueError(f"eval_samplers: {name} draws noise as it goes, so before and after could not be paired")

    def _check_together(self) -> None:
        """Raise at settings that exclude one another."""
        for conflict, here in self.conflicts().items():
            if here:
                raise ValueError(conflict)

    def conflicts(self) -> dict[str, bool]:
        """What must not be, and whether it is."""
        boxed = self.solver.startswith(BOXED)
        noiseless = self.eta == 0 or (boxed and not self.solver.removeprefix(BOXED).startswith("sde"))
        return {
            "resume goes on with a run, overwrite deletes it: take one": self.resume and self.overwrite,
            "gamma must be > 0 for q-learning, which learns from actions drawn around the mean, and 0 otherwise": (
                (self.algorithm == "q-learning") != (self.gamma > 0)
            ),
            "beta must be > 0, but for ddpo without kl: no price on the KL, no best action": (
                self.beta == 0 and (self.algorithm != "ddpo" or self.kl is not None or self.max_kl is not None)
            ),
            "compile and offload_reference exclude one another: the weights of what is compiled stay where they are": (
                self.compile and self.offload_reference
            ),
            "split does not support offload_reference, compile or eight_bit, which need whole weights": (
                self.split and (self.offload_reference or self.compile or self.eight_bit)
            ),
            "eval_steps must be >= 1": any(steps < 1 for steps in self.eval_steps),
            "kl and max_kl must be left out with eta = 0, or a sampler of diffusers that draws no noise: without noise "
            "there is no path KL": (self.kl is not None or self.max_kl is not None) and noiseless,
        }

    def check_places(self) -> None:
        """Raise unless what is to be written can be, and an interpreter is one."""
        there = next(p for p in (self.out.absolute(), *self.out.absolute().parents) if p.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"out: {self.out} cannot be made: {there} is no folder that can be written to")
        if self.reward_python is not None and shutil.which(self.reward_python) is None:
            raise ValueError(f"reward_python {self.reward_python!r} is no program that can be run")

    @classmethod
    def read(cls, file: Path) -> Self:
        """From YAML or JSON; what the file leaves out is as above."""
        if not file.is_file():
            raise ValueError(f"config: there is no file {file}")
        try:
            given = yaml.safe_load(file.read_text())  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError) as wrong:
            raise ValueError(f"config: {file} is neither YAML nor JSON: {wrong}") from wrong
        if not isinstance(given, dict):
            raise ValueError(f"config: {file} must have lines such as `epochs: 100`, got {given!r}")
        kinds = {f.name: str(f.type) for f in dataclasses.fields(cls)}
        for name in given:
            one_of(f"config: {file}: what is set", str(name), kinds)
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        for name, value in given.items():
            if "float" in kinds[name] and isinstance(value, str):  # 1e-5 without a point is text to YAML
                with suppress(ValueError):
                    given[name] = float(value)
        if given.get("precision") is False:  # no, to YAML
            given["precision"] = "no"
        return cls(**given)

    def check_resumed(self) -> None:
        """Raise unless the run that is gone on with was made with the same, but for what does not matter to it."""
        file = self.out / "config.json"
        if not (self.resume and file.is_file()):
            return
        before, now = self.read(file).plain(), self.plain()
        free = self.free | ({"epochs"} if self.schedule == "constant" else set())
        changed = [name for name in now if now[name] != before[name] and name not in free and name[:5] != "eval_"]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name} is {now[name]!r}, and was {before[name]!r} in {self.out}: resume with the same, or take "
                f"another folder"
            )

    def plain(self) -> dict[str, Any]:
        """As JSON and YAML have it."""
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
                for k, v in asdict(self).items()}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings(Tuning):
    """What is trained, on what, and how, of a text-to-image model. The defaults are for Stable Diffusion v1.5 on one
    GPU; those of other families are in their commands."""

    limits: ClassVar[dict[str, str]] = {
        **LIMITS, "guidance": ">= 1", "in_a_row": ">= 1", "lora": ">= 0", "eval_headline": ">= 1",
        "t5_tokens": "in [0, 512]", "lora_alpha": "> 0",
    }  # fmt: skip
    free: ClassVar[frozenset[str]] = FREE | {"other_reward"}
    embedded: ClassVar[Path] = EMBEDDED
    events: ClassVar[str] = "sd15"

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub name, or folder in diffusers' format, of a Stable Diffusion 1.x, 2.x, XL, 3 or 3.5; or embedded, the small
    one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Which weight files, such as fp16; they are trained in float32 all the same."""

    reward: str = "pickscore"
    """What is to grow: jpeg-compressibility, jpeg-incompressibility, clip-score, pickscore, hpsv2, hpsv2.1,
    imagereward, aesthetic, following or following-soft (of the embedded models' pictures; the soft one has a gradient),
    NAME=MODEL for another model, module:function of yours, or "A + 0.1 * B"."""
    other_reward: str | None = "auto"
    """A second one, looked at in the evaluation and not trained on: it shows what the first one cost. auto is
    clip-score beside those that people's choices were learned in, else none."""
    prompts: str = "animals"
    """Trained on: a list (animals; shapes, shapes-doubtful, shapes-doubtful-more), one prompt, or a file: .txt with a
    prompt a line, .csv or .jsonl with a column `prompt`, the others being the reward's metadata."""
    eval_prompts: str | None = None
    """Evaluated on; by default those trained on."""
    in_a_row: int = 1
    """Pictures of one prompt before the next one comes; ddpo takes their mean for its baseline, with the option
    group=N of the same N."""

    guidance: float = 5.0
    """Classifier-free guidance, of the policy and of the untuned model alike; 1 is none, and halves the cost."""
    negative_prompt: str = ""
    """What guidance leads away from, for both; by default the empty prompt."""
    size: str | None = None
    """Of images, in pixels: 512, or 768x512, width first; by default the model's own."""

    lora: int = 0
    """Rank of low-rank adapters; 0 trains every weight."""
    lora_alpha: float | None = None
    """The adapters' product is multiplied by this over the rank; by default by 1."""
    lora_targets: tuple[str, ...] = ()
    """Layers that get adapters; by default those of the attention."""
    frozen: Literal["float32", "bf16"] = "float32"
    """Of the weights that adapters leave as they are, and of the text encoders. bf16 halves their memory; the path KL
    and the evaluation then have its rounding."""
    t5_tokens: int = 256
    """Of Stable Diffusion 3 and 3.5: tokens of a prompt for the T5, or zeros in its place where it is absent; 0 for a
    model that was trained without."""

    out: Path = Path("runs/sd15")
    """The run's folder."""
    eval_headline: int = 25
    """Steps of the evaluation's headline, by dpmsolver++, or euler of a rectified flow, and of Heun for its path KL."""

    def resolved(self) -> Self:
        other = self.other_reward
        if other == "auto":
            other = "clip-score" if PREFERENCES & {*names_of(self.reward)} else None
        return dataclasses.replace(super().resolved(), other_reward=other)

    def small(self) -> Self:
        found = super().small()
        samples = -(-found.samples // self.in_a_row) * self.in_a_row
        return dataclasses.replace(found, samples=samples, eval_headline=min(self.eval_headline, 10))

    @property
    def family_options(self) -> dict[str, Any]:
        """What the model's family is made with."""
        return {"size": self.sides, "negative_prompt": self.negative_prompt, "t5_tokens": self.t5_tokens}

    @property
    def sides(self) -> tuple[int, int] | None:
        """Height and width."""
        if self.size is None:
            return None
        width, _, height = self.size.partition("x")
        return int(height or width), int(width)

    @property
    def usual_lr(self) -> float:
        return 1e-4 if self.lora else super().usual_lr

    def conflicts(self) -> dict[str, bool]:
        """Those of all, and of adapters."""
        return super().conflicts() | {
            f"size must be such as 512 or 768x512, in pixels, width first, got {self.size!r}": (
                self.size is not None and re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)?", self.size) is None
            ),
            "split does not support frozen = bf16: a part has one precision": self.split and self.frozen == "bf16",
            "frozen = bf16 needs lora, the adapters' rank, and precision = bf16": (
                self.frozen == "bf16" and (self.lora == 0 or self.precision not in ("auto", "bf16"))
            ),
            "negative_prompt needs guidance over 1": bool(self.negative_prompt) and self.guidance == 1,
            "lora_alpha and lora_targets need lora, the adapters' rank": (
                self.lora == 0 and (self.lora_alpha is not None or bool(self.lora_targets))
            ),
            "offload_reference: with lora the reference is the same network, its adapters off": bool(
                self.lora and self.offload_reference
            ),
            "compile: with lora the reference is the same network, and would be compiled anew at every turn": bool(
                self.lora and self.compile
            ),
        }
