"""How the time and the memory of an epoch grow, for `benchmarks/throughput.py`.

On the embedded Stable Diffusion, by adjoint matching: with the batch (pictures an epoch, drawn at a time), with the
steps, with the nodes of an update, with the width of the UNet and with the number of processes; on random mixtures by
the actor-critic: with the dimension. Every point with pictures is a process of its own, so that its memory is its own;
every time the median of five epochs. The exponents are those of a straight line through the logarithms.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tqdm import tqdm

from benchmarks.report import Row, number
from benchmarks.speed.peer import Work, started
from benchmarks.speed.race import ADJOINT
from benchmarks.speed.timing import ratio, seconds
from ctrl import NetworkCritic
from ctrl.algorithms import ActorCritic
from ctrl.fit import Run, Settings
from scale import finetune, models
from toy import catalogue
from toy.networks import Policy, Value

EPOCHS = 6
"""The first of them warms up."""
SWEEPS: dict[str, Sequence[int]] = {
    "batch": (8, 16, 32, 64), "steps": (5, 10, 20, 40), "nodes": (16, 32, 64, 128, 256), "width": (1, 2, 3),
    "processes": (1, 2), "dimension": (2, 8, 32, 128),
}  # fmt: skip
BARS = {("steps", "seconds"): 1.1, ("nodes", "seconds"): 1.1, ("batch", "mebibytes"): 1.1, ("steps", "mebibytes"): 0.25}
"""Linear in steps and nodes at most. Memory must not grow with the steps as activations would: states do, and they are
few."""


def scaling(quick: bool) -> list[Row]:
    """A row a point, and one an exponent."""
    rows: list[Row] = []
    sweeps = {name: at[:2] if quick else at for name, at in SWEEPS.items()}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=sum(map(len, sweeps.values())), desc="scaling") as bar:
        for name, values in sweeps.items():
            for at in values:
                found = dimension(at) if name == "dimension" else pictures(name, at, Path(folder))
                rows.append({"panel": "scaling", "case": name, "at": at, **found})
                bar.update()
    return rows + list(exponents(rows))


def pictures(name: str, at: int, folder: Path) -> Row:
    """Seconds and MiB of an epoch with one thing changed."""
    usual = {"batch": 16, "steps": 10, "nodes": 32}
    batch, steps, nodes = (at if name == what else value for what, value in usual.items())
    own: dict[str, Any] = ADJOINT | {"options": [f"nodes={nodes}", "updates=1"], "micro_batch": 16}
    if name == "width":
        own["model"] = str(wider(at, folder / str(at)))
    work, world = Work(samples=batch, batch=batch, steps=steps, own=own), at if name == "processes" else 1
    with ExitStack() as stack:
        asks = [stack.enter_context(started("ours", work, env=of_many(rank, world))) for rank in range(world)]
        epochs = []
        for _ in range(EPOCHS):
            for ask in asks:
                ask.send("epoch")
            answers = [ask.receive() for ask in asks]
            epochs.append(answers[0])
    measured = [name for name in ("seconds", "mebibytes") if epochs[0][name] is not None]
    return {name: median(number(e, name) for e in epochs[1:]) for name in measured}


def of_many(rank: int, world: int) -> dict[str, str]:
    """The environment of one process of some, as torchrun has it."""
    return {
        "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "RANK": str(rank),
        "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(29500 + os.getpid() % 1000),
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def wider(factor: int, folder: Path) -> Path:
    """The embedded pipeline with a UNet of `factor` times as many channels, untrained."""
    pipeline = models.load(str(finetune.Settings.embedded.with_suffix("")))
    config = dict(pipeline.unet.config)
    config["block_out_channels"] = tuple(factor * c for c in config["block_out_channels"])
    pipeline.unet = UNet2DConditionModel.from_config(config)
    pipeline.save_pretrained(folder)
    return folder


def dimension(d: int) -> Row:
    """Seconds of an epoch on a random mixture."""
    entry = catalogue.random_mixture(0, d)
    torch.manual_seed(0)
    critic = NetworkCritic(entry.problem, Value(entry.problem))
    settings = Settings(epochs=10**6, progress=False)
    run = Run(entry.problem, Policy(entry.problem), ActorCritic(keep=1), critic, None, settings, Accelerator(cpu=True))
    return {"seconds": median([seconds(run.step_epoch) for _ in range(EPOCHS)][1:])}


def exponents(rows: Sequence[Row]) -> Iterator[Row]:
    """p in seconds ~ at^p, and in memory; the whole of an epoch has parts that do not grow, so that p may be less."""
    for name in dict.fromkeys(str(row["case"]) for row in rows):
        points = [row for row in rows if row["case"] == name]
        for what in ("seconds", "mebibytes"):
            if any(row.get(what) is None for row in points):
                continue
            at, found = (np.log([number(row, column) for row in points]) for column in ("at", what))
            p = float(np.polyfit(at, found, 1)[0])
            yield {"panel": "exponents", "case": f"{what} against {name}", **ratio([p], BARS.get((name, what)))}
