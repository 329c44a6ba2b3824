"""Solvers: orders from exact chain moments, strong order on one shared path, and the public samplers they reproduce."""

import dataclasses

import numpy as np
import pytest
import torch

from ctrl import (
    DDIM,
    EulerMaruyama,
    Exact,
    Exponential,
    Heun,
    IntegratedEuler,
    IsotropicNormal,
    Multistep2,
    Noise,
    ScoreAsAction,
    VPTable,
    fit_order,
    grids,
    rollout,
)  # fmt: skip
from ctrl.solvers import GaussianStep, at_steps, stack_steps
from toy import catalogue
from toy.chain import chain_moments

STEPS = [40, 80, 160, 320]


@pytest.fixture(scope="module")
def gaussian():
    return catalogue.get("gaussian-1d").exact


def moment_errors(p, policy, solver, grid=grids.uniform, steps=STEPS):
    """Distance of the chain's terminal mean and second moment from the continuous-time ones."""
    moments, T = p.lq.moments(policy), np.array([p.lq.horizon])
    mean, var = torch.from_numpy(moments.mean(T)[0]), torch.from_numpy(moments.covariance(T)[0])
    errors = []
    for n in steps:
        chain = chain_moments(p.problem, policy, grid(p.problem, n), solver, p.initial.mean, p.initial.covariance)
        errors.append(float((chain.mean[-1] - mean).abs().sum() + (chain.covariance[-1] - var).abs().sum()))
    return errors


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(
    ("solver", "order"),
    [
        (EulerMaruyama(), 1),
        (EulerMaruyama(left_noise=True), 1),
        (IntegratedEuler(), 1),
        (Exponential(), 1),
        (Heun(), 2),
        (Multistep2(), 2),
    ],
    ids=str,
)
def test_weak_order(gaussian, solver, order, eta):
    """Mean and covariance of the law at T, exactly, for a policy that is not the score; gap to the next order is 1."""
    p = dataclasses.replace(gaussian, eta=eta)
    grid = grids.log_snr if isinstance(solver, Exponential | Multistep2) else grids.uniform
    assert fit_order(STEPS, moment_errors(p, p.perturbed(-0.3, 0.6), solver, grid)) == pytest.approx(order, abs=0.1)


def test_weak_order_of_ddim(gaussian):
    """DDIM with ddim_eta = 1 is an order-1 scheme for the SDE with eta = 1."""
    assert fit_order(STEPS, moment_errors(gaussian, gaussian.perturbed(-0.3, 0.6), DDIM(1.0), grids.log_snr)) == (
        pytest.approx(1, abs=0.1)
    )


@pytest.mark.parametrize(("solver", "order"), [(EulerMaruyama(), 1), (Heun(), 2)], ids=str)
def test_weak_order_with_matrices(solver, order):
    problem = catalogue.get("lq-4d").exact
    lq, policy = problem.exact, problem.exact.optimal_policy()
    moments, T = lq.moments(policy), np.array([lq.horizon])
    errors = []
    for n in STEPS:
        chain = chain_moments(problem, policy, grids.uniform(problem, n), solver, problem.mean0, problem.cov0)
        gap = torch.cat([chain.mean[-1] - torch.from_numpy(moments.mean(T)[0]),
                         (chain.covariance[-1] - torch.from_numpy(moments.covariance(T)[0])).flatten()])  # fmt: skip
        errors.append(float(gap.norm()))
    assert fit_order(STEPS, errors) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("name", ["gaussian-1d", "lq-4d"])
def test_exact_transitions_have_no_error_at_any_step(name):
    entry = catalogue.get(name)
    lq = entry.exact.exact if name == "lq-4d" else entry.exact.lq
    policy = lq.optimal_policy()
    law = (torch.from_numpy(lq.mean0), torch.from_numpy(lq.cov0))
    chain = chain_moments(entry.problem, policy, grids.uniform(entry.problem, 3), Exact(lq.closed_loop(policy)), *law)
    moments, t = lq.moments(policy), grids.uniform(entry.problem, 3).numpy()
    torch.testing.assert_close(chain.mean, torch.from_numpy(moments.mean(t)), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(chain.covariance, torch.from_numpy(moments.covariance(t)), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    "solver", [EulerMaruyama(), *(pytest.param(s, marks=pytest.mark.long) for s in (Heun(), Exponential()))], ids=str
)
def test_strong_order_one_on_a_shared_path(solver):
    """Root-mean-square distance to a fine solution on the same Brownian path, nonlinear policy; the next strong order
    is 1.5. (2M claims weak order only.)"""
    problem = dataclasses.replace(catalogue.get("gaussian-1d").problem, s_min=0.05)

    def policy(t, x, cond=None):
        return problem.reference(t, x) + torch.sin(2 * x) / 2

    ids, steps, fine = torch.arange(300), [128, 256, 512], grids.uniform(problem, 4096)
    noise = Noise(seed=3, fine=fine)
    truth = rollout(problem, policy, fine, noise, ids, solver=Heun()).x[-1]
    errors = []
    for n in steps:
        x = rollout(problem, policy, fine[:: 4096 // n], noise, ids, solver=solver).x[-1]
        errors.append(float((x - truth).square().mean().sqrt()))
    assert fit_order(steps, errors) == pytest.approx(1, abs=0.1)


def test_eta_and_ddim_eta_agree_at_0_and_1_only(gaussian):
    times = grids.uniform(gaussian.problem, 7)
    for eta, same in ((0.0, True), (0.6, False), (1.0, True)):
        problem = dataclasses.replace(gaussian.problem, eta=eta)
        ours, ddim = Exponential().plan(problem, times), DDIM(eta).plan(problem, times)
        differences = [abs(a.root.c - b.root.c) + abs(a.from_a - b.from_a) for a, b in zip(ours, ddim, strict=True)]
        assert (max(differences) < 1e-12) is same


def table_problem(score, eta=1.0):
    return ScoreAsAction(
        VPTable.scaled_linear(),
        score,
        lambda x, c: x.sum(1),
        IsotropicNormal((3,)),
        (3,),
        eta=eta,
        s_min=1e-3,
        s_max=0.951,
    )


def wavy_score(t, x, cond=None):
    """Any smooth function serves: the comparison is of samplers."""
    return -x * (0.5 + t[:, None]) + torch.sin(3 * x)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_reproduces_diffusers(eta):
    """Same noise, same numbers as diffusers' DDIMScheduler; timestep k sits at s = (k + 1)/1000. Its table is
    float32."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(20)
    problem = table_problem(wavy_score)
    s = (scheduler.timesteps.double() + 1) / 1000
    path = rollout(problem, wavy_score, problem.s_max - s, Noise(5), torch.arange(4), solver=DDIM(eta))
    x = path.x[0]
    for k, timestep in enumerate(scheduler.timesteps[:-1]):
        t = (problem.s_max - s[k]).expand(4)
        eps = -problem.noising.sigma(s[k]) * wavy_score(t, x)
        noise = path.xi[k] if eta else None
        x = scheduler.step(eps, timestep, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(path.x[k + 1], x, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers on numpy 2
@pytest.mark.parametrize(("algorithm", "eta"), [("sde-dpmsolver++", 1.0), ("dpmsolver++", 0.0)])
def test_multistep_reproduces_diffusers(algorithm, eta):
    """2M is diffusers' DPMSolverMultistepScheduler (second order, midpoint) at eta = 1 and eta = 0."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", algorithm_type=algorithm, solver_order=2,
        timestep_spacing="leading", final_sigmas_type="sigma_min", lower_order_final=False,
    )  # fmt: skip
    scheduler.set_timesteps(19)
    s = (scheduler.timesteps.double() + 1) / 1000
    problem = dataclasses.replace(table_problem(wavy_score, eta), s_max=float(s[0]))
    path = rollout(problem, wavy_score, problem.s_max - s, Noise(5), torch.arange(4), solver=Multistep2())
    x = path.x[0]
    for k, timestep in enumerate(scheduler.timesteps[:-1]):
        eps = -problem.noising.sigma(s[k]) * wavy_score((problem.s_max - s[k]).expand(4), x)
        x = scheduler.step(eps, timestep, x, variance_noise=path.xi[k] if eta else None).prev_sample
        torch.testing.assert_close(path.x[k + 1], x, rtol=5e-5, atol=5e-5)


def test_the_ode_reaches_clean_data(gaussian):
    """eta = 0, s_min = 0: dlambda is infinite at the last step, and the step still lands on x0hat."""
    problem = dataclasses.replace(gaussian.problem, s_min=0.0, eta=0.0)
    times = grids.uniform(problem, 50)
    path = rollout(problem, problem.reference, times, Noise(0), torch.arange(3), solver=Exponential())
    last, t = path.x[-2], times[-2].expand(3)
    torch.testing.assert_close(path.x[-1], problem.endpoint(t, last, problem.reference(t, last)))


def test_exact_transitions_take_no_exploration():
    """A held action cannot steer a closed loop whose action is built in."""
    lq = catalogue.get("lq-1d").exact.exact
    policy, problem = lq.optimal_policy(), catalogue.get("lq-1d").problem
    with pytest.raises(ValueError, match="Exact"):
        rollout(problem, policy.explore(), grids.uniform(problem, 2), Noise(0), torch.arange(2),
                solver=Exact(lq.closed_loop(policy)))  # fmt: skip


def test_exponential_solvers_need_a_diffusion():
    problem = catalogue.get("lq-1d").problem
    with pytest.raises(ValueError, match="ScoreAsAction"):
        Exponential().plan(problem, grids.uniform(problem, 4))


def test_multistep_needs_finite_log_snr(gaussian):
    problem = dataclasses.replace(gaussian.problem, s_min=0.0)
    with pytest.raises(ValueError, match="s_min"):
        Multistep2().plan(problem, grids.uniform(problem, 4))


@pytest.mark.parametrize("ddim_eta", [-0.1, 1.1])
def test_ddim_eta_range(ddim_eta):
    with pytest.raises(ValueError, match="ddim_eta"):
        DDIM(ddim_eta)


def test_euler_s_noise(gaussian):
    """The variance of a step is eta² times the integral of g² by default, and eta² g²(t_k) dt with `left_noise`; all
    else is the same, and so is everything where the noise has a constant rate."""
    problem = dataclasses.replace(gaussian.problem, eta=0.7)
    times = grids.natural(problem, 6)
    s, exact, left = problem.s(times), EulerMaruyama(), EulerMaruyama(left_noise=True)
    variance = {
        exact: problem.noising.int_g2(s[:-1]) - problem.noising.int_g2(s[1:]),
        left: problem.noising.g2(s[:-1]) * times.diff(),
    }
    x, a = torch.tensor([[0.3]]), torch.tensor([[-1.1]])
    means = []
    for solver, truth in variance.items():
        laws = [solver.transition(problem, c, x, a, None) for c in solver.plan(problem, times)]
        roots = torch.stack([law.sample(torch.ones(1, 1)) - law.mean for law in laws])[:, 0, 0]
        torch.testing.assert_close(roots.square(), 0.49 * truth)
        means.append(torch.stack([law.mean for law in laws]))
    assert torch.equal(*means)
    lq = catalogue.get("lq-4d").problem
    times = torch.tensor([0.0, 0.3, 1.7])
    for one, other in zip(exact.plan(lq, times), left.plan(lq, times), strict=True):
        torch.testing.assert_close(one.root.m, other.root.m)
        torch.testing.assert_close(one.root.m @ one.root.m.mT, lq.S @ lq.S.mT * one.dt)


def test_integrated_euler_by_hand(gaussian):
    """x (1 - integral of f) + a times the integral of kappa, by Simpson's rule; the noise is Euler's."""
    problem = dataclasses.replace(gaussian.problem, eta=0.7)
    times = grids.natural(problem, 3)
    middle = (times[:-1] + times[1:]) / 2
    x, a = torch.tensor([[0.3]]), torch.tensor([[-1.1]])

    def integral(h):
        return times.diff() * (h(times[:-1]) + 4 * h(middle) + h(times[1:])) / 6

    drift = integral(lambda t: -problem.noising.f(problem.s(t)))
    control = integral(problem.kappa)
    euler = EulerMaruyama().plan(problem, times)
    for k, c in enumerate(IntegratedEuler().plan(problem, times)):
        law = IntegratedEuler().transition(problem, c, x, a, None)
        torch.testing.assert_close(law.mean, x + drift[k] * x + control[k] * a)
        torch.testing.assert_close(law.root.apply(x), euler[k].root.apply(x))


GAUSSIAN_STEPS = [
    EulerMaruyama(),
    EulerMaruyama(left_noise=True),
    IntegratedEuler(),
    Exponential(),
    DDIM(0.5),
    Multistep2(),
]


def step_by_step(problem, policy, solver, dtype=torch.float64):
    """A trajectory on an uneven grid, its solver's plan, and the law of every x_{k+1} given the past, one node after
    the other."""
    times = grids.jitter(grids.natural(problem, 7), torch.linspace(-0.4, 0.3, 6))
    path = rollout(problem, policy, times, Noise(1), torch.arange(5), solver=solver, dtype=dtype)
    plan, memory, laws = solver.plan(problem, times), None, []
    for k, c in enumerate(plan):
        laws.append(solver.transition(problem, c, path.x[k], path.a[k], memory))
        memory = solver.carry(c, path.x[k], path.a[k])
    return path, plan, laws


def shuffled(problem, solver, path, plan):
    """The same laws at nodes (k, b) in any order, all at once; k: (n,), b: (n,)."""
    index = torch.randperm(35, generator=torch.Generator().manual_seed(0))[:30]
    k, b = index // 5, index % 5
    last = (k - 1).clamp(min=0)
    steps = stack_steps(plan, k.device)
    memory = solver.carry(at_steps(steps, last), path.x[last, b], path.a[last, b])
    return k, b, solver.transition(problem, at_steps(steps, k), path.x[k, b], path.a[k, b], memory)


@pytest.mark.parametrize(
    ("name", "solver"), [("gaussian-16d", s) for s in GAUSSIAN_STEPS] + [("lq-4d", s) for s in GAUSSIAN_STEPS[:2]]
)
def test_steps_in_any_order(name, solver):
    """`at_steps`: transitions at shuffled nodes, of mixed k, are those of the rollout step by step, and so are the
    multistep memory, their samples (the rollout's next states) and their log-densities."""
    entry = catalogue.get(name)
    problem = entry.problem if name == "lq-4d" else dataclasses.replace(entry.problem, eta=0.7)

    def policy(t, x, cond=None):
        return entry.optimal_policy(t, x) + 0.3

    path, plan, laws = step_by_step(problem, policy, solver)
    k, b, law = shuffled(problem, solver, path, plan)
    assert len(set(k.tolist())) == 7
    torch.testing.assert_close(law.mean, torch.stack([v.mean for v in laws])[k, b], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(law.sample(path.xi[k, b]), path.x[k + 1, b], rtol=1e-12, atol=1e-12)
    y = path.x[k + 1, b] + 0.1
    log_probs = torch.stack([v.log_prob(x + 0.1) for v, x in zip(laws, path.x[1:], strict=True)])[k, b]
    torch.testing.assert_close(law.log_prob(y), log_probs, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "solver"), [("gaussian-16d", s) for s in GAUSSIAN_STEPS] + [("lq-4d", s) for s in GAUSSIAN_STEPS[:2]]
)
def test_steps_in_any_order_keep_the_states_precision(name, solver):
    """float64 coefficients do not turn float32 states into float64: the rollout's next states within 20 roundings."""
    entry = catalogue.get(name)
    path, plan, _ = step_by_step(entry.problem, entry.optimal_policy, solver, torch.float32)
    k, b, law = shuffled(entry.problem, solver, path, plan)
    x = law.sample(path.xi[k, b])
    assert law.mean.dtype == x.dtype == torch.float32
    torch.testing.assert_close(x, path.x[k + 1, b], rtol=0, atol=20 * 1.2e-7 * float(path.x.abs().max()))


def test_the_first_of_many_steps_needs_no_memory(gaussian):
    """2M extrapolates from the second step on: at k = 0 any memory has no weight."""
    solver, times = Multistep2(), grids.natural(gaussian.problem, 4)
    plan, k = solver.plan(gaussian.problem, times), torch.tensor([0, 1])
    x, a = torch.ones(2, 1), torch.zeros(2, 1)
    steps = at_steps(stack_steps(plan, k.device), k)
    near, far = (solver.transition(gaussian.problem, steps, x, a, m * torch.ones(2, 1)).mean for m in (0.0, 9.0))
    torch.testing.assert_close(near[0], solver.transition(gaussian.problem, plan[0], x[:1], a[:1], None).mean[0])
    assert float(near[0]) == float(far[0]) and abs(float(near[1] - far[1])) > 0.1


@pytest.mark.parametrize("solver", [*GAUSSIAN_STEPS, Heun(), Exact(None)], ids=str)
def test_multistep_methods_say_so(solver, gaussian):
    """`multistep` is what tells a learner to look one step back: it is true where `carry` hands something on."""
    problem, times = gaussian.problem, grids.natural(gaussian.problem, 2)
    c = None if isinstance(solver, Exact) else solver.plan(problem, times)[0]
    assert solver.multistep == (solver.carry(c, torch.ones(2, 1), torch.ones(2, 1)) is not None)
    assert isinstance(solver, GaussianStep) == (solver in GAUSSIAN_STEPS)


class Pushed(ScoreAsAction):
    """Score as action with a drift of its own."""

    def drift(self, t, x):
        return super().drift(t, x) + 1


@pytest.mark.parametrize("name", ["lq-1d", "lq-4d", "gaussian-16d", "mixture-2d", "pushed"])
def test_velocities_are_drift_and_control(name):
    """In float64 the same numbers: coefficients are planned, nothing else is."""
    problem = catalogue.get("mixture-2d" if name == "pushed" else name).problem
    if name == "pushed":
        problem = Pushed(**{f.name: getattr(problem, f.name) for f in dataclasses.fields(problem) if f.init})
    times = grids.natural(problem, 7)
    x = Noise(0).normal(torch.arange(6), problem.shape, 0)
    a = Noise(0).normal(torch.arange(6), problem.control(times[0]).adjoint(x).shape[1:], 1)
    for t, velocity in zip(times, problem.velocities(times), strict=True):
        assert torch.equal(velocity(x, a), problem.velocity(t, x, a))
