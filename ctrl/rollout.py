"""Simulate a policy: problem + policy + grid + solver + noise -> Trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctrl.gaussian import Gaussian, Mean
from ctrl.linop import LinOp, Scalar
from ctrl.noise import ACTION, Noise
from ctrl.problem import Problem
from ctrl.solvers import Act, EulerMaruyama, Solver, held

_EULER = EulerMaruyama()


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves. N steps, B samples.

    Attributes:
        t: times, (N+1,).
        x: states, (N+1, B, *D).
        a: the actions taken at t_0 ... t_{N-1}, (N, B, *D); None where the solver did not record them.
        xi: standardised increments of the driving path, (N, B, *D); None where there are none.
        w: quadrature weights, (N+1,).
        ids: global sample ids, (B,).
        cond: the condition, opaque.
    """

    t: Tensor
    x: Tensor
    a: Tensor | None
    xi: Tensor | None
    w: Tensor
    ids: Tensor
    cond: Any = None

    def integrate(self, h: Tensor) -> Tensor:
        """sum_k w_k h_k ~ integral of h dt; h: (N+1, B) -> (B,)."""
        if h.shape != self.x.shape[:2]:
            raise ValueError(f"h must have shape (N+1, B) = {tuple(self.x.shape[:2])}, got {tuple(h.shape)}")
        return torch.tensordot(self.w.to(h), h, dims=1)

    def at_nodes(self, f: Callable[[Tensor, Tensor, Any], Tensor]) -> Tensor:
        """f(t, x, cond) at every node, stacked: (N+1, B, ...)."""
        batch = len(self.ids)
        return torch.stack([f(t.expand(batch).to(x.dtype), x, self.cond) for t, x in zip(self.t, self.x, strict=True)])


def rollout(
    problem: Problem,
    policy: Mean,
    times: Tensor,
    noise: Noise,
    ids: Tensor,
    *,
    solver: Solver = _EULER,
    cond: Any = None,
    spread: Callable[[Tensor], LinOp] | None = None,
    start: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Trajectory:
    """Simulate dX = [b0 + B a] dt + S dW from t_0 to t_N under a = policy(t, x, cond).

    Args:
        times: (N+1,) strictly increasing in [0, T]; see `ctrl.grids`.
        noise, ids: the randomness, and which samples of it, (B,) int64; ids.device is where the rollout runs.
        solver: one of `ctrl.solvers`.
        spread: exploration: each action is drawn from N(policy, L L') with L = spread(t) and held over its step.
        start: X_0, (B, *D); drawn from the problem's initial law by default.
        dtype: of the states; torch's default dtype by default.
    """
    problem.check_times(times)
    dtype = dtype or (start.dtype if start is not None else torch.get_default_dtype())
    x = (problem.initial(noise, ids, cond) if start is None else start).to(dtype)
    if x.shape != (len(ids), *problem.shape):
        raise ValueError(f"start must have shape {(len(ids), *problem.shape)}, got {tuple(x.shape)}")
    times = times.to(x.device, torch.float64)
    batch_times = times.to(dtype)[:, None].expand(-1, len(ids)).unbind()

    def act(t: Tensor, x: Tensor) -> Tensor:
        return policy(t.to(dtype).expand(len(ids)), x, cond)

    states, actions, memory = [x], [], None
    increments = x.new_empty(len(times) - 1, *x.shape)
    path = noise.path(ids, problem.shape, times, problem.clock)
    for k, (c, draw) in enumerate(zip(solver.plan(problem, times), path, strict=True)):
        xi = increments[k].copy_(draw)
        a = policy(batch_times[k], x, cond)
        if k == 0:
            _check_action(problem, times[0], x, a)
        stage: Act = act
        if spread is not None:
            a = Gaussian(a, spread(times[k])).sample(noise.normal(ids, a.shape[1:], ACTION, k).to(dtype))
            stage = held(a)
        x, memory = solver.step(problem, c, x, a, xi, stage, memory)
        states.append(x)
        actions.append(a)
    trajectory = Trajectory(
        t=times,
        x=torch.stack(states),
        a=torch.stack(actions),
        xi=increments,
        w=solver.quadrature(problem, times),
        ids=ids,
        cond=cond,
    )
    check_finite(trajectory)
    return trajectory


def _check_action(problem: Problem, t: Tensor, x: Tensor, a: Tensor) -> None:
    """A policy of the wrong shape would broadcast, not fail."""
    expected = x.shape if isinstance(problem.control(t), Scalar) else (len(x), *a.shape[1:])
    if a.ndim != x.ndim or a.shape != expected:
        raise ValueError(f"policy must return actions of shape {tuple(expected)}, got {tuple(a.shape)}")


def check_finite(trajectory: Trajectory) -> None:
    """Raise at the first state that is not finite, naming step, time and sample."""
    if bool(torch.isfinite(trajectory.x[-1]).all()):
        return
    bad = (~torch.isfinite(trajectory.x)).flatten(2).any(2)
    step, sample = (int(i) for i in bad.nonzero()[0])
    raise ValueError(
        f"state x is not finite at step {step} (t = {float(trajectory.t[step]):.6g}), sample id "
        f"{int(trajectory.ids[sample])}: look at the policy's output there, or take more steps"
    )
