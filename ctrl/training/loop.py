"""The one training loop: rollouts, what the algorithm makes of them, metrics, checkpoints.

    result = fit(problem, policy, ActorCritic(), critic=NetworkCritic(problem, network), settings=Settings(steps=20))

A toy problem and Stable Diffusion go through this same function. An epoch is: simulate `samples` trajectories under the
current policy, ask the reward, put them in store, make the updates that the algorithm asks for. Everything that is
drawn is drawn by (seed, epoch, sample), and a step sums over micro-batches and processes; so the run does not depend on
them, or on having been interrupted.

With a folder to write to, SIGTERM and SIGINT let the epoch end, keep it and exit (`ctrl.training.interrupts`). What is
not finite is skipped, and a copy kept. A reward that fails loses nothing that was learned.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from ctrl.algorithms.base import Algorithm
from ctrl.nodes import Conditions
from ctrl.problem import Problem
from ctrl.training import checkpoint, files
from ctrl.training.device import make_accelerator
from ctrl.training.interrupts import TIME_UP, RunFailed, Stopped
from ctrl.training.lock import locked
from ctrl.training.processes import any_of, check_same, together
from ctrl.training.run import Run
from ctrl.training.settings import Settings
from ctrl.value import Critic

Callback = Callable[[Run, dict[str, Any]], None]
"""callback(run, metrics), after every epoch."""


@dataclass(frozen=True)
class Result:
    """What `fit` returns: the trained modules, the averaged policy if asked for, and the metrics of every epoch."""

    policy: nn.Module
    critic: Critic | None
    ema: nn.Module | None
    history: list[dict[str, Any]]


def fit(
    problem: Problem,
    policy: nn.Module,
    algorithm: Algorithm,
    *,
    critic: Critic | None = None,
    conditions: Conditions | None = None,
    settings: Settings = Settings(),  # noqa: B008
    callbacks: Sequence[Callback] = (),
    resume: bool = False,
    overwrite: bool = False,
    accelerator: Accelerator | None = None,
) -> Result:
    """Train a policy.

    Args:
        policy: mean(t, x, cond) -> (B, *D) as a module; it is trained in place. It, the critic and every module that
            is an attribute of the problem are moved to the accelerator's device, unless their weights are offloaded.
        critic: learned or exact; see the algorithm.
        conditions: (n,) sample ids -> cond, anything that policy, reference and reward understand and `cond[index]`
            can pick from.
        callbacks: callback(run, metrics) after every epoch, on every process.
        resume: go on from the newest whole checkpoint in `settings.out`, if there is one.
        overwrite: begin anew in a folder that holds a run; what that left is deleted.
        accelerator: for devices, precision and processes; that of `ctrl.training.device.make_accelerator` by default.
    """
    if accelerator is None:
        accelerator = make_accelerator()
    else:
        accelerator.free_memory()  # or it would hold on to an earlier run's models
    algorithm.check(problem, settings.solver, critic)
    if resume and settings.out is None:
        raise ValueError("resume needs settings.out, the folder with the checkpoints")
    run = Run(problem, policy, algorithm, critic, conditions, settings, accelerator)
    with locked(settings.out, accelerator):
        check_same(accelerator, lambda: run.fixed)
        _begin(run, resume, overwrite)
        check_same(accelerator, run.moving)
        _train(run, callbacks)
    return Result(policy, critic, run.ema, run.history)


def _begin(run: Run, resume: bool, overwrite: bool) -> None:
    """Go on from what the folder holds, or begin anew."""
    out = run.settings.out
    if out is None:
        return
    if not (resume or overwrite) and files.folders(out):
        raise ValueError(
            f"settings.out = {out} holds checkpoints already: pass resume=True, overwrite=True, or another folder"
        )
    if overwrite and not resume:
        checkpoint.clear(run)
    checkpoint.load_newest(run)
    run.kept = run.epoch
    checkpoint.check_room(run)


def _train(run: Run, callbacks: Sequence[Callback]) -> None:
    """The epochs that are left."""
    settings = run.settings
    bar = tqdm(
        total=settings.epochs, initial=run.epoch, disable=not (settings.progress and run.accelerator.is_main_process)
    )
    with bar, run.stops:
        while run.epoch < settings.epochs:
            metrics = run.step_epoch()
            together(run.accelerator, lambda m=metrics: _write(run, m))  # type: ignore[misc]
            if run.epoch % settings.checkpoint_every == 0 or run.epoch == settings.epochs:
                run.save()
            _show(bar, metrics, settings.samples)
            for callback in callbacks:
                callback(run, metrics)
            if run.epoch < settings.epochs:
                run.stops.epoch_ends()
            _stop_if_asked(run)


def _show(bar: tqdm, metrics: dict[str, Any], samples: int) -> None:
    """What a bar says of an epoch."""
    shown: dict[str, str] = {name: f"{metrics[name]:.3g}" for name in ("reward", "kl") if name in metrics}
    with suppress(OSError):  # nobody reads it any more
        bar.update()
        bar.set_postfix({**shown, "samples/s": f"{samples / metrics['seconds']:.3g}"})


def _stop_if_asked(run: Run) -> None:
    """If any process was asked to: keep this epoch, and exit."""
    if not any_of(run.accelerator, bool(run.stops.code)):
        return
    run.save()
    why = run.stops.why or "another process was asked to stop"
    with suppress(OSError):
        run.accelerator.print(
            f"{why}: stopped after epoch {run.epoch} of {run.settings.epochs}, which is kept; resume goes on"
        )
    raise Stopped(run.stops.code or TIME_UP)


def _write(run: Run, metrics: dict[str, Any]) -> None:
    """One line of metrics.jsonl."""
    if run.settings.out is None or not run.accelerator.is_main_process:
        return
    run.settings.out.mkdir(parents=True, exist_ok=True)
    try:
        with (run.settings.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
    except OSError as wrong:
        raise RunFailed(
            f"metrics.jsonl could not be written to {run.settings.out}: {wrong}. The checkpoints are whole: make room, "
            f"and resume"
        ) from wrong
