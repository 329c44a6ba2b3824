"""The forward likelihood ratio against closed forms: the score of an end in the state it came from."""

import dataclasses
import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ctrl import Estimate, Heun, Noise, grids, rollout, z_bound
from ctrl.evaluation import increments, policy_slope, targets
from ctrl.forward import bridge_score, log_ratio_rate, renoised, renoised_path
from ctrl.gradient import bridge_direction
from ctrl.qvalue import over_steps
from ctrl.regularize import kl_rate
from tests.strategies import SEEDS, mixtures, states
from toy import catalogue
from toy.gaussian import GaussianLaw, QuadraticReward
from toy.mixture import Mixture, Noised, tilt

# ------------------------------------------------------------------------------------------ exact posterior averages

NODES = torch.tensor([-(3**0.5), 0.0, 3**0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
"""The Gauss-Hermite rule of three nodes, exact for polynomials of degree five; r w has degree three."""


def noised(law: GaussianLaw | Mixture, problem) -> Noised:
    """A law at the data end, noised by the problem's noising from there."""
    if isinstance(law, GaussianLaw):
        law = Mixture(torch.ones(1), law.mean[None], law.covariance[None])
    return Noised(law, problem.noising, problem.s_min)


def averaged(problem, p: Noised, F, t: Tensor, x: Tensor, b: float) -> Tensor:
    """E[(F(X_T) - b) w | X_t = x], (n, d), for the reversal of p; exact for F of degree two."""
    d, (weights, means, C) = x.shape[1], p.posterior(problem.s(t), x)
    z = torch.cartesian_prod(*[NODES] * d).reshape(-1, d)
    mass = torch.cartesian_prod(*[WEIGHTS] * d).reshape(-1, d).prod(1)
    ends = means[:, :, None] + torch.einsum("nkij,qj->nkqi", torch.linalg.cholesky(C), z)
    (n, K, Q, _), ends = ends.shape, ends.reshape(-1, d)

    def again(v):
        return v.repeat_interleave(K * Q, 0)

    w = bridge_score(problem, again(t), again(x), ends) - again(p.score(problem.s(t), x))
    product = (F(ends) - b)[:, None] * w
    return torch.einsum("nk,q,nkqd->nd", weights, mass, product.view(n, K, Q, d))


def interior(problem, seed: int) -> tuple[Tensor, Tensor]:
    """Times away from the data end, where the bridge has no width, and states."""
    t, x = states(problem, 12, seed)
    return 0.9 * t, x


@given(mixtures().filter(lambda m: isinstance(m.reward, QuadraticReward)), SEEDS, st.floats(-3, 3))
def test_the_average_of_the_ratio_is_the_gradient_of_the_references_value(diffusion, seed, b):
    """E[(r - b) w | x] = grad E[r(X_T) | x] for any b; the right side differentiates the posterior's moments."""
    problem, r = diffusion.problem, diffusion.reward
    p = noised(diffusion.p.at(problem.s_min), problem)
    t, x = interior(problem, seed)

    def V(x: Tensor) -> Tensor:
        weights, means, C = p.posterior(problem.s(t), x)
        return (weights * (r(means) - torch.einsum("nkij,ij->nk", C, r.G) / 2)).sum(1)

    (slope,) = torch.autograd.grad(V(x.requires_grad_()).sum(), x)
    found = averaged(problem, p, r, t, x.detach(), b)
    torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-8 * float(1 + abs(b) + slope.abs().max()))


def test_with_the_density_it_is_the_direction_of_the_policy_gradient():
    """Along a policy that is no optimum but the score of its own law, that of the tilt by r/(2 beta), where
    r - beta log p_a/p_ref is r/2 but for a constant. Its value is from the Riccati equations of linear-quadratic
    control, which know of no noising."""
    exact = catalogue.get("gaussian-1d").exact
    problem, half = exact.problem, dataclasses.replace(exact, beta=2 * exact.beta)
    p = noised(half.tilted_data(), problem)
    V = exact.lq.value(half.lq.optimal_policy())
    t, x = interior(problem, 0)
    found = averaged(problem, p, lambda end: exact.reward(end) / 2, t, x, 0.7)
    direction = V.grad(t, x) - exact.beta * (p.score(problem.s(t), x) - exact.score(t, x))
    torch.testing.assert_close(found, direction, rtol=1e-6, atol=1e-6 * float(direction.abs().max()))


# ------------------------------------------------------------------------------------------ states


def test_renoised_ends_have_the_law_of_the_states_before_them():
    """Mean and covariance of (X_t, X_T) of the reference, z-scores."""
    exact = catalogue.get("mixture-2d").exact
    problem, ids = exact.problem, torch.arange(20_000)
    times = torch.tensor([0.0, 0.4, 0.8, 1.0]) * problem.horizon
    end = exact.p.at(problem.s_min)(Noise(1), ids)
    x = renoised_path(problem, times, end, Noise(2), ids)
    torch.testing.assert_close(x[-1], end, rtol=0, atol=1e-6)  # the rounding of s(T)
    for k, t in enumerate(times[:-1]):
        law = exact.p.at(float(problem.s(t)))
        A, _ = problem.noising.between(problem.s(t), problem.s_min)
        pairs = torch.cat([x[k], end], 1)
        data = exact.p.at(problem.s_min)
        mean = torch.cat([law.mean, data.mean])
        C = torch.cat([torch.cat([law.covariance, A * data.covariance], 1),
                       torch.cat([A * data.covariance, data.covariance], 1)])  # fmt: skip
        off = pairs - mean
        z = [Estimate.of(off[:, i]).z(0.0) for i in range(4)]
        z += [Estimate.of(off[:, i] * off[:, j]).z(float(C[i, j])) for i in range(4) for j in range(i, 4)]
        assert max(abs(float(v)) for v in z) < z_bound(3 * len(z))


def test_states_at_different_times_have_noise_of_their_own():
    problem, ids = catalogue.get("gaussian-16d").problem, torch.arange(2_000)
    times = torch.tensor([0.2, 0.5]) * problem.horizon
    x = renoised_path(problem, times, torch.zeros(2_000, 16), Noise(0), ids)
    assert abs(float(Estimate.of((x[0] * x[1]).mean(1)).z(0.0))) < z_bound(1)
    part = renoised_path(problem, times, torch.zeros(7, 16), Noise(0), ids[5:12])
    assert torch.equal(part, x[:, 5:12])  # by sample id, whichever samples are asked for


def test_the_bridge_is_what_noise_it_was_made_with():
    problem = catalogue.get("mixture-2d").problem
    t, end = interior(problem, 3)
    eps = torch.randn(12, 2)
    _, S2 = problem.noising.between(problem.s(t), problem.s_min)
    score = bridge_score(problem, t, renoised(problem, t, end, eps), end)
    torch.testing.assert_close(score, -eps / S2.sqrt()[:, None])


# ------------------------------------------------------------------------------------------ along simulated paths


def half_tilt(name: str, factor: float):
    """The catalogue's problem, the law of its optimum at factor beta, and log p_a/p_ref at states."""
    exact = catalogue.get(name).exact
    problem, data = exact.problem, exact.p.at(exact.problem.s_min)
    p, ref = (noised(law, problem) for law in (tilt(data, exact.reward, factor * problem.beta)[0], data))
    return problem, p, lambda t, x: p.log_prob(problem.s(t), x) - ref.log_prob(problem.s(t), x)


def followed(problem, p: Noised, steps: int, samples: int):
    """A path of the policy with its reward, and the actions at its nodes."""

    def policy(t, x, cond=None):
        return p.score(problem.s(t), x)

    path = rollout(problem, policy, grids.natural(problem, steps), Noise(0), torch.arange(samples), solver=Heun())
    path = dataclasses.replace(path, reward=problem.reward(path.x[-1], None))
    t, x, _ = path.flat()
    a, a_ref = (mean(t, x).view(path.x.shape) for mean in (policy, problem.reference))
    return path, policy, a, a_ref


def soft_return(problem, path, a, a_ref) -> Tensor:
    """r - beta log dP_a/dP_ref [t_k, T], (N+1, B)."""
    t, _, _ = path.flat()
    p = policy_slope(problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).view(path.x.shape)
    return targets(problem, path, None, increments(problem, path, a, a_ref, a, p), trace=0)


def test_the_log_ratio_of_noised_ends_is_that_of_their_densities_in_the_mean():
    """L(x_T) - E[L_0(x_0) | x_T], L = log p_a/p_ref, for policies that are scores of their own laws: by each end, over
    the noise of its nodes. The last step, where the rate has no bound, is left out on both sides; the error of the
    trapezoidal rule is less than the standard error here."""
    problem, p, L = half_tilt("mixture-2d", 2)
    ends, again, steps = torch.tensor([[1.2, 0.1], [-0.9, 1.0], [-0.4, -1.4]]), 4_000, 80
    end, times = ends.repeat_interleave(again, 0), grids.natural(problem, steps)
    x = renoised_path(problem, times, end, Noise(0), torch.arange(len(end)))[:-1]
    t, flat = times[:-1].repeat_interleave(len(end)).to(x.dtype), x.flatten(0, 1)
    a, a_ref = p.score(problem.s(t), flat), problem.reference(t, flat)
    rate = log_ratio_rate(problem, t, flat, end.expand_as(x).flatten(0, 1), a, a_ref).view(steps, -1)
    exact = L(t, flat).view(steps, -1)
    found = torch.trapezoid(rate, times[:-1].to(rate), dim=0)
    off = found - (exact[-1] - exact[0])
    assert max(abs(float(Estimate.of(v).z(0.0))) for v in off.view(len(ends), again)) < z_bound(3)
    assert min(abs(float(Estimate.of(v).z(0.0))) for v in found.view(len(ends), again)) > z_bound(3)  # not by noise


def test_the_log_ratio_of_a_path_is_that_of_its_ends():
    """log dP_a/dP_ref [t, T] = L(x_T) - L_t(x_t), to half an order of the step, off the optimum."""
    problem, p, L = half_tilt("mixture-2d", 2)
    errors = []
    for steps in (20, 40, 80, 160):
        path, _, a, a_ref = followed(problem, p, steps, 1_000)
        t, x, _ = path.flat()
        ratio = L(t, x).view(path.x.shape[:2])
        exact = path.reward - problem.beta * (ratio[-1] - ratio)
        errors.append(float((soft_return(problem, path, a, a_ref) - exact)[0].square().mean().sqrt()))
    rates = [float(torch.tensor(a / b).log2()) for a, b in itertools.pairwise(errors)]
    assert min(rates) > 0.35 and errors[-1] < 0.1


def test_the_variance_dies_at_the_optimum_with_the_soft_return_alone():
    """With V* for the baseline the direction's second moment falls with the step; with the rate of the KL in place of
    its density it stays, and so does a mean that is not zero: the fixed point is another."""
    problem, p, _ = half_tilt("mixture-2d", 1)
    V, power, z = catalogue.get("mixture-2d").value, {"density": [], "rate": []}, {}
    for steps in (20, 80):
        path, policy, a, a_ref = followed(problem, p, steps, 2_000)
        t, x, _ = path.flat()
        value = V.value(t, x).view(path.x.shape[:2])[:-1]
        rate = kl_rate(problem, t, a.flatten(0, 1), a_ref.flatten(0, 1)).view(value.shape[0] + 1, -1)
        spent = over_steps(path, rate).flip(0).cumsum(0).flip(0)
        returns = {
            "density": soft_return(problem, path, a, a_ref)[:-1],
            "rate": path.reward - problem.beta * spent,
        }
        for name, G in returns.items():
            integral = (path.t.diff()[:, None, None] * bridge_direction(problem, path, policy, G - value)).sum(0)
            power[name].append(float(integral.square().sum(1).mean()))
            z[name] = max(abs(float(Estimate.of(v).z(0.0))) for v in integral.T)
    assert power["density"][1] < 0.35 * power["density"][0] and power["density"][1] < 0.05 * power["rate"][1]
    assert power["rate"][1] > 0.5 * power["rate"][0]
    assert z["density"] < z_bound(2) < 10 < z["rate"]
