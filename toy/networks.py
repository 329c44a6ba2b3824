"""Small networks for low-dimensional problems: a policy around the reference, and the F of a critic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ctrl.problem import Problem, ScoreAsAction


class Perceptron(nn.Module):
    """Two hidden layers on features of (t, x): the state, the guess of where it ends, and the time in several forms.
    The last layer starts at zero."""

    def __init__(self, problem: Problem, outputs: int, hidden: int = 64) -> None:
        super().__init__()
        self.problem = problem
        diffusion = isinstance(problem, ScoreAsAction)
        width = math.prod(problem.shape) * (2 if diffusion else 1) + (4 if diffusion else 3)
        last = nn.Linear(hidden, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), last)

    def forward(self, t: Tensor, x: Tensor, guess: Tensor) -> Tensor:
        u = math.pi * t / self.problem.horizon
        columns = [u / math.pi, torch.sin(u), torch.cos(u)]
        features = [x]
        if isinstance(self.problem, ScoreAsAction):
            columns.append(self.problem.noising.log_snr(self.problem.s(t)) / 8)
            features.append(guess)
        return self.layers(torch.cat([*features, torch.stack(columns, 1).to(x.dtype)], 1))


class Policy(nn.Module):
    """a = a_ref(t, x) + network: the reference itself before training."""

    def __init__(self, problem: Problem, hidden: int = 64) -> None:
        super().__init__()
        self.problem = problem
        actions = problem.control(torch.zeros(1)).adjoint(torch.zeros(1, *problem.shape)).shape[1]
        self.network = Perceptron(problem, actions, hidden)

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        a_ref = self.problem.reference(t, x, cond)
        guess = self.problem.x0hat(t, x, a_ref) if isinstance(self.problem, ScoreAsAction) else x
        return a_ref + self.network(t, x, guess)


class Value(nn.Module):
    """F(t, x, x0hat, cond), (B,), for a critic."""

    def __init__(self, problem: Problem, hidden: int = 64) -> None:
        super().__init__()
        self.network = Perceptron(problem, 1, hidden)

    def forward(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any = None) -> Tensor:
        return self.network(t, x, x0hat)[:, 0]
