"""benchmarks/algorithms.py: a run is scored, kept and not repeated; a user's algorithm is one more method."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch

import benchmarks.algorithms
from benchmarks.algorithms import (
    METHODS,
    STEPS,
    AlgorithmOptions,
    Job,
    carry_out,
    draw,
    first_below,
    gain,
    jobs_of,
    learning_curves,
    run,
    spread,
    summarise,
    train,
    trained,
)
from ctrl import EulerMaruyama, Heun, grids
from toy import catalogue

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.fixture(autouse=True)
def quick_score(monkeypatch):
    monkeypatch.setattr(benchmarks.algorithms, "FINAL", 256)


def short(method="actor-critic", **changes):
    return Job(**{"problem": "gaussian-1d", "method": method, "steps": 5, "seed": 0, "trajectories": 512, **changes})


def test_a_run_is_scored():
    row, _ = train(short())
    assert row["failed"] is None and 0 < row["regret"] < 1 and row["regret_stderr"] < row["regret"]
    assert row["reward_calls"] == 512 and row["seconds"] > 0
    curve = json.loads(row["curve"])
    assert [n for n, _ in curve] == [64, 128, 192, 256, 320, 384, 448, 512] and curve[-1][1] == pytest.approx(
        row["regret"], rel=0.3
    )
    assert row["critic_gradient_error"] is not None
    assert train(short("ddpo-euler"))[0]["critic_gradient_error"] is None


def test_a_run_leaves_its_policy(tmp_path):
    run(job := short(trajectories=64), tmp_path)
    policy = trained(job, tmp_path)
    reference = catalogue.get("gaussian-1d").problem.reference
    t, x = torch.full((3,), 0.5), torch.linspace(-1, 1, 3)[:, None]
    assert not torch.equal(policy(t, x), reference(t, x, None))
    assert json.loads((tmp_path / f"{job.key}.json").read_text())["trajectories"] == 64


@pytest.mark.long
def test_a_users_algorithm_is_one_more_method(tmp_path, monkeypatch):
    """The README's own example, from a module of its own."""
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Plain" in block)
    (tmp_path / "mymodule.py").write_text(example.partition("\n\nassert")[0])
    monkeypatch.syspath_prepend(tmp_path)
    row, _ = train(short("mymodule:Plain", trajectories=1024))
    assert row["failed"] is None and row["regret"] < 1
    (job,) = jobs_of(AlgorithmOptions(problem=("gaussian-1d",), method=(), seeds=1, algorithm="mymodule:Plain"))
    assert job.method == "mymodule:Plain" and ":" not in job.key


def test_what_was_done_is_not_repeated(tmp_path):
    """A job whose file is there is read, however wrong; the table and the figure are made of the files."""
    rows = []
    for seed, regret in enumerate([0.01, 0.03]):
        job = short(seed=seed)
        row = {**vars(job), "failed": None, "regret": regret, "to_10pct": 256 if seed else None, "to_5pct": None,
               "seconds_to_10pct": 1.0, "path_kl": 1.0, "control_error": 0.1, "critic_gradient_error": None,
               "network_calls": 1, "reward_calls": 1, "seconds": 1.0, "curve": "[[256, 0.2], [512, 0.05]]"}  # fmt: skip
        (tmp_path / f"{job.key}.json").write_text(json.dumps(row))
        (tmp_path / f"{job.key}.pt").touch()
        rows.append(row)
    assert carry_out([short(seed=0), short(seed=1)], tmp_path, 1) == rows
    assert carry_out([short(seed=seed) for seed in range(9)], tmp_path, 1, done=True) == rows
    (summary,) = summarise(rows)
    assert summary["regret"] == pytest.approx(0.02) and summary["regret_worst"] == 0.03
    assert summary["regret_se"] == pytest.approx(0.01)  # sd .02/sqrt 2 over sqrt 2
    assert summary["to_10pct"] is None, "one of two seeds never gets there: the median is infinite"
    assert summary["critic_gradient_error"] is None and summary["diverged"] == 0
    (axes,) = draw([summary, *learning_curves(rows)]).axes
    assert list(axes.lines[0].get_ydata()) == [0.2, 0.05]


def test_learning_curves_are_means_over_the_seeds_that_have_not_failed():
    runs = [
        {**vars(short(seed=seed)), "failed": None, "curve": f"[[64, {first}], [128, 0.1]]"}
        for seed, first in enumerate((0.2, 0.4))
    ]
    first, second = learning_curves([*runs, {**vars(short(seed=2)), "failed": "not finite"}])
    assert (first["trajectories"], first["seeds"], second["trajectories"]) == (64, 2, 128)
    assert first["regret"] == pytest.approx(0.3)
    assert first["regret_se"] == pytest.approx(0.1)  # sd .2/sqrt 2 over sqrt 2
    assert second["regret"] == pytest.approx(0.1) and second["regret_se"] == pytest.approx(0.0)


def test_a_run_that_leaves_the_numbers_has_failed_and_one_that_cannot_begin_is_an_error():
    with pytest.raises(ValueError, match="IntegratedEuler"):
        train(short("ddpo-euler", problem="lq-1d"))
    row, _ = train(short(lr=1e30))
    assert "not finite" in row["failed"]


def test_a_failed_run_counts():
    failed = {**vars(short()), "failed": "not finite"}
    (summary,) = summarise([failed])
    assert summary["diverged"] == 1 and summary["regret"] is None


def test_seeds_beside_a_failed_one_do_not_bound_it():
    """They have a mean, beside the number that diverged, and neither a worst of all nor an upper bound."""
    names = ("to_10pct", "to_5pct", "seconds_to_10pct", "path_kl", "control_error", "critic_gradient_error",
             "network_calls", "reward_calls", "seconds")  # fmt: skip
    fine = [{**vars(short(seed=seed)), "failed": None, "regret": 0.1, **dict.fromkeys(names)} for seed in (0, 1)]
    (whole,) = summarise(fine)
    (part,) = summarise([*fine, {**vars(short(seed=2)), "failed": "not finite"}])
    assert whole["regret_worst"] == whole["regret_upper"] == part["regret"] == 0.1
    assert (part["diverged"], part["regret_worst"], part["regret_upper"]) == (1, None, None)


def test_first_below():
    curve = [(256, 0.3, 1.0), (512, 0.09, 2.0), (768, 0.2, 3.0)]
    assert first_below(curve, 0.1, 0) == 512 and first_below(curve, 0.1, 2) == 2.0
    assert first_below(curve, 0.01, 0) is None


def test_every_method_is_made():
    for method in METHODS.values():
        assert method.algorithm().keep >= 1


def test_what_is_committed_has_every_method_and_the_default_one_everywhere():
    jobs = jobs_of(AlgorithmOptions(full=True, seeds=2))
    assert len(set(jobs)) == len(jobs)
    assert {job.method for job in jobs if job.problem == "mixture-2d"} == set(METHODS)
    default = {(job.problem, job.seed) for job in jobs if (job.method, job.steps) == ("actor-critic", 20)}
    assert default == set(product(catalogue.NAMES, range(2)))
    sweep = {(job.problem, job.steps, job.seed) for job in jobs_of(AlgorithmOptions(sweep=True))}
    assert sweep == set(product(catalogue.NAMES, STEPS, range(10)))


def test_the_objective_of_a_fine_grid_is_the_exact_one():
    """E[r - cost] of the optimum is J*; on few steps it is off by the order of the method, in its own units."""
    entry = catalogue.get("gaussian-1d")

    def bias(solver, grid, steps):
        return abs(float(gain(entry, entry.optimal_policy, solver, grid(entry.problem, steps)).mean))

    assert bias(Heun(), grids.natural, 200) < 0.01
    assert bias(EulerMaruyama(), grids.uniform, 20) > 4 * bias(EulerMaruyama(), grids.uniform, 160)
    assert bias(EulerMaruyama(), grids.uniform, 20) > 5 * bias(Heun(), grids.natural, 20)


def test_how_far_regrets_lie_apart():
    rows = [
        {"problem": "gaussian-1d", "algorithm": "ddpo-euler", "steps": n, "regret": regret, "lr": None}
        for n, regret in ((10, 0.3), (20, 0.1), (40, 0.2))
    ]
    (row,) = spread(rows)
    assert row["regret_apart"] == pytest.approx(0.2) and (row["from"], row["to"]) == (10, 40)
    assert 0.1 < row["objective_bias_apart"] < 1
    assert spread(rows[:1]) == []
