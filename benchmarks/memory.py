"""The most memory that a piece of work holds at a time."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def mebibytes(work: Callable[[], object], before: float | None = None) -> float | None:
    """Beyond what was `held` before it began, or at another time; None where it cannot be known."""
    now = held()
    before = now if before is None else before
    known = _begin_anew()
    work()
    if before is None or not known:
        return None
    return (torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmHWM")) - before


def _begin_anew() -> bool:
    """The peak so far is forgotten, where that is possible."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def held() -> float | None:
    """Now: on the accelerator if there is one, else in this process; None where it cannot be known."""
    gc.collect()
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    _give_back_free_memory()
    return _status("VmRSS") if sys.platform.startswith("linux") else None


def _give_back_free_memory() -> None:
    """The allocator keeps what was freed, resident: what is taken from there would not be seen to grow."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


def _status(name: str) -> float:
    """Of this process, from its line in /proc, which has KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024
