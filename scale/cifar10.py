"""Fine-tune a diffusion model of small pictures as a sampler of few steps, by `ctrl.fit`.

    python scale/cifar10.py                                      google/ddpm-cifar10-32 where there is CUDA, else the
                                                                 small embedded model, at 10 steps, towards a class
    python scale/cifar10.py --reward energy --data data --download     towards the data themselves (DxMI's loop)
    python scale/cifar10.py --algorithm next-value                     its discrete value form; td-form, ddpo
    python scale/cifar10.py decided --reward mine:reward               where along its paths the reward is decided
    python scale/cifar10.py pretrain --data mine                       a model of one's own pictures, from nothing
    python scale/cifar10.py evaluate --run runs/cifar10 --samples 10000
    python scale/cifar10.py sample --run runs/cifar10
    python scale/cifar10.py export --run runs/cifar10                  the pipeline of its best checkpoint
    accelerate launch scale/cifar10.py ...                             the same on many devices

A run leaves in OUT: config.json, metrics.jsonl, tensorboard's events, checkpoints (`--resume` goes on from the last),
pictures on the same noise over training, evaluation.json, report.html, and pipeline/, a `DDPMPipeline` for diffusers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
import tyro
import yaml
from accelerate import Accelerator
from diffusers import DDPMPipeline
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from ctrl import Noise
from ctrl.algorithms import InverseRL
from ctrl.fields import one_of
from ctrl.noise import INITIAL, PATH
from ctrl.training.device import make_accelerator
from scale import data, pixels, report, requirements, tuning
from scale.diffusion import Decoded, Score, StandIn
from scale.models import readable
from scale.pixels import Evaluation
from scale.recipes.pretrain import Pretrain, pretrain
from scale.rewards import Reward, terms, unmade
from scale.settings import ASSETS, FREE, LIMITS, Tuning, algorithm_named

ENERGY = "energy"
"""The reward that is learned."""


@dataclass(frozen=True, kw_only=True)
class Settings(Tuning):
    """What is trained, on what, and how. The defaults are for google/ddpm-cifar10-32 on one GPU."""

    limits: ClassVar[dict[str, str]] = {**LIMITS, "energy_updates": ">= 1", "energy_squares": ">= 0"}
    free: ClassVar[frozenset[str]] = FREE | {"download", "fid_weights"}
    events: ClassVar[str] = "cifar10"
    embedded: ClassVar[Path] = ASSETS / "tiny-cifar10.yaml"

    model: str = "google/ddpm-cifar10-32"
    """Hub name, or folder in diffusers' format, of an unconditional DDPMPipeline; or embedded, the small one."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    variant: str | None = None
    """Which weight files, such as fp16; they are trained in float32 all the same."""

    reward: str = "cifar10-class=horse"
    """What is to grow: cifar10-class=NAME (the log-probability of a class under a small classifier; another one
    judges), jpeg-compressibility, jpeg-incompressibility, module:function of yours, a sum "A + 0.1 * B"; or energy,
    which is learned beside the policy and tells data from pictures drawn."""
    data: Path | None = None
    """CIFAR-10 in any of its layouts, or a folder of pictures of the model's size: for the energy, and to look for
    copies."""
    download: bool = False
    """Fetch CIFAR-10 to `data` first."""
    energy_updates: int = 1
    """Optimiser steps of the energy an epoch."""
    energy_squares: float = 0.1
    """Weight of the energies' squares, which keeps them in bounds."""

    algorithm: str = "actor-critic"
    """The form of the update: actor-critic (the gradient of V), td-form, next-value (DxMI's, in discrete time), ddpo;
    or ppo, ppo-clip, path-consistency, policy-iteration, q-learning, adjoint-matching (rewards with a gradient)."""
    solver: str = "2m"
    """How pictures are drawn in training: 2m, exponential (ancestral sampling, far worse at ten steps), heun
    (two calls a step), ddim, or diffusers/NAME for one of diffusers' own (ddim, dpmsolver++, sde-dpmsolver++, unipc,
    euler, heun), a black box."""
    steps: int = 10
    """Time steps of a picture, from 4 to the model's timesteps."""
    grid: Literal["log-snr", "natural", "uniform", "timesteps"] = "log-snr"
    """Where the time steps lie: log-snr spends them evenly on the path KL; uniform is even in time, natural in between;
    timesteps are whole ones, where diffusers' samplers ask too: with exponential and no jitter the sampler of just
    these steps is trained."""

    samples: int = 256
    """Pictures an epoch, over all processes."""
    batch: int = 256
    """Pictures drawn, and nodes evaluated, at a time on a device."""
    micro_batch: int = 128
    """Nodes in one backward pass on a device: of google/ddpm-cifar10-32 each takes 25 MiB in bf16, 49 in float32."""

    out: Path = Path("runs/cifar10")
    """The run's folder."""
    eval_sampler: str = "dpmsolver++"
    """Of the headline, at `steps` steps, and of the pipeline that is kept: ancestral, ddim, dpmsolver++,
    sde-dpmsolver++. It stands against the best of these and unipc, of the untuned model, at as many."""
    eval_samplers: tuple[str, ...] = ("ancestral", "ddim", "dpmsolver++", "unipc")
    """The evaluation's grid: these samplers ..."""
    eval_steps: tuple[int, ...] = (10, 20, 50)
    """... at these numbers of steps; none leaves the grid out."""
    eval_grid_samples: int = 32
    """Images for each figure in the grid."""
    eval_kl_samples: int = 128
    """Images of the headline's for its path KL."""
    fid_weights: Path | None = None
    """File of the Inception network's weights: computes the FID too, by torch-fidelity, against `data`."""

    def __post_init__(self) -> None:
        for name in ("data", "fid_weights"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))
        super().__post_init__()
        self.check_sampler(self.eval_sampler)

    def check_sampler(self, name: str) -> None:
        """Raise unless the evaluation can draw by it."""
        one_of("eval_sampler", name, pixels.SAMPLERS)

    def conflicts(self) -> dict[str, bool]:
        """Those of all, and of data."""
        return super().conflicts() | {
            "data must be given for reward energy, which tells data from pictures drawn: --data FOLDER, --download": (
                self.reward == ENERGY and self.data is None
            ),
            "data must be given with download, the folder to fetch CIFAR-10 to": self.download and self.data is None,
            "data must be given with fid_weights: the FID is against them": (
                self.fid_weights is not None and self.data is None
            ),
            "steps must be at least 4": self.steps < 4,
            "eval_sampler must be another than unipc, which a DDPMPipeline cannot call: take dpmsolver++": (
                self.eval_sampler == "unipc"
            ),
        }


# ------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True, kw_only=True)
class Task(tuning.Task):
    """What `ctrl.fit` is handed, and what the evaluation is."""

    reward: Reward
    """Of pictures, for the evaluation."""
    pictures: data.Pictures | None


def pipeline_of(s: Settings, device: torch.device) -> DDPMPipeline:
    """Loaded, with a UNet that is to be trained."""
    pipeline = pixels.load(s.model, s.revision, s.variant)
    tuning.lay_out(s, pipeline.unet)
    pipeline.unet.train(False)  # there is dropout in some; the reference has none
    return tuning.placed(s, pipeline, device)


def pictures_of(s: Settings, pipeline: DDPMPipeline | pixels.Outline) -> data.Pictures | None:
    """What `data` has, of the model's size."""
    if s.data is None:
        return None
    found, size = data.read_or_download(s.data, s.download), pipeline.unet.config.sample_size
    if found.pixels.shape[-2:] != (size, size):
        raise ValueError(
            f"data: the pictures of {s.data} are {found.pixels.shape[-1]} x {found.pixels.shape[-2]}, those of "
            f"{s.model} {size} x {size}"
        )
    return found


def drawn_data(s: Settings, score: Score, pictures: data.Pictures) -> Callable[[Tensor], Tensor]:
    """One picture for each sample id, at random, flipped at random, and noised to s_min, as samples end there."""
    noise, end = Noise(s.seed + 2), torch.tensor(score.s_min)
    alpha, sigma = score.noising.alpha(end), score.noising.sigma(end)

    def of(ids: Tensor) -> Tensor:
        u, flip = noise.uniform(ids.cpu(), (2,), INITIAL).unbind(1)
        x = pictures.batch((u * len(pictures)).long(), flip < 0.5)
        return (alpha * x + sigma * noise.normal(ids.cpu(), x.shape[1:], PATH).to(x)).to(ids.device)

    return of


def energy_of(s: Settings, size: int) -> StandIn:
    """Minus the energy, of pictures in [-1, 1], `size` a side; it tells some from others from the beginning."""
    made = StandIn(3, size, width=s.critic_width)
    made.tower.last.reset_parameters()
    return made


class LearnedReward:
    """The energy, as a reward of pictures in [0, 1]."""

    differentiable, __name__ = True, ENERGY

    def __init__(self, energy: nn.Module) -> None:
        self.energy = energy

    def __call__(self, images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        device = next(self.energy.parameters()).device
        return self.energy(2 * images.to(device) - 1).to(images.device)


def inner(s: Settings) -> Settings:
    """Beside a reward that is learned an algorithm keeps one epoch, unless it is told otherwise."""
    keeps = any(f.name == "keep" for f in dataclasses.fields(algorithm_named(s.algorithm)))
    return dataclasses.replace(s, options=("keep=1", *s.options)) if keeps else s


def check(s: Settings, given: Reward | None = None) -> None:
    """What can be wrong without a model."""
    tuning.check(s)
    if s.reward != ENERGY and given is None:
        try:
            terms(s.reward)
        except ValueError as wrong:
            raise ValueError(f"{wrong}; or {ENERGY}") from wrong
    if s.fid_weights is not None:
        if not s.fid_weights.is_file():
            raise ValueError(f"fid_weights: there is no file {s.fid_weights}")
        if find_spec("torch_fidelity") is None:
            raise ValueError("fid_weights needs torch-fidelity: pip install torch-fidelity")


def rehearse(s: Settings, outline: pixels.Outline, learned: bool, differentiable: bool) -> None:
    """Raise at what can be wrong with these settings on a model, before its weights are loaded."""
    tuning.check_timesteps(outline, steps=(s.steps,), eval_steps=s.eval_steps)
    task = parts(s, learned, differentiable, outline, unmade)
    task.algorithm.check(task.problem, task.fit.solver, task.critic)


def parts(
    s: Settings, learned: bool, differentiable: bool, outline: pixels.Outline, reward: Reward
) -> tuning.Task:  # fmt: skip
    """What `fit` would be handed; the outline's network may be a stand-in. Data of the energy are zero."""
    policy = Score.of(outline)
    judged: Any = Decoded(None, reward, differentiable=differentiable, chunk=s.batch)
    if learned:
        judged = energy_of(s, outline.unet.config.sample_size)
    task, made, algorithm = tuning.planned(inner(s) if learned else s, outline, policy.frozen(), judged)
    if learned:
        algorithm = InverseRL(
            algorithm, lambda ids: torch.zeros(len(ids), *task.shape), s.energy_squares, s.energy_updates
        )
    return tuning.Task(
        problem=task, policy=policy, learner=tuning.learner_of(s, task, policy), algorithm=algorithm,
        critic=tuning.critic_of(s, task, differentiable) if algorithm.learns_value else None, conditions=None, fit=made,
    )  # fmt: skip


def dry_run(s: Settings) -> None:
    """Print the settings and what they need, unless a run would refuse them before it loads weights."""
    check(s)
    outline, learned = pixels.outline(s.model, s.revision, s.variant), s.reward == ENERGY
    rehearse(s, outline, learned, learned or tuning.differentiable(s))
    if not s.download:
        pictures_of(s, outline)
    accelerator = make_accelerator(mixed_precision=s.precision)
    said = needs(s, accelerator)
    accelerator.print(yaml.safe_dump(s.plain(), sort_keys=False) + said)


def assemble(s: Settings, given: Reward | None, accelerator: Accelerator) -> Task:
    """Everything `fit` needs; what can be wrong is found in the order of what it costs to find."""
    check(s, given)
    outline = pixels.outline(s.model, s.revision, s.variant)
    learned = s.reward == ENERGY and given is None
    shown = None if learned else tuning.rewards_of(s, given)["reward"]
    differentiable = learned or tuning.differentiable(s, shown)
    rehearse(s, outline, learned, differentiable)
    with accelerator.main_process_first():
        pictures = pictures_of(s, outline)
    pipeline = pipeline_of(s, accelerator.device)
    policy = Score.of(pipeline)
    reference = tuning.reference_of(s, policy, accelerator.device)
    torch.manual_seed(s.seed)  # of the first weights of energy and critic
    if learned:
        reward: Any = energy_of(s, pipeline.unet.config.sample_size)
    else:
        reward = Decoded(None, shown, differentiable=differentiable, chunk=s.batch)
    task, made, algorithm = tuning.planned(inner(s) if learned else s, pipeline, reference, reward)
    if learned:
        assert pictures is not None
        algorithm = InverseRL(algorithm, drawn_data(s, policy, pictures), s.energy_squares, s.energy_updates)
    critic = tuning.critic_of(s, task, differentiable) if algorithm.learns_value else None
    return Task(
        problem=task, policy=policy, learner=tuning.learner_of(s, task, policy), algorithm=algorithm, critic=critic,
        conditions=None, fit=made, pipeline=pipeline,
        reward=LearnedReward(reward) if learned else shown, pictures=pictures,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ training


def train(settings: Settings, reward: Reward | None = None) -> tuning.Outcome:
    """Fine-tune, evaluate, keep. reward: a function of yours in place of `settings.reward`, recorded by its name."""

    def show(s: Settings, task: Task) -> Tensor:
        return pixels.draw(task.pipeline, range(tuning.Watch.SHOWN), s.eval_sampler, s.steps, s.batch)

    return tuning.train(
        settings, reward, assemble=assemble, finish=finish, kl_steps=lambda s: pixels.KL_STEPS, show=show
    )


def measure_decided(settings: Settings, reward: Reward | None = None) -> Path:
    """Measure, before training and with a run's settings, where along the paths the reward is decided."""
    if settings.reward == ENERGY and reward is None:
        raise ValueError(
            "decided does not support reward = energy, which is learned during the run: name another reward"
        )
    s = tuning.named(settings, reward).resolved()
    accelerator = tuning.accelerator_of(s)
    return tuning.measure_decided(s, assemble(s, reward, accelerator), accelerator)


def finish(
    s: Settings, task: Task, history: list[dict[str, Any]], accelerator: Accelerator
) -> Evaluation | None:  # fmt: skip
    """Keep the pipeline, evaluate it against the untuned model, and tell the story. Every process calls it: they share
    the evaluation, and the main one has it."""
    if accelerator.is_main_process:
        save(s, task.pipeline)
        card(s, None)
    if not s.eval:
        accelerator.print(f"-> {s.out / 'pipeline'}")
        return None
    untuned = tuning.untuned(task.pipeline, cast(Score, task.problem.reference))
    found = judged(s, task.pipeline, untuned, task.reward, task.pictures)
    if not accelerator.is_main_process:
        return None
    found.write(s.out / "evaluation.json")
    card(s, found)
    sides = [
        pixels.draw(p, range(2 * tuning.Watch.SHOWN), s.eval_sampler, s.steps, s.batch)
        for p in (untuned, task.pipeline)
    ]
    report.html(
        s.out / "report.html", f"{s.model}, tuned on {s.reward}", found.summary(),
        {
            "The same noise, before and after": report.pictures(dict(zip(("before", "after"), sides, strict=True))),
            "Training": report.curves(history),
            "By sampler and number of steps": report.samplers(found.grid),
            "Settings": report.listed(s.plain()),
        },
    )  # fmt: skip
    print(found.summary(), f"-> {s.out / 'report.html'}, {s.out / 'pipeline'}", sep="\n")
    return found


def judged(
    s: Settings, pipeline: DDPMPipeline, untuned: DDPMPipeline, reward: Reward, pictures: data.Pictures | None
) -> Evaluation:
    """As the settings say."""
    return pixels.evaluate(
        pipeline, untuned, reward, pictures=pictures, fid_weights=s.fid_weights, **plan_of_evaluation(s)
    )


def plan_of_evaluation(s: Settings) -> dict[str, Any]:
    """The options of `pixels.evaluate`."""
    return {
        "samples": s.eval_samples, "headline": (s.eval_sampler, s.steps), "batch": s.batch,
        "grid": [(name, steps) for name in s.eval_samplers for steps in s.eval_steps],
        "grid_samples": s.eval_grid_samples, "kl_samples": s.eval_kl_samples,
    }  # fmt: skip


def save(s: Settings, pipeline: DDPMPipeline) -> None:
    """OUT/pipeline: diffusers draws from it by the sampler of the evaluation, from the last timestep on."""
    kept = DDPMPipeline(pipeline.unet, pixels.scheduler(s.eval_sampler, pipeline))
    kept.save_pretrained(s.out / "pipeline")
    readable(s.out / "pipeline")


def card(s: Settings, found: Evaluation | None) -> None:
    """Beside the weights, a model card as the hub reads it, with what was found if it was evaluated."""
    text = f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
base_model: {s.model}
base_model_relation: finetune
tags: [ddpm, reinforcement-learning, score-as-action]
---

# Tuned on {s.reward}

{s.model}, fine-tuned by {s.algorithm} in continuous time (arXiv 2502.01819) on the reward `{s.reward}`, as a sampler of
{s.steps} steps. The license is the base model's.

```python
from diffusers import DDPMPipeline

pipeline = DDPMPipeline.from_pretrained("pipeline")
image = pipeline(num_inference_steps={s.steps}).images[0]
```

{found.summary() if found else ""}
"""
    (s.out / "pipeline" / "README.md").write_text(text)


def needs(s: Settings, accelerator: Accelerator) -> str:
    """Memory, disk and work of a run, from the model's configs alone."""
    outline, learned = pixels.outline(s.model, s.revision, s.variant), s.reward == ENERGY
    tuning.lay_out(s, outline.unet)
    differentiable = learned or tuning.differentiable(s)
    return requirements.text(
        s, outline, partial(parts, s, learned, differentiable), accelerator, differentiable=differentiable, others={},
        evaluation=(pixels.calls_of_evaluation(**plan_of_evaluation(s)) if s.eval else 0)
        + tuning.calls_of_match_kl(s, pixels.KL_STEPS),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ after training


@dataclass(frozen=True)
class Evaluate(tuning.Evaluate):
    """What a run gained, against the model it began with. Leave out to keep what the run was made with; of a run on the
    energy, which is not kept, name another reward. 10000 and 50000 samples are usual for Frechet distances."""

    data: Path | None = None
    """To look for copies, and for the FID."""
    fid_weights: Path | None = None
    """File of the Inception network's weights."""


def tuned(run: Path) -> tuple[Settings, DDPMPipeline]:
    """A run's settings and its pipeline, loaded by diffusers alone."""
    s = tuning.settings_of_run(Settings, run)
    if not (run / "pipeline").is_dir():
        raise ValueError(f"run: {run} has no pipeline yet: let the training end, with --resume, or export a checkpoint")
    return s, pixels.load(str(run / "pipeline"))


def evaluate_run(e: Evaluate, reward: Reward | None = None) -> Evaluation:
    """Write evaluation.json anew. reward: a function of yours in place of `e.reward`."""
    s, pipeline = tuned(e.run)
    e = tuning.named(e, reward)
    if (e.reward or s.reward) == ENERGY:
        raise ValueError("reward: the energy of a run is not kept beside its pipeline; name another, --reward")
    s, accelerator = e.over(s, data=e.data, fid_weights=e.fid_weights), make_accelerator()
    untuned = pixels.load(s.model, s.revision, s.variant).to(accelerator.device)
    found = judged(
        s, pipeline.to(accelerator.device), untuned, tuning.rewards_of(s, reward)["reward"], pictures_of(s, untuned)
    )
    if accelerator.is_main_process:
        found.write((e.out or e.run) / "evaluation.json")
        print(found.summary())
    return found


def export(o: tuning.Export) -> Path:
    """Write RUN/pipeline from a checkpoint; of a run on the energy the last one, if none is named."""
    s = tuning.settings_of_run(Settings, o.run)
    if s.reward == ENERGY and o.epoch is None:  # epochs have different rewards, and none is the best
        o = dataclasses.replace(o, epoch=max(tuning.epochs_of(o.run), default=None))
    folder, pipeline = tuning.chosen(o, s.beta), pipeline_of(s, torch.device("cpu"))
    tuning.restore(pipeline.unet, folder)
    save(dataclasses.replace(s, out=o.run), pipeline)
    print(f"{folder.name} -> {o.run / 'pipeline'}")
    return folder


@dataclass(frozen=True)
class Sample(tuning.Sample):
    """Pictures from a run, or from the model it began with."""

    sampler: str | None = None
    """ancestral, ddim, dpmsolver++, sde-dpmsolver++ or unipc; by default that of the run's evaluation."""
    steps: int | None = None
    """Time steps; by default those of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler is not None:
            one_of("sampler", self.sampler, pixels.SAMPLERS)


def sample(o: Sample) -> Path:
    """Draw, and write one file a picture and a grid."""
    s, pipeline = tuned(o.run)
    pipeline = pixels.load(s.model, s.revision, s.variant) if o.untuned else pipeline
    device, name, steps = make_accelerator().device, o.sampler or s.eval_sampler, o.steps or s.steps
    images = pixels.draw(pipeline.to(device), range(o.n), name, steps, s.batch, o.seed)
    out = o.out or o.run / "samples"
    report.keep_all(images, out)
    return out


# ------------------------------------------------------------------------------------------ the command line


APART: dict[str, dict[str, Any]] = {
    "reward": {"algorithm": "actor-critic", "critic": "network", "options": (), "warmup": 3},
    "algorithm": {"options": (), "warmup": 3},
}  # fmt: skip
"""What goes with the embedded model's reward or algorithm, and not with another."""
COMMANDS = ("finetune", "decided", "pretrain", "evaluate", "sample", "export")


def main(arguments: list[str]) -> None:
    """finetune (which may be left out), decided, pretrain, evaluate, sample, export."""
    command, *rest = arguments if arguments[:1] and arguments[0] in COMMANDS else ("finetune", *arguments)
    if command == "pretrain":
        pretrain(tyro.cli(Pretrain, args=rest))
    elif command == "evaluate":
        evaluate_run(tyro.cli(Evaluate, args=rest))
    elif command == "sample":
        sample(tyro.cli(Sample, args=rest))
    elif command == "export":
        export(tyro.cli(tuning.Export, args=rest))
    else:
        s = tuning.settings_of(Settings, rest, APART, str(__doc__)).resolved()
        does = dry_run if s.dry_run else measure_decided if command == "decided" else train
        does(s)


if __name__ == "__main__":
    tuning.run_command(main)
