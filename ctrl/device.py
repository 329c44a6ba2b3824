"""The device of a run: accelerate's choice, but the CPU where that would be Apple's MPS."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import is_mps_available


def make_accelerator(**options: Any) -> Accelerator:
    """Accelerator(**options), on the CPU in place of MPS, which has no float64; that is printed."""
    avoid = is_mps_available() and not PartialState._shared_state  # accelerate keeps one device per process
    accelerator = Accelerator(cpu=avoid, **options)
    if avoid:
        accelerator.print("device: cpu, since MPS has no float64")
    return accelerator


def check_device(accelerator: Accelerator) -> None:
    """Raise on MPS: times and noise are computed in float64."""
    if accelerator.device.type == "mps":
        raise ValueError(
            "accelerator must not be on MPS, which has no float64: make it with Accelerator(cpu=True), before any other"
        )
