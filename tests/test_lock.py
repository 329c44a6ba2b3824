"""ctrl/training/lock.py: one run at a time in a folder, and what a run that was killed leaves is no obstacle."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest
from accelerate import Accelerator
from test_fit import fresh_engine, train  # noqa: F401

from ctrl.training.lock import FILE, locked

FORK = multiprocessing.get_context("fork")
HERE = socket.gethostname()


class Other:
    """Other processes."""

    is_main_process = False


@pytest.fixture
def out(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def started():
    """started(work, *arguments): another process, which is killed at the end if need be."""
    made = []

    def start(work, *arguments):
        made.append(FORK.Process(target=work, args=arguments))
        made[-1].start()
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.join()


def hold(out, ready, fork=False):
    """Another run, until it is killed; it may leave a child behind."""
    with locked(out, Accelerator()):
        if fork and os.fork() == 0:
            time.sleep(20)
            os._exit(0)
        ready.set()
        time.sleep(60)


def holder(started, out, **options):
    """A process that has the folder."""
    ready = FORK.Event()
    process = started(hold, out, ready, *options.values())
    assert ready.wait(20)
    return process


def taken(out):
    """Whether this process gets the folder, and leaves it."""
    with locked(out, Accelerator()):
        mine = json.loads((out / FILE).read_text()) == {"pid": os.getpid(), "host": HERE}
    return mine and not (out / FILE).exists()


def test_a_second_run_is_refused_before_it_writes(out, started):
    first = holder(started, out)
    before = (out / FILE).read_text()
    message = f"out: {out} is in use by process {first.pid} on {HERE}: wait for that run, end it, or take another"
    with pytest.raises(ValueError, match=message) as refused:
        train(out=out, overwrite=True)
    assert "\n" not in str(refused.value)
    assert [file.name for file in out.iterdir()] == [FILE] and (out / FILE).read_text() == before


@pytest.mark.parametrize("fork", [False, True])
def test_what_a_killed_run_leaves_is_taken_over(out, started, fork):
    """Though a child of it lives on."""
    first = holder(started, out, fork=fork)
    first.kill()
    first.join()
    assert json.loads((out / FILE).read_text())["pid"] == first.pid
    assert taken(out)


@pytest.mark.parametrize("record", [json.dumps({"pid": os.getppid(), "host": HERE}), "", '{"pid": 1', "[1]"])
def test_a_file_that_nobody_holds_is_taken_over(out, record):
    """Another process may have its pid by now, and it may be torn."""
    out.mkdir()
    (out / FILE).write_text(record)
    assert taken(out)


def test_a_run_on_another_host_cannot_be_looked_up(out):
    out.mkdir()
    (out / FILE).write_text(json.dumps({"pid": 7, "host": "elsewhere"}))
    message = f"out: {out} was taken by process 7 on elsewhere, which cannot be .* from {HERE}: .* delete {out / FILE}"
    with pytest.raises(ValueError, match=message):
        train(out=out)
    assert json.loads((out / FILE).read_text())["host"] == "elsewhere"
    (out / FILE).unlink()
    assert taken(out)


def test_it_is_held_to_the_end_and_released(out):
    """However a run ends; a folder in which nothing was written goes as it came."""
    seen = []
    train(out=out, epochs=1, callbacks=[lambda run, metrics: seen.append((out / FILE).exists())])
    assert seen == [True] and not (out / FILE).exists()
    with pytest.raises(KeyboardInterrupt), locked(out.parent / "new", Accelerator()):
        raise KeyboardInterrupt
    assert [file.name for file in out.parent.iterdir()] == ["run"]


def test_sigterm_releases_it(out, started):
    first = holder(started, out)
    first.terminate()
    first.join()
    assert first.exitcode == -signal.SIGTERM and not out.exists()


def test_a_run_may_hold_its_folder_twice(out, started):
    """By another name, too; the inner one does not release it."""
    with locked(out, Accelerator()):
        with locked(out / ".." / "run", Accelerator()):
            pass
        rival = started(taken, out)
        rival.join()
        assert rival.exitcode == 1
    assert taken(out)


def test_the_main_process_holds_it(out):
    with locked(out, Other()):
        assert not out.exists()
    with locked(None, Accelerator()):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out: .* is no folder that can be written to: .*Not a directory"):
        taken(tmp_path / "file" / "run")


def test_a_disk_without_locks_is_named(out, monkeypatch):
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=r"cannot be locked .*: a second run there would not be noticed"):
        taken(out)


def rush(out, start, wins):
    """Take the folder again and again; nobody else is in it."""
    start.wait()
    accelerator = Accelerator()
    for _ in range(200):
        try:
            with locked(out, accelerator):
                os.close(os.open(out / "inside", os.O_CREAT | os.O_EXCL))
                wins.value += 1
                os.unlink(out / "inside")
        except ValueError:
            pass


def test_only_one_can_take_it(out, started):
    """Of six processes that all find a file left over, and then what each other releases."""
    out.mkdir()
    (out / FILE).write_text(json.dumps({"pid": 7, "host": HERE}))
    start, wins = FORK.Barrier(6), FORK.Value("i", 0, lock=False)
    processes = [started(rush, out, start, wins) for _ in range(6)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6 and wins.value >= 6
