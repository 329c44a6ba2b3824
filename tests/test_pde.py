"""The 1-D solver against closed forms derived here, against itself by two routes, and its order of convergence.

Tolerances are the errors that the solutions state, propagated where a quantity is built from several.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from ctrl import (
    GaussianPolicy,
    IsotropicNormal,
    LinOp,
    Matrix,
    Noise,
    Problem,
    Scalar,
    ScoreAsAction,
    VPLinear,
    advantage_rate,
    fit_order,
    greedy_policy,
    kl_rate,
)
from toy.pde import FIRST, SECOND, Mesh, evaluate, expectation, gradient, objective, optimum

VP = VPLinear(0.1, 8.0)
S_MIN = 1e-3
T = 1 - S_MIN
COARSE = Mesh(n=201)
"""Enough for quadratic values, whose only error is in time."""


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def bulk(horizon: float = T, reach: float = 4.0) -> tuple[Tensor, Tensor]:
    """Times over [0, horizon] and states over |x| <= reach, all pairs: (B,), (B, 1)."""
    t, x = torch.meshgrid(
        torch.linspace(0, horizon, 23, dtype=torch.float64),
        torch.linspace(-reach, reach, 61, dtype=torch.float64),
        indexing="ij",
    )
    return t.ravel(), x.reshape(-1, 1)


def quadratic(target: float) -> Any:
    return lambda x, cond: -((x[:, 0] - target) ** 2) / 2


@dataclass(frozen=True)
class Mixture:
    """Data sum_i w_i N(mu_i, c_i) under VP, and what is closed about it."""

    w: Tensor
    mu: Tensor
    c: Tensor

    def parts(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances of the components of p_s, (B, K)."""
        alpha = VP.alpha(s)[:, None]
        return alpha * self.mu, alpha**2 * self.c + VP.sigma(s)[:, None] ** 2

    def score(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        mean, v = self.parts((1 - t).clamp(S_MIN, 1))
        p = torch.softmax(self.w.log() - (x - mean) ** 2 / v / 2 - v.log() / 2, 1)
        return (p * (mean - x) / v).sum(1, keepdim=True)

    def tilted(self, t: Tensor, x: Tensor, target: float, beta: float) -> Tensor:
        """beta log E[exp(-(Y - target)²/(2 beta))] over Y ~ p(x_{s_min} | X_s = x): V* at eta = 1, where the reference
        is the time reversal of the noising. Y is a mixture; a component N(m, v) contributes
        (1 + v/beta)^-½ exp(-(m - target)²/(2 (v + beta)))."""
        s = 1 - t
        a, q = (c[:, None] for c in VP.between(s, S_MIN))
        mean0, v0 = self.parts(number(S_MIN).reshape(1))
        mean, v = self.parts(s)
        post = mean0 + a * v0 / v * (x - mean)
        v_post = v0 * q / v
        log_p = torch.log_softmax(self.w.log() - (x - mean) ** 2 / v / 2 - v.log() / 2, 1)
        tilt = -((post - target) ** 2) / (v_post + beta) / 2 - torch.log1p(v_post / beta) / 2
        return beta * torch.logsumexp(log_p + tilt, 1)


def mixture(*parts: tuple[float, float, float]) -> Mixture:
    return Mixture(*torch.tensor(parts, dtype=torch.float64).T)


ONE = mixture((1.0, 1.0, 0.25))
TWO = mixture((0.4, -1.0, 0.2), (0.6, 1.0, 0.15))


def sampling(data: Mixture, reward: Any, eta: float = 1.0, beta: float = 1.0, **options: Any) -> ScoreAsAction:
    return ScoreAsAction(VP, data.score, reward, IsotropicNormal((1,)), (1,), beta, eta, S_MIN, **options)


def end_given(eta: float, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B,) and variance (B,) of Y_T given Y_t = x under the eta-reference of N(1, 1/4).

    Z = (Y - alpha mu)/sqrt(v) is an Ornstein-Uhlenbeck process of rate eta² g²/(2 v), v = sigma² (1 + c e^lambda), and
    g² ds = -sigma² dlambda makes the integral of g²/v equal to log(c + e^-lambda).
    """
    s, end = 1 - t, number(S_MIN)

    def v(s: Tensor) -> Tensor:
        return 0.25 * VP.alpha(s) ** 2 + VP.sigma(s) ** 2

    rho = ((0.25 + torch.exp(-VP.log_snr(end))) / (0.25 + torch.exp(-VP.log_snr(s)))) ** (eta**2 / 2)
    return VP.alpha(end) + rho * (v(end) / v(s)).sqrt() * (x[:, 0] - VP.alpha(s)), v(end) * (1 - rho**2)


@dataclass(frozen=True)
class Regulator(Problem):
    """dX = (A X + B a + d) dt + S dW with everything switched on: state cost, entropy, discount, moving reference."""

    matrices: bool = False
    gamma: float = 0.3
    discount: float = 0.7
    horizon: float = 1.5
    shape: tuple[int, ...] = (1,)
    A, B, d, S, Q, R, G, h = -0.4, 1.3, 0.2, 0.8, 0.9, 0.6, 1.1, 0.5
    K_ref, k_ref = 0.25, -0.3

    def operator(self, value: float) -> LinOp:
        return Matrix(number(value).reshape(1, 1)) if self.matrices else Scalar(value)

    def initial(self, noise: Noise, ids: Tensor, cond: Any = None) -> Tensor:
        raise NotImplementedError

    def drift(self, t: Tensor, x: Tensor) -> Tensor:
        return self.A * x + self.d

    def control(self, t: Tensor) -> LinOp:
        return self.operator(self.B)

    def clock(self, t: Tensor) -> Tensor:
        return t

    def rate(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    @property
    def root(self) -> LinOp:
        return self.operator(self.S)

    def reference(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.K_ref * x + self.k_ref

    def penalty(self, t: Tensor) -> LinOp:
        return self.operator(self.R)

    def state_cost(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.Q * x[:, 0] ** 2 / 2

    def reward(self, x: Tensor, cond: Any = None) -> Tensor:
        return -self.G * x[:, 0] ** 2 / 2 + self.h * x[:, 0]

    def exact(self, t: Tensor, x: Tensor, K: float | None = None, k: float = 0.0, Sigma: float = 1.0) -> Tensor:
        """V = -½ P x² + p x + z of N(Kx + k, Sigma), or of the optimum without K.

        Coefficients of x², x, 1 in V_t + (Ax + Ba + d) V_x - ½ R (a - a_ref)² + ½ S² V_xx - ½ Q x² - ½ R Sigma
        + gamma Ent - rho V = 0 at a = Kx + k. The optimum is the policy that is greedy for its own V, Sigma = gamma/R.
        """

        def back(_: float, y: np.ndarray) -> list[float]:
            P, p, z = y
            dK, dk = (-self.B * P / self.R, self.B * p / self.R) if K is None else (K - self.K_ref, k - self.k_ref)
            var = self.gamma / self.R if K is None else Sigma
            A, d = self.A + self.B * (self.K_ref + dK), self.d + self.B * (self.k_ref + dk)
            explore = -self.R * var / 2 + self.gamma / 2 * math.log(2 * math.pi * math.e * var)
            return [
                2 * A * P + self.Q + self.R * dK**2 - self.discount * P,
                A * p - d * P - self.R * dK * dk - self.discount * p,
                d * p - self.S**2 * P / 2 - self.R * dk**2 / 2 + explore - self.discount * z,
            ]

        ode = solve_ivp(
            back, (0, self.horizon), [self.G, self.h, 0.0], method="DOP853", rtol=1e-12, atol=1e-12, dense_output=True
        )
        P, p, z = torch.from_numpy(ode.sol(self.horizon - t.numpy()))
        return -P * x[:, 0] ** 2 / 2 + p * x[:, 0] + z


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("eta", [0.4, 1.0, 1.8])
def test_optimum_of_gaussian_data(eta: float) -> None:
    V = optimum(sampling(ONE, quadratic(1.5), eta, beta=0.8), COARSE)
    t, x = bulk()
    mean, v = end_given(eta, t, x)
    exact = -((mean - 1.5) ** 2) / (1 + v / 0.8) / 2 - 0.4 * torch.log1p(v / 0.8)
    slope = torch.autograd.functional.jacobian(lambda x: end_given(eta, t, x)[0].sum(), x)[:, 0]
    assert V.error < 1e-6 and V.grad_error < 1e-6
    assert (V.value(t, x) - exact).abs().max() < V.error
    assert (V.grad(t, x)[:, 0] + (mean - 1.5) / (1 + v / 0.8) * slope).abs().max() < V.grad_error


@pytest.mark.parametrize("matrices", [False, True])
def test_optimum_of_the_regulator(matrices: bool) -> None:
    problem = Regulator(matrices)
    V = optimum(problem, COARSE)
    t, x = bulk(problem.horizon)
    assert V.error < 1e-6
    assert (V.value(t, x) - problem.exact(t, x)).abs().max() < V.error


def test_exploring_policy_of_the_regulator() -> None:
    problem = Regulator()
    policy = GaussianPolicy(lambda t, x, cond: -0.5 * x + 0.1, lambda t: Scalar(number(0.7)))
    V = evaluate(problem, policy, COARSE)
    t, x = bulk(problem.horizon)
    assert V.error < 1e-6
    assert (V.value(t, x) - problem.exact(t, x, K=-0.5, k=0.1, Sigma=0.49)).abs().max() < V.error


def test_optimum_of_a_mixture_at_eta_1() -> None:
    V = optimum(sampling(TWO, quadratic(0.5), beta=0.5), Mesh(-8.0, 8.0, 641, 1e-9))
    t, x = bulk()
    assert V.error < 1e-4  # a difference from the coarser mesh; ten times the error
    assert (V.value(t, x) - TWO.tilted(t, x, 0.5, 0.5)).abs().max() < V.error


def test_path_kl_of_a_constant_shift() -> None:
    problem = sampling(TWO, quadratic(0.5), eta=0.6)

    def shifted(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return problem.reference(t, x) + 0.3

    def rate(t: Tensor, x: Tensor) -> Tensor:
        return kl_rate(problem, t, shifted(t, x), problem.reference(t, x))

    kl = expectation(problem, shifted, rate, mesh=COARSE)
    t, x = bulk()
    exact = (1 + 0.36) ** 2 / (8 * 0.36) * 0.09 * (VP.int_g2(1 - t) - VP.int_g2(number(S_MIN)))
    assert (kl.value(t, x) - exact).abs().max() < max(kl.error, 1e-8)
    assert kl.error < 1e-6


def test_objective_is_the_average_of_the_value() -> None:
    problem = sampling(ONE, quadratic(1.5))
    V = evaluate(problem, ONE.score, COARSE)
    t, x = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    mean, v = end_given(1.0, t, x)
    slope = end_given(1.0, t, x + 1)[0] - mean
    narrow = dataclasses.replace(problem, initial=IsotropicNormal((1,), 0.7))
    moved = objective(problem, V, lambda x: torch.distributions.Normal(0.3, number(0.5)).log_prob(x)[:, 0])
    for J, m, std in ((objective(problem, V), 0.0, 1.0), (objective(narrow, V), 0.0, 0.7), (moved, 0.3, 0.5)):
        assert abs(J + float((mean + m * slope - 1.5) ** 2 + slope**2 * std**2 + v) / 2) < V.error


# ---------------------------------------------------------------- order


def test_sixth_order_in_space() -> None:
    """E cos(2 Y_T) = cos(2 mean) e^{-2 variance} under the reference: neither polynomial nor growing."""
    problem = sampling(ONE, lambda x, cond: torch.cos(2 * x[:, 0]))
    t, x = bulk(reach=3.0)
    mean, v = end_given(1.0, t, x)
    slope = torch.autograd.functional.jacobian(lambda x: end_given(1.0, t, x)[0].sum(), x)
    exact, steps = torch.cos(2 * mean) * torch.exp(-2 * v), (60, 80, 120, 160)
    exact_grad = -2 * (torch.sin(2 * mean) * torch.exp(-2 * v))[:, None] * slope
    values, grads = [], []
    for n in steps:
        V = evaluate(problem, ONE.score, Mesh(-8.0, 8.0, n + 1))
        values.append(float((V.value(t, x) - exact).abs().max()))
        grads.append(float((V.grad(t, x) - exact_grad).abs().max()))
        assert values[-1] < V.error and grads[-1] < V.grad_error
    assert abs(fit_order(steps, values) - 6) < 0.5
    assert abs(fit_order(steps, grads) - 6) < 0.5


def test_difference_matrices() -> None:
    """Sixth order: exact on degree 6 (7 and 8 by symmetry) in the middle, on quadratics up to the ends."""
    mesh = Mesh(-1.0, 1.0, 21)
    D1, D2, x = mesh.difference(FIRST, 1), mesh.difference(SECOND, 2), mesh.nodes
    inner = slice(3, -3)
    assert np.allclose((D1 @ x**6)[inner], 6 * x[inner] ** 5, atol=1e-11)
    assert np.allclose((D2 @ x**7)[inner], 42 * x[inner] ** 5, atol=1e-11)
    assert np.allclose(D1 @ x**2, 2 * x, atol=1e-11) and np.allclose(D2 @ x**2, 2, atol=1e-11)


def test_interpolation_is_exact_to_degree_seven() -> None:
    mesh, x = Mesh(-1.0, 1.0, 21), np.linspace(-1, 1, 101)
    nodes, weights = mesh.interpolation(x)
    assert np.allclose((mesh.nodes[nodes] ** 7 * weights).sum(1), x**7, atol=1e-11)


# ---------------------------------------------------------------- two routes to one number


@pytest.mark.parametrize("eta", [0.4, 1.8])
def test_hopf_cole_at_eta_other_than_1(eta: float) -> None:
    """The HJB equation against V* = beta log E_ref exp(r/beta), which is linear (the paths are the eta-reference's)."""
    beta, mesh = 0.8, Mesh(-8.0, 8.0, 481, 1e-9)
    problem = sampling(TWO, quadratic(0.5), eta, beta)
    V = optimum(problem, mesh)
    U = expectation(problem, problem.reference, terminal=lambda x: torch.exp(quadratic(0.5)(x, None) / beta), mesh=mesh)
    t, x = bulk(reach=2.5)
    u = U.value(t, x)
    assert ((V.value(t, x) - beta * u.log()).abs() < V.error + beta * U.error / u).all()
    assert V.error < 1e-4 and beta * U.error / float(u.min()) < 1e-2


@pytest.mark.long
def test_the_greedy_policy_of_the_optimum_attains_it() -> None:
    problem = sampling(TWO, quadratic(0.5), eta=1.8, gamma=0.2)
    mesh = Mesh(-8.0, 8.0, 321, 1e-9)
    V = optimum(problem, mesh)
    W = evaluate(problem, greedy_policy(problem, V), mesh)
    t, x = bulk()
    assert (V.value(t, x) - W.value(t, x)).abs().max() < V.error + W.error


@pytest.mark.long
def test_performance_difference() -> None:
    """J(th') - J(th) = E_th' of the integral of e^{-rho t} q_th(t, Y, s_th'(t, Y)) dt (Jia & Zhou 2023)."""
    problem = sampling(TWO, lambda x, cond: torch.tanh(2 * x[:, 0]), eta=0.7, beta=0.3, discount=0.8)

    def policy(strength: float) -> Any:
        return lambda t, x, cond: problem.reference(t, x) + strength * torch.sin(x) * (1 + t[:, None])

    old, new, mesh = policy(0.5), policy(1.1), Mesh(-8.0, 8.0, 641, 1e-9)
    V, V_new = evaluate(problem, old, mesh), evaluate(problem, new, mesh)

    def regret(t: Tensor, x: Tensor) -> Tensor:
        return advantage_rate(problem, t, new(t, x, None), old(t, x, None), problem.reference(t, x), V.grad(t, x))

    gain = expectation(problem, new, regret, discount=problem.discount, mesh=mesh)
    # q is linear in grad V with the factor kappa (s' - s), of which |.| <= kappa 0.6 (1 + t)
    kappa = problem.kappa(torch.linspace(0, T, 101, dtype=torch.float64)).mean()
    tolerance = V.error + V_new.error + gain.error + float(kappa) * T * 1.2 * V.grad_error
    difference = objective(problem, V_new) - objective(problem, V)
    assert abs(difference) > 1e2 * tolerance
    assert abs(objective(problem, gain) - difference) < tolerance


@pytest.mark.long
def test_gradient_is_the_derivative_of_the_objective() -> None:
    """W against central differences at steps e and 2e, extrapolated; their disagreement bounds what is left."""
    problem = sampling(ONE, lambda x, cond: torch.tanh(2 * x[:, 0]), eta=0.7, beta=0.3, discount=0.8)
    theta, mesh, e = torch.tensor([0.5, -0.4], dtype=torch.float64), Mesh(-8.0, 8.0, 201, 1e-9), 0.02
    direction = torch.tensor([1.0, 0.6], dtype=torch.float64)

    def mean(theta: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return problem.reference(t, x) + theta[0] * torch.sin(theta[1] + x) + theta[1] * t[:, None]

    def J(step: float) -> float:
        moved = theta + step * direction
        return objective(problem, evaluate(problem, lambda t, x, cond: mean(moved, t, x), mesh))

    exact = gradient(problem, mean, theta, mesh=mesh)
    fine, coarse = (J(e) - J(-e)) / (2 * e), (J(2 * e) - J(-2 * e)) / (4 * e)
    left = abs(fine - coarse) / 3 + exact.value.error / e + 1.6 * exact.error
    assert abs(float(exact.grad @ direction) - (4 * fine - coarse) / 3) < left
    assert abs(fine) > 100 * left
    assert J(0.0) == exact.J


# ---------------------------------------------------------------- the critic, and what is refused


@pytest.fixture(scope="module")
def regulator_value() -> Any:
    return optimum(Regulator(), Mesh(-4.0, 4.0, 101, 1e-8))


def test_mixed_times_match_single_times(regulator_value: Any) -> None:
    t, x = bulk(Regulator.horizon, 3.5)
    shuffle = torch.randperm(len(t), generator=torch.Generator().manual_seed(0))
    for method in (regulator_value.value, regulator_value.grad):
        single = torch.cat([method(a, b) for a, b in zip(t.split(61), x.split(61), strict=True)])
        assert torch.allclose(method(t[shuffle], x[shuffle]), single[shuffle], rtol=0, atol=1e-12)
    assert regulator_value.value(t.float(), x.float()).dtype == torch.float32


def test_solving_twice_gives_the_same_numbers(regulator_value: Any) -> None:
    again = optimum(Regulator(), Mesh(-4.0, 4.0, 101, 1e-8))
    t, x = bulk(Regulator.horizon, 3.5)
    assert torch.equal(again.value(t, x), regulator_value.value(t, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 1.0, "high": -1.0}, "low and high"),
        ({"high": math.inf}, "low and high"),
        ({"n": 9}, "n must be"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_mesh_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mesh(**options)


def test_problems_that_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1,\), got \(2,\)"):
        optimum(Regulator(shape=(2,)))
    with pytest.raises(ValueError, match="eta = 0"):
        optimum(sampling(ONE, quadratic(1.0), eta=0.0))
    with pytest.raises(ValueError, match="eta = 0"):
        expectation(sampling(ONE, quadratic(1.0), eta=0.0), ONE.score)
    with pytest.raises(ValueError, match="policy must return the shape of x"):
        expectation(Regulator(), lambda t, x, cond: x[:, 0])
    with pytest.raises(ValueError, match="not finite"):
        expectation(Regulator(), lambda t, x, cond: x.log())
    with pytest.raises(ValueError, match="theta"):
        gradient(Regulator(), lambda theta, t, x: theta * x, number(1.0))


def test_queries_that_are_refused(regulator_value: Any) -> None:
    t, x = torch.zeros(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="x leaves the mesh"):
        regulator_value.value(t, x + 5)
    with pytest.raises(ValueError, match="t leaves"):
        regulator_value.value(t + 2, x)
    with pytest.raises(ValueError, match="t and x must have shapes"):
        regulator_value.value(t, x[:, 0])
    with pytest.raises(ValueError, match="log_density must be given"):
        objective(Regulator(), regulator_value)
    with pytest.raises(ValueError, match="log_density must integrate to 1"):
        objective(Regulator(), regulator_value, lambda x: -(x[:, 0] ** 2))
