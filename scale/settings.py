"""What a fine-tuning is made with: `Settings`, read by the command line, from a file, or made in Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from ctrl import DDIM, Exponential, Heun, Multistep2, Solver, grids
from ctrl.algorithms import (
    DDPO,
    ActorCritic,
    AdjointMatching,
    Algorithm,
    PathConsistency,
    PolicyIteration,
    PPOClip,
    PPOPenalty,
)

ASSETS = Path(__file__).with_name("assets")
EMBEDDED = ASSETS / "tiny-sd.yaml"
"""Settings for the embedded model, which is trained where there is no CUDA."""
ALGORITHMS: dict[str, type[Algorithm]] = {
    "actor-critic": ActorCritic, "ddpo": DDPO, "ppo": PPOPenalty, "ppo-clip": PPOClip,
    "path-consistency": PathConsistency, "policy-iteration": PolicyIteration, "adjoint-matching": AdjointMatching,
}  # fmt: skip
LEARN_VALUES = ("actor-critic", "ppo", "ppo-clip", "path-consistency", "policy-iteration")
"""Those with a critic."""
SOLVERS: dict[str, Callable[[], Solver]] = {"heun": Heun, "2m": Multistep2, "ddim": DDIM, "exponential": Exponential}
BOXED = "diffusers/"
GRIDS = {"log-snr": grids.log_snr, "natural": grids.natural, "uniform": grids.uniform}


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how. The defaults are for Stable Diffusion v1.5 on one GPU."""

    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub name, or folder in diffusers' format, of a Stable Diffusion 1.x or 2.x."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Which weight files, such as fp16; they are trained in float32 all the same."""

    reward: str = "pickscore"
    """What is to grow: jpeg-compressibility, jpeg-incompressibility, clip-score, pickscore, imagereward, following (the
    embedded model's pictures), NAME=MODEL for another model, module:function of yours, or "A + 0.1 * B"."""
    other_reward: str | None = "clip-score"
    """A second one, looked at in the evaluation and not trained on: it shows what the first one cost."""
    reward_python: str | None = None
    """Another environment's interpreter, for a reward whose packages do not get along with these."""
    prompts: str = "animals"
    """Trained on: a list (animals; shapes, shapes-doubtful, shapes-doubtful-more), a .txt, .csv or .jsonl file, or one
    prompt."""
    eval_prompts: str | None = None
    """Evaluated on; by default those trained on."""

    algorithm: str = "actor-critic"
    """actor-critic, ppo, ppo-clip, path-consistency, policy-iteration, adjoint-matching (differentiable rewards), or
    the discrete-time ddpo."""
    options: tuple[str, ...] = ()
    """The algorithm's own, by the names in ctrl/algorithms, such as `--options nodes=64 keep=4`."""
    critic: Literal["structured", "network"] = "structured"
    """structured: r(x0hat) plus a network (for a black box a learned stand-in for r); network: a network alone."""
    critic_width: int = 64
    """Channels of the critic's networks."""
    pretrain: int = 0
    """Epochs in which the critic alone learns, before the policy moves."""
    beta: float = 0.1
    """Reward that a nat of path KL to the untuned model is worth."""
    kl: float | None = None
    """Path KL to come to, in nats a picture: beta then adapts, from the value above."""

    solver: str = "2m"
    """How pictures are drawn in training: 2m, heun (two calls a step), ddim, exponential, or diffusers/NAME for one of
    diffusers' own (ddim, dpmsolver++, sde-dpmsolver++, unipc, euler, heun), a black box."""
    steps: int = 20
    """Time steps of a picture."""
    grid: Literal["log-snr", "natural", "uniform"] = "log-snr"
    """Where they lie: log-snr spends them evenly on the path KL; uniform is even in timesteps, natural in between."""
    eta: float = 1.0
    """Noise of the process: 1 is the reverse SDE. Deterministic diffusers samplers set it to 0."""
    guidance: float = 5.0
    """Classifier-free guidance, of the policy and of the untuned model alike; 1 is none, and halves the cost."""
    jitter: float = 0.4
    """How far times move from epoch to epoch, in steps, so that the policy is trained at all of them."""

    epochs: int = 100
    """Of one collection of pictures and one round of learning each."""
    samples: int = 64
    """Pictures an epoch, over all processes."""
    in_a_row: int = 1
    """Pictures of one prompt before the next one comes; ddpo takes their mean for its baseline, with `--options group`.
    """
    lora: int = 0
    """Rank of low-rank adapters on the attention layers; 0 trains every weight of the UNet."""
    lr: float = 1e-5
    """Learning rate of the UNet (Adam's)."""
    critic_lr: float = 1e-3
    """Learning rate of the critic."""
    ema: float = 0.0
    """Decay an update of the averaged UNet, which then is what is evaluated and kept; 0 keeps none."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the networks' arithmetic; weights, log-densities and KL are float32 in any case."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    eight_bit: bool = False
    """Adam's moments in 8 bits (bitsandbytes)."""
    offload_reference: bool = False
    """The untuned UNet's weights stay in host memory and are brought layer by layer."""
    batch: int = 8
    """Pictures drawn, and nodes evaluated, at a time on a device."""
    micro_batch: int = 4
    """Nodes in one backward pass on a device; memory and speed depend on it, nothing else."""

    seed: int = 0
    """Of everything that is drawn."""
    out: Path = Path("runs/sd15")
    """The run's folder."""
    resume: bool = False
    """Go on from the run's last checkpoint, with the same settings."""
    checkpoint_every: int = 10
    """Epochs."""
    pictures_every: int = 10
    """Epochs between grids of pictures, always from the same noise; 0 draws none."""
    log_with: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where metrics and pictures go besides the folder."""
    eval_samples: int = 128
    """Pictures for each figure of the headline of the evaluation."""
    eval_headline: int = 25
    """Steps of dpmsolver++ for these, and of Heun for the path KL."""
    eval_samplers: tuple[str, ...] = ("ddim", "dpmsolver++", "unipc", "euler")
    """The evaluation's grid: these samplers ..."""
    eval_steps: tuple[int, ...] = (10, 25, 50, 100)
    """... at these numbers of steps; none leaves the grid out."""
    eval_grid_samples: int = 32
    """Pictures for each figure in the grid."""
    dry_run: bool = False
    """Only print these settings, and what they would need."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))
        for name, values in {"algorithm": ALGORITHMS, "solver": SOLVERS}.items():
            value = getattr(self, name)
            if value not in values and not (name == "solver" and value.startswith(BOXED)):
                raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}")
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be no, bf16 or fp16, got {self.precision!r}")
        if not self.guidance >= 1:
            raise ValueError(f"guidance must be >= 1 (1 is none), got {self.guidance}")
        if self.steps < 2:
            raise ValueError(f"steps must be >= 2: one step is no path to learn from, got {self.steps}")
        if not (self.lora >= 0 and self.pretrain >= 0 and self.pictures_every >= 0):
            raise ValueError("lora, pretrain and pictures_every must be >= 0")
        if not self.beta > 0:
            raise ValueError(f"beta must be > 0, or the policy forgets the model it came from; got {self.beta}")
        if self.kl is not None and not self.kl > 0:
            raise ValueError(f"kl must be > 0 nats, got {self.kl}")
        if self.eval_samples < 2 or self.eval_grid_samples < 2:
            raise ValueError("eval_samples and eval_grid_samples must be >= 2, for a standard error")

    @staticmethod
    def read(file: Path) -> Settings:
        """From YAML or JSON; what the file leaves out is as above."""
        if not file.is_file():
            raise ValueError(f"config: there is no file {file}")
        try:
            given = yaml.safe_load(file.read_text())  # JSON is YAML
        except yaml.YAMLError as wrong:
            raise ValueError(f"config: {file} is neither YAML nor JSON: {wrong}") from wrong
        names = {f.name for f in dataclasses.fields(Settings)}
        if not isinstance(given, dict) or (unknown := given.keys() - names):
            raise ValueError(f"config: {file} must set {', '.join(sorted(names))}; got {unknown or given!r}")
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        numbers = {f.name for f in dataclasses.fields(Settings) if isinstance(f.default, float)}
        given |= {k: float(v) for k, v in given.items() if k in numbers}  # 1e-5 without a point is text to YAML
        if given.get("model") == "embedded":
            given["model"] = str(ASSETS / "tiny-sd")
        return Settings(**given)

    def plain(self) -> dict[str, Any]:
        """As JSON and YAML have it."""
        return {k: str(v) if isinstance(v, Path) else list(v) if isinstance(v, tuple) else v
                for k, v in asdict(self).items()}  # fmt: skip
