"""Exploratory linear-quadratic control: everything exact, for the optimum and for any linear policy.

    dX = (A X + B a + d) dt + S dW,   r(x) = -½ x'Gx + h'x + r0,
    c  = ½ x'Qx + ½ |a - a_ref|²_R,   a_ref = K_ref x + k_ref,   gamma and rho as in `ctrl.problem`.

Every linear-Gaussian policy N(Kx + k, Sigma) has the value V = -½ x'Px + p'x + z with (dots for d/dt)

    -P. = P A~ + A~'P + Q + dK'R dK - rho P,                          P(T) = G,     A~ = A + BK,  d~ = d + Bk,
    -p. = A~'p - P d~ - dK'R dk - rho p,                              p(T) = h,     dK = K - K_ref, dk = k - k_ref,
    -z. = p'd~ - ½ tr(SS'P) - ½ dk'R dk - ½ tr(R Sigma) + gamma Ent(Sigma) - rho z,   z(T) = r0,

and the optimum is the policy that is greedy for its own value: dK = -R^-1 B'P, dk = R^-1 B'p, Sigma = gamma R^-1, which
turns the first line into the Riccati equation (Wang, Zariphopoulou & Zhou 2020 for the exploratory form). Moments of
the state:
m. = A~m + d~, C. = A~C + C A~' + SS'. The ODEs are solved by scipy at rtol 1e-12 with dense output.

Coefficients are functions of times (n,) returning (n, ...) numpy arrays; `constant` makes one from a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import quad_vec, solve_ivp
from torch import Tensor

from ctrl.gaussian import GaussianPolicy
from ctrl.linop import LinOp, Matrix, cholesky
from ctrl.noise import INITIAL, Noise
from ctrl.problem import Problem
from ctrl.solvers import LinearStep
from ctrl.value import Critic

Array = NDArray[np.floating[Any]]
Coefficient = Callable[[Array], Array]
"""t: (n,) -> (n, ...)."""

_ODE = {"method": "DOP853", "rtol": 1e-12, "atol": 1e-13, "dense_output": True}


def constant(value: Any) -> Coefficient:
    """The coefficient that does not depend on time."""
    array = np.asarray(value, dtype=np.float64)
    return lambda t: np.broadcast_to(array, (len(t), *array.shape))


@dataclass(frozen=True)
class LinearPolicy:
    """a = K(t) x + k(t), with covariance Sigma(t) if it explores. As a function it is a `ctrl.Mean`."""

    K: Coefficient
    k: Coefficient
    Sigma: Coefficient | None = None

    def __call__(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        K, k = _at(self.K, t, x), _at(self.k, t, x)
        return (K @ x[..., None])[..., 0] + k

    def explore(self) -> GaussianPolicy:
        """The policy N(Kx + k, Sigma)."""
        if self.Sigma is None:
            raise ValueError("Sigma is missing: the policy does not explore")
        Sigma = self.Sigma
        return GaussianPolicy(self, lambda t: Matrix(cholesky(_at(Sigma, t, t.double()), "Sigma")))


@dataclass(frozen=True)
class QuadraticValue(Critic):
    """V(t, x) = -½ x'P(t)x + p(t)'x + z(t): an exact critic."""

    P: Coefficient
    p: Coefficient
    z: Coefficient

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        P, p, z = _at(self.P, t, x), _at(self.p, t, x), _at(self.z, t, x)
        return torch.einsum("...i,...ij,...j->...", x, -P / 2, x) + (p * x).sum(-1) + z

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """p - Px."""
        return _at(self.p, t, x) - (_at(self.P, t, x) @ x[..., None])[..., 0]

    def expectation(self, t: float, mean: Array, covariance: Array) -> float:
        """E V(t, X) for X of that mean and covariance."""
        P, p, z = (c(np.array([t]))[0] for c in (self.P, self.p, self.z))
        return float(-mean @ P @ mean / 2 - np.trace(P @ covariance) / 2 + p @ mean + z)


@dataclass(frozen=True)
class Moments:
    """Mean (n, d) and covariance (n, d, d) of the state at times t (n,)."""

    mean: Coefficient
    covariance: Coefficient


@dataclass(frozen=True)
class Coefficients:
    """The problem's matrices at times t (n,): each is (n, ...), and c[i] gives those at t_i."""

    A: Array
    B: Array
    d: Array
    SS: Array
    """S S'."""
    Q: Array
    R: Array
    K_ref: Array
    k_ref: Array

    def __getitem__(self, i: int) -> Coefficients:
        return Coefficients(*(getattr(self, f.name)[i] for f in dataclasses.fields(self)))


def remembered(at: Callable[[Array], Coefficients]) -> Callable[[Array], Coefficients]:
    """`at`, with its last answer kept: an ODE's right-hand side asks for the same time again and again."""
    last: list[tuple[bytes, Coefficients]] = []

    def asked(t: Array) -> Coefficients:
        key = t.tobytes()
        if not last or last[0][0] != key:
            last[:] = [(key, at(t))]
        return last[0][1]

    return asked


@dataclass(frozen=True)
class LQ:
    """A linear-quadratic problem: coefficients `at` times (n,), terminal reward, initial law N(mean0, cov0)."""

    at: Callable[[Array], Coefficients]
    G: Array
    h: Array
    mean0: Array
    cov0: Array
    horizon: float
    r0: float = 0.0
    gamma: float = 0.0
    discount: float = 0.0

    @property
    def reference(self) -> LinearPolicy:
        """a_ref."""
        return LinearPolicy(lambda t: self.at(t).K_ref, lambda t: self.at(t).k_ref)

    def value(self, policy: LinearPolicy) -> QuadraticValue:
        """V of a policy: the linear (Lyapunov) system."""

        def gains(t: Array, c: Coefficients, P: Array, p: Array) -> tuple[Array, Array, Array | None]:
            Sigma = None if policy.Sigma is None else policy.Sigma(t)[0]
            return policy.K(t)[0], policy.k(t)[0], Sigma

        return self._solve(gains)

    def optimal_value(self) -> QuadraticValue:
        """V*: the same system under the policy that is greedy for it, which makes it the Riccati equation."""

        def gains(t: Array, c: Coefficients, P: Array, p: Array) -> tuple[Array, Array, Array | None]:
            R_inv = np.linalg.inv(c.R)
            Sigma = self.gamma * R_inv if self.gamma > 0 else None
            return c.K_ref - R_inv @ c.B.T @ P, c.k_ref + R_inv @ c.B.T @ p, Sigma

        return self._solve(gains)

    def greedy(self, value: QuadraticValue) -> LinearPolicy:
        """N(a_ref + R^-1 B' grad V, gamma R^-1): a step of policy iteration (Newton-Kleinman)."""

        def K(t: Array) -> Array:
            c = self.at(t)
            return c.K_ref - np.linalg.solve(c.R, c.B.swapaxes(1, 2) @ value.P(t))

        def k(t: Array) -> Array:
            c = self.at(t)
            return c.k_ref + np.linalg.solve(c.R, c.B.swapaxes(1, 2) @ value.p(t)[..., None])[..., 0]

        return LinearPolicy(K, k, (lambda t: self.gamma * np.linalg.inv(self.at(t).R)) if self.gamma > 0 else None)

    def optimal_policy(self) -> LinearPolicy:
        """pi*."""
        return self.greedy(self.optimal_value())

    def _solve(
        self, gains: Callable[[Array, Coefficients, Array, Array], tuple[Array, Array, Array | None]]
    ) -> QuadraticValue:
        if not np.isfinite(self.at(np.zeros(1)).R).all():
            raise ValueError("R is infinite, because eta = 0 is an ODE: neither path KL nor V exists; take eta > 0")
        n, T = len(self.h), self.horizon

        def backward(tau: float, y: Array) -> Array:
            t = np.array([T - tau])
            c, P, p, z = self.at(t)[0], y[: n * n].reshape(n, n), y[n * n : -1], y[-1]
            K, k, Sigma = gains(t, c, P, p)
            dK, dk = K - c.K_ref, k - c.k_ref
            A, d = c.A + c.B @ K, c.d + c.B @ k
            P_dot = P @ A + A.T @ P + c.Q + dK.T @ c.R @ dK - self.discount * P
            p_dot = A.T @ p - P @ d - dK.T @ c.R @ dk - self.discount * p
            z_dot = p @ d - np.trace(c.SS @ P) / 2 - dk @ c.R @ dk / 2 - self.discount * z
            if Sigma is not None:
                entropy = (len(c.R) * np.log(2 * np.pi * np.e) + np.linalg.slogdet(Sigma)[1]) / 2
                z_dot += self.gamma * entropy - np.trace(c.R @ Sigma) / 2
            return np.concatenate([P_dot.ravel(), p_dot, [z_dot]])

        start = np.concatenate([self.G.ravel(), self.h, [self.r0]])
        solution = _integrate(backward, T, start)
        return QuadraticValue(
            P=lambda t: solution(T - t)[:, : n * n].reshape(-1, n, n),
            p=lambda t: solution(T - t)[:, n * n : -1],
            z=lambda t: solution(T - t)[:, -1],
        )

    def moments(self, policy: LinearPolicy) -> Moments:
        """Mean and covariance of the state under a policy; exploration does not change them."""
        n = len(self.h)

        def forward(t_: float, y: Array) -> Array:
            t = np.array([t_])
            m, C = y[:n], y[n:].reshape(n, n)
            A, d, SS = self._closed_loop(policy, t)
            return np.concatenate([A @ m + d, (A @ C + C @ A.T + SS).ravel()])

        solution = _integrate(forward, self.horizon, np.concatenate([self.mean0, self.cov0.ravel()]))
        return Moments(mean=lambda t: solution(t)[:, :n], covariance=lambda t: solution(t)[:, n:].reshape(-1, n, n))

    def _closed_loop(self, policy: LinearPolicy, t: Array) -> tuple[Array, Array, Array]:
        """A + BK, d + Bk, SS' at one time."""
        c = self.at(t)[0]
        return c.A + c.B @ policy.K(t)[0], c.d + c.B @ policy.k(t)[0], c.SS

    def J(self, policy: LinearPolicy) -> float:
        """J = E V(0, X_0)."""
        return self.value(policy).expectation(0.0, self.mean0, self.cov0)

    def J_optimal(self) -> float:
        """J*."""
        return self.optimal_value().expectation(0.0, self.mean0, self.cov0)

    def path_kl(self, policy: LinearPolicy) -> float:
        """KL(P || P_ref) in nats: minus the J of the problem whose only cost is the KL rate."""
        return -self.kl_problem().J(dataclasses.replace(policy, Sigma=None))

    def kl_problem(self) -> LQ:
        """The problem with no reward and R = (S^-1 B)'(S^-1 B), whose -J is the path KL."""

        def at(t: Array) -> Coefficients:
            c = self.at(t)
            return dataclasses.replace(c, Q=0 * c.Q, R=c.B.swapaxes(1, 2) @ np.linalg.solve(c.SS, c.B))

        return dataclasses.replace(self, at=at, G=0 * self.G, h=0 * self.h, r0=0.0, gamma=0.0, discount=0.0)

    def grad_J(self, policy: LinearPolicy, features: LinearPolicy) -> Array:
        """dJ/dtheta_j of the policy a + theta_j phi_j at theta = 0, (J,), by the continuous-time policy gradient

            grad J = E of the integral of e^{-rho t} phi_j' [B' grad V - R (a - a_ref)] dt,

        phi_j = K_j x + k_j; features: K (n_t, J, m, n), k (n_t, J, m).
        """
        value, moments = self.value(policy), self.moments(policy)

        def density(t_: float) -> Array:
            t = np.array([t_])
            c = self.at(t)[0]
            M = -c.B.T @ value.P(t)[0] - c.R @ (policy.K(t)[0] - c.K_ref)
            n = c.B.T @ value.p(t)[0] - c.R @ (policy.k(t)[0] - c.k_ref)
            m, C = moments.mean(t)[0], moments.covariance(t)[0]
            w = M @ m + n  # E of the bracket, and below E[bracket x']
            wx = M @ C + np.outer(w, m)
            phi = np.einsum("jab,ab->j", features.K(t)[0], wx) + features.k(t)[0] @ w
            return np.exp(-self.discount * t_) * phi

        return quad_vec(density, 0.0, self.horizon, epsabs=1e-13, epsrel=1e-11, limit=400)[0]

    def closed_loop(self, policy: LinearPolicy) -> Callable[[float, float], LinearStep]:
        """The exact transition X(t1) | X(t0) under a policy, for `ctrl.solvers.Exact`."""
        n = len(self.h)

        def forward(t_: float, y: Array) -> Array:
            t = np.array([t_])
            A, d, SS = self._closed_loop(policy, t)
            phi, b, C = y[: n * n].reshape(n, n), y[n * n : n * n + n], y[n * n + n :].reshape(n, n)
            return np.concatenate([(A @ phi).ravel(), A @ b + d, (A @ C + C @ A.T + SS).ravel()])

        def between(t0: float, t1: float) -> LinearStep:
            start = np.concatenate([np.eye(n).ravel(), np.zeros(n), np.zeros(n * n)])
            y = solve_ivp(forward, (t0, t1), start, method="DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
            phi, b, C = (torch.from_numpy(v) for v in (y[: n * n].reshape(n, n), y[n * n : n * n + n], y[n * n + n :]))
            C = C.reshape(n, n)
            return LinearStep(phi, b, Matrix(cholesky((C + C.T) / 2, "the transition's covariance")))

        return between


def _integrate(f: Callable[[float, Array], Array], horizon: float, start: Array) -> Coefficient:
    """Dense solution of y' = f(t, y): t (n,) -> (n, len(y))."""
    result = solve_ivp(f, (0.0, horizon), start, **_ODE)
    if not result.success:
        raise ValueError(f"the ODE of the linear-quadratic problem has no solution on [0, {horizon}]: {result.message}")
    return lambda t: result.sol(np.clip(t, 0.0, horizon)).T


def _numpy(t: Tensor) -> Array:
    return np.atleast_1d(t.detach().cpu().numpy().astype(np.float64))


def _at(coefficient: Coefficient, t: Tensor, like: Tensor) -> Tensor:
    """A coefficient at times t (B,), as a tensor like x. Times repeat in a rollout: each is evaluated once."""
    nodes, index = np.unique(_numpy(t), return_inverse=True)
    return torch.from_numpy(np.ascontiguousarray(coefficient(nodes)[index])).to(like)


@dataclass(frozen=True)
class LQProblem(Problem):
    """Constant matrices as a `ctrl.Problem`: dX = (AX + Ba + d) dt + S dW, a_ref = 0.

    Matrices are (n, n), B is (n, m), vectors (n,), as tensors in float64. R must be positive definite, Q, G and cov0
    symmetric, S invertible.
    """

    A: Tensor
    B: Tensor
    S: Tensor
    R: Tensor
    Q: Tensor
    G: Tensor
    h: Tensor
    d: Tensor
    mean0: Tensor
    cov0: Tensor
    horizon: float = 1.0
    gamma: float = 0.0
    discount: float = 0.0
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        n, m = len(self.A), self.B.shape[-1]
        expected = {"A": (n, n), "B": (n, m), "S": (n, n), "R": (m, m), "Q": (n, n), "G": (n, n),
                    "h": (n,), "d": (n,), "mean0": (n,), "cov0": (n, n)}  # fmt: skip
        for name, shape in expected.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {shape}, got {tuple(getattr(self, name).shape)}")
        for name in ("R", "cov0"):
            cholesky(getattr(self, name), name)
        for name in ("Q", "G"):
            if not torch.allclose(getattr(self, name), getattr(self, name).mT):
                raise ValueError(f"{name} must be symmetric")
        if not (self.horizon > 0 and self.gamma >= 0 and self.discount >= 0):
            raise ValueError(
                f"horizon must be > 0, gamma and discount >= 0, got {self.horizon}, {self.gamma}, {self.discount}"
            )
        object.__setattr__(self, "shape", (n,))

    @cached_property
    def exact(self) -> LQ:
        """The exact answers."""
        a = {name: getattr(self, name).double().numpy() for name in ("A", "B", "S", "R", "Q", "G", "h", "d")}
        m = self.B.shape[1]
        fixed = Coefficients(
            a["A"], a["B"], a["d"], a["S"] @ a["S"].T, a["Q"], a["R"], np.zeros((m, len(a["A"]))), np.zeros(m)
        )
        return LQ(
            at=lambda t: Coefficients(*(constant(getattr(fixed, f.name))(t) for f in dataclasses.fields(fixed))),
            G=a["G"],
            h=a["h"],
            mean0=self.mean0.double().numpy(),
            cov0=self.cov0.double().numpy(),
            horizon=self.horizon,
            gamma=self.gamma,
            discount=self.discount,
        )

    def initial(self, noise: Noise, ids: Tensor, cond: Any = None) -> Tensor:
        root = Matrix(cholesky(self.cov0, "cov0").to(ids.device))
        return self.mean0.to(ids.device) + root.apply(noise.normal(ids, self.shape, INITIAL))

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.A.to(x).mT + self.d.to(x)

    def control(self, t: Tensor) -> LinOp:
        return Matrix(self.B)

    def clock(self, t: Tensor) -> Tensor:
        return t

    def rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @property
    def root(self) -> LinOp:
        return Matrix(self.S)

    def reference(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return x.new_zeros(len(x), self.B.shape[1])

    def penalty(self, t: Tensor) -> LinOp:
        return Matrix(self.R)

    def state_cost(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return (x @ self.Q.to(x) * x).sum(1) / 2

    def reward(self, x: Tensor, cond: Any = None) -> Tensor:
        return -(x @ self.G.to(x) * x).sum(1) / 2 + x @ self.h.to(x)
