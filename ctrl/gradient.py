"""Policy gradients as functions of a trajectory, around one formula (Jia & Zhou 2022, arXiv 2111.11232; with the score
for an action, arXiv 2502.01819):

    grad J = E of the integral of e^{-rho t} (da_theta/dtheta)' [B' p - R (a - a_ref)] dt,

p an estimate of grad V at (t, X_t), V the value of the policy a_theta itself. The bracket is the slope of the advantage
rate q in a, at a: its `direction`. `surrogate` turns directions into a number a sample whose gradient in theta is that
sample's estimate of grad J, and estimators differ in p, or in the whole direction:

    p at the nodes (N+1, B, *D)         critic_slope            grad V of a critic
                                        adjoint                 the sensitivity of the path to its state
                                        lean_adjoint            the same along the reference's drift: the optimum only
    p at left nodes (N, B, *D)          td_slope                L'^-1 xi (dV - (c + rho V) dt) / sqrt(d clock)
                                        likelihood_ratio_slope  L'^-1 xi (return - baseline) / sqrt(d clock)
    a direction at left nodes           q_direction             Sigma^-1 (a - s) q(t, x, a), exploring
                                        bridge_direction        g² (G - b) grad_x log p(x_T | x), eta = 1
    no direction: the objective itself  pathwise                differentiate the whole rollout
                                        chain_surrogate         a discrete chain's own likelihood ratio

    slope = critic_slope(critic, trajectory)
    surrogate(problem, trajectory, policy, directions(problem, trajectory, policy, slope)).mean().backward()

The term R (a - a_ref), the explicit derivative of the action's cost, belongs to all of them: p carries what the cost
does later, not what it does now. What multiplies an increment xi lives at left nodes, and is first order in dt whatever
the solver; what lives at nodes has the order of the solver and of the trajectory's quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctrl.forward import bridge_score
from ctrl.gaussian import Gaussian, GaussianPolicy, Mean
from ctrl.grids import node_weights
from ctrl.linop import Scalar, broadcast, dot, same_shape
from ctrl.problem import Problem, ScoreAsAction
from ctrl.qvalue import martingale_residual, td_residual
from ctrl.rollout import Trajectory, batch_times
from ctrl.solvers import Exponential, GaussianStep
from ctrl.value import Critic


def direction(problem: Problem, t: Tensor, a: Tensor, a_ref: Tensor, p: Tensor) -> Tensor:
    """B' p - R (a - a_ref), (n, *D'): the slope of the advantage rate q in a, at a.

    t: (n,); a, a_ref: (n, *D'); p: (n, *D), an estimate of grad V of the policy itself.
    """
    push = problem.control(t).adjoint(p)
    same_shape(a=a, a_ref=a_ref, Bp=push)
    return push - problem.penalty(t).apply(a - a_ref)


@torch.no_grad()
def directions(problem: Problem, trajectory: Trajectory, policy: Mean, slope: Tensor) -> Tensor:
    """`direction` at a_theta and p = slope at every node, (N+1, B, *D'), or every left node, (N, B, *D'), as slope is.

    With slope = 0 it is - R (a - a_ref), and its `surrogate` the explicit derivative of minus the action's cost.
    """
    _check_nodes(trajectory, slope=slope)
    times, cond = _times(trajectory), trajectory.cond
    return torch.stack(
        [
            direction(problem, t, policy(t, x, cond), problem.reference(t, x, cond), p)
            for t, x, p in zip(times, trajectory.x, slope, strict=False)
        ]
    )


def surrogate(problem: Problem, trajectory: Trajectory, policy: Mean, direction: Tensor) -> Tensor:
    """sum_k w_k e^{-rho t_k} <a_theta(t_k, x_k), direction_k>, (B,); directions and states count as constants.

    direction: (N+1, B, *D'), and w is the trajectory's own quadrature; or (N, B, *D') at left nodes, and w_k is the
    length of the step. Nodes of weight zero are not visited.
    """
    _check_nodes(trajectory, direction=direction)
    left = len(direction) < len(trajectory.t)
    w = trajectory.t.diff() if left else node_weights(trajectory.w)
    w = w * torch.exp(-problem.discount * trajectory.t[: len(w)])
    total = trajectory.x.new_zeros(len(trajectory.ids))
    for k, (weight, t) in enumerate(zip(w.tolist(), _times(trajectory), strict=False)):
        if weight:
            a = policy(t, trajectory.x[k].detach(), trajectory.cond)
            same_shape(action=a, direction=direction[k])
            total = total + weight * dot(a, direction[k].detach())
    return total


@torch.no_grad()
def critic_slope(critic: Critic, trajectory: Trajectory) -> Tensor:
    """grad V(t_k, x_k) of a critic, exact or learned, (N+1, B, *D)."""
    times = _times(trajectory)
    slope = torch.stack([critic.grad(t, x, trajectory.cond) for t, x in zip(times, trajectory.x, strict=True)])
    same_shape(grad=slope, x=trajectory.x)
    return slope


def td_slope(problem: Problem, trajectory: Trajectory, value: Tensor, cost: Tensor) -> Tensor:
    """L'^-1 xi_k (V_{k+1} - V_k - integral over the step of (c + rho V) dt) / sqrt(clock_{k+1} - clock_k), (N, B, *D).

    The bracket is <grad V, S dW> + o(1), so its covariance with dW gives grad V without differentiating V: the
    martingale form of Jia & Zhou (2022, arXiv 2111.11232), first order in dt. value, cost: V and c at the nodes,
    (N+1, B). xi must drive the step through L: `Exact` has a root of its own, which is L up to a rotation.
    """
    return _score_of_noise(problem, trajectory, td_residual(problem, trajectory, value, cost))


def returns(problem: Problem, trajectory: Trajectory, reward: Tensor, cost: Tensor) -> Tensor:
    """G_k = e^{-rho (T - t_k)} r(X_T) - integral of e^{-rho (u - t_k)} c du over [t_k, T], (N, B): the return to go.

    reward: r(X_T), (B,); cost: c at the nodes, (N+1, B), by the trajectory's own quadrature. What precedes t_k is not
    in it, and what c(t_k, x_k) adds has no covariance with the noise to come.
    """
    return martingale_residual(problem, trajectory, reward, torch.zeros_like(cost), cost)[:-1]


def likelihood_ratio_slope(
    problem: Problem, trajectory: Trajectory, reward: Tensor, cost: Tensor, baseline: Tensor | float = 0.0
) -> Tensor:
    """L'^-1 xi_k (G_k - baseline_k) / sqrt(clock_{k+1} - clock_k), (N, B, *D), G_k the return to go of `returns`.

    REINFORCE (Williams 1992) on the increments of the path, first order in dt; xi as in `td_slope`. baseline: (), (N,)
    or (N, B), and it must not depend on the noise after t_k: V(t_k, x_k), or a mean over other samples.
    """
    gain = returns(problem, trajectory, reward, cost)
    b = torch.as_tensor(baseline, dtype=gain.dtype, device=gain.device)
    if b.shape not in {(), gain.shape[:1], gain.shape}:
        raise ValueError(f"baseline must have shape (), {tuple(gain.shape[:1])} or {tuple(gain.shape)}, got {b.shape}")
    return _score_of_noise(problem, trajectory, gain - (b[:, None] if b.ndim == 1 else b))


@torch.no_grad()
def bridge_direction(problem: ScoreAsAction, trajectory: Trajectory, policy: Mean, gain: Tensor) -> Tensor:
    """g² gain_k w_k, (N, B, *D) at left nodes, w = grad_x log p(x_T | x_k) of a policy that is the score of its own law
    (`ctrl.forward`). gain: (N, B), G_k less a baseline, G_k = r - beta log dP_a/dP_ref [t_k, T].

    R (a - a_ref) is part of it already: the mean is B' grad V - R (a - a_ref), zero at the optimum, and there G_k is
    V*(t_k, x_k) on every path, so that with V* for the baseline it vanishes, to half an order of the step.
    """
    same_shape(gain=gain, left_nodes=trajectory.x[:-1].flatten(2)[..., 0])
    times, end = _times(trajectory), trajectory.x[-1]
    rows = []
    for t, x, g in zip(times, trajectory.x[:-1], gain, strict=False):
        w = bridge_score(problem, t, x, end) - policy(t, x, trajectory.cond)
        rows.append(broadcast(problem.rate(t) * g, w) * w)
    return torch.stack(rows)


def pathwise(problem: Problem, trajectory: Trajectory, policy: Mean) -> Tensor:
    """e^{-rho T} r(X_T) - integral of e^{-rho t} c(t, X, a_theta) dt, (B,), on a differentiable rollout of a_theta.

    Its gradient is that of the discrete objective with this noise: through the whole solver, with the graph of every
    step in memory. The reward must be differentiable.
    """
    _check_end(problem, trajectory)
    if not trajectory.x.requires_grad:
        raise ValueError("trajectory carries no graph: take `rollout(..., differentiable=True)` with a policy of theta")
    reward = problem.reward(trajectory.x[-1], trajectory.cond)
    _check_reward(reward, trajectory)

    def cost(t: Tensor, x: Tensor, cond: Any) -> Tensor:
        c = problem.running_cost(t, x, policy(t, x, cond), problem.reference(t, x, cond), cond)
        return torch.exp(-problem.discount * t) * c

    return math.exp(-problem.discount * float(trajectory.t[-1])) * reward - trajectory.integrate(cost)


def adjoint(problem: Problem, trajectory: Trajectory, policy: Mean) -> Tensor:
    """-dp/dt = (grad_x [b0 + B a_theta])' p - grad_x c(t, x, a_theta(t, x)) - rho p, p(T) = grad r: p_k, (N+1, B, *D).

    The sensitivity of the return to go to the state, so E[p_k | X_k] = grad V(t_k, X_k) of the policy, along a
    trajectory without a graph. Vector-Jacobian products only, with the graph of one node at a time in memory.
    """

    def law(t: Tensor, x: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        a = policy(t, x, cond)
        cost = problem.running_cost(t, x, a, problem.reference(t, x, cond), cond)
        return problem.velocity(t, x, a), cost

    return _backward(problem, trajectory, law)


def lean_adjoint(problem: Problem, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """-dp/dt = (grad_x [b0 + B a_ref])' p - grad_x l(t, x) - rho p, p(T) = grad r: p_k, (N+1, B, *D), and a_ref there.

    Adjoint Matching (Domingo-Enrich et al. 2024, arXiv 2409.08861): `adjoint` without the terms that cancel in the mean
    at the optimum, where B'p = R (a - a_ref). E[p_k | X_k] = grad V* along trajectories of the optimal policy only;
    along those of another it is grad V of no policy (of the reference, along its own).
    """
    if isinstance(problem, ScoreAsAction):
        return _backward_by_means(problem, trajectory)
    actions: list[Tensor] = []

    def law(t: Tensor, x: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        actions.append(problem.reference(t, x, cond))
        return problem.velocity(t, x, actions[-1]), problem.state_cost(t, x, cond)

    p = _backward(problem, trajectory, law)
    return p, torch.stack([a_ref.detach() for a_ref in actions[::-1]])


def _backward_by_means(problem: ScoreAsAction, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """p_k = e^{-rho dt} (dm_k/dx)' p_{k+1} - dt grad l, m_k the mean of the exponential step under the reference.

    At eta = 1 and under the true score that mean is E[X_{k+1} | X_k], whatever the data and however long the step, and
    Gaussian data have the exact p; elsewhere it is first order. One vector-Jacobian product a node.
    """
    _check_end(problem, trajectory)
    times, cond, step = _times(trajectory), trajectory.cond, Exponential()
    plan, lengths = step.plan(problem, trajectory.t), trajectory.t.diff().tolist()
    slopes = [_reward_slope(problem, trajectory)]
    with torch.no_grad():
        actions = [problem.reference(times[-1], trajectory.x[-1], cond)]
    for k in reversed(range(len(plan))):
        with torch.enable_grad():
            x = trajectory.x[k].detach().requires_grad_()
            a_ref = problem.reference(times[k], x, cond)
            mean = step.transition(problem, plan[k], x, a_ref, None).mean
            gain = math.exp(-problem.discount * lengths[k]) * dot(mean, slopes[-1])
            gain = gain - lengths[k] * problem.state_cost(times[k], x, cond)
            slopes.append(torch.autograd.grad(gain.sum(), x)[0])
        actions.append(a_ref.detach())
    return torch.stack(slopes[::-1]), torch.stack(actions[::-1])


def q_direction(trajectory: Trajectory, policy: GaussianPolicy, q: Tensor) -> Tensor:
    """Sigma^-1 (a_k - s_k) q_k, (N, B, *D'), for the sampled actions a_k of pi = N(s, Sigma).

    Its mean over a ~ pi is B' grad V - R (s - a_ref), so that `surrogate` with the policy's mean is the q-weighted
    gradient E of the integral of e^{-rho t} grad log pi(a) q dt (Jia & Zhou 2023, arXiv 2207.00713). q: the advantage
    rate at the sampled actions, (N, B), exact (`advantage_rate`) or learned; any baseline in (t, x) may be taken off.
    """
    if trajectory.a is None:
        raise ValueError("trajectory has no actions a: q weighs the ones that were sampled")
    same_shape(q=q, actions=trajectory.a.flatten(2)[..., 0])
    scores = []
    for t, x, a in zip(_times(trajectory), trajectory.x.detach(), trajectory.a.detach(), strict=False):
        with torch.enable_grad():  # d log pi / d mean, whatever the operator
            mean = policy.mean(t, x, trajectory.cond).detach().requires_grad_()
            log_pi = Gaussian(mean, policy.root(t)).log_prob(a)
            scores.append(torch.autograd.grad(log_pi.sum(), mean)[0])
    return torch.stack(scores) * broadcast(q.detach(), trajectory.a)


def chain_surrogate(
    problem: Problem, solver: GaussianStep, trajectory: Trajectory, policy: Mean, advantage: Tensor
) -> Tensor:
    """sum_k advantage_k log p_theta(x_{k+1} | x_k, memory), (B,): a discrete chain's own likelihood ratio.

    DDPO (Black et al. 2023, arXiv 2305.13301). The memory of a multistep method depends on theta too and is computed
    anew. advantage: (N, B), or (B,) for one number a sample, such as the reward; it counts as constant. With the
    discounted `returns`, e^{-rho t_k} (G_k - baseline_k), what remains of grad J is the action's cost at the states
    visited: add the `surrogate` of `directions` with slope 0. solver must be the one that made the trajectory.
    """
    if not isinstance(solver, GaussianStep):
        raise ValueError(f"solver {type(solver).__name__} has no transition density, and so no likelihood ratio")
    n, batch = len(trajectory.t) - 1, len(trajectory.ids)
    if advantage.shape not in {(batch,), (n, batch)}:
        raise ValueError(f"advantage must have shape {(batch,)} or {(n, batch)}, got {tuple(advantage.shape)}")
    x, times, weight = trajectory.x.detach(), _times(trajectory), advantage.detach().expand(n, batch)
    total, memory = x.new_zeros(batch), None
    for k, c in enumerate(solver.plan(problem, trajectory.t)):
        a = policy(times[k], x[k], trajectory.cond)
        total = total + weight[k] * solver.transition(problem, c, x[k], a, memory).log_prob(x[k + 1])
        memory = solver.carry(c, x[k], a)
    return total


Law = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""law(t: (B,), x: (B, *D), cond) -> the drift f, (B, *D), and the cost c, (B,)."""


def _backward(problem: Problem, trajectory: Trajectory, law: Law) -> Tensor:
    """-dp/dt = (grad f)' p - grad c - rho p from p(T) = grad r, by Heun's method along the nodes: order 2."""
    _check_end(problem, trajectory)
    times, steps, p = _times(trajectory), trajectory.t.diff().tolist(), _reward_slope(problem, trajectory)
    slopes, later = [p], None
    for k in reversed(range(len(times))):
        change = _sensitivity(problem, law, times[k], trajectory.x[k], trajectory.cond)
        if later is not None:
            p = p + steps[k] / 2 * (later + change(p + steps[k] * later))
            slopes.append(p)
        later = change(p)
        del change  # and this node's graph with it, before the next is built
    return torch.stack(slopes[::-1])


def _sensitivity(problem: Problem, law: Law, t: Tensor, x: Tensor, cond: Any) -> Callable[[Tensor], Tensor]:
    """p -> (grad f)' p - grad c - rho p at one node; the graph goes with the function."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        drift, cost = law(t, x, cond)

    def change(p: Tensor) -> Tensor:
        with torch.enable_grad():
            gain = (dot(drift, p) - cost).sum()
        if not gain.requires_grad:  # neither drift nor cost depends on the state
            return -problem.discount * p
        return torch.autograd.grad(gain, x, retain_graph=True, materialize_grads=True)[0] - problem.discount * p

    return change


def _reward_slope(problem: Problem, trajectory: Trajectory) -> Tensor:
    """grad r(X_T), (B, *D)."""
    with torch.enable_grad():
        x = trajectory.x[-1].detach().requires_grad_()
        reward = problem.reward(x, trajectory.cond)
        _check_reward(reward, trajectory)
        return torch.autograd.grad(reward.sum(), x)[0]


def _score_of_noise(problem: Problem, trajectory: Trajectory, weight: Tensor) -> Tensor:
    """L'^-1 xi_k weight_k / sqrt(clock_{k+1} - clock_k), (N, B, *D), for weight (N, B)."""
    if trajectory.xi is None:
        raise ValueError("trajectory has no xi: this form needs the increments that drove it")
    if isinstance(problem.root, Scalar) and problem.root.c == 0:
        raise ValueError("eta = 0 (no noise): a path has no density, and V no covariance with the noise; take eta > 0")
    spread = problem.clock(trajectory.t).diff().sqrt()[:, None]
    weighted = trajectory.xi * broadcast(weight.detach() / spread, trajectory.xi)
    return problem.root.T.solve(weighted.flatten(0, 1)).view_as(weighted)


def _times(trajectory: Trajectory) -> Sequence[Tensor]:
    return batch_times(trajectory.t, trajectory.x.dtype, len(trajectory.ids))


def _check_nodes(trajectory: Trajectory, **tensors: Tensor) -> None:
    """Raise unless each is (N+1, B, ...) or (N, B, ...)."""
    nodes, batch = trajectory.x.shape[:2]
    for name, v in tensors.items():
        if v.ndim < 3 or v.shape[1] != batch or len(v) not in (nodes - 1, nodes):
            raise ValueError(
                f"{name} must have shape ({nodes}, {batch}, ...) for the nodes or ({nodes - 1}, {batch}, ...) for the "
                f"left ones, got {tuple(v.shape)}"
            )


def _check_end(problem: Problem, trajectory: Trajectory) -> None:
    if abs(float(trajectory.t[-1]) / problem.horizon - 1) > 1e-6:
        raise ValueError(
            f"trajectory ends at t = {float(trajectory.t[-1])}: its last state has no reward before {problem.horizon}"
        )


def _check_reward(reward: Tensor, trajectory: Trajectory) -> None:
    same_shape(reward=reward, ids=trajectory.ids)
    if not reward.requires_grad:
        raise ValueError("the reward is not differentiable in x: take a form that needs its values alone")
