"""What the commands that fine-tune have in common, whatever the model: from `scale.settings.Tuning` to `ctrl.fit`, and
what a run leaves.

    s = settings_of(Settings, arguments, {}, __doc__)        # the command line, over a file, over the class's own
    outcome = train(s, None, assemble=..., show=..., kl_steps=..., finish=...)   # the command's own parts
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import diffusers
import torch
import transformers
import tyro
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs, cpu_offload
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from ctrl import Mean, NetworkCritic, Noise, Solver, StructuredCritic
from ctrl.algorithms import ActorCritic, Algorithm, GaussianNetwork, KLBudget, PathConsistency
from ctrl.decided import complete, decided_share
from ctrl.fields import check_fields
from ctrl.fit import Callback, Conditions, Guards, Run, fit
from ctrl.fit import Settings as FitSettings
from ctrl.noising import RectifiedFlow
from ctrl.problem import ScoreAsAction
from ctrl.training import files
from ctrl.training.device import NO_FP16, is_cpu, make_accelerator
from ctrl.training.interrupts import RunFailed
from ctrl.training.lock import locked
from ctrl.training.processes import check_processes
from ctrl.training.split import check_split, splits, whole
from ctrl.value import Critic
from scale import report
from scale.diffusion import Score, StandIn, Value, problem
from scale.evaluate import calls_of_nats, nats
from scale.families import family_of
from scale.rewards import Patient, Reward, built_in, full_name, has_gradient, reward_of
from scale.samplers import BlackBox, sampler
from scale.settings import ALGORITHMS, BOXED, GRIDS, SCHEDULES, SOLVERS, Tuning, algorithm_named, processes

Grid = Callable[[Any, int], Tensor]
S = TypeVar("S", bound=Tuning)
P = TypeVar("P", bound=DiffusionPipeline)
T = TypeVar("T", bound="Task")
Named = TypeVar("Named", bound="Tuning | Evaluate")

# ------------------------------------------------------------------------------------------ the parts


MAX_STRETCH, KL_TOLERANCE, MAX_MEASUREMENTS, MIN_KL = 2.0, 0.02, 6, 1e-12
"""Of `match_kl`: the largest factor on the learned change of weights; the relative error of the KL that ends the
search; how often the KL is measured; the smallest KL whose logarithm is taken."""
DECIDED_NODES = 6
"""States per path at which `measure_decided` draws a second completion."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What `ctrl.fit` is handed. The learner is the policy, or for q-learning the policy and its noise."""

    problem: ScoreAsAction
    policy: Score
    learner: nn.Module
    algorithm: Algorithm
    critic: Critic | None
    conditions: Conditions | None
    fit: FitSettings
    pipeline: Any = None
    """Whose network it is; None of an outline."""


def algorithm_of(s: Tuning, noisy: bool) -> Algorithm:
    """By name, with its options, within a KL budget if there is one."""
    made = algorithm_named(s.algorithm)
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


def solver_of(s: Tuning, pipeline: Any) -> Solver:
    """The core's own, or one of diffusers' under the pipeline's schedule."""
    if s.solver.startswith(BOXED):
        if isinstance(family_of(pipeline).noising(pipeline.scheduler), RectifiedFlow):
            raise ValueError(
                f"solver {s.solver} does not support a rectified flow: take exponential with --eta 0, which makes the "
                f"steps of diffusers' FlowMatchEuler, or another of ours"
            )
        return sampler(s.solver.removeprefix(BOXED), pipeline)
    return SOLVERS[s.solver]()


def grid_of(s: Tuning, pipeline: Any) -> Grid:
    """Times by name; those of its timesteps are the family's."""
    if s.grid == "timesteps":
        return partial(family_of(pipeline).timesteps, pipeline.scheduler)
    return GRIDS[s.grid]


def eta_of(s: Tuning, solver: Solver) -> float:
    """The process's noise: none where the solver is a black box that draws none."""
    return 0.0 if isinstance(solver, BlackBox) and not solver.noisy else s.eta


def lay_out(s: Tuning, network: ModelMixin) -> None:
    """What is to be trained, as the settings have it."""
    if s.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    if s.channels_last:
        network.to(memory_format=torch.channels_last)


def placed(s: Tuning, pipeline: P, device: torch.device) -> P:
    """A pipeline on the device, but for a network that is going to be split."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module) and not (s.split and name == family_of(pipeline).network):
            part.to(device)
    return pipeline


def reference_of(s: Tuning, policy: Score, device: torch.device) -> Score:
    """The untuned model, offloaded if asked for; or both compiled."""
    reference = policy.frozen()
    if s.offload_reference:
        cpu_offload(reference.network, execution_device=device)
    if s.compile:
        torch._functorch.config.donated_buffer = False  # an adjoint goes back twice through one graph
        for network in (policy.network, reference.network):
            network.compile()
    return reference


def optimizer_of(s: Tuning) -> Callable[..., torch.optim.Optimizer]:
    """Adam with SD's usual weight decay, in 8 bits if asked for."""
    kind = partial(torch.optim.AdamW, fused=True)
    if s.eight_bit:
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as missing:
            raise ValueError("eight_bit needs bitsandbytes: pip install bitsandbytes") from missing
    return partial(kind, weight_decay=1e-4)


def fit_settings(s: Tuning, solver: Solver, grid: Grid) -> FitSettings:
    """How `ctrl.fit` makes the run; a black box has times of its own."""
    box = solver if isinstance(solver, BlackBox) else None
    return FitSettings(
        epochs=s.epochs, samples=s.samples, steps=s.steps, solver=solver, grid=box.grid if box else grid,
        jitter=0.0 if box else s.jitter, lr=s.lr, critic_lr=s.critic_lr, reward_lr=s.reward_lr,
        optimizer=optimizer_of(s), ema=s.ema, batch=s.batch, micro_batch=s.micro_batch, seed=s.seed, out=s.out,
        checkpoint_every=s.checkpoint_every, keep_checkpoints=s.keep_checkpoints, max_hours=s.max_hours,
        patience=s.patience, mismatch=s.mismatch, warmup=s.warmup, split=s.split,
        schedule=SCHEDULES[s.schedule],
    )  # fmt: skip


def planned(s: Tuning, pipeline: Any, reference: Score, reward: Any) -> tuple[ScoreAsAction, FitSettings, Algorithm]:
    """The problem, how a run is made, and the algorithm. A pipeline, with its reference, may be an outline."""
    solver = solver_of(s, pipeline)
    eta = eta_of(s, solver)
    task = problem(reference, reward, beta=s.beta, eta=eta, gamma=s.gamma)
    made = fit_settings(s, solver, grid_of(s, pipeline))
    made.grid(task, s.steps)  # it may not have as many
    return task, made, algorithm_of(s, eta > 0)


def learner_of(s: Tuning, problem: ScoreAsAction, policy: nn.Module) -> nn.Module:
    """The policy, which q-learning gives a noise."""
    return GaussianNetwork(problem, policy) if s.algorithm == "q-learning" else policy


def critic_of(s: Tuning, task: ScoreAsAction, differentiable: bool, width: int = 0) -> Critic:
    """V from states and times, and pooled prompts of this width; with a black box the structured one learns what to put
    in its skip."""
    channels, size, _ = task.shape
    network = Value(channels, size, width, s.critic_width)
    if s.critic == "network":
        return NetworkCritic(task, network)
    stand_in = None if differentiable else StandIn(channels, size, width, s.critic_width)
    return StructuredCritic(task, network, reward=stand_in)


def named(s: Named, given: Reward | None) -> Named:
    """With the name of the function that is given in place of its reward."""
    return s if given is None else dataclasses.replace(s, reward=full_name(given))


def rewards_of(s: Tuning, given: Reward | None = None, other: str | None = None) -> dict[str, Reward]:
    """The one that is trained on, first, and the one that is looked at. given: a function in place of `s.reward`."""

    def patient(reward: Reward, name: str | None) -> Reward:
        return Patient(reward, s.reward_retries, s.reward_timeout, name)

    first = patient(given, None) if given else patient(reward_of(s.reward, s.reward_python), s.reward)
    if other is None:
        return {"reward": first}
    return {"reward": first, "other": patient(reward_of(other, s.reward_python), other)}


def differentiable(s: Tuning, reward: Reward | None = None) -> bool:
    """Whether the reward, if need be before it is made, has a gradient; raise where the algorithm needs one and it has
    none."""
    if reward is None:
        found = has_gradient(s.reward, s.reward_python)
    else:
        found = bool(getattr(reward, "differentiable", False))
    if s.algorithm == "adjoint-matching" and not found:
        raise ValueError(
            f"reward {s.reward} has no gradient, which adjoint-matching needs: "
            f"take --algorithm forward-matching --options"
        )
    return found


def guards_of(s: Tuning) -> Guards:
    """What is warned of."""
    kl = math.inf if s.max_kl is None else s.max_kl
    return Guards(kl=kl, diversity=s.min_diversity, stop=s.stop_on_collapse)


# ------------------------------------------------------------------------------------------ what can be wrong


def check(s: Tuning) -> Algorithm:
    """Raise at what can be wrong without a model or a reward; the algorithm with its options, without a KL budget."""
    s.check_places()
    s.check_resumed()
    if not (s.resume or s.overwrite) and any(files.folders(folder) for folder in (s.out, s.out / "critic")):
        raise ValueError(
            f"out: {s.out} holds a run already; go on with --resume, --overwrite it, or take another folder"
        )
    if s.precision == "fp16" and is_cpu():
        raise ValueError(NO_FP16)
    if s.split:
        check_split(s.samples, processes(), s.precision)
    optimizer_of(s)  # it may lack its package
    if s.log_with == "wandb" and find_spec("wandb") is None:
        raise ValueError("log_with wandb needs wandb: pip install wandb")
    algorithm = algorithm_of(dataclasses.replace(s, kl=None), True)
    if s.split and isinstance(algorithm, PathConsistency):
        raise ValueError("split does not support path-consistency: processes have unequal shares of whole trajectories")
    if s.pretrain and not algorithm.learns_value:
        raise ValueError(f"pretrain must be 0 for {s.algorithm}, which has no critic")
    return algorithm


def check_timesteps(pipeline: DiffusionPipeline, **steps: Sequence[int]) -> None:
    """Raise unless each of the settings named is at most the timesteps that the model was trained on."""
    most = pipeline.scheduler.config.num_train_timesteps
    for name, asked in steps.items():
        if any(n > most for n in asked):
            raise ValueError(f"{name} must be at most the model's {most} timesteps, got {max(asked)}")


# ------------------------------------------------------------------------------------------ a run


LEFT = (
    "checkpoints", "metrics.jsonl", "not-finite", "critic", "pictures", "samples", "pipeline", "lora",
    "evaluation.json", "report.html", "config.json",
)  # fmt: skip
"""What a run writes in its folder, besides its tracker's events."""


def use_tf32() -> None:
    """On CUDA float32 products are TensorFloat-32, as PyTorch's convolutions are by default."""
    torch.backends.cuda.matmul.allow_tf32 = True


def longest_wait(s: Tuning) -> timedelta:
    """How long a process waits for the others before it takes them for lost: half an hour, for a model to load and for
    images that the main process draws, and what the calls of a reward between two waits may take by the settings."""
    calls = -(-max(s.samples, s.eval_samples) // s.batch)
    return timedelta(minutes=30, seconds=calls * (s.reward_retries + 1) * (s.reward_timeout or 0.0))


def accelerator_of(s: Tuning) -> Accelerator:
    """Processes, precision and trackers. The main process prints what is trained and where: loading takes a while."""
    use_tf32()
    accelerator = make_accelerator(
        mixed_precision=s.precision, log_with=None if s.log_with == "none" else s.log_with, project_dir=s.out,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=longest_wait(s))],
    )  # fmt: skip
    check_processes(accelerator)
    if accelerator.is_main_process:
        embedded = s.embedded is not None and s.model == str(s.embedded.with_suffix(""))
        why = " (there is no CUDA; --model names another)" if embedded and not torch.cuda.is_available() else ""
        n, kind = accelerator.num_processes, accelerator.device.type
        print(f"model: {s.model}{why}", f"{n} process{'es' * (n > 1)} on {kind}", sep="\n")
    return accelerator


def train(
    settings: S, reward: Reward | None, *, assemble: Callable[[S, Reward | None, Accelerator], T],
    show: Callable[[S, T], Tensor], kl_steps: Callable[[S], int],
    finish: Callable[[S, T, list[dict[str, Any]], Accelerator], Any],
) -> Outcome:  # fmt: skip
    """A run from its settings to what it leaves. What is a command's own: how its task is made, which pictures it shows
    over training, in how many steps of Heun the path KL is measured, and what it does at the end."""
    s = named(settings, reward).resolved()
    accelerator = accelerator_of(s)
    with locked(s.out, accelerator):
        task = assemble(s, reward, accelerator)
        begin(s, task, accelerator)
        history = learn(s, task, accelerator, Watch(s, accelerator, lambda: show(s, task)))
        task = whole_again(s, task, accelerator, lambda s: assemble(s, reward, accelerator))
        match_kl(s, task, accelerator, kl_steps(s))
        found = finish(s, task, history, accelerator)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    return Outcome(task.pipeline, found, history, s.out)


def begin(s: Tuning, task: Task, accelerator: Accelerator) -> None:
    """Make the folder, with config.json, and the trackers; every process calls it."""
    if accelerator.is_main_process:
        s.out.mkdir(parents=True, exist_ok=True)
        if s.overwrite:
            files.delete(s.out, (*LEFT, s.events))
        part = s.out / "config.part"
        part.write_text(json.dumps(s.plain(), indent=2) + "\n")
        os.replace(part, s.out / "config.json")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        weights = list(task.policy.parameters())
        every, trained = sum(p.numel() for p in weights), sum(p.numel() for p in weights if p.requires_grad)
        print(
            f"{trained / 1e6:.2f} M of {every / 1e6:.2f} M weights, by {s.algorithm} on {s.reward}, lr {s.lr:g}, "
            f"precision {s.precision}, in {s.out}"
        )
    if s.log_with != "none":
        accelerator.init_trackers(s.events, {k: v for k, v in s.plain().items() if isinstance(v, int | float | str)})


def learn(s: Tuning, task: Task, accelerator: Accelerator, *callbacks: Callback) -> list[dict[str, Any]]:
    """The critic alone, if it is to come first, then all; the learner's weights are the averaged ones, if there are
    any. The metrics of every epoch."""
    began = time.monotonic()
    if s.pretrain:
        pretrain(s, task, accelerator)
    left = None if s.max_hours is None else max(s.max_hours - (time.monotonic() - began) / 3600, 1e-9)
    result = fit(
        task.problem, task.learner, task.algorithm, critic=task.critic, conditions=task.conditions,
        settings=dataclasses.replace(task.fit, max_hours=left), callbacks=[*callbacks, guards_of(s)],
        resume=s.resume, accelerator=accelerator,
    )  # fmt: skip
    if result.ema is not None:
        task.learner.load_state_dict(result.ema.state_dict())
    accelerator.free_memory()  # of the optimisers; what follows has use for it, and for that of the gradients
    for p in task.learner.parameters():
        p.grad = None
    return result.history


def whole_again(s: S, task: T, accelerator: Accelerator, make: Callable[[S], T]) -> T:
    """The task made anew with what was learned, if models were split: what follows calls them on one process alone."""
    if not splits(s.split, accelerator):
        return task
    learned = whole(task.learner.state_dict())
    made = make(dataclasses.replace(s, split=False, resume=True, overwrite=False))
    made.learner.load_state_dict(learned)
    return made


def match_kl(s: Tuning, task: Task, accelerator: Accelerator, steps: int) -> None:
    """Scale the learned change of weights so that the path KL is `s.kl`, measured by `steps` of Heun on
    `eval_kl_samples` images. KL ~ scale^power, with power 2 for small changes, then the secant in logarithms."""
    if s.kl is None:
        return
    reference, conditions = cast(Score, task.problem.reference), task.conditions or (lambda ids: None)
    scale, power, known = 1.0, 2.0, list[tuple[float, float]]()
    for _ in range(MAX_MEASUREMENTS):
        kl = float(nats(task.problem, task.policy, conditions, s.eval_kl_samples, steps, s.batch).mean)
        if abs(kl / s.kl - 1) < KL_TOLERANCE or (scale == MAX_STRETCH and kl < s.kl):
            break
        known.append((math.log(scale), math.log(max(kl, MIN_KL))))
        if len(known) > 1:
            (w0, k0), (w1, k1) = known[-2:]
            power = min(max((k1 - k0) / (w1 - w0), 0.3), 3.0)
        wanted = min(scale * (s.kl / max(kl, MIN_KL)) ** (1 / power), MAX_STRETCH)
        task.policy.stretch(reference, wanted / scale)
        scale = wanted
    accelerator.print(
        f"learned weight change scaled by {scale:.2f}; last measured path KL {kl:.3g} nats, kl = {s.kl:g}"
    )
    if scale == MAX_STRETCH and kl < s.kl * (1 - KL_TOLERANCE):
        accelerator.print(f"warning: path KL is below kl = {s.kl:g}: train for more epochs or with a larger lr")


def calls_of_match_kl(s: Tuning, steps: int) -> int:
    """Network calls of `match_kl` with two measurements, per state."""
    return 0 if s.kl is None else 2 * calls_of_nats(s.eval_kl_samples, steps)


def untuned(pipeline: P, reference: Score) -> P:
    """The pipeline as it was before training, with what the reference has of it."""
    found = copy.copy(pipeline)
    setattr(found, family_of(pipeline).network, reference.network)
    return found


def pretrain(s: Tuning, task: Task, accelerator: Accelerator) -> None:
    """The critic regresses on the rewards of the untuned model's pictures: Monte Carlo, nothing else moves."""
    first = alone(s, task)
    fit(
        first.problem, first.learner, first.algorithm, critic=first.critic, conditions=first.conditions,
        settings=first.fit, resume=s.resume, accelerator=accelerator,
    )  # fmt: skip


def alone(s: Tuning, task: Task) -> Task:
    """The task of the critic in those epochs."""
    given = dataclasses.replace(s, kl=None)
    algorithm = algorithm_of(given, not task.problem.noiseless)
    like = algorithm if isinstance(algorithm, ActorCritic) else ActorCritic(nats=math.inf)
    settings = dataclasses.replace(task.fit, epochs=s.pretrain, out=s.out / "critic", seed=s.seed + 1, ema=0.0)
    still = dataclasses.replace(like, actor_updates=0, trace=0.0)
    return dataclasses.replace(task, learner=Still(task.problem.reference), algorithm=still, fit=settings)


class Still(nn.Module):
    """The reference as a policy that does not move; its weights are not among those of the policy."""

    def __init__(self, reference: Mean) -> None:
        super().__init__()
        self.held = (reference,)
        self.nothing = nn.Parameter(torch.zeros(1))  # for an optimiser to hold

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.held[0](t, x, cond)


class Watch:
    """After every epoch: metrics to the trackers, and now and then a grid of pictures; one at once, of a new run whose
    models are whole.

    Args:
        draw: pictures in [0, 1], (SHOWN, 3, H, W), from the same noise every time; of STEPS steps.
    """

    SHOWN, STEPS = 16, 25

    def __init__(self, s: Tuning, accelerator: Accelerator, draw: Callable[[], Tensor]) -> None:
        self.s, self.accelerator, self.draw = s, accelerator, draw
        if s.pictures_every and not s.split and accelerator.is_main_process and not (s.out / "pictures").exists():
            self.show(0)

    def __call__(self, run: Run, metrics: dict[str, Any]) -> None:
        self.accelerator.log({k: v for k, v in metrics.items() if k != "epoch"}, step=metrics["epoch"])
        due = self.s.pictures_every and metrics["epoch"] % self.s.pictures_every == 0
        if due and (self.s.split or run.accelerator.is_main_process):  # what is split all processes draw by
            self.show(metrics["epoch"])

    def show(self, epoch: int) -> None:
        """To the folder and to the trackers."""
        grid = report.grid(self.draw())
        if not self.accelerator.is_main_process:
            return
        report.keep(grid, self.s.out / "pictures" / f"epoch-{epoch:06d}.png")
        if self.s.log_with != "none":
            options = {"dataformats": "NHWC"} if self.s.log_with == "tensorboard" else {}
            tracker = self.accelerator.get_tracker(self.s.log_with)
            tracker.log_images({"pictures": report.array(grid)[None]}, step=epoch, **options)


def measure_decided(s: Tuning, task: Task, accelerator: Accelerator) -> Path:
    """The share of the reward's variance decided at each of DECIDED_NODES states, from `eval_samples` images of the
    untuned model and a second completion of each state. Prints a table; writes OUT/decided.json and OUT/decided.png."""
    if accelerator.num_processes > 1:
        raise ValueError("decided supports one process only: run it without accelerate launch")
    problem, times = task.problem, task.fit.grid(task.problem, s.steps)
    nodes = sorted({round(k) for k in torch.linspace(0, s.steps - 1, DECIDED_NODES).tolist()})
    parts = []
    for ids in tqdm(torch.arange(s.eval_samples, device=accelerator.device).split(s.batch), "batches of images"):
        cond = None if task.conditions is None else task.conditions(ids)
        with accelerator.autocast():
            parts.append(complete(problem, problem.reference, times, nodes, Noise(s.seed), ids,
                                   solver=task.fit.solver, cond=cond).cpu())  # fmt: skip
    found = decided_share(torch.cat(parts, 1))
    log_snr = problem.noising.log_snr(problem.s(times[nodes]))
    columns = {"step": nodes, "log_snr": log_snr.tolist(), "share": found.mean.tolist(), "se": found.stderr.tolist()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    s.out.mkdir(parents=True, exist_ok=True)
    (s.out / "decided.json").write_text(json.dumps({"settings": s.plain(), "rows": rows}, indent=2) + "\n")
    report.plot_decided(rows).savefig(s.out / "decided.png", dpi=150)
    print("step  log-SNR  share of the reward's variance decided")
    for row in rows:
        print(f"{row['step']:4d}  {row['log_snr']:7.2f}  {row['share']:.2f} +- {row['se']:.2f}")
    print(f"-> {s.out / 'decided.png'}")
    return s.out


@dataclass(frozen=True)
class Outcome:
    """What a run leaves, in Python; `evaluation`, the command's own, is of the main process alone."""

    pipeline: DiffusionPipeline
    evaluation: Any
    history: list[dict[str, Any]]
    out: Path


# ------------------------------------------------------------------------------------------ after training


def settings_of_run(kind: type[S], run: Path) -> S:
    """As its folder has them."""
    if not (run / "config.json").is_file():
        raise ValueError(f"run: {run} has no config.json: is it the folder of a run?")
    return kind.read(run / "config.json")


@dataclass(frozen=True)
class Evaluate:
    """What a run gained, against the model it began with. Leave out to keep what the run was made with."""

    limits: ClassVar[dict[str, str]] = {"samples": ">= 2", "grid_samples": ">= 2"}

    run: Path
    """The run's folder."""
    reward: str | None = None
    """As in training; one that is not built in must be named, since a program that a run's folder names is not run."""
    reward_python: str | None = None
    """As in training; never the run's own, for the same reason."""
    samples: int | None = None
    """Pictures for each figure of the headline."""
    grid_samples: int | None = None
    """Pictures for each figure in the grid."""
    samplers: tuple[str, ...] | None = None
    """Of the grid."""
    steps: tuple[int, ...] | None = None
    """Of the grid."""
    out: Path | None = None
    """Where evaluation.json goes; by default the run's folder."""

    def __post_init__(self) -> None:
        check_fields(self, self.limits)

    def over(self, s: S, **others: Any) -> S:
        """A run's settings, with what is asked for here, and others that a command has, unless they are None. Programs
        are named here alone: the run's folder may be anybody's."""
        changes = {
            "reward": self.reward, "eval_samples": self.samples, "eval_grid_samples": self.grid_samples,
            "eval_samplers": self.samplers, "eval_steps": self.steps, **others,
        }  # fmt: skip
        changes = {k: v for k, v in changes.items() if v is not None}
        for name in ("reward", "other_reward"):
            text = getattr(s, name, None)
            if name not in changes and text is not None and not built_in(text):
                python = f" --reward-python {s.reward_python}" if s.reward_python else ""
                raise ValueError(
                    f"{name}: {text!r} of {self.run} is not built in, and a program that a run's folder names is not "
                    f"run: pass --{name.replace('_', '-')} module:function{python}"
                )
        return dataclasses.replace(s, reward_python=self.reward_python, **changes)


@dataclass(frozen=True)
class Sample:
    """Pictures from a run, or from the model it began with."""

    limits: ClassVar[dict[str, str]] = {"n": ">= 1", "steps": ">= 1", "seed": ">= 0"}

    run: Path
    """The run's folder."""
    n: int = 16
    """How many."""
    seed: int = 0
    """Of the noise."""
    untuned: bool = False
    """Of the model before."""
    out: Path | None = None
    """Where 0000.png ... and grid.png go; by default RUN/samples."""

    def __post_init__(self) -> None:
        check_fields(self, self.limits)


@dataclass(frozen=True)
class Export:
    """The pipeline of a run as it was at a checkpoint, of one that was stopped, or went on for too long."""

    run: Path
    """The run's folder."""
    epoch: int | None = None
    """Of the checkpoint, as it is, whatever kl was asked for; by default the best of those kept, by reward less beta
    KL."""

    def __post_init__(self) -> None:
        check_fields(self, {"epoch": ">= 1"})


def epochs_of(run: Path) -> dict[int, Path]:
    """The checkpoints of a run, by epoch."""
    return {int(folder.name.removeprefix("epoch-")): folder for folder in files.folders(run)}


def chosen(o: Export, beta: float) -> Path:
    """The checkpoint's folder."""
    kept = epochs_of(o.run)
    if not kept or o.epoch not in (None, *kept):
        raise ValueError(f"epoch must be that of a checkpoint in {o.run}: {', '.join(map(str, kept)) or 'it has none'}")
    lines = (o.run / "metrics.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines[: max(kept)]]
    folder = kept[o.epoch or max(kept, key=lambda epoch: files.merit(kept[epoch], history, beta))]
    if fault := files.broken(folder):
        raise ValueError(f"epoch: {folder} is not whole: {fault}")
    return folder


def restore(network: ModelMixin, folder: Path) -> None:
    """Give the network the weights of a checkpoint, which has those that are trained."""
    missing, unexpected = network.load_state_dict(network_weights(folder), strict=False)
    lost = {name for name, p in network.named_parameters() if p.requires_grad} & set(missing)
    if lost or unexpected:
        raise ValueError(f"epoch: {folder} is of another model: {min([*lost, *unexpected])} is not in both")


def network_weights(folder: Path) -> dict[str, Tensor]:
    """The network's in a checkpoint, averaged if they were."""
    average = folder / "ema.safetensors"
    weights = load_file(average if average.exists() else folder / "policy.safetensors")
    inner = {k.removeprefix("mean."): v for k, v in weights.items()}  # q-learning's policy has the score for its mean
    return {k.removeprefix("network."): v for k, v in inner.items() if k.startswith("network.")}


# ------------------------------------------------------------------------------------------ the command line


def _split(word: str) -> list[str]:
    name, equals, value = word.partition("=")
    return [name, value] if equals and name.startswith("--") else [word]


def settings_of(kind: type[S], arguments: list[str], apart: Mapping[str, Mapping[str, Any]], doc: str) -> S:
    """From the command line, over a file (`--config`), over what suits the machine: without CUDA, the embedded model.

    apart: by a setting's name, what goes with the embedded one and not with another.
    """
    file, arguments = None, [part for word in arguments for part in _split(word)]
    named = {word for word in arguments if word.startswith("--")}
    if "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 == len(arguments):
            raise ValueError("config must name a file")
        file = Path(arguments[at + 1])
        arguments = arguments[:at] + arguments[at + 2 :]
    elif not torch.cuda.is_available() and "--model" not in named:
        file = kind.embedded  # or None: no small model is embedded
    default = kind() if file is None else kind.read(file)
    if file is not None and file == kind.embedded:
        for name, others in apart.items():
            default = dataclasses.replace(default, **others) if f"--{name}" in named else default
    return tyro.cli(kind, args=arguments, default=default, description=f"{doc}\n{_more()}")


def _more() -> str:
    """What `--help` has no line for."""
    options = [f"    {name:18}" + " ".join(f"{k}={v}" for k, v in _numbers(made)) for name, made in ALGORITHMS.items()]
    first = "--config FILE reads settings from YAML or JSON; the command line goes over them."
    return "\n".join([first, "", "--options, with their defaults:", *options])


def _numbers(what: Any, part: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers of a dataclass, and of its parts, by the names that `changed` takes."""
    for f in dataclasses.fields(what):
        value = getattr(what, f.name)
        if dataclasses.is_dataclass(value):
            yield from _numbers(value, f"{part}{f.name}.")
        elif isinstance(value, int | float):
            yield f"{part}{f.name}", value


def run_command(main: Callable[[list[str]], Any]) -> None:
    """main(arguments); what was asked for wrongly, or failed, is said in a line, and in full if DEBUG is set."""
    use_tf32()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()  # scale.models says what is wrong with a model
    try:
        main(sys.argv[1:])
    except (ValueError, RunFailed) as wrong:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(str(wrong))
