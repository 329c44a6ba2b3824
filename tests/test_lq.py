"""Linear-quadratic control: V against its equation, the optimum against alternatives, grad J against differences."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ctrl
from ctrl import Estimate, Noise, advantage_rate, greedy_policy, grids, rollout, z_bound
from tests.strategies import SEEDS, lqs, normal, states
from toy import catalogue
from toy.lq import LinearPolicy, constant


def random_policy(problem, seed, explore=False):
    """Full random K(t) = K0 + t K1, k(t) = k0 + t k1."""
    g = torch.Generator().manual_seed(seed)
    n, m = problem.B.shape
    K0, K1, k0, k1 = (0.5 * normal(g, *shape).numpy() for shape in ((m, n), (m, n), (m,), (m,)))
    root = normal(g, m, m).numpy()
    return LinearPolicy(
        K=lambda t: K0 + t[:, None, None] * K1,
        k=lambda t: k0 + t[:, None] * k1,
        Sigma=constant(root @ root.T + 0.3 * np.eye(m)) if explore else None,
    )


def time_derivative(f, t, h=1e-3):
    """Central difference of order 6. Relative errors: truncation (rate h)^6/140, 5e-7 at a rate of 200 (B R^-1 B' P may
    be that large); the ODE solver's 1e-11 over h, 1e-8. Hence the tolerance of 1e-6 on residuals."""
    terms = ((1, 45), (2, -9), (3, 1))
    return sum(c * (f(t + k * h) - f(t - k * h)) for k, c in terms) / (60 * h)


def generator(problem, critic, t, x, a):
    """dV/dt + <b0 + B a, grad V> + ½ tr(SS' hess V) - rho V - l - ½|a|²_R, from the problem's own parts and
    autograd."""
    grad = critic.grad(t, x)
    hess = torch.stack([torch.autograd.functional.jacobian(lambda y, i=i: critic.grad(t[i : i + 1], y), x[i : i +
    1])[0, :, 0]
                        for i in range(len(x))])  # fmt: skip
    S = problem.S
    drift = problem.drift(t, x) + problem.control(t).apply(a)
    cost = problem.running_cost(t, x, a, problem.reference(t, x))
    dt = time_derivative(lambda u: critic.value(u, x), t)
    trace = torch.einsum("ij,bji->b", S @ S.mT, hess) / 2
    return dt + (drift * grad).sum(1) + trace - problem.discount * critic.value(t, x) - cost


def inside(problem, seed):
    t, x = states(problem, seed=seed)
    return 0.03 + t * (1 - 0.06 / problem.horizon), x  # room for the time difference


@given(lqs(), SEEDS)
def test_value_solves_its_equation(problem, seed):
    """Policy evaluation: E_pi of the generator + gamma Ent = 0, for an exploring linear policy."""
    policy = random_policy(problem, seed, explore=True)
    critic = problem.exact.value(policy)
    t, x = inside(problem, seed)
    law = policy.explore()(t, x)
    R = problem.penalty(t)
    residual = generator(problem, critic, t, x, law.mean) - R.trace_of(law.root, law.dim) / 2
    residual = residual + problem.gamma * law.entropy()
    scale = 1 + critic.value(t, x).abs() + time_derivative(lambda u: critic.value(u, x), t).abs()
    assert float((residual / scale).abs().max()) < 1e-6
    end = torch.full_like(t, problem.horizon)
    torch.testing.assert_close(critic.value(end, x), problem.reward(x), rtol=1e-12, atol=1e-12)


@given(lqs(), SEEDS)
def test_optimal_value_solves_the_hjb_equation(problem, seed):
    """max over pi of the generator + gamma Ent = 0: here gamma log of the integral of exp(H/gamma), in closed form."""
    critic = problem.exact.optimal_value()
    t, x = inside(problem, seed)
    u = torch.linalg.solve(problem.R, problem.B.mT) @ critic.grad(t, x)[..., None]
    H = generator(problem, critic, t, x, u[..., 0])
    m = len(problem.R)
    soft = problem.gamma / 2 * (m * np.log(2 * np.pi * problem.gamma) - torch.linalg.slogdet(problem.R).logabsdet)
    scale = 1 + critic.value(t, x).abs() + time_derivative(lambda v: critic.value(v, x), t).abs()
    assert float(((H + soft) / scale).abs().max()) < 1e-6


@given(lqs(), SEEDS)
def test_optimal_q_is_gamma_log_of_the_optimal_policy(problem, seed):
    """q* = gamma log pi*, pi* = N(R^-1 B' grad V*, gamma R^-1), and q* is largest at u*."""
    lq = problem.exact
    critic, policy = lq.optimal_value(), lq.optimal_policy().explore()
    t, x = inside(problem, seed)
    law, zero = policy(t, x), problem.reference(t, x)
    a = law.sample(normal(torch.Generator().manual_seed(seed), *law.mean.shape))
    q = advantage_rate(problem, t, a, law.mean, zero, critic.grad(t, x), law.root)
    torch.testing.assert_close(q, problem.gamma * law.log_prob(a), rtol=1e-8, atol=1e-8)
    best = advantage_rate(problem, t, law.mean, law.mean, zero, critic.grad(t, x), law.root)
    assert bool((q <= best).all())


@given(lqs(), SEEDS)
def test_soft_greedy_policy_of_the_exact_critic_is_the_optimum(problem, seed):
    """greedy_policy(V*) = pi*: mean and the covariance gamma R^-1."""
    lq = problem.exact
    t, x = states(problem, seed=seed)
    greedy, exact = greedy_policy(problem, lq.optimal_value())(t, x), lq.optimal_policy().explore()(t, x)
    torch.testing.assert_close(greedy.mean, exact.mean, rtol=1e-8, atol=1e-8)
    covariance = greedy.root.m @ greedy.root.m.mT
    torch.testing.assert_close(covariance @ problem.R, problem.gamma * torch.eye(len(problem.R)), rtol=1e-8, atol=1e-10)


@given(lqs(), SEEDS)
def test_q_of_any_policy_is_normalised(problem, seed):
    """Jia & Zhou: the integral of (q - gamma log pi) pi da = 0, by Gauss-Hermite quadrature (exact: q is quadratic)."""
    policy = random_policy(problem, seed, explore=True)
    critic = problem.exact.value(policy)
    t, x = states(problem, n=1, seed=seed)
    law = policy.explore()(t, x)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(3))
    xi = torch.cartesian_prod(*[nodes] * law.dim).reshape(-1, law.dim)
    mass = torch.cartesian_prod(*[weights / weights.sum()] * law.dim).reshape(-1, law.dim).prod(1)
    wide = ctrl.Gaussian(law.mean.expand(len(xi), -1), law.root)
    a = wide.sample(xi)
    t, s = t.expand(len(xi)), wide.mean
    q = advantage_rate(problem, t, a, s, torch.zeros_like(s), critic.grad(t, x.expand(len(xi), -1)), law.root)
    terms = q - problem.gamma * wide.log_prob(a)
    assert abs(float((mass * terms).sum())) < 1e-10 * float(1 + (mass * q.abs()).sum())


@settings(max_examples=10)
@given(lqs(), SEEDS)
def test_no_linear_policy_beats_the_optimum(problem, seed):
    lq = problem.exact
    assert lq.J(random_policy(problem, seed, explore=True)) < lq.J_optimal()
    assert lq.J(lq.optimal_policy()) == pytest.approx(lq.J_optimal(), rel=1e-9, abs=1e-9)


@given(lqs(), SEEDS)
def test_J_by_value_and_by_moments_agree(problem, seed):
    """E V(0, X_0) = E r - integral of E c, the second from the forward moments (backward against forward ODE)."""
    lq, policy = problem.exact, random_policy(problem, seed, explore=True)
    assert J_forward(lq, policy) == pytest.approx(lq.J(policy), rel=1e-8, abs=1e-8)


def J_forward(lq, policy):
    from scipy.integrate import quad

    moments = lq.moments(policy)

    def second(t):
        m, C = moments.mean(t)[0], moments.covariance(t)[0]
        return m, C + np.outer(m, m)

    def rate(s):
        t = np.array([s])
        (m, M), Sigma, c = second(t), policy.Sigma(t)[0], lq.at(t)[0]
        K, k, R = policy.K(t)[0] - c.K_ref, policy.k(t)[0] - c.k_ref, c.R
        action = np.trace(R @ (K @ M @ K.T + np.outer(K @ m, k) + np.outer(k, K @ m) + np.outer(k, k) + Sigma))
        entropy = (len(R) * np.log(2 * np.pi * np.e) + np.linalg.slogdet(Sigma)[1]) / 2
        return np.exp(-lq.discount * s) * ((np.trace(c.Q @ M) + action) / 2 - lq.gamma * entropy)

    m, M = second(np.array([lq.horizon]))
    end = np.exp(-lq.discount * lq.horizon) * (-np.trace(lq.G @ M) / 2 + lq.h @ m + lq.r0)
    return end - quad(rate, 0, lq.horizon, epsabs=1e-12, epsrel=1e-11)[0]


@settings(max_examples=12)
@given(lqs(), SEEDS)
def test_performance_difference(problem, seed):
    """J(pi') - J(pi) = E_{pi'} of the integral of e^{-rho t} (q_pi(a') - gamma log pi'(a')) dt, deterministic
    policies (gamma = 0)."""
    from scipy.integrate import quad

    problem = dataclasses.replace(problem, gamma=0.0)
    lq, old, new = problem.exact, random_policy(problem, seed), random_policy(problem, seed + 1)
    value, moments = lq.value(old), lq.moments(new)
    d = problem.shape[0]
    eye = torch.eye(d)

    def rate(s):
        t = np.array([s])
        m, root = (
            torch.from_numpy(moments.mean(t)[0]),
            torch.linalg.cholesky(torch.from_numpy(moments.covariance(t)[0])),
        )
        # q is quadratic in x: the 2d cubature points m +- sqrt(d) L e_i integrate it exactly
        x = torch.cat([m + d**0.5 * eye @ root.mT, m - d**0.5 * eye @ root.mT])
        tt = torch.full((2 * d,), s)
        q = advantage_rate(problem, tt, new(tt, x), old(tt, x), problem.reference(tt, x), value.grad(tt, x))
        return float(np.exp(-lq.discount * s) * q.mean())

    difference = quad(rate, 0, lq.horizon, epsabs=1e-11, epsrel=1e-10)[0]
    scale = 1 + abs(lq.J(new)) + abs(lq.J(old))
    assert abs(difference - (lq.J(new) - lq.J(old))) < 1e-8 * scale


@given(lqs(), SEEDS)
def test_policy_gradient_equals_finite_differences(problem, seed):
    """grad J by the continuous-time formula = central differences of the exact J, every entry of K and k."""
    lq, policy = problem.exact, random_policy(problem, seed)
    n, m = problem.B.shape
    J = m * n + m
    K = np.concatenate([np.eye(m * n).reshape(-1, m, n), np.zeros((m, m, n))])
    k = np.concatenate([np.zeros((m * n, m)), np.eye(m)])
    features = LinearPolicy(K=lambda t: t[:, None, None, None] * K, k=lambda t: np.broadcast_to(k, (len(t), J, m)))
    exact = lq.grad_J(policy, features)
    direction = normal(torch.Generator().manual_seed(seed), J).numpy()
    direction /= np.linalg.norm(direction)

    def J_at(h):
        step = LinearPolicy(
            K=lambda t: policy.K(t) + h * np.einsum("j,tjab->tab", direction, features.K(t)),
            k=lambda t: policy.k(t) + h * direction @ k,
        )
        return lq.J(step)

    h = 1e-3
    difference = (8 * (J_at(h) - J_at(-h)) - (J_at(2 * h) - J_at(-2 * h))) / (12 * h)
    assert exact @ direction == pytest.approx(difference, rel=1e-6, abs=1e-6)


@pytest.mark.long
@settings(max_examples=8)
@given(lqs(gammas=st.just(0.0)), SEEDS)
def test_policy_iteration_is_newton(problem, seed):
    """Greedy steps on exact values raise J and end at the optimum, quadratically (Newton-Kleinman)."""
    lq = problem.exact
    policy, gaps = lq.reference, []
    for _ in range(7):
        gaps.append(lq.J_optimal() - lq.J(policy))
        policy = lq.greedy(lq.value(policy))
    scale = 1 + abs(lq.J_optimal())
    assert all(after <= before + 1e-9 * scale for before, after in pairwise(gaps))
    assert abs(gaps[-1]) < 1e-8 * scale


@settings(max_examples=10)
@given(lqs(), SEEDS)
def test_path_kl_and_its_gradient(problem, seed):
    """KL(P || P_ref) = integral of ½ E |S^-1 B a|², by forward moments; zero at the reference; its gradient by
    finite differences."""
    from scipy.integrate import quad

    lq, policy = problem.exact, random_policy(problem, seed)
    moments, W = lq.moments(policy), torch.linalg.solve(problem.S, problem.B).numpy()

    def rate(s):
        t = np.array([s])
        m, C = moments.mean(t)[0], moments.covariance(t)[0]
        M, K, k = W @ policy.K(t)[0], policy.K(t)[0], policy.k(t)[0]
        centre = W @ (K @ m + k)
        return (np.trace(M @ C @ M.T) + centre @ centre) / 2

    assert lq.path_kl(policy) == pytest.approx(quad(rate, 0, lq.horizon, epsabs=1e-11)[0], rel=1e-8)
    assert lq.path_kl(lq.reference) == pytest.approx(0.0, abs=1e-12)
    exploring = random_policy(problem, seed, explore=True)  # the same mean: exploration leaves the state's law alone
    assert lq.path_kl(exploring) == lq.path_kl(policy)
    features = LinearPolicy(K=lambda t: policy.K(t)[:, None], k=lambda t: policy.k(t)[:, None])
    gradient = -lq.kl_problem().grad_J(policy, features)[0]  # along a -> (1 + theta) a

    def kl_at(c):
        return lq.path_kl(LinearPolicy(K=lambda t: c * policy.K(t), k=lambda t: c * policy.k(t)))

    assert gradient == pytest.approx((kl_at(1 + 1e-4) - kl_at(1 - 1e-4)) / 2e-4, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["lq-1d", "lq-4d"])
def test_value_by_monte_carlo(name):
    """V(0, x) of the optimum = mean of e^{-rho T} r - integral of e^{-rho t} (c - gamma Ent), exact transitions,
    trapezoid."""
    entry = catalogue.get(name)
    problem, lq = entry.problem, entry.exact.exact
    policy = lq.optimal_policy()
    n, start = 4_000, problem.mean0.expand(4_000, -1)
    times = grids.uniform(problem, 64)
    path = rollout(
        problem, policy, times, Noise(1), torch.arange(n), solver=ctrl.Exact(lq.closed_loop(policy)), start=start
    )

    def cost(t, x, cond=None):
        law = policy.explore()(t, x)
        c = problem.running_cost(t, x, law.mean, problem.reference(t, x))
        c = c + problem.penalty(t).trace_of(law.root, law.dim) / 2 - problem.gamma * law.entropy()
        return torch.exp(-problem.discount * t) * c

    reward = torch.exp(-problem.discount * times[-1]) * problem.reward(path.x[-1])
    total = reward - path.integrate(cost)
    truth = entry.value.value(torch.zeros(1), problem.mean0[None])[0]
    estimate = Estimate.of(total)
    # the trapezoid's own bias: O(dt²) = 1/3 of the change from 32 to 64 steps, on the same paths
    half = dataclasses.replace(path, t=times[::2], x=path.x[::2], w=grids.trapezoid(problem, times[::2]))
    coarse = reward - half.integrate(cost)
    bias = float((total - coarse).mean().abs()) / 3
    assert abs(float(estimate.mean - truth)) < z_bound(2) * float(estimate.stderr) + 2 * bias
    assert bias < float(estimate.stderr)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("R", torch.tensor([[-1.0]])),
        ("cov0", torch.tensor([[0.0]])),
        ("B", torch.eye(2)),
        ("horizon", 0.0),
        ("gamma", -1.0),
        ("discount", -1.0),
    ],
)
def test_wrong_input(name, value):
    problem = catalogue.get("lq-1d").exact
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(problem, **{name: value})


def test_sigma_is_needed_to_explore():
    with pytest.raises(ValueError, match="Sigma"):
        catalogue.get("gaussian-1d").exact.lq.reference.explore()


@pytest.mark.parametrize("name", ["Q", "G"])
def test_costs_are_symmetric(name):
    problem = catalogue.get("lq-4d").exact
    with pytest.raises(ValueError, match=f"{name} must be symmetric"):
        dataclasses.replace(problem, **{name: torch.eye(4) + torch.eye(4).roll(1, 0)})


def test_a_value_that_explodes_is_refused():
    """P. = P² - ... with P(T) = -10 escapes before t = 0: there is no optimum."""
    problem = dataclasses.replace(catalogue.get("lq-1d").exact, G=torch.tensor([[-10.0]]))
    with pytest.raises(ValueError, match="no solution"):
        problem.exact.optimal_value()


def test_values_hold_to_the_ends():
    """A time that rounding moved beyond [0, T] is read at the end."""
    problem = catalogue.get("lq-1d").exact
    value, T = problem.exact.optimal_value(), problem.horizon
    outside, ends, x = torch.tensor([-1e-3, T + 1e-3]), torch.tensor([0.0, T]), torch.ones(2, 1)
    assert torch.equal(value.value(outside, x), value.value(ends, x))
