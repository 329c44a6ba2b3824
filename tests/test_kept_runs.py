"""benchmarks/report.py: results say at which commit they were made, a kept run is reused for the same options and the
same code alone, and a search goes on until its best lies inside."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import algorithms, cifar10, critics, pictures, report, sd_tiny, throughput
from benchmarks.speed import race
from ctrl.algorithms import (
    AWM,
    DDPO,
    ActorCritic,
    AdjointMatching,
    DiffusionNFT,
    ForwardMatching,
    KLBudget,
    NextValue,
    TDForm,
)
from scale import tuning
from scale.settings import Settings

ROOT = Path(__file__).parents[1]

# ------------------------------------------------------------------------------------------ the commit


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_commit_is_that_of_the_code_and_dirty_where_the_code_differs(tmp_path):
    assert report.commit_of(tmp_path) is None  # no checkout
    git(tmp_path, "init", "-q")
    for file in ("ctrl/fit.py", "benchmarks/speed/race.py", "benchmarks/results/race.json", "README.md"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "All")
    commit = git(tmp_path, "rev-parse", "HEAD")
    for file in ("benchmarks/results/race.json", "README.md"):  # what a benchmark writes is not what it is made by
        (tmp_path / file).write_text("b")
    assert report.commit_of(tmp_path) == commit
    for file in ("benchmarks/speed/race.py", "scale/new.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("b")
        assert report.commit_of(tmp_path) == f"{commit}-dirty"
        git(tmp_path, "add", file)
        git(tmp_path, "commit", "-qm", "One")
        commit = git(tmp_path, "rev-parse", "HEAD")


def test_a_results_file_has_the_commit(tmp_path):
    head = json.loads(report.write("any", report.Options(out=tmp_path), [{"a": 1}], 0.0).read_text())
    assert head["commit"] == report.commit_of(ROOT)
    assert head["commit"] is None or head["commit"].startswith(git(ROOT, "rev-parse", "HEAD"))


@pytest.mark.parametrize("name", ["sd_tiny", "cifar10", "pictures", "throughput"])
def test_results_name_the_device_that_scale_trains_on(name, tmp_path, monkeypatch):
    """And runs of another device are others."""
    module = import_module(f"benchmarks.{name}")
    before = TINY.key
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report.torch.cuda, "get_device_name", lambda device: f"an accelerator, {device}")
    assert module.device() == "cuda" and TINY.key != before
    file = report.write(name, report.Options(out=tmp_path), [{"a": 1}], 0.0, module.device())
    assert json.loads(file.read_text())["device"] == "an accelerator, cuda"


def test_rows_of_runs_of_another_commit_say_which(monkeypatch):
    monkeypatch.setattr(report, "COMMIT", "here")
    rows = [{"a": 1}, {"a": 2}]
    assert report.with_commits(rows, [{"commit": "here"}, {"commit": "here"}]) == rows
    mixed = report.with_commits(rows, [{"commit": "here"}, {"commit": "there"}, {"commit": "there"}])
    assert mixed == [{"a": a, "commit": "here, there"} for a in (1, 2)]
    assert report.with_commits(rows, [{"commit": None}])[0]["commit"] == "None"


def test_panels_that_were_not_measured_anew_keep_their_commit(tmp_path, monkeypatch):
    """And those of --quick do not stay beside others."""
    file = tmp_path / "throughput.json"

    def measured(panel, commit, quick=False):
        monkeypatch.setattr(report, "COMMIT", commit)
        monkeypatch.setattr(throughput, "COMMIT", commit, raising=False)
        monkeypatch.setattr(throughput, "PANELS", {panel: lambda *_: [{"panel": panel, "case": "any"}]})
        throughput.main(throughput.ThroughputOptions(out=tmp_path, panel=(panel,), quick=quick))
        return {row["panel"]: row.get("commit") for row in json.loads(file.read_text())["rows"]}

    assert measured("limit", "first") == {"limit": None}
    assert measured("solvers", "second") == {"limit": "first", "solvers": None}
    assert measured("scaling", "third") == {"limit": "first", "solvers": "second", "scaling": None}
    assert measured("solvers", "third") == {"limit": "first", "scaling": None, "solvers": None}
    assert measured("limit", "third", quick=True) == {"limit": None}
    assert measured("solvers", "third") == {"solvers": None}


def test_rows_of_a_file_without_a_commit_are_of_an_unknown_one(tmp_path):
    (tmp_path / "throughput.json").write_text(json.dumps({"command": "", "rows": [{"panel": "limit"}]}))
    (row,) = report.earlier(throughput.NAME, throughput.ThroughputOptions(out=tmp_path))
    assert row == {"panel": "limit", "commit": "unknown"}


# ------------------------------------------------------------------------------------------ kept runs

TOY = algorithms.Job("gaussian-1d", "actor-critic", 5, 0, 64)
TINY = sd_tiny.Job("following-soft", "ddpo", 0, 64, quick=False)
FORM = cifar10.Job("ddpo", 0, 64, 64, Path("data"))
DESIGN = critics.Job(critics.SHOWN, 0, 64)
SIDE = race.Job("adjoint matching", 20, 0, 1e-4, 1, 256, "")
CHANGES = {
    "a method's settings": (TOY, algorithms.METHODS, "actor-critic", algorithms.Method(ActorCritic, {"samples": 32})),
    "an algorithm's number": (TOY, algorithms.METHODS, "actor-critic", algorithms.Method(lambda: ActorCritic(keep=2))),
    "a method's critic": (TOY, algorithms.METHODS, "actor-critic", algorithms.METHODS["actor-critic-structured"]),
    "Stable Diffusion's method": (TINY, sd_tiny.METHODS, "ddpo", sd_tiny.METHODS["ddpo"] | {"in_a_row": 2}),
    "its reward": (TINY, sd_tiny.REWARDS, "following-soft", sd_tiny.REWARDS["following-soft"] | {"kl": 1.0}),
    "its learning rate": (TINY, sd_tiny.RATE, ("following-soft", "ddpo"), 1e-6),
    "CIFAR-10's method": (FORM, cifar10.METHODS, "ddpo", cifar10.METHODS["ddpo"] | {"ema": 0.5}),
    "a critic's skip": (replace(DESIGN, design="constant, both"), critics.SKIPS, "constant", critics.COSINE),
    "our side of the race": (SIDE, race.ADJOINT, "beta", 0.2),
}


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, which knows what is changed in it."""
    for module in (report, algorithms):
        monkeypatch.setattr(module, "carried_out", lambda work, cases, *_: [work(*case) for case in cases])


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_made_anew_for_another_option_and_reused_for_the_same(what, tmp_path, monkeypatch, here):
    job, table, name, value = CHANGES[what]
    made = []

    def work(job, store):
        made.append(job)
        report.leave({"n": len(made)}, store, job.key)

    def run(done=False):
        return report.kept(work, [job], tmp_path, 1, done=done)[job]["n"]

    assert [run(), run()] == [1, 1]
    with monkeypatch.context() as other:
        other.setitem(table, name, value)
        with pytest.raises(ValueError, match="done: no runs with these options and this code"):
            run(done=True)
        assert [run(), run(), run(done=True)] == [2, 2, 2]
    assert run() == 1


@pytest.mark.parametrize("what", ["code", "versions"])
@pytest.mark.parametrize("job", [TOY, TINY, FORM, replace(FORM, method=None), DESIGN, SIDE], ids=str)
def test_a_run_is_of_its_code_and_of_its_packages(job, what, monkeypatch):
    before = job.key
    monkeypatch.setattr(report, what, lambda: "another")
    assert job.key != before


def test_a_users_options_make_another_run():
    assert FORM.key != replace(FORM, data=Path("another")).key
    assert TINY.key != replace(TINY, quick=True).key != replace(TINY, half=True).key
    assert SIDE.key != replace(SIDE, beside=2).key  # beside another run it is slower
    assert TOY.key != replace(TOY, lr=1e-4).key


@pytest.mark.long
def test_a_real_run_is_kept_with_its_policy(tmp_path, monkeypatch, here):
    """The toy's, from its file where nothing has changed."""
    monkeypatch.setattr(algorithms, "FINAL", 16)
    first = algorithms.carry_out([TOY], tmp_path, 1)
    assert algorithms.carry_out([TOY], tmp_path, 1) == first and first[0]["commit"] == report.COMMIT
    assert len(list(tmp_path.glob("*.json"))) == 1
    monkeypatch.setitem(algorithms.METHODS, TOY.method, algorithms.Method(ActorCritic, {"samples": 32}))
    (other,) = algorithms.carry_out([TOY], tmp_path, 1)
    assert other["curve"] != first[0]["curve"]
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.pt"))) == 2
    assert algorithms.carry_out([TOY], tmp_path, 1, done=True) == [other]


@pytest.mark.long
def test_a_worker_finds_and_leaves_runs_under_the_same_keys(tmp_path):
    """It is another process, in which the benchmark is not the main module."""
    words = [sys.executable, "benchmarks/critics.py", "--quick", "--out", str(tmp_path), "--design", critics.SHOWN]
    heads = []
    for _ in range(2):
        subprocess.run(words, cwd=ROOT, check=True)
        heads.append(json.loads((tmp_path / "critics.json").read_text()))
    (kept,) = (tmp_path / "critics.runs").glob("*.json")
    assert json.loads(kept.read_text())["commit"] == heads[0]["commit"] == report.commit_of(ROOT)
    assert heads[0]["rows"] == heads[1]["rows"] and heads[1]["seconds"] < heads[0]["seconds"]


def test_pictures_are_of_their_settings(tmp_path, monkeypatch):
    """Of the embedded model's file, which is what is trained."""
    made = []

    def train(s):
        s.out.mkdir(parents=True)
        made.append((s.beta, s.resume))
        (s.out / "evaluation.json").write_text("{}")

    file = tmp_path / "tiny-sd.yaml"

    class Mine(Settings):
        embedded = file

    monkeypatch.setattr(pictures, "RUNS", {"sd15": (Mine, train)})
    for beta in (0.1, 0.1, 0.2):
        file.write_text(f"model: any\nbeta: {beta}\n")
        pictures.carry_out("sd15", tmp_path, quick=False)
    assert made == [(0.1, False), (0.2, False)]


def test_the_methods_that_are_compared_are_those_of_the_committed_results():
    """Whatever defaults an algorithm has: its own options say all that differs between them."""
    found = {
        name: tuning.algorithm_of(replace(TINY, method=name, images=1600, lr=1e-4).settings(Path()), True)
        for name in sd_tiny.METHODS
    }
    assert found == {
        "actor-critic": ActorCritic(critic_updates=40, actor_updates=6, nodes=128, keep=3, trace=3.0, nats=1.0),
        "adjoint-matching": AdjointMatching(updates=6, nodes=128, lean=True),
        "forward-matching": KLBudget(
            ForwardMatching(
                updates=8,
                nodes=128,
                keep=12,
                target="anchored",
                weight="x0hat",
                damping=3.0,
                hold=0.0,
                critic_updates=0,
            ),
            nats=1.5,
        ),
        "awm": KLBudget(AWM(updates=8, nodes=128, clip=2.5e-3, weight="x0hat"), nats=3.0),
        "diffusion-nft": KLBudget(DiffusionNFT(updates=8, nodes=128, step=1.0, most=5.0), nats=3.0),
        "flow-grpo": KLBudget(DDPO(passes=2, nodes=64, clip=0.2, chain_kl=True, group=4), nats=3.0),
        "ddpo": DDPO(passes=2, nodes=64, clip=0.2, group=4),
    }
    found = {name: tuning.algorithm_of(replace(FORM, method=name).settings(Path()), True) for name in cifar10.METHODS}
    critic = ActorCritic(critic_updates=8, actor_updates=0, nodes=64, keep=1, trace=3.0)
    assert found == {
        "actor-critic": ActorCritic(critic_updates=8, actor_updates=6, nodes=64, keep=1, trace=3.0, nats=math.inf),
        "td-form": TDForm(updates=6, nodes=64, evaluation=critic),
        "next-value": NextValue(updates=6, nodes=64, evaluation=critic),
        "ddpo": DDPO(passes=1, nodes=64, clip=0.2),
    }


# ------------------------------------------------------------------------------------------ a search


@dataclass(frozen=True)
class Tried:
    """A run of a search."""

    method: str
    seed: int
    lr: float

    @property
    def key(self):
        return f"{self.method}-{self.seed}-{self.lr:g}"


def searched(best, rates=(2e-5, 6e-5, 1.8e-4), factor=3.0, width=1.0):
    """Method -> learning rates tried, where a run's gain falls off on both sides of the best."""

    def carry_out(jobs):
        assert len(set(jobs)) == len(jobs)
        return {job: -(math.log(job.lr / best[job.method]) ** 2) + job.seed for job in jobs}

    jobs = [Tried(method, seed, lr) for method in best for seed in (0, 1) for lr in rates]
    runs = report.search(jobs, carry_out, lambda job, gain: gain, factor, case=lambda job: job.method)
    return {method: sorted({job.lr for job in runs if job.method == method}) for method in best}


def test_a_search_goes_on_until_its_best_lies_inside():
    """To the right, to the left, or not at all; a point is the nearest to the best in the logarithm."""
    grids = searched({"inside": 6e-5, "above": 1.6e-3, "below": 6e-6, "at the edge": 1.8e-4})
    assert grids["inside"] == [2e-5, 6e-5, 1.8e-4]
    assert grids["at the edge"] == [2e-5, 6e-5, 1.8e-4, 5.4e-4]
    assert grids["above"] == [2e-5, 6e-5, 1.8e-4, 5.4e-4, 1.62e-3, 4.86e-3]
    assert grids["below"] == [2.22e-6, 6.67e-6, 2e-5, 6e-5, 1.8e-4]


def test_a_search_of_one_point_looks_on_both_sides():
    assert searched({"any": 1e-4}, rates=(1e-4,)) == {"any": [pytest.approx(3.33e-5), 1e-4, 3e-4]}


def test_a_search_without_an_end_is_an_error():
    with pytest.raises(ValueError, match=r"lr: of 9 from 2e-05 to 0\.131 the best is 0\.131, at the edge"):
        searched({"any": 1e9})


def test_a_rate_at_which_a_run_leaves_the_numbers_is_not_the_best():
    found = {2e-5: 0.1, 6e-5: 0.2, 1.8e-4: -math.inf}
    assert report.beyond(found, 3.0) is None
    assert report.beyond(dict.fromkeys(found, -math.inf), 3.0) == 6.67e-6


@pytest.mark.parametrize("kind", [sd_tiny.SDTinyOptions, cifar10.CIFAROptions, algorithms.AlgorithmOptions])
def test_a_search_is_not_only_what_is_there(kind):
    given = {"data": Path()} if kind is cifar10.CIFAROptions else {}
    with pytest.raises(ValueError, match="done cannot be combined with tune"):
        kind(tune=True, done=True, **given)


def test_what_the_search_of_stable_diffusion_says_is_what_was_found(tmp_path, monkeypatch, here):
    """At each rate the run's own gain; it goes on to 5.4e-4, where a run diverges."""

    def run(job, store):
        s = job.settings(Path())
        assert s.eval_prompts == s.prompts
        gain = None if s.lr > 5e-4 else s.lr
        about = {"gain": gain, "gain_se": 0.1, "path_kl": 1.0} if gain else {}
        curve = [[16, 0.5, 1.0]] if gain else []
        failed = None if gain else "not finite"
        report.leave({"failed": failed, "evaluation": about, "curve": curve}, store, job.key)

    monkeypatch.setattr(sd_tiny, "run", run)
    o = sd_tiny.SDTinyOptions(out=tmp_path, tune=True, reward=("following-soft",), method=("ddpo",))
    sd_tiny.main(o)
    found = json.loads((tmp_path / "sd_tiny_tuning.json").read_text())
    assert found["commit"] == report.COMMIT
    assert [(r["lr"], r["gain"], r["failed"]) for r in found["rows"]] == [
        (2e-5, 2e-5, None), (6e-5, 6e-5, None), (1.8e-4, 1.8e-4, None), (5.4e-4, None, "not finite"),
    ]  # fmt: skip


def best(name, worth, **case):
    """The row of a committed search that is worth most, among those of a case."""
    found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    group = [row for row in found if case.items() <= row.items() and row.get("failed") is None]
    return max(group, key=worth), group


@pytest.mark.parametrize(("reward", "method"), sd_tiny.RATE)
def test_the_rates_of_stable_diffusion_are_what_the_search_found(reward, method):
    """Whatever its grid; in the three digits that README has of a gain, which are finer than its standard error."""

    def worth(row):
        return row["gain"] if row["path_kl"] <= sd_tiny.MOST_KL.get(method, math.inf) else -math.inf

    first, group = best("sd_tiny_tuning", worth, reward=reward, algorithm=method)
    (taken,) = (row for row in group if row["lr"] == sd_tiny.RATE[reward, method])
    assert round(taken["gain"], 3) == round(first["gain"], 3)


def test_a_method_without_a_learning_rate_is_sent_to_the_search(monkeypatch):
    monkeypatch.delitem(sd_tiny.RATE, ("following-soft", "adjoint-matching"))
    with pytest.raises(ValueError, match="method: adjoint-matching has no learning rate yet: --tune finds it"):
        sd_tiny.SDTinyOptions(method=("ddpo", "adjoint-matching"))
    assert sd_tiny.SDTinyOptions(method=("adjoint-matching",), tune=True).tune


@pytest.mark.parametrize("method", cifar10.RATE)
def test_the_rates_of_cifar10_are_what_the_search_found(method):
    first, _ = best("cifar10_tuning", lambda row: -row["frechet_ode"], algorithm=method)
    assert first["lr"] == cifar10.RATE[method]
