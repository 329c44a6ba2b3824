"""Gaussian data under score as action: two routes to everything, and the bias that a fixed initial law leaves."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl import VPLinear
from tests.strategies import gaussians, states
from toy import catalogue
from toy.gaussian import GaussianDiffusion, GaussianLaw, QuadraticReward


def terminal(lq, policy):
    moments, T = lq.moments(policy), np.array([lq.horizon])
    return torch.from_numpy(moments.mean(T)[0]), torch.from_numpy(moments.covariance(T)[0])


@settings(max_examples=6)
@given(gaussians(etas=st.floats(0.0, 2.0), start="marginal"))
def test_true_score_keeps_the_marginals_at_every_eta(p):
    """Y_0 ~ p_{s_max} and a = the score: Y_t ~ p_{T-t}, the ODE eta = 0 included."""
    moments = p.lq.moments(p.lq.reference)
    for fraction in (0.3, 0.8, 1.0):
        t = fraction * p.lq.horizon
        law = p.marginal(max(p.s_max - t, p.s_min))
        scale = float(law.covariance.norm())
        torch.testing.assert_close(torch.from_numpy(moments.mean(np.array([t]))[0]), law.mean, rtol=1e-8, atol=1e-8)
        got = torch.from_numpy(moments.covariance(np.array([t]))[0])
        torch.testing.assert_close(got, law.covariance, rtol=1e-8, atol=1e-8 * scale)


@settings(max_examples=10)
@given(gaussians(etas=st.floats(0.0, 2.0), start="prior"))
def test_starting_from_the_prior_leaves_the_predicted_bias(p):
    """Y_0 ~ N(0, I): E Y_T = shift, Cov Y_T = phi Cov(Y_0) phi' + (1 - rho²) V_m: the closed transition against the
    ODE."""
    phi, shift, variance = p.transition(torch.tensor(p.s_max))
    U = p.axes[1]
    covariance = (U * (phi.square() + variance)) @ U.mT
    mean, got = terminal(p.lq, p.lq.reference)
    torch.testing.assert_close(mean, U @ shift, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(got, covariance, rtol=1e-8, atol=1e-8 * float(covariance.norm()))


@settings(max_examples=6)
@given(gaussians())
def test_closed_optimum_is_the_riccati_optimum(p):
    """V*, grad V*, a*, J* and the optimal law: Gaussian integrals against the Riccati equation."""
    t, x = states(p.problem)
    critic, lq_critic = p.value, p.lq.optimal_value()
    torch.testing.assert_close(critic.value(t, x), lq_critic.value(t, x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(critic.grad(t, x), lq_critic.grad(t, x), rtol=1e-8, atol=1e-8)
    policy = p.lq.greedy(lq_critic)
    exact = p.optimal_policy(t, x)
    torch.testing.assert_close(policy(t, x), exact, rtol=1e-8, atol=1e-8 * float(exact.abs().max()))
    mean, covariance = terminal(p.lq, policy)
    law = p.optimal_law()
    torch.testing.assert_close(mean, law.mean, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(covariance, law.covariance, rtol=1e-8, atol=1e-8)


@given(gaussians())
def test_gradient_of_value(p):
    """grad V* in closed form = automatic differentiation of V*; V*(T, .) = r."""
    t, x = states(p.problem)
    x = x.requires_grad_()
    (auto,) = torch.autograd.grad(p.value.value(t, x).sum(), x)
    torch.testing.assert_close(p.value.grad(t, x), auto, rtol=1e-8, atol=1e-9)
    end = torch.full_like(t, p.problem.horizon)
    torch.testing.assert_close(p.value.value(end, x), p.reward(x), rtol=1e-8, atol=1e-8)


def unit_data(eta, g2_max=12.0, k=0.8, target=1.3, beta=0.5):
    """N(0, 1) data, r = -k (x - x*)²/2, Y_0 ~ N(0, 1): the textbook case of value-function bias."""
    reward = QuadraticReward(torch.tensor([[k]]), torch.tensor([k * target]), -k * target**2 / 2)
    start = GaussianLaw(torch.zeros(1), torch.eye(1))
    return GaussianDiffusion(
        VPLinear(0.1, g2_max), torch.zeros(1), torch.eye(1), reward, beta, eta, s_min=0.0, start=start
    ), k / beta, target  # fmt: skip


@given(st.floats(0.1, 2.0), st.floats(0.5, 12.0))
def test_value_function_bias(eta, g2_max):
    """rho = exp(-(eta²/2) int g²), v = 1 - rho²: final mean v K x*/(1 + vK), variance v/(1+vK) + rho²/(1+vK)²."""
    p, K, target = unit_data(eta, g2_max)
    rho = math.exp(-(eta**2) / 2 * (0.1 + g2_max) / 2)
    v = 1 - rho**2
    mean, variance = v * K * target / (1 + v * K), v / (1 + v * K) + rho**2 / (1 + v * K) ** 2
    law = p.optimal_law()
    assert float(law.mean) == pytest.approx(mean, rel=1e-8)
    assert float(law.covariance) == pytest.approx(variance, rel=1e-8)


def test_value_function_bias_vanishes_with_memoryless_noise():
    """rho -> 0: the optimum is the tilted law p e^{r/beta}/Z; the distance is O(rho), here rho = e^{-30}."""
    p, *_ = unit_data(eta=1.0, g2_max=119.9)
    law, tilted = p.optimal_law(), p.tilted_data()
    torch.testing.assert_close(law.mean, tilted.mean, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(law.covariance, tilted.covariance, rtol=1e-12, atol=0.0)


def test_value_function_bias_is_total_without_noise():
    """rho -> 1: control is useless; v = 1 - rho² bounds the change of mean and variance."""
    p, K, target = unit_data(eta=1e-4)
    v = 1 - math.exp(-(1e-4**2) * 12.1 / 2)
    law = p.optimal_law()
    assert abs(float(law.mean)) <= v * K * target
    assert abs(float(law.covariance) - 1) <= v * (1 + 3 * K)


@pytest.mark.parametrize("what", ["value", "optimal"])
def test_eta_zero_has_no_value(what):
    p, *_ = unit_data(eta=0.0)
    with pytest.raises(ValueError, match="eta"):
        p.value if what == "value" else p.lq.J_optimal()


def test_wrong_input():
    p, *_ = unit_data(eta=1.0)
    with pytest.raises(ValueError, match="C must be positive definite"):
        dataclasses.replace(p, C=-torch.eye(1))
    with pytest.raises(ValueError, match=r"reward\.G"):
        dataclasses.replace(p, reward=QuadraticReward(-torch.eye(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="mu"):
        dataclasses.replace(p, mu=torch.zeros(2))
    plane = QuadraticReward(torch.eye(2), torch.zeros(2))
    with pytest.raises(ValueError, match="mu"):
        dataclasses.replace(p, reward=plane)
    with pytest.raises(ValueError, match="mu"):
        dataclasses.replace(p, mu=torch.zeros(2), reward=plane)
    with pytest.raises(ValueError, match="G must be symmetric"):
        QuadraticReward(torch.eye(2), torch.zeros(3))
    with pytest.raises(ValueError, match="G must be symmetric"):
        QuadraticReward(torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.zeros(2))


def test_perturbed_policy_by_hand():
    """s_ref + K (t/T) x + k."""
    p = dataclasses.replace(catalogue.get("gaussian-16d").exact, s_max=0.6)
    t, x = states(p.problem)
    by_hand = p.score(t, x) - 0.3 * (t / (0.6 - p.s_min))[:, None] * x + 0.7
    torch.testing.assert_close(p.perturbed(-0.3, 0.7)(t, x), by_hand, rtol=1e-9, atol=1e-9)
