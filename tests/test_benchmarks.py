"""The benchmarks run, write what they promise, and agree with what can be derived. No timing is asserted."""

import json
import math

import pytest
import torch

from benchmarks import discretization_error, report, rollout
from ctrl import EulerMaruyama, Exponential, chain_kl, grids
from toy.chain import chain_moments

HEAD = ["name", "command", "seed", "versions", "device", "seconds", "rows"]


def read(folder, name):
    """The results file, after a look at its schema."""
    result = json.loads((folder / f"{name}.json").read_text())
    assert list(result) == HEAD
    assert result["name"] == name
    assert result["command"].startswith(f"python benchmarks/{name}.py --quick")
    assert str(folder) not in json.dumps(result)
    assert {"python", "torch"} <= set(result["versions"])
    assert all(list(row) == list(result["rows"][0]) for row in result["rows"])
    assert all(v is None or isinstance(v, str | int | float) for row in result["rows"] for v in row.values())
    assert [p for p in folder.iterdir() if p.suffix == ".tmp"] == []
    return result["rows"]


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    discretization_error.main(report.Options(out=folder, quick=True))
    assert (folder / "discretization_error.png").stat().st_size > 10_000
    return read(folder, "discretization_error")


def pick(rows, **wanted):
    found = [row for row in rows if wanted.items() <= row.items()]
    assert found
    return found


def test_calls_are_equal_and_steps_are_not(errors):
    assert {row["nfe"] // row["steps"] for row in pick(errors, solver="Heun")} == {2}
    assert {row["nfe"] // row["steps"] for row in pick(errors, solver="2M")} == {1}


@pytest.mark.parametrize("grid", ["uniform", "log-SNR"])
@pytest.mark.parametrize(
    ("solver", "order"), [("Euler-Maruyama", 1), ("exponential (DDIM)", 1), ("Heun", 2), ("2M", 2)]
)
def test_orders(grid, solver, order):
    """Of KL, the solver's weak order with its own quadrature; the gap to the next order is 1."""
    case = discretization_error.Case.of("gaussian-1d")
    rows = discretization_error.series(case, solver, grid, [40, 80, 160])
    assert pick(rows, panel="kl", solver=solver)[-1]["order"] == pytest.approx(order, abs=0.15)


def test_no_order_is_fitted_to_a_bend():
    assert discretization_error.order([10, 20, 40], [1.0, 0.5, 0.25]) == pytest.approx(1)
    assert discretization_error.order([10, 20, 40], [1.0, 0.5, 0.2]) is None


def test_the_chains_own_kl_blows_up(errors):
    """At 10 calls it is off by more than the whole KL, where the continuous-time one is off by a tenth."""
    own = pick(errors, panel="kl", solver=discretization_error.CHAIN, grid="uniform", nfe=10)[0]["error"]
    continuous = pick(errors, panel="kl", solver="exponential (DDIM)", grid="uniform", nfe=10)[0]["error"]
    assert own > 1
    assert continuous < 0.15


def test_the_chains_own_kl_is_its_derivation():
    """sum_k ½ (e^{dlambda} - 1) E|d eps|², d eps = -sigma (0.6 - 0.3 (t/T) x), E over the chain's exact moments."""
    case, solver = discretization_error.Case.of("gaussian-1d"), Exponential()
    p, problem = case.exact, case.exact.problem
    times = grids.uniform(problem, 10)
    chain = chain_moments(problem, case.policy, times, solver, p.initial.mean, p.initial.covariance)
    path = discretization_error.trajectory(problem, solver, times, chain)
    s, gain = problem.s(times), -0.3 * times / problem.horizon
    second_moment = (gain * chain.mean[:, 0] + 0.6).square() + gain.square() * chain.covariance[:, 0, 0]
    eps = problem.noising.sigma(s).square() * second_moment
    derived = (torch.expm1(problem.noising.log_snr(s).diff()) * eps[:-1]).sum() / 2
    assert float(chain_kl(problem, solver, path, case.policy).mean()) == pytest.approx(float(derived), rel=1e-10)


def test_points_have_the_moments():
    root = torch.randn(3, 4, 4)
    mean, covariance = torch.randn(3, 4), root @ root.mT + torch.eye(4)
    x = discretization_error.points(mean, covariance)
    torch.testing.assert_close(x.mean(1), mean)
    torch.testing.assert_close(torch.stack([v.T.cov(correction=0) for v in x]), covariance)


def test_rollout(tmp_path):
    rollout.main(rollout.Options(out=tmp_path, quick=True, batch=8, steps=3))
    rows = read(tmp_path, "rollout")
    assert {row["panel"] for row in rows} == {"overhead", "torchsde", "normals"}
    for row in rows:
        assert 0 < row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert (row["bar"] is None) == (row["met"] is None) == (row["panel"] != "overhead" or row["dtype"] == "float64")


@pytest.mark.parametrize("solver", rollout.SOLVERS, ids=str)
def test_both_sides_of_a_pair_call_the_score_as_often(solver):
    """And so does torchsde, beyond its one look at the shapes: no sliver of a step is left over."""
    calls = 0
    setting = rollout.Setting.of(rollout.Options(batch=2), rollout.TORCHSDE_STEPS, torch.float32)
    score = setting.problem.reference

    def counted(t, x, cond=None):
        nonlocal calls
        calls += 1
        assert x.dtype == torch.float32
        return score(t, x, cond)

    object.__setattr__(setting.problem, "reference", counted)
    counts = []
    for run in (lambda: setting.rollout(solver), lambda: setting.bare(solver.calls), setting.torchsde):
        calls = 0
        run()
        counts.append(calls)
    assert counts == [solver.calls * 128, solver.calls * 128, 128 + 1]


def test_command_names_what_was_asked_for(tmp_path):
    options = rollout.Options(out=tmp_path, quick=True, batch=16)
    assert report.command("rollout", options) == "python benchmarks/rollout.py --quick --batch 16"
    assert report.command("rollout", rollout.Options()) == "python benchmarks/rollout.py"


def test_a_number_that_is_not_finite_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write("broken", report.Options(out=tmp_path), [{"error": math.nan}], 0.0)
    assert list(tmp_path.iterdir()) == []


def test_euler_is_measured_with_its_own_quadrature():
    case = discretization_error.Case.of("gaussian-1d")
    times = grids.uniform(case.exact.problem, 4)
    law = case.exact.initial
    chain = chain_moments(case.exact.problem, case.policy, times, EulerMaruyama(), law.mean, law.covariance)
    path = discretization_error.trajectory(case.exact.problem, EulerMaruyama(), times, chain)
    torch.testing.assert_close(path.w, grids.left(case.exact.problem, times))
