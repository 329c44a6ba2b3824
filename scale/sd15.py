"""Fine-tune Stable Diffusion 1.x or 2.x on a reward: reinforcement learning in continuous time, by `ctrl.fit`.

    python scale/sd15.py                                      SD v1.5 where there is CUDA, else the small embedded model
    python scale/sd15.py --reward pickscore --prompts my.txt --kl 20
    python scale/sd15.py --config mine.yaml --dry-run         what a file of settings comes to, and what it would need
    python scale/sd15.py evaluate --run runs/sd15             what a run gained, by other samplers, steps, prompts
    python scale/sd15.py sample --run runs/sd15 --prompts "a fox"
    python scale/sd15.py export --run runs/sd15               the pipeline of its best checkpoint
    accelerate launch scale/sd15.py ...                       the same on many devices

A run leaves in OUT: config.json, metrics.jsonl, tensorboard's events, checkpoints (`--resume` goes on from the last),
pictures on the same noise over training, evaluation.json, report.html, and pipeline/, which diffusers loads.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
import tyro
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs, cpu_offload, init_empty_weights
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from ctrl import NetworkCritic, Solver, StructuredCritic, checkpoint
from ctrl.algorithms import DDPO, ActorCritic, Algorithm, GaussianNetwork, KLBudget
from ctrl.fields import check_fields
from ctrl.fit import Run, fit
from ctrl.fit import Settings as FitSettings
from ctrl.guards import Guards
from ctrl.problem import ScoreAsAction
from ctrl.stops import RunFailed
from ctrl.value import Critic
from scale import models, report
from scale import prompts as prompt_lists
from scale.diffusion import Decoded, Prompts, Score, StandIn, Value, problem
from scale.evaluate import Evaluation, draw, evaluate
from scale.prompts import Prompt
from scale.rewards import Patient, Reward, ask, ceiling_of, reward_of, terms
from scale.samplers import BlackBox, known, sampler
from scale.settings import ALGORITHMS, ASSETS, BOXED, EMBEDDED, GRIDS, LEARN_VALUES, SOLVERS, Settings

# ------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True)
class Task:
    """What the settings name, made."""

    pipeline: StableDiffusionPipeline
    policy: Score
    learner: nn.Module
    problem: ScoreAsAction
    critic: Critic | None
    algorithm: Algorithm
    conditions: Prompts
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: dict[str, Reward]
    fit: FitSettings


def algorithm_of(s: Settings, noisy: bool) -> Algorithm:
    """By name, with its options, within a KL budget if there is one."""
    made = ALGORITHMS[s.algorithm]()
    for option in s.options:
        made = changed(made, *option.partition("=")[::2])
    if not noisy and isinstance(made, ActorCritic):
        made = dataclasses.replace(made, nats=math.inf)  # without noise there is no KL to keep within
    return made if s.kl is None else KLBudget(made, s.kl)


def changed(what: Any, name: str, value: str) -> Any:
    """A dataclass with one number changed, `part.name` for one of a part's."""
    first, _, rest = name.partition(".")
    now = {f.name: getattr(what, f.name) for f in dataclasses.fields(what)}
    if rest and dataclasses.is_dataclass(now.get(first)):
        return dataclasses.replace(what, **{first: changed(now[first], rest, value)})
    if rest or not isinstance(now.get(name), int | float):
        numbers = [n for n, v in now.items() if isinstance(v, int | float)]
        raise ValueError(f"options: {type(what).__name__} has {', '.join(numbers)}, got {name!r}")
    kind, given = type(now[name]), _plain(value)
    if kind is float and type(given) is int:
        given = float(given) if abs(given) < 2**53 else math.inf
    if type(given) is not kind:
        what_it_is = "true or false" if kind is bool else "a number"
        raise ValueError(f"options: {name} must be {what_it_is}, as in {name}={now[name]}, got {value!r}")
    return dataclasses.replace(what, **{name: given})


def _plain(text: str) -> Any:
    """What YAML makes of it; 1e-5 without a point, which is text to YAML, is a number."""
    with suppress(yaml.YAMLError):
        found = yaml.safe_load(text)
        if isinstance(found, str):
            with suppress(ValueError):
                return float(found)
        return found
    return text


def solver_of(s: Settings, pipeline: StableDiffusionPipeline) -> Solver:
    """The core's own, or one of diffusers'."""
    if s.solver.startswith(BOXED):
        return sampler(s.solver.removeprefix(BOXED), pipeline)
    return SOLVERS[s.solver]()


def optimizer_of(s: Settings) -> Callable[..., torch.optim.Optimizer]:
    """Adam with SD's usual weight decay, in 8 bits if asked for."""
    kind = torch.optim.AdamW
    if s.eight_bit:
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as missing:
            raise ValueError("eight_bit needs bitsandbytes: pip install bitsandbytes") from missing
    return lambda parameters, lr: kind(parameters, lr=lr, weight_decay=1e-4)


def adapters(unet: UNet2DConditionModel, rank: int) -> None:
    """Low-rank adapters on all attention projections (Hu et al. 2021, arXiv 2106.09685); the rest is not trained."""
    try:
        from peft import LoraConfig
    except ImportError as missing:
        raise ValueError("lora needs peft: pip install peft") from missing
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets))


def rewards_of(s: Settings, given: Reward | None = None) -> dict[str, Reward]:
    """The one that is trained on, first, and the one that is looked at."""

    def patient(reward: Reward, name: str | None) -> Reward:
        return Patient(reward, s.reward_retries, s.reward_timeout, name)

    first = patient(given, None) if given else patient(reward_of(s.reward, s.reward_python), s.reward)
    if s.other_reward is None:
        return {"reward": first}
    return {"reward": first, "other": patient(reward_of(s.other_reward, s.reward_python), s.other_reward)}


def pipeline_of(s: Settings, device: torch.device) -> StableDiffusionPipeline:
    """Loaded, with a UNet that is to be trained and nothing else that is."""
    pipeline = models.load(s.model, s.revision, s.variant)
    most = len(pipeline.scheduler.betas)
    for name, steps in {"steps": (s.steps,), "eval_headline": (s.eval_headline,), "eval_steps": s.eval_steps}.items():
        if any(n > most for n in steps):
            raise ValueError(f"{name} must be at most the model's {most} timesteps, got {max(steps)}")
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder.requires_grad_(False)
    if s.lora:
        adapters(pipeline.unet, s.lora)
    if s.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    return pipeline.to(device)


def critic_of(s: Settings, task: ScoreAsAction, width: int, differentiable: bool) -> Critic:
    """V from latents, times and prompts; with a black box the structured one learns what to put in its skip."""
    channels = task.shape[0]
    network = Value(channels, width, s.critic_width)
    if s.critic == "network":
        return NetworkCritic(task, network)
    return StructuredCritic(task, network, reward=None if differentiable else StandIn(channels, width, s.critic_width))


def check(s: Settings) -> tuple[list[Prompt], list[Prompt]]:
    """What can be wrong without a model or a reward; the prompts of training and of the evaluation."""
    s.check_places()
    s.check_resumed()
    if not (s.resume or s.overwrite) and any(checkpoint.folders(folder) for folder in (s.out, s.out / "critic")):
        raise ValueError(
            f"out: {s.out} holds a run already; go on with --resume, --overwrite it, or take another folder"
        )
    algorithm = algorithm_of(dataclasses.replace(s, kl=None), True)
    if isinstance(algorithm, DDPO) and algorithm.group not in (0, s.in_a_row):
        raise ValueError(
            f"options: group must be in_a_row = {s.in_a_row}, the pictures of a prompt, got {algorithm.group}"
        )
    if s.samples % s.in_a_row:
        raise ValueError(f"in_a_row must divide the {s.samples} samples of an epoch, got {s.in_a_row}")
    if s.log_with == "wandb" and find_spec("wandb") is None:
        raise ValueError("log_with wandb needs wandb: pip install wandb")
    for reward in (s.reward, s.other_reward):
        if reward is not None:
            terms(reward)
    prompts = prompt_lists.read(s.prompts)
    return prompts, prompts if s.eval_prompts is None else prompt_lists.read(s.eval_prompts)


def try_rewards(pipeline: StableDiffusionPipeline, rewards: dict[str, Reward], *lists: list[Prompt]) -> None:
    """Each of them on a grey picture for the first prompt of each list: what is wrong with one is wrong now."""
    side = pipeline.unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    grey = torch.full((1, 3, side, side), 0.5, device=pipeline.unet.device)
    with torch.no_grad():
        for reward, prompts in product(rewards.values(), lists):
            ask(reward, grey, prompts[:1])


def assemble(s: Settings, reward: Reward | None, accelerator: Accelerator) -> Task:
    """Everything `fit` needs; what can be wrong is found in the order of what it costs to find."""
    prompts, eval_prompts = check(s)
    optimizer = optimizer_of(s)
    rewards = rewards_of(s, reward)
    differentiable = bool(getattr(rewards["reward"], "differentiable", False))
    if s.algorithm == "adjoint-matching" and not differentiable:
        raise ValueError(
            f"reward {s.reward} has no gradient, which adjoint-matching needs: take --algorithm actor-critic --options"
        )
    pipeline = pipeline_of(s, accelerator.device)
    solver = solver_of(s, pipeline)
    box = solver if isinstance(solver, BlackBox) else None
    eta = s.eta if box is None or box.noisy else 0.0
    algorithm = algorithm_of(s, eta > 0)
    policy = Score.of(pipeline, s.guidance)
    reference = policy.frozen()
    if s.offload_reference and not s.lora:
        cpu_offload(reference.unet, execution_device=accelerator.device)
    judged = Decoded(pipeline.vae, rewards["reward"], differentiable=differentiable, chunk=s.batch)
    task = problem(reference, judged, beta=s.beta, eta=eta, gamma=s.gamma)
    learner = GaussianNetwork(task, policy) if s.algorithm == "q-learning" else policy
    conditions = Prompts.encode(pipeline, prompts, s.in_a_row)
    torch.manual_seed(s.seed)  # of the critic's first weights
    critic = critic_of(s, task, conditions.width, differentiable) if s.algorithm in LEARN_VALUES else None
    settings = FitSettings(
        epochs=s.epochs, samples=s.samples, steps=s.steps, solver=solver, grid=box.grid if box else GRIDS[s.grid],
        jitter=0.0 if box else s.jitter, lr=s.lr, critic_lr=s.critic_lr, optimizer=optimizer, ema=s.ema, batch=s.batch,
        micro_batch=s.micro_batch, seed=s.seed, out=s.out, checkpoint_every=s.checkpoint_every,
        keep_checkpoints=s.keep_checkpoints, max_hours=s.max_hours, patience=s.patience, mismatch=s.mismatch,
    )  # fmt: skip
    algorithm.check(task, solver, critic)
    try_rewards(pipeline, rewards, prompts, eval_prompts)
    return Task(
        pipeline, policy, learner, task, critic, algorithm, conditions, prompts, eval_prompts, rewards, settings
    )


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Outcome:
    """What a run leaves, in Python; `evaluation` is of the main process alone."""

    pipeline: StableDiffusionPipeline
    evaluation: Evaluation | None
    history: list[dict[str, Any]]
    out: Path


LEFT = (
    "checkpoints", "metrics.jsonl", "not-finite", "critic", "pictures", "samples", "pipeline", "lora", "sd15",
    "evaluation.json", "report.html", "config.json",
)  # fmt: skip
"""What a run writes in its folder."""


def train(settings: Settings, reward: Reward | None = None) -> Outcome:
    """Fine-tune, evaluate, keep. reward: a function of yours in place of `settings.reward`, which then is its name."""
    s = settings
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # the others wait while one evaluates
    accelerator = Accelerator(
        mixed_precision=None if s.precision == "no" else s.precision,
        log_with=None if s.log_with == "none" else s.log_with, project_dir=s.out, kwargs_handlers=[patience],
    )  # fmt: skip
    if accelerator.is_main_process:
        why = "" if torch.cuda.is_available() else " (there is no CUDA; --model names another)"
        print(f"model: {s.model}{why if s.model == str(ASSETS / 'tiny-sd') else ''}")
    task = assemble(s, reward, accelerator)
    if accelerator.is_main_process:
        s.out.mkdir(parents=True, exist_ok=True)
        if s.overwrite:
            checkpoint.delete(s.out, LEFT)
        part = s.out / "config.part"
        part.write_text(json.dumps(s.plain(), indent=2) + "\n")
        os.replace(part, s.out / "config.json")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        weights = list(task.policy.unet.parameters())
        every, trained = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
        print(f"{trained / 1e6:.2f} M of {every / 1e6:.2f} M weights, by {s.algorithm} on {s.reward}, in {s.out}")
    if s.log_with != "none":
        accelerator.init_trackers("sd15", {k: v for k, v in s.plain().items() if isinstance(v, int | float | str)})
    began = time.monotonic()
    if s.pretrain:
        pretrain(s, task, accelerator)
    left = None if s.max_hours is None else max(s.max_hours - (time.monotonic() - began) / 3600, 1e-9)
    result = fit(
        task.problem, task.learner, task.algorithm, critic=task.critic, conditions=task.conditions,
        settings=dataclasses.replace(task.fit, max_hours=left),
        callbacks=[Watch(s, task, accelerator), guards_of(s)], resume=s.resume, accelerator=accelerator,
    )  # fmt: skip
    if result.ema is not None:
        task.learner.load_state_dict(result.ema.state_dict())
    found = None
    if accelerator.is_main_process:
        found = finish(s, task, result.history)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Outcome(task.pipeline, found, result.history, s.out)


def pretrain(s: Settings, task: Task, accelerator: Accelerator) -> None:
    """The critic regresses on the rewards of the untuned model's pictures: Monte Carlo, nothing else moves."""
    given = dataclasses.replace(s, kl=None)
    algorithm = algorithm_of(given, not task.problem.noiseless)
    like = algorithm if isinstance(algorithm, ActorCritic) else ActorCritic(nats=math.inf)
    alone = dataclasses.replace(like, actor_updates=0, trace=0.0)
    settings = dataclasses.replace(task.fit, epochs=s.pretrain, out=s.out / "critic", seed=s.seed + 1, ema=0.0)
    fit(
        task.problem, task.policy, alone, critic=task.critic, conditions=task.conditions, settings=settings,
        resume=s.resume, accelerator=accelerator,
    )  # fmt: skip


def guards_of(s: Settings) -> Guards:
    """What is warned of."""
    kl = math.inf if s.max_kl is None else s.max_kl
    return Guards(kl=kl, diversity=s.min_diversity, stop=s.stop_on_collapse)


class Watch:
    """After every epoch: metrics to the trackers, and now and then a grid of pictures."""

    SHOWN, STEPS = 16, 25

    def __init__(self, s: Settings, task: Task, accelerator: Accelerator) -> None:
        self.s, self.task, self.accelerator = s, task, accelerator
        if s.pictures_every and accelerator.is_main_process and not (s.out / "pictures").exists():
            self.show(0)

    def __call__(self, run: Run, metrics: dict[str, Any]) -> None:
        self.accelerator.log({k: v for k, v in metrics.items() if k != "epoch"}, step=metrics["epoch"])
        if self.s.pictures_every and metrics["epoch"] % self.s.pictures_every == 0 and run.accelerator.is_main_process:
            self.show(metrics["epoch"])

    def show(self, epoch: int) -> None:
        """The same prompts and noise every time."""
        drawn = draw(self.task.pipeline, self.task.eval_prompts, range(self.SHOWN), "dpmsolver++", self.STEPS,
                     self.s.guidance, self.s.batch)  # fmt: skip
        grid = report.grid(drawn.images)
        report.keep(grid, self.s.out / "pictures" / f"epoch-{epoch:06d}.png")
        if self.s.log_with != "none":
            options = {"dataformats": "NHWC"} if self.s.log_with == "tensorboard" else {}
            tracker = self.accelerator.get_tracker(self.s.log_with)
            tracker.log_images({"pictures": report.array(grid)[None]}, step=epoch, **options)


def finish(s: Settings, task: Task, history: list[dict[str, Any]]) -> Evaluation:
    """Evaluate against the untuned model, keep the pipeline, and tell the story."""
    report.save(s, task.pipeline)  # first of all: what follows takes a while, and asks foreign code
    untuned = models.load(s.model, s.revision, s.variant).to(task.pipeline.unet.device)
    found = judged(s, task.pipeline, untuned, task.eval_prompts, task.rewards)
    found.write(s.out / "evaluation.json")
    report.card(s, found)
    sides = [
        draw(p, task.eval_prompts, range(Watch.SHOWN), "dpmsolver++", Watch.STEPS, s.guidance, s.batch)
        for p in (untuned, task.pipeline)
    ]
    report.html(s.out / "report.html", s.plain(), history, found, sides)
    print(found.summary(), f"-> {s.out / 'report.html'}, {s.out / ('lora' if s.lora else 'pipeline')}", sep="\n")
    return found


def judged(
    s: Settings, pipeline: StableDiffusionPipeline, untuned: StableDiffusionPipeline, prompts: Sequence[Prompt],
    rewards: dict[str, Reward],
) -> Evaluation:  # fmt: skip
    """As the settings say."""
    return evaluate(
        pipeline, untuned, prompts, rewards, samples=s.eval_samples, guidance=s.guidance,
        grid=tuple(product(s.eval_samplers, s.eval_steps)), grid_samples=s.eval_grid_samples,
        headline=("dpmsolver++", s.eval_headline), kl_steps=s.eval_headline,
        ceiling=ceiling_of(rewards["reward"], prompts), batch=s.batch,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ what it would need


def needs(s: Settings) -> str:
    """Memory of what is kept for every weight, and network calls, from the model's config alone."""
    try:
        config = UNet2DConditionModel.load_config(s.model, subfolder="unet", revision=s.revision)
    except OSError as wrong:
        raise ValueError(models.not_there(s.model, Path(s.model), s.variant, wrong)) from wrong
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
        if s.lora:
            adapters(unet, s.lora)
    weights = unet.num_parameters()
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    bytes_of = {
        "weights": 4 * weights, "gradients": 4 * trained, "optimiser": (2 if s.eight_bit else 8) * trained,
        "untuned weights": 0 if s.lora or s.offload_reference else 4 * weights, "average": 4 * weights if s.ema else 0,
    }  # fmt: skip
    memory = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in bytes_of.items() if size)
    solver = SOLVERS.get(s.solver, SOLVERS["ddim"])()
    doubled = 2 if s.guidance > 1 else 1
    calls = s.samples * s.steps * solver.calls * doubled
    disk = (4 * weights + (2 if s.eight_bit else 8) * trained + bytes_of["average"]) * (s.keep_checkpoints + 2)
    return (
        f"# memory: {memory}; {sum(bytes_of.values()) / 2**30:.2f} GiB. Besides: activations of {s.micro_batch} nodes, "
        f"the VAE, the text encoder, the reward and the trajectories in store\n"
        f"# disk: {disk / 2**30:.2f} GiB for {s.keep_checkpoints} checkpoints, the best and one that is being written\n"
        f"# an epoch: {s.samples} pictures, {calls} evaluations of the UNet to draw them, and in learning several "
        f"times as many; {s.epochs} epochs, {s.epochs * s.samples} pictures"
    )


# ------------------------------------------------------------------------------------------ after training


@dataclass(frozen=True)
class Evaluate:
    """What a run gained, against the model it began with. Leave out to keep what the run was made with."""

    run: Path
    """The run's folder."""
    reward: str | None = None
    """As in training."""
    other_reward: str | None = None
    """A second one."""
    prompts: str | None = None
    """List, file or prompt."""
    samples: int | None = None
    """Pictures for each figure of the headline."""
    grid_samples: int | None = None
    """Pictures for each figure in the grid."""
    samplers: tuple[str, ...] | None = None
    """Of the grid."""
    steps: tuple[int, ...] | None = None
    """Of the grid."""
    guidance: float | None = None
    """Classifier-free guidance."""
    out: Path | None = None
    """Where evaluation.json goes; by default the run's folder."""

    def __post_init__(self) -> None:
        check_fields(self, {"samples": ">= 2", "grid_samples": ">= 2", "guidance": ">= 1"})


def settings_of_run(run: Path) -> Settings:
    """As its folder has them."""
    if not (run / "config.json").is_file():
        raise ValueError(f"run: {run} has no config.json: is it the folder of a run?")
    return Settings.read(run / "config.json")


def tuned(run: Path) -> tuple[Settings, StableDiffusionPipeline]:
    """A run's settings and its pipeline, loaded by diffusers alone."""
    s = settings_of_run(run)
    if (run / "pipeline").is_dir():
        return s, models.load(str(run / "pipeline"))
    if not (run / "lora").is_dir():
        raise ValueError(f"run: {run} has no pipeline yet: let the training end, with --resume, or export a checkpoint")
    pipeline = models.load(s.model, s.revision, s.variant)
    pipeline.load_lora_weights(run / "lora")
    return s, pipeline


def evaluate_run(e: Evaluate) -> Evaluation:
    """Write evaluation.json anew."""
    s, pipeline = tuned(e.run)
    changes = {
        "reward": e.reward, "other_reward": e.other_reward, "eval_prompts": e.prompts, "eval_samples": e.samples,
        "eval_grid_samples": e.grid_samples, "eval_samplers": e.samplers, "eval_steps": e.steps, "guidance": e.guidance,
    }  # fmt: skip
    s = dataclasses.replace(s, **{k: v for k, v in changes.items() if v is not None})
    device = Accelerator().device
    prompts, rewards = prompt_lists.read(s.eval_prompts or s.prompts), rewards_of(s)
    untuned = models.load(s.model, s.revision, s.variant)
    found = judged(s, pipeline.to(device), untuned.to(device), prompts, rewards)
    found.write((e.out or e.run) / "evaluation.json")
    print(found.summary())
    return found


@dataclass(frozen=True)
class Export:
    """The pipeline of a run as it was at a checkpoint, of one that was stopped, or went on for too long."""

    run: Path
    """The run's folder."""
    epoch: int | None = None
    """Of the checkpoint; by default the best of those kept, by reward less beta KL."""

    def __post_init__(self) -> None:
        check_fields(self, {"epoch": ">= 1"})


def export(o: Export) -> Path:
    """Write RUN/pipeline, or RUN/lora, from a checkpoint."""
    s = settings_of_run(o.run)
    kept = {int(folder.name.removeprefix("epoch-")): folder for folder in checkpoint.folders(o.run)}
    if not kept or o.epoch not in (None, *kept):
        raise ValueError(f"epoch must be that of a checkpoint in {o.run}: {', '.join(map(str, kept)) or 'it has none'}")
    lines = (o.run / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines[: max(kept)]]
    folder = kept[o.epoch or max(kept, key=lambda epoch: checkpoint.merit(kept[epoch], history, s.beta))]
    if fault := checkpoint.broken(folder):
        raise ValueError(f"epoch: {folder} is not whole: {fault}")
    pipeline = pipeline_of(s, torch.device("cpu"))
    average = folder / "ema.safetensors"
    weights = load_file(average if average.exists() else folder / "model.safetensors")
    inner = {k.removeprefix("mean."): v for k, v in weights.items()}  # q-learning's policy has the score for its mean
    pipeline.unet.load_state_dict({k.removeprefix("unet."): v for k, v in inner.items() if k.startswith("unet.")})
    report.save(dataclasses.replace(s, out=o.run), pipeline)
    print(f"{folder.name} -> {o.run / ('lora' if s.lora else 'pipeline')}")
    return folder


@dataclass(frozen=True)
class Sample:
    """Pictures from a run, or from the model it began with."""

    run: Path
    """The run's folder."""
    prompts: str | None = None
    """List, file or prompt; by default those of the evaluation."""
    n: int = 16
    """How many, prompt after prompt."""
    sampler: str = "dpmsolver++"
    """ddim, dpmsolver++, unipc, euler or heun."""
    steps: int = 25
    """Time steps."""
    guidance: float | None = None
    """As in training by default."""
    seed: int = 0
    """Of the noise."""
    untuned: bool = False
    """Of the model before."""
    out: Path | None = None
    """Where 0000.png ... and grid.png go; by default RUN/samples."""

    def __post_init__(self) -> None:
        check_fields(self, {"n": ">= 1", "steps": ">= 1", "guidance": ">= 1", "seed": ">= 0"})
        known(self.sampler)


def sample(o: Sample) -> Path:
    """Draw, and write one file a picture and a grid."""
    s, pipeline = tuned(o.run)
    pipeline = models.load(s.model, s.revision, s.variant) if o.untuned else pipeline
    prompts = prompt_lists.read(o.prompts or s.eval_prompts or s.prompts)
    guidance = s.guidance if o.guidance is None else o.guidance
    drawn = draw(pipeline.to(Accelerator().device), prompts, range(o.n), o.sampler, o.steps, guidance, s.batch, o.seed)
    out = o.out or o.run / "samples"
    for i, image in enumerate(drawn.images):
        report.keep(report.picture(image), out / f"{i:04d}.png")
    report.keep(report.grid(drawn.images), out / "grid.png")
    print(f"{o.n} pictures in {out}")
    return out


# ------------------------------------------------------------------------------------------ the command line


APART: dict[str, dict[str, Any]] = {
    "reward": {"algorithm": "actor-critic", "critic": "network", "options": (), "other_reward": None},
    "algorithm": {"options": ()}, "prompts": {"eval_prompts": None},
}  # fmt: skip


def _split(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name.startswith("--") else [word]


def settings_of(arguments: list[str]) -> Settings:
    """From the command line, over a file (`--config`), over what suits the machine."""
    file, arguments = None, [part for word in arguments for part in _split(word)]
    named = {word for word in arguments if word.startswith("--")}
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("config must name a file")
        file = Path(arguments[at + 1])
        arguments = arguments[:at] + arguments[at + 2 :]
    elif not torch.cuda.is_available() and "--model" not in named:
        file = EMBEDDED
    default = Settings() if file is None else Settings.read(file)
    if file == EMBEDDED:  # what goes with its reward, its algorithm, its prompts does not go with others
        for name, others in APART.items():
            default = dataclasses.replace(default, **others) if f"--{name}" in named else default
    return tyro.cli(Settings, args=arguments, default=default, description=__doc__)


def main(arguments: list[str]) -> None:
    """train (which may be left out), evaluate, sample, export."""
    command, *rest = arguments if arguments[:1] and arguments[0] in ("train", "evaluate", "sample", "export") else (
        "train", *arguments
    )  # fmt: skip
    if command == "evaluate":
        evaluate_run(tyro.cli(Evaluate, args=rest))
    elif command == "sample":
        sample(tyro.cli(Sample, args=rest))
    elif command == "export":
        export(tyro.cli(Export, args=rest))
    elif (s := settings_of(rest)).dry_run:
        check(s)
        print(yaml.safe_dump(s.plain(), sort_keys=False) + needs(s))
    else:
        train(s)


if __name__ == "__main__":
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # scale.models says what is wrong with a model
    try:
        main(sys.argv[1:])
    except (ValueError, RunFailed) as wrong:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(str(wrong))
