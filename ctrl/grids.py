"""Time grids on [0, T], and quadratures, so that every time integral carries its weight.

integral of h dt over the grid ~ sum_k w_k h(t_k), w: (N+1,). An estimator is no better than the worse of its solver
and its
quadrature: Euler with a left sum is first order, Heun with a trapezoid second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrl.problem import Problem, ScoreAsAction


def uniform(problem: Problem, steps: int) -> Tensor:
    """N + 1 times uniform in t, float64."""
    _check_steps(steps)
    return torch.linspace(0.0, problem.horizon, steps + 1, dtype=torch.float64)


def log_snr(problem: ScoreAsAction, steps: int) -> Tensor:
    """N + 1 times uniform in lambda, float64; lambda must be finite at s_min."""
    _check_steps(steps)
    ends = torch.tensor([problem.s_max, problem.s_min], dtype=torch.float64)
    first, last = problem.noising.log_snr(ends).tolist()
    if not abs(last) < float("inf"):
        raise ValueError(f"s_min = {problem.s_min} has infinite log-SNR; a log-SNR grid needs s_min > 0")
    s = problem.noising.s_of_log_snr(torch.linspace(first, last, steps + 1, dtype=torch.float64))
    times = problem.s_max - s
    times[0], times[-1] = 0.0, problem.horizon
    return times


def natural(problem: Problem, steps: int) -> Tensor:
    """A quarter of the way from uniform in t to uniform in lambda, node by node, for score as action; else uniform."""
    if not isinstance(problem, ScoreAsAction):
        return uniform(problem, steps)
    return torch.lerp(uniform(problem, steps), log_snr(problem, steps), 0.25)


def jitter(times: Tensor, shift: Tensor) -> Tensor:
    """Move each interior node by `shift`, (N-1,) in (-½, ½), of the step on the side it moves to; the ends stay."""
    if shift.shape != (len(times) - 2,) or not bool((shift.abs() < 0.5).all()):
        raise ValueError(f"shift must hold {len(times) - 2} numbers in (-1/2, 1/2)")
    step = times.diff()
    moved = times.clone()
    moved[1:-1] += shift * torch.where(shift > 0, step[1:], step[:-1])
    return moved


def left(problem: Problem, times: Tensor) -> Tensor:
    """Left Riemann sum: order 1."""
    step = times.diff()
    return torch.stack([step, torch.zeros_like(step)])


def trapezoid(problem: Problem, times: Tensor) -> Tensor:
    """Trapezoid in t: order 2."""
    step = times.diff() / 2
    return torch.stack([step, step])


def clock_trapezoid(problem: Problem, times: Tensor) -> Tensor:
    """Trapezoid in the noise's clock: integral of (h/rate) d clock. Order 2, and exact for h proportional to the
    rate."""
    step, rate = problem.clock(times).diff() / 2, problem.rate(times)
    return torch.stack([step / rate[:-1], step / rate[1:]])


def node_weights(w: Tensor) -> Tensor:
    """The weight of each node, (N+1,), from those of the steps, (2, N)."""
    zero = w.new_zeros(1)
    return torch.cat([w[0], zero]) + torch.cat([zero, w[1]])


def _check_steps(steps: int) -> None:
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
