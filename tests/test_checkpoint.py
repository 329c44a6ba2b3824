"""A run that was broken off and resumed is the run that was not."""

import dataclasses
import functools
import json
import pathlib
import random
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator, cpu_offload
from safetensors.torch import load_file
from test_fit import ACTOR_CRITIC, Untouched, fresh_engine, interrupted, models, stop, train  # noqa: F401
from torch import nn

from ctrl import Multistep2
from ctrl.algorithms import DDPO, ActorCritic, KLBudget
from ctrl.training import checkpoint, files
from ctrl.training.state import identity
from toy import catalogue

CASES = {
    "actor-critic": {"algorithm": dataclasses.replace(ACTOR_CRITIC, keep=4), "ema": 0.9},
    "ddpo": {"algorithm": DDPO(nodes=64), "solver": Multistep2()},
    "kl budget": {"algorithm": KLBudget(ACTOR_CRITIC, nats=0.5)},
    "conditions": {"name": "mixture-2d-conditional", "ema": 0.5, "samples": 10},
}
every = pytest.mark.parametrize("name", CASES)


@functools.cache
def whole(name):
    """Six epochs without a break."""
    return train(**CASES[name], epochs=6)


def lines(out):
    return (out / "metrics.jsonl").read_text().splitlines()


def records(out):
    """The metrics file but for the time things took."""
    return [{name: v for name, v in json.loads(line).items() if name != "seconds"} for line in lines(out)]


def same_run(resumed, whole, out):
    """Bitwise: parameters of policy, average and critic, and the critic's level; metrics, in memory and in the file."""
    assert torch.equal(resumed.parameters, whole.parameters)
    assert torch.equal(resumed.result.critic.level, whole.result.critic.level)
    assert resumed.history == whole.history
    assert records(out) == whole.history
    for a, b in zip(reversed(resumed.paths), reversed(whole.paths), strict=False):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.t, b.t)


@every
@pytest.mark.parametrize("epoch", [4, 5])
def test_an_interrupted_run_resumes(name, epoch, tmp_path):
    """From its checkpoint after epoch 4; what came after it is done again, and said once."""
    resumed = interrupted(epoch, out=tmp_path, checkpoint_every=2, epochs=6, **CASES[name])
    assert [int(path.ids[0]) // len(path.ids) for path in resumed.paths] == [4, 5]
    same_run(resumed, whole(name), tmp_path)


@every
def test_a_run_can_be_made_longer(name, tmp_path):
    """One epoch and two more, where the learning rate does not say how long the run is."""
    case = {**CASES[name], "schedule": lambda progress: 1.0}
    train(**case, epochs=1, out=tmp_path)
    resumed = train(**case, epochs=3, out=tmp_path, init=8, resume=True)
    same_run(resumed, train(**case, epochs=3), tmp_path)


def test_a_finished_run_comes_back(tmp_path):
    case = CASES["actor-critic"]
    done = train(**case, out=tmp_path)
    back = train(**case, out=tmp_path, init=8, resume=True)
    assert back.paths == []
    same_run(back, done, tmp_path)
    assert back.result.history == done.result.history


def test_what_was_torn_is_ignored(tmp_path):
    """A checkpoint that was being written, and half a line of metrics."""
    case = {**CASES["actor-critic"], "epochs": 4, "out": tmp_path, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[stop(3)], **case)
    part = tmp_path / "checkpoints" / "epoch-000004.part"
    part.mkdir()
    (part / "policy.safetensors").write_text("torn")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "traj')
    same_run(train(init=8, resume=True, **case), train(**{**case, "out": None}), tmp_path)
    assert not part.exists()
    assert files.newest(tmp_path).name == "epoch-000004"


def test_a_run_without_a_checkpoint_starts_again(tmp_path):
    """With `resume` or without, and its metrics with it."""
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[stop(2)], out=tmp_path)
    assert len(lines(tmp_path)) == 2
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[stop(1)], out=tmp_path, resume=True)
    assert len(lines(tmp_path)) == 1
    same_run(train(out=tmp_path), train(), tmp_path)


def test_what_is_written(tmp_path):
    """Checkpoints at the asked epochs and at the end; metrics as JSON, a line an epoch. A text names a folder."""
    result = train(epochs=5, checkpoint_every=2, keep_checkpoints=3, out=str(tmp_path), ema=0.5).result
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["epoch-000002", "epoch-000004", "epoch-000005"]
    assert [json.loads(line) for line in lines(tmp_path)] == result.history
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl"]


def test_nothing_is_written_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_the_store_is_what_the_next_epoch_keeps(tmp_path):
    """The oldest of `keep` batches would be pushed out, so it is not written."""
    for name, kept in (("actor-critic", 3), ("ddpo", 0)):
        train(**CASES[name], epochs=5, out=tmp_path / name)
        stored = load_file(files.newest(tmp_path / name) / "replay-0.safetensors")
        assert {key.partition(".")[0] for key in stored} == {str(i) for i in range(kept)}


def test_fields_that_share_memory_are_written(tmp_path):
    """The file format refuses two names for one piece of memory; an algorithm may lay a view or an alias."""

    class Aliases(ActorCritic):
        def learn(self, run):
            newest = run.collections[-1]
            for name in ("state", "alias"):
                newest.attach(name, newest.trajectory.x)
            yield from super().learn(run)

    train(algorithm=Aliases(2, 2, 64, keep=2), epochs=2, out=tmp_path)
    stored = load_file(files.newest(tmp_path) / "replay-0.safetensors")
    assert torch.equal(stored["0.at.alias"], stored["0.x"]) and torch.equal(stored["0.at.state"], stored["0.x"])


def test_an_accelerator_can_serve_twice(tmp_path):
    """The second run's checkpoint has the second run's models, and another accelerator finds them."""
    accelerator = Accelerator()
    train(init=3, epochs=1, accelerator=accelerator)
    done = train(epochs=1, out=tmp_path, accelerator=accelerator)
    back = train(epochs=1, out=tmp_path, init=8, resume=True)
    assert torch.equal(back.parameters, done.parameters)


# what is refused


def test_checkpoints_are_not_overwritten(tmp_path):
    train(epochs=1, out=tmp_path)
    before = lines(tmp_path)
    with pytest.raises(ValueError, match="holds checkpoints already: pass resume=True, overwrite=True, or"):
        train(built=(Untouched(), catalogue.get("mixture-2d").value), out=tmp_path)
    assert lines(tmp_path) == before


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"samples": 12}, "samples = 24, this run has 12: resume with the same, or start in another folder"),
        ({"steps": 5}, "steps = 6, this run has 5"),
        ({"seed": 1}, "seed = 0, this run has 1"),
        ({"ema": 0.5}, "ema = 0.0, this run has 0.5"),
        ({"algorithm": DDPO(), "solver": Multistep2()}, "algorithm = ActorCritic, this run has DDPO"),
    ],
)
def test_another_run_does_not_resume_this_one(changed, message, tmp_path):
    train(epochs=1, out=tmp_path)
    with pytest.raises(ValueError, match=f"epoch-000001 was written with {message}"):
        train(**changed, out=tmp_path, resume=True)


def test_the_learners_must_agree(tmp_path):
    train(epochs=1, out=tmp_path)
    with pytest.raises(ValueError, match=r"learners = \['critic', 'policy'\], this run has \['policy'\]"):
        train(built=(models()[0], catalogue.get("mixture-2d").value), out=tmp_path, resume=True)


def test_a_folder_of_another_format_is_refused(tmp_path):
    train(epochs=1, out=tmp_path)
    folder = tmp_path / "checkpoints" / "epoch-000001"
    progress = folder / "progress.json"
    progress.write_text(progress.read_text().replace(f'"format": {checkpoint.FORMAT}', '"format": 2'))
    (folder / "manifest.json").write_text(json.dumps(files.manifest(folder)))
    with pytest.raises(ValueError, match=f"format = 2, this run has {checkpoint.FORMAT}"):
        train(out=tmp_path, resume=True)


def test_the_newest_comes_first(tmp_path):
    assert files.newest(tmp_path) is None
    for epoch in (9, 10, 200, 1000):
        (tmp_path / "checkpoints" / f"epoch-{epoch:06d}").mkdir(parents=True)
    for tail in ("part", "old"):
        (tmp_path / "checkpoints" / f"epoch-002000.{tail}").mkdir()
    names = [folder.name for folder in files.folders(tmp_path)]
    assert names == ["epoch-001000", "epoch-000200", "epoch-000010", "epoch-000009"]


def test_the_last_and_the_best_are_kept(tmp_path):
    """The best has the largest reward less beta KL, in the epoch that it ends."""
    run = train(**CASES["actor-critic"], epochs=8, checkpoint_every=2, keep_checkpoints=1, out=tmp_path, lr=0.3)
    beta = catalogue.get("mixture-2d").problem.beta
    merits = {m["epoch"]: m["reward"] - beta * m["kl"] for m in run.history if m["epoch"] % 2 == 0}
    kept = {int(folder.name[-6:]) for folder in files.folders(tmp_path)}
    assert kept == {8, max(merits, key=merits.get)}


def test_a_broken_one_does_not_count(tmp_path):
    """A later one that was passed over pushes none out that is whole."""
    case = {**CASES["actor-critic"], "out": tmp_path, "schedule": lambda progress: 1.0}
    train(**case, epochs=6, checkpoint_every=3)
    (files.folders(tmp_path)[0] / "policy.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="epoch-000006 is passed over"):
        train(**case, epochs=4, checkpoint_every=1, keep_checkpoints=1, init=8, resume=True)
    with pytest.warns(UserWarning, match="epoch-000006 is passed over"):
        assert files.newest(tmp_path).name == "epoch-000004"


def test_another_run_is_overwritten_if_asked(tmp_path):
    train(epochs=2, out=tmp_path, seed=1)
    same_run(train(out=tmp_path, overwrite=True), train(), tmp_path)


def test_lost_lines_of_metrics_are_noticed(tmp_path):
    train(epochs=3, out=tmp_path)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(ValueError, match="has lost lines: a checkpoint of epoch 3 goes with as many"):
        train(epochs=4, out=tmp_path, resume=True)


def test_a_checkpoint_needs_room(tmp_path, monkeypatch):
    """Weights, two moments, the average and the store, as they are written; for the last two, the best and the next."""
    case = {**CASES["actor-critic"], "epochs": 5, "out": tmp_path}
    train(**case)
    written = sum(f.stat().st_size for f in files.newest(tmp_path).iterdir())
    shutil.rmtree(tmp_path / "checkpoints")
    usage = shutil.disk_usage(tmp_path)
    for room, enough in ((2.5 * written, False), (6 * written, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=room: usage._replace(free=int(free)))
        if enough:
            train(**case, resume=True)
        else:
            with pytest.raises(ValueError, match=r"4 checkpoints of .* GB do not go into the .* GB that are free"):
                train(**case, resume=True)


def test_the_identity_of_a_reference_is_its_weights():
    first, second = models()[0], models()[0]
    for m in (first, second):
        m.requires_grad_(False)
    assert identity(first) == identity(second) != identity(models()[0])
    with torch.no_grad():
        next(second.parameters()).view(-1)[0] += 1e-15
    assert identity(first) != identity(second)
    assert identity(catalogue.get("mixture-2d").problem.reference) != ""


def test_the_identity_of_a_reference_is_not_where_it_lies():
    """Weights that are offloaded count too."""

    def made(bias):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).requires_grad_(False)
        model[0].bias += bias
        return model

    here, away, other = made(0), made(0), made(1e-15)
    for model in (away, other):
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model[0].weight.is_meta
    assert identity(here) == identity(away) != identity(other)


class Counting(nn.Module):
    """A policy whose first layer is not trained, and that counts its calls in a buffer. The last layer's weights lie in
    memory by columns, as little a plain block as a convolution's in channels-last layout."""

    def __init__(self, init=7, frozen=7):
        super().__init__()
        self.policy, first = models(init=init)[0], models(init=frozen)[0].network.layers[0]
        self.policy.network.layers[0].load_state_dict(first.state_dict())
        self.policy.network.layers[0].requires_grad_(False)
        last = self.policy.network.layers[-1].weight
        last.data = last.data.T.contiguous().T
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, t, x, cond=None):
        self.calls += 1
        return self.policy(t, x, cond)


def test_what_is_not_trained_is_not_written(tmp_path):
    """A checkpoint holds trained weights and buffers, of the policy and of its average, and takes as much room as was
    asked for; a run goes on from it, if what is not trained is the same."""
    case = {"epochs": 4, "ema": 0.9}

    def built(*given):
        return Counting(*given), models()[1]

    whole = train(built=built(), **case)
    with pytest.raises(KeyboardInterrupt):
        train(built=built(), callbacks=[stop(3)], out=tmp_path, checkpoint_every=2, **case)
    folder = files.newest(tmp_path)
    trained = [name for name, p in Counting().named_parameters() if p.requires_grad]
    for file in ("policy.safetensors", "ema.safetensors"):
        assert {*load_file(folder / file)} == {*trained, "calls"}
    with pytest.raises(ValueError, match=r"was written with frozen weights of policy = \w+, this run has"):
        train(built=built(7, 8), out=tmp_path, resume=True, **case)
    resumed = train(built=built(8, 7), out=tmp_path, resume=True, **case)
    same_run(resumed, whole, tmp_path)
    assert resumed.result.policy.calls == whole.result.policy.calls > 0
    assert resumed.result.ema.policy.network.layers[0].weight is resumed.result.policy.policy.network.layers[0].weight


def test_every_random_state_comes_back(tmp_path):
    """Of python, numpy and torch, for policies and rewards that draw for themselves: as if the run had gone on."""
    drawn = []

    def draw(run, metrics):
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: NPY002

    train(epochs=3, out=tmp_path, checkpoint_every=2, callbacks=[draw])
    shutil.rmtree(tmp_path / "checkpoints" / "epoch-000003")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # noqa: NPY002
    train(epochs=3, out=tmp_path, init=8, resume=True, callbacks=[draw])
    before_second, third, again = drawn[1:]
    assert again == before_second  # the state is that before the callbacks of epoch 2
    assert third != again


@pytest.mark.parametrize("name", ["policy-optimizer.pt", "random-0.pt"])
def test_nothing_is_unpickled(name, tmp_path):
    """Not from a checkpoint that is whole, either: a file may come from anyone."""
    train(epochs=1, out=tmp_path)
    folder = files.newest(tmp_path)

    class Payload:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "hacked",))

    torch.save({"state": Payload()}, folder / name)
    (folder / "manifest.json").write_text(json.dumps(files.manifest(folder)))
    with pytest.raises(ValueError, match=r"epoch-000001 cannot be loaded: Weights only"):
        train(epochs=2, out=tmp_path, resume=True)
    assert not (tmp_path / "hacked").exists()
