"""ctrl/algorithms/kl_budget.py: a beta that finds its KL, and waits for a policy that is slow to follow."""

import math
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ctrl.algorithms import ActorCritic, KLBudget

BUDGET = KLBudget(ActorCritic(), nats=1.0)


def run(budget, tau, start, epochs, noise=0.0, seed=0):
    """beta and KL, epoch by epoch, of a policy that starts at the reference: sqrt(KL) goes a tau-th of the way to its
    equilibrium, sqrt(nats)/beta, in each epoch; the KL that is measured has a relative error."""
    g, root, history, betas = random.Random(seed), 0.0, [], []
    for _ in range(epochs):
        betas.append(budget.beta(start, history))
        history.append({"kl": root**2 * math.exp(noise * g.gauss(0, 1))})
        root += (budget.nats**0.5 / betas[-1] - root) / tau
    return betas, [epoch["kl"] for epoch in history]


def too_small(budget, tau):
    """How many times smaller than its equilibrium, 1, beta may become by being lowered.

    Let y < 1 be sqrt(KL/nats), and y_n that of n <= ahead epochs before. beta is lowered only if y (y/y_n)^(ahead/n) is
    at most 1, so y_n >= y^(1 + n/ahead). Since beta was at most limit^s times larger s epochs ago, y >= q y_n + I/beta,
    q = (1 - 1/tau)^n and I the sum over s = 1 ... n of (1 - 1/tau)^(s-1) limit^-s / tau. So 1/beta was at most
    (y - q y^(1 + n/ahead))/I, and is limit times that afterwards."""
    factors = []
    for n in range(1, budget.ahead + 1):
        kept, power = 1 - 1 / tau, n / budget.ahead
        integral = sum(kept ** (s - 1) * budget.limit**-s for s in range(1, n + 1)) / tau
        q = kept**n
        y = min(1.0, (q * (1 + power)) ** (-1 / power)) if q else 1.0
        factors.append((y - q * y ** (1 + power)) / integral)
    return budget.limit * max(factors)


@given(st.floats(1, 40), st.floats(0.1, 30), st.floats(1e-3, 1e3))
@example(30.0, 1.0, 1.0)
@example(20.0, 30.0, 1.0)
def test_beta_is_lowered_no_further_than_a_slow_policy_allows(tau, start, nats):
    budget = KLBudget(ActorCritic(), nats)
    betas, _ = run(budget, tau, start, epochs=round(60 + 5 * tau))
    assert min(betas) >= min(start, 1 / too_small(budget, tau)) * (1 - 1e-9)


@given(st.floats(1, 40), st.floats(0.1, 30), st.sampled_from([0.0, 0.14]), st.integers(0, 99))
def test_the_kl_comes_to_its_aim_however_slow_the_policy(tau, start, noise, seed):
    """Also where each KL is known to 14 %, as from 64 samples."""
    _, kl = run(BUDGET, tau, start, round(200 + 10 * tau), noise, seed)
    assert sum(kl[-100:]) / 100 == pytest.approx(1, rel=0.1)


def test_a_policy_on_its_way_has_its_beta_held():
    """KL of .016 in the seventh epoch, growing with the square of time, is at 1 nat within ten more at this rate."""
    history = [{"kl": 0.016 * (epoch / 6) ** 2} for epoch in range(7)]
    assert BUDGET.beta(0.1, history) == 0.1


def test_beta_moves_with_a_kl_that_stands_still():
    still = [{"kl": 0.0}, *({"kl": 0.5} for _ in range(4))]
    assert BUDGET.beta(1.0, still) == pytest.approx(0.5 ** (3 * BUDGET.gain))
    assert BUDGET.beta(1.0, [{}, {"kl": 7.0}, {"kl": 9.0}]) == 1.0  # one before anything was learned: no rate yet
    assert BUDGET.beta(1.0, [{"kl": 0.0}, {"kl": 2.0}, {}, {"kl": 1e9}]) == pytest.approx(BUDGET.limit)
