"""Checkpoints of a run: what it needs to go on as if it had not stopped.

OUT/checkpoints/epoch-000010/ holds what accelerate keeps (models, optimisers, scaler, random states of each process),
the averaged policy, the trajectories in store (a file a process) and progress.json. It is written beside its final
place and renamed, so that a folder of that name is whole. Whatever is drawn is keyed by (seed, epoch, sample) and the
learning rate is a function of the epoch, so neither has a state to keep. The oldest batch in store is not written if
the next epoch would push it out.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from ctrl.replay import Batch
from ctrl.rollout import Trajectory

if TYPE_CHECKING:
    from ctrl.fit import Run

_PATH = ("t", "x", "a", "xi", "w", "ids", "reward")


def newest(out: Path) -> Path | None:
    """The last whole checkpoint of a run's folder."""
    return max((p for p in (out / "checkpoints").glob("epoch-*") if p.suffix != ".part"), default=None)


def save(run: Run) -> None:
    """Write a checkpoint of this epoch; every process calls it."""
    assert run.settings.out is not None
    final = run.settings.out / "checkpoints" / f"epoch-{run.epoch:06d}"
    part = final.with_suffix(".part")
    if run.accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    run.accelerator.save_state(str(part))
    kept = run.replay.batches[max(0, len(run.replay.batches) - run.algorithm.keep + 1) :]
    tensors = {f"{i}.{name}": v for i, batch in enumerate(kept) for name, v in _tensors(batch).items()}
    save_file(_apart(tensors), part / f"replay-{run.replay.rank}.safetensors")
    if run.accelerator.is_main_process:
        if run.ema is not None:
            save_model(run.ema, str(part / "ema.safetensors"))
        progress = {"epoch": run.epoch, "counts": run.counts, "must_agree": _must_agree(run)}
        (part / "progress.json").write_text(json.dumps(progress))
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        os.replace(part, final)
    run.accelerator.wait_for_everyone()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, but a copy of each that shares memory with one before: the file format has no two names for one."""
    seen: set[int] = set()
    found = {}
    for name, v in tensors.items():
        at = v.untyped_storage().data_ptr()
        found[name] = v.clone() if at in seen else v
        seen.add(at)
    return found


def load_newest(run: Run) -> None:
    """Bring a run back to its newest checkpoint; a run without one starts from the beginning."""
    assert run.settings.out is not None
    folder = newest(run.settings.out)
    if folder is not None:
        _load(run, folder)
    _truncate(run)


def _load(run: Run, folder: Path) -> None:
    progress, here = json.loads((folder / "progress.json").read_text()), _must_agree(run)
    for name, value in progress["must_agree"].items():
        if here[name] != value:
            raise ValueError(
                f"{folder} was written with {name} = {value}, this run has {here[name]}: resume with the same, or "
                f"start in another folder"
            )
    run.accelerator.load_state(str(folder))
    run.epoch, run.counts = progress["epoch"], progress["counts"]
    stored = load_file(folder / f"replay-{run.replay.rank}.safetensors")
    slots = 1 + max((int(name.partition(".")[0]) for name in stored), default=-1)
    run.replay.batches = [
        _batch({n.partition(".")[2]: v.to(run.accelerator.device) for n, v in stored.items() if n.startswith(f"{i}.")})
        for i in range(slots)
    ]
    if run.ema is not None:
        load_model(run.ema, folder / "ema.safetensors")


def _must_agree(run: Run) -> dict[str, Any]:
    """What an interrupted run and the one that goes on must have in common."""
    s = run.settings
    return {
        "processes": run.replay.world, "samples": s.samples, "steps": s.steps, "seed": s.seed, "ema": s.ema,
        "algorithm": type(run.algorithm).__name__, "learners": sorted(run.learners),
    }  # fmt: skip


def _tensors(batch: Batch) -> dict[str, Tensor]:
    path = {name: getattr(batch.trajectory, name) for name in _PATH}
    tensors = {**path, **{f"at.{name}": v for name, v in batch.fields.items()}}
    return {name: v.contiguous() for name, v in tensors.items() if v is not None}


def _batch(tensors: dict[str, Tensor]) -> Batch:
    path = {name: tensors.get(name) for name in _PATH}
    fields = {name.removeprefix("at."): v for name, v in tensors.items() if name.startswith("at.")}
    return Batch(Trajectory(**path, cond=None), fields)  # type: ignore[arg-type]


def _truncate(run: Run) -> None:
    """Take the metrics of the epochs that are kept, a line each, and drop what a run wrote after its last checkpoint
    (of which the last line may be torn)."""
    assert run.settings.out is not None
    file = run.settings.out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)[: run.epoch] if file.exists() else []
    run.history = [json.loads(line) for line in lines]
    run.accelerator.wait_for_everyone()  # everyone has read it
    if run.accelerator.is_main_process and file.exists():
        part = file.with_suffix(".part")
        part.write_text("".join(lines))
        os.replace(part, file)
    run.accelerator.wait_for_everyone()
