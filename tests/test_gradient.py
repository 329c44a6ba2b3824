"""Policy gradients against exact ones.

On a linear problem with quadratic rewards every estimator is a polynomial of degree at most 4 in the Gaussian numbers
that made its trajectory. `Cubature` is a noise that averages such polynomials exactly, so there the mean of an
estimator, as the code computes it, is known without sampling: its bias, its order, and identities between estimators.
Sampling then checks what is not linear, and the noise.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ctrl import (
    DDIM,
    Critic,
    Estimate,
    EulerMaruyama,
    Exact,
    Exponential,
    GaussianPolicy,
    Heun,
    IsotropicNormal,
    Matrix,
    Mean,
    Multistep2,
    Noise,
    Problem,
    Scalar,
    ScoreAsAction,
    Solver,
    Trajectory,
    VPLinear,
    advantage_rate,
    fit_order,
    grids,
    path_kl,
    rollout,
    z_bound,
)  # fmt: skip
from ctrl.gradient import (
    adjoint,
    chain_surrogate,
    critic_slope,
    direction,
    directions,
    lean_adjoint,
    likelihood_ratio_slope,
    pathwise,
    q_direction,
    returns,
    surrogate,
    td_slope,
)  # fmt: skip
from ctrl.noise import INITIAL
from tests.strategies import SEEDS, gaussians, lqs, normal, states
from toy import catalogue
from toy.gaussian import QuadraticReward
from toy.lq import LQ, Coefficient, LinearPolicy, LQProblem, QuadraticValue
from toy.mixture import Mixture, MixtureDiffusion
from toy.pde import Mesh, gradient

# ------------------------------------------------------------------------------------------ problems and policies


@dataclass(frozen=True)
class Parametrised:
    """a_theta = base + sum_j theta_j phi_j(t, x); phi: (B, J, m), theta: (J,) or one a sample, (B, J)."""

    base: Mean
    phi: Callable[[Tensor, Tensor], Tensor]
    theta: Tensor

    def __call__(self, t, x, cond=None):
        return self.base(t, x, cond) + (self.theta[..., None] * self.phi(t, x)).sum(1)


@dataclass(frozen=True)
class Case:
    """A problem, a policy that is not optimal, its directions phi of change, and the exact answers (V, grad J)."""

    problem: Problem
    policy: Mean
    phi: Callable[[Tensor, Tensor], Tensor]
    answers: Callable[[], tuple[Critic, Tensor]]
    transitions: Any = None
    """Exact transitions of the closed loop, where it is linear."""

    @cached_property
    def exact(self) -> tuple[Critic, Tensor]:
        return self.answers()

    @property
    def value(self) -> Critic:
        return self.exact[0]

    @property
    def grad_J(self) -> Tensor:
        return self.exact[1]

    def at(self, theta: Tensor) -> Parametrised:
        return Parametrised(self.policy, self.phi, theta)

    def explore(self) -> GaussianPolicy:
        """Exploration changes neither grad V nor grad J."""
        return GaussianPolicy(self.policy, lambda t: Scalar(0.4))


def linear_features(lq: LQ) -> LinearPolicy:
    """phi_1 constant, phi_2 = (t/T) M x, full vectors and matrices; in one dimension 1 and (t/T) x."""
    m, n = lq.at(np.zeros(1)).K_ref.shape[1:]
    zero, k, M = np.zeros(m), np.cos(np.arange(m)), np.cos(np.arange(m * n)).reshape(m, n)
    return LinearPolicy(
        K=lambda t: np.stack([0 * M, M]) * np.stack([0 * t, t / lq.horizon], 1)[..., None, None],
        k=lambda t: np.broadcast_to(np.stack([k, zero]), (len(t), 2, m)),
    )


def remembered(coefficient: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The coefficient, evaluated once for each time: rollout after rollout meets the same ones."""
    store: dict[bytes, Any] = {}

    def at(t: Any) -> Any:
        key = t.tobytes()
        if key not in store:
            store[key] = coefficient(t)
        return store[key]

    return at


def at_node(coefficient: Coefficient) -> Callable[[Tensor], Tensor]:
    """The coefficient for states that share their time, as those of a node do."""
    tensor = remembered(lambda t: torch.tensor(coefficient(t)[0]))
    return lambda t: tensor(t[:1].numpy())


@dataclass(frozen=True)
class AtNode(Critic):
    """An exact critic for states that share their time."""

    critic: Critic

    def value(self, t, x, cond=None):
        return self.critic.value(t[:1], x)

    def grad(self, t, x, cond=None):
        return self.critic.grad(t[:1], x)


def linear_case(problem: Problem, lq: LQ, policy: LinearPolicy) -> Case:
    features = linear_features(lq)
    K, k, K_phi, k_phi = map(at_node, (policy.K, policy.k, features.K, features.k))

    def answers() -> tuple[Critic, Tensor]:
        V = lq.value(policy)
        V = QuadraticValue(remembered(V.P), remembered(V.p), remembered(V.z))
        return AtNode(V), torch.from_numpy(lq.grad_J(policy, features))

    return Case(
        problem,
        lambda t, x, cond=None: x @ K(t).mT + k(t),
        lambda t, x: torch.einsum("jmn,bn->bjm", K_phi(t), x) + k_phi(t),
        answers,
        lq.closed_loop(policy),
    )


def controlled(name: str) -> Case:
    """A linear-quadratic problem, discounted, under a policy that pushes every state by every action."""
    problem = dataclasses.replace(catalogue.get(name).exact, discount=0.4)
    m, n = problem.B.shape[1], len(problem.A)
    K, k = -0.5 / n * np.cos(np.arange(m * n)).reshape(m, n), 0.3 * np.ones(m)
    policy = LinearPolicy(lambda t: (1 + t)[:, None, None] * K, lambda t: np.broadcast_to(k, (len(t), m)))
    return linear_case(problem, problem.exact, policy)


def sampled(name: str) -> Case:
    """Score as action with Gaussian data, under s_ref - 0.3 (t/T) x + 0.6; "NAME cut at S" has s_min = S."""
    name, _, s_min = name.partition(" cut at ")
    exact = dataclasses.replace(catalogue.get(name).exact, s_min=float(s_min or 1e-3))
    lq = dataclasses.replace(exact.lq, at=remembered(exact.lq.at))
    reference, eye = lq.reference, np.eye(len(lq.h))
    policy = LinearPolicy(
        lambda t: reference.K(t) - 0.3 * (t / lq.horizon)[:, None, None] * eye, lambda t: reference.k(t) + 0.6
    )
    return linear_case(exact.problem, lq, policy)


def smooth() -> MixtureDiffusion:
    """Two modes that overlap. Between modes that are apart the sensitivity of a path to its state has so heavy a tail
    (largest of 20,000: 750, in mixture-1d) that no standard error can be had for what is made of it."""
    data = Mixture(torch.tensor([0.6, 0.4]), torch.tensor([[-1.0], [0.8]]), torch.tensor([[[0.5]], [[0.4]]]))
    start = Mixture(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1))
    reward = QuadraticReward(torch.tensor([[0.4]]), torch.tensor([1.0]))
    return MixtureDiffusion(VPLinear(0.1, 8.0), data, reward, beta=0.5, start=start)


def mixture(problem: Problem, mesh: Mesh) -> Case:
    """Nothing linear and no formula: V and grad J from the backward equation. The mesh's error in grad J is 1e-5."""
    theta = torch.tensor([0.4, 0.3])

    def phi(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([torch.ones_like(x), torch.sin(2 * x)], 1)

    def mean(theta: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return Parametrised(problem.reference, phi, theta)(t, x)

    def log_density(x: Tensor) -> Tensor:
        return -x[:, 0].square() / 2 - math.log(2 * math.pi) / 2

    def answers() -> tuple[Critic, Tensor]:
        solution = gradient(problem, mean, theta, log_density, mesh)
        return solution.value, solution.grad

    return Case(problem, lambda t, x, cond=None: mean(theta, t, x), phi, answers)


@cache
def case(name: str) -> Case:
    if name == "mixture-1d":
        return mixture(catalogue.get(name).problem, Mesh(-6.0, 6.0, 201, 1e-5))
    if name == "smooth mixture":
        return mixture(smooth().problem, Mesh(-6.0, 6.0, 101, 1e-5))
    return controlled(name) if name.startswith("lq") else sampled(name)


# ------------------------------------------------------------------------------------------ estimators


@dataclass(frozen=True)
class Run:
    """One set of noise, and every estimator on it: `grad(name)` is (B, J)."""

    case: Case
    solver: Solver
    times: Tensor
    noise: Any
    ids: Tensor

    def rollout(self, policy: Any, **options: Any) -> Trajectory:
        return rollout(self.case.problem, policy, self.times, self.noise, self.ids, solver=self.solver, **options)

    @cached_property
    def path(self) -> Trajectory:
        return self.rollout(self.case.policy)

    @cached_property
    def value(self) -> Tensor:
        return self.path.at_nodes(self.case.value.value)

    @cached_property
    def cost(self) -> Tensor:
        problem, policy = self.case.problem, self.case.policy
        return self.path.at_nodes(
            lambda t, x, cond: problem.running_cost(t, x, policy(t, x), problem.reference(t, x, cond))
        )

    @cached_property
    def reward(self) -> Tensor:
        return self.case.problem.reward(self.path.x[-1], None)

    def per_sample(self, f: Callable[[Mean], Tensor]) -> Tensor:
        """df_b/dtheta_j at theta = 0, (B, J), for f(policy): (B,): each sample has a theta of its own, (B, J)."""
        theta = torch.zeros(len(self.ids), 2, requires_grad=True)
        return torch.autograd.grad(f(self.case.at(theta)).sum(), theta)[0]

    def weighted(self, directions: Tensor, path: Trajectory | None = None) -> Tensor:
        return self.per_sample(lambda policy: surrogate(self.case.problem, path or self.path, policy, directions))

    def with_slope(self, slope: Tensor) -> Tensor:
        return self.weighted(directions(self.case.problem, self.path, self.case.policy, slope))

    def grad(self, name: str) -> Tensor:
        return ESTIMATORS[name](self)


def by_likelihood_ratio(run: Run, baseline: Any = 0.0) -> Tensor:
    return run.with_slope(likelihood_ratio_slope(run.case.problem, run.path, run.reward, run.cost, baseline))


def by_pathwise(run: Run) -> Tensor:
    return run.per_sample(lambda a: pathwise(run.case.problem, run.rollout(a, differentiable=True), a))


def chain_part(run: Run) -> Tensor:
    """The chain's likelihood ratio alone, without the explicit derivative of the action's cost."""
    problem = run.case.problem
    decay = torch.exp(-problem.discount * run.times[:-1])[:, None]
    advantage = decay * returns(problem, run.path, run.reward, run.cost)
    return run.per_sample(lambda policy: chain_surrogate(problem, run.solver, run.path, policy, advantage))


def by_chain(run: Run) -> Tensor:
    return chain_part(run) + run.with_slope(torch.zeros_like(run.path.x))


def by_q(run: Run) -> Tensor:
    problem, policy = run.case.problem, run.case.explore()
    path = run.rollout(policy)
    slopes = critic_slope(run.case.value, path)
    q = [
        advantage_rate(problem, t, a, policy.mean(t, x, None), problem.reference(t, x), grad_v, policy.root(t))
        for t, x, a, grad_v in zip(path.t[:-1, None].expand(-1, len(run.ids)), path.x, path.a, slopes, strict=False)
    ]
    return run.weighted(q_direction(path, policy, torch.stack(q)), path)


ESTIMATORS: dict[str, Callable[[Run], Tensor]] = {
    "critic": lambda run: run.with_slope(critic_slope(run.case.value, run.path)),
    "adjoint": lambda run: run.with_slope(adjoint(run.case.problem, run.path, run.case.policy)),
    "td": lambda run: run.with_slope(td_slope(run.case.problem, run.path, run.value, run.cost)),
    "likelihood ratio": by_likelihood_ratio,
    "with baseline": lambda run: by_likelihood_ratio(run, run.value[:-1]),
    "pathwise": by_pathwise,
    "chain": by_chain,
    "q": by_q,
}

# ------------------------------------------------------------------------------------------ exact means


@dataclass(frozen=True)
class Cubature:
    """A `Noise` whose samples and weights average polynomials of degree 5 in all its numbers exactly.

    n = d + N d (+ N m) numbers: the initial state, the path, the actions. Points 0, ±r e_i and q (±e_i ± e_j) with
    r² = n + 2 and q² = r²/2, weights 2/(n + 2), (4 - n)/(2 (n + 2)²) and 1/(n + 2)² (Stroud & Secrest 1963).
    """

    d: int
    steps: int
    m: int = 0

    @cached_property
    def rule(self) -> tuple[Tensor, Tensor]:
        n = self.d * (self.steps + 1) + self.m * self.steps
        i, j = torch.triu_indices(n, n, 1)
        e = torch.eye(n)
        single, double = (n + 2) ** 0.5 * e, ((n + 2) / 2) ** 0.5 * torch.cat([e[i] + e[j], e[i] - e[j]])
        points = torch.cat([torch.zeros(1, n), single, -single, double, -double])
        weights = torch.full((len(points),), 1 / (n + 2) ** 2)
        weights[0], weights[1 : 2 * n + 1] = 2 / (n + 2), (4 - n) / 2 / (n + 2) ** 2
        return points, weights

    @property
    def ids(self) -> Tensor:
        return torch.arange(len(self.rule[0]))

    def normal(self, ids: Tensor, shape: Any, kind: int, step: int = 0) -> Tensor:
        first = 0 if kind == INITIAL else self.d * (self.steps + 1) + self.m * step
        return self.rule[0][:, first : first + math.prod(shape)]

    def path(self, ids: Tensor, shape: Any, times: Tensor, clock: Any) -> Iterator[Tensor]:
        return iter(self.rule[0][:, self.d : self.d * (self.steps + 1)].split(self.d, 1))

    def mean(self, samples: Tensor) -> Tensor:
        return torch.einsum("b,b...->...", self.rule[1], samples)


def exact_run(case: Case, solver: Solver, times: Tensor, explores: bool = False) -> Run:
    (d,) = case.problem.shape
    m = case.policy(times[:1], torch.zeros(1, d)).shape[1] if explores else 0
    noise = Cubature(d, len(times) - 1, m)
    return Run(case, solver, times, noise, noise.ids)


@cache
def exact_on_uniform(name: str, solver: Solver, steps: int, explores: bool) -> Run:
    return exact_run(case(name), solver, grids.uniform(case(name).problem, steps), explores)


def exact_error(name: str, solver: Solver, steps: int, estimator: str) -> float:
    """|E estimate - grad J| / |grad J|, without sampling."""
    run = exact_on_uniform(name, solver, steps, estimator == "q")
    return float((run.noise.mean(run.grad(estimator)) - run.case.grad_J).norm() / run.case.grad_J.norm())


# ------------------------------------------------------------------------------------------ bias and order

FIRST = dict.fromkeys(["td", "likelihood ratio", "q"], 1)
SECOND = dict.fromkeys(["critic", "adjoint", "pathwise"], 2)
ORDERS = {
    ("lq-1d", EulerMaruyama(), 16): dict.fromkeys(ESTIMATORS, 1),
    ("lq-1d", Heun(), 16): FIRST | SECOND,
    ("lq-4d", Heun(), 8): FIRST | SECOND,
    ("gaussian-1d", EulerMaruyama(), 16): dict.fromkeys(ESTIMATORS, 1),
    ("gaussian-1d", Heun(), 20): FIRST | SECOND,
    ("gaussian-1d", Multistep2(), 32): {"critic": 2},
    ("gaussian-1d cut at 0.1", Multistep2(), 20): SECOND | {"chain": 2},
}


@pytest.mark.parametrize(
    "name, solver, steps, estimator, order",
    [(*key, estimator, order) for key, orders in ORDERS.items() for estimator, order in orders.items()],
    ids=lambda v: type(v).__name__ if isinstance(v, Solver) else None,
)
def test_bias_and_its_order(name, solver, steps, estimator, order):
    """E of the estimate tends to the exact grad J, at the order of what it is made of: what multiplies an increment is
    first order whatever the solver, the rest has the order of solver and quadrature."""
    errors = [exact_error(name, solver, n, estimator) for n in (steps, 2 * steps)]
    assert errors[1] < 0.1
    assert fit_order([steps, 2 * steps], errors) == pytest.approx(order, abs=0.3)


def test_second_order_in_figures():
    """The relative bias of the critic's form with Heun and the trapezoid, down to the data end; Euler with a left sum
    has 0.28 to 0.017 on the same grids."""
    errors = [exact_error("gaussian-1d cut at 0", Heun(), n, "critic") for n in (5, 10, 20, 40, 80)]
    assert errors == pytest.approx([0.032, 0.0061, 0.0014, 0.00034, 0.000084], rel=0.03)


def test_random_times_are_unbiased_for_the_integral():
    """One time drawn uniformly in each of four strata, and exact transitions to it: no bias at all, where the left sum
    is far off. The mean over the draw is by Gauss-Legendre, that over the path by cubature."""
    c, steps = case("lq-1d"), 4
    h = c.problem.horizon / steps
    strata, left = torch.arange(steps) * h, torch.tensor([[0.0], [1.0]])

    def mean_at(u: float) -> Tensor:
        """All times at the same place u in (0, 1) of their strata; the sum is linear in what they give."""
        times = torch.cat([torch.zeros(1), strata + h * u])
        run = exact_run(c, Exact(c.transitions), times)
        path = dataclasses.replace(run.path, w=h * left.expand(2, steps))
        return run.noise.mean(run.weighted(directions(c.problem, path, c.policy, critic_slope(c.value, path)), path))

    nodes, weights = np.polynomial.legendre.leggauss(6)
    draws = [w / 2 * mean_at((1 + u) / 2) for u, w in zip(nodes, weights, strict=True)]
    torch.testing.assert_close(sum(draws), c.grad_J, rtol=1e-8, atol=0.0)
    assert float((mean_at(1e-9) - c.grad_J).norm() / c.grad_J.norm()) > 0.1


def test_random_nodes_are_unbiased_for_the_sum():
    """Two of the four nodes drawn at random, weighted by 4/2: the mean over all draws is the whole sum, sample by
    sample, and the policy is called at these two alone."""
    c = case("lq-1d")
    run = Run(c, Heun(), grids.uniform(c.problem, 3), Noise(0), torch.arange(5))
    slope = directions(c.problem, run.path, c.policy, critic_slope(c.value, run.path))
    parts = []
    for pair in itertools.combinations(range(4), 2):
        keep, called = torch.zeros(4), []
        keep[list(pair)] = 2.0
        path = dataclasses.replace(run.path, w=run.path.w * torch.stack([keep[:-1], keep[1:]]))
        surrogate(c.problem, path, lambda t, x, cond, called=called: called.append(float(t[0])) or x, slope)
        assert called == run.times[list(pair)].tolist()
        parts.append(run.weighted(slope, path))
    torch.testing.assert_close(torch.stack(parts).mean(0), run.weighted(slope))


# ------------------------------------------------------------------------------------------ identities


@given(lqs(), SEEDS)
def test_direction_is_the_slope_of_q(problem, seed):
    """B' grad V - R (a - a_ref) = dq/da at a = s, by automatic differentiation of the advantage rate."""
    t, x = states(problem, seed=seed)
    g, (n, m) = torch.Generator().manual_seed(seed), problem.B.shape
    s, a_ref, grad_v = normal(g, len(x), m), normal(g, len(x), m), normal(g, len(x), n)
    a = s.clone().requires_grad_()
    (slope,) = torch.autograd.grad(advantage_rate(problem, t, a, s, a_ref, grad_v).sum(), a)
    torch.testing.assert_close(direction(problem, t, s, a_ref, grad_v), slope)


@given(gaussians(), SEEDS)
def test_direction_of_score_as_action(p, seed):
    """kappa grad V - (beta kappa²/(eta² g²)) (s - s_ref)."""
    t, x = states(p.problem, seed=seed)
    g = torch.Generator().manual_seed(seed)
    s, s_ref, grad_v = (normal(g, *x.shape) for _ in range(3))
    kappa, g2 = p.problem.kappa(t)[:, None], p.problem.rate(t)[:, None]
    expected = kappa * grad_v - p.beta * kappa.square() / (p.eta**2 * g2.clamp_min(1e-300)) * (s - s_ref)
    torch.testing.assert_close(direction(p.problem, t, s, s_ref, grad_v), expected)


def some_times(problem: Problem, seed: int) -> Tensor:
    """Three unequal steps."""
    inside = 0.1 + 0.8 * torch.rand(2, generator=torch.Generator().manual_seed(seed)).sort()[0]
    return problem.horizon * torch.cat([torch.zeros(1), inside, torch.ones(1)])


def steered(problem: Any, seed: int) -> Case:
    """A random linear-quadratic problem under a random linear policy."""
    g, (n, m) = torch.Generator().manual_seed(seed), problem.B.shape
    K, k = 0.5 * normal(g, m, n).numpy(), normal(g, m).numpy()
    policy = LinearPolicy(lambda t: np.broadcast_to(K, (len(t), m, n)), lambda t: np.broadcast_to(k, (len(t), m)))
    return linear_case(problem, problem.exact, policy)


def assert_same_mean(run: Run, first: Tensor, second: Tensor) -> None:
    """The samples' own size sets the rounding."""
    scale = float(run.noise.mean(first.abs() + second.abs()).abs().max()) + 1
    torch.testing.assert_close(run.noise.mean(first), run.noise.mean(second), rtol=0.0, atol=1e-11 * scale)


CHAINS = st.sampled_from([EulerMaruyama(), Exponential(), DDIM(0.6), DDIM(1.0), Multistep2()])


@settings(max_examples=15)
@given(gaussians(), CHAINS, st.floats(-0.4, 0.4), st.floats(-1.0, 1.0), SEEDS)
def test_chain_gradient_is_that_of_the_chain(p, solver, K, k, seed):
    """The likelihood ratio of a discrete chain and the derivative of its objective, on its own grid with its own
    quadrature, have one mean: exactly, in three unequal steps, memory included."""
    run = exact_run(linear_case(p.problem, p.lq, p.perturbed(K, k)), solver, some_times(p.problem, seed))
    assert_same_mean(run, run.grad("chain"), run.grad("pathwise"))


@settings(max_examples=15)
@given(lqs(), SEEDS)
def test_likelihood_ratio_on_euler_is_the_chain(problem, seed):
    """On Euler's chain the increments' likelihood ratio is the transitions', sample by sample, baseline or not, and its
    mean is the derivative of the chain's objective: with matrices, discount and unequal steps."""
    c, times = steered(problem, seed), some_times(problem, seed)
    run = exact_run(c, EulerMaruyama(), times)
    assert_same_mean(run, run.grad("likelihood ratio"), run.grad("pathwise"))

    run = Run(c, EulerMaruyama(), times, Noise(seed), torch.arange(7))
    torch.testing.assert_close(run.grad("likelihood ratio"), run.grad("chain"))
    baseline = torch.tensor([0.3, -1.0, 2.0])
    advantage = returns(problem, run.path, run.reward, run.cost) - baseline[:, None]
    advantage = torch.exp(-problem.discount * times[:-1])[:, None] * advantage
    chain = run.per_sample(lambda policy: chain_surrogate(problem, run.solver, run.path, policy, advantage))
    explicit = run.with_slope(torch.zeros_like(run.path.x[:-1]))
    torch.testing.assert_close(by_likelihood_ratio(run, baseline), chain + explicit)


def test_one_advantage_a_sample():
    """(B,) is the same number at every step."""
    run = Run(case("lq-1d"), EulerMaruyama(), grids.uniform(case("lq-1d").problem, 4), Noise(0), torch.arange(5))
    args = run.case.problem, run.solver, run.path, run.case.policy
    every = run.reward.expand(4, 5).clone()
    assert torch.equal(chain_surrogate(*args, run.reward), chain_surrogate(*args, every))


@pytest.mark.parametrize("part", ["explicit", "in the returns"])
def test_the_cost_must_be_in_both_places(part):
    """KL's own gradient has two parts: the explicit one, and the cost inside the returns. Leaving either out is an
    error of more than 10 % that no number of steps removes."""
    errors = []
    for steps in (20, 40):
        run = exact_on_uniform("gaussian-1d", Heun() if part == "in the returns" else EulerMaruyama(), steps, False)
        if part == "explicit":
            grad = chain_part(run)
        else:
            free = torch.zeros_like(run.cost)
            grad = run.with_slope(likelihood_ratio_slope(run.case.problem, run.path, run.reward, free))
        errors.append(float((run.noise.mean(grad) - run.case.grad_J).norm() / run.case.grad_J.norm()))
    assert min(errors) > 0.1 and errors[1] > 0.7 * errors[0]


def test_explicit_part_is_the_derivative_of_path_kl():
    """`directions` with slope 0 give - beta times the derivative of path KL at fixed states, with either quadrature."""
    c = case("gaussian-16d")
    for solver in (EulerMaruyama(), Heun()):
        run = Run(c, solver, grids.uniform(c.problem, 6), Noise(0), torch.arange(4))
        nodes = slice(0, 6) if isinstance(solver, EulerMaruyama) else slice(None)
        explicit = run.with_slope(torch.zeros_like(run.path.x[nodes]))
        kl = run.per_sample(partial(path_kl, c.problem, run.path))
        torch.testing.assert_close(explicit, -c.problem.beta * kl)


def test_returns_by_hand():
    """G_k = e^{-rho (T - t_k)} r - sum over the steps from k of e^{-rho (t_j - t_k)} c_j dt_j, with a left sum."""
    problem = case("lq-1d").problem
    times = torch.tensor([0.0, 0.1, 0.4, 1.0])
    path = rollout(problem, problem.reference, times, Noise(0), torch.arange(2))
    g = torch.Generator().manual_seed(0)
    reward, cost, dt = normal(g, 2), normal(g, 4, 2), times.diff()
    for k in range(3):
        later = sum(math.exp(-0.4 * (times[j] - times[k])) * cost[j] * dt[j] for j in range(k, 3))
        expected = math.exp(-0.4 * (1 - times[k])) * reward - later
        torch.testing.assert_close(returns(problem, path, reward, cost)[k], expected)


def test_mean_of_the_q_direction():
    """Over a ~ N(s, Sigma) with a full Sigma, E[Sigma^-1 (a - s) q] = B' grad V - R (s - a_ref): exact, by cubature."""
    problem = dataclasses.replace(case("lq-4d").problem, gamma=0.3)
    root = Matrix(torch.tensor([[0.5, 0.0], [0.4, 0.9]]))
    g, rule = torch.Generator().manual_seed(0), Cubature(2, 0)
    x, s, grad_v = normal(g, 4), normal(g, 2), normal(g, 4)
    x, s, grad_v = (v.expand(len(rule.ids), -1) for v in (x, s, grad_v))
    t, a_ref, a = torch.full((len(x),), 0.7), problem.reference(None, x), s + root.apply(rule.rule[0])
    path = Trajectory(torch.tensor([0.7, 0.9]), torch.stack([x, x]), a[None], None, torch.zeros(2, 1), rule.ids)
    q = advantage_rate(problem, t, a, s, a_ref, grad_v, root)
    got = q_direction(path, GaussianPolicy(lambda t, x, cond: s, lambda t: root), q[None])
    torch.testing.assert_close(rule.mean(got[0]), direction(problem, t, s, a_ref, grad_v)[0])


def test_td_slope_by_hand():
    """L' p_k sqrt(d clock_k) = xi_k (V_{k+1} - V_k - dt_k (c_k + rho V_k)) with a left sum, in four dimensions and
    unequal steps. (A cost left out would cost variance and bias of first order alone, which no limit shows.)"""
    problem, times = case("lq-4d").problem, torch.tensor([0.0, 0.1, 0.4, 1.0])
    path = rollout(problem, problem.reference, times, Noise(0), torch.arange(3))
    g = torch.Generator().manual_seed(0)
    value, cost, dt = normal(g, 4, 3), normal(g, 4, 3), times.diff()[:, None]
    step = value[1:] - value[:-1] - dt * (cost[:-1] + 0.4 * value[:-1])
    p = td_slope(problem, path, value, cost)
    torch.testing.assert_close(p @ problem.S * dt.sqrt()[..., None], path.xi * step[..., None])


def test_states_directions_and_advantages_are_constants():
    """On a differentiable rollout too, gradients go through the policy at the nodes and nowhere else."""
    c = case("gaussian-1d")
    theta = torch.zeros(2, requires_grad=True)
    run = Run(c, EulerMaruyama(), grids.uniform(c.problem, 4), Noise(0), torch.arange(3))
    kept = run.rollout(c.at(theta), differentiable=True)
    slopes = [
        adjoint(c.problem, kept, c.at(theta)),
        *lean_adjoint(c.problem, kept),
        critic_slope(c.value, kept),
        directions(c.problem, kept, c.at(theta), kept.x),
        td_slope(c.problem, kept, kept.x[..., 0], run.cost),
        likelihood_ratio_slope(c.problem, kept, kept.x[-1, :, 0], run.cost),
        q_direction(dataclasses.replace(kept, a=kept.x[:-1]), c.explore(), kept.x[:-1, :, 0]),
    ]
    assert not any(slope.requires_grad for slope in slopes)

    def both(path: Trajectory) -> Tensor:
        direction, advantage = path.x.square(), path.x[1:, :, 0]
        total = surrogate(c.problem, path, c.at(theta), direction)
        total = total + chain_surrogate(c.problem, run.solver, path, c.at(theta), advantage)
        return torch.autograd.grad(total.sum(), theta)[0]

    torch.testing.assert_close(both(kept), both(run.path))


# ------------------------------------------------------------------------------------------ adjoints


def residual(critic: Critic, path: Trajectory, p: Tensor) -> Tensor:
    """(p_k - grad V(t_k, x_k)) (1, x_k)', (N+1, B, d, 1 + d): what E[p_k | X_k] = grad V makes zero in the mean."""
    one = torch.ones_like(path.x[..., :1])
    return (p - critic_slope(critic, path))[..., None] * torch.cat([one, path.x], -1)[..., None, :]


@pytest.mark.parametrize("form", ["adjoint", "lean adjoint", "lean adjoint off the optimum"])
def test_adjoints_of_a_linear_problem(form):
    """E[p | X] = grad V of the policy (the full adjoint), grad V* at the optimum (the lean one): exact means against
    (1, x) at the first node and half way, order 2. Off the optimum the lean one has another mean, however fine."""
    c = case("lq-1d")
    if form == "lean adjoint":
        lq = c.problem.exact
        c = linear_case(c.problem, lq, lq.optimal_policy())
    worst = []
    for steps in (10, 20):
        run = exact_run(c, Heun(), grids.uniform(c.problem, steps))
        p = adjoint(c.problem, run.path, c.policy) if form == "adjoint" else lean_adjoint(c.problem, run.path)[0]
        means = torch.stack([run.noise.mean(r) for r in residual(c.value, run.path, p)])
        assert float(means[-1].abs().max()) < 1e-12
        worst.append(float(means[[0, steps // 2]].norm()))
    if form.endswith("off the optimum"):
        assert min(worst) > 0.2
    else:
        assert worst[1] < 0.02
        assert fit_order([10, 20], worst) == pytest.approx(2, abs=0.3)


def residual_z(critic: Critic, path: Trajectory, p: Tensor) -> Tensor:
    """Of six nodes."""
    return Estimate.of(residual(critic, path, p)[:60:10].movedim(1, 0)).z(0.0)


def test_adjoint_of_a_mixture():
    """E[p | X] = grad V of a policy that is not optimal, where nothing is linear; the lean adjoint's mean is not."""
    c = case("smooth mixture")
    path = rollout(c.problem, c.policy, grids.uniform(c.problem, 64), Noise(1), torch.arange(1000), solver=Heun())
    z = residual_z(c.value, path, adjoint(c.problem, path, c.policy))
    assert float(z.abs().max()) < z_bound(z.numel()) + 0.3
    assert float(residual_z(c.value, path, lean_adjoint(c.problem, path)[0]).abs().max()) > z_bound(z.numel()) + 3


def test_lean_adjoint_of_a_mixture():
    """E[p | X] = grad V* along the optimal policy, where V* is closed."""
    p = smooth()
    times = grids.uniform(p.problem, 64)
    path = rollout(p.problem, p.optimal_policy, times, Noise(2), torch.arange(1000), solver=Heun())
    z = residual_z(p.value, path, lean_adjoint(p.problem, path)[0])
    assert float(z.abs().max()) < z_bound(z.numel()) + 0.3


@pytest.mark.parametrize("at", ["reference", "optimum"])
@pytest.mark.parametrize("steps", [1, 4])
def test_lean_adjoint_of_gaussian_data_is_exact_on_any_grid(at, steps):
    """Score as action, eta = 1: the means that it differentiates are E[X_{k+1} | X_k], linear in the state. So
    E[p_k | X_k] = grad V of the reference along its own trajectories, and grad V* along optimal ones, at one step."""
    exact = catalogue.get("gaussian-16d").exact
    c = linear_case(exact.problem, exact.lq, exact.lq.reference if at == "reference" else exact.lq.optimal_policy())
    run = exact_run(c, Exact(c.transitions), grids.uniform(c.problem, steps))
    p, _ = lean_adjoint(c.problem, run.path)
    scale = float(critic_slope(c.value, run.path).abs().max())
    means = torch.stack([run.noise.mean(r) for r in residual(c.value, run.path, p)])
    assert float(means.abs().max()) < torch.finfo(means.dtype).eps * len(run.ids) * scale  # rounding of so many terms


class Costly(ScoreAsAction):
    """Score as action on which states have a price too."""

    def state_cost(self, t, x, cond=None):
        return (1 + t) * x.square().sum(1)


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_lean_adjoint_is_the_exact_derivative_of_the_exponential_chain(eta):
    """p_0 of a path that the reference drew by exponential steps is d/dx_0 of e^{-rho T} r(X_N) less the left sum of
    e^{-rho t} l(t, X_t) dt, through the chain."""
    base = smooth().problem
    own = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    problem = Costly(**own | {"eta": eta, "discount": 0.3})
    times, ids = grids.jitter(grids.uniform(problem, 6), torch.linspace(-0.4, 0.4, 5)), torch.arange(20)
    start = IsotropicNormal((1,))(Noise(3), ids).requires_grad_()
    path = rollout(
        problem, problem.reference, times, Noise(3), ids, solver=Exponential(), start=start, differentiable=True
    )
    worth = math.exp(-0.3 * problem.horizon) * problem.reward(path.x[-1], None)
    for t, dt, x in zip(times[:-1], times.diff(), path.x, strict=False):
        worth = worth - torch.exp(-0.3 * t) * dt * problem.state_cost(t, x)
    p, a_ref = lean_adjoint(problem, path)
    torch.testing.assert_close(p[0], torch.autograd.grad(worth.sum(), start)[0])
    torch.testing.assert_close(a_ref[:-1], path.a.detach())  # on its own path it is what drove it


class Driftless(LQProblem):
    """dX = B a dt + S dW: b0, a_ref and l depend on no state, and autograd is told so."""

    def drift(self, t, x):
        return torch.zeros_like(x)

    def state_cost(self, t, x, cond=None):
        return x.new_zeros(len(x))


def test_adjoint_without_a_drift():
    """-dp/dt = - rho p: Heun's factor 1 - h + ½ h² on each step, h = rho dt, unequal steps, from grad r."""
    base = case("lq-4d").problem
    problem = Driftless(**{f.name: getattr(base, f.name) for f in dataclasses.fields(base) if f.init})
    path = rollout(problem, problem.reference, torch.tensor([0.0, 0.2, 1.1, 2.0]), Noise(0), torch.arange(3))
    h = 0.4 * path.t.diff()
    decay = torch.cat([(1 - h + h * h / 2).flip(0).cumprod(0).flip(0), torch.ones(1)])
    grad_r = problem.h - path.x[-1] @ problem.G
    torch.testing.assert_close(lean_adjoint(problem, path)[0], decay[:, None, None] * grad_r)


# ------------------------------------------------------------------------------------------ sampling

SAMPLED = {
    ("lq-1d", 32, 2000): ["critic", "adjoint", "pathwise"],
    ("lq-1d", 128, 2000): ["td", "likelihood ratio", "with baseline", "q"],
    ("lq-4d", 32, 1000): ["critic", "adjoint", "pathwise"],
    ("lq-4d", 160, 1000): ["td", "likelihood ratio", "with baseline", "q"],
    ("gaussian-16d", 32, 1000): ["critic", "adjoint", "pathwise"],
    ("gaussian-16d", 128, 1000): ["td", "likelihood ratio", "with baseline", "q"],
    ("mixture-1d", 64, 400): ["critic"],
    ("mixture-1d", 128, 400): ["td", "likelihood ratio", "with baseline", "q"],
    ("smooth mixture", 32, 1000): ["critic", "adjoint", "pathwise"],
}
"""Problem, steps and samples. So many steps that bias is at most 0.3 standard errors. First-order forms: by
`exact_error` 0.6 to 0.9 % of |grad J| in both lq, 0.1 to 0.26 standard errors; in gaussian-16d, from 20,000 samples at
32 steps, 1.5 % at most at 128, 0.2 standard errors; in mixture-1d, from 200,000 samples at 64 steps, 1.7 % at 128, 0.3
standard errors. Second-order forms: less than 0.3 %, 0.1 standard errors."""


@pytest.mark.parametrize(
    "name, steps, samples, estimator", [(*key, estimator) for key, names in SAMPLED.items() for estimator in names]
)
def test_against_the_exact_gradient(name, steps, samples, estimator):
    """|z| of the sampled mean against the exact grad J."""
    z = Estimate.of(sampled_run(name, steps, samples).grad(estimator)).z(case(name).grad_J)
    assert float(z.abs().max()) < z_bound(2 * sum(map(len, SAMPLED.values()))) + 0.3


@cache
def sampled_run(name: str, steps: int, samples: int) -> Run:
    return Run(case(name), Heun(), grids.uniform(case(name).problem, steps), Noise(7), torch.arange(samples))


@pytest.mark.parametrize("name", ["gaussian-16d", "mixture-1d"])
def test_chain_against_the_exact_gradient(name):
    """The likelihood ratio of the 2M chain, second order, with V for a baseline."""
    c = case(name)
    run = Run(c, Multistep2(), grids.uniform(c.problem, 64), Noise(8), torch.arange(1000))
    advantage = returns(c.problem, run.path, run.reward, run.cost) - run.value[:-1]
    chain = run.per_sample(lambda policy: chain_surrogate(c.problem, run.solver, run.path, policy, advantage))
    z = Estimate.of(chain + run.with_slope(torch.zeros_like(run.path.x))).z(c.grad_J)
    assert float(z.abs().max()) < z_bound(4) + 0.3


def test_variance():
    """Standard deviation of one sample's estimate, without the explicit part that all share: grad V < its zeroth-order
    form < likelihood ratio with V for a baseline < without."""
    c = case("gaussian-1d")
    run = Run(c, Heun(), grids.uniform(c.problem, 100), Noise(0), torch.arange(2000))
    ratio = partial(likelihood_ratio_slope, c.problem, run.path, run.reward, run.cost)
    slopes = [critic_slope(c.value, run.path), td_slope(c.problem, run.path, run.value, run.cost)]
    slopes += [ratio(run.value[:-1]), ratio()]
    shared = run.with_slope(torch.zeros_like(run.path.x[:-1]))
    spread = torch.stack([run.with_slope(slope[:100]).sub(shared).std(0) for slope in slopes])
    growth = spread[1:] / spread[:-1]
    assert bool((growth[0] > 1.05).all() and (growth[1] > 2).all() and (growth[2] > 1.2).all()), spread


# ------------------------------------------------------------------------------------------ shapes and refusals


def image(shape: tuple[int, ...]) -> tuple[ScoreAsAction, Callable[..., Tensor]]:
    """N(0, 1) data, a reward that mixes all places, and a policy: the same problem in any shape."""
    initial = IsotropicNormal(shape)
    problem = ScoreAsAction(
        VPLinear(0.1, 8.0), lambda t, x, cond: -x, lambda x, cond: x.flatten(1).cumsum(1).tanh().sum(1), initial, shape
    )
    return problem, lambda t, x, cond=None: 0.3 - 0.8 * x.tanh()


def everything(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    problem, policy = image(shape)
    explore = GaussianPolicy(policy, lambda t: Scalar(0.4))
    path = rollout(problem, explore, grids.uniform(problem, 4), Noise(0), torch.arange(3), dtype=dtype)
    value, cost, reward = path.at_nodes(lambda t, x, cond: x.flatten(1).sum(1)), path.x.flatten(2).sum(2), path.x[-1]
    slopes = [
        adjoint(problem, path, policy), *lean_adjoint(problem, path), td_slope(problem, path, value, cost),
        likelihood_ratio_slope(problem, path, reward.flatten(1).sum(1), cost, 0.5),
    ]  # fmt: skip
    ways = [directions(problem, path, policy, slope) for slope in slopes] + [q_direction(path, explore, value[:-1])]
    numbers = [surrogate(problem, path, policy, way) for way in ways]
    numbers.append(chain_surrogate(problem, EulerMaruyama(), path, policy, value[:-1]))
    start = path.x[0].clone().requires_grad_()
    kept = rollout(problem, policy, path.t, Noise(0), path.ids, start=start, differentiable=True)
    numbers.append(pathwise(problem, kept, policy))
    assert all(way.dtype == dtype and way.shape[1:] == (3, *shape) for way in (*slopes, *ways))
    return [v.detach().flatten() for v in (*slopes, *ways, *numbers)]


def test_any_shape_and_precision():
    """States of shape (1, 2, 2) are four numbers each; float32 trajectories give float32."""
    flat = everything((4,), torch.float64)
    for got, expected in zip(everything((1, 2, 2), torch.float64), flat, strict=True):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(everything((4,), torch.float32), flat, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_condition_reaches_everything():
    """All samples of one class: the conditional problem's numbers are those of that class's own problem."""
    entry = catalogue.get("mixture-2d-conditional")
    own = entry.exact.classes[2]
    found = []
    for problem, critic, policy, cond in (
        (entry.problem, entry.value, entry.optimal_policy, torch.full((5,), 2)),
        (own.problem, own.value, own.optimal_policy, None),
    ):
        args = grids.uniform(problem, 3), Noise(0), torch.arange(5)
        path = rollout(problem, policy, *args, cond=cond)
        start = path.x[0].clone().requires_grad_()
        kept = rollout(problem, policy, *args, cond=cond, start=start, differentiable=True)
        explore = GaussianPolicy(policy, lambda t: Scalar(0.4))
        slopes = [critic_slope(critic, path), adjoint(problem, path, policy), lean_adjoint(problem, path)[0]]
        ways = [directions(problem, path, policy, slope) for slope in slopes]
        found.append([
            *ways, q_direction(path, explore, path.x[:-1, :, 0]), surrogate(problem, path, policy, ways[0]),
            chain_surrogate(problem, EulerMaruyama(), path, policy, path.x[-1, :, 0]), pathwise(problem, kept, policy),
        ])  # fmt: skip
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def refusals() -> dict[str, Callable[[], Any]]:
    c = case("gaussian-1d")
    problem, policy = c.problem, c.policy
    run = Run(c, EulerMaruyama(), grids.uniform(problem, 2), Noise(0), torch.arange(3))
    path, x = run.path, run.path.x
    one, left, nodes = torch.zeros(3), torch.zeros(2, 3), torch.zeros(3, 3)
    bare, short = dataclasses.replace(path, xi=None, a=None), dataclasses.replace(path, t=path.t / 2)
    still = dataclasses.replace(problem, eta=0.0)
    blind = dataclasses.replace(problem, reward=lambda x, cond: x.detach()[:, 0])
    kept = run.rollout(c.at(torch.zeros(2, requires_grad=True)), differentiable=True)
    wide = dataclasses.replace(problem, reward=lambda x, cond: x)
    return {
        "these must have the same shape: a ": lambda: direction(problem, one, x[0], x[0, :, 0], x[0]),
        "these must have the same shape: a .*Bp": lambda: direction(problem, one, x[0], x[0], x[0].mT),
        "slope must have shape": lambda: directions(problem, path, policy, x[:1]),
        "direction must have shape": lambda: surrogate(problem, path, policy, x[:, :1]),
        "action .*direction": lambda: surrogate(problem, path, policy, x.expand(-1, -1, 2)),
        "grad .*x": lambda: critic_slope(Sideways(), path),
        "value .*cost": lambda: td_slope(problem, path, nodes, left),
        "reward .*ids": lambda: returns(problem, path, x[-1], nodes),
        "baseline must have shape": lambda: likelihood_ratio_slope(problem, path, one, nodes, torch.zeros(4)),
        "trajectory has no xi": lambda: td_slope(problem, bare, nodes, nodes),
        "trajectory has no xi.*": lambda: likelihood_ratio_slope(problem, bare, one, nodes),
        "eta = 0": lambda: td_slope(still, path, nodes, nodes),
        "eta = 0 .*density": lambda: likelihood_ratio_slope(still, path, one, nodes),
        "trajectory has no actions": lambda: q_direction(bare, c.explore(), left),
        "q .*actions": lambda: q_direction(path, c.explore(), one),
        "root .* is zero": lambda: q_direction(path, GaussianPolicy(policy, lambda t: Scalar(0.0)), left),
        "trajectory carries no graph": lambda: pathwise(problem, path, policy),
        "the reward is not differentiable": lambda: pathwise(blind, kept, policy),
        "the reward is not differentiable.*": lambda: adjoint(blind, path, policy),
        "the reward is not .*": lambda: lean_adjoint(blind, path),
        "reward .*ids.*": lambda: adjoint(wide, path, policy),
        "trajectory ends": lambda: pathwise(problem, short, policy),
        "trajectory ends at": lambda: adjoint(problem, short, policy),
        "trajectory ends at t": lambda: likelihood_ratio_slope(problem, short, one, nodes),
        "solver Heun has no transition": lambda: chain_surrogate(problem, Heun(), path, policy, one),
        "advantage must have shape": lambda: chain_surrogate(problem, run.solver, path, policy, nodes),
        "root .* is zero: a": lambda: chain_surrogate(still, run.solver, path, policy, one),
    }


class Sideways(Critic):
    """A gradient of the wrong shape."""

    def value(self, t, x, cond=None):
        return x[:, 0]

    def grad(self, t, x, cond=None):
        return x[:, 0]


def test_refusals():
    """An estimator says what it lacks."""
    for message, call in refusals().items():
        with pytest.raises(ValueError, match=message):
            call()
