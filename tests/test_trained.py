"""benchmarks/trained.py: what it measures policies with is exact where it can be."""

import math

import numpy as np
import pytest
import torch

from benchmarks import discretization_error
from benchmarks.moments import ESTIMATORS, Case
from benchmarks.trained import (
    OBJECTIVES,
    TRAINED,
    Around,
    Plan,
    black_box,
    by_ode,
    climb,
    drift,
    expected_range,
    flow,
    invariance,
    over_seeds,
    sampled_at,
    without_noise,
)
from ctrl import Heun, Noise, grids, rollout, z_bound
from ctrl.bridge import AdaptiveEuler
from toy import catalogue
from toy.chain import chain_moments
from toy.gaussian import GaussianDiffusion


def test_the_policy_around_the_optimum_is_one_for_chains_and_for_exact_answers():
    case = Case.of("gaussian-1d")
    policy = Around(case.lq.optimal_policy(), case.lq.horizon)
    policy.theta.data.normal_(generator=torch.Generator().manual_seed(0))
    t, x = torch.linspace(0, case.lq.horizon, 7), torch.linspace(-2, 2, 7)[:, None]
    linear = policy.linear()
    expected = linear.K(t.numpy()) @ x.numpy()[..., None] + linear.k(t.numpy())[..., None]
    np.testing.assert_allclose(policy(t, x).detach().numpy(), expected[..., 0], rtol=1e-12)


@pytest.mark.long
def test_an_objective_of_second_order_moves_the_optimum_less():
    """Regret is quadratic in how far the optimum moves, so of order 2 and 4: half the step divides it by 4 and by 16,
    about so on coarse grids; and Heun's is the least."""
    found = {
        name: [row["regret"] for n in (10, 20) for row in drift("gaussian-1d", name, n)]
        for name in ("ddpo-euler", "Heun")
    }
    assert all(0 < regret < 1 for pair in found.values() for regret in pair)
    euler, heun = (pair[0] / pair[1] for pair in found.values())
    assert 3 < euler < 5
    assert heun > 12
    assert found["Heun"][1] < found["ddpo-euler"][1] / 100


def test_a_climb_ends_at_the_maximum_or_says_that_there_is_none():
    """-(x - 1)⁴ - (x - 1)² + 3 y - e^y: at x = 1, y = log 3; without the last term there is no end."""
    theta = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    climb(lambda: -((theta[0] - 1) ** 4) - (theta[0] - 1) ** 2 + 3 * theta[1] - theta[1].exp(), theta)
    torch.testing.assert_close(theta.data, torch.tensor([1.0, math.log(3)], dtype=torch.float64), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="no maximum"):
        climb(lambda: theta.square().sum(), theta)


def test_every_objective_is_one_of_a_known_estimator():
    assert set(OBJECTIVES) <= set(ESTIMATORS)


def test_torchsde_adapts_within_a_step():
    """Five steps of Euler are far from the law that the reference has at the end; five adaptive ones are not."""
    exact = catalogue.get("gaussian-1d").exact
    assert isinstance(exact, GaussianDiffusion)
    problem, ids, times = exact.problem, torch.arange(4096), grids.natural(exact.problem, 5)
    path = rollout(problem, problem.reference, times, Noise(0), ids, solver=AdaptiveEuler(1e-3))
    phi, shift, variance = (v[0] for v in exact.transition(torch.tensor([problem.s_max], dtype=torch.float64)))
    spread = float(variance + phi.square())  # Y_0 ~ N(0, 1)
    end = path.x[-1, :, 0]
    z = (end.mean() - shift) / (spread / len(ids)) ** 0.5, (end.var() / spread - 1) / (2 / len(ids)) ** 0.5
    assert max(abs(float(v)) for v in z) < z_bound(2)
    again = rollout(problem, problem.reference, times, Noise(0), ids, solver=AdaptiveEuler(1e-3))
    assert torch.equal(path.x, again.x)


def test_the_ode_has_the_optimum_that_is_claimed():
    """J of the Riccati policy, from the exact moments of a fine Heun chain, is the J that Riccati says."""
    problem, lq = without_noise("gaussian-1d")
    assert problem.eta == 0
    policy, times = lq.optimal_policy(), grids.uniform(problem, 400)
    mean0, cov0 = torch.from_numpy(lq.mean0), torch.from_numpy(lq.cov0)
    chain = chain_moments(problem, policy, times, Heun(), mean0, cov0)
    root = chain.covariance[:, 0].sqrt()
    x = torch.stack([chain.mean + root, chain.mean - root], 1)  # (N+1, 2, 1): they average any quadratic exactly
    w = grids.node_weights(grids.trapezoid(problem, times))

    def rate(t, x):
        t = t.expand(len(x))
        return problem.running_cost(t, x, policy(t, x), problem.reference(t, x, None)).mean()

    J = problem.reward(x[-1], None).mean() - sum(
        weight * rate(t, at) for weight, t, at in zip(w, times, x, strict=True)
    )
    assert float(J) == pytest.approx(lq.J_optimal(), abs=1e-4)
    assert lq.J(lq.reference) < lq.J_optimal()


def test_the_optimum_has_no_regret_where_steps_are_fine():
    entry = catalogue.get("mixture-2d")
    regret, se = sampled_at("mixture-2d", "actor-critic", entry.optimal_policy, [80])["N = 80"]
    assert abs(regret) < z_bound(1) * se + 0.005


def test_at_the_optimum_the_ode_keeps_the_law():
    """At eta = 1 the optimal action is the score of the optimal law, so the ODE has the same ends; the start, which is
    not the law that has that score, is off by little in a mixture with p_{s_max} close to it."""
    entry = catalogue.get("mixture-2d")
    regret, se = by_ode(entry, entry.optimal_policy)
    assert abs(regret) < z_bound(1) * se + 0.02


@pytest.mark.long
def test_without_a_density_ddpo_refuses_and_the_actor_critic_learns(tmp_path):
    plan = Plan(["gaussian-1d"], (10, 20), 1, 1280, tmp_path, "cpu")
    for panel in (flow(plan, "gaussian-1d"), black_box(plan)):
        for refused, learned in zip(panel, panel, strict=True):
            assert "no transition density" in refused["why"]
            assert learned["regret"] < 0.1 and learned["solver"] == refused["solver"]


def test_how_far_apart(tmp_path):
    plan = Plan(["gaussian-1d"], (10, 20), 2, 64, tmp_path, "cpu")
    runs = {}
    for method in TRAINED:
        for n, regrets in ((10, (0.3, 0.5)), (20, (0.1, 0.1))):
            for job, regret in zip(plan.jobs("gaussian-1d", method, n), regrets, strict=True):
                runs[job] = {"regret": regret, "regret_stderr": 0.0, "curve": f"[[64, 1.0], [128, {regret}]]"}
    row, _ = invariance(plan, runs)
    assert (row["best_steps"], row["worst_steps"]) == (20, 10)
    assert row["apart"] == pytest.approx(0.3) and row["curves_apart"] == pytest.approx(0.15)
    assert row["by_chance"] == pytest.approx(2 / math.sqrt(math.pi) * 0.1 / math.sqrt(2))


def test_errors_over_seeds():
    assert over_seeds([(1.0, 0.5)]) == (1.0, 0.5)
    assert over_seeds([(1.0, 1.0), (3.0, 1.0)]) == (2.0, pytest.approx(math.sqrt(2)))
    normals = torch.randn(40_000, 5, generator=torch.Generator().manual_seed(0)).double()
    found = normals.amax(1) - normals.amin(1)
    assert abs(float(found.mean()) - expected_range(5)) < 5 * float(found.std()) / 200


def test_a_figure_of_every_panel():
    """Of a row or two each, the optimum's without calls among them."""
    about = {"problem": "gaussian-1d", "kl": True}
    rows = [{"panel": "transfer", **about, "estimator": e, "nfe": n, "at": "limit", "regret": 0.1, "regret_se": 0.01}
            for e, n in (("actor-critic", 20), ("ddpo-euler", 10), ("optimum by Heun", None))]  # fmt: skip
    rows.append({"panel": "best", **about, "nfe": 10, "ddpo": 0.1})
    for n in (10, 20):
        rows += [{"panel": "bias", **about, "estimator": "Heun", "grid": "uniform", "nfe": n, "relative_error": 1 / n},
                 {"panel": "drift", **about, "estimator": "ddpo-euler", "nfe": n, "regret": 1 / n}]  # fmt: skip
    assert [ax.axison for ax in discretization_error.draw(rows).axes] == [True, False, True, True]  # none without KL
    some = [row for row in rows if row["panel"] != "drift"]
    assert [ax.axison for ax in discretization_error.draw(some).axes] == [True, False, True, False]


def test_the_exact_panels_need_calls_that_divide():
    assert list(discretization_error.bias(Case.of("gaussian-1d"), "Heun", "uniform", (5,))) == []
