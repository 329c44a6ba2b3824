"""Values in one dimension from the backward equation: the oracle where no formula exists.

Along dX = b(t, X) dt + S(t) dW the function

    U(t, x) = E[ integral over [t, T] of e^{-rho (u - t)} h(u, X_u) du + e^{-rho (T - t)} g(X_T) | X_t = x ]

solves U_t + b U_x + ½ S² U_xx - rho U + h = 0, U(T, .) = g (Feynman & Kac). With one more term, ½ k U_x², the same
equation answers everything that is asked of a 1-D `ctrl.Problem`:

    policy a         b = b0 + B a,      g = r,  h = -l - ½ R (a - a_ref)²  (- ½ R Sigma + gamma Ent if it explores)
    optimum (HJB)    b = b0 + B a_ref,  g = r,  h = -l + ½ gamma log(2 pi gamma/R),  k = B²/R
    any functional   b = b0 + B a,      g and h as given
    W_j = dV/dtheta_j of a = a_theta:   b = b0 + B a,  g = 0,  h = (da/dtheta_j) (B V_x - R (a - a_ref))

and J = integral of p_0(x) V(0, x) dx, dJ/dtheta_j = integral of p_0(x) W_j(0, x) dx: policy evaluation and policy
gradient of Jia & Zhou (2022, arXiv 2108.06655, 2111.11232) and, with the score for an action, of arXiv 2502.01819.

Method of lines. Space: sixth-order central differences on a uniform mesh, closed past both ends by quadratic
extrapolation (values grow quadratically). Time: LSODA on the banded system, implicit where it is stiff. In between:
LSODA's own polynomial in time, degree 7 in space. Everything is solved twice (`Mesh.check`) and the difference is
stated as the error. Conditions are not: policies, references and rewards are called with cond = None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.integrate import OdeSolution, solve_ivp
from torch import Tensor

from ctrl.gaussian import GaussianPolicy, Mean
from ctrl.problem import IsotropicNormal, Problem, ScoreAsAction
from ctrl.value import Critic

Array = NDArray[np.float64]

Source = Callable[[Tensor, Tensor], Tensor]
"""h(t: (n,), x: (n, 1)) -> (n,)."""

Density = Callable[[Tensor], Tensor]
"""log p_0(x: (n, 1)) -> (n,)."""

FIRST = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60
SECOND = np.array([2, -27, 270, -490, 270, -27, 2]) / 180
REACH = 3
"""Nodes on either side of a stencil: the half bandwidth."""
POINTS = 8
"""Nodes of the interpolating polynomial in space."""


@dataclass(frozen=True)
class Mesh:
    """n nodes from low to high; `tolerance` is LSODA's, relative and absolute.

    The default suits states of order one, such as samplers that start from N(0, 1): what the closure at the ends gets
    wrong reaches |x| <= 5 with the probability of a path from there to an end. Give the narrowest feature some ten
    nodes: a mixture's score, for one, turns over a width of variance / separation.
    """

    low: float = -10.0
    high: float = 10.0
    n: int = 2001
    tolerance: float = 1e-10

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low and high must be finite with low < high, got {self.low}, {self.high}")
        if self.n < 2 * POINTS:
            raise ValueError(f"n must be at least {2 * POINTS}, got {self.n}")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"tolerance must lie in (0, 1), got {self.tolerance}")

    @cached_property
    def nodes(self) -> Array:
        """(n,)."""
        return np.linspace(self.low, self.high, self.n)

    @property
    def spacing(self) -> float:
        return (self.high - self.low) / (self.n - 1)

    @property
    def check(self) -> Mesh:
        """1.5 times the spacing, nine tenths of the domain, ten times the tolerance: another answer to compare with.

        Where the two agree, space, ends and time are all resolved. Where space dominates, they differ by
        1.5^6 - 1 = 10 times the error on this mesh.
        """
        cut = (self.high - self.low) / 20
        n = max(2 * POINTS, round(0.6 * (self.n - 1)) + 1)
        return Mesh(self.low + cut, self.high - cut, n, min(10 * self.tolerance, 0.1))

    def difference(self, stencil: Array, order: int) -> sparse.csr_array:
        """d^order/dx^order as an (n, n) matrix of half bandwidth 3."""
        central = sparse.diags_array(list(stencil), offsets=range(len(stencil)), shape=(self.n, self.n + 2 * REACH))
        beyond = np.vander(np.arange(-REACH, 0), 3) @ np.linalg.inv(np.vander(np.arange(3), 3))  # quadratic through 3
        extend = sparse.lil_array((self.n + 2 * REACH, self.n))
        extend.setdiag(1.0, k=-REACH)
        extend[:REACH, :3] = beyond
        extend[-REACH:, -3:] = beyond[::-1, ::-1]
        return (central @ extend).tocsr() / self.spacing**order

    def interpolation(self, x: Array) -> tuple[Array, Array]:
        """Nodes (B, 8) and weights (B, 8) of the polynomial of degree 7 around each x (B,)."""
        slack = 1e-6 * self.spacing
        if not ((x >= self.low - slack) & (x <= self.high + slack)).all():
            raise ValueError(f"x leaves the mesh [{self.low}, {self.high}]: {x.min()} to {x.max()}; take a wider one")
        position = (x - self.low) / self.spacing
        first = np.clip(np.floor(position).astype(int) - POINTS // 2 + 1, 0, self.n - POINTS)
        local = np.arange(POINTS) - (POINTS - 1) / 2
        powers = np.vander(position - first + local[0], POINTS)
        return first[:, None] + np.arange(POINTS), powers @ np.linalg.inv(np.vander(local))


@contextmanager
def _one_thread() -> Iterator[None]:
    """A mesh is too small to share out: on busy cores torch's threads make a solve ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Terms(NamedTuple):
    """The equation's coefficients at one time: b, S² (n, 1), h (n, m), k (n, 1)."""

    b: Tensor
    S2: Tensor
    h: Tensor
    k: Tensor


@dataclass(frozen=True)
class _Field:
    """U(t, x), with m components."""

    mesh: Mesh
    T: float
    history: OdeSolution
    D1: sparse.csr_array

    def on_nodes(self, t: Array, derivative: bool = False) -> Array:
        """U or U_x on the whole mesh at times t (k,): (k, m, n)."""
        U = self.history(self.T - t).T.reshape(-1, self.mesh.n)
        return np.asarray((self.D1 @ U.T).T if derivative else U).reshape(len(t), -1, self.mesh.n)

    def at(self, t: Tensor, x: Tensor, derivative: bool = False) -> Tensor:
        """U or U_x at t (B,), x (B, 1): (B, m), in x's type and place."""
        if x.ndim != 2 or x.shape[1] != 1 or t.shape != x.shape[:1]:
            raise ValueError(f"t and x must have shapes (B,) and (B, 1), got {tuple(t.shape)} and {tuple(x.shape)}")
        times = t.detach().double().cpu().numpy()
        if not ((times >= -1e-6 * self.T) & (times <= (1 + 1e-6) * self.T)).all():
            raise ValueError(f"t leaves [0, {self.T}]: {times.min()} to {times.max()}")
        nodes, weights = self.mesh.interpolation(x.detach().double().cpu().numpy()[:, 0])
        out = []
        for rows in np.array_split(np.arange(len(x)), len(x) // 1024 + 1):  # a row may need a whole mesh: bound memory
            distinct, which = np.unique(times[rows].clip(0.0, self.T), return_inverse=True)
            U = self.on_nodes(distinct, derivative)[which[:, None], :, nodes[rows]]
            out.append(np.einsum("bpm,bp->bm", U, weights[rows]))
        return torch.from_numpy(np.concatenate(out)).to(x)


@dataclass(frozen=True)
class _Equation:
    """U_t + b U_x + ½ S² U_xx + ½ k U_x² - rho U + h = 0 on [0, T], U(T, .) = g, for m pairs (h, g) at once.

    terms: (t (n,), x (n, 1)) -> _Terms; g: x (n, 1) -> (n, m).
    """

    terms: Callable[[Tensor, Tensor], _Terms]
    g: Callable[[Tensor], Tensor]
    T: float
    rho: float

    def solve(self, mesh: Mesh) -> _Field:
        """March from T to 0. Unknowns are stacked component by component, so the system keeps its bandwidth."""
        x = torch.from_numpy(mesh.nodes)[:, None]
        D1, D2 = mesh.difference(FIRST, 1), mesh.difference(SECOND, 2)

        @lru_cache(maxsize=1)  # LSODA's corrections and Jacobian columns stay at one time
        def terms(t: float) -> list[Array]:
            found = [c.double().numpy() for c in self.terms(torch.full_like(x[:, 0], t), x)]
            if not all(np.isfinite(c).all() for c in found):
                raise ValueError(f"policy, reference or source is not finite on [{mesh.low}, {mesh.high}] at t = {t}")
            return found

        def change(remaining: float, flat: Array) -> Array:
            b, S2, h, k = terms(self.T - remaining)
            U = flat.reshape(-1, mesh.n).T
            U_x = D1 @ U
            return (b * U_x + S2 / 2 * (D2 @ U) + k / 2 * U_x**2 - self.rho * U + h).T.ravel()

        with torch.no_grad(), _one_thread():
            g = self.g(x).double().numpy().T.ravel()
            result = solve_ivp(
                change,
                (0.0, self.T),
                g,
                method="LSODA",
                dense_output=True,
                lband=REACH,
                uband=REACH,
                rtol=mesh.tolerance,
                atol=mesh.tolerance,
            )
        if not result.success:
            raise RuntimeError(f"LSODA could not integrate the backward equation: {result.message}")
        return _Field(mesh, self.T, result.sol, D1)

    def checked(self, mesh: Mesh) -> tuple[_Field, float, float]:
        """The solution with the errors of U and U_x: the largest difference from `mesh.check`, over some fifty of the
        solver's own times and the middle half of the domain."""
        field, other = self.solve(mesh), self.solve(mesh.check)
        times = other.T - other.history.ts[:: len(other.history.ts) // 50 + 1]
        quarter = (mesh.high - mesh.low) / 4
        places = np.linspace(mesh.low + quarter, mesh.high - quarter, mesh.n)
        t, x = (torch.from_numpy(v.ravel()) for v in np.meshgrid(times, places))
        U, U_x = (float((field.at(t, x[:, None], d) - other.at(t, x[:, None], d)).abs().max()) for d in (False, True))
        return field, U, U_x


@dataclass(frozen=True)
class Solution(Critic):
    """U(t, x) and U_x(t, x): a critic, with the errors stated for the middle half of the mesh. It raises outside."""

    field: _Field
    error: float
    grad_error: float

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """U(t, x), (B,), for t (B,), x (B, 1); not differentiable by autograd: see `grad`."""
        return self.field.at(t, x)[:, 0]

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """U_x(t, x), (B, 1)."""
        return self.field.at(t, x, derivative=True)


@dataclass(frozen=True)
class PolicyGradient:
    """J and grad J, (p,), of a parametrised policy; its value V; the error of W = dV/dtheta on the middle half."""

    J: float
    grad: Tensor
    value: Solution
    error: float


DEFAULT = Mesh()


def evaluate(problem: Problem, policy: Mean | GaussianPolicy, mesh: Mesh = DEFAULT) -> Solution:
    """V of a policy: a mean (t, x, cond) -> (B, 1) is deterministic, a `GaussianPolicy` explores and pays
    ½ R Sigma - gamma Ent for it. Against the problem's law, actions sampled at every instant."""
    mean, root = (policy.mean, policy.root) if isinstance(policy, GaussianPolicy) else (policy, None)

    def h(t: Tensor, x: Tensor) -> Tensor:
        h = -problem.running_cost(t, x, mean(t, x, None), problem.reference(t, x, None))
        if root is None:
            return h
        Sigma = root(t).apply(torch.ones_like(x))[:, 0].square()
        h = h - problem.penalty(t).apply(torch.ones_like(x))[:, 0] * Sigma / 2
        return h + problem.gamma / 2 * torch.log(2 * math.pi * math.e * Sigma) if problem.gamma else h

    return expectation(problem, mean, h, lambda x: problem.reward(x, None), problem.discount, mesh)


def optimum(problem: Problem, mesh: Mesh = DEFAULT) -> Solution:
    """V* of the problem, soft if gamma > 0. The optimal policy is `ctrl.greedy_policy(problem, V*)`, which is
    N(a_ref + R^-1 B V*_x, gamma/R), or its mean if gamma = 0."""
    _check_problem(problem)

    def terms(t: Tensor, x: Tensor) -> _Terms:
        one = torch.ones_like(x)
        b, S2 = _dynamics(problem, t, x, problem.reference(t, x, None))
        k = problem.control(t).apply(problem.penalty(t).solve(problem.control(t).adjoint(one)))
        h = -problem.state_cost(t, x)[:, None]
        if problem.gamma:
            h = h + problem.gamma / 2 * torch.log(2 * math.pi * problem.gamma / problem.penalty(t).apply(one))
        return _Terms(b, S2, h, k)

    equation = _Equation(terms, lambda x: problem.reward(x, None)[:, None], problem.horizon, problem.discount)
    return Solution(*equation.checked(mesh))


def expectation(
    problem: Problem,
    policy: Mean,
    source: Source | None = None,
    terminal: Callable[[Tensor], Tensor] | None = None,
    discount: float = 0.0,
    mesh: Mesh = DEFAULT,
) -> Solution:
    """E[ integral over [t, T] of e^{-rho (u - t)} source(u, X) du + e^{-rho (T - t)} terminal(X_T) | X_t = x ], rho =
    `discount`, under the policy's mean: path KL (source = `ctrl.kl_rate`), regret (an advantage rate), a moment, ..."""

    def h(t: Tensor, x: Tensor) -> Tensor:
        return (source(t, x) if source else torch.zeros_like(t))[:, None]

    def g(x: Tensor) -> Tensor:
        return (terminal(x) if terminal else torch.zeros_like(x[:, 0]))[:, None]

    return Solution(*_linear(problem, policy, h, g, discount).checked(mesh))


def objective(problem: Problem, value: Solution, log_density: Density | None = None) -> float:
    """J = integral of p_0(x) V(0, x) dx, trapezoid on the mesh. Without `log_density`, p_0 = N(0, std²) is read from
    the problem's `IsotropicNormal`."""
    return float(_average(problem, value.field, log_density))


def gradient(
    problem: Problem,
    mean: Callable[[Tensor, Tensor, Tensor], Tensor],
    theta: Tensor,
    log_density: Density | None = None,
    mesh: Mesh = DEFAULT,
) -> PolicyGradient:
    """J and grad J of the policy mean(theta, t, x) -> (n, 1) at theta (p,); autograd differentiates the mean alone.
    Exploration with a covariance that depends on t only would add a constant to J and leave grad J as it is."""
    if theta.ndim != 1:
        raise ValueError(f"theta must have shape (p,), got {tuple(theta.shape)}")
    theta = theta.detach().double()

    def policy(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return mean(theta, t, x)

    value = evaluate(problem, policy, mesh)

    def h(t: Tensor, x: Tensor) -> Tensor:
        difference = policy(t, x) - problem.reference(t, x, None)
        slope = problem.control(t).adjoint(value.grad(t, x)) - problem.penalty(t).apply(difference)
        return _jacobian(mean, theta, t, x) * slope

    def g(x: Tensor) -> Tensor:
        return x.new_zeros(len(x), len(theta))

    W, error, _ = _linear(problem, policy, h, g, problem.discount).checked(mesh)
    return PolicyGradient(objective(problem, value, log_density), _average(problem, W, log_density), value, error)


def _jacobian(mean: Callable[[Tensor, Tensor, Tensor], Tensor], theta: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """da/dtheta, (n, p): the vector-Jacobian product v' da/dtheta is linear in v, and its own gradient is a column."""
    with torch.enable_grad():
        theta, v = theta.clone().requires_grad_(), torch.zeros_like(x).requires_grad_()
        products = torch.autograd.grad(mean(theta, t, x), theta, v, create_graph=True)[0]
        columns = [torch.autograd.grad(c, v, retain_graph=True, materialize_grads=True)[0] for c in products]
    return torch.cat(columns, 1)


def _linear(problem: Problem, policy: Mean, h: Source, g: Callable[[Tensor], Tensor], rho: float) -> _Equation:
    """The equation of expectations under a policy; h and g return (n, m)."""
    _check_problem(problem)

    def terms(t: Tensor, x: Tensor) -> _Terms:
        b, S2 = _dynamics(problem, t, x, policy(t, x, None))
        return _Terms(b, S2, h(t, x), torch.zeros_like(b))

    return _Equation(terms, g, problem.horizon, rho)


def _dynamics(problem: Problem, t: Tensor, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """b0 + B a and S², (n, 1)."""
    if a.shape != x.shape:
        raise ValueError(f"policy must return the shape of x, {tuple(x.shape)}, got {tuple(a.shape)}")
    b = problem.velocity(t, x, a)
    return b, problem.diffusion(t).apply(torch.ones_like(x)).square()


def _check_problem(problem: Problem) -> None:
    if tuple(problem.shape) != (1,):
        raise ValueError(f"problem must be one-dimensional, shape (1,), got {tuple(problem.shape)}")
    middle, one = torch.full((1,), problem.horizon / 2, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    if float(problem.diffusion(middle).apply(one)) == 0:
        raise ValueError("problem has no noise (eta = 0): the equation is not parabolic; take eta > 0")


def _average(problem: Problem, field: _Field, log_density: Density | None) -> Tensor:
    """Integral of p_0(x) U(0, x) dx, (m,)."""
    if log_density is None:
        log_density = _initial_density(problem)
    p = log_density(torch.from_numpy(field.mesh.nodes)[:, None]).exp().numpy()
    mass = np.trapezoid(p, field.mesh.nodes)
    if not abs(mass - 1) < 1e-6:
        raise ValueError(f"log_density must integrate to 1 on the mesh, not {mass}: normalise it, or change the mesh")
    return torch.from_numpy(np.trapezoid(p * field.on_nodes(np.zeros(1))[0], field.mesh.nodes))


def _initial_density(problem: Problem) -> Density:
    if not (isinstance(problem, ScoreAsAction) and isinstance(problem.initial, IsotropicNormal)):
        raise ValueError("log_density must be given: the problem's initial law is not a IsotropicNormal")
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), problem.initial.std)
    return lambda x: normal.log_prob(x)[:, 0]
