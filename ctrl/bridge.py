"""Hand any problem and policy to torchsde, and take its solution back as a Trajectory.

torchsde (Li et al. 2020, arXiv 2001.01328) knows dY = f dt + g dW on (B, d). In the noise's clock S(t) dW = L dW~, so
with g = L and a Brownian motion read through the clock, torchsde's Euler sees the same increments as ours and agrees to
rounding; without the clock it takes S(t_k) dW, and agrees to its order.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torchsde
from torch import Tensor
from torchsde import BaseBrownian

from ctrl.gaussian import Mean
from ctrl.grids import trapezoid
from ctrl.linop import LinOp, Matrix
from ctrl.problem import Problem
from ctrl.rollout import Trajectory, check_finite
from ctrl.solvers import Act, Solver


class TorchSDE:
    """A problem under a policy, as torchsde sees it: f(t, y), g(t, y), noise_type, sde_type."""

    sde_type = "ito"

    def __init__(self, problem: Problem, policy: Mean, cond: Any = None, *, in_clock: bool = False) -> None:
        self.problem, self.policy, self.cond, self.in_clock = problem, policy, cond, in_clock
        self.noise_type = "additive" if isinstance(problem.root, Matrix) else "diagonal"

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """b0 + B a, (B, d)."""
        x = y.reshape(len(y), *self.problem.shape)
        a = self.policy(t.to(x.dtype).expand(len(x)), x, self.cond)
        return self.problem.velocity(t, x, a).flatten(1)

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """S(t), or L in the clock: (B, d) if diagonal, else (B, d, d)."""
        root: LinOp = self.problem.root if self.in_clock else self.problem.diffusion(t)
        if isinstance(root, Matrix):
            return root.m.to(y.dtype).expand(len(y), -1, -1)
        return root.apply(torch.ones_like(y))


class ClockedBrownian(BaseBrownian):
    """W~(clock(t_b)) - W~(clock(t_a)) for a Brownian motion W~ in the clock: what torchsde's solvers ask for as
    bm(t_a, t_b)."""

    levy_area_approximation = "none"

    def __init__(self, problem: Problem, inner: BaseBrownian) -> None:
        self.problem, self.inner = problem, inner

    def __call__(self, ta: Tensor, tb: Tensor | None = None, return_U: bool = False, return_A: bool = False) -> Tensor:
        if return_U or return_A:
            raise ValueError("a method that needs space-time Levy area cannot run in the clock: use in_clock=False")
        ta, tb = (torch.as_tensor(t, dtype=torch.float64) for t in (ta, tb))
        return self.inner(self.problem.clock(ta), self.problem.clock(tb))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def shape(self) -> torch.Size:
        return self.inner.shape


class RecordedBrownian(BaseBrownian):
    """A path known at its nodes (N+1,) only, by its increments (N, B, d); `RecordedBrownian.of` reads it off a
    rollout."""

    levy_area_approximation = "none"

    def __init__(self, nodes: Tensor, increments: Tensor) -> None:
        self.nodes, self.increments = nodes, increments

    @staticmethod
    def of(problem: Problem, trajectory: Trajectory) -> RecordedBrownian:
        """The path W~ that a rollout saw, in its clock."""
        if trajectory.xi is None:
            raise ValueError("trajectory has no recorded increments xi")
        nodes = problem.clock(trajectory.t)
        spread = nodes.diff().sqrt().to(trajectory.xi)
        return RecordedBrownian(nodes, trajectory.xi.flatten(2) * spread[:, None, None])

    def __call__(self, ta: Tensor, tb: Tensor | None = None, return_U: bool = False, return_A: bool = False) -> Tensor:
        k, m = (self._node(torch.as_tensor(t, dtype=torch.float64)) for t in (ta, tb))
        return self.increments[k:m].sum(0)

    def _node(self, tau: Tensor) -> int:
        distance = (self.nodes - tau).abs()
        k = int(distance.argmin())
        if float(distance[k]) > 1e-9 * float(self.nodes[-1]):
            raise ValueError(
                f"the recorded path is known at its {len(self.nodes)} nodes only; the solver asked for one between"
            )
        return k

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.increments)} steps)"

    @property
    def dtype(self) -> torch.dtype:
        return self.increments.dtype

    @property
    def device(self) -> torch.device:
        return self.increments.device

    @property
    def shape(self) -> torch.Size:
        return self.increments.shape[1:]


def sdeint(
    problem: Problem,
    policy: Mean,
    times: Tensor,
    start: Tensor,
    *,
    ids: Tensor | None = None,
    cond: Any = None,
    brownian: BaseBrownian | None = None,
    in_clock: bool = False,
    **options: Any,
) -> Trajectory:
    """torchsde.sdeint for the problem under the policy, returned as a Trajectory at the query times.

    Args:
        times: (N+1,) query times in [0, T]. The steps are torchsde's own (`dt`, `adaptive`, ...): the last time is one
            of them, and at the others torchsde interpolates linearly between its steps.
        start: X_0, (B, *D).
        brownian: the driving Brownian motion, (B, d), by default torchsde's own BrownianInterval; in its clock if
            `in_clock`.
        options: passed on to torchsde.sdeint: method, dt, adaptive, rtol, atol, dt_min, ...
    """
    problem.check_times(times)
    times = times.to(start.device, torch.float64)
    if in_clock:
        if brownian is None:
            span = problem.clock(times)
            brownian = torchsde.BrownianInterval(
                t0=float(span[0]),
                t1=float(span[-1]),
                size=(len(start), math.prod(problem.shape)),
                dtype=start.dtype,
                device=start.device,
            )
        brownian = ClockedBrownian(problem, brownian)
    sde = TorchSDE(problem, policy, cond, in_clock=in_clock)
    states = torchsde.sdeint(sde, start.flatten(1), times, bm=brownian, **options)
    trajectory = Trajectory(
        t=times,
        x=states.reshape(len(times), *start.shape),
        a=None,
        xi=None,
        w=trapezoid(problem, times),
        ids=torch.arange(len(start), device=start.device) if ids is None else ids,
        cond=cond,
    )
    check_finite(trajectory)
    return trajectory


@dataclass(frozen=True)
class AdaptiveEuler(Solver):
    """torchsde's Euler with its adaptive step size between two nodes, on a Brownian path that has the rollout's own
    increment. What it does inside is not known to anyone who sees the nodes."""

    tolerance: float = 1e-2

    def quadrature(self, problem: Problem, times: Tensor) -> Tensor:
        return trapezoid(problem, times)

    def plan(self, problem: Problem, times: Tensor) -> list[Tensor]:
        return list(times.unfold(0, 2, 1))

    def step(
        self, problem: Problem, c: Tensor, x: Tensor, a: Tensor, xi: Tensor, act: Act, memory: Tensor | None
    ) -> Tensor:
        start, end = problem.clock(c).tolist()
        seed = int(xi.double().sum().view(torch.int64)) & (2**62 - 1)  # what lies between is drawn by the increment
        path = torchsde.BrownianInterval(
            t0=start, t1=end, size=xi.flatten(1).shape, dtype=xi.dtype, device=xi.device, entropy=seed,
            W=(end - start) ** 0.5 * xi.flatten(1),
        )  # fmt: skip
        h = float(c[1] - c[0])
        options: dict[str, Any] = {"method": "euler", "adaptive": True, "dt": h, "dt_min": h / 64}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Numerical solution is not guaranteed")  # it is: the noise is additive
            return sdeint(
                problem, lambda t, x, cond: act(t[0], x), c, x, brownian=path, in_clock=True,
                rtol=self.tolerance, atol=self.tolerance, **options,
            ).x[-1]  # fmt: skip
