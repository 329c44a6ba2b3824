"""Forward matching: its baseline, what it refuses, and what a run of it keeps; its gradient is in test_algorithms."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl import Estimate, Heun, ProbabilityFlow
from ctrl.algorithms import ForwardMatching
from ctrl.algorithms.forward_matching import group_of, others_mean
from ctrl.fit import Settings, fit
from toy import catalogue
from toy.networks import Policy

# ------------------------------------------------------------------------------------------ the baseline


def alone(v: torch.Tensor) -> torch.Tensor:
    return v


def expected(y: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    return others_mean(y, group, alone, int(group.max()) + 1)


numbers = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=30)


@given(numbers, st.floats(-1e3, 1e3), st.integers(1, 5))
def test_what_is_expected_moves_with_the_returns(values, constant, groups):
    y, group = torch.tensor(values, dtype=torch.float64), torch.arange(len(values)) % groups
    torch.testing.assert_close(expected(y + constant, group), expected(y, group) + constant, rtol=1e-9, atol=1e-9)


def test_groups_without_scatter_are_told_apart_by_one_other():
    y, group = torch.tensor([1.0, 5.0, 1.0, 5.0, 1.0, 5.0]), torch.tensor([0, 1, 0, 1, 0, 1])
    torch.testing.assert_close(expected(y, group), y)


def test_groups_that_do_not_differ_are_one():
    y, group = torch.tensor([0.0, 2.0, 2.0, 0.0, 0.0, 2.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    torch.testing.assert_close(expected(y, group), (y.sum() - y) / 5)  # the group means are equal, the rest is scatter


def test_a_group_of_one_is_expected_to_be_like_the_others():
    y, group = torch.tensor([3.0, 1.0, 2.0, 4.0]), torch.arange(4)
    torch.testing.assert_close(expected(y, group), (y.sum() - y) / 3)


def test_what_is_expected_is_the_posterior_mean_of_a_normal_hierarchy():
    """The mean squared error is that of the predictor that knows both variances, to 4 standard errors, and to 1/groups
    of what groups are good for, as the variances are estimated from so many."""
    torch.manual_seed(0)
    n, groups, m, between, within = 2_000, 10, 5, 0.5, 1.0
    level = 7 + between**0.5 * torch.randn(n, groups, dtype=torch.float64)
    y = level[:, :, None] + within**0.5 * torch.randn(n, groups, m + 1, dtype=torch.float64)
    group = torch.arange(groups).repeat_interleave(m + 1)
    found = torch.stack([expected(row, group) for row in y.flatten(1)])
    squared = Estimate.of((y.flatten(1) - found).square().mean(1))
    best, useless = within + between * within / (between * m + within), within + between
    assert float(squared.z(best)) > -4 and float(squared.mean) < best + (useless - best) / groups + 4 * float(
        squared.stderr
    )


@pytest.mark.parametrize(
    ("cond", "groups"),
    [
        (None, [0, 0, 0]),
        (torch.tensor([2, 0, 2]), [2, 0, 2]),
        (SimpleNamespace(index=torch.tensor([1, 1, 0])), [1, 1, 0]),
        (torch.tensor([0.1, 0.2, 0.3]), [0, 0, 0]),
        (torch.ones(3, 2, dtype=torch.int64), [0, 0, 0]),
    ],
)
def test_samples_are_grouped_by_a_condition_of_whole_numbers(cond, groups):
    assert group_of(cond, 3).tolist() == groups


# ------------------------------------------------------------------------------------------ runs


class Unconditional(Policy):
    """One that ignores its condition."""

    def forward(self, t, x, cond=None):
        return super().forward(t, x)


def ran(algorithm, resume=False, **settings):
    torch.manual_seed(0)
    problem = catalogue.get("mixture-2d").problem
    settings = Settings(samples=16, steps=4, lr=1e-3, schedule=lambda p: 1.0, progress=False, **settings)
    return fit(problem, Policy(problem), algorithm, settings=settings, resume=resume).history


def test_any_labels_are_conditions():
    """Of whatever sign and size; what is no whole number is none, which makes a difference where rewards have one."""
    exact, losses = catalogue.get("mixture-2d").problem, []
    for labels in ([-(10**12), 3], [0, 1], [0.0, 1.0]):
        torch.manual_seed(0)
        last = labels[1]
        problem = dataclasses.replace(
            exact, reward=lambda x, cond, last=last: exact.reward(x, cond) + 2 * (cond == last)
        )
        found = fit(
            problem, Unconditional(problem), ForwardMatching(updates=2, nodes=16, critic_updates=0),
            conditions=lambda ids, labels=labels: torch.tensor(labels)[ids % 2],
            settings=Settings(samples=16, steps=4, epochs=2, lr=1e-3, progress=False),
        )  # fmt: skip
        losses.append([m["policy_loss"] for m in found.history])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("target", ["soft", "anchored"])
def test_the_ends_of_earlier_epochs_are_in_a_checkpoint(target, tmp_path):
    algorithm = ForwardMatching(updates=2, nodes=16, keep=2, target=target, weight="x0hat", critic_updates=0)
    whole = ran(algorithm, epochs=3)
    ran(algorithm, epochs=2, out=tmp_path)
    rest = ran(algorithm, epochs=3, out=tmp_path, resume=True)
    for name in ("reward", "kl", "policy_loss"):
        assert [m[name] for m in rest] == [m[name] for m in whole]


@pytest.mark.parametrize(
    "problem",
    [
        catalogue.varied("gaussian-1d", eta=0.5).problem,
        catalogue.get("lq-1d").problem,
        ProbabilityFlow(**{
            name: getattr(catalogue.get("gaussian-1d").problem, name)
            for name in ("noising", "reference", "reward", "initial", "shape")
        }),
    ],
    ids=["eta", "lq", "ode"],
)  # fmt: skip
def test_a_process_that_is_no_time_reversal_is_refused(problem):
    with pytest.raises(ValueError, match="eta"):
        ForwardMatching(critic_updates=0).check(problem, Heun(), None)
