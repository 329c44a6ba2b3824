"""AWM and DiffusionNFT: where their updates are those of forward matching, what clips them, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl.algorithms import AWM, DiffusionNFT, ForwardMatching, advantage_matching
from ctrl.algorithms.base import Algorithm
from ctrl.fit import Settings, fit
from ctrl.nodes import Nodes
from toy import catalogue
from toy.networks import Policy


def trained(algorithm: Algorithm, beta: float = 0.5, **settings: Any) -> tuple[Tensor, list[Tensor]]:
    """The weights after one epoch from the reference, and the gradient of every update (of policies alone)."""
    torch.manual_seed(0)
    entry = catalogue.varied("mixture-2d", beta=beta)
    policy, seen = Policy(entry.problem), []

    class Seen(torch.optim.SGD):
        def step(self, *args: Any) -> None:
            seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).clone())
            super().step(*args)

    settings = {"epochs": 1, "samples": 32, "steps": 6, "lr": 1e-3, "max_grad_norm": 1e9, "progress": False, **settings}
    fit(entry.problem, policy, algorithm, settings=Settings(optimizer=Seen, **settings))
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), seen


def test_the_first_update_by_awm_is_that_of_anchored_forward_matching() -> None:
    """Whatever the clip: before anything has moved, the ratio is 1."""
    for weight, clip in (("eps", 1e-6), ("eps", 10.0), ("x0hat", 1e-3)):
        anchored = ForwardMatching(1, 64, keep=1, target="anchored", weight=weight, hold=0.0, critic_updates=0)
        torch.testing.assert_close(trained(AWM(1, 64, clip, weight))[1][0], trained(anchored)[1][0])


def test_awm_is_clipped_where_the_ratio_leaves_its_interval() -> None:
    """A node whose loss has gone the way it should has no gradient left: most of them, after a small step."""
    free, clipped = (trained(AWM(2, 1024, clip, weight="eps"), beta=1e-12)[1][1] for clip in (1e9, 1e-9))
    assert float(clipped.norm()) < 0.5 * float(free.norm())


def test_nft_without_its_normalisation_is_a_weighted_denoising_loss_and_a_pull_to_the_old_policy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The brackets of the module's docstring, at any step; the policy is its own reference."""
    monkeypatch.setattr(advantage_matching, "relative_miss", lambda miss: miss.square().mean(1))
    problem = catalogue.get("mixture-2d").problem
    g = torch.Generator().manual_seed(0)
    x, end, a, a_old = torch.randn(4, 50, 2, generator=g)
    t, gain = 0.9 * problem.horizon * torch.rand(50, generator=g), torch.randn(50, generator=g)
    fields = {"end": end, "a_old": a_old, "a_ref": a, "advantage": gain}
    nodes = Nodes(t, x, torch.ones(50), torch.zeros(50), torch.arange(50), None, fields)
    old = problem.endpoint(t, x, a_old)
    moved = problem.endpoint(t, x, a) - old
    for step in (0.1, 1.0, 3.0):
        most = 2.0 * 0.7
        found = DiffusionNFT(step=step, most=2.0).loss(problem, a, nodes, deviation=0.7)
        pull, push = moved.square().mean(1), (moved * (end - old)).mean(1)
        rest = most / step * (end - old).square().mean(1)
        torch.testing.assert_close(found, most * step * pull - 2 * gain.clamp(-most, most) * push + rest)


def test_the_first_update_by_nft_does_not_depend_on_its_step() -> None:
    """The old policy is where it is, and the pull to it is zero."""
    _, (small,) = trained(DiffusionNFT(1, 64, step=0.1))
    _, (large,) = trained(DiffusionNFT(1, 64, step=2.0))
    torch.testing.assert_close(small, large)
    _, (cut,) = trained(DiffusionNFT(1, 64, most=0.1))  # most advantages are more than a tenth of a deviation
    assert float((cut - small).norm()) > 0.1 * float(small.norm())


@pytest.mark.parametrize("algorithm", [AWM(2, 64, clip=0.1, weight="eps"), DiffusionNFT(2, 64)], ids=["awm", "nft"])
def test_rewards_grow(algorithm: Algorithm) -> None:
    """By more than five standard errors in thirty epochs."""
    torch.manual_seed(0)
    problem = catalogue.varied("mixture-2d", beta=0.1).problem
    found = fit(
        problem, Policy(problem), algorithm,
        settings=Settings(epochs=30, samples=64, steps=10, lr=3e-3, schedule=lambda p: 1.0, progress=False),
    )  # fmt: skip
    first, last = found.history[0], found.history[-1]
    assert last["reward"] - first["reward"] > 5 * (2 / 64) ** 0.5 * first["reward_std"]


@pytest.mark.parametrize("algorithm", [AWM(), DiffusionNFT()], ids=["awm", "nft"])
@pytest.mark.parametrize("name", ["lq-1d", "gaussian-1d@eta"])
def test_a_process_that_is_no_time_reversal_is_refused(algorithm: Algorithm, name: str) -> None:
    entry = catalogue.get(name) if name == "lq-1d" else catalogue.varied("gaussian-1d", eta=0.5)
    with pytest.raises(ValueError, match=f"eta = 1 and discount = 0 for {type(algorithm).__name__}"):
        algorithm.check(entry.problem, Settings().solver, None)
