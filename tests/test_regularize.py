"""Path KL: Girsanov against closed forms, its gradient, and what a discrete chain calls KL instead."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl import (
    DDIM,
    VE,
    Estimate,
    EulerMaruyama,
    Exponential,
    Gaussian,
    Heun,
    Multistep2,
    Noise,
    RectifiedFlow,
    VPCosine,
    VPLinear,
    chain_kl,
    grids,
    kl_rate,
    path_kl,
    rollout,
    z_bound,
)  # fmt: skip
from ctrl.regularize import clip_to_kl
from tests.strategies import SEEDS, gaussians, normal, states
from toy import catalogue
from toy.lq import LinearPolicy


def shifted(p, delta):
    """s_ref + delta."""
    return LinearPolicy(K=p.lq.reference.K, k=lambda t: p.lq.reference.k(t) + delta)


@settings(max_examples=10)
@given(gaussians(), SEEDS)
def test_constant_shift_of_the_score(p, seed):
    """a = s_ref + delta: KL = ((1 + eta²)²/(8 eta²)) |delta|² int g², whatever the law of the states."""
    delta = normal(torch.Generator().manual_seed(seed), len(p.mu))
    problem = p.problem
    total = float(problem.clock(torch.tensor(problem.horizon)))
    exact = (1 + p.eta**2) ** 2 / (8 * p.eta**2) * float(delta.square().sum()) * total
    assert p.lq.path_kl(shifted(p, delta.numpy())) == pytest.approx(exact, rel=1e-8)
    times = grids.uniform(problem, 50)
    path = rollout(problem, problem.reference, times, Noise(0), torch.arange(3), solver=Heun())
    path = dataclasses.replace(
        path, w=grids.clock_trapezoid(problem, times)
    )  # exact where the rate is g² times a constant
    if float(problem.rate(times).min()) > 0:
        kl = path_kl(problem, path, lambda t, x, cond: problem.reference(t, x) + delta)
        torch.testing.assert_close(kl, torch.full((3,), exact), rtol=1e-8, atol=0.0)


@pytest.mark.long
@settings(max_examples=5)
@given(gaussians(), st.floats(-0.4, 0.4), st.floats(-1.0, 1.0))
def test_terminal_kl_is_at_most_path_kl(p, K, k):
    """KL(law of Y_T || reference law) <= KL of path laws, by exact moments."""
    lq, policy, T = p.lq, p.perturbed(K, k), np.array([p.lq.horizon])
    laws = []
    for a in (policy, lq.reference):
        moments = lq.moments(a)
        laws.append(Gaussian.of(torch.from_numpy(moments.mean(T)), torch.from_numpy(moments.covariance(T)[0])))
    terminal = float(laws[0].kl(laws[1]))
    assert -1e-12 < terminal <= lq.path_kl(policy) * (1 + 1e-9) + 1e-12


@given(gaussians(), st.floats(0.05, 3.0))
def test_rate_is_least_at_eta_one(p, eta):
    """(1 + eta²)²/(8 eta²) g² |a - a_ref|² >= ½ g² |a - a_ref|², equal at eta = 1 only."""
    t, x = states(p.problem)
    a, a_ref = x, p.score(t, x)
    least = kl_rate(dataclasses.replace(p.problem, eta=1.0), t, a, a_ref)
    rate = kl_rate(dataclasses.replace(p.problem, eta=eta), t, a, a_ref)
    torch.testing.assert_close(least, p.problem.rate(t) / 2 * (a - a_ref).square().sum(1))
    assert bool((rate >= least * (1 - 1e-12)).all())
    torch.testing.assert_close(rate / least, torch.full_like(least, (1 + eta**2) ** 2 / (4 * eta**2)))


def test_eta_zero_is_refused():
    problem = dataclasses.replace(catalogue.get("gaussian-1d").problem, eta=0.0)
    with pytest.raises(ValueError, match="eta = 0"):
        kl_rate(problem, torch.zeros(1), torch.zeros(1, 1), torch.ones(1, 1))
    with pytest.raises(ValueError, match="eta = 0"):
        problem.penalty(torch.zeros(1))


@pytest.mark.long
@pytest.mark.parametrize("eta", [pytest.param(0.5, marks=pytest.mark.long), 1.0])
def test_kl_does_not_depend_on_the_parametrisation_of_time(eta):
    """Networks that are functions of (y/alpha, lambda): one KL over one range of lambda for VP, VE and rectified
    flow."""
    base = catalogue.get("gaussian-1d").exact
    high, low = 6.0, -4.0
    kls = []
    for noising in (VPLinear(0.1, 20.0), VPCosine(), VE(0.01, 10.0), RectifiedFlow()):
        s_min, s_max = noising.s_of_log_snr(torch.tensor([high, low])).tolist()
        p = dataclasses.replace(base, noising=noising, s_min=s_min, s_max=s_max, eta=eta, start=None)

        def parts(t, p=p, noising=noising):
            s = torch.from_numpy(np.clip(p.s_max - t, p.s_min, p.s_max))
            return (v.numpy() for v in (noising.alpha(s), noising.sigma(s), noising.log_snr(s)))

        def K(t, p=p, parts=parts):  # eps_theta - eps_ref = sin(lambda) y/alpha + cos(lambda)/2; score = -eps/sigma
            alpha, sigma, lam = parts(t)
            return p.lq.reference.K(t) - (np.sin(lam) / alpha / sigma)[:, None, None]

        def k(t, p=p, parts=parts):
            _, sigma, lam = parts(t)
            return p.lq.reference.k(t) - (np.cos(lam) / 2 / sigma)[:, None]

        kls.append(p.lq.path_kl(LinearPolicy(K, k)))
    assert kls == pytest.approx([kls[0]] * 4, rel=1e-8)


@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_kl_and_its_gradient_by_monte_carlo(eta):
    """E path_kl and its gradient through a differentiable rollout = the exact KL and its derivative: z-tests. Each
    sample has its own copy of the parameter, so its own gradient; 2nd-order rollout, bias from half the steps."""
    p = dataclasses.replace(catalogue.get("gaussian-1d").exact, eta=eta)
    problem, n, fine = p.problem, 4000, grids.uniform(p.problem, 96)

    def sample(times):
        theta = torch.full((n, 1), -0.3, requires_grad=True)

        def policy(t, x, cond=None):
            return p.score(t, x) + theta * (t / problem.horizon)[:, None] * x + 0.6

        noise, ids = Noise(3, fine=fine), torch.arange(n)
        path = rollout(problem, policy, times, noise, ids, solver=Heun(), differentiable=True)
        kl = path_kl(problem, path, policy)
        return kl.detach(), torch.autograd.grad(kl.sum(), theta)[0][:, 0]

    lq, h = p.lq, 1e-4
    exact = (
        lq.path_kl(p.perturbed(-0.3, 0.6)),
        (lq.path_kl(p.perturbed(-0.3 + h, 0.6)) - lq.path_kl(p.perturbed(-0.3 - h, 0.6))) / (2 * h),
    )
    assert abs(exact[1]) > 0.1
    for full, half, truth in zip(sample(fine), sample(fine[::2]), exact, strict=True):
        estimate, bias = Estimate.of(full), float((full - half).mean().abs())
        assert bias < float(estimate.stderr)
        assert abs(float(estimate.z(truth))) < z_bound(4) + bias / float(estimate.stderr)


@pytest.mark.parametrize("solver", [DDIM(1.0), Exponential()], ids=str)
def test_kl_of_the_ddim_chain_is_not_the_kl(solver):
    """At ddim_eta = 1 the chain's own KL is ½ (e^{dlambda} - 1) |d eps|² a step, against ½ dlambda |d eps|²: it blows
    up where lambda moves fast, at the data end, and only agrees as dlambda -> 0."""
    p = catalogue.get("gaussian-1d").exact
    problem = p.problem

    def policy(t, x, cond=None):  # eps_theta = eps_ref + 1
        return p.score(t, x) - 1 / p.noising.sigma(p.problem.s(t))[:, None]

    for steps in (5, 50):
        times = grids.uniform(problem, steps)
        path = rollout(problem, policy, times, Noise(0), torch.arange(2), solver=solver)
        dlambda = problem.noising.log_snr(problem.s(times)).diff()
        own = chain_kl(problem, solver, path, policy)
        torch.testing.assert_close(own, (torch.expm1(dlambda).sum() / 2).expand(2), rtol=1e-8, atol=0.0)
        assert float(own[0]) > 1.5 * float(dlambda.sum() / 2)
    fine = grids.log_snr(problem, 2000)
    path = rollout(problem, policy, fine, Noise(0), torch.arange(2), solver=solver)
    total = problem.noising.log_snr(problem.s(fine)).diff().sum() / 2
    torch.testing.assert_close(chain_kl(problem, solver, path, policy), total.expand(2), rtol=5e-3, atol=0.0)


def test_kl_of_the_euler_and_multistep_chains():
    """Euler: ½ (kappa dt)² |da|² / (eta² int g²) a step. 2M: given (x_k, x_{k-1}), D of each policy with its own
    memory."""
    p = dataclasses.replace(catalogue.get("gaussian-1d").exact, eta=0.7)
    problem, times = p.problem, grids.log_snr(p.problem, 6)

    def policy(t, x, cond=None):
        return p.score(t, x) + t[:, None]

    path = rollout(problem, policy, times, Noise(0), torch.arange(2), solver=EulerMaruyama())
    t, dt, clock = times[:-1], times.diff(), problem.clock(times).diff()
    euler = (problem.kappa(t).square() * dt.square() * t.square() / (2 * problem.eta**2 * clock)).sum()
    torch.testing.assert_close(chain_kl(problem, EulerMaruyama(), path, policy), euler.expand(2))
    moved = chain_kl(problem, EulerMaruyama(), path, lambda t, x, cond: p.score(t, x) + x)  # |da|² = |x_k|²
    weight = problem.kappa(t).square() * dt.square() / (2 * problem.eta**2 * clock)
    torch.testing.assert_close(moved, (weight[:, None] * path.x[:-1, :, 0].square()).sum(0))
    s = problem.s(times)
    alpha, sigma, dlambda = p.noising.alpha(s), p.noising.sigma(s), p.noising.log_snr(s).diff()
    shift = sigma[:-1].square() / alpha[:-1] * t  # of x0hat
    ratio = torch.cat([torch.zeros(1), dlambda[1:] / (2 * dlambda[:-1])])
    target = shift + ratio * (shift - torch.cat([torch.zeros(1), shift[:-1]]))
    weight = alpha[1:] * (1 - torch.exp(-(1 + 0.49) * dlambda / 2))
    variance = sigma[1:].square() * (1 - torch.exp(-0.49 * dlambda))
    exact = ((weight * target).square() / (2 * variance)).sum()
    torch.testing.assert_close(chain_kl(problem, Multistep2(), path, policy), exact.expand(2))


def test_condition_and_reference_are_passed_on():
    """KL with cond = KL of the policies that have it built in; another reference takes the problem's place. For a
    common covariance the KL is symmetric."""
    entry = catalogue.get("mixture-2d-conditional")
    problem, policy, ids = entry.problem, entry.optimal_policy, torch.arange(6)
    cond, times = entry.condition(ids), grids.log_snr(problem, 5)
    path = rollout(problem, policy, times, Noise(0), ids, cond=cond)
    own, reference = (lambda t, x, _, f=f: f(t, x, cond) for f in (policy, problem.reference))
    for kl in (
        lambda *policies: path_kl(problem, path, *policies),
        lambda *policies: chain_kl(problem, Multistep2(), path, *policies),
    ):
        full = kl(policy)
        assert float(full.min()) > 1e-6
        torch.testing.assert_close(full, kl(own, reference))
        torch.testing.assert_close(full, kl(problem.reference, policy))
        assert float(kl(policy, policy).abs().max()) == 0.0


@given(st.floats(0.01, 100.0), st.integers(0, 99))
def test_an_action_is_drawn_back_no_further_than_it_must(rate, seed):
    """On the line from a_old, at the KL rate that is allowed, or where it was; the same where there is no limit."""
    problem = catalogue.get("mixture-2d").problem
    g = torch.Generator().manual_seed(seed)
    t = 0.9 * torch.rand(20, generator=g)
    a, a_old = (3 * torch.randn(20, 2, generator=g) for _ in range(2))
    a[0] = a_old[0]
    back = clip_to_kl(problem, t, a, a_old, rate)
    before, after = (kl_rate(problem, t, v, a_old) for v in (a, back))
    torch.testing.assert_close(after, before.clamp(max=rate))
    share = ((back - a_old) * (a - a_old)).sum(1) / (a - a_old).square().sum(1).clamp(min=1e-30)
    torch.testing.assert_close(back, a_old + share[:, None] * (a - a_old))
    assert bool((share >= 0).all())
    torch.testing.assert_close(clip_to_kl(problem, t, a, a_old, math.inf), a)


@pytest.mark.parametrize("rate", [1.0, math.inf])
def test_where_it_starts_an_action_is_free(rate):
    """At a = a_old its derivative in a is the identity, and no 0/0."""
    problem = catalogue.get("mixture-2d").problem
    a = torch.ones(3, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(clip_to_kl(problem, torch.zeros(3), a, torch.ones(3, 2), rate).sum(), a)
    torch.testing.assert_close(slope, torch.ones(3, 2))
