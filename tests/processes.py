"""Several processes of one run: a test file starts itself once for each, and joins them to a group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


@contextmanager
def several(world: int, file: str, *arguments: object) -> Iterator[None]:
    """Processes that run `file ARGUMENTS... RANK WORLD`, beside the block; all have ended well after it."""
    shared = {
        "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, file, *map(str, arguments), str(rank), str(world)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    yield
    assert [process.wait(timeout=600) for process in processes] == [0] * world


@contextmanager
def member(folder: str | Path, rank: int, world: int) -> Iterator[None]:
    """In one of them: the group, which meets in a file of the folder."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    yield
    if torch.distributed.is_initialized():  # a command that ends its training ends the group
        torch.distributed.destroy_process_group()
