"""How good a policy is against the exact optimum, and whether an algorithm's gradient and KL are right.

`score` measures a policy. The regret needs no difference of two noisy J's: with q* = -½ |a - a*|²_R for the advantage
rate of the optimum, the performance difference (Zhao, Tang & Yao 2023) is

    J* - J = E_a of the integral of e^{-rho t} ½ |a - a*|²_R dt,

whose integrand vanishes where the policy is right. `check` holds an algorithm, at fixed parameters, against the exact
gradient of J and the exact path KL of a Gaussian problem, and says which quantity is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ctrl import grids
from ctrl.algorithms.base import Algorithm, Annotate, Context
from ctrl.estimate import Estimate
from ctrl.fit import Run, Settings
from ctrl.gaussian import Mean
from ctrl.grids import node_weights
from ctrl.linop import dot
from ctrl.nodes import Collection, Nodes
from ctrl.noise import Noise
from ctrl.noising import VPLinear
from ctrl.problem import Problem
from ctrl.regularize import kl_rate
from ctrl.rollout import Trajectory, batch_times, rollout
from ctrl.solvers import Exponential, Heun, Solver
from ctrl.training.device import make_accelerator
from ctrl.training.epoch import Epoch
from ctrl.value import Critic
from toy.catalogue import Entry
from toy.gaussian import GaussianDiffusion, GaussianLaw, QuadraticReward
from toy.lq import LQ, Array, LinearPolicy, QuadraticValue


@dataclass(frozen=True)
class Score:
    """Of a policy, each with its standard error.

    Attributes:
        regret: J* - J, in units of reward.
        relative_regret: the same over J* - J of the reference.
        control_error: KL(P || P*) in nats, E of the integral of ½ |S^-1 B (a - a*)|² dt.
        path_kl: KL(P || P_ref) in nats.
        reward: E r(X_T).
        critic_gradient_error: E of the integral of ½ |R^-1 B' (grad V - grad V*)|²_R dt over J* - J_ref: the regret of
            the critic's greedy policy, on the policy's own states. None without a critic.
    """

    regret: Estimate
    relative_regret: Estimate
    control_error: Estimate
    path_kl: Estimate
    reward: Estimate
    critic_gradient_error: Estimate | None


@torch.no_grad()
def score(
    entry: Entry, policy: Mean, critic: Critic | None = None, *, samples: int = 2048, steps: int = 200, seed: int = 999
) -> Score:
    """Score a policy on a fine grid, where its parameters are: stochastic Heun, `steps` steps, the same noise for every
    policy."""
    problem, path = entry.problem, _rollout(entry, policy, samples, steps, seed)
    scale = reference_regret(entry, samples, steps, seed)

    def rates(t: Tensor, x: Tensor) -> Tensor:
        """Of regret, KL to the optimum, KL to the reference, and the critic's share, (4, B)."""
        a, best, a_ref = (mean(t, x, path.cond) for mean in (policy, entry.optimal_policy, problem.reference))
        columns = [_regret_rate(problem, t, a, best), kl_rate(problem, t, a, best), kl_rate(problem, t, a, a_ref)]
        if critic is None:
            return torch.stack([*columns, torch.zeros_like(columns[0])])
        push = problem.control(t).adjoint(critic.grad(t, x, path.cond) - entry.value.grad(t, x, path.cond))
        miss = torch.exp(-problem.discount * t) * dot(push, problem.penalty(t).solve(push)) / 2
        return torch.stack([*columns, miss])

    times = batch_times(path.t, path.x.dtype, samples)
    w = node_weights(path.w).tolist()
    total = sum(weight * rates(t, x) for weight, t, x in zip(w, times, path.x, strict=True))
    assert isinstance(total, Tensor)
    regret, away, kl, miss = total
    return Score(
        regret=Estimate.of(regret),
        relative_regret=Estimate.of(regret / scale),
        control_error=Estimate.of(away),
        path_kl=Estimate.of(kl),
        reward=Estimate.of(problem.reward(path.x[-1], path.cond)),
        critic_gradient_error=None if critic is None else Estimate.of(miss / scale),
    )


@cache
@torch.no_grad()
def reference_regret(entry: Entry, samples: int = 2048, steps: int = 200, seed: int = 999) -> float:
    """J* - J of the reference, the unit of relative regrets."""
    problem = entry.problem
    path = _rollout(entry, problem.reference, samples, steps, seed)

    def rate(t: Tensor, x: Tensor, cond: Any) -> Tensor:
        return _regret_rate(problem, t, problem.reference(t, x, cond), entry.optimal_policy(t, x, cond))

    return float(path.integrate(rate).mean())


def device_of(policy: Mean) -> torch.device:
    """Where the parameters of a policy are; the CPU if it has none."""
    parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
    return next((p.device for p in parameters), torch.device("cpu"))


def _rollout(entry: Entry, policy: Mean, samples: int, steps: int, seed: int) -> Trajectory:
    ids = torch.arange(samples, device=device_of(policy))
    times = grids.natural(entry.problem, steps)
    return rollout(entry.problem, policy, times, Noise(seed), ids, solver=Heun(), cond=entry.condition(ids))


def _regret_rate(problem: Problem, t: Tensor, a: Tensor, best: Tensor) -> Tensor:
    """e^{-rho t} ½ |a - a*|²_R, (B,)."""
    miss = a - best
    return torch.exp(-problem.discount * t) * dot(miss, problem.penalty(t).apply(miss)) / 2


# the check


THETA = (-0.3, 0.6)


class Perturbed(nn.Module):
    """s_ref + theta_0 (t/T) x + theta_1: a policy that is not optimal, with two parameters."""

    def __init__(self, problem: Problem, theta: tuple[float, float] = THETA) -> None:
        super().__init__()
        self.problem = problem
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        K, k = self.theta.to(x.dtype)
        return self.problem.reference(t, x, cond) + K * (t / self.problem.horizon)[:, None].to(x.dtype) * x + k


def perturbed(lq: LQ, theta: tuple[float, float] = THETA) -> tuple[LinearPolicy, LinearPolicy]:
    """`Perturbed` for exact answers, and its derivatives in the two parameters, as `LQ.grad_J` wants them."""
    (K, k), reference, identity = theta, lq.reference, np.eye(len(lq.mean0))

    def slopes(t: Array) -> Array:
        return (t / lq.horizon)[:, None, None] * identity

    def shifts(t: Array) -> Array:
        return np.ones((len(t), len(identity)))

    policy = LinearPolicy(lambda t: reference.K(t) + K * slopes(t), lambda t: reference.k(t) + k * shifts(t))
    features = LinearPolicy(
        lambda t: np.stack([slopes(t), 0 * slopes(t)], 1), lambda t: np.stack([0 * shifts(t), shifts(t)], 1)
    )
    return policy, features


@dataclass(frozen=True)
class Finding:
    """One quantity of an algorithm against its exact value."""

    quantity: str
    right: bool
    message: str


class AllNodes:
    """What an algorithm may ask for, but that a minibatch is all that the newest collection has."""

    def __init__(self, epoch: Epoch) -> None:
        self._epoch = epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoch, name)

    def with_problem(self, problem: Problem) -> AllNodes:
        return AllNodes(self._epoch.with_problem(problem))

    def minibatches(
        self, updates: int, size: int, *, last: int | None = None, annotate: Annotate | None = None, calls: int = 1
    ) -> Iterator[Nodes]:
        epoch = self._epoch
        nodes = epoch.nodes(epoch.collections[-1], range((epoch.steps if last is None else last) + 1))
        yield epoch.annotated(nodes, annotate, calls * len(nodes))

    def path_minibatches(self, updates: int, size: int) -> Iterator[Collection]:
        yield self._epoch.collections[-1]


def first_gradient(run: Run) -> Tensor:
    """The algorithm's estimate of grad J from an epoch's trajectories, from all of their nodes; nothing learns."""
    epoch = run.begin_epoch()
    if epoch is None:
        raise ValueError("a rollout was not finite, so there is no gradient")
    updates = run.algorithm.learn(cast(Context, AllNodes(epoch)))
    update = next((update for update in updates if update.name == "policy"), None)
    if update is None:
        raise ValueError(f'{type(run.algorithm).__name__}.learn never yields Update("policy", ...)')
    run.engine.differentiate(dataclasses.replace(update, size=len(update.nodes)))
    run.epoch += 1
    run.replay.collections = []
    return -torch.cat([p.grad.flatten().cpu() for p in run.engine.learners["policy"].trained if p.grad is not None])


def gradients(
    problem: Problem, policy: nn.Module, algorithm: Algorithm, critic: Critic | None, settings: Settings, epochs: int
) -> Tensor:
    """An algorithm's estimates of grad J at fixed parameters, one an epoch, (epochs, P), in float64.

    The algorithm's own code, from rollout to loss, on all nodes of an epoch at once.
    """
    settings = dataclasses.replace(settings, batch=1 << 20, micro_batch=1 << 20, progress=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        run = Run(problem, policy, algorithm, critic, None, settings, make_accelerator())
        return torch.stack([first_gradient(run) for _ in range(epochs)])
    finally:
        torch.set_default_dtype(before)


def check(
    algorithm: Algorithm, *, solver: Solver | None = None, steps: int = 60, samples: int = 512, epochs: int = 12
) -> list[Finding]:
    """Hold an algorithm's gradient and KL, at fixed parameters and with the exact critic, against the exact ones.

    The problem is a Gaussian in three dimensions under `Perturbed`, on which J, V, grad J and KL are exact. An estimate
    is right within 5 standard errors plus 3 % for the discretization of `steps` steps.
    """
    exact, linear, value, answers = _exact()
    problem = exact.problem
    policy = Perturbed(problem)
    settings = Settings(samples=samples, steps=steps, solver=solver or Heun(), jitter=0.0)
    try:
        algorithm.check(problem, settings.solver, value)
    except ValueError:
        if solver is not None:
            raise
        settings = dataclasses.replace(settings, solver=Exponential())
    gradient = Estimate.of(gradients(problem, policy, algorithm, value, settings, epochs))
    times, ids = grids.natural(problem, steps), torch.arange(2048, device=device_of(policy))
    with torch.no_grad():
        path = rollout(problem, policy, times, Noise(1), ids, solver=Heun(), dtype=torch.float64)
    kl = Estimate.of(algorithm.kl(problem, path, policy).detach())
    return [_judge_gradient(gradient, answers), _judge_kl(kl, exact.lq.path_kl(linear), steps)]


@cache
def _exact() -> tuple[GaussianDiffusion, LinearPolicy, QuadraticValue, dict[str, Tensor]]:
    """The problem, the policy, its value, and grad J with what it becomes under the usual mistakes."""
    exact = _gaussian()
    linear, features = perturbed(exact.lq)
    return exact, linear, exact.lq.value(linear), _exact_gradients(exact, linear, features)


def _gaussian() -> GaussianDiffusion:
    C = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.3, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    mu = torch.tensor([0.5, -0.5, 1.0], dtype=torch.float64)
    reward = QuadraticReward(torch.eye(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    start = GaussianLaw(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    return GaussianDiffusion(VPLinear(0.1, 8.0), mu, C, reward, beta=0.5, start=start)


def _exact_gradients(exact: Any, policy: LinearPolicy, features: LinearPolicy) -> dict[str, Tensor]:
    """grad J, and what it becomes under the usual mistakes."""
    lq = exact.lq

    def closed(t: Array) -> Any:
        """The same law of the state, with the policy built in and no control left: only the explicit cost remains."""
        c = lq.at(t)
        A, d = c.A + c.B @ policy.K(t), c.d + (c.B @ policy.k(t)[..., None])[..., 0]
        return dataclasses.replace(c, A=A, B=0 * c.B, d=d)

    whole = torch.from_numpy(lq.grad_J(policy, features))
    price = torch.from_numpy(dataclasses.replace(lq, at=closed).grad_J(policy, features))
    kl = exact.beta * torch.from_numpy(lq.kl_problem().grad_J(policy, features))
    return {
        "": whole,
        "it has the wrong sign": -whole,
        "the derivative of the KL's own rate is missing (a KL under no_grad?)": whole - price,
        "KL has no part in it": whole - kl,
        "the derivative of the KL's own rate has the wrong sign": whole - 2 * price,
        "it is a mean over dimensions where a sum belongs": whole / len(exact.mu),
        "its reward part is a mean over dimensions where a sum belongs": (whole - price) / len(exact.mu) + price,
        "its KL part is a mean over dimensions where a sum belongs": whole - price + price / len(exact.mu),
    }


def _judge_gradient(found: Estimate, answers: dict[str, Tensor]) -> Finding:
    whole = answers[""]
    allowed = 5 * found.stderr + 0.03 * whole.abs().max()

    def distance(answer: Tensor) -> float:
        return float(((found.mean - answer).abs() / allowed).max())

    numbers = f"{[round(v, 4) for v in found.mean.tolist()]}, exact {[round(v, 4) for v in whole.tolist()]}"
    if distance(whole) <= 1:
        return Finding("gradient", True, f"grad J is right: {numbers}")
    cause = min(answers, key=lambda name: distance(answers[name]))
    scale = float(found.mean @ whole / (whole @ whole))
    if distance(answers[cause]) > 1 or not cause:
        cause = (
            f"it is {scale:.3g} times the exact one" if distance(scale * whole) <= 1 else "no usual mistake explains it"
        )
    return Finding("gradient", False, f"grad J is off: {cause}; {numbers}")


def _judge_kl(found: Estimate, exact: float, steps: int) -> Finding:
    value = float(found.mean)
    numbers = f"{value:.4g} nats, exact {exact:.4g}"
    if abs(value - exact) <= 5 * float(found.stderr) + 0.03 * exact:
        return Finding("KL", True, f"path KL is right: {numbers}")
    ratio = value / exact
    causes = {"its time step is missing (a KL without dt?)": float(steps), "it has the wrong sign": -1.0,
              "it is a mean over dimensions where a sum belongs": 1 / 3}  # fmt: skip
    near = [cause for cause, r in causes.items() if abs(ratio / r - 1) < 0.3]
    return Finding("KL", False, f"path KL is off: {near[0] if near else f'{ratio:.3g} times too large'}; {numbers}")
