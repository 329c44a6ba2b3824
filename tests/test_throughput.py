"""Clocks are right about what they say: pairs, bare passes, profiles, memory, exponents; and both sides of a race do
the same work."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from benchmarks import throughput
from benchmarks.memory import mebibytes
from benchmarks.speed import gpu, peer, race, scaling, subjects, timing
from benchmarks.speed.timing import Comparison, Pass, Passes, Profile, interleaved, patched, ratio
from scale import finetune, models, tuning
from scale.settings import EMBEDDED


class Ticks:
    """A clock that stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def waste(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    found = Ticks()
    monkeypatch.setattr(timing.time, "perf_counter", found)
    return found


# ------------------------------------------------------------------------------------------ pairs


def test_a_ratio_is_the_median_over_pairs(clock):
    """The first round, which warms up, does not count."""
    ours = iter([100.0, 1.0, 3.0, 5.0])
    comparison = Comparison("p", "c", lambda: clock.waste(next(ours)), lambda: clock.waste(2.0), 1.4, {"more": 1})
    (row,) = interleaved([comparison], 3)
    assert row == {
        "panel": "p", "case": "c", "ratio": 1.5, "ratio_min": 0.5, "ratio_max": 2.5, "bar": 1.4, "met": False,
        "seconds": 3.0, "repeats": 3, "more": 1,
    }  # fmt: skip


def test_pairs_are_interleaved():
    seen = []
    pairs = [
        Comparison("", "", lambda i=i: seen.append(f"ours {i}"), lambda i=i: seen.append(f"theirs {i}"))
        for i in range(2)
    ]
    interleaved(pairs, 2)
    assert seen == ["ours 0", "theirs 0", "ours 1", "theirs 1"] * 3


def test_without_a_bar_nothing_is_met():
    assert ratio([1.0], None)["met"] is None and ratio([1.0], 1.0)["met"] is True


# ------------------------------------------------------------------------------------------ bare passes


class Counted(nn.Module):
    """How often it is called with and without a graph, and how often a gradient comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))
        self.calls: list[tuple[int, bool]] = []
        self.backwards = 0

    def forward(self, x, *, scale=1.0):
        self.calls.append((len(x), torch.is_grad_enabled()))
        out = scale * self.w * x
        if out.requires_grad:
            out.register_hook(lambda _: setattr(self, "backwards", self.backwards + 1))
        return (out,)


def test_bare_passes_are_those_of_the_work():
    """Forward without a graph, forward and backward, and twice backward through one graph, as an adjoint goes."""
    net = Counted()
    with Passes(net) as passes:
        with torch.no_grad():
            net(torch.ones(5, 3))
        net(torch.ones(4, 3), scale=2.0)[0].sum().backward()
        x = torch.ones(2, 3, requires_grad=True)
        out = net(x)[0]
        for keep in (True, False):
            torch.autograd.grad(out.sum(), x, retain_graph=keep)
        net(torch.ones(1, 3))  # a graph that nobody goes back through
    net.zero_grad()
    calls, backwards = net.calls, net.backwards
    assert calls == [(5, False), (4, True), (2, True), (1, True)] and backwards == 3 and passes.samples == 12
    net.calls, net.backwards = [], 0
    passes.run()
    assert net.calls == calls and net.backwards == backwards and net.w.grad is None
    assert len(passes.passes) == 4  # what runs bare is not noted


def test_a_pass_has_as_many_samples_as_its_batch():
    assert Pass(Counted(), (torch.tensor(3.0), torch.ones(7, 2)), {}, False).samples == 7


def test_a_rollout_is_its_passes_and_little_else():
    """As many calls of the policy as the solver takes, and none of the reference."""
    subject = subjects.mixture()
    with Passes(*subject.networks) as passes:
        subject.rollout(8)()
    assert [p.samples for p in passes.passes] == [8] * 2 * subject.run.settings.steps
    assert {id(p.module) for p in passes.passes} == {id(subject.networks[0])}
    assert not any(p.graph for p in passes.passes)


def test_an_update_alone_is_the_first_of_an_epoch():
    subject = subjects.mixture()
    update = subject.update()
    with Passes(*subject.networks) as passes:
        update()
    (only,) = passes.passes
    assert only.samples == subject.run.algorithm.algorithm.nodes and only.backwards == 1


# ------------------------------------------------------------------------------------------ profiles


def test_a_part_has_what_is_its_own(clock):
    class Work:
        def outer(self) -> None:
            clock.now += 1.0
            self.inner("b")
            self.inner("c")

        def inner(self, name) -> None:
            clock.now += 10.0

        def all(self) -> None:
            clock.now += 0.5
            self.outer()

    work = Work()
    found = Profile([(work, "outer", "outer"), (Work, "inner", lambda _, name: f"inner {name}")]).run(work.all)
    assert found == {"inner b": 10.0, "inner c": 10.0, "outer": 1.0, "rest": 0.5}
    assert list(found) == ["inner b", "inner c", "outer", "rest"]
    assert vars(work) == {} and Work.inner is vars(Work)["inner"]


def test_the_shares_of_an_epoch_are_the_whole():
    subject = subjects.mixture()
    found = subject.profile(subject.run.step_epoch)
    assert {"policy", "critic", "backward, policy", "backward, critic", "optimiser", "random numbers"} <= set(found)
    assert min(found.values()) > 0


def test_what_is_patched_is_put_back():
    net = nn.Linear(1, 1)
    net.mine = "was there"
    with suppress(KeyError), patched([(net, "forward", lambda x: 7), (net, "mine", "changed")]):
        assert net(torch.ones(1, 1)) == 7 and net.mine == "changed"
        raise KeyError
    assert net.mine == "was there" and torch.is_tensor(net(torch.ones(1, 1)))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be known here")
def test_the_most_that_is_held_is_seen_though_it_is_let_go():
    def work(n) -> None:
        torch.ones(n * 2**18, dtype=torch.float32)  # MiB

    freed = [torch.ones(2**14) for _ in range(2000)]  # 125 MiB that the allocator keeps below the last of them
    pinned = freed.pop()
    del freed
    least, small, large = mebibytes(lambda: work(1)), mebibytes(lambda: work(64)), mebibytes(lambda: work(256))
    assert 192 - 4 <= large - small <= 192 + 4 and small - least >= 63 - 4  # 4: the interpreter's own
    assert pinned[0] == 1


# ------------------------------------------------------------------------------------------ panels


def test_exponents_are_those_of_a_power():
    rows = [{"case": "steps", "at": n, "seconds": 3.0 * n**1.2, "mebibytes": 10.0} for n in (5, 10, 40)]
    rows += [{"case": "batch", "at": n, "seconds": float(n)} for n in (1, 2)]
    found = {row["case"]: row for row in scaling.exponents(rows)}
    assert found["seconds against steps"]["ratio"] == pytest.approx(1.2)
    assert found["seconds against steps"]["met"] is False
    assert found["mebibytes against steps"]["ratio"] == pytest.approx(0.0) and found["mebibytes against steps"]["met"]
    assert found["seconds against batch"]["ratio"] == pytest.approx(1.0) and "mebibytes against batch" not in found


def test_beside_torchsde_both_call_the_score_as_often(monkeypatch):
    """torchsde once more, to look at shapes: no sliver of a step is left over."""
    calls = itertools.count()
    entry = throughput.catalogue.get("mixture-2d")
    made = type(entry.exact).problem.func

    def counted(self):
        problem = made(self)
        return dataclasses.replace(problem, reference=lambda t, x, c=None: (next(calls), problem.reference(t, x, c))[1])

    monkeypatch.setattr(type(entry.exact), "problem", property(counted))
    pair = throughput.beside_torchsde(2)
    pair.ours()
    first = next(calls)
    pair.other()
    assert (first, next(calls) - first - 1) == (throughput.TORCHSDE_STEPS, throughput.TORCHSDE_STEPS + 1)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_beside_the_pipeline_both_call_the_unet_as_often(guidance, monkeypatch):
    pipelines = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda *a, **k: pipelines.append(load(*a, **k)) or pipelines[-1])
    pair = throughput.beside_pipeline(2, guidance, steps=4)
    seen = []
    for work in (pair.ours, pair.other):
        with Passes(pipelines[0].unet) as passes:
            work()
        seen.append([(p.samples, round(float(t.flatten()[0]), 3)) for p in passes.passes
                     for t in [p.args[1] if torch.is_tensor(p.args[1]) else torch.tensor(p.args[1])]])  # fmt: skip
    assert seen[0] == seen[1] and len(seen[0]) == 4
    assert seen[0][0] == (2 if guidance == 1 else 4, 999.0)


def test_without_an_accelerator_nothing_is_measured_and_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.gpu(quick=False) == [] and "there is no accelerator" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("last", "failed"),
    [("torch.OutOfMemoryError: CUDA out of memory.", "out of memory"), ("KeyError: 3", "exit 1: KeyError: 3")],
)
def test_options_that_fail_say_how(last, failed, tmp_path, monkeypatch, capfd):
    """Too little memory is a result; anything else is an error, once all is written."""
    done = subprocess.CompletedProcess([], 1, "", f"Traceback\n{last}\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
    row = {"panel": "gpu", "case": "bf16", "device": "D", **gpu.apart(peer.MODEL, {})}
    assert row["failed"] == failed and "Traceback" in capfd.readouterr().err
    monkeypatch.setattr(throughput, "PANELS", {"gpu": lambda *_: [row]})
    o = throughput.ThroughputOptions(out=tmp_path, panel=("gpu",))
    with pytest.raises(ValueError, match=r"gpu: failed, .*: bf16") if "exit" in failed else nullcontext():
        throughput.main(o)
    assert json.loads((tmp_path / "throughput.json").read_text())["rows"] == [row]
    monkeypatch.setattr(throughput, "PANELS", {"gpu": lambda *_: []})
    throughput.main(o)  # an older row is not this run's error


@pytest.mark.long
def test_what_the_accelerator_would_measure_is_measured(tmp_path):
    """On the embedded model, without one."""
    small = {"samples": 2, "batch": 2, "steps": 4, "micro_batch": 2, "prompts": "shapes"}
    found = gpu.apart(peer.MODEL, small | {"options": ["nodes=4", "updates=1", "keep=1"]})
    assert found["images"] == 2 and found["images_per_second"] == pytest.approx(2 / found["seconds"])
    assert found["share"] == 2 / finetune.Settings.samples
    unet = gpu.flops(models.load(str(peer.MODEL)).unet.config)
    # under guidance each is two: 4 steps and the last node, the reference at 5 nodes, a path compared, an update at 4
    # nodes, and the reference there, for its images are noised anew
    ways = 2 * (2 * 5 + 2 * 5 + 4 + 3 * 4 + 4)
    assert found["teraflops"] * found["seconds"] * 1e12 == pytest.approx(unet * ways)
    assert found["utilisation"] is None and found["fits_in"] is None


def calls_per_image(folder, share):
    """Network calls per image of an epoch by default; steps are few, which are not what is looked at."""
    s = gpu.settings(peer.MODEL, folder, share, steps=2, precision="no", batch=64, micro_batch=64)
    run = subjects.fine_tuning("gpu", finetune, s, 1.0).run
    run.step_epoch()
    return run.metrics.counts["network_calls"] / s.samples


def test_the_defaults_are_what_is_measured():
    """Of each update as many nodes per image; nothing else but the reward and what is written."""
    s, default = gpu.settings(peer.MODEL, peer.MODEL), finetune.Settings()
    changed = {name for name, value in s.plain().items() if value != default.plain()[name]}
    assert changed <= {"model", "out", "reward", "other_reward", "log_with", "epochs", "samples", "options"}
    each = [tuning.algorithm_of(settings, noisy=True) for settings in (s, default)]
    assert dataclasses.replace(each[0], nodes=each[1].nodes) == each[1]
    assert each[0].nodes / s.samples == each[1].nodes / default.samples and s.samples >= default.batch


@pytest.mark.long
def test_a_share_of_an_epoch_takes_as_many_calls_per_image(tmp_path):
    """One image per epoch or four, but for the path of three nodes by which rollouts and updates are compared once per
    epoch, at most of policy and reference."""
    one, four = (calls_per_image(tmp_path, finetune.Settings.samples // n) for n in (1, 4))
    assert 0 <= one - four <= 2 * 3 * (1 - 1 / 4) < four / 8


@pytest.mark.parametrize(
    ("last", "found"),
    [("", {"fits": True}), ("torch.OutOfMemoryError: CUDA out of memory.", {"fits": False}),
     ("KeyError: 3", {"fits": False, "failed": "exit 1: KeyError: 3"})],
)  # fmt: skip
def test_the_memory_that_a_row_names_is_tried(last, found, monkeypatch):
    """In a process that is given no more; another failure than of memory is an error."""
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess([], int(bool(last)), "{}\n", f"Traceback\n{last}\n")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    row = {"gibibytes": 9.5, "fits_in": 10.25}
    assert gpu.within(peer.MODEL, {"lora": 16}, row) == row | found
    assert [command[-2:] for command in asked] == [['{"lora": 16}', "10.25"]]
    failed = {"failed": "out of memory"}
    assert gpu.within(peer.MODEL, {}, failed) == failed and len(asked) == 1


def test_a_way_back_through_frozen_weights_costs_less():
    net = Counted()
    assert [gpu.ways(Pass(net, (), {}, True, n)) for n in (0, 1, 2)] == [1, 3, 5]
    assert gpu.ways(Pass(net.requires_grad_(False), (), {}, True, 2)) == 3


def test_operations_are_counted():
    """Of the embedded UNet: twice the multiplications of its convolutions, linear layers and attentions."""
    pipeline = models.load(str(EMBEDDED.with_suffix("")))
    unet, found = pipeline.unet, 0

    def seen(module, args, out):
        nonlocal found
        each = module.weight[0].numel()  # multiplications for one number of the output
        found += 2 * out.numel() * each

    for m in unet.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(seen)
    attended = nn.functional.scaled_dot_product_attention

    def attention(q, k, v, **given):
        nonlocal found
        found += 2 * 2 * q[..., 0].numel() * k.shape[-2] * q.shape[-1]
        return attended(q, k, v, **given)

    with torch.no_grad(), patched([(nn.functional, "scaled_dot_product_attention", attention)]):
        unet(*(torch.zeros(*shape, dtype=torch.float32) for shape in ((1, 4, 8, 8), (1,), (1, 16, 64))))
    assert gpu.flops(unet.config, tokens=16) == found


def test_the_untrained_pipeline_has_the_size_of_the_real_one():
    tokenizer = models.load(str(EMBEDDED.with_suffix(""))).tokenizer
    with torch.device("meta"):
        pipeline = models.untrained(tokenizer)
    assert pipeline.unet.num_parameters() == 859_520_964  # huggingface.co/stable-diffusion-v1-5, unet/
    assert pipeline.vae.num_parameters() == 83_653_863
    assert pipeline.vae_scale_factor * pipeline.unet.config.sample_size == 512


# ------------------------------------------------------------------------------------------ a race


TINY = peer.Work(samples=4, batch=4, steps=3, guidance=2.0)


def test_a_side_answers_and_keeps_its_unet(tmp_path):
    with peer.started("ours", TINY) as ask:
        first = ask("epoch")
        ask(f"save {tmp_path}")
    assert set(first) == {"seconds", "images", "reward", "mebibytes", "network_calls"}
    assert first["images"] == 4 and 0 < first["reward"] < 1
    assert first["network_calls"] == 3 + 1 + 3  # a rollout with its last node, an update: nobody asks the reference
    before = models.load(str(EMBEDDED.with_suffix(""))).unet.state_dict()
    after = UNet2DConditionModel.from_pretrained(tmp_path).state_dict()
    assert any(not torch.equal(before[k], v) for k, v in after.items())


def test_a_side_that_ends_says_why():
    with peer.started("ddpo", TINY) as ask, pytest.raises(RuntimeError, match="No module named 'trl'"):
        ask("epoch")


def test_a_copy_for_older_packages_has_the_same_tokens_and_weights():
    folder = peer.for_older_packages(peer.MODEL)
    pipeline = models.load(folder)
    known = json.loads((peer.Path(folder) / "tokenizer" / "vocab.json").read_text())
    assert known == pipeline.tokenizer.get_vocab()
    merges = (peer.Path(folder) / "tokenizer" / "merges.txt").read_text().splitlines()
    assert merges[0].startswith("#version") and len(merges) > 10 and all(len(m.split()) == 2 for m in merges[1:])
    weights = peer.load_file(peer.Path(folder) / "text_encoder" / "model.safetensors")
    plain = peer.load_file(peer.MODEL / "text_encoder" / "model.safetensors")
    assert {k.removeprefix("text_model.") for k in weights} == set(plain)
    assert all(torch.equal(v, plain[k.removeprefix("text_model.")]) for k, v in weights.items())
    assert not pipeline.scheduler.config["clip_sample"]


@pytest.mark.parametrize("by", race.PAIRS)
def test_our_time_over_theirs_is_taken_seed_by_seed(by):
    runs = {
        race.Job(name, 20, seed, 1e-4, 1, 256, ""): {"seconds": s, "reached": s == 1, "path_kl": 1.0}
        for seed, times in enumerate([(1.0, 2.0), (1.0, 5.0), (1.0, 4.0)])
        for name, s in zip(race.PAIRS[by], times, strict=True)
    }
    row = race.shorter(by, 20, runs)
    assert (row["ratio"], row["ratio_min"], row["ratio_max"], row["met"]) == (0.25, 0.2, 0.5, True)
    first = runs[race.Job(race.PAIRS[by][0], 20, 0, 1e-4, 1, 256, "")]
    first["path_kl"] = 1.1
    assert race.shorter(by, 20, runs)["met"] is False
    first |= {"path_kl": 1.0, "reached": False}
    assert race.shorter(by, 20, runs)["met"] is False


@pytest.mark.parametrize(("gains", "looks", "reached"), [((0.03, 0.05, 0.13), 2 + 3 / 8, True), ((), 5, False)])
def test_a_race_ends_where_the_reward_is_reached(gains, looks, reached, monkeypatch, tmp_path):
    """Looks after four epochs, of ten seconds and .7 nats in all; on a straight line between them .08 is 3/8 of the way
    from .05 to .13. Without a gain it ends when the pictures are used up."""
    before = models.load(str(EMBEDDED.with_suffix(""))).unet

    @contextmanager
    def started(side, work, python):
        assert (side, work.steps, work.own["steps"]) == ("ours", 20, 10) and "updates=6" in work.own["options"]

        def ask(line):
            what, _, folder = line.partition(" ")
            if what == "save":
                before.save_pretrained(folder)
            return {"seconds": 2.5}

        yield ask

    left = itertools.chain([0.4], (0.4 + g for g in gains), itertools.repeat(0.4))
    monkeypatch.setattr(race, "started", started)
    monkeypatch.setattr(race, "rewarded", lambda pipeline, steps: next(left))
    nats = itertools.count(0.7, 0.7)
    monkeypatch.setattr(race, "paid", lambda tuned: next(nats))
    job = race.Job("adjoint matching", 20, 0, 1e-4, 6, 640, "")
    race.run(job, tmp_path)
    found = json.loads((tmp_path / f"{job.key}.json").read_text())
    assert found["reached"] is reached and len(found["looks"]) == 1 + math.ceil(looks)
    assert [found[name] for name in ("images", "seconds", "path_kl")] == pytest.approx(
        [128 * looks, 10 * looks, 0.7 * looks]
    )


def test_a_race_needs_a_place_for_the_other():
    with pytest.raises(ValueError, match="peer_env must be given for peer and race: --peer-env FOLDER"):
        throughput.ThroughputOptions(panel=("race",))


def test_a_race_cannot_be_quick(tmp_path):
    with pytest.raises(ValueError, match="quick must be left out for the race"):
        throughput.ThroughputOptions(panel=("race",), peer_env=tmp_path, quick=True)


def test_half_an_environment_is_made_again_or_says_why(tmp_path, monkeypatch):
    """Where an installation was broken off there is an interpreter, and no TRL."""
    made = []

    def fails(command, check):
        made.append(command)
        raise subprocess.CalledProcessError(1, command)

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(peer.subprocess, "run", fails)
    with pytest.raises(ValueError, match="peer_env: TRL's environment could not be made in"):
        peer.environment(tmp_path)
    monkeypatch.setattr(peer.subprocess, "run", lambda command, check: made.append(command))
    assert peer.environment(tmp_path) == peer.environment(tmp_path) == str(tmp_path / "bin" / "python")
    assert len(made) == 1 + 2


def test_what_was_measured_of_other_panels_stays(tmp_path, monkeypatch):
    """Also of a panel that now has nothing to say, as the accelerator's where there is none; and after every panel the
    file is there."""
    file = tmp_path / "throughput.json"

    def panels():
        return [(row["panel"], row["case"]) for row in json.loads(file.read_text())["rows"]]

    def solvers(o, folder, python):
        assert panels() == [("profile", "old"), ("gpu", "old"), ("limit", "new")]
        return []

    o = throughput.ThroughputOptions(out=tmp_path, panel=("limit", "solvers"))
    throughput.write("throughput", o, [{"panel": name, "case": "old"} for name in ("limit", "profile", "gpu")], 0.0)
    new = {"limit": lambda *_: [{"panel": "limit", "case": "new"}], "solvers": solvers}
    monkeypatch.setattr(throughput, "PANELS", new)
    throughput.main(o)
    assert panels() == [("profile", "old"), ("gpu", "old"), ("limit", "new")]


@pytest.mark.long
def test_the_whole(tmp_path):
    """By its command, in the precision that users have."""
    words = ["benchmarks/throughput.py", "--quick", "--panel", "limit", "solvers", "--out", str(tmp_path)]
    subprocess.run([sys.executable, *words], cwd=peer.MODEL.parents[2], check=True)
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    limits = [row for row in rows if row["panel"] == "limit"]
    assert len(limits) == 4 + 3 + 3 and all(row["ratio_min"] <= row["ratio"] <= row["ratio_max"] for row in limits)
    assert all((row["bar"] is not None) == ("rollout" in row["case"]) for row in limits)
    for case in {row["case"] for row in rows if row["panel"] == "profile"}:
        shares = [row["share"] for row in rows if row["case"] == case and row["share"]]
        assert sum(shares) == pytest.approx(1.0, abs=5e-7 * len(shares))  # each is written with six digits
    assert sum(row["panel"] == "solvers" for row in rows) == 3
