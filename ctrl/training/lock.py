"""One run at a time in a folder.

    with locked(out, accelerator):
        ...                                  # another run that enters the same folder fails at once

OUT/run.lock names the process that holds the folder and its host. The lock itself is the operating system's (`flock`),
which ends with the process, however that ends; so a file that is left over is told from one in use whatever process has
its pid by now, and of two that take it over only one can. A file left by another host cannot be told, and is refused.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

FILE = "run.lock"

_held: dict[Path, IO[str] | None] = {}
"""Folders that this run holds, with their open files, which the main process has."""


@contextmanager
def locked(out: Path | None, accelerator: Accelerator) -> Iterator[None]:
    """Hold a folder, which is made if need be; every process calls it, the main one holds. A run may hold a folder
    twice. It is released at the end, on an error and on SIGTERM; without a folder there is nothing to hold."""
    folder = None if out is None else out.resolve()
    if folder is None or folder in _held:
        yield
        return
    failure: list[ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            _held[folder] = _take(folder)
        except ValueError as refused:
            failure = [refused]
        except OSError as wrong:
            failure = [ValueError(f"out: {folder} is no folder that can be written to: {wrong}")]
    broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]
    _held.setdefault(folder, None)
    with _released_on_sigterm():
        try:
            yield
        finally:
            _release(folder)


def _take(folder: Path) -> IO[str]:
    """The folder's file, locked, with this process's name in it."""
    stream = None
    while stream is None:  # a run that ends takes its file away, perhaps just after it was opened here
        with suppress(FileNotFoundError):
            stream = _lock(folder / FILE)
    host = socket.gethostname()
    if _record(stream).get("host", host) != host:
        holder = _holder(stream)
        stream.close()
        raise ValueError(
            f"out: {folder} was taken by {holder}, which cannot be looked up from {host}: if that run has ended, "
            f"delete {folder / FILE}"
        )
    stream.truncate(0)
    json.dump({"pid": os.getpid(), "host": host}, stream)
    stream.flush()
    return stream


def _lock(file: Path) -> IO[str] | None:
    """The file, open and locked; nothing, if another one has its name by now."""
    import fcntl  # Windows has none

    file.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as undo:
        stream = undo.enter_context(file.open("a+"))
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"out: {file.parent} is in use by {_holder(stream)}: wait for that run, end it, or take another folder"
            ) from None
        except OSError as wrong:
            warnings.warn(f"{file} cannot be locked ({wrong}): a second run there would not be noticed", stacklevel=2)
        if not os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            return None
        undo.pop_all()
    return stream


def _record(stream: IO[str]) -> dict[str, Any]:
    """What the file says; nothing, if it was torn."""
    stream.seek(0)
    try:
        return dict(json.loads(stream.read()))
    except (ValueError, TypeError):
        return {}


def _holder(stream: IO[str]) -> str:
    there = _record(stream)
    return f"process {there.get('pid', 'unknown')} on {there.get('host', 'an unknown host')}"


def _release(folder: Path) -> None:
    """The name goes while it is held: one who has opened it sees that, and opens another. So does a folder in which
    nothing was written."""
    stream = _held.pop(folder, None)
    if stream is not None:
        (folder / FILE).unlink(missing_ok=True)
        stream.close()
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _released_on_sigterm() -> Iterator[None]:
    """A signal that ends the process without unwinding releases what is held first."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    for folder in list(_held):
        _release(folder)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _forget() -> None:
    """A forked child holds nothing: it may outlive the run."""
    for stream in _held.values():
        if stream is not None:
            stream.close()
    _held.clear()


os.register_at_fork(after_in_child=_forget)
