"""ctrl/decided.py: how much of a reward is decided by when, against closed forms on Gaussian data."""

import pytest
import torch

from ctrl import Exact, Noise, grids, z_bound
from ctrl.decided import complete, decided_share
from toy import catalogue

STEPS, N = 8, 20_000


def share(exact, t):
    """Var V(t, Y_t)/Var r under the reference: Y_T has one mean m and variance S2, of which W is open at t, and
    Var(h y - G y²/2) = (h - G m)² v + G² v²/2 for y of variance v."""
    _, _, open_now = exact.transition(exact.problem.s(t))
    phi0, shift0, open_first = exact.transition(torch.tensor(exact.s_max, dtype=torch.float64))
    m = phi0 * exact.initial.mean + shift0
    S2 = phi0**2 * exact.initial.covariance[0] + open_first
    G, h = exact.reward.G[0, 0], exact.reward.h[0]

    def variance(v):
        return (h - G * m) ** 2 * v + G**2 * v**2 / 2

    return (variance(S2 - open_now) / variance(S2))[..., 0]


def test_decided_share_is_the_variance_of_the_value():
    exact = catalogue.get("gaussian-1d").exact
    times, nodes = grids.log_snr(exact.problem, STEPS), [0, 2, 4, 6]
    policy = exact.perturbed(0.0, 0.0)
    rewards = complete(
        exact.problem, policy, times, nodes, Noise(0), torch.arange(N), solver=Exact(exact.lq.closed_loop(policy))
    )
    found, expected = decided_share(rewards), share(exact, times[nodes])
    assert float(expected.diff().min()) > 0.05  # so that one node is told from the next
    assert float(found.z(expected).abs().max()) < z_bound(len(nodes))


def test_decided_share_is_one_for_equal_and_zero_for_independent_rewards():
    """A share of 1 with no error; and of 0 within its error where the ends are independent."""
    first = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.randn(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = decided_share(torch.stack([first, first, other]))
    assert float(found.mean[0]) == pytest.approx(1) and float(found.stderr[0]) == pytest.approx(0, abs=1e-12)
    assert abs(float(found.z(0.0)[1])) < z_bound(1) and float(found.stderr[1]) == pytest.approx(500**-0.5, rel=0.2)


def test_constant_rewards_are_refused():
    with pytest.raises(ValueError, match="rewards must vary"):
        decided_share(torch.ones(3, 10))
