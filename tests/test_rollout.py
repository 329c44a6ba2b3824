"""Rollouts: what they record, one path for every grid and process, exploration, and what they refuse."""

import dataclasses

import pytest
import torch
from hypothesis import given

from ctrl import (
    DDIM,
    Estimate,
    EulerMaruyama,
    Exact,
    Exponential,
    GaussianPolicy,
    Heun,
    IsotropicNormal,
    Multistep2,
    Noise,
    RectifiedFlow,
    Scalar,
    ScoreAsAction,
    VPLinear,
    fit_order,
    grids,
    path_kl,
    rollout,
    z_bound,
)  # fmt: skip
from ctrl.noise import ACTION, INITIAL
from ctrl.rollout import concatenate
from tests.strategies import SEEDS, gaussians, states
from toy import catalogue
from toy.chain import affine_steps, chain_moments

SOLVERS = [EulerMaruyama(), Heun(), Exponential(), Multistep2(), DDIM(0.5)]


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_problem_runs(name):
    """The recorded pieces have the stated shapes, and Euler's states follow from them: x_{k+1} = x_k + dt (b0 + B a)
    + L dW."""
    entry = catalogue.get(name)
    problem, ids = entry.problem, torch.arange(5)
    cond, times = entry.condition(ids), grids.uniform(problem, 6)
    path = rollout(problem, entry.optimal_policy, times, Noise(0), ids, cond=cond)
    assert path.x.shape == (7, 5, *problem.shape)
    assert path.a.shape[:2] == path.xi.shape[:2] == (6, 5)
    assert path.integrate(lambda t, x, c: t.new_ones(5)).tolist() == pytest.approx([problem.horizon] * 5)
    for k in range(6):
        t = times[k].expand(5)
        torch.testing.assert_close(path.a[k], entry.optimal_policy(t, path.x[k], cond))
        velocity = problem.drift(t, path.x[k]) + problem.control(t).apply(path.a[k])
        noise = problem.root.apply(path.xi[k]) * (problem.clock(times[k + 1]) - problem.clock(times[k])).sqrt()
        torch.testing.assert_close(path.x[k + 1], path.x[k] + (times[k + 1] - times[k]) * velocity + noise)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_any_split_of_the_samples_gives_the_same_paths(solver, parts):
    """Randomness belongs to the sample, not to the process: 1, 2 or 4 parts, bitwise."""
    entry = catalogue.get("mixture-2d-conditional")
    ids = torch.arange(100, 112)
    times = grids.log_snr(entry.problem, 8)

    def run(ids):
        return rollout(
            entry.problem, entry.problem.reference, times, Noise(9, 2), ids, solver=solver, cond=entry.condition(ids)
        ).x

    torch.testing.assert_close(torch.cat([run(part) for part in ids.chunk(parts)], 1), run(ids), rtol=1e-13, atol=1e-13)


def test_same_seed_same_numbers_and_other_epoch_others():
    problem = catalogue.get("mixture-1d").problem
    ids, times = torch.arange(4), grids.uniform(problem, 5)
    runs = [rollout(problem, problem.reference, times, Noise(*key), ids).x for key in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_moments_of_the_sampled_chain(solver):
    """Sampled rollouts against the exact moments of the same chain: mean and variance at the end, z-tests."""
    p = catalogue.get("gaussian-1d").exact
    policy, times, n = p.perturbed(-0.3, 0.6), grids.uniform(p.problem, 10), 20_000
    exact = chain_moments(p.problem, policy, times, solver, p.initial.mean, p.initial.covariance)
    x = rollout(p.problem, policy, times, Noise(6), torch.arange(n), solver=solver).x[-1, :, 0]
    mean, var = exact.mean[-1, 0], exact.covariance[-1, 0, 0]
    z = [Estimate.of(x).z(mean), Estimate.of((x - mean).square()).z(var)]
    assert max(abs(float(v)) for v in z) < z_bound(2 * len(SOLVERS))


def test_chain_of_euler_by_hand():
    """x_1 = (1 + dt (-f + kappa K)) x + dt kappa k + sqrt(int g²) xi, from the steps' own affine maps."""
    p = catalogue.get("gaussian-1d").exact
    problem, times = p.problem, grids.uniform(p.problem, 3)
    policy = p.perturbed(-0.3, 0.6)
    for k, step in enumerate(affine_steps(problem, policy, times, EulerMaruyama())):
        t, dt = times[k], times[k + 1] - times[k]
        K, kappa = float(policy.K(t[None].numpy())[0, 0, 0]), float(problem.kappa(t))
        f = float(p.noising.f(problem.s(t)))
        assert float(step.phi[0, 0]) == pytest.approx(1 + float(dt) * (-f + kappa * K), rel=1e-12)
        assert float(step.b[0]) == pytest.approx(float(dt) * kappa * float(policy.k(t[None].numpy())[0, 0]), rel=1e-12)
        variance = float(problem.clock(times[k + 1]) - problem.clock(t))
        assert float(step.gamma[0, 0]) == pytest.approx(variance**0.5, rel=1e-12)


def explore(policy, std):
    """N(policy, std² I)."""
    return GaussianPolicy(policy, lambda t: Scalar(std))


@pytest.mark.parametrize("solver", [EulerMaruyama(), Heun(), Exponential()], ids=str)
def test_sampled_and_held_actions_leave_the_law_at_order_one(solver):
    """Exploration averages out of the drift: the state's law moves by O(dt), exactly, from the chain's moments."""
    p = catalogue.get("gaussian-1d").exact
    policy, steps, gaps = p.perturbed(-0.3, 0.6), [40, 80, 160, 320], []
    for n in steps:
        args = grids.uniform(p.problem, n), solver, p.initial.mean, p.initial.covariance
        quiet, exploring = (chain_moments(p.problem, explore(policy, c), *args) for c in (0.0, 0.7))
        torch.testing.assert_close(quiet.mean, exploring.mean)
        gaps.append(float((exploring.covariance[-1] - quiet.covariance[-1]).abs()))
    assert fit_order(steps, gaps) == pytest.approx(1, abs=0.1)


def test_exploring_rollouts_have_the_exploring_chain_s_moments():
    """A GaussianPolicy in a rollout: variance by sampling against the exact chain, and actions scattered by L."""
    p = catalogue.get("gaussian-1d").exact
    policy, times, n = p.perturbed(-0.3, 0.6), grids.uniform(p.problem, 10), 20_000
    exploring, law = explore(policy, 1.5), (p.initial.mean, p.initial.covariance)
    exact, quiet = (chain_moments(p.problem, a, times, Heun(), *law) for a in (exploring, policy))
    path = rollout(p.problem, exploring, times, Noise(8), torch.arange(n), solver=Heun())
    x, mean, var = path.x[-1, :, 0], exact.mean[-1, 0], exact.covariance[-1, 0, 0]
    z = [Estimate.of(x).z(mean), Estimate.of((x - mean).square()).z(var)]
    scatter = path.a[4] - policy(times[4].expand(n), path.x[4])
    z += [Estimate.of(scatter.square()[:, 0]).z(1.5**2)]
    assert max(abs(float(v)) for v in z) < z_bound(3)
    assert abs(float(Estimate.of((x - mean).square()).z(quiet.covariance[-1, 0, 0]))) > 2 * z_bound(3)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_float32_follows_float64(solver):
    """The same path in float32, on a contracting linear problem: 20 steps, each of at most 20 roundings."""
    problem, ids = catalogue.get("gaussian-1d").problem, torch.arange(20)
    times = grids.uniform(problem, 20)
    wide, narrow = (
        rollout(problem, problem.reference, times, Noise(0), ids, solver=solver, dtype=dtype).x
        for dtype in (torch.float64, torch.float32)
    )
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=20 * 20 * 1.2e-7 * float(wide.abs().max()))


def test_images_are_states_too():
    """Shape (3, 4, 4): the same numbers as the flattened problem, and every sum runs over all dimensions."""

    def problem(shape):
        return ScoreAsAction(
            VPLinear(), lambda t, x, c: -x, lambda x, c: -x.flatten(1).square().sum(1), IsotropicNormal(shape), shape
        )

    flat, image = problem((48,)), problem((3, 4, 4))
    times, ids = grids.uniform(flat, 5), torch.arange(3)
    paths = [rollout(p, p.reference, times, Noise(0), ids, solver=Heun()) for p in (flat, image)]
    torch.testing.assert_close(paths[1].x.flatten(2), paths[0].x)
    costs = [path.at_nodes(lambda t, x, c, p=p: p.running_cost(t, x, 0 * x, p.reference(t, x, c)))
             for p, path in zip((flat, image), paths, strict=True)]  # fmt: skip
    torch.testing.assert_close(costs[1], costs[0])


@pytest.fixture
def problem():
    return catalogue.get("mixture-2d").problem


@pytest.mark.parametrize(
    "times",
    [
        torch.tensor([0.0]),
        torch.tensor([0.0, 0.5, 0.5]),
        torch.tensor([-0.1, 0.5]),
        torch.tensor([0.0, 1.5]),
        torch.zeros(2, 2),
        torch.tensor([[0.0, 0.1], [0.5, 0.6]]),
        torch.tensor([0.0, 1.0]),
    ],
    ids=str,
)
def test_times_are_checked(problem, times):
    with pytest.raises(ValueError, match="times"):
        rollout(problem, problem.reference, times, Noise(0), torch.arange(2))


def test_a_late_start_needs_a_state(problem):
    """The initial law is that of t = 0."""
    with pytest.raises(ValueError, match="start must be given"):
        rollout(problem, problem.reference, grids.uniform(problem, 4)[1:], Noise(0), torch.arange(2))


def test_half_precision_states_see_float32_times(problem):
    """1,000 steps are 1,000 times; in bfloat16 they would be about half as many."""
    seen = []

    def policy(t, x, cond=None):
        seen.append((t.dtype, float(t[0])))
        return torch.zeros_like(x)

    path = rollout(problem, policy, grids.uniform(problem, 1000), Noise(0), torch.arange(1), dtype=torch.bfloat16)
    assert path.x.dtype == torch.bfloat16
    assert {dtype for dtype, _ in seen} == {torch.float32}
    assert len({t for _, t in seen}) == 1000


def test_policy_precision_does_not_leak(problem):
    """A policy that answers in float64 does not turn float32 states into float64."""
    path = rollout(problem, lambda t, x, c: -x.double(), grids.uniform(problem, 3), Noise(0), torch.arange(2),
                   dtype=torch.float32)  # fmt: skip
    assert path.x.dtype == path.a.dtype == torch.float32


@pytest.mark.parametrize("differentiable", [True, False])
def test_a_graph_is_kept_on_request_only(problem, differentiable):
    theta = torch.zeros(2, requires_grad=True)
    path = rollout(problem, lambda t, x, c: theta - x, grids.uniform(problem, 3), Noise(0), torch.arange(2),
                   differentiable=differentiable)  # fmt: skip
    assert path.x.requires_grad is differentiable


def test_nodes_of_weight_zero_are_not_visited(problem):
    """The left sum never looks at the data end, where an eps-network's score may be infinite."""
    path = rollout(problem, problem.reference, grids.uniform(problem, 4), Noise(0), torch.arange(2))
    seen = []
    path.integrate(lambda t, x, c: (seen.append(float(t[0])), t)[1])
    assert seen == pytest.approx(path.t[:-1].tolist())


def test_start_is_checked(problem):
    with pytest.raises(ValueError, match="start must have shape"):
        rollout(
            problem, problem.reference, grids.uniform(problem, 2), Noise(0), torch.arange(2), start=torch.zeros(2, 3)
        )


@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2), ()], ids=str)
def test_policy_shape_is_checked(problem, shape):
    """Each of these would broadcast against (2, 2) states."""
    with pytest.raises(ValueError, match="policy must return actions of shape"):
        rollout(problem, lambda t, x, c: torch.zeros(shape), grids.uniform(problem, 1), Noise(0), torch.arange(2))


@pytest.mark.parametrize("shape", [(2,), (2, 2, 1), (1, 2)], ids=str)
def test_policy_shape_is_checked_with_matrices(shape):
    """B is (4, 2): actions may differ in shape from states, but have as many axes and samples."""
    lq = catalogue.get("lq-4d").problem
    with pytest.raises(ValueError, match="policy must return actions of shape"):
        rollout(lq, lambda t, x, c: torch.zeros(shape), grids.uniform(lq, 1), Noise(0), torch.arange(2))


def test_states_keep_the_precision_of_the_start(problem):
    """float32 in, float32 out, unless asked for."""
    start = torch.zeros(2, 2, dtype=torch.float32)
    for dtype, expected in ((None, torch.float32), (torch.float64, torch.float64)):
        path = rollout(
            problem, problem.reference, grids.uniform(problem, 2), Noise(0), torch.arange(2), start=start, dtype=dtype
        )
        assert path.x.dtype == expected


def test_control_must_not_vanish_at_the_data_end(problem):
    """Rectified flow: g² = 2s/(1 - s) and with it R vanish at s = 0."""
    with pytest.raises(ValueError, match="g² vanishes"):
        dataclasses.replace(problem, noising=RectifiedFlow(), s_min=0.0, s_max=0.9)


def test_a_state_that_is_not_finite_is_named(problem):
    """NaN from the policy at t > 0.5 for sample id 7: the step, the time and the sample are named."""
    ids, times = torch.tensor([5, 7]), grids.uniform(problem, 4)

    def policy(t, x, cond=None):
        broken = torch.where(t[:, None] > 0.5, torch.nan, 0.0) * torch.tensor([[0.0], [1.0]])
        return torch.where(torch.tensor([[False], [True]]), broken, torch.zeros(())).expand_as(x)

    with pytest.raises(ValueError, match=r"state x is not finite at step 4 \(t = 0\.999\), sample id 7"):
        rollout(problem, policy, times, Noise(0), ids)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eta", -0.1),
        ("beta", -1.0),
        ("gamma", -1.0),
        ("discount", -1.0),
        ("s_min", -1e-3),
        ("s_min", 1.0),
        ("s_max", 1.5),
        ("eta", float("nan")),
    ],
)
def test_problem_arguments_are_checked(problem, name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(problem, **{name: value})


def test_integrand_shape_is_checked(problem):
    path = rollout(problem, problem.reference, grids.uniform(problem, 2), Noise(0), torch.arange(2))
    with pytest.raises(ValueError, match="h must return one number a sample"):
        path.integrate(lambda t, x, c: x)


@pytest.mark.gpu
@pytest.mark.parametrize("name", catalogue.NAMES)
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=str)
def test_runs_on_a_gpu(name, solver):
    """Rollout, optimal policy and exact critic of every problem: the same numbers on both devices."""
    entry = catalogue.get(name)
    if solver in SOLVERS[2:] and not isinstance(entry.problem, ScoreAsAction):
        pytest.skip("exponential steps are for score as action")
    times, results = grids.uniform(entry.problem, 10), []
    for device in ("cpu", "cuda"):
        ids = torch.arange(8, device=device)
        cond = entry.condition(ids)
        path = rollout(entry.problem, entry.optimal_policy, times, Noise(0), ids, solver=solver, cond=cond)
        values = entry.value.value(path.t[5].expand(8), path.x[5], cond)
        results.append((path.x.cpu(), path_kl(entry.problem, path, entry.optimal_policy).cpu(), values.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_exploration_by_hand():
    """a_k = policy(t_k, x_k) + c(t_k) n_k, n_k the draw (ACTION, k) of the sample; Heun's second stage keeps a_k. The
    chain's own noise enters Euler's step by dt kappa(t_k) c(t_k)."""
    p = catalogue.get("gaussian-1d").exact
    problem, mean = p.problem, p.perturbed(-0.3, 0.6)
    times, ids = grids.uniform(problem, 4), torch.arange(100, 103)
    policy = GaussianPolicy(mean, lambda t: Scalar(1 + t))
    path = rollout(problem, policy, times, Noise(8), ids, solver=Heun())
    chain = affine_steps(problem, policy, times, EulerMaruyama())
    for k, (t, dt) in enumerate(zip(times[:-1], times.diff(), strict=True)):
        x, a = path.x[k], mean(t.expand(3), path.x[k]) + (1 + t) * Noise(8).normal(ids, (1,), ACTION, k)
        torch.testing.assert_close(path.a[k], a)
        start = x + (problem.clock(times[k + 1]) - problem.clock(t)).sqrt() * path.xi[k]
        first = problem.drift(t, x) + problem.kappa(t) * a
        second = problem.drift(times[k + 1], start + dt * first) + problem.kappa(times[k + 1]) * a
        torch.testing.assert_close(path.x[k + 1], start + dt / 2 * (first + second))
        assert float(chain[k].gamma[0, 1]) == pytest.approx(float(dt * problem.kappa(t) * (1 + t)), rel=1e-12)


RULES = {
    EulerMaruyama(): grids.left,
    Exponential(): grids.left,
    DDIM(0.5): grids.left,
    Heun(): grids.trapezoid,
    Multistep2(): grids.clock_trapezoid,
}


@pytest.mark.parametrize("solver", RULES, ids=str)
def test_quadrature_and_calls_are_the_solver_s(problem, solver):
    """A trajectory carries the quadrature of its solver's weak order, and a step costs `calls` policy evaluations."""
    times, seen = grids.uniform(problem, 5), []

    def policy(t, x, cond=None):
        seen.append(float(t[0]))
        return problem.reference(t, x, cond)

    path = rollout(problem, policy, times, Noise(0), torch.arange(2), solver=solver)
    assert torch.equal(path.w, RULES[solver](problem, times))
    assert torch.equal(Exact(None).quadrature(problem, times), grids.trapezoid(problem, times))
    assert len(seen) == 5 * solver.calls


def test_the_condition_goes_everywhere():
    """Rollout, record and node functions see cond: the same as with the condition built into the policy."""
    entry = catalogue.get("mixture-2d-conditional")
    problem, ids = entry.problem, torch.arange(6)
    cond, times = entry.condition(ids), grids.log_snr(problem, 4)
    assert cond.tolist() == [0, 1, 2, 0, 1, 2]
    path = rollout(problem, entry.optimal_policy, times, Noise(0), ids, cond=cond, solver=Heun())
    fixed = rollout(problem, lambda t, x, _: entry.optimal_policy(t, x, cond), times, Noise(0), ids, solver=Heun())
    assert torch.equal(path.x, fixed.x)
    assert path.cond is cond
    assert path.at_nodes(lambda t, x, c: c.to(x.dtype)).tolist() == [[0, 1, 2, 0, 1, 2]] * 5
    assert path.integrate(lambda t, x, c: c.to(x.dtype)).tolist() == pytest.approx((cond * problem.horizon).tolist())


def test_initial_laws_draw_from_the_initial_stream():
    """std n, m + L n and, for a mixture, mu_i + L_i n with i by the uniform (INITIAL, 1); n is the draw (INITIAL)."""
    noise, ids = Noise(3), torch.arange(50, 90)
    normal = noise.normal(ids, (2, 3), INITIAL)
    torch.testing.assert_close(IsotropicNormal((2, 3), 1.7)(noise, ids), 1.7 * normal)
    lq, normal = catalogue.get("lq-4d").problem, noise.normal(ids, (4,), INITIAL)
    torch.testing.assert_close(lq.initial(noise, ids), lq.mean0 + normal @ torch.linalg.cholesky(lq.cov0).mT)
    law = catalogue.get("gaussian-16d").exact.marginal(0.3)
    root = torch.linalg.cholesky(law.covariance)
    torch.testing.assert_close(law(noise, ids), law.mean + noise.normal(ids, (16,), INITIAL) @ root.mT)
    law = catalogue.get("mixture-2d").exact.data
    i = (noise.uniform(ids, (), INITIAL, 1)[:, None] > law.w.cumsum(0)).sum(1)
    root, normal = torch.linalg.cholesky(law.C)[i], noise.normal(ids, (2,), INITIAL)
    torch.testing.assert_close(law(noise, ids), law.mu[i] + (root @ normal[..., None])[..., 0])


def test_forward_times_stay_within_the_cut(problem):
    """s = s_max - t, but never a rounding beyond s_min or s_max, where coefficients may not exist."""
    t = torch.tensor([-1e-9, 0.25, problem.horizon + 1e-9])
    assert problem.s(t).tolist() == [1.0, 0.75, problem.s_min]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flat_goes_node_by_node(problem, dtype):
    """Entry k B + b is node k of sample b, as `unflatten` and `at_nodes` have it; times keep float32 at least."""
    ids, times = torch.tensor([7, 3, 9]), grids.uniform(problem, 4)
    path = rollout(problem, problem.reference, times, Noise(0), ids, dtype=dtype)
    t, x, of = path.flat()
    assert t.shape == of.shape == (15,) and x.shape == (15, 2)
    assert t.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and x.dtype == dtype
    for k in range(5):
        for b in range(3):
            i = 3 * k + b
            assert (float(t[i]), int(of[i])) == (float(times[k].to(t.dtype)), int(ids[b]))
            assert torch.equal(x[i], path.x[k, b])

    def h(t, x, cond=None):
        return t.to(x) + x.sum(1)

    assert torch.equal(h(t, x).unflatten(0, (5, 3)), path.at_nodes(h))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_concatenated_parts_are_the_whole(problem, solver):
    """Samples simulated in parts and joined are those simulated at once, with all that a trajectory holds."""
    ids, times = torch.arange(20, 27), grids.natural(problem, 4)

    def run(ids):
        path = rollout(problem, problem.reference, times, Noise(0), ids, solver=solver)
        return dataclasses.replace(path, reward=problem.reward(path.x[-1], None))

    whole, joined = run(ids), concatenate([run(part) for part in ids.split(3)])
    for name in ("t", "x", "a", "xi", "w", "ids", "reward"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-13, atol=1e-13)
    assert concatenate([whole]) is whole


def test_what_was_not_recorded_is_not_concatenated(problem):
    """None stays None: actions and noise of other solvers, and the reward, which nobody asked for."""
    path = rollout(problem, problem.reference, grids.uniform(problem, 2), Noise(0), torch.arange(2))
    assert path.reward is None
    bare = dataclasses.replace(path, a=None, xi=None)
    joined = concatenate([bare, bare])
    assert joined.a is None and joined.xi is None and joined.reward is None and joined.cond is None
    assert joined.x.shape == (3, 4, 2)


@given(gaussians(), SEEDS)
def test_endpoint_of_a_diffusion_is_the_posterior_mean(p, seed):
    """E[X_{s_min} | X_s = x] = m + (alpha/alpha_m) V_m V^-1 (x - alpha mu) for Gaussian data, at every eta; at t = T, x
    itself."""
    t, x = states(p.problem, seed=seed)
    (alpha, v), (alpha_m, v_m) = p.variances(p.problem.s(t)), p.variances(torch.tensor(p.s_min))
    U = p.axes[1]
    mean = alpha_m * p.mu + ((x - alpha * p.mu) @ U * (alpha / alpha_m * v_m / v)) @ U.mT
    torch.testing.assert_close(p.problem.endpoint(t, x, p.problem.reference(t, x)), mean, rtol=1e-9, atol=1e-9)
    for T in (p.problem.horizon, p.problem.horizon + 1e-9):
        torch.testing.assert_close(p.problem.endpoint(torch.full_like(t, T), x, x), x, rtol=1e-12, atol=1e-12)


def test_endpoint_elsewhere_is_the_state():
    lq = catalogue.get("lq-4d").problem
    t, x = states(lq)
    assert torch.equal(lq.endpoint(t, x, x[:, :2]), x)
