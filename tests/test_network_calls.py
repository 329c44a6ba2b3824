"""network_calls against the calls that are made, counted where they arrive."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl import DDIM, EulerMaruyama, Heun, Multistep2, NetworkCritic, Solver
from ctrl.algorithms import (
    AWM,
    DDPO,
    ActorCritic,
    AdjointMatching,
    Algorithm,
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
from ctrl.bridge import AdaptiveEuler
from ctrl.fit import Settings, fit
from ctrl.noise import INITIAL, Noise
from ctrl.training import guards
from tests.test_reward_constant import Learned
from toy import catalogue
from toy.networks import Perceptron, Policy, Value

EVALUATION = ActorCritic(critic_updates=2, actor_updates=0, nodes=30, keep=1)
ACTOR_CRITIC = ActorCritic(critic_updates=3, actor_updates=2, nodes=30, keep=2)
INVERSE = InverseRL(DDPO(nodes=30), lambda ids: Noise(3).normal(ids, (2,), INITIAL), updates=2)

CASES: dict[str, tuple[Algorithm, Solver]] = {
    "actor-critic, Heun": (ACTOR_CRITIC, Heun()),
    "actor-critic, 2M": (ACTOR_CRITIC, Multistep2()),
    "actor-critic, adaptive steps": (ACTOR_CRITIC, AdaptiveEuler()),
    "actor-critic, critic control": (replace(ACTOR_CRITIC, critic_control=True), EulerMaruyama()),
    "actor-critic, Monte Carlo": (replace(ACTOR_CRITIC, trace=0.0), Heun()),
    "KL budget": (KLBudget(ACTOR_CRITIC, nats=0.1), Heun()),
    "ppo, penalty": (PPOPenalty(updates=3, nodes=30, evaluation=EVALUATION), Heun()),
    "ppo, clipped": (PPOClip(updates=3, nodes=30, evaluation=EVALUATION), DDIM()),
    "path consistency": (PathConsistency(updates=3, paths=7, keep=2), Heun()),
    "policy iteration": (PolicyIteration(critic_updates=2, actor_updates=3, nodes=30), Heun()),
    "q-learning": (QLearning(critic_updates=2, q_updates=3, nodes=30), EulerMaruyama()),
    "q-learning, Heun": (QLearning(critic_updates=2, q_updates=3, nodes=30, critic_control=False), Heun()),
    "adjoint matching": (AdjointMatching(updates=3, nodes=30), Heun()),
    "adjoint matching, full": (AdjointMatching(updates=3, nodes=30, lean=False), Heun()),
    "forward matching": (ForwardMatching(updates=3, nodes=30, keep=2, critic_updates=2), Heun()),
    "forward matching, mean of others": (ForwardMatching(updates=3, nodes=30, critic_updates=0), Heun()),
    "forward matching, anchored": (ForwardMatching(updates=3, nodes=30, target="anchored", critic_updates=2), Heun()),
    "forward matching, anchored, 2M": (
        ForwardMatching(updates=3, nodes=30, keep=2, target="anchored", critic_updates=0),
        Multistep2(),
    ),
    "awm": (AWM(updates=3, nodes=30), Heun()),
    "diffusion nft": (DiffusionNFT(updates=3, nodes=30), Heun()),
    "TD form, DDIM": (TDForm(updates=2, nodes=30, evaluation=EVALUATION), DDIM()),
    "TD form, 2M": (TDForm(updates=2, nodes=30, evaluation=EVALUATION), Multistep2()),
    "next value, DDIM": (NextValue(updates=2, nodes=30, evaluation=EVALUATION), DDIM()),
    "next value, 2M": (NextValue(updates=2, nodes=30, evaluation=EVALUATION), Multistep2()),
    "ddpo, DDIM": (DDPO(nodes=30), DDIM()),
    "ddpo, 2M": (DDPO(nodes=30), Multistep2()),
    "inverse RL": (INVERSE, Multistep2()),
}


@pytest.mark.parametrize("name", CASES)
def test_network_calls_are_those_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is policy, reference or critic at one state, with what it calls itself, and with its gradient where that
    is taken. What a run does to check itself is not counted."""
    monkeypatch.setattr(guards, "check_on_policy", lambda run, collection: None)
    torch.manual_seed(0)
    algorithm, solver = CASES[name]
    rows, q_learning = [0], isinstance(algorithm, QLearning)
    plain = replace(catalogue.get("mixture-2d").problem, gamma=0.1 if q_learning else 0.0)

    class Counted(Policy):
        def forward(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
            rows[0] += len(x)
            return super().forward(t, x, cond)

    class CountedCritic(NetworkCritic):
        def combine(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any) -> Tensor:
            rows[0] += len(x)
            return super().combine(t, x, x0hat, cond)

    def reference(t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        rows[0] += len(x)
        return plain.reference(t, x, cond)

    problem = replace(plain, reference=reference)  # policy and critic have another, within their own calls
    if isinstance(algorithm, InverseRL):
        problem = replace(problem, reward=Learned(Perceptron(plain, 1, 8)))
    policy, critic = Counted(plain, 8), CountedCritic(plain, Value(plain, 8))
    made = []
    fit(
        problem,
        GaussianNetwork(plain, policy) if q_learning else policy,
        algorithm,
        critic=critic,
        settings=Settings(epochs=3, samples=14, steps=5, solver=solver, batch=11, micro_batch=8, progress=False),
        callbacks=[lambda run, metrics: made.append((metrics["network_calls"], rows[0]))],
    )
    assert len(made) == 3
    assert [counted for counted, _ in made] == [arrived for _, arrived in made]
