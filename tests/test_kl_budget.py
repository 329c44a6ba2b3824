"""ctrl/algorithms/kl_budget.py: a beta that finds its KL, and waits for a policy that is slow to follow."""

import dataclasses
import math
import random
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl.algorithms import ActorCritic, ForwardMatching, KLBudget
from ctrl.fit import Settings, fit
from toy import catalogue
from toy.networks import Policy

BUDGET = KLBudget(ActorCritic(), nats=1.0)


def run(tau, start, epochs, noise=0.0, seed=0, nats=1.0):
    """beta and KL, epoch by epoch, of a policy that starts at the reference and has KL = nats at beta = 1: sqrt(KL)
    goes a tau-th of the way to its equilibrium, sqrt(nats)/beta, in each epoch; the KL that is measured has a relative
    error."""
    g, root, history = random.Random(seed), 0.0, []
    budget = KLBudget(ActorCritic(), nats)
    for _ in range(epochs):
        beta = budget.beta(history, start * math.sqrt(2 * nats))
        history.append({"beta": beta, "kl": root**2 * math.exp(noise * g.gauss(0, 1))})
        root += (nats**0.5 / beta - root) / tau
    return [epoch["beta"] for epoch in history], [epoch["kl"] for epoch in history]


@given(st.floats(1, 1e3), st.floats(0.1, 10))
def test_beta_starts_where_the_tilt_by_a_gaussian_reward_has_the_budget(spread, nats):
    """KL of N(m + s²/beta, s²) from N(m, s²) is (s/beta)²/2."""
    beta = KLBudget(ActorCritic(), nats).beta([], spread)
    assert (spread / beta) ** 2 / 2 == pytest.approx(nats)


def test_a_policy_that_follows_as_expected_is_left_alone():
    """At beta* sqrt(KL) goes a quarter of the way each epoch, and beta stays at beta* from first to last."""
    betas, kl = run(BUDGET.ahead, 1.0, 40)
    assert betas == pytest.approx([1.0] * 40) and kl[-1] == pytest.approx(1.0, abs=2e-3)


@given(st.floats(2, 40), st.floats(1, 10), st.floats(1e-3, 1e3))
def test_a_kl_on_its_way_up_runs_past_its_aim_by_less_than_its_aim(tau, start, nats):
    """From a beta that is not too small: to 1.2 times at tau = 10, 1.8 at 40."""
    _, kl = run(tau, start, round(60 + 5 * tau), nats=nats)
    assert max(kl) <= 2 * nats


@given(st.floats(2, 40), st.floats(0.1, 30), st.sampled_from([0.0, 0.14]), st.integers(0, 99))
def test_the_kl_comes_to_its_aim_however_slow_the_policy(tau, start, noise, seed):
    """Also where each KL is known to 14 %, as from 64 samples."""
    _, kl = run(tau, start, round(200 + 10 * tau), noise, seed)
    assert sum(kl[-100:]) / 100 == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("fall", [0.02, 0.05])
def test_a_kl_that_falls_with_the_learning_rate_is_made_up_for(fall):
    """The noise of the updates is a part of the KL and falls with their size. An equilibrium that falls by so much an
    epoch leaves sqrt(KL) behind by fall/gain."""
    root, history = 1.0, [{"beta": 1.0, "kl": 1.0}]
    for epoch in range(80):
        history.append({"beta": BUDGET.beta(history, 1.0), "kl": root**2})
        root += (math.exp(-fall * epoch) / history[-1]["beta"] - root) / 5
    assert root == pytest.approx(1 - fall / BUDGET.gain, rel=0.02)


def test_beta_is_turned_at_most_by_the_limit_and_held_while_nothing_is_known():
    assert BUDGET.beta([{}, {"beta": 2.0, "kl": 7.0}], 5.0) == 2.0  # one KL: no rate yet
    assert BUDGET.beta([{"beta": 2.0, "kl": 1.0}, {}, {"beta": 2.0, "kl": 1e9}], 5.0) == pytest.approx(2 * BUDGET.limit)
    assert BUDGET.beta([{"beta": 2.0, "kl": 9.0}, {"beta": 2.0, "kl": 0.0}], 5.0) == pytest.approx(2 / BUDGET.limit)


def test_a_reward_in_other_units_is_learned_the_same_way():
    """64 r, but for rounding, where Adam's eps is nothing beside any gradient; beta is 64 times as large."""
    made, exact = [], catalogue.get("mixture-2d").problem
    for unit in (1.0, 64.0):
        problem = dataclasses.replace(exact, reward=lambda x, cond, unit=unit: unit * exact.reward(x, cond))
        torch.manual_seed(0)
        policy = Policy(problem, 8)
        learner = ForwardMatching(updates=3, nodes=32, target="anchored", damping=1.0, hold=0.0, critic_updates=0)
        optimizer = partial(torch.optim.Adam, eps=1e-300)
        settings = Settings(epochs=4, samples=16, steps=5, optimizer=optimizer, progress=False)
        history = fit(problem, policy, KLBudget(learner, 0.1), settings=settings).history
        made.append((policy, [epoch["kl"] for epoch in history], [epoch["beta"] / unit for epoch in history]))
    (policy, kl, beta), (other, kl_64, beta_64) = made
    assert kl_64 == pytest.approx(kl, rel=1e-5) and beta_64 == pytest.approx(beta, rel=1e-5) and len(set(kl)) > 2
    torch.testing.assert_close(list(other.parameters()), list(policy.parameters()))
