"""The forward likelihood ratio: grad V from values of the reward alone, through the noising instead of the path.

At eta = 1 the process of a policy that is the score of its own law is the time reversal of the noising, so that given
its end X_T the state X_t has the noising's own transition,

    x = A x_T + sqrt(S2) eps,   A, S2 those of `Noising.between` from s_min to s.

Bayes' rule then gives the score of the end in the state, w = grad_x log p(x_T | x), without any path:

    w = grad_x log p(x | x_T) - a(t, x) = (A x_T - x)/S2 - a(t, x),   E[w | X_t = x] = 0,
    grad_x E[F(X_T) | X_t = x] = E[(F(X_T) - b(t, x)) w | X_t = x]    for any baseline b.

With F = r this is grad V of the reference; renoised ends (Reinforce Adjoint Matching, arXiv 2605.10759; Tilt Matching,
arXiv 2512.21829) give many nodes for each call of the reward, and their variance has D/S2 where a step of the path has
D/dt. The KL enters through its density. Both processes are reversals of one noising, so

    log dP_a/dP_ref [t, T] = log p_a(x_T | x)/p_ref(x_T | x) = L(x_T) - L_t(x),   L = log p_a/p_ref at the end,

and V = E[r - beta L(X_T) | x] + beta L_t(x), grad L_t = a - a_ref. The last term is the explicit derivative of the
action's cost with the opposite sign, and they cancel: the direction of the policy gradient is

    B' grad V - R (a - a_ref) = g² E[(G - b) w | X_t = x],   G = r - beta log dP_a/dP_ref along the whole path.

At the optimum G is V*(0, X_0), one number a start: the variance vanishes. The log-ratio must be that of the densities,
its Ito integral included; with the KL rate in its place, or with a pull to the reference beside F = r, as is usual,
another policy is stationary. A sum over N steps of the path has an error that goes with x_T, so that a policy trained
on it stops elsewhere: at N = 20 on mixture-2d with a path KL of 1.17 in place of .98 nats. Without the path, from
noised ends alone and so for any sampler,

    log dP_a/dP_ref = E[integral of g²/2 (|s(x | x_T) - a_ref|² - |s(x | x_T) - a|²) dt | x_T],

exact where both are scores of their own laws: each side's denoising loss is then minus its log-density, but for a
constant. Besides the noise of its nodes, the quadrature over them is its only error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ctrl.linop import broadcast, dot, same_shape
from ctrl.noise import FORWARD, Noise
from ctrl.problem import ScoreAsAction


def renoised(problem: ScoreAsAction, t: Tensor, end: Tensor, eps: Tensor) -> Tensor:
    """A x_T + sqrt(S2) eps, (n, *D): the state at times t, (n,), of paths that end in `end`, (n, *D)."""
    same_shape(end=end, eps=eps)
    A, S2 = _between(problem, t, end)
    return A * end + S2.sqrt() * eps


def bridge_score(problem: ScoreAsAction, t: Tensor, x: Tensor, end: Tensor) -> Tensor:
    """grad_x log p(x | x_T) = (A x_T - x)/S2, (n, *D), at times t < T, (n,)."""
    same_shape(x=x, end=end)
    A, S2 = _between(problem, t, end)
    return (A * end - x) / S2


def log_ratio_rate(problem: ScoreAsAction, t: Tensor, x: Tensor, end: Tensor, a: Tensor, a_ref: Tensor) -> Tensor:
    """g²/2 (|s(x | x_T) - a_ref|² - |s(x | x_T) - a|²), (n,), at noised ends x and times t < T: what log dP_a/dP_ref is
    in the mean the integral of."""
    score = bridge_score(problem, t, x, end)
    off, off_ref = score - a, score - a_ref
    return problem.rate(t) * (dot(off_ref, off_ref) - dot(off, off)) / 2


def renoised_path(
    problem: ScoreAsAction, times: Tensor, end: Tensor, noise: Noise, ids: Tensor, turn: int = 0
) -> Tensor:
    """Every end, (B, *D), noised anew to each of the times, (N+1,), independently from one to the next, and from one
    `turn` to another: (N+1, B, *D). At t = T it is the end itself."""
    shape, batch = end.shape[1:], len(end)
    states = []
    for k, t in enumerate(times.unbind(), turn * len(times)):
        eps = noise.normal(ids, shape, FORWARD, k).to(end)
        states.append(renoised(problem, t.expand(batch), end, eps))
    return torch.stack(states)


def _between(problem: ScoreAsAction, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """A and S2 at times t, (n,), against states."""
    A, S2 = problem.noising.between(problem.s(t), problem.s_min)
    return broadcast(A.to(like), like), broadcast(S2.to(like), like)
