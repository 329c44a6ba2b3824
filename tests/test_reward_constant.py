"""A constant in the reward teaches nothing: r and r + c make the same run, whatever learns."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrl import DDIM, Heun, Multistep2, NetworkCritic, StructuredCritic
from ctrl.algorithms import (
    AWM,
    DDPO,
    ActorCritic,
    AdjointMatching,
    DiffusionNFT,
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
)
from ctrl.fit import Settings, fit
from ctrl.noise import INITIAL, Noise
from toy import catalogue
from toy.networks import Perceptron, Policy, Value

CONSTANT = 1000.0
TOLERANCE = 2**-53 * CONSTANT * 10**4
"""r + c is rounded by 2^-53 c. A target sums up some 5 of these, that of q is divided by a time step of at least 1/20,
and Adam divides each entry of a gradient by its size, a few of them a hundredth of the typical: 5 x 20 x 100."""

EVALUATION = ActorCritic(critic_updates=2, actor_updates=0, nodes=32, keep=1)
ACTOR_CRITIC = ActorCritic(critic_updates=3, actor_updates=3, nodes=32, keep=2)


def data(ids: Tensor) -> Tensor:
    return Noise(3).normal(ids, (2,), INITIAL)


CRITICS = {
    "actor-critic": ACTOR_CRITIC,
    "actor-critic, critic control": replace(ACTOR_CRITIC, critic_control=True, trace=0.0),
    "ppo, penalty": PPOPenalty(updates=3, nodes=32, evaluation=EVALUATION),
    "ppo, clipped": PPOClip(updates=3, nodes=32, evaluation=EVALUATION),
    "path consistency": PathConsistency(updates=3, paths=8, keep=2),
    "policy iteration": PolicyIteration(critic_updates=3, actor_updates=3, nodes=32),
    "q-learning": QLearning(critic_updates=3, q_updates=3, nodes=32),
    "TD form": TDForm(updates=2, nodes=32, evaluation=EVALUATION),
    "next value": NextValue(updates=2, nodes=32, evaluation=EVALUATION),
    "forward matching": ForwardMatching(updates=3, nodes=32, critic_updates=3, keep=2),
    "KL budget": KLBudget(ACTOR_CRITIC, nats=0.1),
    "inverse RL": InverseRL(replace(ACTOR_CRITIC, keep=1), data, squares=0.0),
}
"""Algorithms that learn a critic."""
ALONE = {
    "ddpo": DDPO(nodes=32), "adjoint matching": AdjointMatching(updates=3, nodes=32),
    "forward matching, anchored": ForwardMatching(updates=3, nodes=32, target="anchored", critic_updates=0),
    "awm": AWM(updates=3, nodes=32), "diffusion nft": DiffusionNFT(updates=3, nodes=32),
}  # fmt: skip
"""Algorithms without one."""
SOLVERS = {"TD form": DDIM(), "next value": Multistep2(), "ddpo": Multistep2()}


class Learned(nn.Module):
    """A reward, or a stand-in for one, that is a network."""

    differentiable = True

    def __init__(self, network: Perceptron, reset: bool = False) -> None:
        super().__init__()
        self.network = network
        if reset:
            network.layers[-1].reset_parameters()

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        return self.network(torch.zeros(len(x)), x, x)[:, 0]


class Plus(nn.Module):
    """r + c."""

    def __init__(self, reward: Any, constant: float, differentiable: bool) -> None:
        super().__init__()
        self.reward, self.constant, self.differentiable = reward, constant, differentiable

    def forward(self, x: Tensor, cond: Any = None) -> Tensor:
        r = self.reward(x, cond) + self.constant
        return r if self.differentiable else r.detach()


@dataclass(frozen=True)
class Trained:
    """Metrics but for the time they took, rewards less the constant, and every parameter that was trained."""

    history: list[dict[str, float]]
    parameters: Tensor


def train(name: str, kind: str, discount: float, constant: float) -> Trained:
    """A short run on mixture-2d with r + constant."""
    torch.manual_seed(5)
    algorithm, exact = (CRITICS | ALONE)[name], catalogue.get("mixture-2d").problem
    learned, gamma = name == "inverse RL", 0.1 if name == "q-learning" else 0.0
    reward = Learned(Perceptron(exact, 1, 8), reset=True) if learned else exact.reward
    raised = Plus(reward, constant, differentiable=learned or kind != "stand-in")
    problem = replace(exact, reward=raised, discount=discount, gamma=gamma)
    policy = Policy(problem, 8)
    critic = {
        "network": lambda: NetworkCritic(problem, Value(problem, 8)),
        "structured": lambda: StructuredCritic(problem, Value(problem, 8)),
        "stand-in": lambda: StructuredCritic(problem, Value(problem, 8), reward=Learned(Perceptron(problem, 1, 8))),
        "none": lambda: None,
    }[kind]()
    learner = GaussianNetwork(problem, policy) if gamma else policy
    settings = Settings(epochs=3, samples=16, steps=5, solver=SOLVERS.get(name, Heun()), progress=False)
    found = fit(problem, learner, algorithm, critic=critic, settings=settings)
    history = [{k: v for k, v in metrics.items() if k != "seconds"} for metrics in found.history]
    for metrics in history:
        metrics["reward"] -= constant
    models = [m for m in (learner, critic, problem.reward) if isinstance(m, nn.Module)]
    return Trained(history, torch.cat([p.detach().flatten() for m in models for p in m.parameters()]))


WITH = [(n, k) for n in CRITICS for k in ("network", "structured", "stand-in")] + [(n, "none") for n in ALONE]
UNDISCOUNTED = ("forward matching", "forward matching, anchored", "awm", "diffusion nft")


@pytest.mark.parametrize(
    "name, kind, discount",
    [(*case, rho) for case in WITH for rho in (0.0, 0.4) if not rho or case[0] not in UNDISCOUNTED],
)
def test_a_constant_in_the_reward_changes_nothing(name: str, kind: str, discount: float) -> None:
    """Whole histories and final weights."""
    plain, raised = (train(name, kind, discount, constant) for constant in (0.0, CONSTANT))
    for a, b in zip(plain.history, raised.history, strict=True):
        assert list(a) == list(b)
        assert list(b.values()) == pytest.approx(list(a.values()), rel=TOLERANCE, abs=TOLERANCE)
    torch.testing.assert_close(raised.parameters, plain.parameters, rtol=TOLERANCE, atol=TOLERANCE)
