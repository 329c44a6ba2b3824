"""Algorithms against exact answers: what the first update of an epoch is at fixed parameters, and where they end."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from scipy.integrate import quad
from scipy.stats import norm
from scipy.stats import t as student
from torch import Tensor, nn

from ctrl import (
    COSINE,
    Critic,
    Estimate,
    EulerMaruyama,
    Heun,
    Mean,
    Problem,
    Solver,
    StructuredCritic,
)  # fmt: skip
from ctrl.algorithms import (
    ActorCritic,
    AdjointMatching,
    Algorithm,
    ForwardMatching,
    GaussianNetwork,
    InverseRL,
    KLBudget,
    NextValue,
    PathConsistency,
    PolicyIteration,
    PPOClip,
    PPOPenalty,
    QLearning,
    TDForm,
)  # fmt: skip
from ctrl.fit import Run, Settings, fit
from ctrl.noise import INITIAL, Noise
from toy import catalogue
from toy.gaussian import QuadraticReward
from toy.lq import LQ, Coefficient, LinearPolicy, Moments, QuadraticValue
from toy.networks import Policy
from toy.scoreboard import check

# ------------------------------------------------------------------------------------------ at fixed parameters

WIDTH = 1.4
"""Of an exploring policy, over the optimum's."""


class Tilted(nn.Module):
    """a = base(t, x) + (k + theta_1) + (K + theta_2) (t/T) x, at theta = 0."""

    def __init__(self, base: Mean, K: float, k: float, horizon: float) -> None:
        super().__init__()
        self.base, self.K, self.k, self.horizon = base, K, k, horizon
        self.theta = nn.Parameter(torch.zeros(2))

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        u = (t / self.horizon)[:, None]
        return self.base(t, x, cond) + self.k + self.theta[0] + (self.K + self.theta[1]) * u * x


@dataclass(frozen=True, eq=False)
class Case:
    """A problem in one dimension, a policy base + K (t/T) x + k, and its exact value and grad J."""

    problem: Problem
    lq: LQ
    base: LinearPolicy
    mean: Mean
    """The base as the problem has it."""
    K: float = 0.0
    k: float = 0.0

    def policy(self, explores: bool) -> nn.Module:
        tilted = Tilted(self.mean, self.K, self.k, self.problem.horizon)
        return GaussianNetwork(self.problem, tilted, degree=1, width=WIDTH) if explores else tilted

    def linear(self, explores: bool) -> LinearPolicy:
        gamma, T = self.problem.gamma * (WIDTH**2 if explores else 1), self.lq.horizon
        return LinearPolicy(
            lambda t: self.base.K(t) + self.K * (t / T)[:, None, None],
            lambda t: self.base.k(t) + self.k,
            (lambda t: gamma * np.linalg.inv(self.lq.at(t).R)) if gamma else None,
        )

    @cache  # noqa: B019
    def value(self, explores: bool) -> Critic:
        V = self.lq.value(self.linear(explores))
        return QuadraticValue(remembered(V.P), remembered(V.p), remembered(V.z))

    @cache  # noqa: B019
    def grad_J(self, explores: bool) -> Tensor:
        features = LinearPolicy(
            lambda t: np.stack([0 * t, t / self.lq.horizon], 1)[..., None, None],
            lambda t: np.stack([1 + 0 * t, 0 * t], 1)[..., None],
        )
        means = self.lq.grad_J(self.linear(explores), features)
        return torch.tensor([*(self.grad_width() if explores else ()), *means])

    def grad_width(self) -> list[float]:
        """dJ/dc_j for the covariance e^{2 (c_0 + c_1 t/T)} gamma/R: only entropy and the price of exploring see it."""
        rho, T = self.lq.discount, self.lq.horizon
        rate = self.lq.gamma * (1 - WIDTH**2)
        return [rate * quad(lambda t, j=j: math.exp(-rho * t) * (t / T) ** j, 0, T)[0] for j in (0, 1)]


def remembered(coefficient: Coefficient) -> Coefficient:
    """The coefficient, evaluated once for each grid."""
    at = cache(lambda times: coefficient(np.frombuffer(times)))
    return lambda t: at(t.tobytes())


@cache
def case(name: str) -> Case:
    """ "PROBLEM", off its optimum; "PROBLEM at its reference"; "PROBLEM at its optimum"; "PROBLEM half tilted", at the
    optimum for twice beta, which is the score of its own law too."""
    entry = catalogue.get(name.partition(" ")[0])
    problem, lq = entry.problem, entry.exact.exact if name.startswith("lq") else entry.exact.lq
    if name.startswith("lq"):
        problem, lq = (dataclasses.replace(p, discount=0.4) for p in (problem, lq))
    if "exploring" in name:
        problem, lq = (dataclasses.replace(p, gamma=0.5) for p in (problem, lq))
    if "half" in name:
        half = catalogue.varied(entry.name, beta=2 * problem.beta).exact.lq.optimal_policy()
        return Case(problem, lq, half, half)
    if "optimum" in name:
        return Case(problem, lq, lq.optimal_policy(), lq.optimal_policy())
    at_rest = Case(problem, lq, lq.reference, problem.reference)
    return at_rest if "reference" in name else dataclasses.replace(at_rest, K=-0.8, k=0.6)


def first_gradients(
    algorithm: Algorithm, case: Case, steps: int, epochs: int, samples: int, seed: int = 0, solver: Solver = Heun()
) -> Tensor:
    """An estimate of grad J an epoch, (epochs, J), at fixed parameters and with the exact critic of the policy."""
    explores = isinstance(algorithm, QLearning)
    still = Settings(
        epochs=epochs, samples=samples, steps=steps, lr=0.0, max_grad_norm=math.inf, optimizer=torch.optim.SGD,
        progress=False, jitter=0.0, seed=seed, solver=solver,
    )  # fmt: skip
    critic = case.value(explores)
    run = Run(case.problem, case.policy(explores), algorithm, critic, None, still, Accelerator(cpu=True))
    grads = []
    for _ in range(epochs):
        epoch = run.begin_epoch()
        assert epoch is not None
        run.engine.differentiate(next(update for update in algorithm.learn(epoch) if update.name == "policy"))
        grads.append(-torch.cat([p.grad.flatten() for p in run.policy.parameters() if p.grad is not None]))
        run.epoch += 1
    return torch.stack(grads)


EPOCHS = 20


@dataclass(frozen=True)
class Still:
    """An algorithm whose first update takes all nodes of `samples` trajectories, and the order of its bias in 1/N."""

    algorithm: Callable[[int, int], Algorithm]
    """(samples, steps) -> an algorithm."""
    order: int
    steps: int
    samples: int = 256
    solver: Solver = field(default_factory=Heun)

    def estimate(self, case: Case) -> Estimate:
        """Of grad J, extrapolated from N and 2N steps to infinitely many; each has its own noise."""
        coarse, fine = (
            first_gradients(self.algorithm(self.samples, n), case, n, EPOCHS, self.samples, seed=n, solver=self.solver)
            for n in (self.steps, 2 * self.steps)
        )
        return Estimate.of(fine + (fine - coarse) / (2**self.order - 1))


pytestmark = pytest.mark.long

ALONE = ActorCritic(critic_updates=0, actor_updates=0, keep=1)
EVERY = {
    "actor-critic": Still(lambda b, n: ActorCritic(0, 1, b * (n + 1), keep=1, nats=math.inf), 2, 10),
    "ppo, penalty": Still(lambda b, n: PPOPenalty(updates=1, nodes=b * (n + 1)), 2, 10),
    "ppo, clipped": Still(lambda b, n: PPOClip(updates=1, nodes=b * (n + 1)), 2, 10),
    "policy iteration": Still(lambda b, n: PolicyIteration(1, 1, 1, b * (n + 1)), 2, 10),
    "adjoint": Still(lambda b, n: AdjointMatching(1, b * (n + 1), lean=False), 2, 10),
    "path consistency": Still(lambda b, n: PathConsistency(1, b, keep=1), 1, 20, 768),
    "q-learning": Still(lambda b, n: QLearning(0, 1, b * n, keep=1), 1, 20, 512),
    "q-learning, own slope": Still(lambda b, n: QLearning(0, 1, b * n, keep=1, critic_control=False), 1, 20, 768),
    "TD form": Still(lambda b, n: TDForm(1, b * n, ALONE), 1, 20, 768, EulerMaruyama()),
    "next value": Still(lambda b, n: NextValue(1, b * n, ALONE), 1, 20, 512, EulerMaruyama()),
}
LEAN = Still(lambda b, n: AdjointMatching(1, b * (n + 1)), 2, 10)


def far(found: Estimate, exact: Tensor) -> float:
    """The largest |z|, over what Student's t with EPOCHS - 1 degrees stays under but for 1e-6 in all of this file."""
    return float(found.z(exact).abs().max()) / float(student.isf(1e-6 / 100, EPOCHS - 1))


@pytest.mark.parametrize("problem", ["lq-1d", "gaussian-1d"])
@pytest.mark.parametrize("name", EVERY)
def test_the_first_update_is_the_policy_gradient(name, problem):
    """Off the optimum; on lq-1d discounted and with entropy; for q-learning the width of the exploration too."""
    explores = name.startswith("q")
    here = case(f"{problem} exploring" if explores else problem)
    found, exact = EVERY[name].estimate(here), here.grad_J(explores)
    assert far(found, exact) < 1
    assert far(found, torch.zeros_like(exact)) > 1  # or it would say nothing


def test_the_lean_adjoint_is_a_gradient_at_the_reference_and_vanishes_at_the_optimum():
    reference, optimum, elsewhere = (case(f"gaussian-1d{at}") for at in (" at its reference", " at its optimum", ""))
    exact = reference.grad_J(False)
    assert far(LEAN.estimate(reference), exact) < 1
    at_rest = LEAN.estimate(optimum)
    assert far(at_rest, torch.zeros(2)) < 1
    assert float(at_rest.stderr.max()) < 0.02 * float(exact.abs().max())
    assert far(LEAN.estimate(elsewhere), elsewhere.grad_J(False)) > 1  # there it is no gradient of J


FORWARD = Still(lambda b, n: ForwardMatching(1, b * n, 1, hold=0.0, critic_updates=0), 1, 20, 768)


@pytest.mark.parametrize("where", ["at its reference", "half tilted"])
def test_forward_matching_is_the_policy_gradient_of_a_score_of_its_own_law(where):
    here = case(f"gaussian-1d {where}")
    found, exact = FORWARD.estimate(here), here.grad_J(False)
    assert far(found, exact) < 1
    assert far(found, torch.zeros_like(exact)) > 1


@pytest.mark.parametrize("hold", [0.0, 1.0])
def test_forward_matching_stands_still_at_the_optimum(hold):
    """The default hold too: what is clipped there is noise on both sides of zero."""
    still = Still(lambda b, n: ForwardMatching(1, b * n, 1, hold=hold, critic_updates=0), 1, 20, 768)
    assert far(still.estimate(case("gaussian-1d at its optimum")), torch.zeros(2)) < 1


def test_anchored_forward_matching_does_not_stand_still_at_the_optimum():
    optimum = case("gaussian-1d at its optimum")
    anchored = Still(
        lambda b, n: ForwardMatching(1, b * n, 1, target="anchored", hold=0.0, critic_updates=0), 1, 20, 2304
    )
    assert far(anchored.estimate(optimum), torch.zeros(2)) > 1


def test_residuals_vanish_at_the_optimum():
    """Path by path, not in the mean: what is left of a single gradient goes with the step."""
    optimum, exact = case("gaussian-1d at its optimum"), case("gaussian-1d at its reference").grad_J(False)
    coarse, fine = (
        float(first_gradients(PathConsistency(1, 64), optimum, n, 8, 64).square().mean().sqrt()) for n in (20, 80)
    )
    assert fine < 0.7 * coarse < 0.1 * float(exact.norm())


# ------------------------------------------------------------------------------------------ where they end


class Linear(nn.Module):
    """<c, features(t, x)>, features T_j(2t/T - 1) x^i/i!, made orthonormal where the optimum goes: learning rates
    and numbers of steps then mean the same for all of them."""

    def __init__(self, here: Case, order: int, weight: Callable[[Tensor], Tensor], degree: int = 7) -> None:
        super().__init__()
        self.horizon, self.order, self.degree = here.problem.horizon, order, degree
        self.mixing = torch.eye((degree + 1) * order)
        t, x = optimum(here).states
        features = weight(t)[:, None] * self.features(t, x)
        self.mixing = torch.linalg.inv(torch.linalg.qr(features / len(t) ** 0.5).R)
        self.c = nn.Parameter(torch.zeros(len(self.mixing)))

    def features(self, t: Tensor, x: Tensor) -> Tensor:
        u = (2 * t / self.horizon - 1).clamp(-1, 1)
        of_t = torch.cos(torch.arange(self.degree + 1) * torch.arccos(u)[:, None])
        of_x = torch.cat([torch.ones_like(x), x, x.square() / 2], 1)[:, : self.order]
        return (of_t[:, :, None] * of_x[:, None]).flatten(1) @ self.mixing

    def forward(self, t: Tensor, x: Tensor, *rest: Any) -> Tensor:
        return self.features(t, x) @ self.c


class Affine(nn.Module):
    """a = a_ref + K(t) x + k(t)."""

    def __init__(self, here: Case) -> None:
        super().__init__()
        self.problem = here.problem
        self.shift = Linear(here, 2, lambda t: torch.tensor(here.lq.at(t.numpy()).R[:, 0, 0]).sqrt())

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.problem.reference(t, x, cond) + self.shift(t, x)[:, None]

    def gains(self, t: Any) -> tuple[Any, Any]:
        """K and k, (n,)."""
        t = torch.from_numpy(t)
        k, at_1 = (self.shift(t, torch.full((len(t), 1), x)) for x in (0.0, 1.0))
        return (at_1 - k).numpy(), k.numpy()


def quadratic(here: Case) -> Critic:
    """c_skip r(x0hat) + c_out (P(t) x²/2 + p(t) x + z(t))."""
    F = Linear(here, 3, lambda t: COSINE.c_out(1 - t / here.problem.horizon))
    return StructuredCritic(here.problem, F)


@dataclass(frozen=True)
class Optimum:
    """What is exact about a problem, solved once."""

    here: Case

    @cached_property
    def policy(self) -> LinearPolicy:
        return self.here.lq.optimal_policy()

    @cached_property
    def at_stake(self) -> float:
        """J* - J_ref."""
        return self.lost(self.here.base)

    @cached_property
    def moments(self) -> Moments:
        return self.here.lq.moments(self.policy)

    def at(self, times: int, quantiles: Any) -> tuple[Tensor, Tensor]:
        """Times and states: those quantiles of the optimal law, in standard deviations, at each time."""
        t = np.linspace(0, self.here.lq.horizon, times)
        mean, sd = self.moments.mean(t), np.sqrt(self.moments.covariance(t)[..., 0])
        x = torch.from_numpy(mean + sd * quantiles).reshape(-1, 1)
        return torch.from_numpy(t).repeat_interleave(len(quantiles)), x

    @cached_property
    def states(self) -> tuple[Tensor, Tensor]:
        return self.at(41, norm.ppf((np.arange(99) + 0.5) / 99))

    @cached_property
    def region(self) -> tuple[Tensor, Tensor, Tensor]:
        """Times, states and V* on the 99 % region of the optimal law."""
        t, x = self.at(25, 2.576 * np.linspace(-1, 1, 41))
        return t, x, self.here.lq.optimal_value().value(t, x)

    def lost(self, policy: LinearPolicy) -> float:
        """J* - J of a policy's mean: E of the integral of ½ e^{-rho t} |a - a*|²_R dt under that policy."""
        t, w = np.polynomial.legendre.leggauss(40)
        t, w = (t + 1) / 2 * self.here.lq.horizon, w / 2 * self.here.lq.horizon
        moments, R = self.here.lq.moments(policy), self.here.lq.at(t).R[:, 0, 0]
        m, C = moments.mean(t)[:, 0], moments.covariance(t)[:, 0, 0]
        K, k = ((f(t) - g(t)).reshape(-1) for f, g in ((policy.K, self.policy.K), (policy.k, self.policy.k)))
        return float(np.sum(w * np.exp(-self.here.lq.discount * t) * R * ((K * m + k) ** 2 + K * K * C) / 2))

    @torch.no_grad()
    def regret(self, affine: Affine) -> float:
        """(J* - J)/(J* - J_ref)."""
        base = self.here.base
        learned = LinearPolicy(
            lambda t: base.K(t) + affine.gains(t)[0][:, None, None], lambda t: base.k(t) + affine.gains(t)[1][:, None]
        )
        return self.lost(learned) / self.at_stake

    @torch.no_grad()
    def value_error(self, critic: Critic) -> float:
        """The largest error of V on the 99 % region, over the range of V* there."""
        t, x, V = self.region
        return float((critic.value(t, x) - V).abs().max() / (V.max() - V.min()))


optimum = cache(Optimum)


@dataclass(frozen=True)
class Learned:
    """How far from the optimum a run ended."""

    regret: float
    value_error: float
    history: list[dict[str, Any]]
    policy: nn.Module


def learn(name: str, algorithm: Algorithm, **settings: Any) -> Learned:
    """`fit` on "PROBLEM" or "PROBLEM exploring", from the reference."""
    here = case(f"{name} at its reference")
    affine, critic = Affine(here), quadratic(here)
    explores = isinstance(algorithm, QLearning)
    policy = GaussianNetwork(here.problem, affine, width=1.5) if explores else affine
    result = fit(here.problem, policy, algorithm, critic=critic, settings=Settings(progress=False, **settings))
    exact = optimum(here)
    return Learned(exact.regret(affine), exact.value_error(critic), result.history, policy)


# ------------------------------------------------------------------------------------------ where runs end

REGRET, VALUE, WIDTH_ERROR = 0.005, 0.02, 0.05
"""At most: (J* - J)/(J* - J_ref); sup |V - V*| over the range of V*; |variance/(gamma R^-1) - 1|."""

GAUSSIAN = ["lq-1d", "gaussian-1d"]
RATES = {"lr": 1e-2, "critic_lr": 2e-2}
SMALL: dict[str, Any] = {"epochs": 80, **RATES}
"""As many trajectories an epoch as the default says."""
LARGE: dict[str, Any] = {"epochs": 20, "samples": 256, **RATES}


@pytest.mark.parametrize("name", GAUSSIAN)
def test_actor_critic_finds_the_optimum_and_its_value(name):
    end = learn(name, ActorCritic(), **SMALL)
    assert end.regret <= REGRET
    assert end.value_error <= VALUE


@pytest.mark.parametrize("name", GAUSSIAN)
def test_q_learning_finds_the_optimum_its_value_and_how_widely_to_explore(name):
    """From 1.5 times the optimum's width; its variance is held against gamma R^-1 all along the horizon."""
    end = learn(f"{name} exploring", QLearning(), **LARGE)
    assert end.regret <= REGRET
    assert end.value_error <= VALUE
    problem, t, one = end.policy.problem, torch.linspace(0, end.policy.problem.horizon, 11), torch.ones(11, 1)
    variance = end.policy.root(t).apply(one).square() * problem.penalty(t).apply(one) / problem.gamma
    assert float((variance.detach() - 1).abs().max()) <= WIDTH_ERROR


@pytest.mark.parametrize(
    "algorithm",
    [PPOPenalty(), PPOClip(), PolicyIteration(), PathConsistency(), AdjointMatching()],
    ids=lambda a: type(a).__name__,
)
def test_every_algorithm_finds_the_optimum(algorithm):
    assert learn("lq-1d", algorithm, **LARGE).regret <= REGRET


@pytest.mark.parametrize("nats", [0.05, 0.2])
def test_a_kl_budget_is_kept(nats):
    """The path KL settles at what was asked for: each epoch's is a mean over 64 samples, known to about 14 %."""
    end = learn("gaussian-1d", KLBudget(ActorCritic(), nats=nats), **{**SMALL, "epochs": 160})
    kl = [epoch["kl"] for epoch in end.history[-60:]]
    assert abs(sum(kl) / len(kl) / nats - 1) <= 0.1


SAMPLES = 256


class Linearly(nn.Module):
    """r = w x."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, cond: Any) -> Tensor:
        return self.w * x[:, 0]


def test_inverse_rl_finds_the_reward_that_explains_the_data():
    """Data are drawn from the optimum of w x: among rewards of this form it alone explains them, and where the
    samples' mean is the data's, w is found. Adam's steps are of length rate x gradient/sigma, sigma the error of a
    difference of two means and `slope` what the mean moves with w, so w ends with the variance rate sigma/(2 slope)."""
    gaussian, w = catalogue.get("gaussian-1d").exact, 0.4
    lq = dataclasses.replace(gaussian, reward=QuadraticReward(torch.zeros(1, 1), torch.full((1,), w))).lq
    end = lq.moments(lq.optimal_policy())
    at = np.array([lq.horizon])
    mean, sd = float(end.mean(at)[0, 0]), float(end.covariance(at)[0, 0, 0]) ** 0.5
    problem = dataclasses.replace(gaussian.problem, reward=Linearly())
    inverse = InverseRL(AdjointMatching(10, 512), lambda ids: mean + sd * Noise(5).normal(ids, (1,), INITIAL), 0.0)
    settings = Settings(
        epochs=60, samples=SAMPLES, steps=20, reward_lr=0.02, progress=False, schedule=lambda done: 1 - 0.9 * done
    )
    torch.manual_seed(0)
    fit(problem, Policy(problem), inverse, settings=settings)
    slope = float(gaussian.C) / gaussian.beta  # of the mean of exp(w x / beta) N(., C), in w
    found = problem.reward.w.item()
    sigma, rate = sd * (2 / SAMPLES) ** 0.5, 0.02 / 2  # half way, since what w forgets takes tens of epochs
    assert abs(found - w) < 4 * (rate * sigma / (2 * slope)) ** 0.5


def test_the_energy_descends_its_loss():
    """At fixed parameters the gradient is E_samples[x] - E_data[x] + 2 squares w (E_samples[x²] + E_data[x²])."""
    problem = dataclasses.replace(catalogue.get("gaussian-1d").problem, reward=Linearly())
    problem.reward.w.data.fill_(0.3)
    x, data = torch.randn(50, 1), torch.randn(50, 1) + 1
    inverse = InverseRL(AdjointMatching(), lambda ids: data[ids], 0.2)
    run = SimpleNamespace(problem=problem)
    ends = SimpleNamespace(x=x, ids=torch.arange(50), cond=None)
    (found,) = torch.autograd.grad(inverse.loss(run, 0, ends).mean(), problem.reward.w)
    exact = x.mean() - data.mean() + 2 * 0.2 * 0.3 * (x.square().mean() + data.square().mean())
    torch.testing.assert_close(found, exact)


def test_each_update_sees_data_of_its_own():
    """In each epoch."""
    problem, seen = dataclasses.replace(catalogue.get("gaussian-1d").problem, reward=Linearly()), []

    def data(ids):
        seen.extend(ids.tolist())
        return torch.zeros(len(ids), 1)

    inverse = InverseRL(AdjointMatching(1, 8), data, updates=3)
    fit(problem, Policy(problem), inverse, settings=Settings(epochs=2, samples=8, steps=4, progress=False))
    assert sorted(seen) == list(range(2 * 3 * 8))


@pytest.mark.parametrize("algorithm", [TDForm(evaluation=ALONE), NextValue(evaluation=ALONE)], ids=["TD", "next value"])
def test_the_forms_by_values_are_right_on_the_solver_of_images(algorithm):
    """On the exponential steps, whose noise is not that of the left node; `check` takes these where Heun has no
    density."""
    assert all(finding.right for finding in check(algorithm))
