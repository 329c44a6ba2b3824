"""The device of a run: accelerate's choice, but the CPU where that would be Apple's MPS."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import is_mps_available, parse_flag_from_env

NO_FP16 = "precision fp16 is not supported on the CPU, where accelerate would train in float32: pass bf16 or no"


def make_accelerator(**options: Any) -> Accelerator:
    """Accelerator(**options), on the CPU in place of MPS, which has no float64; that is printed."""
    avoid = is_mps_available() and not PartialState._shared_state  # accelerate keeps one device per process
    accelerator = Accelerator(cpu=avoid, **options)
    if avoid:
        accelerator.print("device: cpu, since MPS has no float64")
    return accelerator


def is_cpu() -> bool:
    """Whether `make_accelerator` will choose the CPU."""
    asked = parse_flag_from_env("ACCELERATE_USE_CPU")
    return asked or is_mps_available() or not torch.accelerator.is_available()


def check_device(accelerator: Accelerator) -> None:
    """Raise on MPS, since times and noise are computed in float64; and where there is no autocast to fp16."""
    if accelerator.device.type == "mps":
        raise ValueError(
            "accelerator must not be on MPS, which has no float64: make it with Accelerator(cpu=True), before any other"
        )
    if accelerator.mixed_precision == "fp16" and not accelerator.native_amp:
        raise ValueError(NO_FP16)
