"""Rectified flow, alpha = 1 - s and sigma = s (arXiv 2209.03003), against closed forms written out for it alone.

A score a and a velocity v = E[eps - X_0 | X_s = x] say the same: with eps = -s a and X_0 = (x + s² a)/(1 - s),

    v = -(x + s a)/(1 - s),   a = -(x + (1 - s) v)/s,   f = -1/(1 - s),   g² = 2s/(1 - s),

so that on the reverse clock -f x + kappa a = -v + eta² s a/(1 - s), and the KL rate of two velocities is

    ((1 + eta²)²/(8 eta²)) g² |da|² = ((1 + eta²)²/(4 eta²)) ((1 - s)/s) |dv|².

g² is infinite at s = 1, the rate at s = 0: the process is cut at both ends, and the last part of this file is about
what the cuts change.
"""

import dataclasses
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import torchsde
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from torch.distributions import MultivariateNormal, kl_divergence

from ctrl import (
    DDIM,
    Estimate,
    EulerMaruyama,
    Exact,
    Exponential,
    Gaussian,
    Heun,
    IntegratedEuler,
    IsotropicNormal,
    Matrix,
    Multistep2,
    Noise,
    ProbabilityFlow,
    RectifiedFlow,
    ScoreAsAction,
    VPLinear,
    fit_order,
    grids,
    kl_rate,
    path_kl,
    rollout,
    z_bound,
)  # fmt: skip
from ctrl.bridge import RecordedBrownian, sdeint
from tests.strategies import SEEDS, normal, spd, states
from toy import catalogue
from toy.chain import chain_moments
from toy.gaussian import GaussianDiffusion, GaussianLaw, QuadraticReward
from toy.lq import LinearPolicy
from toy.mixture import Mixture, MixtureDiffusion, Noised

EPS = torch.finfo(torch.float64).eps
FLOW = RectifiedFlow(0.9999)
ETAS = [0.0, 0.5, 1.0]
FIRST_ORDER = [EulerMaruyama(), EulerMaruyama(left_noise=True), IntegratedEuler(), Exponential()]
SECOND_ORDER = [Heun(), Multistep2()]


def velocity(s, x, a):
    """v of the score a."""
    return -(x + s * a) / (1 - s)


def score(s, x, v):
    """The score of the velocity v."""
    return -(x + (1 - s) * v) / s


def price(eta):
    """(1 + eta²)²/(4 eta²): what the KL rate at eta is of that at eta = 1."""
    return (1 + eta**2) ** 2 / (4 * eta**2)


def close(a, b, rtol=1e-8, atol=1e-8):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)


def marginal(p, s):
    """N((1 - s) mu, (1 - s)² C + s² I)."""
    return (1 - s) * p.mu, (1 - s) ** 2 * p.C + s**2 * torch.eye(len(p.mu))


def plane(eta=1.0, s_min=0.05, s_max=0.95, **changes):
    """Correlated Gaussian data in two dimensions, a quadratic reward, Y_0 ~ p_{s_max}."""
    reward = QuadraticReward(torch.tensor([[0.6, 0.1], [0.1, 0.4]]), torch.tensor([1.0, -0.5]), 0.2)
    mu, C = torch.tensor([0.8, -0.6]), torch.tensor([[0.5, 0.2], [0.2, 0.3]])
    return dataclasses.replace(GaussianDiffusion(FLOW, mu, C, reward, 0.5, eta, s_min, s_max), **changes)


def named_mixture(name, **changes):
    """A mixture of the catalogue with its data, reward and start, on a rectified flow."""
    changes = {"s_min": 0.02, "s_max": 0.98, **changes}
    return dataclasses.replace(catalogue.get(name).exact, noising=FLOW, **changes)


CUTS = st.tuples(st.floats(0.01, 0.2), st.floats(0.7, 0.99))


@st.composite
def gaussians(draw, etas=st.just(1.0), linear=False):
    """Gaussian data on a rectified flow, 1 to 3 dimensions, any cuts; the reward need not be concave. Y_0 ~ N(0, I)."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    d, beta, (s_min, s_max) = draw(st.integers(1, 3)), draw(st.floats(0.3, 2.0)), draw(CUTS)
    G = torch.zeros(d, d) if linear else spd(g, d, -0.25 * beta, 1.0)  # every covariance here is at most 1.5
    reward, start = QuadraticReward(G, normal(g, d), 0.3), GaussianLaw(torch.zeros(d), torch.eye(d))
    return GaussianDiffusion(FLOW, normal(g, d), spd(g, d), reward, beta, draw(etas), s_min, s_max, start)


@st.composite
def mixtures(draw, d=st.integers(1, 3)):
    """Mixture data on a rectified flow, 1 to 3 components, any cuts, a quadratic or linear reward; eta = 1."""
    g = torch.Generator().manual_seed(draw(SEEDS))
    d, K, beta, (s_min, s_max) = draw(d), draw(st.integers(1, 3)), draw(st.floats(0.3, 2.0)), draw(CUTS)
    G = spd(g, d, -0.5 * beta, 1.0) * draw(st.sampled_from([0.0, 1.0]))
    reward = QuadraticReward(G, normal(g, d), 0.2)
    return MixtureDiffusion(FLOW, random_mixture(g, d, K), reward, beta, 1.0, s_min, s_max)


def random_mixture(g, d, K):
    w = torch.rand(K, generator=g) + 0.1
    return Mixture(w / w.sum(), 1.5 * normal(g, K, d), torch.stack([spd(g, d, 0.05, 0.6) for _ in range(K)]))


# score and velocity


@given(mixtures(), st.floats(0.0, 2.0))
def test_the_drift_is_the_velocity(p, eta):
    """-f x + kappa a = -v + eta² s a/(1 - s), v the score's velocity, which by Bayes is (x - E[X_0 | x])/s. Rounding:
    20 eps of what cancels, |x| and |s a|, over 1 - s >= .01 or s >= .01, with |x|, |s a| and |X_0| below 100: 5e-11."""
    problem = dataclasses.replace(p.problem, eta=eta)
    t, x = states(problem)
    s, a = problem.s(t)[:, None], p.score(t, x)
    v = (x - p.p.posterior_mean(s[:, 0], x)) / s
    close(velocity(s, x, a), v, 1e-10, 1e-10)
    close(problem.velocity(t, x, a), -v + eta**2 * s / (1 - s) * a, 1e-10, 1e-10)


@given(CUTS, SEEDS, st.floats(0.1, 2.0), st.floats(0.1, 2.0))
def test_price_of_a_velocity(cuts, seed, eta, beta):
    """The KL rate ((1 + eta²)²/(4 eta²)) ((1 - s)/s) |dv|²; beta times it is the cost of the action. The probability
    flow has no KL: its cost beta g² |da|²/8 is beta/4 ((1 - s)/s) |dv|². Rounding: eps |a|/|da|, which is eps (|x| +
    |v|)/((1 - s) |dv|), with |dv| >= 1 and 1 - s >= .01."""
    s_min, s_max = cuts
    fields = {"s_min": s_min, "s_max": s_max, "beta": beta}
    made = (FLOW, lambda t, x, c: -x, lambda x, c: x.sum(1), IsotropicNormal((3,)), (3,))
    problem, ode = ScoreAsAction(*made, **fields, eta=eta), ProbabilityFlow(*made, **fields)
    t, x = states(problem, seed=seed)
    v, delta = normal(torch.Generator().manual_seed(seed), 2, *x.shape).unbind(0)
    delta = delta + delta.sign()
    s = problem.s(t)
    a, other = (score(s[:, None], x, u) for u in (v, v + delta))
    rate = (1 - s) / s * delta.square().sum(1)
    close(kl_rate(problem, t, a, other), price(eta) * rate, 1e-10, 0.0)
    close(problem.running_cost(t, x, a, other), beta * price(eta) * rate, 1e-10, 0.0)
    close(ode.running_cost(t, x, a, other), beta * rate / 4, 1e-10, 0.0)


@given(st.floats(1e-3, 0.9989), st.floats(1e-3, 1.0), SEEDS)
def test_without_noise_every_first_order_step_is_eulers_for_the_velocity(s0, fraction, seed):
    """From s_0 to s_1 DDIM takes (1 - s_1) X_0 + s_1 eps with X_0 = x - s_0 v and eps = x + (1 - s_0) v, hence

        (1 - s_1) (x - s_0 v) + s_1 (x + (1 - s_0) v) = x + (s_1 - s_0) v,

    Euler's step for dx/ds = v; so does the exponential step, which is the same at eta = 0, and so does Euler's for the
    reverse drift, which is -v. (Not the step with integrated coefficients.)

    Rounding: eps of the two terms that cancel, c_x x and c_a a. The exponential steps take c_a through e^{-dlambda/2},
    whose exponent is off by eps |lambda|: another eps |lambda| (1 - s_1)/(1 - s_0) s_0² |a|. The times s_max - t are
    off by eps, which moves c_x = (1 - s_1)/(1 - s_0) by eps/(1 - s_0) of itself, and g², f and s_0 likewise. The
    integral of g² is a difference of values up to int_g2(s_max), each rounded by eps/2 of itself."""
    s1 = s0 * (1 - 0.999 * fraction)
    reward, initial = (lambda x, c: x.sum(1)), IsotropicNormal((3,))
    problem = ScoreAsAction(FLOW, lambda t, x, c: -x, reward, initial, (3,), eta=0.0, s_min=s1 / 2, s_max=0.999)
    times = problem.s_max - torch.tensor([s0, s1])
    x, v = normal(torch.Generator().manual_seed(seed), 2, 5, 3).unbind(0)
    a = score(s0, x, v)
    lam = FLOW.log_snr(torch.tensor([s0, s1])).abs().sum()
    kept = (1 - s1) / (1 - s0)
    cancelling = kept * (x.abs() + s0**2 * a.abs() * (1 + lam)) + (s0 - s1) * (x.abs() + s0 * a.abs()) / (1 - s0)
    bound = EPS * cancelling * (1 + 1 / (1 - s0) + 1 / s1)
    for solver in (DDIM(0.0), Exponential(), EulerMaruyama()):
        (c,) = solver.plan(problem, times)
        after = solver.step(problem, c, x, a, torch.zeros_like(x), lambda t, x: a, None)
        assert bool(((after - (x + (s1 - s0) * v)).abs() <= bound).all()), solver
    (c,) = IntegratedEuler().plan(problem, times)
    integrated = IntegratedEuler().transition(problem, c, x, a, None).mean
    by_hand = x + math.log((1 - s1) / (1 - s0)) * x + (s1 - s0 + math.log((1 - s1) / (1 - s0))) * a
    bound = bound + EPS * float(FLOW.int_g2(torch.tensor(0.999))) * a.abs()
    assert bool(((integrated - by_hand).abs() <= bound).all())


def wavy(s, x):
    """A velocity: any smooth function serves."""
    return torch.sin(2 * x) - (0.3 + s) * x


def test_ddim_reproduces_the_flow_match_euler_scheduler():
    """diffusers' steps under a shift of 3, the last of them to s = 0: that is Tweedie's mean, x - s v. diffusers rounds
    states to float32, 12 times, in a flow that stretches errors at most e-fold: 12 e eps = 2e-6."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(0.98, 0.05, 12))
    s = scheduler.sigmas[:-1].double()
    problem = flow_problem(s)
    path = rollout(problem, problem.reference, problem.s_max - s, Noise(5), torch.arange(4), solver=DDIM(0.0))
    x = path.x[0]
    for k, timestep in enumerate(scheduler.timesteps):
        v = wavy(s[k], x)
        x = scheduler.step(v, timestep, x).prev_sample
        last = k + 1 == len(s)
        ours = FLOW.tweedie(s[k], path.x[k], score(s[k], path.x[k], wavy(s[k], path.x[k]))) if last else path.x[k + 1]
        close(ours, x, 1e-5, 1e-5)


def test_heun_reproduces_the_flow_match_heun_scheduler():
    """The same for two evaluations a step, from the second node on: diffusers begins at s = 1, where there is no
    score."""
    from diffusers import FlowMatchHeunDiscreteScheduler

    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    s = scheduler.sigmas[1:-1:2].double()
    problem = flow_problem(s)
    x = Noise(5).normal(torch.arange(4), (3,), 0)
    ours = None
    for k, timestep in enumerate(scheduler.timesteps[:-1]):
        if k == 2:
            ours = rollout(
                problem, problem.reference, problem.s_max - s, Noise(0), torch.arange(4), solver=Heun(), start=x
            ).x[1:]
        x = scheduler.step(wavy(timestep.double() / 1000, x), timestep, x).prev_sample
        if ours is not None and k % 2:
            close(ours[k // 2 - 1], x, 1e-5, 1e-5)
    assert k // 2 == len(ours)


def flow_problem(s):
    """The probability flow of `wavy` over the nodes s."""
    ends = {"s_min": float(s[-1]), "s_max": float(s[0])}

    def policy(t, x, cond=None):
        at = ends["s_max"] - t[:, None]
        return score(at, x, wavy(at, x))

    return ScoreAsAction(FLOW, policy, lambda x, c: x.sum(1), IsotropicNormal((3,)), (3,), eta=0.0, **ends)


# path KL


def moved(p, delta):
    """The reference with delta added to its velocity: da = -((1 - s)/s) delta."""

    def k(t):
        s = np.clip(p.s_max - t, p.s_min, p.s_max)[:, None]
        return p.lq.reference.k(t) - (1 - s) / s * delta.numpy()

    return LinearPolicy(p.lq.reference.K, k)


@settings(max_examples=5)
@given(gaussians(etas=st.floats(0.2, 2.0)), SEEDS)
def test_a_velocity_moved_by_a_constant(p, seed):
    """The rate does not depend on the state, so that

        KL = ((1 + eta²)²/(4 eta²)) |delta|² [log(s_max/s_min) - (s_max - s_min)]:

    each halving of s_min adds (log 2 - s_min/2) |delta|² nats without end, and all of [s_max, 1] together would add
    -log s_max - (1 - s_max) = (1 - s_max)²/2 + ..."""
    delta = normal(torch.Generator().manual_seed(seed), len(p.mu))
    exact = price(p.eta) * float(delta.square().sum()) * (math.log(p.s_max / p.s_min) - (p.s_max - p.s_min))
    assert p.lq.path_kl(moved(p, delta)) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize(("solver", "order"), [(Exponential(), 1), (Heun(), 2), (Multistep2(), 2)], ids=str)
@pytest.mark.parametrize("grid", [grids.log_snr, grids.natural])
def test_path_kl_of_a_velocity_converges_with_the_quadrature(solver, order, grid):
    """`path_kl` on the same, whatever the states: the error is the quadrature's alone."""
    p, delta = plane(), torch.tensor([0.7, -0.4])
    exact = float(delta.square().sum()) * (math.log(p.s_max / p.s_min) - (p.s_max - p.s_min))
    steps, errors = [32, 64, 128], []

    def policy(t, x, cond=None):
        s = p.problem.s(t)[:, None]
        return p.score(t, x) - (1 - s) / s * delta

    for n in steps:
        path = rollout(p.problem, p.score, grid(p.problem, n), Noise(0), torch.arange(2), solver=solver)
        errors.append(float((path_kl(p.problem, path, policy) - exact).abs().max()))
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.1)


def kl_along(problem, policy, law, nodes=48):
    """The integral of E kl_rate over s, x ~ law(s) = (mean, covariance), policy and reference linear: a quadratic has
    the mean of its values at m +- sqrt(d) L e_i. In lambda, where ds = s (1 - s)/2 dlambda, the integrand is analytic,
    and Gauss and Legendre's rule right to rounding."""
    ends = FLOW.log_snr(torch.tensor([problem.s_max, problem.s_min])).tolist()
    total = 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        s = FLOW.s_of_log_snr(torch.tensor(((ends[1] - ends[0]) * node + ends[0] + ends[1]) / 2))
        m, V = law(float(s))
        offsets = len(m) ** 0.5 * torch.linalg.cholesky(V).mT
        x = torch.cat([m + offsets, m - offsets])
        t = (problem.s_max - s).expand(len(x))
        rate = kl_rate(problem, t, policy(t, x), problem.reference(t, x)).mean()
        total += float(weight * (ends[1] - ends[0]) / 2 * s * (1 - s) / 2 * rate)
    return total


@settings(max_examples=12)
@given(gaussians(etas=st.floats(0.2, 2.0)), SEEDS)
def test_the_score_of_other_data(p, seed):
    """With q_s and p_s two laws under one noising, d KL(q_s || p_s)/ds = -½ g² E_q |grad log q_s - grad log p_s|² (both
    solve one Fokker-Planck equation). So the policy grad log q_s from q_{s_max}, whose law is q_s at every eta, has

        KL = ((1 + eta²)²/(4 eta²)) [KL(q_{s_min} || p_{s_min}) - KL(q_{s_max} || p_{s_max})],

    whatever velocity it differs by."""
    g = torch.Generator().manual_seed(seed)
    q = dataclasses.replace(p, mu=normal(g, len(p.mu)), C=spd(g, len(p.mu)))
    found = kl_along(p.problem, q.problem.reference, lambda s: marginal(q, s))
    data, start = (kl_between(q, p, s) for s in (p.s_min, p.s_max))
    assert found == pytest.approx(price(p.eta) * (data - start), rel=1e-9)


def kl_between(q, p, s):
    """KL(q_s || p_s) of Gaussian data."""
    return float(kl_divergence(*(MultivariateNormal(*marginal(law, s)) for law in (q, p))))


X = torch.linspace(-14.0, 14.0, 2801, dtype=torch.float64)
"""On the line, where every mixture here has smooth densities of width .2 at least: sums are exact to rounding."""


def kl_on_the_line(q, p):
    """KL(q || p) of two mixtures in one dimension."""
    log_q, log_p = (law.log_prob(X[:, None]) for law in (q, p))
    return float((log_q.exp() * (log_q - log_p)).sum() * (X[1] - X[0]))


@settings(max_examples=6)
@given(mixtures(d=st.just(1)), SEEDS, st.floats(0.2, 2.0))
def test_the_score_of_another_mixture(p, seed, eta):
    """The same, the rate integrated over q_s on a grid, then over lambda by Gauss and Legendre's rule."""
    other = Noised(random_mixture(torch.Generator().manual_seed(seed), 1, 2), FLOW)
    problem = dataclasses.replace(p.problem, eta=eta)
    ends = FLOW.log_snr(torch.tensor([p.s_max, p.s_min])).tolist()
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(48))
    total = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        s = FLOW.s_of_log_snr(((ends[1] - ends[0]) * node + ends[0] + ends[1]) / 2)
        t = (p.s_max - s).expand(len(X))
        rate = kl_rate(problem, t, other.score(problem.s(t), X[:, None]), p.score(t, X[:, None]))
        expected = (other.at(float(s)).log_prob(X[:, None]).exp() * rate).sum() * (X[1] - X[0])
        total += float(weight * (ends[1] - ends[0]) / 2 * s * (1 - s) / 2 * expected)  # ds = s (1 - s)/2 dlambda
    data, start = (kl_on_the_line(other.at(s), p.p.at(s)) for s in (p.s_min, p.s_max))
    assert total == pytest.approx(price(eta) * (data - start), rel=1e-6)


# value, optimal action, J*


def given_later(p, s, x):
    """X_{s_min} given X_s = x, by Bayes: X_s = A X_{s_min} + noise with A = (1 - s)/(1 - s_min), so the joint law is
    Gaussian with covariance A V_m, and the mean is M + A V_m V_s^-1 (x - (1 - s) mu), the covariance V_m - A² V_m
    V_s^-1 V_m. (eta = 1.)"""
    (m, V), (mean, covariance) = marginal(p, p.s_min), marginal(p, s)
    gain = (1 - s) / (1 - p.s_min) * V @ torch.linalg.inv(covariance)
    return m + gain @ (x - mean), V - (1 - s) / (1 - p.s_min) * gain @ V


def value_by_hand(p, s, x):
    """beta log E[e^{r/beta} | X_s = x], by completing the square: with precision P = W^-1 + G/beta and b = W^-1 m +
    h/beta it is beta [½ b'P^-1 b - ½ m'W^-1 m - ½ log det WP] + r0."""
    m, W = given_later(p, s, x)
    G, h, inverse = p.reward.G / p.beta, p.reward.h / p.beta, torch.linalg.inv(W)
    P, b = inverse + G, inverse @ m + h
    square = b @ torch.linalg.solve(P, b) - m @ inverse @ m - torch.logdet(W @ P)
    return p.beta * square / 2 + p.reward.r0


@given(gaussians(), SEEDS)
def test_value_and_optimal_action_by_bayes(p, seed):
    """Gaussian data at eta = 1: V*, and a* = s_ref + grad V*/beta."""
    t, x = states(p.problem, n=6, seed=seed)
    x.requires_grad_()
    values = torch.stack([value_by_hand(p, p.s_max - t[i], x[i]) for i in range(len(x))])
    (grad,) = torch.autograd.grad(values.sum(), x)
    x = x.detach()
    close(p.value.value(t, x), values.detach())
    close(p.value.grad(t, x), grad)
    laws = [marginal(p, p.s_max - float(u)) for u in t]
    reference = torch.stack([-torch.linalg.solve(V, y - m) for (m, V), y in zip(laws, x, strict=True)])
    close(p.problem.reference(t, x), reference)
    close(p.optimal_policy(t, x), reference + grad / p.beta)


@settings(max_examples=5)
@given(gaussians())
def test_J_star_by_bayes(p):
    """E V* over N(0, I), over which a quadratic has the mean of its values at +-sqrt(d) e_i; J* by the Riccati
    equation."""
    d = len(p.mu)
    points = d**0.5 * torch.cat([torch.eye(d), -torch.eye(d)])
    J = sum(float(value_by_hand(p, p.s_max, y)) for y in points) / (2 * d)
    assert p.lq.J_optimal() == pytest.approx(J, rel=1e-8, abs=1e-8)


@settings(max_examples=5)
@given(gaussians(etas=st.floats(0.2, 1.5), linear=True))
def test_a_linear_reward_moves_the_velocity_by_what_does_not_depend_on_the_state(p):
    """r = h'x + r0: under the reference Y_T given Y_t = y is N(phi y + b, W), so that V* = h'(phi y + b) + r0 +
    h'Wh/(2 beta), and the optimum moves Y_T by W h/beta. Its path KL is h'Wh/(2 beta²), W from s_max, and J* = E V*.
    With u(s) = C + (s/(1 - s))² I, whose d log u/ds = g² V_s^-1 integrates the linear SDE, and k = u(s_min)/u(s),

        phi = k^{(1 + eta²)/2} (1 - s_min)/(1 - s),   W = (1 - k^{eta²}) V at s_min,
        v* - v_ref = -(s/(1 - s)) (2 eta²/(beta (1 + eta²))) phi h."""
    c, U = torch.linalg.eigh(p.C)

    def transition(s):
        at, end = (c + (v / (1 - v)) ** 2 for v in (s, p.s_min))
        phi = (end / at) ** ((1 + p.eta**2) / 2) * (1 - p.s_min) / (1 - s)
        return (U * phi) @ U.mT, (U * (1 - p.s_min) ** 2 * end * (1 - (end / at) ** p.eta**2)) @ U.mT

    h, (phi, W) = p.reward.h, transition(p.s_max)
    nats = float(h @ W @ h) / (2 * p.beta**2)
    anywhere = torch.ones(len(h)), torch.eye(len(h))
    assert kl_along(p.problem, p.optimal_policy, lambda s: anywhere) == pytest.approx(nats, rel=1e-9)
    end = (1 - p.s_min) * p.mu - phi @ ((1 - p.s_max) * p.mu)  # from E Y_0 = 0
    J = float(h @ end) + p.beta * nats + p.reward.r0
    assert p.lq.J_optimal() == pytest.approx(J, rel=1e-8, abs=1e-8)
    law = p.optimal_law()
    close(law.mean, end + W @ h / p.beta)
    close(law.covariance, phi @ phi.mT + W)
    t, x = states(p.problem, n=5)
    gain = 2 * p.eta**2 / (p.beta * (1 + p.eta**2))
    for u, y in zip(t, x, strict=True):
        s = p.s_max - float(u)
        v, v_ref = (velocity(s, y, a(u[None], y[None])[0]) for a in (p.optimal_policy, p.score))
        close(v - v_ref, -s / (1 - s) * gain * transition(s)[0] @ h, 1e-8, 1e-8)


@given(mixtures(), SEEDS)
def test_value_of_a_mixture_solves_the_hjb_equation(p, seed):
    """At eta = 1 in the forward clock, with the velocity v_ref = (x - E[X_0 | x])/s by Bayes,

        -dV/ds + <-v_ref + w s_ref, grad V> + w lap V + (w/beta) |grad V|² = 0,   w = s/(1 - s) = g²/2,

    every derivative by autograd; V* = r at s_min. Rounding: V* is a difference of log-densities whose own parts are up
    to 1/s_min² = 1e4 times larger, and their derivatives so again."""
    t, x = states(p.problem, n=6, seed=seed)
    t, x = t.requires_grad_(), x.requires_grad_()
    value = p.value.value(t, x)
    dt, grad = torch.autograd.grad(value.sum(), (t, x), create_graph=True)
    laplacian = sum(torch.autograd.grad(grad[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(x.shape[1]))
    t, x, grad = t.detach(), x.detach(), grad.detach()
    s = p.s_max - t
    w = s / (1 - s)
    drift = -(x - p.p.posterior_mean(s, x)) / s[:, None] + w[:, None] * p.p.score(s, x)
    parts = dt.detach(), (drift * grad).sum(1), w * laplacian.detach(), w / p.beta * grad.square().sum(1)
    scale = 1 + sum(part.abs() for part in parts)
    assert bool((sum(parts).abs() < 1e-9 * scale).all())
    end = torch.full_like(t, p.problem.horizon)
    close(p.value.value(end, x), p.reward(x))


@settings(max_examples=10)
@given(mixtures(d=st.just(1)), SEEDS)
def test_value_of_a_mixture_by_quadrature(p, seed):
    """V* = beta log E[e^{r/beta} | X_s = y] with p(x | y) ~ p_m(x) N(y; A x, s² - A² s_min²), as a sum over x, where A
    is (1 - s)/(1 - s_min). A tenth of the time is left, where that normal is still six grid points wide: the sum is
    exact to rounding."""
    t, y = states(p.problem, n=5, seed=seed)
    s = p.s_max - 0.9 * t
    A = (1 - s) / (1 - p.s_min)
    log_p = p.p.at(p.s_min).log_prob(X[:, None])
    for i in range(len(y)):
        log_joint = log_p - (y[i] - A[i] * X).square() / (2 * (s[i] ** 2 - A[i] ** 2 * p.s_min**2))
        exact = p.beta * ((log_joint + p.reward(X[:, None]) / p.beta).logsumexp(0) - log_joint.logsumexp(0))
        close(p.value.value(0.9 * t[i : i + 1], y[i : i + 1])[0], exact)


VP = VPLinear(0.1, 20.0)


def in_the_vp_clock(s):
    """(alpha_VP/alpha, s_VP) at the same lambda."""
    at = VP.s_of_log_snr(FLOW.log_snr(torch.as_tensor(s, dtype=torch.float64)))
    return VP.alpha(at) / (1 - torch.as_tensor(s)), at


def as_vp(p, scale_end, scale_start, **changes):
    """The same problem on VP: its end is that of the flow times `scale_end`, its start times `scale_start`."""
    reward = QuadraticReward(p.reward.G / scale_end**2, p.reward.h / scale_end, p.reward.r0)
    s_min, s_max = (float(in_the_vp_clock(s)[1]) for s in (p.s_min, p.s_max))
    return dataclasses.replace(p, noising=VP, s_min=s_min, s_max=s_max, reward=reward, **changes)


@given(st.one_of(gaussians(etas=st.floats(0.2, 2.0)), mixtures()), SEEDS)
def test_value_and_action_are_those_of_vp_in_another_clock(p, seed):
    """X_s/alpha is one process in the clock lambda, whatever the noising. With k = alpha_VP/alpha at equal lambda and
    the reward of x/k at the end, V*(lambda, x) = V*_VP(lambda, k x) and a* = k a*_VP, at every eta."""
    end, start = (in_the_vp_clock(s)[0] for s in (p.s_min, p.s_max))
    changes = {}
    if isinstance(p, GaussianDiffusion):
        changes = {"start": GaussianLaw(p.initial.mean * start, p.initial.covariance * start**2)}
    vp = as_vp(p, end, start, **changes)
    t, x = states(p.problem, seed=seed)
    k, s_vp = in_the_vp_clock(p.problem.s(t))
    t_vp, y = (vp.s_max - s_vp).clamp(min=0.0), k[:, None] * x
    # times are off by eps, lambda by eps |dlambda/ds|, which is 1e3 eps at these cuts, and V* and a* by that times
    # their slopes in lambda, of the order of 1e3
    close(p.value.value(t, x), vp.value.value(t_vp, y), 1e-9, 1e-9)
    close(p.optimal_policy(t, x), k[:, None] * vp.optimal_policy(t_vp, y), 1e-9, 1e-9)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("solver", [Exponential(), DDIM(0.0), DDIM(0.5), DDIM(1.0), Multistep2()], ids=str)
def test_exponential_steps_are_those_of_vp_in_another_clock(solver, eta):
    """Steps that are functions of alpha, sigma and lambda alone take x/alpha through the same numbers on both, on the
    same noise, for a network that is a function of (x/alpha, lambda). 40 steps, each rounded at |lambda| eps."""
    paths = []
    for noising in (FLOW, VP):
        ends = [float(noising.s_of_log_snr(torch.tensor(lam))) for lam in (6.0, -6.0)]

        def policy(t, x, cond=None, noising=noising, s_max=ends[1]):
            s = s_max - t[:, None]
            size = (noising.alpha(s).square() + noising.sigma(s).square()).sqrt()
            return -(torch.sin(2 * x / size) + noising.log_snr(s) / 8) / noising.sigma(s)

        problem = ScoreAsAction(
            noising, policy, lambda x, c: x.sum(1), IsotropicNormal((3,)), (3,), eta=eta, s_min=ends[0], s_max=ends[1]
        )
        times = grids.log_snr(problem, 40)
        alpha = noising.alpha(problem.s(times))
        start = Noise(1).normal(torch.arange(5), (3,), 0) * alpha[0]
        path = rollout(problem, policy, times, Noise(2), torch.arange(5), solver=solver, start=start)
        paths.append(path.x / alpha[:, None, None])
    close(*paths, 1e-9, 1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(("solver", "order"), [(Exponential(), 1), (Heun(), 2), (Multistep2(), 2)], ids=str)
def test_J_of_the_optimum_converges_to_J_star(solver, order, eta):
    """E r(x_N) - sum_k w_k E c(t_k, x_k) of the solver's chain under a*, exactly: x_k is Gaussian, and a quadratic has
    the mean of its values at m +- sqrt(d) L e_i. From N(0, I); J* by the Riccati equation."""
    p = plane(eta, start=GaussianLaw(torch.zeros(2), torch.eye(2)))
    problem, exact, steps, errors = p.problem, p.lq.J_optimal(), [16, 32, 64], []
    for n in steps:
        times = grids.log_snr(problem, n)
        chain = chain_moments(problem, p.optimal_policy, times, solver, torch.zeros(2), torch.eye(2))
        offsets = 2**0.5 * torch.linalg.cholesky(chain.covariance).mT
        x = torch.cat([chain.mean[:, None] + offsets, chain.mean[:, None] - offsets], 1)
        t = times[:, None].expand(-1, 4).flatten()
        y = x.flatten(0, 1)
        cost = problem.running_cost(t, y, p.optimal_policy(t, y), p.score(t, y)).view(-1, 4).mean(1)
        weights = grids.node_weights(solver.quadrature(problem, times))
        errors.append(float(problem.reward(x[-1]).mean() - (weights * cost).sum() - exact))
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.15)


def halves(problem, policy, seed, samples=4096, steps=64):
    """Heun on a log-SNR grid, and on half its steps on the same path."""
    fine = grids.log_snr(problem, steps)
    noise, ids = Noise(seed, fine=fine), torch.arange(samples)
    return [rollout(problem, policy, grid, noise, ids, solver=Heun()) for grid in (fine, fine[::2])]


def assert_mean(samples, truth, tests):
    """z-tests of (n, k) against (k,), with the bias of the fine run: at order 2, a third of its distance to the half as
    fine one; twice that is allowed."""
    fine, half = samples
    estimate, bias = Estimate.of(fine), (fine - half).mean(0).abs() / 3
    assert bool((bias < estimate.stderr).all())
    assert bool(((estimate.mean - truth).abs() <= z_bound(tests) * estimate.stderr + 2 * bias).all())


@pytest.mark.parametrize("name", ["mixture-1d", "mixture-2d"])
def test_J_star_of_a_mixture_by_simulation(name):
    """J* = E r(Y_T) - beta E path_kl under a*, from N(0, I): J*, E r and with them the KL of the optimum are closed."""
    p = named_mixture(name)
    J, reward = float(p.J_optimal().mean), float(p.reward_optimal().mean)
    found = []
    for path in halves(p.problem, p.optimal_policy, seed=1):
        r, kl = p.reward(path.x[-1]), path_kl(p.problem, path, p.optimal_policy)
        found.append(torch.stack([r - p.beta * kl, r, kl], 1))
    assert_mean(found, torch.tensor([J, reward, (reward - J) / p.beta]), tests=6)


def test_path_kl_of_a_mixtures_optimum():
    """From its own marginal a* is the score of the tilted mixture, other data: KL = KL(p~ || p) at s_min less that at
    s_max."""
    p = named_mixture("mixture-1d")
    tilted, _ = p.tilted
    p = dataclasses.replace(p, start=tilted.at(p.s_max))
    data, start = (kl_on_the_line(tilted.at(s), p.p.at(s)) for s in (p.s_min, p.s_max))
    kls = [path_kl(p.problem, path, p.optimal_policy)[:, None] for path in halves(p.problem, p.optimal_policy, seed=2)]
    assert_mean(kls, torch.tensor([data - start]), tests=1)


# orders of convergence


@cache
def perturbed_end(eta):
    """A policy that is not the score, s_ref - .3 (t/T) x + .6, and the law that it leaves at T, by the moment
    equations."""
    p = plane(eta)
    moments, T = p.lq.moments(p.perturbed(-0.3, 0.6)), np.array([p.lq.horizon])

    def policy(t, x, cond=None):
        return p.score(t, x) - 0.3 * (t / p.problem.horizon)[:, None] * x + 0.6

    return p, policy, *(torch.from_numpy(m(T)[0]) for m in (moments.mean, moments.covariance))


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize(
    ("solver", "order"), [(s, 1) for s in (*FIRST_ORDER, "ddim")] + [(s, 2) for s in SECOND_ORDER], ids=str
)
def test_weak_order(solver, order, eta):
    """Mean and covariance of the chain at T, exactly. DDIM with its own eta agrees with the SDE's to first order. Gap
    to the next order: 1."""
    p, policy, mean, covariance = perturbed_end(eta)
    solver, steps, errors = DDIM(eta) if solver == "ddim" else solver, [32, 64, 128], []
    for n in steps:
        times = grids.log_snr(p.problem, n)
        chain = chain_moments(p.problem, policy, times, solver, p.initial.mean, p.initial.covariance)
        errors.append(float((chain.mean[-1] - mean).norm() + (chain.covariance[-1] - covariance).norm()))
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.15)


@cache
def flow_lines():
    """Starts and ends of the velocity ODE dx/ds = (x - E[X_0 | x])/s of mixture data, the mean by Bayes, by scipy."""
    p = named_mixture("mixture-2d", eta=0.0, s_min=0.05, s_max=0.95)
    start = p.initial(Noise(0), torch.arange(30))

    def slope(s, y):
        x, s = torch.from_numpy(y).view(-1, 2), torch.tensor(s)
        return ((x - p.p.posterior_mean(s.expand(len(x)), x)) / s).flatten().numpy()

    solved = solve_ivp(slope, (p.s_max, p.s_min), start.flatten().numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    return p, start, torch.from_numpy(solved.y[:, -1]).view(-1, 2)


@pytest.mark.parametrize(
    ("solver", "order"), [(s, 1) for s in (*FIRST_ORDER, DDIM(0.0))] + [(s, 2) for s in SECOND_ORDER], ids=str
)
def test_order_on_the_velocity_ode(solver, order):
    """eta = 0, mixture data: line by line, root mean square. Gap to the next order: 1."""
    p, start, end = flow_lines()
    steps, errors = [64, 128, 256], []
    for n in steps:
        times = grids.log_snr(p.problem, n)
        x = rollout(p.problem, p.score, times, Noise(0), torch.arange(len(start)), solver=solver, start=start).x[-1]
        errors.append(float((x - end).square().mean().sqrt()))
    assert fit_order(steps, errors) == pytest.approx(order, abs=0.15)


# torchsde


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_torchsde_agrees_to_rounding_in_the_clock(eta):
    """g² = 2s/(1 - s) has a steep integral: in that clock torchsde's Euler takes our increments and our numbers."""
    p = named_mixture("mixture-2d", eta=eta)
    times = grids.uniform(p.problem, 64)
    ours = rollout(p.problem, p.score, times, Noise(4), torch.arange(6))
    path = RecordedBrownian.of(p.problem, ours)
    theirs = sdeint(p.problem, p.score, times, ours.x[0], in_clock=True, brownian=path, method="euler",
                    dt=float(times.diff().max()))  # fmt: skip
    close(theirs.x, ours.x, 1e-10, 1e-10)


@cache
def torchsde_truth(n=100, steps=512):
    """torchsde's Euler on fine steps, on one Brownian motion in the clock int g²."""
    problem = plane().problem
    fine = grids.uniform(problem, steps)
    span = float(problem.clock(fine[-1]))
    interval = torchsde.BrownianInterval(t0=0.0, t1=span, size=(n, 2), dtype=torch.float64, entropy=5)
    start = problem.initial(Noise(0), torch.arange(n))
    theirs = sdeint(problem, problem.reference, fine[[0, -1]], start, in_clock=True, brownian=interval, method="euler",
                    dt=problem.horizon / steps)  # fmt: skip
    return problem, fine, interval, start, theirs.x[-1]


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun(), Exponential()], ids=str)
def test_torchsde_on_the_same_brownian_motion(solver):
    """Ours converge to torchsde's fine solution at strong order 1, which Euler's has for additive noise; next: 1.5. Its
    own error is an eighth of our last, which by itself moves the fitted order by 0.1 at most."""
    problem, fine, interval, start, truth = torchsde_truth()

    class Interval(Noise):
        def path(self, ids, shape, times, clock):
            for a, b in pairwise(clock(times)):
                yield interval(a, b) / (b - a).sqrt()

    steps, errors = [16, 32, 64], []
    for k in steps:
        times, ids = fine[:: (len(fine) - 1) // k], torch.arange(len(start))
        x = rollout(problem, problem.reference, times, Interval(0), ids, solver=solver, start=start).x[-1]
        errors.append(float((x - truth).square().sum(1).mean().sqrt()))
    assert fit_order(steps, errors) == pytest.approx(1, abs=0.2)


# marginals


@pytest.mark.parametrize("eta", ETAS)
def test_gaussian_marginals_are_kept_exactly(eta):
    """Y_0 ~ p_{s_max} and a = the score: the closed-loop transitions leave N((1 - s) mu, (1 - s)² C + s² I) at every
    node. The moment equations are solved to 1e-12."""
    p = plane(eta, s_min=0.02, s_max=0.98)
    times = torch.tensor([0.0, 0.1, 0.5, 0.9, p.lq.horizon])
    if eta:
        solver = Exact(p.lq.closed_loop(p.lq.reference))
        chain = chain_moments(p.problem, p.score, times, solver, *marginal(p, p.s_max))
        mean, covariance = chain.mean, chain.covariance
    else:  # transitions without noise have no covariance that could be factored: the moment equations instead
        moments = p.lq.moments(p.lq.reference)
        mean, covariance = (torch.from_numpy(m(times.numpy())) for m in (moments.mean, moments.covariance))
    for k, t in enumerate(times.tolist()):
        m, V = marginal(p, p.s_max - t)
        close(mean[k], m)
        close(covariance[k], V)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("solver", SECOND_ORDER, ids=str)
def test_gaussian_marginals_are_kept_by_the_solvers(solver, eta):
    """At all of 64 nodes: what 256 steps leave is a third of their distance to 128 steps, order 2, up to what is of
    the next order (smaller by the step in lambda, .05), and nothing else. A wrong g² leaves an error that no step
    removes."""
    p = plane(eta)
    fine = grids.log_snr(p.problem, 256)
    moments = []
    for every in (1, 2):
        chain = chain_moments(p.problem, p.score, fine[::every], solver, *marginal(p, p.s_max))
        moments.append(torch.cat([chain.mean[:, None], chain.covariance], 1)[:: 4 // every])
    laws = [marginal(p, float(s)) for s in p.problem.s(fine[::4])]
    exact = torch.stack([torch.cat([m[None], V]) for m, V in laws])
    step = float((moments[0] - moments[1]).abs().max())
    extrapolated = moments[0] + (moments[0] - moments[1]) / 3
    assert float((extrapolated - exact).abs().max()) < step / 16
    assert step < 5e-3


def features(x):
    """x, x_i x_j, and a wave that tells modes apart."""
    return torch.cat([x, torch.einsum("bi,bj->bij", x, x).flatten(1), torch.cos(2 * x)], 1)


def truth_of(law):
    """Their exact means under a mixture; E cos(2 x_i) by the characteristic function."""
    second = law.covariance + law.mean[:, None] * law.mean
    wave = (law.w[:, None] * torch.cos(2 * law.mu) * torch.exp(-2 * law.C.diagonal(dim1=1, dim2=2))).sum(0)
    return torch.cat([law.mean, second.flatten(), wave])


@pytest.mark.parametrize("eta", ETAS)
def test_mixture_marginals_are_kept(eta):
    """Y_0 ~ p_{s_max} and a = the score: half way in lambda and at the end, s = 1/2 and .02, mixtures with means
    (1 - s) mu_i and covariances (1 - s)² C_i + s² I; 4,096 samples."""
    p = named_mixture("mixture-2d", eta=eta, start=None)
    paths = halves(p.problem, p.score, seed=3)
    for at in (0.5, 1.0):
        s = float(p.problem.s(paths[0].t[int(64 * at)]))
        law = Mixture(p.data.w, (1 - s) * p.data.mu, (1 - s) ** 2 * p.data.C + s**2 * torch.eye(2))
        found = [features(path.x[int(at * (len(path.t) - 1))]) for path in paths]
        assert_mean(found, truth_of(law), tests=6 * found[0].shape[1])
    assert s == pytest.approx(0.02)


# the cuts


def distances(law, other):
    """W2, and KL(law || other), of two Gaussians (mean, covariance) with commuting covariances:
    W2² = |m - m'|² + |V^½ - V'^½|²."""
    (m, V), (m_other, V_other) = law, other
    roots = []
    for covariance in (V, V_other):
        c, U = torch.linalg.eigh(covariance)
        roots.append((U * c.sqrt()) @ U.mT)
    w2 = ((m - m_other).square().sum() + (roots[0] - roots[1]).square().sum()).sqrt()
    kl = Gaussian(m[None], Matrix(roots[0])).kl(Gaussian(m_other[None], Matrix(roots[1])))
    return float(w2), float(kl)


def second_moment(p):
    """E |X_0|²."""
    return float(p.mu.square().sum() + p.C.trace())


def prior(d, std=1.0):
    return torch.zeros(d), std**2 * torch.eye(d)


@given(gaussians(), st.floats(1e-3, 0.3))
def test_the_noise_end_is_near_the_prior(p, cut):
    """With delta = 1 - s_max, X_{s_max} = delta X_0 + (1 - delta) eps. Held against eps itself,

        W2(p_{s_max}, N(0, I)) <= delta (E|X_0|² + d)^½,

    and against N(0, I) given X_0, KL being convex,

        KL(p_{s_max} || N(0, I)) <= ½ delta² E|X_0|² + ½ d [(1 - delta)² - 1 - 2 log(1 - delta)],

    for any data. Gaussian data with eigenvalues c_i, v_i = delta² c_i + (1 - delta)², have

        W2² = delta² |mu|² + sum (v_i^½ - 1)²,   KL = ½ delta² |mu|² + ½ sum (v_i - 1 - log v_i)."""
    p = dataclasses.replace(p, s_max=1 - cut, start=None)
    delta, d, c = 1 - p.s_max, len(p.mu), torch.linalg.eigvalsh(p.C)
    w2, kl = distances((p.initial.mean, p.initial.covariance), prior(d))
    v = delta**2 * c + (1 - delta) ** 2
    assert w2**2 == pytest.approx(float(delta**2 * p.mu.square().sum() + (v.sqrt() - 1).square().sum()), rel=1e-9)
    # v - 1 - log v ~ delta² is what is left of terms of order delta: eps/delta of it is lost
    assert kl == pytest.approx(float(delta**2 * p.mu.square().sum() + (v - 1 - v.log()).sum()) / 2, rel=1e-8)
    assert w2 <= delta * (second_moment(p) + d) ** 0.5
    of_noise = (1 - delta) ** 2 - 1 - 2 * math.log1p(-delta)
    assert kl <= (delta**2 * second_moment(p) + d * of_noise) / 2


CUT_AT = [0.04, 0.02, 0.01, 0.005]


@pytest.mark.parametrize(
    ("centred", "std", "w2", "kl"),
    [(False, "1", 1, 2), (False, "s_max", 1, 2), (True, "1", 1, 2), (True, "s_max", 2, 4)],
)
def test_the_distance_to_the_prior_vanishes_with_the_cut(centred, std, w2, kl):
    """W2 ~ delta (|mu|² + d)^½ and KL ~ delta² (½ |mu|² + d). The terms in d are there because N(0, I) is too wide,
    v_i - 1 ~ -2 delta. N(0, s_max² I), of the right width, leaves W2 ~ delta |mu| and KL ~ ½ delta² |mu|², and for
    centred data W2 ~ ½ delta² |C| and KL ~ ¼ delta⁴ |C|². Leading terms are off by a relative O(delta)."""
    errors = []
    for delta in CUT_AT:
        p = plane(s_max=1 - delta)
        p = dataclasses.replace(p, mu=0 * p.mu) if centred else p
        law = p.initial.mean, p.initial.covariance
        errors.append(distances(law, prior(2, {"1": 1.0, "s_max": p.s_max}[std])))
    size, C = float(p.mu.square().sum()), float(p.C.square().sum())
    leading = {"1": ((size + 2) ** 0.5, size / 2 + 2), "s_max": (size**0.5, size / 2)}[std]
    if centred and std == "s_max":
        leading = C**0.5 / 2, C / 4
    for k, order in enumerate((w2, kl)):
        found = [e[k] for e in errors]
        inverse = [1 / delta for delta in CUT_AT]
        assert fit_order(inverse, found) == pytest.approx(order, abs=0.1)
        assert found[-1] == pytest.approx(leading[k] * CUT_AT[-1] ** order, rel=0.05)


def carried(p, solver, steps):
    """What the solver's chain under the reference takes from Y_0 to Y_T: d E[Y_T | Y_0]/d Y_0."""
    d = len(p.mu)
    chain = chain_moments(p.problem, p.score, grids.log_snr(p.problem, steps), solver, *prior(d))
    total = torch.eye(2 * d)
    for step in chain.steps:
        total = step.phi @ total
    return total[:d, :d]


@pytest.mark.parametrize("eta", ETAS)
def test_what_starting_from_the_prior_leaves_at_the_end(eta):
    """Y_T given Y_0 = y has the mean phi y + ..., with, axis by axis,

        phi = [(c + (s_min/(1 - s_min))²)/(c + (s_max/delta)²)]^{(1 + eta²)/2} (1 - s_min)/delta ~ delta^{eta²},

    so N(0, I) in place of p_{s_max} = N(delta mu, V) leaves at the end errors of

        mean: -phi delta mu ~ delta^{1 + eta²},   covariance: phi (1 - V) phi ~ delta^{1 + 2 eta²}.

    The ODE keeps the error of the start, delta; noise at eta = 1 forgets it, to delta² and delta³. phi: on the axis
    the drift is -f - kappa/V, so d log phi = f ds + ((1 + eta²)/2) g²/V ds backwards in s, with f ds = d log(1 - s) and
    g²/V ds = d log(c + (s/(1 - s))²). Heun's phi is off by a third of its distance to that of half the steps, order 2;
    extrapolated, by a fourth of that third. Leading terms are off by a relative O(delta)."""
    c, U = torch.linalg.eigh(plane().C)
    errors = []
    for delta in CUT_AT:
        p = plane(eta, s_max=1 - delta)
        fine, half = (carried(p, Heun(), n) for n in (128, 64))
        ratio = (c + (p.s_min / (1 - p.s_min)) ** 2) / (c + (p.s_max / delta) ** 2)
        phi = (U * ratio ** ((1 + eta**2) / 2) * (1 - p.s_min) / delta) @ U.mT
        bias = float((fine - half).norm()) / 3
        assert bias < 0.02 * float(phi.norm())
        assert float((fine + (fine - half) / 3 - phi).norm()) < bias / 4
        m, V = marginal(p, p.s_max)
        errors.append((float((fine @ m).norm()), float((fine @ (torch.eye(2) - V) @ fine.mT).norm())))
    inverse = [1 / delta for delta in CUT_AT]
    for k, order in enumerate((1 + eta**2, 1 + 2 * eta**2)):
        assert fit_order(inverse, [e[k] for e in errors]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_the_optimum_reaches_the_tilted_law_as_the_cut_vanishes(eta):
    """From p_{s_max} the optimum misses p e^{r/beta}/Z by what Y_T remembers of Y_0: rho ~ delta^{eta²} is their
    correlation, mean and covariance are off by O(rho²) (the value-function bias, arXiv 2409.08861). At eta = 1 the
    noise is memoryless in the limit, at rho² ~ delta²; at eta = ½ the order is ½."""
    errors = []
    for delta in CUT_AT:
        p = plane(eta, s_max=1 - delta)
        law, tilted = p.optimal_law(), p.tilted_data()
        errors.append(float((law.mean - tilted.mean).norm() + (law.covariance - tilted.covariance).norm()))
    assert fit_order([1 / delta for delta in CUT_AT], errors) == pytest.approx(2 * eta**2, abs=0.1)


@given(gaussians(), st.floats(1e-3, 0.2))
def test_the_data_end_keeps_a_noise(p, s_min):
    """X_{s_min} = (1 - s_min) X_0 + s_min eps is no further from X_0 than W2 <= s_min (E|X_0|² + d)^½, for any data.
    Gaussian data have u_i = (1 - s_min)² c_i + s_min² on the axes of C, and

        W2² = s_min² |mu|² + sum (u_i^½ - c_i^½)²,
        KL(p_{s_min} || data) = ½ s_min² mu'C^-1 mu + ½ sum (u_i/c_i - 1 - log(u_i/c_i)),

    while a quadratic reward is off by

        E r(X_{s_min}) - E r(X_0) = -s_min h'mu + ½ (2 s_min - s_min²) (tr GC + mu'G mu) - ½ s_min² tr G.

    Measured on the process itself: the law that the reference leaves from p_{s_max}."""
    p = dataclasses.replace(p, s_min=s_min, start=None)
    phi, shift, W = (v[0] for v in p.transition(torch.tensor([p.s_max])))
    U, (m0, V0) = p.axes[1], marginal(p, p.s_max)
    Phi = (U * phi) @ U.mT
    mean, covariance = Phi @ m0 + U @ shift, Phi @ V0 @ Phi.mT + (U * W) @ U.mT
    w2, kl = distances((mean, (covariance + covariance.mT) / 2), (p.mu, p.C))
    c = torch.linalg.eigvalsh(p.C)
    u = (1 - s_min) ** 2 * c + s_min**2
    square = s_min**2 * p.mu.square().sum() + (u.sqrt() - c.sqrt()).square().sum()
    assert w2 == pytest.approx(float(square.sqrt()), rel=1e-6, abs=1e-10)
    assert w2 <= s_min * (second_moment(p) + len(p.mu)) ** 0.5 * (1 + 1e-9)
    exact = s_min**2 * p.mu @ torch.linalg.solve(p.C, p.mu) + (u / c - 1 - (u / c).log()).sum()
    assert kl == pytest.approx(float(exact) / 2, rel=1e-6, abs=1e-10)
    r, of_G = p.reward, float((p.reward.G @ p.C).trace() + p.mu @ p.reward.G @ p.mu)
    bias = -s_min * float(r.h @ p.mu) + (2 * s_min - s_min**2) / 2 * of_G - s_min**2 / 2 * float(r.G.trace())
    gain = [float(r(m) - (r.G @ V).trace() / 2) for m, V in ((mean, covariance), (p.mu, p.C))]
    assert gain[0] - gain[1] == pytest.approx(bias, rel=1e-7, abs=1e-9)


def test_the_last_step_to_clean_data_takes_most_of_that_noise():
    """From s_min Tweedie's mean, the step of DDIM to s = 0, is affine for Gaussian data: its mean is mu, its variances
    (1 - s_min)² c²/u, so that W2 falls from s_min (|mu|² + tr C)^½ to ½ s_min² (sum 1/c)^½, off by a relative
    O(s_min)."""
    noisy, clean, ends = [], [], [0.04, 0.02, 0.01]
    for s_min in ends:
        p = plane(s_min=s_min)
        m, V = marginal(p, s_min)
        x = torch.cat([torch.zeros(1, 2), torch.eye(2)])
        t = torch.full((3,), p.problem.horizon)
        y = FLOW.tweedie(p.problem.s(t), x, p.score(t, x))
        A = (y[1:] - y[0]).mT
        mean, covariance = A @ m + y[0], A @ V @ A.mT
        close(mean, p.mu, 1e-10, 1e-10)
        noisy.append(distances((m, V), (p.mu, p.C))[0])
        clean.append(distances((mean, (covariance + covariance.mT) / 2), (p.mu, p.C))[0])
    inverse, precision = [1 / s for s in ends], float(torch.linalg.inv(p.C).trace())
    assert fit_order(inverse, noisy) == pytest.approx(1, abs=0.1)
    assert noisy[-1] == pytest.approx(ends[-1] * second_moment(p) ** 0.5, rel=0.05)
    assert fit_order(inverse, clean) == pytest.approx(2, abs=0.1)
    assert clean[-1] == pytest.approx(ends[-1] ** 2 / 2 * precision**0.5, rel=0.05)


def test_path_kl_of_other_data_has_a_limit_at_both_ends():
    """Where the velocities are those of two laws of data, dv = O(s) at s = 0, and path KL converges to KL(q || p):

        KL(q || p) - path KL = ½ s_min² E_q |grad log q - grad log p|² + ½ (1 - s_max)² |mu_q - mu|² + ...

    (the integral of s/(1 - s) times the Fisher divergence below s_min; KL(q_s || p_s) at s_max). Each cut alone, the
    other's exact term taken away; leading terms are off by a relative O(cut)."""
    p = plane()
    mu, C = torch.tensor([0.2, 0.1]), torch.tensor([[0.4, -0.1], [-0.1, 0.5]])
    whole = float(kl_divergence(MultivariateNormal(mu, C), MultivariateNormal(p.mu, p.C)))
    A = torch.linalg.inv(p.C) - torch.linalg.inv(C)  # grad log q - grad log p = A (x - mu) + b
    b = torch.linalg.solve(p.C, mu - p.mu)
    leading = float((A @ C @ A).trace() + b @ b) / 2, float((mu - p.mu).square().sum()) / 2

    def lost(**cuts):
        """(below s_min, above s_max)."""
        base = plane(**cuts)
        q = dataclasses.replace(base, mu=mu, C=C)
        kl = kl_along(base.problem, q.problem.reference, lambda s: marginal(q, s))
        return whole - kl - kl_between(q, base, base.s_max), kl_between(q, base, base.s_min) - kl

    ends = [0.04, 0.02, 0.01]
    found = [lost(s_min=cut)[0] for cut in ends], [lost(s_max=1 - cut)[1] for cut in ends]
    for errors, size in zip(found, leading, strict=True):
        assert fit_order([1 / cut for cut in ends], errors) == pytest.approx(2, abs=0.1)
        assert errors[-1] == pytest.approx(size * ends[-1] ** 2, rel=0.1)
