"""What the commands that fine-tune a text-to-image model do, whatever its family: train, evaluate, sample, export.

    outcome = train(Settings(model="embedded", reward="mine:reward", out=Path("runs/mine")))
    evaluate_run(Evaluate(outcome.out, samples=512))

`scale/sd15.py`, `sdxl.py` and `sd3.py` are this under settings of their own. A run's folder says which model it began
with, so that what comes after training asks no more.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
import tyro
import yaml
from accelerate import Accelerator, init_empty_weights
from torch import nn

from ctrl.algorithms import DDPO
from ctrl.fields import one_of
from ctrl.training.device import make_accelerator
from scale import models, report, requirements, tuning
from scale import prompts as prompt_lists
from scale.diffusion import NO_PROMPT, ON_DEVICE, Decoded, Prompts, Score
from scale.evaluate import Evaluation, Pictures, calls_of_evaluation, draw, evaluate
from scale.families import Encoded, Family, family_of, network_of
from scale.families.base import vae_factor
from scale.prompts import Prompt
from scale.requirements import size_of
from scale.rewards import Reward, ask, ceiling_of, has_gradient, terms, unmade
from scale.samplers import known
from scale.settings import Settings
from scale.tuning import Export, Outcome, Watch

S = TypeVar("S", bound=Settings)
P = TypeVar("P")

# ------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True, kw_only=True)
class Task(tuning.Task):
    """And what is a text-to-image model's."""

    companions: dict[str, Any]
    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    rewards: dict[str, Reward]


def add_adapters(s: Settings, pipeline: Any) -> None:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), by default on all attention projections; the rest is not
    trained."""
    from peft import LoraConfig

    network, targets = network_of(pipeline), list(s.lora_targets or family_of(pipeline).lora_targets)
    network.requires_grad_(False)
    network.add_adapter(
        LoraConfig(r=s.lora, lora_alpha=alpha_of(s), init_lora_weights="gaussian", target_modules=targets)
    )
    for p in network.parameters():
        if p.requires_grad and p.dtype == torch.bfloat16:  # as the weights beside them
            p.data = p.data.float()


def alpha_of(s: Settings) -> float:
    """Over the rank, the factor of the adapters' product."""
    return s.lora if s.lora_alpha is None else s.lora_alpha


def load(s: Settings) -> Any:
    """The model that a run begins with."""
    return lowered(s, models.load(s.model, s.revision, s.variant, **s.family_options))


def outline_of(s: Settings) -> models.Outline:
    """The same without weights."""
    return lowered(s, models.outline(s.model, s.revision, s.variant, **s.family_options))


def lowered(s: Settings, pipeline: P) -> P:
    """With frozen weights in the precision that is asked for."""
    family = family_of(pipeline)
    for name in (family.network, *family.encoders) if s.frozen == "bf16" else ():
        if (part := getattr(pipeline, name)) is not None:
            part.to(torch.bfloat16)
    return pipeline


def pipeline_of(s: Settings, device: torch.device) -> Any:
    """Loaded, with a network that is to be trained and nothing else that is."""
    pipeline = load(s)
    network = network_of(pipeline)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module) and part is not network:
            part.requires_grad_(False)
    if s.lora:
        torch.manual_seed(s.seed)  # the adapters' first weights must not depend on the process
        add_adapters(s, pipeline)
    tuning.lay_out(s, network)
    return tuning.placed(s, pipeline, device)


def companions_of(s: Settings, pipeline: Any) -> dict[str, Any]:
    """What the pipeline is saved with, loaded before training: afterwards it may be out of reach."""
    return {} if s.lora else models.companions(pipeline, s.model, s.revision, s.variant)


def check(s: Settings, given: Reward | None = None) -> tuple[list[Prompt], list[Prompt]]:
    """What can be wrong without a model or a reward; the prompts of training and of the evaluation."""
    algorithm = tuning.check(s)
    if isinstance(algorithm, DDPO) and algorithm.group not in (0, s.in_a_row):
        raise ValueError(
            f"options: group must be in_a_row = {s.in_a_row}, the pictures of a prompt, got {algorithm.group}"
        )
    if s.samples % s.in_a_row:
        raise ValueError(f"in_a_row must divide the {s.samples} samples of an epoch, got {s.in_a_row}")
    if s.lora and find_spec("peft") is None:
        raise ValueError("lora needs peft: pip install peft")
    for reward in (s.reward if given is None else None, s.other_reward):
        if reward is not None:
            terms(reward)
    prompts = prompt_lists.read(s.prompts)
    return prompts, prompts if s.eval_prompts is None else prompt_lists.read(s.eval_prompts)


def say_left_out(s: Settings, prompts: Sequence[Prompt]) -> None:
    """Print, as a comment to settings, which prompts the evaluation does not come to."""
    if rest := prompts[s.eval_samples :]:
        print(
            f"# warning: eval_samples = {s.eval_samples} leaves out {len(rest)} of {len(prompts)} prompts, from "
            f"{rest[0].text!r} to {rest[-1].text!r}"
        )


def try_rewards(pipeline: Any, rewards: dict[str, Reward], *lists: list[Prompt]) -> None:
    """Each of them on a grey picture for the first prompt of each list: what is wrong with one is wrong now."""
    size = [vae_factor(pipeline.vae) * side for side in family_of(pipeline).sides(pipeline)]
    grey = torch.full((1, 3, *size), 0.5, device=network_of(pipeline).device)
    with torch.no_grad():
        for reward, prompts in product(rewards.values(), lists):
            ask(reward, grey, prompts[:1])


def rehearse(s: Settings, outline: models.Outline, gradient: bool) -> None:
    """Raise at what can be wrong with these settings on a model, before its weights are loaded."""
    tuning.check_timesteps(outline, steps=(s.steps,), eval_headline=(s.eval_headline,), eval_steps=s.eval_steps)
    for name in s.eval_samplers:
        one_of("eval_samplers", name, outline.family.samplers)
    layers = {name for name, _ in network_of(outline).named_modules()}
    if missing := [
        target for target in s.lora_targets if not any(f".{name}".endswith(f".{target}") for name in layers)
    ]:
        raise ValueError(f"lora_targets: {s.model} has no layers {', '.join(missing)}")
    task = parts(s, gradient, outline, unmade)
    task.algorithm.check(task.problem, task.fit.solver, task.critic)


def parts(s: Settings, gradient: bool, outline: models.Outline, reward: Reward) -> tuning.Task:
    """What `fit` would be handed; the outline's networks may be stand-ins. There is one prompt."""
    policy = Score.of(outline, s.guidance)
    judged = Decoded(outline.vae, reward, differentiable=gradient, chunk=s.batch)
    task, made, algorithm = tuning.planned(s, outline, policy.frozen(), judged)
    prompt = Encoded.zeros(1, outline.widths)
    return tuning.Task(
        problem=task, policy=policy, learner=tuning.learner_of(s, task, policy), algorithm=algorithm,
        critic=tuning.critic_of(s, task, gradient, outline.widths.pooled) if algorithm.learns_value else None,
        conditions=Prompts([NO_PROMPT], prompt, prompt, s.in_a_row), fit=made,
    )  # fmt: skip


def dry_run(s: Settings) -> None:
    """Print the settings and what they need, unless a run would refuse them before it loads weights."""
    prompts, eval_prompts = check(s)
    rehearse(s, outline_of(s), tuning.differentiable(s))
    if s.other_reward is not None:
        has_gradient(s.other_reward, s.reward_python)
    accelerator = make_accelerator(mixed_precision=s.precision)
    said = needs(s, len(prompts), accelerator)
    accelerator.print(yaml.safe_dump(s.plain(), sort_keys=False) + said)
    if accelerator.is_main_process:
        say_left_out(s, eval_prompts)


def assemble(s: Settings, reward: Reward | None, accelerator: Accelerator) -> Task:
    """Everything `fit` needs; what can be wrong is found in the order of what it costs to find."""
    prompts, eval_prompts = check(s, reward)
    outline = outline_of(s)
    rewards = tuning.rewards_of(s, reward, s.other_reward)
    gradient = tuning.differentiable(s, rewards["reward"])
    rehearse(s, outline, gradient)
    pipeline = pipeline_of(s, accelerator.device)
    companions = companions_of(s, pipeline) if accelerator.is_main_process else {}
    policy = Score.of(pipeline, s.guidance)
    reference = tuning.reference_of(s, policy, accelerator.device)
    judged = Decoded(pipeline.vae, rewards["reward"], differentiable=gradient, chunk=s.batch)
    task, made, algorithm = tuning.planned(s, pipeline, reference, judged)
    conditions = Prompts.encode(pipeline, prompts, s.in_a_row)
    torch.manual_seed(s.seed)  # the critic's first weights: loading may have drawn numbers
    critic = tuning.critic_of(s, task, gradient, conditions.width) if algorithm.learns_value else None
    try_rewards(pipeline, rewards, prompts, eval_prompts)
    return Task(
        problem=task, policy=policy, learner=tuning.learner_of(s, task, policy), algorithm=algorithm, critic=critic,
        conditions=conditions, fit=made, pipeline=pipeline, companions=companions,
        prompts=prompts, eval_prompts=eval_prompts, rewards=rewards,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ training


def train(settings: Settings, reward: Reward | None = None) -> Outcome:
    """Fine-tune, evaluate, keep. reward: a function of yours in place of `settings.reward`, recorded by its name."""

    def begun(s: Settings, reward: Reward | None, accelerator: Accelerator) -> Task:
        task = assemble(s, reward, accelerator)
        if accelerator.is_main_process and s.eval:
            say_left_out(s, task.eval_prompts)
        return task

    return tuning.train(
        settings, reward, assemble=begun, finish=finish, kl_steps=lambda s: s.eval_headline,
        show=lambda s, task: shown(s, task.pipeline, task.eval_prompts).images,
    )  # fmt: skip


def measure_decided(settings: Settings, reward: Reward | None = None) -> Path:
    """Measure, before training and with a run's settings, where along the paths the reward is decided."""
    s = tuning.named(settings, reward).resolved()
    accelerator = tuning.accelerator_of(s)
    return tuning.measure_decided(s, assemble(s, reward, accelerator), accelerator)


def shown(s: Settings, pipeline: Any, prompts: Sequence[Prompt]) -> Pictures:
    """The same prompts and noise every time."""
    sampler = family_of(pipeline).headline
    return draw(pipeline, prompts, range(Watch.SHOWN), sampler, Watch.STEPS, s.guidance, s.batch)


def finish(
    s: Settings, task: Task, history: list[dict[str, Any]], accelerator: Accelerator
) -> Evaluation | None:  # fmt: skip
    """Keep the pipeline, evaluate it against the untuned model, and tell the story. Every process calls it: they share
    the evaluation, and the main one has it."""
    main, prompts = accelerator.is_main_process, task.eval_prompts
    if main:
        save(s, task.pipeline, task.companions)  # first of all: what follows takes a while, and asks foreign code
        card(s, task.pipeline, prompts[0], None)
    if not s.eval:
        accelerator.print(f"-> {kept_in(s)}")
        return None
    untuned = tuning.untuned(task.pipeline, cast(Score, task.problem.reference))
    found = judged(s, task.pipeline, untuned, prompts, task.rewards)
    if not main:
        return None
    found.write(s.out / "evaluation.json")
    card(s, task.pipeline, prompts[0], found)
    tell(s, found, history, shown(s, untuned, prompts), shown(s, task.pipeline, prompts))
    print(found.summary(), f"-> {s.out / 'report.html'}, {kept_in(s)}", sep="\n")
    return found


def kept_in(s: Settings) -> Path:
    """The folder of what was trained."""
    return s.out / ("lora" if s.lora else "pipeline")


def tell(s: Settings, found: Evaluation, history: list[dict[str, Any]], before: Pictures, after: Pictures) -> None:
    """OUT/report.html: what was gained, pictures before and after, curves, samplers, settings."""
    prompts = "; ".join(dict.fromkeys(p.text for p in before.prompts))
    sections = {
        "The same noise, before and after": report.pictures({"before": before.images, "after": after.images})
        + report.paragraph(f"Row by row: {prompts}."),
        "Training": report.curves(history),
        "By sampler and number of steps": report.samplers(found.grid),
        "Settings": report.listed(s.plain()),
    }
    report.html(s.out / "report.html", f"{s.model}, tuned on {s.reward}", found.summary(), sections)


def judged(
    s: Settings, pipeline: Any, untuned: Any, prompts: Sequence[Prompt], rewards: dict[str, Reward]
) -> Evaluation:  # fmt: skip
    """As the settings say."""
    ceiling, plan = ceiling_of(rewards["reward"], prompts), plan_of_evaluation(s, family_of(pipeline))
    return evaluate(pipeline, untuned, prompts, rewards, ceiling=ceiling, **plan)


def plan_of_evaluation(s: Settings, family: Family) -> dict[str, Any]:
    """The options of `evaluate`."""
    return {
        "samples": s.eval_samples, "guidance": s.guidance, "grid": tuple(product(s.eval_samplers, s.eval_steps)),
        "grid_samples": s.eval_grid_samples, "headline": (family.headline, s.eval_headline),
        "kl_steps": s.eval_headline, "kl_samples": s.eval_kl_samples, "batch": s.batch,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ the pipeline


def save(s: Settings, pipeline: Any, companions: dict[str, Any]) -> None:
    """OUT/pipeline, with whatever the model had beside what was trained, its safety checker too; or OUT/lora."""
    family = family_of(pipeline)
    if s.lora:
        from peft import get_peft_model_state_dict

        adapters = get_peft_model_state_dict(network_of(pipeline))
        scaled = {name: v * (alpha_of(s) / s.lora) if "lora_B" in name else v for name, v in adapters.items()}
        layers = family.lora_layers(scaled)  # the file has no place for alpha, and is read with that of the rank
        family.pipeline.save_lora_weights(s.out / "lora", **{f"{family.network}_lora_layers": layers})
        models.readable(s.out / "lora")
        return
    family.whole(pipeline, companions).save_pretrained(s.out / "pipeline")
    models.readable(s.out / "pipeline")


def card(s: Settings, pipeline: Any, prompt: Prompt, found: Evaluation | None) -> None:
    """Beside the weights, a model card as the hub reads it, with what was found if it was evaluated. Adapters go with a
    base that is in float32, as in training, whatever its files are in."""
    base = str(Path(s.model).resolve()) if Path(s.model).exists() else s.model
    options = {"revision": s.revision, "variant": s.variant}
    given = "".join(f", {name}={json.dumps(value)}" for name, value in options.items() if value is not None)
    family = family_of(pipeline)
    absent = "".join(f", {name}=None" for name in family.absent(pipeline))
    kind, call = (
        family.pipeline.__name__,
        "".join(f", {name}={json.dumps(value)}" for name, value in family.call.items()),
    )
    loading = f"""import torch
from diffusers import {kind}

pipeline = {kind}.from_pretrained({json.dumps(base)}{given}{absent}, torch_dtype=torch.float32)
pipeline.load_lora_weights("lora")""" if s.lora else f"""from diffusers import {kind}

pipeline = {kind}.from_pretrained("pipeline"{absent})"""  # fmt: skip
    adapter = "base_model_relation: adapter" if s.lora else "base_model_relation: finetune"
    text = f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {s.model}
{adapter}
tags: [stable-diffusion, text-to-image, reinforcement-learning, score-as-action]
---

# Tuned on {s.reward}

{s.model}, fine-tuned by {s.algorithm} in continuous time (arXiv 2502.01819) on the reward `{s.reward}`, guidance
{s.guidance:g}. The license is the base model's. In the folder above this one:

```python
{loading}
image = pipeline({json.dumps(prompt.text)}, guidance_scale={s.guidance:g}{call}).images[0]
```

{found.summary() if found else ""}
"""
    (kept_in(s) / "README.md").write_text(text)


# ------------------------------------------------------------------------------------------ what it would need


def needs(s: Settings, prompts: int, accelerator: Accelerator) -> str:
    """Memory, disk and work of a run on so many prompts, from the model's configs alone."""
    outline = outline_of(s)
    if s.lora:
        with init_empty_weights():
            add_adapters(s, outline)
    tuning.lay_out(s, network_of(outline))
    embeds = 4 * prompts * outline.widths.tokens * outline.widths.embeds
    encoders = [getattr(outline, name) for name in outline.family.encoders]
    others = {
        "VAE": size_of([outline.vae]),
        "text encoder" + "s" * (len(encoders) > 1): size_of(filter(None, encoders)),
        "prompts": embeds if embeds <= ON_DEVICE else 0,
    }  # fmt: skip
    gradient = tuning.differentiable(s)
    return requirements.text(
        s, outline, partial(parts, s, gradient), accelerator, differentiable=gradient, others=others,
        evaluation=(calls_of_evaluation(outline, **plan_of_evaluation(s, outline.family)) if s.eval else 0)
        + tuning.calls_of_match_kl(s, s.eval_headline) * (1 if s.guidance == 1 else 2),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ after training


@dataclass(frozen=True)
class Evaluate(tuning.Evaluate):
    """What a run gained, against the model it began with. Leave out to keep what the run was made with."""

    limits: ClassVar[dict[str, str]] = {**tuning.Evaluate.limits, "guidance": ">= 1"}

    other_reward: str | None = None
    """A second one."""
    prompts: str | None = None
    """List, file or prompt."""
    guidance: float | None = None
    """Classifier-free guidance."""


def tuned(run: Path) -> tuple[Settings, Any]:
    """A run's settings and its pipeline, loaded by diffusers alone."""
    s = tuning.settings_of_run(Settings, run)
    if (run / "pipeline").is_dir():
        return s, models.load(str(run / "pipeline"), **s.family_options)
    if not (run / "lora").is_dir():
        raise ValueError(f"run: {run} has no pipeline yet: let the training end, with --resume, or export a checkpoint")
    pipeline = load(s)
    pipeline.load_lora_weights(run / "lora")
    return s, pipeline


def evaluate_run(e: Evaluate, reward: Reward | None = None) -> Evaluation:
    """Write evaluation.json anew. reward: a function of yours in place of `e.reward`."""
    s, pipeline = tuned(e.run)
    s = tuning.named(e, reward).over(s, other_reward=e.other_reward, eval_prompts=e.prompts, guidance=e.guidance)
    accelerator = make_accelerator()
    prompts, rewards = prompt_lists.read(s.eval_prompts or s.prompts), tuning.rewards_of(s, reward, s.other_reward)
    if accelerator.is_main_process:
        say_left_out(s, prompts)
    untuned = load(s)
    found = judged(s, pipeline.to(accelerator.device), untuned.to(accelerator.device), prompts, rewards)
    if accelerator.is_main_process:
        found.write((e.out or e.run) / "evaluation.json")
        print(found.summary())
    return found


def export(o: Export) -> Path:
    """Write RUN/pipeline, or RUN/lora, from a checkpoint."""
    s = tuning.settings_of_run(Settings, o.run)
    folder, pipeline = tuning.chosen(o, s.beta), pipeline_of(s, torch.device("cpu"))
    tuning.restore(network_of(pipeline), folder)
    save(dataclasses.replace(s, out=o.run), pipeline, companions_of(s, pipeline))
    print(f"{folder.name} -> {kept_in(dataclasses.replace(s, out=o.run))}")
    return folder


@dataclass(frozen=True)
class Sample(tuning.Sample):
    """Pictures from a run, or from the model it began with, prompt after prompt."""

    limits: ClassVar[dict[str, str]] = {**tuning.Sample.limits, "guidance": ">= 1"}

    prompts: str | None = None
    """List, file or prompt; by default those of the evaluation."""
    sampler: str | None = None
    """ddim, dpmsolver++, unipc, euler or heun, as far as the model's family has it; by default the evaluation's."""
    steps: int = 25
    """Time steps."""
    guidance: float | None = None
    """As in training by default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler is not None:
            known(self.sampler)


def sample(o: Sample) -> Path:
    """Draw, and write one file a picture and a grid."""
    s, pipeline = tuned(o.run)
    pipeline = load(s) if o.untuned else pipeline
    prompts = prompt_lists.read(o.prompts or s.eval_prompts or s.prompts)
    guidance = s.guidance if o.guidance is None else o.guidance
    pipeline.to(make_accelerator().device)
    sampler = o.sampler or family_of(pipeline).headline
    drawn = draw(pipeline, prompts, range(o.n), sampler, o.steps, guidance, s.batch, o.seed)
    out = o.out or o.run / "samples"
    report.keep_all(drawn.images, out)
    return out


# ------------------------------------------------------------------------------------------ the command line


APART: dict[str, dict[str, Any]] = {
    "reward": {
        "algorithm": "forward-matching", "critic": "network", "options": (), "other_reward": None, "kl": 1.5,
        "epochs": 16, "lr": 6e-5, "ema": 0.97, "warmup": 3,
    },
    "algorithm": {"options": (), "warmup": 3}, "prompts": {"eval_prompts": None}, "beta": {"kl": None},
}  # fmt: skip


COMMANDS = ("train", "decided", "evaluate", "sample", "export")


def settings_of(kind: type[S], arguments: list[str], doc: str = "") -> S:
    """From the command line, over a file (`--config`), over what suits the machine."""
    return tuning.settings_of(kind, arguments, APART, doc)


def main(kind: type[Settings], doc: str, arguments: list[str]) -> None:
    """train (which may be left out), decided, evaluate, sample, export, of a command with these settings."""
    command, *rest = arguments if arguments[:1] and arguments[0] in COMMANDS else ("train", *arguments)
    if command == "evaluate":
        evaluate_run(tyro.cli(Evaluate, args=rest))
    elif command == "sample":
        sample(tyro.cli(Sample, args=rest))
    elif command == "export":
        export(tyro.cli(Export, args=rest))
    else:
        s = settings_of(kind, rest, doc).resolved()
        does = dry_run if s.dry_run else measure_decided if command == "decided" else train
        does(s)
