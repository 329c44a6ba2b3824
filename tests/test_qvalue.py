"""Advantage rates, greedy policies and the martingale conditions, on problems whose V is exact."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl import (
    Estimate,
    Exact,
    Noise,
    Scalar,
    advantage_rate,
    greedy,
    greedy_policy,
    grids,
    kl_rate,
    martingale_residual,
    rollout,
    td_residual,
    z_bound,
)  # fmt: skip
from tests.strategies import SEEDS, gaussians, normal, states
from toy import catalogue
from toy.lq import LQProblem


@given(gaussians(), SEEDS, st.floats(0.05, 1.0))
def test_q_of_score_as_action(p, seed, std):
    """kappa <a - s, grad V> - (beta kappa²/(2 eta² g²)) (|a - s_ref|² - |s - s_ref|²) (+ (...) tr Sigma - gamma
    Ent)."""
    problem = dataclasses.replace(p.problem, gamma=0.3)
    t, y = states(problem, seed=seed)
    g = torch.Generator().manual_seed(seed)
    a, s, grad = (normal(g, *y.shape) for _ in range(3))
    s_ref, kappa, g2 = p.score(t, y), problem.kappa(t), problem.rate(t)
    price = p.beta * kappa.square() / (2 * p.eta**2 * g2.clamp_min(1e-300))
    difference = (a - s_ref).square().sum(1) - (s - s_ref).square().sum(1)
    q = kappa * ((a - s) * grad).sum(1) - price * difference
    scale = float(q.abs().max()) + 1
    assert float((advantage_rate(problem, t, a, s, s_ref, grad) - q).abs().max()) < 1e-10 * scale
    d = y.shape[1]
    entropy = d / 2 * torch.log(torch.tensor(2 * torch.pi * torch.e)) + d * torch.log(torch.tensor(std))
    exploring = q + price * d * std**2 - 0.3 * entropy
    got = advantage_rate(problem, t, a, s, s_ref, grad, Scalar(std))
    assert float((got - exploring).abs().max()) < 1e-10 * scale


@given(gaussians(), SEEDS)
def test_greedy_action(p, seed):
    """s_ref + (2 eta²/(beta (1 + eta²))) grad V maximises q over a; at the exact V* it is the optimal policy."""
    problem = p.problem
    t, y = states(problem, seed=seed)
    s_ref, grad = p.score(t, y), p.value.grad(t, y)
    best = greedy(problem, t, s_ref, grad)
    torch.testing.assert_close(best, s_ref + 2 * p.eta**2 / (p.beta * (1 + p.eta**2)) * grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(best, p.optimal_policy(t, y), rtol=1e-9, atol=1e-9)
    other = best + normal(torch.Generator().manual_seed(seed), *y.shape)
    assert bool((advantage_rate(problem, t, other, best, s_ref, grad) <= 1e-9).all())


def test_greedy_policy_explores_at_gamma_over_R():
    """Covariance gamma eta² g²/(beta kappa²) I; its mean is the greedy action."""
    p = dataclasses.replace(catalogue.get("gaussian-16d").exact, eta=0.7)
    problem = dataclasses.replace(p.problem, gamma=0.2)
    t, y = states(problem)
    law = greedy_policy(problem, p.value)(t, y)
    torch.testing.assert_close(law.mean, p.optimal_policy(t, y), rtol=1e-9, atol=1e-9)
    kappa, g2 = problem.kappa(t), problem.rate(t)
    torch.testing.assert_close(law.root.c.square(), 0.2 * 0.49 * g2 / (p.beta * kappa.square()))


@pytest.mark.parametrize("discount", [0.0, 0.5])
def test_martingale_and_td_residuals(discount):
    """On policy, with the exact V, both residuals have mean zero at every node, but for their quadrature (z-tests,
    exact transitions). With a wrong V (that of another discount) they do not: the test has the power to see it."""
    base = dataclasses.replace(catalogue.get("lq-1d").exact, gamma=0.0, discount=discount)
    lq = base.exact
    policy, n, times = lq.reference, 20_000, grids.uniform(base, 64)
    path = rollout(base, policy, times, Noise(1), torch.arange(n), solver=Exact(lq.closed_loop(policy)))
    cost = path.at_nodes(lambda t, x, c: base.running_cost(t, x, policy(t, x), base.reference(t, x)))

    def residual_z(value):
        v = path.at_nodes(value.value)
        reward = base.reward(path.x[-1])
        whole, step = martingale_residual(base, path, reward, v, cost), td_residual(base, path, v, cost)
        assert float(whole[-1].abs().max()) < 1e-12  # V(T, .) = r
        return torch.cat([Estimate.of(r.T).z(0.0) for r in (whole[:-1], step)])

    # trapezoid, h = E[c + rho V]: dt²/12 |h'(T) - h'(t)| <= 2e-5 * 3.4 in all, dt³/12 |h''| <= 3.2e-7 * 17 a step; the
    # standard errors are 2.2e-3 and more, so the bias is at most 0.04 of one
    assert float(residual_z(lq.value(policy)).abs().max()) < z_bound(128) + 0.04
    wrong = dataclasses.replace(base, discount=0.5 - discount).exact.value(policy)
    assert float(residual_z(wrong).abs().max()) > z_bound(128) + 5


def test_residuals_vanish_along_noiseless_paths():
    """S -> 0: along the flow e^{-rho t} V - integral of e^{-rho t} c is constant, so both residuals are the error of
    the trajectory's quadrature: order 2 with the trapezoid, 1 with the left sum."""
    base = catalogue.get("lq-1d").exact
    base = dataclasses.replace(base, S=torch.tensor([[1e-9]]), gamma=0.0, discount=0.7)
    lq = base.exact
    policy = lq.optimal_policy()

    def worst(steps, quadrature):
        times = grids.uniform(base, steps)
        path = rollout(base, policy, times, Noise(1), torch.arange(4), solver=Exact(lq.closed_loop(policy)))
        path = dataclasses.replace(path, w=quadrature(base, times))
        cost = path.at_nodes(lambda t, x, c: base.running_cost(t, x, policy(t, x), base.reference(t, x)))
        v, reward = path.at_nodes(lq.optimal_value().value), base.reward(path.x[-1])
        whole, step = martingale_residual(base, path, reward, v, cost), td_residual(base, path, v, cost)
        return torch.stack([whole.abs().max(), step.abs().sum(0).max()])

    for quadrature, ratio in ((grids.trapezoid, 4), (grids.left, 2)):
        ratios = worst(32, quadrature) / worst(64, quadrature)
        assert ratios.tolist() == pytest.approx([ratio, ratio], rel=0.1)


def wrong_shapes():
    one, two, three = torch.zeros(2, 1), torch.zeros(2), torch.zeros(3, 2)
    problem = catalogue.get("gaussian-1d").problem
    path = rollout(problem, problem.reference, grids.uniform(problem, 2), Noise(0), torch.arange(2))
    return {
        "a": lambda: advantage_rate(problem, two, two, one, one, one),
        "grad_v": lambda: advantage_rate(problem, two, one, one, one, two),
        "step": lambda: greedy(problem, two, one, two),
        "a_ref": lambda: problem.running_cost(two, one, one, two),
        "a_ref ": lambda: kl_rate(problem, two, two, one),
        "value": lambda: martingale_residual(problem, path, two, two, three),
        "cost": lambda: td_residual(problem, path, three, one),
        "reward": lambda: martingale_residual(problem, path, one, three, three),
        "no reward": lambda: martingale_residual(
            problem, dataclasses.replace(path, t=path.t / 2), two, three, three
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a", "grad_v", "step", "a_ref", "a_ref ", "value", "cost", "reward", "no reward"])
def test_shapes_that_would_broadcast_are_refused(name):
    with pytest.raises(ValueError, match=name if name == "no reward" else rf"\b{name.strip()} \("):
        wrong_shapes()[name]()


def test_greedy_policy_passes_the_condition_on():
    """The soft-greedy mean of the exact critic is the optimal policy of each sample's class."""
    entry = catalogue.get("mixture-2d-conditional")
    t, x = states(entry.problem)
    cond = entry.condition(torch.arange(len(t)))
    law = greedy_policy(dataclasses.replace(entry.problem, gamma=0.1), entry.value)(t, x, cond)
    torch.testing.assert_close(law.mean, entry.optimal_policy(t, x, cond), rtol=1e-8, atol=1e-8)


class Tolled(LQProblem):
    """A state cost that depends on the condition."""

    def state_cost(self, t, x, cond=None):
        return cond * x.square().sum(1)


def test_running_cost_by_hand():
    """c = l(t, x, cond) + ½ <a - a_ref, R (a - a_ref)>, with a full R."""
    base = catalogue.get("lq-4d").problem
    problem = Tolled(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.init})
    t, x = states(problem, n=3)
    g, cond = torch.Generator().manual_seed(1), torch.tensor([1.0, 2.0, 3.0])
    a, a_ref = normal(g, 3, 2), normal(g, 3, 2)
    difference = a - a_ref
    price = torch.stack([v @ base.R @ v for v in difference]) / 2
    torch.testing.assert_close(problem.running_cost(t, x, a, a_ref, cond), cond * x.square().sum(1) + price)
    torch.testing.assert_close(base.running_cost(t, x, a, a), torch.stack([v @ base.Q @ v for v in x]) / 2)


def test_residuals_of_a_left_sum_by_hand():
    """Euler's quadrature: V_{k+1} - V_k - dt_k (c_k + rho V_k) a step; its last step is that of the whole, undone from
    e^{-rho t} units."""
    problem = dataclasses.replace(catalogue.get("lq-1d").exact, discount=0.7)
    times = torch.tensor([0.0, 0.1, 0.4, 1.0])
    path = rollout(problem, problem.reference, times, Noise(0), torch.arange(3))
    g = torch.Generator().manual_seed(0)
    value, cost, reward, dt = normal(g, 4, 3), normal(g, 4, 3), normal(g, 3), times.diff()[:, None]
    step = value[1:] - value[:-1] - dt * (cost[:-1] + 0.7 * value[:-1])
    torch.testing.assert_close(td_residual(problem, path, value, cost), step)
    whole = martingale_residual(problem, path, reward, value, cost)
    torch.testing.assert_close(whole[2], reward * torch.exp(-0.7 * dt[2]) - 0.6 * cost[2] - value[2])
