"""How a run ends before its last epoch, and can go on: a signal, a time limit, or something that asked for it."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

TIME_UP = 128 + signal.SIGTERM
"""Exit status when the time limit came: that of a cluster's own signal."""


class RunFailed(RuntimeError):
    """Something outside of the run failed: a disk, a reward, another process. What was learned so far is kept."""


class Stopped(SystemExit):
    """A run that has a checkpoint and ended early; `code` is the exit status, 128 + signal where there was one."""


class Stops:
    """While this is entered, SIGTERM and SIGINT are heard: the first is remembered, so that the epoch can be finished
    and kept; a second one acts at once, as if nobody listened.

    Attributes:
        code: the exit status that was asked for, or 0.
        why: by what.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, max_hours: float | None, listen: bool) -> None:
        self.limit = None if max_hours is None else 3600 * max_hours
        self.listen = listen and threading.current_thread() is threading.main_thread()
        self.began = self.lap = time.monotonic()
        self.longest = 0.0
        self.code, self.why = 0, ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        if self.listen:
            self._before = {number: signal.signal(number, self._hear) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.ask(128 + number, signal.Signals(number).name)
        for n, handler in self._before.items():  # a shell's background job has SIGINT ignored: it was not, just now
            signal.signal(n, signal.SIG_DFL if handler == signal.SIG_IGN else handler)
        with suppress(OSError):  # nobody may be reading
            tqdm.write(f"{self.why}: the epoch is finished and kept, then the run ends; once more to end it at once")

    def ask(self, code: int, why: str) -> None:
        """End after this epoch. What asked first is what is said."""
        if not self.code:
            self.code, self.why = code, why

    def epoch_ends(self) -> None:
        """Ask for an end if another epoch, as long as the longest so far, would go over the time limit."""
        now = time.monotonic()
        self.longest, self.lap = max(self.longest, now - self.lap), now
        if self.limit is not None and now + self.longest > self.began + self.limit:
            self.ask(TIME_UP, "max_hours")
