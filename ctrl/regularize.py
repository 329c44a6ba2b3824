"""Path KL by Girsanov's theorem, in nats, and the KL of a discrete chain's own transitions beside it.

Two processes that share S and differ in drift by B (a - a'):

    KL(P || P') = E_P of the integral of ½ |S^-1 B (a - a')|² dt.

For score as action this is ((1 + eta²)²/(8 eta²)) E of the integral of g² |a - a'|² dt, least at eta = 1 for a given
difference of scores, undefined at eta = 0, and the same in every parametrisation of time. KL of terminal laws is at
most this. `Gaussian.kl` and `Gaussian.entropy` are the closed forms for marginals and policies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ctrl.gaussian import Mean
from ctrl.grids import node_weights
from ctrl.linop import broadcast, dot, same_shape
from ctrl.problem import Problem
from ctrl.rollout import Trajectory, batch_times
from ctrl.solvers import GaussianStep


def kl_rate(problem: Problem, t: Tensor, a: Tensor, a_ref: Tensor) -> Tensor:
    """½ |S^-1 B (a - a_ref)|², nats per unit of time, (B,)."""
    same_shape(a=a, a_ref=a_ref)
    if problem.noiseless:
        raise ValueError("eta = 0 (no noise): path KL does not exist; report it from a rollout with eta > 0")
    z = problem.diffusion(t).solve(problem.control(t).apply(a - a_ref))
    return dot(z, z) / 2


def clip_to_kl(problem: Problem, t: Tensor, a: Tensor, a_old: Tensor, rate: float) -> Tensor:
    """a, drawn back towards a_old to where the KL rate between them is `rate`, if it is beyond, (B, *D')."""
    if rate == math.inf:
        return a
    within = (rate / kl_rate(problem, t, a, a_old).clamp(min=rate)).sqrt()
    return a_old + broadcast(within, a) * (a - a_old)


def path_kl(problem: Problem, trajectory: Trajectory, policy: Mean, reference: Mean | None = None) -> Tensor:
    """The integral of the KL rate along each trajectory, (B,); its mean over on-policy trajectories is KL(P || P_ref).

    On a differentiable rollout the gradient of the mean is that of the KL: through the rate, and through the law of the
    states.
    """
    reference = reference or problem.reference
    return trajectory.integrate(lambda t, x, cond: kl_rate(problem, t, policy(t, x, cond), reference(t, x, cond)))


def actions_kl(problem: Problem, trajectory: Trajectory, a: Tensor, a_ref: Tensor) -> Tensor:
    """The same of actions given at the nodes, (N+1, B, *D') each, (B,)."""
    t, _, _ = trajectory.flat()
    rate = kl_rate(problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).view(a.shape[:2])
    return (node_weights(trajectory.w).to(rate)[:, None] * rate).sum(0)


def adapt_weight(weight: float, measured: Sequence[float], aim: float, gain: float = 0.5, limit: float = 2.0) -> float:
    """The weight of a KL, once each measured KL in turn has multiplied it by (measured/aim)^gain, at most by limit or
    1/limit. It rises while KL is above its aim. Past KLs are all its state, so it needs no other."""
    for kl in measured:
        weight *= min(max((kl / aim) ** gain, 1 / limit), limit)
    return weight


def chain_kl(
    problem: Problem, solver: GaussianStep, trajectory: Trajectory, policy: Mean, reference: Mean | None = None
) -> Tensor:
    """sum_k KL between a discrete chain's own transitions, (B,): the KL that chain-based codes report.

    For DDIM with ddim_eta = 1 it is ½ (e^{dlambda} - 1) |d eps|² a step against ½ dlambda |d eps|² in continuous time.
    """
    reference = reference or problem.reference
    times = batch_times(trajectory.t, trajectory.x.dtype, len(trajectory.ids))
    total, memory, memory_ref = trajectory.x.new_zeros(len(trajectory.ids)), None, None
    for k, c in enumerate(solver.plan(problem, trajectory.t)):
        x = trajectory.x[k]
        a, a_ref = (mean(times[k], x, trajectory.cond) for mean in (policy, reference))
        law = solver.transition(problem, c, x, a, memory)
        total = total + law.kl(solver.transition(problem, c, x, a_ref, memory_ref))
        memory, memory_ref = solver.carry(c, x, a), solver.carry(c, x, a_ref)
    return total
