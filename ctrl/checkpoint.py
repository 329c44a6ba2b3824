"""Checkpoints of a run: what it needs to go on as if it had not stopped.

OUT/checkpoints/epoch-000010/ holds what accelerate keeps (models, optimisers, scaler, random states of each process),
the averaged policy, the trajectories in store (a file a process), progress.json, and manifest.json with the sha256 of
all of them. It is written beside its final place, brought to disk and renamed, so a run that is killed leaves none of
that name that is not whole; what happens to one later, its manifest shows, and then the one before it serves. Nothing
is unpickled but tensors and numbers. The last few are kept, and the best.

Weights that are not trained are not written, neither the reference's nor frozen ones of a model that is trained: their
digests are, and a run that is resumed must have the same.

Whatever is drawn is keyed by (seed, epoch, sample), and the learning rate and a KL budget's beta are functions of the
epochs so far, so none of these has a state to keep. The oldest batch in store is not written if the next epoch would
push it out.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list, has_offloaded_params
from accelerate.utils import load as tensors_and_numbers
from accelerate.utils.modeling import get_state_dict_offloaded_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrl.replay import Batch, epoch_bytes
from ctrl.stops import RunFailed

if TYPE_CHECKING:
    from ctrl.fit import Run

FORMAT = 4
"""Of the folder; another one is refused."""
MANIFEST, PROGRESS = "manifest.json", "progress.json"


def folders(out: Path) -> list[Path]:
    """The checkpoints of a run's folder, newest first."""
    return sorted((p for p in (out / "checkpoints").glob("epoch-*") if not p.suffix), reverse=True)


def newest(out: Path) -> Path | None:
    """The last checkpoint that is whole. One that is not is passed over with a warning; if there are some and none is,
    that is an error: to begin anew is for the user to say."""
    found = folders(out)
    for folder in found:
        fault = broken(folder)
        if fault is None:
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {fault}", stacklevel=2)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoints in {out / 'checkpoints'} is whole: begin in another folder"
        )
    return None


def clear(run: Run) -> None:
    """Delete what another run left in the folder; every process calls it."""
    assert run.settings.out is not None
    if run.accelerator.is_main_process:
        delete(run.settings.out, ("checkpoints", "metrics.jsonl", "not-finite"))
    run.accelerator.wait_for_everyone()


def delete(out: Path, names: Sequence[str]) -> None:
    """Files and folders of a run. A folder's name goes first, so that a part of it is never taken for the whole."""
    for name in names:
        if (out / name).is_dir():
            old = out / f"{name}.old"
            shutil.rmtree(old, ignore_errors=True)
            os.replace(out / name, old)
            shutil.rmtree(old)
        else:
            (out / name).unlink(missing_ok=True)


def size(models: Mapping[str, nn.Module], average: bool, epoch: int, keep: int) -> int:
    """Bytes of a checkpoint: weights, two moments of those trained, the average of the policy's, and the trajectories
    in store, of `epoch` bytes each epoch, but for the oldest."""
    moving = {name: sum(v.nbytes for v in _moving(model).values()) for name, model in models.items()}
    moments = sum(2 * p.nbytes for model in models.values() for p in model.parameters() if p.requires_grad)
    return sum(moving.values()) + moments + (moving["policy"] if average else 0) + (keep - 1) * epoch


def most(keep_checkpoints: int) -> int:
    """Checkpoints on the disk at a time: the last ones, the best, and one that is being written."""
    return keep_checkpoints + 2


def check_room(run: Run) -> None:
    """Raise unless the disk has room for the checkpoints to come."""
    s = run.settings
    assert s.out is not None
    models = {name: learner.model for name, learner in run.learners.items()}
    need = size(models, bool(s.ema), epoch_bytes(s.samples, s.steps, run.problem.shape), run.algorithm.keep)
    count = max(1, most(s.keep_checkpoints) - len(folders(s.out)))
    there = next(p for p in (s.out.absolute(), *s.out.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < count * need:
        raise ValueError(
            f"settings.out = {s.out}: {count} checkpoints of {need / 1e9:.2f} GB do not go into the "
            f"{free / 1e9:.2f} GB that are free there; take another disk, or fewer keep_checkpoints"
        )


def broken(folder: Path) -> str | None:
    """What is wrong with a checkpoint, if anything is: every file must be as its manifest has it."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        digests = {str(name): str(digest) for name, digest in manifest.items()}
    except (OSError, ValueError, AttributeError):
        return f"{MANIFEST} is missing or torn"
    for name, digest in digests.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _sha256(file) != digest:
            return f"{name} is not what was written"
    return None if PROGRESS in digests else f"{MANIFEST} is not of a checkpoint"


def save(run: Run) -> None:
    """Write a checkpoint of this epoch, and drop old ones; every process calls it. If that fails, those there are stay
    whole."""
    assert run.settings.out is not None
    final = run.settings.out / "checkpoints" / f"epoch-{run.epoch:06d}"
    part = final.with_suffix(".part")
    main = run.accelerator.is_main_process
    try:
        run.together(lambda: _begin(part) if main else None)
        run.together(lambda: _write(run, part))
        run.together(lambda: _seal(run, part, final) if main else None)
    except (OSError, RuntimeError, SafetensorError) as wrong:
        if main:
            shutil.rmtree(part, ignore_errors=True)
        free = shutil.disk_usage(run.settings.out).free / 1e9
        raise RunFailed(
            f"the checkpoint of epoch {run.epoch} could not be written to {final.parent} ({free:.2f} GB are free "
            f"there): {wrong}. Those before it are whole: make room, and resume"
        ) from wrong


def _begin(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _write(run: Run, part: Path) -> None:
    """Every process's files."""
    hook = run.accelerator.register_save_state_pre_hook(_leave_out_frozen)
    try:
        run.accelerator.save_state(str(part))
    finally:
        hook.remove()
    kept = run.replay.batches[max(0, len(run.replay.batches) - run.algorithm.keep + 1) :]
    tensors = {f"{i}.{name}": v.contiguous() for i, batch in enumerate(kept) for name, v in batch.tensors.items()}
    save_file(_apart(tensors), part / f"replay-{run.replay.rank}.safetensors")
    if run.accelerator.is_main_process:
        if run.ema is not None:
            average = {name: v.contiguous() for name, v in _average(run).items()}
            save_file(_apart(average), part / "ema.safetensors")
        progress = {"epoch": run.epoch, "counts": run.counts, "strikes": run.strikes, "must_agree": _must_agree(run)}
        (part / PROGRESS).write_text(json.dumps(progress))


def _moving(model: nn.Module) -> dict[str, Tensor]:
    """What training moves of a model's state: trained weights, and buffers."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: v for name, v in model.state_dict().items() if name not in frozen}


def _average(run: Run) -> dict[str, Tensor]:
    """The same of the averaged policy, if there is one."""
    if run.ema is None:
        return {}
    state = run.ema.state_dict()
    return {name: state[name] for name in _moving(run.policy)}


def _leave_out_frozen(models: list[nn.Module], weights: list[dict[str, Tensor]], folder: str) -> None:
    """A hook of accelerate's `save_state`: `weights` are the states it is about to write."""
    for model, state in zip(models, weights, strict=True):
        for name in state.keys() - _moving(model).keys():
            del state[name]


def _seal(run: Run, part: Path, final: Path) -> None:
    """Everything on disk, and the metrics so far; then its name; then old ones go."""
    assert run.settings.out is not None
    out = run.settings.out
    (part / MANIFEST).write_text(json.dumps(manifest(part), indent=1))
    for file in (*part.rglob("*"), out / "metrics.jsonl", part):
        _sync(file)
    if final.exists():  # one that was passed over
        _drop(final)
    os.replace(part, final)
    _sync(final.parent)
    _prune(run)


def manifest(folder: Path) -> dict[str, str]:
    """The sha256 of every file but the manifest, by name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(folder)): _sha256(file) for file in files}


def _prune(run: Run) -> None:
    """Drop all but the last `keep_checkpoints` and the best."""
    assert run.settings.out is not None
    found = [folder for folder in folders(run.settings.out) if _epoch(folder) <= run.epoch]  # later ones are broken
    best = max(found, key=lambda folder: (merit(folder, run.history, getattr(run.problem, "beta", 0.0)), folder))
    for folder in found[run.settings.keep_checkpoints :]:
        if folder != best:
            _drop(folder)


def merit(folder: Path, history: Sequence[dict[str, Any]], beta: float) -> float:
    """Reward less what its KL cost, beta KL, in the epoch that the checkpoint ended."""
    epoch = _epoch(folder)
    metrics = history[epoch - 1] if 0 < epoch <= len(history) else {}
    beta = metrics.get("beta", beta)
    return float(metrics.get("reward", -torch.inf)) - beta * metrics.get("kl", 0.0)


def _epoch(folder: Path) -> int:
    return int(folder.name.removeprefix("epoch-"))


def _drop(folder: Path) -> None:
    """Its name goes first, so that what is left of it, if this is broken off, is no checkpoint."""
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """To the disk, a folder's list of names included."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    found: list[Path | Exception | None] = [None]
    if run.accelerator.is_main_process:
        try:
            found = [newest(run.settings.out)]
        except Exception as wrong:
            found = [wrong]
    (folder,) = broadcast_object_list(found)
    if isinstance(folder, Exception):
        raise folder
    if folder is not None:
        _load(run, folder)
    _truncate(run)


def _load(run: Run, folder: Path) -> None:
    progress, here = json.loads((folder / PROGRESS).read_text()), _must_agree(run)
    there = progress["must_agree"]
    for name in ("format", *here):
        if there.get(name) != here[name]:
            raise ValueError(
                f"{folder} was written with {name} = {there.get(name)}, this run has {here[name]}: resume with the "
                f"same, or start in another folder"
            )
    states = folder / f"random_states_{run.replay.rank}.pkl"
    try:
        tensors_and_numbers(states)  # accelerate would go on without them
        run.accelerator.load_state(str(folder), strict=False)  # frozen weights are not in it
    except (UnpicklingError, RuntimeError, EOFError) as wrong:
        raise ValueError(f"{folder} cannot be loaded: {wrong}") from wrong
    run.epoch = run.kept = progress["epoch"]
    run.counts, run.strikes = progress["counts"], progress["strikes"]
    stored = load_file(folder / f"replay-{run.replay.rank}.safetensors")
    slots = 1 + max((int(name.partition(".")[0]) for name in stored), default=-1)
    run.replay.batches = [
        Batch.of({n.partition(".")[2]: v for n, v in stored.items() if n.startswith(f"{i}.")}) for i in range(slots)
    ]
    run.replay.place(run.accelerator.device)
    if run.ema is not None:
        run.ema.load_state_dict(load_file(folder / "ema.safetensors"), strict=False)


def _must_agree(run: Run) -> dict[str, Any]:
    """What an interrupted run and the one that goes on must have in common."""
    s = run.settings
    return {
        "format": FORMAT, "processes": run.replay.world, "samples": s.samples, "steps": s.steps, "seed": s.seed,
        "ema": s.ema, "algorithm": type(run.algorithm).__name__, "learners": sorted(run.learners),
        "shapes": {name: _shapes(learner.model) for name, learner in run.learners.items()},
        **run.fixed,
    }  # fmt: skip


def _shapes(model: nn.Module) -> str:
    """A digest of the names, shapes and dtypes of a model's tensors, and of which of them are written."""
    moving = _moving(model)
    text = json.dumps([(name, list(v.shape), str(v.dtype), name in moving) for name, v in model.state_dict().items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fixed(run: Run) -> dict[str, str]:
    """Digests of the weights that no checkpoint holds, by the words for them in messages."""
    frozen = {
        f"frozen weights of {name}": _digest({n: p for n, p in learner.model.named_parameters() if not p.requires_grad})
        for name, learner in run.learners.items()
    }
    return {"reference": identity(getattr(run.problem, "reference", None)), **frozen}


def moving(run: Run) -> dict[str, str]:
    """Digests of the weights that a checkpoint holds, likewise."""
    return {f"weights of {name}": _digest(_moving(learner.model)) for name, learner in run.learners.items()}


def identity(model: Any) -> str:
    """A digest of what a model holds and is not trained, wherever it lies; of anything else, its type."""
    if not isinstance(model, nn.Module):
        return type(model).__name__
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    offloaded = any(has_offloaded_params(module) for module in model.modules())
    held = get_state_dict_offloaded_model(model) if offloaded else model.state_dict()
    return _digest({name: v for name, v in held.items() if name not in trained})


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of tensors, bit by bit, and their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _truncate(run: Run) -> None:
    """Take the metrics of the epochs that are kept, a line each, and drop what a run wrote after its last checkpoint
    (of which the last line may be torn)."""
    assert run.settings.out is not None
    file = run.settings.out / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)[: run.epoch] if file.exists() else []
    try:
        run.history = [json.loads(line) for line in lines]
    except ValueError as wrong:
        raise ValueError(f"{file} is no longer what was written: {wrong}. Begin in another folder") from wrong
    if [metrics.get("epoch") for metrics in run.history] != list(range(1, run.epoch + 1)):
        raise ValueError(
            f"{file} has lost lines: a checkpoint of epoch {run.epoch} goes with as many. Begin in another folder"
        )
    run.accelerator.wait_for_everyone()  # everyone has read it
    if run.accelerator.is_main_process and file.exists():
        part = file.with_suffix(".part")
        part.write_text("".join(lines))
        os.replace(part, file)
    run.accelerator.wait_for_everyone()
