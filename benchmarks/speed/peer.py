"""One side of a race on the embedded Stable Diffusion: ours, or a trainer of TRL's in an environment of its own.

    python benchmarks/speed/peer.py ours|ddpo|alignprop '{"steps": 20, ...}'         the fields of `Work`

It trains an epoch for each line `epoch` on its standard input, and answers with a line of JSON: seconds, images, the
mean reward, and the most memory held, in MiB, beyond the interpreter with its packages. `save FOLDER` keeps the
UNet in diffusers' format. What is asked for is the same on both sides: prompts, reward, steps, batches, guidance,
and the optimiser's steps an epoch.

TRL (trl 0.23.1, the last with these trainers) needs older packages than this project, so nothing of this project but
the reward, the prompts and the clock is imported there. Its environment is made by `environment`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import IO, Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it stands beside the package, not in it

from benchmarks.memory import held, mebibytes
from benchmarks.speed.timing import seconds
from scale import prompts, shapes

PINNED = ("trl==0.23.1", "diffusers==0.35.2", "transformers==4.57.1", "peft")
MODEL = Path(shapes.__file__).parent / "assets" / "tiny-sd"
PROMPTS = "shapes-doubtful-more"


@dataclass(frozen=True)
class Work:
    """What an epoch is."""

    samples: int = 32
    """Pictures."""
    batch: int = 32
    """Drawn at a time, and at most in one backward pass."""
    updates: int = 1
    """The optimiser's steps."""
    steps: int = 20
    guidance: float = 1.0
    lr: float = 1e-4
    seed: int = 0
    threads: int = 1
    own: dict[str, Any] = field(default_factory=dict)
    """Of our settings, what is not as theirs: without it DDPO on the same chain, without KL."""


class Side(Protocol):
    """Who trains."""

    def epoch(self) -> float:
        """One; the mean reward of what was drawn."""

    def calls(self) -> float:
        """Of the UNet a picture so far, at one place each: its own, the reference's and the critic's."""

    def save(self, folder: str) -> None:
        """The UNet."""


class TRL(ABC):
    """A trainer of TRL's, full fine-tuning."""

    def __init__(self, work: Work) -> None:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # or the trainer looks for an accelerator
        from trl import DefaultDDPOStableDiffusionPipeline  # type: ignore[import-not-found]

        texts = [p.text for p in prompts.read(PROMPTS)]
        draw = random.Random(work.seed)
        self.rewards: list[float] = []
        self.work, self.count = work, 0  # epochs
        self.pipeline = DefaultDDPOStableDiffusionPipeline(for_older_packages(MODEL), use_lora=False)
        self.halves, self.asked = 2 if work.guidance > 1 else 1, 0
        self.pipeline.unet.register_forward_pre_hook(self.ask)
        self.trainer = self.made(lambda: (draw.choice(texts), {}))
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def same(self) -> dict[str, Any]:
        """What all its trainers are told."""
        work = self.work
        batch = min(work.batch, work.samples // work.updates)
        return {
            "train_batch_size": batch, "train_gradient_accumulation_steps": work.samples // work.updates // batch,
            "num_epochs": 10**6, "seed": work.seed, "mixed_precision": "no", "sample_num_steps": work.steps,
            "sample_guidance_scale": work.guidance, "train_learning_rate": work.lr, "save_freq": 10**6,
            "project_kwargs": {"project_dir": tempfile.mkdtemp()},
        }  # fmt: skip

    @abstractmethod
    def made(self, prompt: Callable[[], tuple[str, dict[str, Any]]]) -> Any:
        """The trainer."""

    @abstractmethod
    def learn(self) -> None:
        """Draw an epoch's images and learn from them."""

    def reward(self, images: Any, texts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
        """As a trainer asks for it."""
        found = shapes.following_soft(images, texts)
        self.rewards += found.tolist()
        return found, {}

    def epoch(self) -> float:
        self.rewards = []
        self.learn()
        self.count += 1
        return mean(self.rewards)

    def ask(self, unet: Any, given: tuple[Any, ...]) -> None:
        """One call of the UNet."""
        self.asked += len(given[0]) // self.halves

    def calls(self) -> float:
        return self.asked / (self.count * self.work.samples)

    def save(self, folder: str) -> None:
        self.pipeline.unet.save_pretrained(folder)


class TheirDDPO(TRL):
    """`DDPOTrainer`."""

    def made(self, prompt: Callable[[], tuple[str, dict[str, Any]]]) -> Any:
        from trl import DDPOConfig, DDPOTrainer

        work = self.work
        config = DDPOConfig(
            **self.same, sample_batch_size=work.batch, sample_num_batches_per_epoch=work.samples // work.batch,
            train_cfg=work.guidance > 1,
        )  # fmt: skip
        return DDPOTrainer(config, self.reward, prompt, self.pipeline)

    def reward(self, images: Any, texts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
        with torch.no_grad():
            return super().reward(images, texts, metadata)

    def learn(self) -> None:
        self.trainer.step(self.count, self.count)


class AlignProp(TRL):
    """`AlignPropTrainer`: back from the reward through a random number of the last steps, at least one. Each of its
    optimiser steps draws the images that it learns from."""

    def made(self, prompt: Callable[[], tuple[str, dict[str, Any]]]) -> Any:
        from trl import AlignPropConfig, AlignPropTrainer

        config = AlignPropConfig(**self.same, truncated_rand_backprop_minmax=(0, self.work.steps - 1))
        return AlignPropTrainer(config, self.reward, prompt, self.pipeline)

    def learn(self) -> None:
        for k in range(self.work.updates):
            self.trainer.step(0, self.count * self.work.updates + k)


def for_older_packages(model: Path) -> str:
    """A copy of the model as transformers 4 reads it, which looks for other files of the tokenizer and other names of
    the text encoder's weights; with timesteps for DDIM, which the trainer takes, as they are here."""
    folder = Path(tempfile.mkdtemp()) / "model"
    shutil.copytree(model, folder)
    known = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(known["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in known["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    schedule = folder / "scheduler" / "scheduler_config.json"
    given = json.loads(schedule.read_text()) | {"clip_sample": False, "timestep_spacing": "trailing"}
    schedule.write_text(json.dumps(given))
    weights = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": v for name, v in load_file(weights).items()}, weights, {"format": "pt"})
    return str(folder)


class Ours:
    """`ctrl.fit`'s epochs, as `scale/sd15.py` makes them."""

    def __init__(self, work: Work) -> None:
        from benchmarks.speed.subjects import embedded
        from scale import finetune

        nodes = work.samples * work.steps // work.updates
        same = {
            "algorithm": "ddpo", "options": ("passes=1", f"nodes={nodes}", "clip=0.2"), "beta": 0.0, "ema": 0.0,
            "solver": "ddim", "grid": "timesteps", "jitter": 0.0, "steps": work.steps, "samples": work.samples,
            "batch": work.batch, "micro_batch": work.batch, "guidance": work.guidance, "lr": work.lr,
            "seed": work.seed, "other_reward": None,
        }  # fmt: skip
        given = same | {k: tuple(v) if isinstance(v, list) else v for k, v in work.own.items()}
        subject = embedded("ours", finetune, Path(tempfile.mkdtemp()), 1.0, **given)
        self.run, self.unet = subject.run, cast(Any, subject.networks[0])

    def epoch(self) -> float:
        return float(self.run.step_epoch()["reward"])

    def calls(self) -> float:
        return self.run.metrics.counts["network_calls"] / self.run.metrics.counts["trajectories"]

    def save(self, folder: str) -> None:
        self.unet.save_pretrained(folder)


SIDES: dict[str, Callable[[Work], Side]] = {"ours": Ours, "ddpo": TheirDDPO, "alignprop": AlignProp}


def serve(side: str, work: Work) -> None:
    """Answer the lines that come."""
    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(work.threads)
    if side == "ours":
        import benchmarks.speed.subjects  # noqa: F401
    else:
        from trl import AlignPropTrainer, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # noqa: F401  (late imports)
    before = held()
    trainer = SIDES[side](work)
    for line in sys.stdin:
        what, _, given = line.strip().partition(" ")
        if what == "save":
            trainer.save(given)
        print(json.dumps(an_epoch(trainer, work, before) if what == "epoch" else {}), file=answers, flush=True)


def an_epoch(trainer: Side, work: Work, before: float | None) -> dict[str, Any]:
    """What is said of it."""
    rewards: list[float] = []
    spent: list[float] = []
    most = mebibytes(lambda: spent.append(seconds(lambda: rewards.append(trainer.epoch()))), before)
    return {"seconds": spent[0], "images": work.samples, "reward": rewards[0], "mebibytes": most,
            "network_calls": trainer.calls()}  # fmt: skip


# ------------------------------------------------------------------------------------------ who asks


class Asked:
    """One side, in a process of its own."""

    def __init__(self, side: str, work: Work, python: str, env: Mapping[str, str], said: IO[str]) -> None:
        self.side, self.said = side, said
        self.process = subprocess.Popen(
            [python, __file__, side, json.dumps(asdict(work))], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=said, text=True, env={**os.environ, **env},
        )  # fmt: skip

    def send(self, line: str) -> None:
        """Ask; the answer is waited for by `receive`."""
        assert self.process.stdin is not None
        with suppress(OSError):  # it has ended: `receive` says so
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer."""
        assert self.process.stdout is not None
        if answer := self.process.stdout.readline():
            return dict(json.loads(answer))
        self.said.seek(0)
        raise RuntimeError(f"{self.side} ended:\n{self.said.read()[-4000:]}")

    def __call__(self, line: str) -> dict[str, Any]:
        self.send(line)
        return self.receive()


@contextmanager
def started(side: str, work: Work, python: str = "", env: Mapping[str, str] = {}) -> Iterator[Asked]:
    """ask(line) -> what one side answers; it runs in this interpreter, or in another."""
    with tempfile.TemporaryFile("w+") as said:
        asked = Asked(side, work, python or sys.executable, env, said)
        try:
            yield asked
        finally:
            with suppress(OSError), asked.process:  # closes the pipes, and waits
                pass


def environment(folder: Path) -> str:
    """The interpreter of TRL's environment, which is made where there is none, or half of one."""
    python, whole = folder / "bin" / "python", folder / "whole"
    if not whole.exists():
        version = torch.__version__.partition("+")[0]
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", f"torch=={version}", *PINNED], check=True)
        except (subprocess.CalledProcessError, OSError) as e:
            raise ValueError(f"peer_env: TRL's environment could not be made in {folder}: {e}") from e
        whole.touch()
    return str(python)


if __name__ == "__main__":
    serve(sys.argv[1], Work(**json.loads(sys.argv[2])))
