"""ctrl/training/interrupts.py: a run that is told to end keeps its epoch, says so by its exit status, and can go on."""

import os
import signal
import subprocess
import sys
import time

import pytest
from test_checkpoint import CASES, same_run, whole
from test_fit import fresh_engine, train  # noqa: F401

from ctrl.training import files
from ctrl.training.interrupts import Stopped

CASE = {**CASES["actor-critic"], "epochs": 6}


@pytest.fixture(autouse=True)
def heard():
    """A shell lets what it starts in the background ignore SIGINT, and the tests with it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(epoch, *numbers):
    """A callback: the process gets these signals after an epoch."""

    def callback(run, metrics):
        if run.epoch == epoch:
            for number in numbers:
                os.kill(os.getpid(), number)
                time.sleep(0.01)  # until the interpreter has looked

    return callback


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_epoch(number, tmp_path, capsys):
    """With 128 + its number; the epoch is kept though none was due; the run goes on to the same end."""
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as end:
        train(**CASE, out=tmp_path, checkpoint_every=100, callbacks=[send(3, number)])
    assert end.value.code == 128 + number
    assert f"{number.name}: stopped after epoch 3 of 6, which is kept; resume goes on" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before
    assert files.newest(tmp_path).name == "epoch-000003"
    same_run(train(**CASE, out=tmp_path, init=8, resume=True), whole("actor-critic"), tmp_path)


def test_a_second_signal_ends_it_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(**CASE, out=tmp_path, callbacks=[send(3, signal.SIGINT, signal.SIGINT)])
    assert files.folders(tmp_path) == []


def test_a_second_signal_ends_what_a_shell_has_in_the_background():
    """There SIGINT is ignored, until somebody listens."""
    twice = "os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n    " * 2
    code = f"""
import os, signal, time
from ctrl.training.interrupts import Stops
signal.signal(signal.SIGINT, signal.SIG_IGN)
with Stops(None, True):
    {twice}print("not ended")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "once more to end it" in done.stdout, "not ended" in done.stdout) == (
        -signal.SIGINT,
        True,
        False,
    )


def test_nothing_is_heard_where_nothing_is_kept():
    with pytest.raises(KeyboardInterrupt):
        train(**CASE, callbacks=[send(2, signal.SIGINT)])


def test_a_signal_in_the_last_epoch_ends_what_would_follow(tmp_path):
    """An evaluation, say; the run has nothing left to do when it is gone on with."""
    with pytest.raises(Stopped):
        train(**CASE, out=tmp_path, callbacks=[send(6, signal.SIGTERM)])
    assert train(**CASE, out=tmp_path, init=8, resume=True).paths == []


def test_a_time_limit_does_not_stop_what_has_ended(tmp_path):
    assert len(train(**{**CASE, "epochs": 1}, out=tmp_path, max_hours=1e-9).history) == 1


def test_a_time_limit_is_a_signal(tmp_path):
    """An epoch that would not end in time is not begun."""
    with pytest.raises(Stopped) as end:
        train(**CASE, out=tmp_path, max_hours=1e-9)
    assert end.value.code == 128 + signal.SIGTERM
    assert files.newest(tmp_path).name == "epoch-000001"
    same_run(train(**CASE, out=tmp_path, max_hours=1.0, init=8, resume=True), whole("actor-critic"), tmp_path)
