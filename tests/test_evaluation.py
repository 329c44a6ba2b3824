"""Policy evaluation: what the targets of a critic are on average, and how they scatter.

On a linear problem a target is a polynomial of degree 2 in the normal numbers that made its trajectory. `Cubature` is
a noise that averages such polynomials exactly, so the conditional mean of a target, as the code computes it, is known
without sampling: its bias must vanish at the order of solver and quadrature. Sampling then checks scatter, and what is
not linear.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctrl import (
    Estimate,
    EulerMaruyama,
    Exponential,
    GaussianPolicy,
    Heun,
    Multistep2,
    Noise,
    ProbabilityFlow,
    Problem,
    Trajectory,
    advantage_rate,
    fit_order,
    greedy,
    grids,
    martingale_residual,
    rollout,
    z_bound,
)  # fmt: skip
from ctrl.algorithms import ActorCritic, KLBudget, PathConsistency, PolicyIteration, PPOClip, PPOPenalty
from ctrl.evaluation import increments, martingale, policy_slope, soft_cost, targets
from tests.strategies import SEEDS, gaussians, normal, states
from toy import catalogue
from toy.lq import LQ, LinearPolicy, LQProblem, QuadraticValue, constant

# ------------------------------------------------------------------------------------------ problems, policies, noise


@dataclass(frozen=True)
class Cubature(Noise):
    """For ids 0 ... 2n - 1, n = N d: the points +- sqrt(n) e_i, whose average is that of n standard normals for every
    polynomial of degree at most 3; the ids go round."""

    def path(self, ids, shape, times, clock):
        n = (len(times) - 1) * shape[0]
        points = math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)])
        return iter(points[ids % (2 * n)].unflatten(1, (-1, shape[0])).unbind(1))


@dataclass(frozen=True)
class Case:
    """A linear problem, a policy to evaluate, and another that may have made the trajectories."""

    problem: Problem
    lq: LQ
    policy: LinearPolicy
    other: LinearPolicy

    @cached_property
    def value(self) -> QuadraticValue:
        """V of the policy, of N(policy, gamma R^-1) where the problem explores."""
        Sigma = (lambda t: self.lq.gamma * np.linalg.inv(self.lq.at(t).R)) if self.lq.gamma else None
        return self.lq.value(dataclasses.replace(self.policy, Sigma=Sigma))

    def run(self, old, times, solver, noise=None, ids=None, start=None) -> Trajectory:
        path = rollout(self.problem, old, times, noise or Noise(1), ids, solver=solver, start=start)
        return dataclasses.replace(path, reward=self.problem.reward(path.x[-1], None))

    def averaged(self, old, steps, solver, begin) -> Trajectory:
        """Every point of the cubature from each of three states at node `begin`."""
        times = grids.uniform(self.problem, steps)[begin:]
        points = 2 * (len(times) - 1) * self.problem.shape[0]
        start = normal(torch.Generator().manual_seed(5), 3, *self.problem.shape).repeat_interleave(points, 0)
        return self.run(old, times, solver, Cubature(0), torch.arange(len(start)), start)

    def steps(self, path, old, p) -> Tensor:
        u, u_ref, u_old = (at_nodes(f, path) for f in (self.policy, self.problem.reference, old))
        return increments(self.problem, path, u, u_ref, u_old, at_nodes(p, path))

    def miss(self, path, old, p, trace=0.0) -> Tensor:
        """target - V at every node, (N+1, B)."""
        V = at_nodes(self.value.value, path)
        return targets(self.problem, path, V, self.steps(path, old, p), trace) - V

    def bias(self, old, steps, solver, p, trace=0.0) -> Tensor:
        """E[target | X_t = x] - V(t, x) at t = 0 and T/2 and three x, exactly."""
        biases = []
        for begin in (0, steps // 2):
            path = self.averaged(old, steps, solver, begin)
            biases.append(self.miss(path, old, p, trace)[0].unflatten(0, (3, -1)).mean(1))
        return torch.cat(biases)


def at_nodes(f, path, cond=None):
    """f(t, x, cond) at every node, (N+1, B, ...)."""
    t, x, ids = path.flat()
    return f(t, x, None if cond is None else cond(ids)).unflatten(0, path.x.shape[:2])


def remembered(coefficient):
    """The coefficient, evaluated once for each time: step after step meets the same ones."""
    store = {}

    def at(t):
        key = t.tobytes()
        if key not in store:
            store[key] = coefficient(t)
        return store[key]

    return at


def zero(t, x, cond=None):
    return torch.zeros_like(x)


def wrong(t, x, cond=None):
    """No gradient of anything."""
    return 1 + t[:, None] - 0.7 * x.flip(1)


@cache
def case(name) -> Case:
    """lq-1d explores and has a state cost; lq-4d has matrices, a discount, and both."""
    if name.startswith("lq"):
        problem = dataclasses.replace(catalogue.get(name).exact, horizon=1.0)
        m, n = problem.B.shape[1], len(problem.A)
        K, k = -0.5 / n * np.cos(np.arange(m * n)).reshape(m, n), 0.3 * np.ones(m)
        policy = LinearPolicy(lambda t: (1 + t)[:, None, None] * K, constant(k))
        return Case(problem, problem.exact, policy, LinearPolicy(constant(-K), constant(-2 * k)))
    exact = dataclasses.replace(catalogue.get(name).exact, eta=0.7, s_min=0.05)
    policies = (exact.perturbed(-0.3, 0.6), exact.perturbed(0.5, -0.4))
    return Case(exact.problem, exact.lq, *(LinearPolicy(remembered(a.K), remembered(a.k)) for a in policies))


CASES = ["lq-1d", "lq-4d", "gaussian-1d"]
STEPS = [24, 48, 96]


def test_cubature_is_exact_to_degree_three():
    """E xi_i = E xi_i xi_j xi_k = 0, E xi_i xi_j = 1 if i = j."""
    times = torch.linspace(0, 1, 4)
    xi = torch.stack(list(Cubature(0).path(torch.arange(24), (2,), times, lambda t: t)), 1).flatten(1)
    xi = xi[:12]
    torch.testing.assert_close(xi.mean(0), torch.zeros(6))
    torch.testing.assert_close(xi.mT @ xi / 12, torch.eye(6))
    torch.testing.assert_close(torch.einsum("bi,bj,bk->ijk", xi, xi, xi), torch.zeros(6, 6, 6))


# ------------------------------------------------------------------------------------------ the conditional mean


@pytest.mark.parametrize(
    ("solver", "order", "other"), [(EulerMaruyama(), 1, True), (Heun(), 2, True), (Heun(), 2, False)], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_the_target_is_the_value_on_average(name, solver, order, other):
    """With p = grad V, E[target | X_t] -> V(t, X_t) at the order of solver and quadrature, whoever acted. On policy
    it is the same to rounding for every p; off policy another p leaves a bias that no step removes."""
    c = case(name)
    old = c.other if other else c.policy
    biases = [c.bias(old, n, solver, c.value.grad) for n in STEPS]
    assert fit_order(STEPS, [float(b.norm()) for b in biases]) == pytest.approx(order, abs=0.2)
    for p in (zero, wrong):
        bias = c.bias(old, STEPS[0], solver, p)
        if other:
            finer = c.bias(old, STEPS[1], solver, p)
            assert float((finer - bias).norm()) < 0.15 * float(bias.norm())
            assert float(finer.norm()) > 5 * float(biases[1].norm())
        else:
            torch.testing.assert_close(bias, biases[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "order"), [(Exponential(), 1), (Multistep2(), 2)], ids=str)
def test_the_same_with_exponential_steps(solver, order):
    c = case("gaussian-1d")
    biases = [float(c.bias(c.policy, n, solver, c.value.grad).norm()) for n in STEPS]
    assert fit_order(STEPS, biases) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("trace", [1.0, 5.0, math.inf])
@pytest.mark.parametrize("name", CASES)
def test_every_trace_is_unbiased_with_the_exact_value(name, trace):
    """Off policy for lq-1d, on policy for the others. One step alone has a local error, an order higher."""
    c = case(name)
    old = c.other if name == "lq-1d" else c.policy
    biases = [float(c.bias(old, n, Heun(), c.value.grad, trace).norm()) for n in STEPS]
    assert fit_order(STEPS, biases) == pytest.approx(3 if trace == math.inf else 2, abs=0.2)


# ------------------------------------------------------------------------------------------ scatter


@pytest.mark.parametrize(
    ("name", "other", "trace"),
    [
        ("lq-1d", False, 0.0),
        ("lq-1d", True, 2.0),
        ("lq-4d", False, 2.0),
        ("lq-4d", True, 0.0),
        ("gaussian-1d", False, 2.0),
        ("gaussian-1d", True, 0.0),
    ],
)
def test_with_the_gradient_the_scatter_vanishes(name, other, trace):
    """Path by path, at every node, on policy and off: the variance of the target given X_t falls in proportion to the
    step, on one shared path; with p = 0 it stays."""
    c, ids, steps = case(name), torch.arange(400), [64, 256]
    old = c.other if other else c.policy
    fine = grids.uniform(c.problem, steps[-1])
    noise = Noise(2, fine=fine)
    paths = [c.run(old, fine[:: steps[-1] // n], Heun(), noise, ids) for n in steps]
    scatter = [c.miss(path, old, c.value.grad, trace).square().mean() for path in paths]
    assert fit_order(steps, [float(v) for v in scatter]) == pytest.approx(1, abs=0.4)
    assert float(c.miss(paths[-1], old, zero, trace).var(1).mean()) > 20 * float(scatter[-1])


def test_on_policy_any_p_costs_noise_alone():
    """Where nothing is linear: with a p that is wrong the target has the same mean as with p = 0, given X_t (z-tests
    of the difference at every node, which has mean zero for every step), and more noise."""
    entry = catalogue.get("mixture-1d")
    problem, n, steps = entry.problem, 4000, 24
    path = rollout(problem, entry.optimal_policy, grids.uniform(problem, steps), Noise(3), torch.arange(n))
    path = dataclasses.replace(path, reward=problem.reward(path.x[-1], None))
    a, a_ref = at_nodes(entry.optimal_policy, path), at_nodes(problem.reference, path)
    V = at_nodes(entry.value.value, path)

    def miss(p):
        return targets(problem, path, None, increments(problem, path, a, a_ref, a, at_nodes(p, path)), 0.0) - V

    plain, exact, bad = (miss(p)[:-1] for p in (zero, entry.value.grad, lambda t, x, c: torch.sin(3 * x) + t[:, None]))
    x = path.x[:-1, :, 0]
    for difference in (exact - plain, bad - plain):
        z = torch.stack([Estimate.of((difference * phi).T).z(0.0) for phi in (torch.ones_like(x), x, x.square())])
        assert float(z.abs().max()) < z_bound(2 * 3 * steps)
    variance = [float(m[0].var()) for m in (exact, plain, bad)]
    assert variance[0] < variance[1] / 4 and variance[1] < variance[2]


# ------------------------------------------------------------------------------------------ at the optimum


@given(gaussians(), SEEDS)
def test_policy_slope_at_the_optimum_is_the_gradient(p, seed):
    """R (a* - a_ref) = B' grad V*, for score as action beta ((1 + eta²)/(2 eta²)) (a* - s_ref) = grad V*, every
    eta."""
    t, y = states(p.problem, seed=seed)
    best, s_ref, truth = p.optimal_policy(t, y), p.score(t, y), p.value.grad(t, y)
    scale = float(truth.abs().max() + s_ref.abs().max() + best.abs().max())  # of what cancels in a* - s_ref
    slope = policy_slope(p.problem, t, best, s_ref)
    weight = p.beta * (1 + p.eta**2) / (2 * p.eta**2)
    torch.testing.assert_close(slope, weight * (best - s_ref), rtol=1e-12, atol=1e-12)
    assert float((slope - truth).abs().max()) < 1e-13 * (1 + weight) * scale + 1e-12


def test_policy_slope_of_a_linear_quadratic_problem():
    entry = catalogue.get("lq-1d")
    t, x = states(entry.problem)
    slope = policy_slope(entry.problem, t, entry.optimal_policy(t, x), entry.problem.reference(t, x))
    torch.testing.assert_close(slope, entry.value.grad(t, x), rtol=1e-10, atol=1e-10)


@given(SEEDS, st.integers(1, 4))
def test_policy_slope_inverts_greedy(seed, n):
    """B'p = R (a - a_ref) with a full square B that is not symmetric: the policy that is greedy for p has the slope
    p."""
    g = torch.Generator().manual_seed(seed)
    eye = torch.eye(n)
    B, R = normal(g, n, n) / 3 + 2 * eye, normal(g, n, n) / 5
    zeros = torch.zeros(n)
    problem = LQProblem(A=eye, B=B, S=eye, R=R @ R.mT + eye, Q=eye, G=eye, h=zeros, d=zeros, mean0=zeros, cov0=eye)
    t, a_ref, p = torch.zeros(6), normal(g, 6, n), normal(g, 6, n)
    a = greedy(problem, t, a_ref, p)
    torch.testing.assert_close(policy_slope(problem, t, a, a_ref), p, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian-16d", "mixture-2d-conditional"])
@pytest.mark.parametrize("eta", [0.6, 1.0])
def test_increments_with_the_policy_s_slope_are_log_likelihood_ratios(name, eta):
    """beta d log(dP/dP_ref) along dY, whoever moved Y, is

        beta [(kappa/(eta² g²)) <a - s_ref, dY - b_ref dt> - ½ (kappa²/(eta² g²)) |a - s_ref|² dt],

    b_ref = -f Y + kappa s_ref: with a left sum and the noise at its left-point variance, to rounding."""
    entry = catalogue.get(name)
    problem = dataclasses.replace(entry.problem, eta=eta)
    ids, times = torch.arange(7), grids.uniform(problem, 12)
    cond = entry.condition(ids)

    def spread(ids):
        return None if cond is None else entry.condition(ids)

    path = rollout(problem, lambda t, x, c: torch.sin(x), times, Noise(4), ids, solver=EulerMaruyama(True), cond=cond)
    clock = problem.clock(times).diff() / (problem.rate(times[:-1]) * times.diff())
    path = dataclasses.replace(path, xi=path.xi / clock.sqrt()[:, None, None])  # so that sqrt(int g²) xi is the step's
    a, a_ref = at_nodes(entry.optimal_policy, path, spread), at_nodes(problem.reference, path, spread)
    p = policy_slope(problem, path.flat()[0], a.flatten(0, 1), a_ref.flatten(0, 1)).view_as(path.x)
    steps = increments(problem, path, a, a_ref, torch.sin(path.x), p, spread(path.flat()[2]))
    for k, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True)):
        noise = eta**2 * problem.noising.g2(problem.s(t))
        kappa, push = problem.kappa(t), a[k] - a_ref[k]
        moved = path.x[k + 1] - path.x[k] - dt * (kappa * a_ref[k] - problem.noising.f(problem.s(t)) * path.x[k])
        ratio = kappa / noise * (push * moved).sum(1) - kappa**2 / noise / 2 * push.square().sum(1) * dt
        torch.testing.assert_close(steps[k], problem.beta * ratio, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "old"),
    [
        ("lq-1d", "neither"),
        ("gaussian-1d", "optimum"),
        ("mixture-1d", "reference"),
        ("mixture-2d-conditional", "neither"),
    ],
)
def test_path_consistency(name, old):
    """r(X_T) - V*(t, X_t) - beta log(dP*/dP_ref) = 0 path by path, under any law: what the discretisation leaves is of
    order ½ in root mean square (halving the step on a shared path)."""
    entry, ids, steps = catalogue.get(name), torch.arange(400), [64, 256]
    cond = None if entry.condition(ids) is None else entry.condition
    problem, best, value = optimum(entry)

    def neither(t, x, cond=None):
        return problem.reference(t, x, cond) + torch.cos(x) / 2

    policy = {"optimum": best, "reference": problem.reference, "neither": neither}[old]
    fine = grids.uniform(problem, steps[-1])
    errors = []
    for n in steps:
        times, noise = fine[:: steps[-1] // n], Noise(5, fine=fine)
        path = rollout(problem, policy, times, noise, ids, solver=Heun(), cond=entry.condition(ids))
        path = dataclasses.replace(path, reward=problem.reward(path.x[-1], entry.condition(ids)))
        a, a_ref, a_old = (at_nodes(f, path, cond) for f in (best, problem.reference, policy))
        t, _, node_ids = path.flat()
        p = policy_slope(problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).view_as(path.x)
        of_nodes = entry.condition(node_ids)
        spent = increments(problem, path, a, a_ref, a_old, p, of_nodes).flip(0).cumsum(0).flip(0)
        gap = path.reward - at_nodes(value, path, cond)[:-1] - spent
        errors.append(float(gap.square().mean().sqrt()))
    assert fit_order(steps, errors) == pytest.approx(0.5, abs=0.2)


def optimum(entry):
    """The problem, a* and V*; a diffusion is cut at s_min = 0.2, where no mode is so narrow as to need finer steps."""
    if entry.name == "lq-1d":
        return entry.problem, entry.optimal_policy, entry.value.value
    if entry.name == "mixture-2d-conditional":
        exact = dataclasses.replace(entry.exact, base=dataclasses.replace(entry.exact.base, s_min=0.2))
    else:
        exact = dataclasses.replace(entry.exact, s_min=0.2)
    return exact.problem, exact.optimal_policy, exact.value.value


# ------------------------------------------------------------------------------------------ the targets themselves

UNEVEN = torch.tensor([0.0, 0.05, 0.3, 0.45, 1.1, 1.6, 2.0], dtype=torch.float64)


def drawn(times=UNEVEN, seed=0):
    """A trajectory of lq-4d (discounted) with any reward, values and increments."""
    problem, g = catalogue.get("lq-4d").problem, torch.Generator().manual_seed(seed)
    path = rollout(problem, problem.reference, times, Noise(6), torch.arange(5))
    n = len(times)
    return problem, dataclasses.replace(path, reward=normal(g, 5)), normal(g, n, 5), normal(g, n - 1, 5)


@pytest.mark.parametrize("trace", [0.0, 1e-9, 0.7, 5.0, 1e6, math.inf])
def test_targets_by_hand(trace):
    """V_k + sum_{j >= k} e^{-trace (t_j - t_k)/T} delta_j on an uneven grid, in units of time t_k: increments and V are
    discounted to t = 0 and back. trace = 0: r - sum of the increments, no V; trace = infinity: V_{k+1} - increment."""
    problem, path, value, steps = drawn()
    got = targets(problem, path, value, steps, trace)
    decay = torch.exp(-problem.discount * UNEVEN)
    V = [*(decay[k] * value[k] for k in range(6)), decay[6] * path.reward]
    for k in range(7):
        total = V[k].clone()
        for j in range(k, 6):
            weight = 1.0 if j == k else math.exp(-trace * float(UNEVEN[j] - UNEVEN[k]) / 2.0)
            total += weight * (V[j + 1] - V[j] - steps[j])
        torch.testing.assert_close(got[k], total / decay[k], rtol=1e-12, atol=1e-12)
    if trace <= 1e-9:
        whole = (decay[6] * path.reward - steps.flip(0).cumsum(0).flip(0)) / decay[:6, None]
        torch.testing.assert_close(got[:-1], whole, rtol=1e-7, atol=1e-7)
    if trace >= 1e6:
        torch.testing.assert_close(got[:-1], (torch.stack(V[1:]) - steps) / decay[:6, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got[-1], path.reward)


def test_without_trace_no_value_is_needed():
    problem, path, value, steps = drawn()
    assert torch.equal(targets(problem, path, None, steps, 0.0), targets(problem, path, value, steps, 0.0))


@pytest.mark.parametrize("name", ["lq-1d", "lq-4d"])
def test_monte_carlo_is_the_martingale_residual(name):
    """With p = 0, on policy, target - V is the residual of `martingale_residual` with the same quadrature."""
    c = case(name)
    path = c.run(c.policy, grids.uniform(c.problem, 9), Heun(), ids=torch.arange(6))
    V = at_nodes(c.value.value, path)
    cost = at_nodes(lambda t, x, _: soft_cost(c.problem, t, x, c.policy(t, x), c.problem.reference(t, x)), path)
    residual = martingale_residual(c.problem, path, path.reward, V, cost)
    torch.testing.assert_close(c.miss(path, c.policy, zero), residual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("trace", [0.0, 2.0, math.inf])
def test_a_target_looks_ahead_only(trace):
    """That of a node is that of the same trajectory begun there."""
    c = case("lq-4d")
    path = c.run(c.policy, UNEVEN / 2, Heun(), ids=torch.arange(6))
    cut = dataclasses.replace(path, t=path.t[3:], x=path.x[3:], a=path.a[3:], xi=path.xi[3:], w=path.w[:, 3:])
    whole, part = (c.miss(v, c.other, c.value.grad, trace) for v in (path, cut))
    torch.testing.assert_close(whole[3:], part, rtol=1e-12, atol=1e-12)


@given(st.floats(0.2, 20.0), st.integers(4, 40), SEEDS)
def test_the_trace_decays_with_time_not_with_steps(trace, steps, seed):
    """The weights of an increment spread evenly over [0, T] sum to the integral of e^{-trace t/T} on any grid: a left
    sum of a decreasing function, so within the longest step times 1 - e^{-trace}. On a grid and on one that refines it
    they differ by no more either."""
    problem = dataclasses.replace(catalogue.get("lq-4d").exact, discount=0.0)
    T, shift = problem.horizon, torch.rand(2 * steps - 1, generator=torch.Generator().manual_seed(seed)) - 0.5
    fine = grids.jitter(grids.uniform(problem, 2 * steps), 0.9 * shift)
    for times in (fine, fine[::2]):
        path = rollout(problem, problem.reference, times, Noise(0), torch.arange(1))
        path = dataclasses.replace(path, reward=torch.zeros(1))
        spent = -targets(problem, path, torch.zeros(len(times), 1), times.diff()[:, None], trace)[0]
        integral = T * -math.expm1(-trace) / trace
        slack = float(times.diff().max()) * -math.expm1(-trace)
        assert -1e-12 < float(spent) - integral < slack


@pytest.mark.parametrize("name", ["lq-4d", "gaussian-16d"])
def test_martingale_by_hand(name):
    """sqrt(clock_{k+1} - clock_k) <L'p_k, xi_k>, a full L and a varying clock; the last p has no weight."""
    problem = catalogue.get(name).problem
    times = UNEVEN / 2 * problem.horizon
    path = rollout(problem, problem.reference, times, Noise(0), torch.arange(3))
    p = normal(torch.Generator().manual_seed(0), *path.x.shape)
    L = problem.S if name == "lq-4d" else problem.eta * torch.eye(16)
    spread = problem.clock(times).diff().sqrt()[:, None]
    by_hand = spread * torch.einsum("kbi,ij,kbj->kb", p[:-1], L, path.xi)
    torch.testing.assert_close(martingale(problem, path, p), by_hand)


# ------------------------------------------------------------------------------------------ costs, precision, refusals


def test_soft_cost_by_hand():
    """c + gamma (m/2 - ½ log det(2 pi e gamma R^-1)), a full R; and c alone where nothing explores."""
    problem = catalogue.get("lq-4d").problem
    t, x = states(problem)
    a, a_ref = normal(torch.Generator().manual_seed(1), 2, len(t), 2)
    cost = problem.running_cost(t, x, a, a_ref)
    entropy = float(torch.logdet(2 * math.pi * math.e * 0.05 * torch.linalg.inv(problem.R))) / 2
    torch.testing.assert_close(soft_cost(problem, t, x, a, a_ref), cost + 0.05 * (1 - entropy))
    quiet = dataclasses.replace(problem, gamma=0.0)
    assert torch.equal(soft_cost(quiet, t, x, a, a_ref), cost)


@given(gaussians(), SEEDS, st.floats(0.05, 0.5))
def test_soft_cost_is_what_exploring_costs_on_average(p, seed, gamma):
    """E c(a) - gamma Ent over a ~ N(s, gamma R^-1), by sigma points +- sqrt(d) L e_i, which are exact for a quadratic;
    and c' - c between two policies is <B (s' - s), grad> - q for any grad, since q is the advantage rate."""
    problem = dataclasses.replace(p.problem, gamma=gamma)
    t, y = states(problem, seed=seed)
    n, d = y.shape
    g = torch.Generator().manual_seed(seed)
    s, s_ref, grad = normal(g, 3, n, d)
    law = GaussianPolicy(lambda t, x, c: s, lambda t: problem.penalty(t).inverse_root().scale(gamma**0.5))(t, y)
    points = [law.sample(c * math.sqrt(d) * e.expand(n, d)) for e in torch.eye(d) for c in (1.0, -1.0)]
    mean = torch.stack([problem.running_cost(t, y, a, s_ref) for a in points]).mean(0)
    cost = soft_cost(problem, t, y, s, s_ref)
    torch.testing.assert_close(cost, mean - gamma * law.entropy(), rtol=1e-9, atol=1e-9)
    q = advantage_rate(problem, t, s_ref, s, s_ref, grad)
    push = (problem.control(t).apply(s_ref - s) * grad).sum(1)
    torch.testing.assert_close(soft_cost(problem, t, y, s_ref, s_ref) - cost, push - q, rtol=1e-9, atol=1e-9)


def test_soft_cost_sees_the_condition():
    class Tolled(LQProblem):
        def state_cost(self, t, x, cond=None):
            return cond * x.square().sum(1)

    base = catalogue.get("lq-4d").problem
    problem = Tolled(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.init})
    t, x = states(problem, n=3)
    zeros = torch.zeros(3, 2)
    without = soft_cost(problem, t, x, zeros, zeros, torch.zeros(3))
    difference = soft_cost(problem, t, x, zeros, zeros, torch.arange(3.0)) - without
    torch.testing.assert_close(difference, torch.arange(3.0) * x.square().sum(1))
    path = rollout(problem, problem.reference, UNEVEN, Noise(0), torch.arange(2))
    u, p = torch.zeros(7, 2, 2), torch.zeros(7, 2, 4)
    toll = [increments(problem, path, u, u, u, p, torch.full((14,), c)) for c in (0.0, 1.0)]
    decay = torch.exp(-problem.discount * UNEVEN[:-1])[:, None]
    by_hand = decay * UNEVEN.diff()[:, None] * path.x[:-1].square().sum(2)
    torch.testing.assert_close(toll[1] - toll[0], by_hand)


@pytest.mark.parametrize("name", ["lq-1d", "lq-4d", "gaussian-1d", "mixture-2d"])
def test_precision_is_the_states(name):
    """float32 trajectories have float32 increments and targets, close to float64's."""
    entry = catalogue.get(name)
    problem, times = entry.problem, grids.uniform(entry.problem, 8)
    results = []
    for dtype in (torch.float64, torch.float32):
        path = rollout(problem, entry.optimal_policy, times, Noise(0), torch.arange(4), dtype=dtype)
        path = dataclasses.replace(path, reward=problem.reward(path.x[-1], None))
        a, a_ref, p, V = (
            at_nodes(f, path) for f in (entry.optimal_policy, problem.reference, entry.value.grad, entry.value.value)
        )
        steps = increments(problem, path, a, a_ref, a_ref, p)
        results.append((steps, targets(problem, path, None, steps, 0.0), targets(problem, path, V, steps, 2.0)))
        assert {v.dtype for v in results[-1]} == {dtype}
    for wide, narrow in zip(*results, strict=True):
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-3, atol=1e-3 * float(wide.abs().max()))


def refusals():
    problem, path, value, steps = drawn()
    u, p = torch.zeros(7, 5, 2), torch.zeros(7, 5, 4)
    without = dataclasses.replace(path, reward=None)
    quiet = dataclasses.replace(path, xi=None)
    return {
        "no reward": lambda: targets(problem, without, value, steps, 1.0),
        "no noise increments xi": lambda: increments(problem, quiet, u, u, u, p),
        "value must be given": lambda: targets(problem, path, None, steps, 1.0),
        r"a_old \(": lambda: increments(problem, path, u, u, u[:, :1], p),
        r"a_ref \(": lambda: increments(problem, path, u, u[:1], u, p),
        r"p \(": lambda: increments(problem, path, u, u, u, p[:, :, :1]),
        r"value \(": lambda: targets(problem, path, value[..., None], steps, 1.0),
        r"steps \(": lambda: targets(problem, path, value, steps[:, :1], 1.0),
        r"a \(": lambda: policy_slope(problem, torch.zeros(5), u[0], u[0, :1]),
        "square B": lambda: policy_slope(problem, torch.zeros(5), u[0], u[0]),
    }


@pytest.mark.parametrize("message", refusals())
def test_what_cannot_be_is_refused(message):
    with pytest.raises(ValueError, match=message):
        refusals()[message]()


def test_without_noise_nothing_is_random_along_a_path():
    """On the probability flow a target is the return itself, whatever p; its price is a quarter of beta g²."""
    noisy = catalogue.get("gaussian-1d").problem
    fields = {f.name: getattr(noisy, f.name) for f in dataclasses.fields(noisy)}
    problem = ProbabilityFlow(**{**fields, "eta": 0.0})
    assert problem.noiseless and not noisy.noiseless
    path = rollout(problem, noisy.reference, grids.uniform(problem, 8), Noise(0), torch.arange(5), solver=Heun())
    assert not martingale(problem, dataclasses.replace(path, xi=None), torch.randn(9, 5, 1)).any()
    t = path.t[1:3]
    one = torch.ones(2, 1)
    expected = problem.beta * problem.control(t).apply(one).square() / problem.rate(t)[:, None]
    torch.testing.assert_close(problem.penalty(t).apply(one), expected)
    with pytest.raises(ValueError, match="eta must be 0"):
        ProbabilityFlow(**fields)
    for algorithm in (
        ActorCritic(),
        PPOPenalty(),
        PPOClip(),
        PathConsistency(),
        KLBudget(ActorCritic(nats=math.inf), 1.0),
    ):
        with pytest.raises(ValueError, match=r"take ActorCritic\(nats=math\.inf\)"):
            algorithm.check(problem, Heun(), catalogue.get("gaussian-1d").value)
    for algorithm in (ActorCritic(nats=math.inf), PolicyIteration()):
        algorithm.check(problem, Heun(), catalogue.get("gaussian-1d").value)
