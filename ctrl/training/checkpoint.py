"""Checkpoints of a run: what it needs to go on as if it had not stopped.

OUT/checkpoints/epoch-000010/ holds the state of every part of the run, as NAME.safetensors or NAME.pt: models and their
optimisers, the averaged policy, and of each process NAME-RANK, its random numbers and its trajectories in store;
progress.json, and manifest.json (`ctrl.training.files`). Nothing is unpickled but tensors and numbers. The last few are
kept, and the best.

Weights that are not trained are not written, neither the reference's nor frozen ones of a model that is trained: their
digests are, and a run that is resumed must have the same.

Whatever is drawn is keyed by (seed, epoch, sample), and the learning rate and a KL budget's beta are functions of the
epochs so far, so none of these has a state to keep. The oldest epoch in store is not written if the next one would push
it out.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ctrl.algorithms.base import Algorithm
from ctrl.problem import Problem
from ctrl.training import files
from ctrl.training.engine import Engine
from ctrl.training.interrupts import RunFailed
from ctrl.training.metrics import Metrics
from ctrl.training.processes import together
from ctrl.training.replay import Replay, epoch_bytes
from ctrl.training.settings import Settings
from ctrl.training.state import OptimizerState, RandomState, Stateful, Weights

FORMAT = 5
"""Of the folder; another one is refused."""


class Resumable(Protocol):
    """What of a run a checkpoint is made of."""

    problem: Problem
    algorithm: Algorithm
    settings: Settings
    accelerator: Accelerator
    engine: Engine
    metrics: Metrics
    replay: Replay
    strikes: dict[str, int]
    epoch: int

    @property
    def fixed(self) -> dict[str, str]:
        """Digests of what training does not move."""


def size(models: Mapping[str, nn.Module], average: bool, epoch: int, keep: int) -> int:
    """Bytes of a checkpoint: weights, two moments of those trained, the average of the policy's, and the trajectories
    in store, of `epoch` bytes each epoch, but for the oldest."""
    moving = {name: sum(v.nbytes for v in Weights(model).state_dict().values()) for name, model in models.items()}
    moments = sum(2 * p.nbytes for model in models.values() for p in model.parameters() if p.requires_grad)
    return sum(moving.values()) + moments + (moving["policy"] if average else 0) + (keep - 1) * epoch


def most(keep_checkpoints: int) -> int:
    """Checkpoints on the disk at a time: the last ones, the best, and one that is being written."""
    return keep_checkpoints + 2


def check_room(run: Resumable) -> None:
    """Raise unless the disk has room for the checkpoints to come."""
    s = run.settings
    assert s.out is not None
    models = {name: learner.model for name, learner in run.engine.learners.items()}
    need = size(models, bool(s.ema), epoch_bytes(s.samples, s.steps, run.problem.shape), run.algorithm.keep)
    count = max(1, most(s.keep_checkpoints) - len(files.folders(s.out)))
    there = next(p for p in (s.out.absolute(), *s.out.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < count * need:
        raise ValueError(
            f"settings.out = {s.out}: {count} checkpoints of {need / 1e9:.2f} GB do not go into the "
            f"{free / 1e9:.2f} GB that are free there; take another disk, or fewer keep_checkpoints"
        )


def clear(run: Resumable) -> None:
    """Delete what another run left in the folder; every process calls it."""
    assert run.settings.out is not None
    if run.accelerator.is_main_process:
        files.delete(run.settings.out, ("checkpoints", "metrics.jsonl", "not-finite"))
    run.accelerator.wait_for_everyone()


def _parts(run: Resumable) -> dict[str, Stateful]:
    """What is the same on all processes, by name."""
    parts: dict[str, Stateful] = {}
    for name, learner in run.engine.learners.items():
        parts[name] = Weights(learner.model)
        parts[f"{name}-optimizer"] = OptimizerState(learner.optimizer)
    if run.engine.ema is not None:
        parts["ema"] = Weights(run.engine.ema, like=run.engine.policy)
    if run.accelerator.scaler is not None:
        parts["scaler"] = run.accelerator.scaler
    return parts


def save(run: Resumable) -> None:
    """Write a checkpoint of this epoch, and drop old ones; every process calls it. If that fails, those there are stay
    whole."""
    out, main = run.settings.out, run.accelerator.is_main_process
    assert out is not None
    final = out / "checkpoints" / f"epoch-{run.epoch:06d}"
    part = final.with_suffix(".part")
    try:
        together(run.accelerator, lambda: _begin(part) if main else None)
        together(run.accelerator, lambda: _write(run, part))
        together(run.accelerator, lambda: _seal(run, part, final) if main else None)
    except (OSError, RuntimeError, SafetensorError) as wrong:
        if main:
            shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(out).free / 1e9
        raise RunFailed(
            f"the checkpoint of epoch {run.epoch} could not be written to {final.parent} ({free:.2f} GB are free "
            f"there): {wrong}. Those before it are whole: make room, and resume"
        ) from wrong


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _write(run: Resumable, part: Path) -> None:
    """Every process's files."""
    rank = run.replay.rank
    save_file(files.unshared(run.replay.state_dict(run.algorithm.keep - 1)), part / f"replay-{rank}.safetensors")
    torch.save(RandomState().state_dict(), part / f"random-{rank}.pt")
    for name, held in _parts(run).items():
        state = held.state_dict()  # of models that are split every process gives its share
        if not run.accelerator.is_main_process:
            continue
        if isinstance(held, Weights):
            save_file(files.unshared(state), part / f"{name}.safetensors")
        else:
            torch.save(state, part / f"{name}.pt")
    if not run.accelerator.is_main_process:
        return
    progress = {
        "epoch": run.epoch, "counts": run.metrics.counts, "strikes": run.strikes, "processes": run.replay.world,
        "must_agree": _must_agree(run),
    }  # fmt: skip
    (part / files.PROGRESS).write_text(json.dumps(progress))


def _seal(run: Resumable, part: Path, final: Path) -> None:
    """The metrics so far are on disk too; then it has its name, and old ones go."""
    s = run.settings
    assert s.out is not None
    files.sync(s.out / "metrics.jsonl")
    files.seal(part, final)
    beta = getattr(run.problem, "beta", 0.0)
    files.prune(s.out, run.epoch, s.keep_checkpoints, run.metrics.history, beta)


def load_newest(run: Resumable) -> None:
    """Bring a run back to its newest checkpoint; a run without one starts from the beginning."""
    assert run.settings.out is not None
    found: list[Path | Exception | None] = [None]
    if run.accelerator.is_main_process:
        try:
            found = [files.newest(run.settings.out)]
        except Exception as wrong:
            found = [wrong]
    (folder,) = broadcast_object_list(found)
    if isinstance(folder, Exception):
        raise folder
    if folder is not None:
        _load(run, folder)
    _truncate(run)


def _load(run: Resumable, folder: Path) -> None:
    progress, here = json.loads((folder / files.PROGRESS).read_text()), _must_agree(run)
    there = progress["must_agree"]
    for name in here:
        if there.get(name) != here[name]:
            raise ValueError(
                f"{folder} was written with {name} = {there.get(name)}, this run has {here[name]}: resume with the "
                f"same, or start in another folder"
            )
    rank, before = run.replay.rank, progress["processes"]
    try:
        for name, held in _parts(run).items():
            weights = isinstance(held, Weights)
            held.load_state_dict(
                load_file(folder / f"{name}.safetensors") if weights else _numbers(folder / f"{name}.pt")
            )
        RandomState().load_state_dict(_numbers(folder / f"random-{rank % before}.pt"))
    except (UnpicklingError, RuntimeError, EOFError) as wrong:
        raise ValueError(f"{folder} cannot be loaded: {wrong}") from wrong
    owners = [rank] if before == run.replay.world else range(before)
    run.replay.load_state_dict(*(load_file(folder / f"replay-{owner}.safetensors") for owner in owners))
    run.replay.place(run.accelerator.device)
    run.epoch, run.metrics.counts, run.strikes = progress["epoch"], progress["counts"], progress["strikes"]


def _numbers(file: Path) -> dict[str, Any]:
    """Tensors and numbers, and nothing that would have to be run."""
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def _must_agree(run: Resumable) -> dict[str, Any]:
    """What an interrupted run and the one that goes on must have in common."""
    s, learners = run.settings, run.engine.learners
    return {
        "format": FORMAT, "samples": s.samples, "steps": s.steps, "seed": s.seed, "ema": s.ema,
        "algorithm": type(run.algorithm).__name__, "learners": sorted(learners),
        "shapes": {name: Weights(learner.model).shapes() for name, learner in learners.items()}, **run.fixed,
    }  # fmt: skip


def _truncate(run: Resumable) -> None:
    """Take the metrics of the epochs that are kept, a line each, and drop what a run wrote after its last checkpoint
    (of which the last line may be torn)."""
    assert run.settings.out is not None
    file = run.settings.out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)[: run.epoch] if file.exists() else []
    try:
        run.metrics.history = [json.loads(line) for line in lines]
    except ValueError as wrong:
        raise ValueError(f"{file} is no longer what was written: {wrong}. Begin in another folder") from wrong
    if [metrics.get("epoch") for metrics in run.metrics.history] != list(range(1, run.epoch + 1)):
        raise ValueError(
            f"{file} has lost lines: a checkpoint of epoch {run.epoch} goes with as many. Begin in another folder"
        )
    run.accelerator.wait_for_everyone()  # everyone has read it
    if run.accelerator.is_main_process and file.exists():
        part = file.with_suffix(".part")
        part.write_text("".join(lines))
        os.replace(part, file)
    run.accelerator.wait_for_everyone()
