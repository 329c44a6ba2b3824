"""The scoreboard: regret is J* - J, right algorithms pass the check, wrong ones are told what is off."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from ctrl import DDIM, Exact, Heun, Multistep2, kl_rate, z_bound
from ctrl.algorithms import (
    DDPO,
    ActorCritic,
    AdjointMatching,
    Algorithm,
    PathConsistency,
    PolicyIteration,
    PPOClip,
    PPOPenalty,
)  # fmt: skip
from ctrl.algorithms.base import Update
from ctrl.linop import dot
from toy import catalogue
from toy.scoreboard import check, reference_regret, score


@dataclass(frozen=True)
class Mine(Algorithm):
    """A plain policy gradient, and what can be wrong with one."""

    wrong: str = ""

    def learn(self, run):
        run.record_actions()
        for nodes in run.minibatches(1, 512):
            yield Update("policy", lambda n: self.loss(run, n), nodes, 512)

    def loss(self, run, n):
        a = run.policy(n.t, n.x, n.cond)
        gain = dot(run.problem.control(n.t).adjoint(run.critic.grad(n.t, n.x, n.cond)), a)
        with torch.set_grad_enabled(self.wrong != "no grad"):
            price = run.problem.beta * kl_rate(run.problem, n.t, a, n["a_ref"])
        if self.wrong == "mean":
            gain, price = gain / a.shape[1], price / a.shape[1]
        if self.wrong == "mean of the log-density":
            gain = gain / a.shape[1]
        if self.wrong == "sign":
            gain, price = -gain, -price
        if self.wrong == "sign of KL":
            price = -price
        if self.wrong == "twice":
            gain, price = 2 * gain, 2 * price
        return n.w * (price - gain)

    def kl(self, problem, trajectory, policy):
        if self.wrong != "no dt":
            return super().kl(problem, trajectory, policy)
        return trajectory.at_nodes(
            lambda t, x, c: kl_rate(problem, t, policy(t, x, c), problem.reference(t, x, c))
        ).sum(0)


RIGHT = [(Mine(), None), (ActorCritic(), None), (DDPO(), None), (DDPO(), Multistep2())]
AND_RIGHT = [
    (PolicyIteration(), None), (PPOClip(), None), (PPOPenalty(), None), (PathConsistency(), None),
    (AdjointMatching(lean=False), None), (DDPO(), DDIM(1.0)),
]  # fmt: skip


@pytest.mark.parametrize(
    "algorithm, solver", [*RIGHT, *(pytest.param(a, s, marks=pytest.mark.long) for a, s in AND_RIGHT)], ids=str
)
def test_right_algorithms_pass(algorithm, solver):
    assert [finding.message for finding in check(algorithm, solver=solver) if not finding.right] == []


@pytest.mark.parametrize(
    "wrong, quantity, message",
    [
        ("no dt", "KL", "its time step is missing"),
        ("mean", "gradient", "it is a mean over dimensions where a sum belongs"),
        ("mean of the log-density", "gradient", "its reward part is a mean over dimensions"),
        ("sign", "gradient", "it has the wrong sign"),
        ("no grad", "gradient", "the derivative of the KL's own rate is missing"),
        ("sign of KL", "gradient", "the derivative of the KL's own rate has the wrong sign"),
        ("twice", "gradient", "it is 2 times the exact one"),
    ],
)
def test_wrong_algorithms_are_told(wrong, quantity, message):
    findings = {finding.quantity: finding for finding in check(Mine(wrong))}
    assert not findings[quantity].right and message in findings[quantity].message
    (other,) = set(findings) - {quantity}
    assert findings[other].right


def test_public_ddpo_is_told_about_its_mean():
    """The public codes' mean over dimensions turns the ratio into its D-th root, and the reward's part shrinks by D."""
    gradient, _ = check(DDPO(mean_over_dimensions=True))
    assert not gradient.right and "mean over dimensions" in gradient.message


@pytest.mark.parametrize("name", ["lq-1d", "gaussian-16d"])
def test_regret_is_the_difference_of_exact_values(name):
    """On linear problems J of a policy is exact, and so is J* - J; Heun's error at 200 steps is under 1e-3 of it."""
    entry = catalogue.get(name)
    lq = entry.exact.exact if name == "lq-1d" else entry.exact.lq
    reference = lq.reference if name != "lq-1d" else None
    policy = entry.problem.reference
    if reference is None:  # the reference explores no more than the optimum: compare means at equal covariance
        optimal = lq.optimal_policy()
        reference = type(optimal)(lambda t: 0 * optimal.K(t), lambda t: 0 * optimal.k(t), optimal.Sigma)
    exact = lq.J_optimal() - lq.J(reference)
    found = score(entry, policy, samples=1024, steps=100)
    assert abs(float(found.regret.z(exact))) < z_bound(2) + 1e-3 * exact / float(found.regret.stderr)
    assert float(found.relative_regret.mean) == pytest.approx(1.0)
    assert float(found.path_kl.mean) == 0.0


def test_score_of_the_optimum():
    entry = catalogue.get("mixture-2d")
    found = score(entry, entry.optimal_policy, entry.value, samples=256, steps=40)
    assert float(found.regret.mean) < 1e-20 and float(found.control_error.mean) < 1e-20
    assert found.critic_gradient_error is not None and float(found.critic_gradient_error.mean) < 1e-20
    assert reference_regret(entry, 256, 40) > 0.5


def test_check_says_when_nothing_is_learned():
    class Idle(Algorithm):
        def learn(self, run):
            run.record_actions()
            yield from ()

    with pytest.raises(ValueError, match=r'never yields Update\("policy"'):
        check(Idle())
    with pytest.raises(ValueError, match="transition density"):
        check(DDPO(), solver=Exact(lambda t0, t1: None))


@pytest.mark.parametrize(
    "problem, algorithm, message",
    [
        (dataclasses.replace(catalogue.get("gaussian-1d").problem, eta=0.0), ActorCritic(), "take eta > 0"),
        (dataclasses.replace(catalogue.get("gaussian-1d").problem, beta=0.0), ActorCritic(), "beta must be > 0"),
        (catalogue.get("lq-4d").problem, PathConsistency(), "B must be square"),
    ],
)
def test_what_has_no_greedy_action_is_refused_before_a_rollout(problem, algorithm, message):
    with pytest.raises(ValueError, match=message):
        algorithm.check(problem, Heun(), catalogue.get("gaussian-1d").value)
