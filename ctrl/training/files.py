"""The folders of checkpoints: which there are, whether they are whole, and how they come and go.

A checkpoint has a manifest with the sha256 of its files. It is written beside its final place, brought to disk and
renamed, so a run that is killed leaves none of that name that is not whole; what happens to one later, its manifest
shows, and then the one before it serves.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        if sha256(file) != digest:
            return f"{name} is not what was written"
    return None if PROGRESS in digests else f"{MANIFEST} is not of a checkpoint"


def manifest(folder: Path) -> dict[str, str]:
    """The sha256 of every file but the manifest, by name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {str(file.relative_to(folder)): sha256(file) for file in files}


def seal(part: Path, final: Path) -> None:
    """Everything on disk, then its name."""
    (part / MANIFEST).write_text(json.dumps(manifest(part), indent=1))
    for file in (*part.rglob("*"), part):
        sync(file)
    if final.exists():  # one that was passed over
        drop(final)
    os.replace(part, final)
    sync(final.parent)


def prune(out: Path, epoch: int, keep: int, history: Sequence[dict[str, Any]], beta: float) -> None:
    """Drop all but the last `keep` and the best; later ones than `epoch` are broken."""
    found = [folder for folder in folders(out) if epoch_of(folder) <= epoch]
    best = max(found, key=lambda folder: (merit(folder, history, beta), folder))
    for folder in found[keep:]:
        if folder != best:
            drop(folder)


def merit(folder: Path, history: Sequence[dict[str, Any]], beta: float) -> float:
    """Reward less what its KL cost, beta KL, in the epoch that the checkpoint ended."""
    epoch = epoch_of(folder)
    metrics = history[epoch - 1] if 0 < epoch <= len(history) else {}
    beta = metrics.get("beta", beta)
    return float(metrics.get("reward", -torch.inf)) - beta * metrics.get("kl", 0.0)


def epoch_of(folder: Path) -> int:
    return int(folder.name.removeprefix("epoch-"))


def drop(folder: Path) -> None:
    """Its name goes first, so that what is left of it, if this is broken off, is no checkpoint."""
    old = folder.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(folder, old)
    shutil.rmtree(old)


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync(path: Path) -> None:
    """To the disk, a folder's list of names included."""
    if not path.exists():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(tensors: dict[str, Tensor]) -> str:
    """Of tensors, bit by bit, and their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same, in one block each, and a copy of each that shares memory with one before: the file format has no two
    names for one."""
    seen: set[int] = set()
    found = {}
    for name, v in tensors.items():
        block = v.contiguous()
        at = block.untyped_storage().data_ptr()
        found[name] = block.clone() if at in seen else block
        seen.add(at)
    return found
