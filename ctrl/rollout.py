"""Simulate a policy: problem + policy + grid + solver + noise -> Trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ctrl.gaussian import Gaussian, GaussianPolicy, Mean
from ctrl.grids import node_weights
from ctrl.linop import Scalar
from ctrl.noise import ACTION, Noise
from ctrl.problem import Problem
from ctrl.solvers import Act, EulerMaruyama, Exact, Solver, held

_EULER = EulerMaruyama()


@dataclass(frozen=True)
class Trajectory:
    """What a rollout leaves. N steps, B samples.

    Attributes:
        t: times, (N+1,).
        x: states, (N+1, B, *D).
        a: the actions taken at t_0 ... t_{N-1}, (N, B, *D); None where the solver did not record them.
        xi: standardised increments of the driving path, (N, B, *D); None where there are none.
        w: quadrature weights of each step's left and right node, (2, N).
        ids: global sample ids, (B,).
        cond: the condition, opaque.
        reward: r(X_T), (B,); None until it is asked for, since it may be costly.
    """

    t: Tensor
    x: Tensor
    a: Tensor | None
    xi: Tensor | None
    w: Tensor
    ids: Tensor
    cond: Any = None
    reward: Tensor | None = None

    def flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Time, state and sample id at every node, node by node: ((N+1) B,), ((N+1) B, *D), ((N+1) B,)."""
        nodes, batch = self.x.shape[:2]
        t = self.t.to(torch.promote_types(self.x.dtype, torch.float32)).repeat_interleave(batch)
        return t, self.x.flatten(0, 1), self.ids.repeat(nodes)

    def integrate(self, h: Callable[[Tensor, Tensor, Any], Tensor]) -> Tensor:
        """sum_k w_k h(t_k, x_k, cond) ~ integral of h dt along each sample, (B,); nodes of weight zero are not
        visited."""
        total = self.x.new_zeros(len(self.ids))
        for w, t, x in zip(node_weights(self.w).tolist(), self._batch_times(), self.x, strict=True):
            if w:
                total = total + w * self._at(h, t, x)
        return total

    def at_nodes(self, h: Callable[[Tensor, Tensor, Any], Tensor]) -> Tensor:
        """h(t, x, cond) at every node, (N+1, B)."""
        return torch.stack([self._at(h, t, x) for t, x in zip(self._batch_times(), self.x, strict=True)])

    def _at(self, h: Callable[[Tensor, Tensor, Any], Tensor], t: Tensor, x: Tensor) -> Tensor:
        value = h(t, x, self.cond)
        if value.shape != (len(x),):
            raise ValueError(f"h must return one number a sample, shape {(len(x),)}, got {tuple(value.shape)}")
        return value

    def _batch_times(self) -> Sequence[Tensor]:
        return batch_times(self.t, self.x.dtype, len(self.ids))


def concatenate(parts: Sequence[Trajectory]) -> Trajectory:
    """Trajectories on one grid, without conditions, as one."""
    if len(parts) == 1:
        return parts[0]

    def join(name: str, dim: int) -> Tensor | None:
        values = [getattr(p, name) for p in parts]
        return None if values[0] is None else torch.cat(values, dim)

    x, ids = torch.cat([p.x for p in parts], 1), torch.cat([p.ids for p in parts])
    return Trajectory(parts[0].t, x, join("a", 1), join("xi", 1), parts[0].w, ids, None, join("reward", 0))


def batch_time(t: Tensor, dtype: torch.dtype, batch: int) -> Tensor:
    """A time, (), as a network sees it, (B,): in the states' precision, but never below float32."""
    return t.to(torch.promote_types(dtype, torch.float32)).expand(batch)


def batch_times(t: Tensor, dtype: torch.dtype, batch: int) -> Sequence[Tensor]:
    """The same of each."""
    return [batch_time(u, dtype, batch) for u in t.unbind()]


def rollout(
    problem: Problem,
    policy: Mean | GaussianPolicy,
    times: Tensor,
    noise: Noise,
    ids: Tensor,
    *,
    solver: Solver = _EULER,
    cond: Any = None,
    start: Tensor | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
) -> Trajectory:
    """Simulate dX = [b0 + B a] dt + S dW from t_0 to t_N under a policy.

    Args:
        policy: a = policy(t, x, cond); a `GaussianPolicy` explores: each action is drawn and held over its step.
        times: (N+1,) strictly increasing in [0, T]; see `ctrl.grids`.
        noise, ids: the randomness, and which samples of it, (B,) int64; ids.device is where the rollout runs.
        solver: one of `ctrl.solvers`.
        start: X at t_0, (B, *D); at t_0 = 0 drawn from the problem's initial law by default.
        dtype: of the states; torch's default dtype by default.
        differentiable: keep the graph through the whole path.
    """
    problem.check_times(times)
    if start is None and float(times[0]) > 0:
        raise ValueError(f"start must be given: times begin at {float(times[0])}, the initial law holds at t = 0")
    dtype = dtype or (start.dtype if start is not None else torch.get_default_dtype())
    x = (problem.initial(noise, ids, cond) if start is None else start).to(dtype)
    if x.shape != (len(ids), *problem.shape):
        raise ValueError(f"start must have shape {(len(ids), *problem.shape)}, got {tuple(x.shape)}")
    if isinstance(policy, GaussianPolicy) and isinstance(solver, Exact):
        raise ValueError("solver Exact has its action built in and cannot explore: give it the policy's mean")
    with torch.set_grad_enabled(differentiable):
        trajectory = _simulate(problem, policy, times.to(x.device, torch.float64), noise, ids, solver, cond, x)
    check_finite(trajectory)
    return trajectory


def _simulate(
    problem: Problem,
    policy: Mean | GaussianPolicy,
    times: Tensor,
    noise: Noise,
    ids: Tensor,
    solver: Solver,
    cond: Any,
    x: Tensor,
) -> Trajectory:
    mean = policy.mean if isinstance(policy, GaussianPolicy) else policy

    def act(t: Tensor, x: Tensor) -> Tensor:
        return mean(batch_time(t, x.dtype, len(ids)), x, cond).to(x.dtype)

    plan, memory, seen = solver.plan(problem, times), None, batch_times(times, x.dtype, len(ids))
    states, actions, xi = _Record(len(plan) + 1), _Record(len(plan)), x.new_empty(len(plan), *x.shape)
    states.add(x)
    for k, draw in enumerate(noise.path(ids, problem.shape, times, problem.clock)):
        a = mean(seen[k], x, cond).to(x.dtype)
        stage: Act = act
        if k == 0:
            _check_action(problem, times[0], x, a)
        if isinstance(policy, GaussianPolicy):
            normal = noise.normal(ids, a.shape[1:], ACTION, k).to(a)
            a = Gaussian(a, policy.root(times[k])).sample(normal)
            stage = held(a)
        carried = solver.carry(plan[k], x, a)
        x, memory = solver.step(problem, plan[k], x, a, xi[k].copy_(draw), stage, memory), carried
        states.add(x)
        actions.add(a)
    return Trajectory(times, states.stack(), actions.stack(), xi, solver.quadrature(problem, times), ids, cond)


class _Record:
    """n tensors stacked: written into one block as they come, or kept as they are where autograd must see them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.kept: list[Tensor] = []

    def add(self, v: Tensor) -> None:
        if not torch.is_grad_enabled():
            if not self.kept:
                self.block = v.new_empty(self.n, *v.shape)
            v = self.block[len(self.kept)].copy_(v)
        self.kept.append(v)

    def stack(self) -> Tensor:
        return torch.stack(self.kept) if torch.is_grad_enabled() else self.block


def _check_action(problem: Problem, t: Tensor, x: Tensor, a: Tensor) -> None:
    """A policy of the wrong shape would broadcast, not fail."""
    expected = x.shape if isinstance(problem.control(t), Scalar) else (len(x), *a.shape[1:])
    if a.ndim != x.ndim or a.shape != expected:
        raise ValueError(f"policy must return actions of shape {tuple(expected)}, got {tuple(a.shape)}")


class NotFinite(ValueError):
    """A state, a reward, a loss or a gradient is infinite or not a number. `tensors` are
    what to look at."""

    def __init__(self, message: str, **tensors: Tensor) -> None:
        super().__init__(message)
        self.tensors = tensors


def check_finite(trajectory: Trajectory) -> None:
    """Raise at the first state that is not finite, naming step, time and sample."""
    if bool(torch.isfinite(trajectory.x[-1]).all()):
        return
    bad = (~torch.isfinite(trajectory.x)).flatten(2).any(2)
    step, sample = (int(i) for i in bad.nonzero()[0])
    raise NotFinite(
        f"state x is not finite at step {step} (t = {float(trajectory.t[step]):.6g}), sample id "
        f"{int(trajectory.ids[sample])}: look at the policy's output there, or take more steps",
        t=trajectory.t, x=trajectory.x[:, sample], ids=trajectory.ids[sample : sample + 1],
    )  # fmt: skip


def with_reward(path: Trajectory, reward: Tensor) -> Trajectory:
    """The trajectory with its reward, (B,), checked."""
    shape = tuple(reward.shape) if torch.is_tensor(reward) else type(reward).__name__
    if shape != path.ids.shape:
        raise ValueError(
            f"reward must return one number a sample, a tensor of shape {tuple(path.ids.shape)}, got {shape}"
        )
    reward = reward.detach().to(path.x)
    bad = ~torch.isfinite(reward)
    if bool(bad.any()):
        raise NotFinite(
            f"reward is not finite for sample id {int(path.ids[bad][0])}: it must be a number for every x",
            x=path.x[-1][bad], ids=path.ids[bad], reward=reward[bad],
        )  # fmt: skip
    return replace(path, reward=reward)
