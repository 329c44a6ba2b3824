"""The catalogue: frozen numbers, and exact answers that agree with each other on every problem."""

import pytest
import torch

from ctrl import greedy
from tests.strategies import states
from toy import catalogue

# J*: Gauss-Hermite or the Riccati equation, recorded when the problem was named. A change here is another problem.
J_STAR = {
    "lq-1d": -0.24017460261,
    "lq-4d": -1.79253078129,
    "gaussian-1d": -0.18634256662,
    "gaussian-16d": -1.15825304192,
    "mixture-1d": 0.33540706085,
    "mixture-2d": -0.16128406587,
    "mixture-2d-rare-mode": 0.00049120968,
    "mixture-2d-conditional": 0.38533954180,
    "mixture-32d": 0.10197342289,
}


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_numbers_are_frozen(name):
    assert float(catalogue.get(name).J_optimal.mean) == pytest.approx(J_STAR[name], rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_the_optimum_is_greedy_for_its_own_value(name):
    """a* = a_ref + R^-1 B' grad V*, and V*(T, .) = r."""
    entry = catalogue.get(name)
    problem = entry.problem
    t, x = states(problem)
    cond = entry.condition(torch.arange(len(t)))
    best = greedy(problem, t, problem.reference(t, x, cond), entry.value.grad(t, x, cond))
    torch.testing.assert_close(entry.optimal_policy(t, x, cond), best, rtol=1e-8, atol=1e-8)
    end = torch.full_like(t, problem.horizon)
    reward = problem.reward(x, cond)
    torch.testing.assert_close(entry.value.value(end, x, cond), reward, rtol=1e-8, atol=1e-8)


def test_mixture_2d_moves_its_weights():
    """The tilted weights are about .01 .25 .74."""
    w = catalogue.get("mixture-2d").exact.tilted[0].base.w
    assert [round(float(v), 2) for v in w] == [0.01, 0.25, 0.74]


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="mixture-2d-rare-mode"):
        catalogue.get("mixture-3d")


@pytest.mark.parametrize(
    ("name", "changes"), [("gaussian-1d", {"eta": 0.5, "beta": 2.0}), ("mixture-2d", {"beta": 2.0})]
)
def test_a_varied_problem_is_another_with_its_own_answers(name, changes):
    """A nat costs four times as much: less is spent, and less is gained."""
    entry, varied = catalogue.get(name), catalogue.varied(name, **changes)
    assert varied.name == f"{name}@beta=2,eta={changes.get('eta', 1):g}"
    assert all(getattr(varied.problem, key) == value for key, value in changes.items())
    assert entry.problem.beta == 0.5 and entry.problem.eta == 1.0
    assert float(varied.J_optimal.mean) < float(entry.J_optimal.mean)


@pytest.mark.parametrize("name", ["lq-1d", "mixture-2d-rare-mode", "mixture-2d-conditional"])
def test_what_cannot_be_varied_says_so(name):
    with pytest.raises(ValueError, match=f"{name} has no beta or eta that can be varied"):
        catalogue.varied(name, beta=1.0)
