"""AWM and DiffusionNFT: where their updates are those of forward matching, what clips them, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl.algorithms import AWM, DiffusionNFT, ForwardMatching
from ctrl.algorithms.base import Algorithm
from ctrl.fit import Settings, fit
from toy import catalogue
from toy.networks import Policy


def trained(algorithm: Algorithm, updates: int = 1, beta: float = 0.5, **settings: Any) -> tuple[Tensor, list[Tensor]]:
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


def test_an_epoch_s_first_update_by_awm_is_that_of_anchored_forward_matching() -> None:
    """Whatever the clip: before anything has moved, the ratio is 1."""
    for weight, clip in (("eps", 1e-6), ("eps", 10.0), ("x0hat", 1e-3)):
        anchored = ForwardMatching(1, 64, keep=1, target="anchored", weight=weight, hold=0.0, critic_updates=0)
        torch.testing.assert_close(trained(AWM(1, 64, clip, weight))[1][0], trained(anchored)[1][0])


def test_awm_is_clipped_where_the_ratio_leaves_its_interval() -> None:
    """A node whose loss has gone the way it should has no gradient left: most of them, after a small step."""
    free, clipped = (trained(AWM(2, 1024, clip, weight="eps"), beta=1e-12)[1][1] for clip in (1e9, 1e-9))
    assert float(clipped.norm()) < 0.5 * float(free.norm())


def test_nft_without_its_normalisation_is_a_weighted_denoising_loss_and_a_pull_to_the_old_policy() -> None:
    """As the brackets in the module's docstring have it, at any step."""
    g = torch.Generator().manual_seed(0)
    moved, end, old = torch.randn(3, 50, 4, generator=g, dtype=torch.float64)
    for step in (0.1, 1.0, 3.0):
        good = torch.rand(50, generator=g, dtype=torch.float64)
        whole = sum(r * (old + sign * step * moved - end).square().sum(1) for r, sign in ((good, 1), (1 - good, -1)))
        parts = step**2 * moved.square().sum(1) - 2 * step * (2 * good - 1) * (moved * (end - old)).sum(1)
        torch.testing.assert_close(whole, parts + (end - old).square().sum(1))


def test_an_epoch_s_first_update_by_nft_does_not_depend_on_its_step() -> None:
    """The old policy is where it is, and the pull to it is zero."""
    _, (small,) = trained(DiffusionNFT(1, 64, step=0.1))
    _, (large,) = trained(DiffusionNFT(1, 64, step=2.0))
    torch.testing.assert_close(small, large)
    _, (cut,) = trained(DiffusionNFT(1, 64, most=0.1))  # most advantages are more than a tenth of a deviation
    assert float((cut - small).norm()) > 0.1 * float(small.norm())


@pytest.mark.parametrize("algorithm", [AWM(2, 64, clip=0.1, weight="eps"), DiffusionNFT(2, 64)], ids=["awm", "nft"])
def test_rewards_grow(algorithm: Algorithm) -> None:
    """By more than five standard errors in thirty epochs, at a small price."""
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
