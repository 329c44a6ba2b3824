"""What a run counts and measures."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Metrics:
    """Of all processes.

    Attributes:
        counts: of the whole run. A network call is policy, reference or critic at one state, with what it calls itself,
            and with its gradient where that is taken; what a run does to check itself is not counted.
        history: the metrics of every epoch.
    """

    def __init__(self, samples: int, accelerator: Accelerator) -> None:
        self.samples, self.accelerator = samples, accelerator
        self.counts = {"trajectories": 0, "network_calls": 0, "reward_calls": 0}
        self.history: list[dict[str, Any]] = []
        self._logged: dict[str, list[Tensor]] = {}

    def begin(self) -> None:
        """A new epoch."""
        self._logged = {}

    def count(self, name: str, n: int) -> None:
        """n more, over all processes."""
        self.counts[name] = self.counts.get(name, 0) + n

    def count_here(self, name: str, n: int) -> None:
        """n more on this process."""
        self.count(name, int(self.accelerator.reduce(torch.tensor(n, device=self.accelerator.device))))

    def mean(self, v: Tensor, samples: int | None = None) -> Tensor:
        """The mean of v, (..., B), over the samples of all processes, (...); `samples` of them, if not an epoch's."""
        return self.accelerator.reduce(v.sum(-1)) / (samples or self.samples)

    def log(self, name: str, value: Tensor | float) -> None:
        """A metric of this epoch: (B,) is averaged over samples, () is taken as it is; repeated ones are averaged. None
        is read from the device before the epoch ends."""
        value = torch.as_tensor(value).detach().to(self.accelerator.device, non_blocking=True, copy=True)
        self._logged.setdefault(name, []).append(self.mean(value) if value.ndim else value)

    def log_spread(self, name: str, v: Tensor) -> None:
        """The standard deviation of v, (..., B), over samples; over several the root of the mean square."""
        off_centre = v - self.mean(v)[:, None]
        self.log(name, self.mean(off_centre.square()).mean().sqrt())

    def summary(self) -> dict[str, float]:
        """The metrics of this epoch so far."""
        read = {name: torch.stack(values).tolist() for name, values in self._logged.items()}
        return {name: sum(values) / len(values) for name, values in read.items()}
