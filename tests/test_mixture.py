"""Gaussian mixtures at eta = 1: the closed forms against Bayes, quadrature, the HJB equation and samples."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import multivariate_normal

from ctrl import Estimate, Heun, Noise, VPLinear, advantage_rate, greedy, grids, rollout, z_bound
from ctrl.noise import INITIAL
from tests.strategies import SEEDS, mixtures, normal, states
from toy import catalogue
from toy.gaussian import QuadraticReward
from toy.mixture import GuidedMixture, LogRatioReward, Mixture, MixtureDiffusion, Noised, expect, tilt


@given(mixtures())
def test_score_and_density(p):
    """log p_s against scipy, its gradient against autograd, and the Tweedie mean (x + sigma² score)/alpha against
    Bayes."""
    t, x = states(p.problem)
    s = p.problem.s(t)
    density = 0.0
    alpha, sigma = p.noising.alpha(s), p.noising.sigma(s)
    for w, mu, C in zip(p.data.w, p.data.mu, p.data.C, strict=True):
        density = density + w * torch.tensor([
            multivariate_normal.pdf(x[i], alpha[i] * mu, alpha[i] ** 2 * C + sigma[i] ** 2 * torch.eye(len(mu)))
            for i in range(len(x))
        ])  # fmt: skip
    torch.testing.assert_close(p.p.log_prob(s, x).exp(), density, rtol=1e-8, atol=0.0)
    y = x.clone().requires_grad_()
    (auto,) = torch.autograd.grad(p.p.log_prob(s, y).sum(), y)
    score = p.score(t, x)
    torch.testing.assert_close(score, auto, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(p.noising.tweedie(s, x, score), p.p.posterior_mean(s, x), rtol=1e-8, atol=1e-8)


@given(mixtures())
def test_tilted_mixture(p):
    """log p~ = log p + r/beta - log Z at the data end; at every s, score of the tilted mixture = s_ref + grad
    V*/beta."""
    t, x = states(p.problem)
    tilted, log_z = p.tilted
    data = p.p.at(p.s_min)
    torch.testing.assert_close(
        tilted.base.log_prob(x), data.log_prob(x) + p.reward(x) / p.beta - log_z, rtol=1e-8, atol=1e-8
    )
    y = x.clone().requires_grad_()
    (grad_v,) = torch.autograd.grad(p.value.value(t, y).sum(), y)
    torch.testing.assert_close(p.value.grad(t, x), grad_v, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.optimal_policy(t, x), p.score(t, x) + grad_v / p.beta, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        p.optimal_policy(t, x), greedy(p.problem, t, p.score(t, x), grad_v), rtol=1e-8, atol=1e-8
    )


@given(mixtures())
def test_value_is_the_tilted_expectation_over_the_posterior(p):
    """V* = beta log E[e^{r/beta} | Y_t = y]: the posterior of X_{s_min} by Bayes, then its normaliser under the
    tilt."""
    t, x = states(p.problem, n=5)
    data = Noised(p.p.at(p.s_min), p.noising, p.s_min)
    w, means, C = data.posterior(p.problem.s(t), x)
    values = p.value.value(t, x)
    for i in range(len(x)):
        posterior = Mixture(w[i].clamp_min(1e-300), means[i], (C[i] + C[i].mT) / 2)
        if isinstance(
            p.reward, LogRatioReward
        ):  # E[q/p | y] has no closed form over the posterior: importance identity
            ratio = Noised(p.reward.q, p.noising, p.s_min).log_prob(p.problem.s(t[i : i + 1]), x[i : i + 1])
            log_z = float(ratio - data.log_prob(p.problem.s(t[i : i + 1]), x[i : i + 1]))
        else:
            log_z = float(tilt(posterior, p.reward, p.beta)[1])
        assert float(values[i]) == pytest.approx(p.beta * log_z, rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("fraction", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("y", [-2.0, -0.3, 1.5])
def test_value_by_quadrature(fraction, y):
    """V* = beta log of the integral of p(x | y) e^{r(x)/beta} dx, x in R, for mixture-1d and for a log-ratio reward."""
    base = catalogue.get("mixture-1d").exact
    target = Mixture(torch.tensor([0.2, 0.8]), torch.tensor([[-0.8], [1.0]]), torch.tensor([[[0.08]], [[0.1]]]))
    ratio = dataclasses.replace(base, reward=LogRatioReward(target, base.p.at(base.s_min), base.beta))
    for p in (base, ratio):
        t = torch.tensor([fraction * p.problem.horizon])
        alpha, variance = (float(v) for v in p.noising.between(p.problem.s(t), p.s_min))

        def joint(x, tilt, p=p, alpha=alpha, variance=variance):
            x = torch.tensor([[x]])
            log = (
                p.p.at(p.s_min).log_prob(x) - (y - alpha * x[:, 0]) ** 2 / (2 * variance) + tilt * p.reward(x) / p.beta
            )
            return float(log.exp())

        integral = [quad(joint, -6, 6, args=(k,), epsabs=0, epsrel=1e-11, limit=400, points=[-1, 0, y / alpha, 1.2]
                         if abs(y / alpha) < 6 else None)[0] for k in (1, 0)]  # fmt: skip
        exact = p.beta * math.log(integral[0] / integral[1])
        assert float(p.value.value(t, torch.tensor([[y]]))) == pytest.approx(exact, rel=1e-8, abs=1e-8)


@given(mixtures(), SEEDS)
def test_value_solves_the_hjb_equation(p, seed):
    """dV/dt + <-fy + kappa s_ref, grad V> + (g²/2) lap V + (g²/(2 beta)) |grad V|² = 0 at eta = 1, any dimension."""
    problem = p.problem
    t, y = states(problem, n=6, seed=seed)
    t, y = 0.02 * problem.horizon + 0.9 * t, y.requires_grad_()
    grad = p.value.grad(t, y)
    laplacian = sum(torch.autograd.grad(grad[:, i].sum(), y, retain_graph=True)[0][:, i] for i in range(y.shape[1]))
    with torch.no_grad():
        h = 1e-4 * problem.horizon
        terms = sum(
            c * (p.value.value(t + k * h, y) - p.value.value(t - k * h, y)) for k, c in ((1, 45), (2, -9), (3, 1))
        )
        dt = terms / (60 * h)
        g2 = problem.rate(t)
        drift = problem.drift(t, y) + problem.control(t).apply(p.score(t, y))
        parts = dt, (drift * grad).sum(1), g2 / 2 * laplacian, g2 / (2 * p.beta) * grad.square().sum(1)
        scale = 1 + sum(part.abs() for part in parts)
        # the time difference: rounding eps |V| / h, |V| up to its parts in the log-densities
        rounding = 2e-16 * (1 + p.p.log_prob(p.problem.s(t), y).abs() + p.value.value(t, y).abs() * 4) / h * p.beta
        assert bool((sum(parts).abs() < 1e-7 * scale + 50 * rounding).all())


@given(mixtures(), SEEDS)
def test_optimal_q_is_never_positive(p, seed):
    """q*(t, y, a) <= 0 with equality at a*: here -(beta g²/2) |a - a*|² exactly (eta = 1)."""
    t, y = states(p.problem, seed=seed)
    best, a = p.optimal_policy(t, y), normal(torch.Generator().manual_seed(seed), *y.shape)
    q = advantage_rate(p.problem, t, a, best, p.score(t, y), p.value.grad(t, y))
    quadratic = -p.beta / 2 * p.problem.rate(t) * (a - best).square().sum(1)
    scale = p.problem.rate(t) * (1 + best.square().sum(1) + p.score(t, y).square().sum(1))
    assert float(((q - quadratic) / scale).abs().max()) < 1e-10


@given(mixtures())
def test_safe_far_out_in_the_tails(p):
    """At |x| = 1e5 the densities underflow; scores and values stay finite, and the score is its nearest component's."""
    t, x = states(p.problem)
    far = 1e5 * x / x.norm(dim=1, keepdim=True)
    for value in (p.score(t, far), p.optimal_policy(t, far), p.value.value(t, far), p.value.grad(t, far)):
        assert bool(torch.isfinite(value).all())


def test_one_component_is_a_gaussian():
    """A mixture of one reproduces toy.gaussian: V*, grad V*, a* (independent code)."""
    gaussian = catalogue.get("gaussian-16d").exact
    one = Mixture(torch.ones(1), gaussian.mu[None], gaussian.C[None])
    p = MixtureDiffusion(gaussian.noising, one, gaussian.reward, gaussian.beta)
    t, x = states(p.problem)
    torch.testing.assert_close(p.value.value(t, x), gaussian.value.value(t, x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.value.grad(t, x), gaussian.value.grad(t, x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.optimal_policy(t, x), gaussian.optimal_policy(t, x), rtol=1e-8, atol=1e-8)


def test_starting_from_the_tilted_law_the_optimum_is_the_tilted_law():
    """Y_0 ~ p~_{s_max} and a = a*: Y_T ~ p~ exactly. Sampler and 2nd-order rollout, z-tests on features."""
    p = catalogue.get("mixture-2d").exact
    tilted, _ = p.tilted
    p = dataclasses.replace(p, start=tilted.at(p.s_max))
    n, noise = 20_000, Noise(seed=7)
    exact = p.sample_optimum(noise, torch.arange(n))
    path = rollout(p.problem, p.optimal_policy, grids.log_snr(p.problem, 150), noise, torch.arange(n), solver=Heun())
    for x in (exact, path.x[-1]):
        z = torch.cat([(features(x) - truth_of(tilted.base)).mean(0) / (features(x).std(0) / n**0.5)])
        assert float(z.abs().max()) < z_bound(2 * z.numel())


def features(x):
    """x, x_i x_j, and a wave that tells modes apart."""
    moments = torch.einsum("bi,bj->bij", x, x).flatten(1)
    return torch.cat([x, moments, torch.cos(2 * x)], 1)


def truth_of(mixture):
    """The exact expectation of `features`: moments, and E cos(2 x_i) from the characteristic function."""
    second = mixture.covariance + mixture.mean[:, None] * mixture.mean
    variance = mixture.C.diagonal(dim1=1, dim2=2)
    wave = (mixture.w[:, None] * torch.cos(2 * mixture.mu) * torch.exp(-2 * variance)).sum(0)
    return torch.cat([mixture.mean, second.flatten(), wave])


@pytest.mark.parametrize(
    "eta", [0.0, 1.0, pytest.param(0.5, marks=pytest.mark.long), pytest.param(1.6, marks=pytest.mark.long)]
)
def test_marginals_are_kept_at_every_eta(eta):
    """Y_0 ~ p_{s_max}, a = the score: Y_T ~ p_{s_min} at every eta; z-tests on features. Heun's bias, from half the
    steps on the same initial states, stays under a third of a standard error."""
    p = dataclasses.replace(catalogue.get("mixture-2d").exact, eta=eta, start=None)
    n, fine = 10_000, grids.log_snr(p.problem, 240)
    noise = Noise(seed=11, fine=fine)
    full, half = (
        rollout(p.problem, p.score, grid, noise, torch.arange(n), solver=Heun()).x[-1] for grid in (fine, fine[::2])
    )
    stderr = features(full).std(0) / n**0.5
    bias = (features(full) - features(half)).mean(0) / 3
    assert float((bias.abs() / stderr).max()) < 1 / 3
    z = (features(full).mean(0) - truth_of(p.p.at(p.s_min))) / stderr
    assert float(z.abs().max()) < z_bound(4 * z.numel()) + 1 / 3


@pytest.mark.long
@pytest.mark.parametrize("name", ["mixture-1d", "mixture-2d", "mixture-2d-rare-mode", "mixture-2d-conditional"])
def test_J_optimal_by_monte_carlo(name):
    """J* = E[r(Y_T) - integral of c] under a*, by a second-order rollout: z-test, at two step sizes on one path."""
    entry = catalogue.get(name)
    problem, ids = entry.problem, torch.arange(8000)
    cond, fine = entry.condition(ids), grids.log_snr(problem, 160)

    def total(grid):
        path = rollout(problem, entry.optimal_policy, grid, Noise(2, fine=fine), ids, solver=Heun(), cond=cond)

        def cost(t, x, c):
            return problem.running_cost(t, x, entry.optimal_policy(t, x, c), problem.reference(t, x, c))

        return problem.reward(path.x[-1], cond) - path.integrate(cost)

    full, half = total(fine), total(fine[::2])
    estimate, bias = Estimate.of(full), float((full - half).mean().abs())
    assert bias < float(estimate.stderr)
    assert abs(float(estimate.z(entry.J_optimal.mean))) < z_bound(4) + bias / float(estimate.stderr)


def test_expect_is_exact_for_polynomials():
    law = catalogue.get("mixture-2d").exact.data
    second = law.covariance + law.mean[:, None] * law.mean
    torch.testing.assert_close(expect(law, lambda y: y[:, 0] * y[:, 1]).mean, second[0, 1])
    assert float(expect(law, lambda y: y[:, 0]).stderr) == 0.0


def test_initial_law_by_component():
    """Samples of a mixture law, keyed by id: moments as z-scores, and any subset of ids gives the same rows."""
    law = catalogue.get("mixture-2d").exact.data
    ids = torch.arange(20_000)
    x = law(Noise(4), ids)
    z = (features(x).mean(0) - truth_of(law)) / (features(x).std(0) / len(x) ** 0.5)
    assert float(z.abs().max()) < z_bound(z.numel())
    assert torch.equal(law(Noise(4), ids[5:9]), x[5:9])


@given(st.floats(0.0, 7.5), SEEDS)
def test_guided_score_is_the_score_of_a_mixture(guidance, seed):
    """(1 - w) s(x) + w s(x | c) = the score of the mixture shifted by w shifts[c]; V* and a* follow, class by class."""
    guided = dataclasses.replace(catalogue.get("mixture-2d-conditional").exact, guidance=guidance)
    t, x = states(guided.problem, seed=seed)
    cond = torch.arange(len(x)) % 3
    score, value = guided.score(t, x, cond), guided.value.value(t, x, cond)
    for c, of_class in enumerate(guided.classes):
        rows = cond == c
        torch.testing.assert_close(score[rows], of_class.score(t[rows], x[rows]), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(value[rows], of_class.value.value(t[rows], x[rows]))
    grad = guided.value.grad(t, x, cond)
    torch.testing.assert_close(guided.optimal_policy(t, x, cond), score + grad / guided.base.beta, rtol=1e-8, atol=1e-8)


def test_guidance_refuses_shifts_that_leave_the_family():
    guided = catalogue.get("mixture-2d-conditional").exact
    with pytest.raises(ValueError, match="shifts"):
        GuidedMixture(guided.base, torch.tensor([[0.0, 1.0]]), guided.rewards[:1])
    with pytest.raises(ValueError, match="rewards"):
        GuidedMixture(guided.base, guided.shifts, guided.rewards[:1])
    # C^-1 shift and its product with mu_i are common, but noise turns C: the shift is no axis of it
    correlated = Mixture(
        torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 1.0], [-0.5, -1.0]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]] * 2)
    )
    with pytest.raises(ValueError, match="shifts"):
        GuidedMixture(dataclasses.replace(guided.base, data=correlated), torch.tensor([[1.0, 0.0]]), guided.rewards[:1])


@pytest.mark.parametrize(
    "cond", [None, torch.tensor([3]), torch.tensor([-1]), torch.tensor([0.5]), torch.tensor([0, 1])], ids=str
)
def test_condition_must_be_a_class(cond):
    entry = catalogue.get("mixture-2d-conditional")
    with pytest.raises(ValueError, match="cond"):
        entry.value.value(torch.zeros(1), torch.zeros(1, 2), cond)


@pytest.mark.parametrize("what", ["value", "tilted"])
def test_no_closed_form_off_eta_one(what):
    p = dataclasses.replace(catalogue.get("mixture-1d").exact, eta=0.4)
    with pytest.raises(ValueError, match=r"eta = 0\.4"):
        getattr(p, what)


def test_rewards_without_a_closed_form():
    p = catalogue.get("mixture-1d").exact
    with pytest.raises(ValueError, match=r"reward\.scale"):
        tilt(p.data, LogRatioReward(p.data, p.data, 0.3), 0.5)
    other = LogRatioReward(p.data, p.data, p.beta)
    with pytest.raises(ValueError, match=r"reward\.p"):
        tilt(p.p.at(p.s_min), other, p.beta)
    with pytest.raises(ValueError, match="no closed form"):
        tilt(p.data, lambda x, cond=None: x.sum(1), 0.5)
    with pytest.raises(ValueError, match=r"reward\.G"):
        tilt(p.data, QuadraticReward(-100 * torch.eye(1), torch.zeros(1)), 0.5)


@pytest.mark.parametrize(
    ("w", "mu", "C", "match"),
    [
        ([0.5, 0.6], torch.zeros(2, 1), torch.ones(2, 1, 1), "sum to 1"),
        ([0.5, 0.5], torch.zeros(2, 1), -torch.ones(2, 1, 1), "C must be positive definite"),
        ([1.0], torch.zeros(2, 1), torch.ones(2, 1, 1), "shapes"),
        ([0.5, 0.5], torch.zeros(2, 1), torch.eye(2).expand(2, 2, 2), "shapes"),
        ([1.5, -0.5], torch.zeros(2, 1), torch.ones(2, 1, 1), "w must be positive"),
    ],
)
def test_wrong_mixtures(w, mu, C, match):
    with pytest.raises(ValueError, match=match):
        Mixture(torch.tensor(w), mu, C)


def test_large_initial_time_has_no_memory():
    """With alpha(s_max) ~ 0 the value at t = 0 no longer depends on y: V* = beta log Z, the normaliser of p
    e^{r/beta}."""
    p = dataclasses.replace(catalogue.get("mixture-2d").exact, noising=VPLinear(0.1, 200.0))
    y = 3 * torch.from_numpy(np.random.default_rng(0).standard_normal((20, 2)))
    value = p.value.value(torch.zeros(20), y)
    torch.testing.assert_close(value, (p.beta * p.tilted[1]).expand(20), rtol=1e-10, atol=1e-10)


def test_the_optimum_is_sampled_by_hand():
    """Y_T = m_i(Y_0) + L_i n, i by the uniform (INITIAL, 2), n = (INITIAL, 3): streams that Y_0 has not used."""
    p, noise, ids = catalogue.get("mixture-2d").exact, Noise(3), torch.arange(50, 90)
    w, means, C = p.tilted[0].posterior(torch.full((40,), p.s_max), p.initial(noise, ids))
    i = (noise.uniform(ids, (1,), INITIAL, 2) > w.cumsum(1)).sum(1)
    root, normal = torch.linalg.cholesky(C)[range(40), i], noise.normal(ids, (2,), INITIAL, 3)
    by_hand = means[range(40), i] + (root @ normal[..., None])[..., 0]
    torch.testing.assert_close(p.sample_optimum(noise, ids), by_hand, rtol=1e-9, atol=1e-9)


def test_J_optimal_of_classes_is_their_average():
    """J* = mean of J*_c; by quadrature: 60² nodes, no error."""
    guided = catalogue.get("mixture-2d-conditional").exact
    J = guided.J_optimal()
    assert float(J.mean) == pytest.approx(sum(float(d.J_optimal().mean) for d in guided.classes) / 3, rel=1e-12)
    assert (float(J.stderr), J.n) == (0.0, 3600)


def test_conditions_and_rewards_that_do_not_fit():
    """One class a sample; and a log ratio against another law than the data's tilts to something else."""
    entry, p = catalogue.get("mixture-2d-conditional"), catalogue.get("mixture-1d").exact
    with pytest.raises(ValueError, match="one class for each"):
        entry.value.value(torch.zeros(3), torch.zeros(3, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"reward\.p"):
        tilt(p.data, LogRatioReward(p.data, p.data.shifted(torch.ones(1)), 0.5), 0.5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
def test_the_optimums_reward_and_kl_are_the_envelopes(beta):
    """dJ*/dbeta = -KL of the optimum, (E r - J*)/beta: by a central difference, whose error is of order h²."""
    h = 1e-4 * beta
    lower, at, upper = (catalogue.varied("mixture-2d", beta=b).exact for b in (beta - h, beta, beta + h))
    kl = float(at.reward_optimal().mean - at.J_optimal().mean) / beta
    assert kl == pytest.approx(float(lower.J_optimal().mean - upper.J_optimal().mean) / (2 * h), rel=1e-6)
