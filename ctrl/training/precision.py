"""What networks are evaluated in, and float32 for what rounding would drown.

Two bf16 networks round differently wherever their weights differ, however little: between a policy and its reference
that adds nats of path KL in proportion to the dimension, and guidance multiplies them. Below float32 a KL is therefore
measured along a few paths of an epoch, where the networks are evaluated once more, by `full`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ctrl.noise import GRID, Noise

FEW = 4
"""Paths an epoch, over all processes."""
_TF32: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
"""What CUDA may compute in tf32 where float32 is asked for. Of PyTorch's two switches the older turns the newer one
(`fp32_precision`) with it, and PyTorch raises where they disagree."""


def precision_of(accelerator: Accelerator) -> str:
    """bf16 or fp16 under autocast, by accelerate's names; tf32 where CUDA takes that for float32; or else no."""
    if accelerator.native_amp:
        return accelerator.mixed_precision
    rounds = accelerator.device.type == "cuda" and any(part.allow_tf32 for part in _TF32)
    return "tf32" if rounds else "no"


@contextmanager
def full(device: torch.device) -> Iterator[None]:
    """float32 as it is written: no autocast, no tf32."""
    before = [part.allow_tf32 for part in _TF32]
    try:
        for part in _TF32:
            part.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for part, kept in zip(_TF32, before, strict=True):
            part.allow_tf32 = kept


def few_of(samples: int, noise: Noise, few: int = FEW) -> Tensor:
    """`few` places among an epoch's samples, or all: drawn by the epoch alone, one of each residue class, so that the
    same ones are found on any number of processes, and on as many of them as there are."""
    first = torch.arange(min(few, samples))
    rows = (samples - first + few - 1) // few
    u = noise.uniform(torch.zeros(1, dtype=torch.int64), (len(first),), GRID, 2)[0]
    return first + few * (u * rows).long()
