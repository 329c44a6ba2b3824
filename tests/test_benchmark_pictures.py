"""benchmarks/critics.py, frontier.py, pictures.py, value_bias.py: what their figures show is what it says."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from benchmarks import critics, frontier, pictures, value_bias
from benchmarks.algorithms import entry_of
from benchmarks.critics import DESIGNS, SHOWN, critic_of, curves, fields
from toy import catalogue
from toy.gaussian import GaussianLaw

# ------------------------------------------------------------------------------------------------- critics


@pytest.mark.parametrize("design", DESIGNS)
def test_a_critic_is_of_its_design(design):
    """It has parameters, ends at r where it is structured, and sees what it says."""
    made, sees = design.split(", ")
    critic, problem = critic_of(design), catalogue.get(critics.PROBLEM).problem
    for p in critic.parameters():
        torch.nn.init.normal_(p, std=0.3)  # the last layer starts at zero
    assert sum(p.numel() for p in critic.parameters()) > 1000
    x, end = torch.randn(4, 2), torch.full((4,), problem.horizon)
    ends_at_reward = torch.allclose(critic.value(end, x), problem.reward(x), atol=1e-9)
    assert ends_at_reward == (made != "network")
    t, guess = end / 2, torch.randn(4, 2)
    moved = [critic.combine(t, x + 1, guess, None), critic.combine(t, x, guess + 1, None)]
    skip = critics.SKIPS[made]
    through = (
        0 if skip is None else skip.c_skip(torch.full((4,), 0.5)) * (problem.reward(guess + 1) - problem.reward(guess))
    )
    still = critic.combine(t, x, guess, None)
    assert torch.allclose(moved[0], still) == (sees == "x0hat")
    assert torch.allclose(moved[1], still + through) == (sees == "x")


def test_fields_of_the_optimum_are_the_exact_ones():
    entry = catalogue.get(critics.PROBLEM)
    rows = list(fields(entry.optimal_policy, entry.value))
    assert len(rows) == len(critics.TIMES_TO_GO) * critics.LATTICE**2
    for row in rows[:: len(rows) // 20]:
        t, x = torch.tensor([(1 - row["to_go"]) * entry.problem.horizon]), torch.tensor([[row["x1"], row["x2"]]])
        assert (row["V"], row["push1"], row["push2"]) == (row["V_exact"], row["push1_exact"], row["push2_exact"])
        slope = entry.value.grad(t, x)[0]  # eta = 1: beta (a* - s_ref) = grad V*
        assert [row["push1"], row["push2"]] == pytest.approx(slope.tolist(), rel=1e-9, abs=1e-9)


def test_a_curve_is_the_mean_over_seeds():
    runs = {
        critics.Job(SHOWN, seed, 64): {"looks": [{"trajectories": 64, **dict.fromkeys(critics.MEASURES, value)}]}
        for seed, value in enumerate((1.0, 2.0, 3.0))
    }
    (row,) = curves(runs)
    assert (row["seeds"], row["regret"], row["regret_se"]) == (3, 2.0, pytest.approx(1 / math.sqrt(3)))


# ------------------------------------------------------------------------------------------------ pictures


def test_a_grid_is_copied_with_what_the_epoch_was(tmp_path):
    out = tmp_path / "run"
    (out / "pictures").mkdir(parents=True)
    for epoch in (0, 4):
        (out / "pictures" / f"epoch-{epoch:06d}.png").write_bytes(bytes([epoch]))
    (out / "metrics.jsonl").write_text(
        "".join(f'{{"epoch": {e}, "reward": {e / 2}, "kl": 1.0}}\n' for e in range(1, 5))
    )
    first, last = pictures.grids("sd15", out, tmp_path / "pictures")
    assert (first["epoch"], first["reward"]) == (0, None)  # drawn before anything was learned
    assert (last["epoch"], last["reward"], last["path_kl"]) == (4, 2.0, 1.0)
    assert (tmp_path / last["file"]).read_bytes() == bytes([4])


# ------------------------------------------------------------------------------------------------ frontier


def test_no_point_is_above_the_frontier_and_no_regret_is_on_it():
    """Without regret a run lies on the tangent of slope beta at the optimum, whatever its KL; with it, below."""
    beta = 0.5
    optimum = entry_of(frontier.at(beta)).exact
    J, reward = float(optimum.J_optimal().mean), float(optimum.reward_optimal().mean)
    common = {
        "problem": frontier.at(beta),
        "method": "ppo",
        "steps": 20,
        "lr": None,
        "failed": None,
        "trajectories": 64,
    }
    (best,) = frontier.learned([{**common, "regret": 0.0, "path_kl": (reward - J) / beta}])
    assert best["reward"] == pytest.approx(reward) and best["short"] == 0
    (worse,) = frontier.learned([{**common, "regret": 0.1, "path_kl": 0.3}])
    assert worse["reward"] == pytest.approx(J + beta * 0.3 - worse["short"]) and worse["short"] > 0
    failed = {**common, "failed": "not finite"}
    (both,) = frontier.learned([failed, {**common, "regret": 0.0, "path_kl": 1.0}])
    assert (both["seeds"], both["failed"]) == (2, 1)


def test_the_frontier_rises_at_slope_beta():
    """dE r/dKL = beta along it (the envelope theorem): by the mean value theorem a chord's slope lies between those of
    its ends."""
    rows = list(frontier.exact())
    beta, kl, reward = (np.array([row[name] for row in rows]) for name in ("beta", "path_kl", "reward"))
    assert (np.diff(kl) > 0).all() and (np.diff(reward) > 0).all()
    slopes = np.diff(reward) / np.diff(kl)
    assert ((beta[1:] < slopes) & (slopes < beta[:-1])).all()


# ---------------------------------------------------------------------------------------------- value bias


@pytest.mark.parametrize("eta", [0.25, 1.0, 1.5])
def test_the_memory_is_the_integral(eta):
    """rho = exp(-eta²/2 int g²/(alpha² C + sigma²) ds)."""
    entry = entry_of(value_bias.at(eta))
    exact, C = entry.exact, float(entry.exact.C)

    def decay(s):
        at = torch.tensor(s)
        variance = exact.noising.alpha(at) ** 2 * C + exact.noising.sigma(at) ** 2
        return float(exact.noising.g2(at) / variance)

    total, error = quad(decay, exact.s_min, exact.s_max, epsabs=1e-10, points=[0.01, 0.1])
    assert value_bias.rho(entry) == pytest.approx(math.exp(-(eta**2) / 2 * total), rel=1e-8 + error)


def test_without_memory_there_is_no_bias_and_with_it_no_change():
    """The bias grows with rho, and is of order rho² where that is small."""
    rho, bias = (np.array([row[name] for row in value_bias.exact()]) for name in ("rho", "kl_to_target"))
    assert rho[0] > 0.98 and (np.diff(rho) < 0).all() and (np.diff(bias[rho > 1e-3]) < 0).all()
    small = (rho > 1e-4) & (rho < 3e-2)  # rounding is below, higher orders above
    slopes = np.diff(np.log(bias[small])) / np.diff(np.log(rho[small]))
    assert len(slopes) >= 3 and np.abs(slopes - 2).max() < 0.1


def test_away_is_the_kl_of_two_gaussians():
    mean, variance, target = 0.3, 0.5, GaussianLaw(torch.tensor([1.0]), torch.tensor([[2.0]]))
    p, q = torch.distributions.Normal(mean, variance**0.5), torch.distributions.Normal(1.0, 2.0**0.5)
    assert value_bias.away(mean, variance, target) == pytest.approx(float(torch.distributions.kl_divergence(p, q)))
