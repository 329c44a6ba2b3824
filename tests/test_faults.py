"""Faults on purpose, a few of each (`benchmarks/faults.py` has them all): none may cost anything."""

import random
import warnings

import pytest
import torch
from test_fit import fresh_engine  # noqa: F401

from benchmarks import faults
from ctrl.training import checkpoint, files

QUICK = faults.faults(faults.FaultOptions(quick=True))
APART = ("kill", "SIG", "disk", "one of two", "reward of one of two", "two runs", "float16")
"""Those that need processes of their own."""


@pytest.fixture(autouse=True)
def as_in_the_benchmark():
    """Which runs in processes of its own, too."""
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    torch.set_default_dtype(torch.float32)
    return faults.Ground.of(tmp_path_factory.mktemp("faults"), seed=0)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(f, marks=pytest.mark.long if f.name.startswith(APART) else ())
        for f in QUICK if f.times
    ],
    ids=lambda fault: fault.name,
)  # fmt: skip
def test_it_is_survived(fault, ground):
    assert [fault.trial(ground, n) for n in range(fault.times)] == [True] * fault.times


@pytest.mark.parametrize("what", ["metrics", "policy", "trajectories"])
def test_a_loss_would_be_seen(what, ground):
    """`same` is no formality: a line, a weight or a state that differs is a run that did not survive."""
    out = ground.place("whole")
    assert faults.same(out, ground.whole)
    if what == "metrics":
        file = out / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*lines, lines[-1]]))
        assert not faults.same(out, ground.whole)
        return
    folder = files.newest(out)
    file = folder / {"policy": "policy.safetensors", "trajectories": "replay-0.safetensors"}[what]
    held = faults.load_file(file)
    name = next(name for name, v in held.items() if v.is_floating_point())
    held[name].view(-1)[0] = held[name].view(-1)[0].nextafter(torch.tensor(torch.inf))
    checkpoint.save_file(held, file)
    (folder / files.MANIFEST).write_text(faults.json.dumps(files.manifest(folder)))
    assert not faults.same(out, ground.whole)


def test_every_bit_counts(ground):
    """Turn any bit of any file of a checkpoint, cut it anywhere: it is not whole."""
    rng = random.Random(1)
    for damage in (faults.cut, faults.turn):
        folder = files.folders(ground.place("short"))[0]
        for file in sorted(folder.iterdir()):
            before = file.read_bytes()
            damage(rng, file)
            assert files.broken(folder) is not None, file
            file.write_bytes(before)
        assert files.broken(folder) is None


def test_what_is_passed_over_is_said(ground):
    out = ground.place("short")
    files.folders(out)[0].joinpath("policy.safetensors").write_bytes(b"")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        files.newest(out)
    assert "epoch-000004 is passed over: policy.safetensors is not what was written" in str(said[0].message)
