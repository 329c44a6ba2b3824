"""Small networks for low-dimensional problems: a policy around the reference, and the F of a critic."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ctrl.problem import Problem, ScoreAsAction


class Perceptron(nn.Module):
    """Two hidden layers on features of (t, x): the state, the guess of where it ends, the time in several forms, and
    which of `classes` the condition says.

    The last layer starts at zero; the others by He et al. (2015, arXiv 1502.01852), sqrt(6) above PyTorch's own start,
    so that they bend within the data from the first update on."""

    def __init__(self, problem: Problem, outputs: int, hidden: int = 64, classes: int = 0) -> None:
        super().__init__()
        self.problem, self.classes = problem, classes
        diffusion = isinstance(problem, ScoreAsAction)
        width = math.prod(problem.shape) * (2 if diffusion else 1) + (4 if diffusion else 3) + classes
        last = nn.Linear(hidden, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
        for layer in (first, second):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        self.layers = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)

    def forward(self, t: Tensor, x: Tensor, guess: Tensor, cond: Any = None) -> Tensor:
        u = math.pi * t / self.problem.horizon
        columns = [u / math.pi, torch.sin(u), torch.cos(u)]
        features = [x]
        if isinstance(self.problem, ScoreAsAction):
            columns.append(self.problem.noising.log_snr(self.problem.s(t)) / 8)
            features.append(guess)
        if self.classes:
            features.append(nn.functional.one_hot(cond, self.classes).to(x.dtype))
        return self.layers(torch.cat([*features, torch.stack(columns, 1).to(x.dtype)], 1))


class Policy(nn.Module):
    """a = a_ref(t, x) + network: the reference itself before training."""

    def __init__(self, problem: Problem, hidden: int = 64, classes: int = 0) -> None:
        super().__init__()
        self.problem = problem
        actions = problem.control(torch.zeros(1)).adjoint(torch.zeros(1, *problem.shape)).shape[1]
        self.network = Perceptron(problem, actions, hidden, classes)

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        a_ref = self.problem.reference(t, x, cond)
        guess = self.problem.endpoint(t, x, a_ref)
        return a_ref + self.network(t, x, guess, cond)


class Value(nn.Module):
    """F(t, x, x0hat, cond), (B,), for a critic."""

    def __init__(self, problem: Problem, hidden: int = 64, classes: int = 0) -> None:
        super().__init__()
        self.network = Perceptron(problem, 1, hidden, classes)

    def forward(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any = None) -> Tensor:
        return self.network(t, x, x0hat, cond)[:, 0]
