"""What every benchmark shares: its options, its results file, its table.

A results file is JSON: {"name", "command", "commit", "seed", "versions", "device", "seconds", "rows": [flat records]}.
The command is the shortest one that asks for the same run; where the file is written is no part of it. The commit is
that of the code, with "-dirty" where the code differs from it; rows from runs that were kept from another commit have a
column `commit` of their own. The seconds are those of the last time it was given, without runs that were kept from
before.

A run is kept under a digest of what decides it (`digest`): its settings, the code, the versions of the packages and
the device. Where one of them has changed, the run is made anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from tqdm import tqdm

from ctrl.fields import check_fields

PACKAGES = (
    "ctrl-diffusion", "torch", "torchsde", "numpy", "scipy", "accelerate", "diffusers", "transformers", "peft",
)  # fmt: skip
Row = dict[str, str | int | float | bool | None]

ROOT = Path(__file__).parents[1]
CODE = ("ctrl", "toy", "scale")
"""What every run is made by, with the weights of the embedded models."""


def commit_of(checkout: Path) -> str | None:
    """The commit of a git checkout, with "-dirty" where the code differs from it; None where there is none."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--", *CODE, "benchmarks/*.py") else commit
    except (OSError, subprocess.CalledProcessError):
        return None


COMMIT = commit_of(ROOT)
"""As this process began, which is when it read the code."""

LIMITS = {
    **dict.fromkeys(("seeds", "trajectories", "images", "jobs", "workers", "batch", "repeats", "threads"), ">= 1"),
    **dict.fromkeys(("seed", "kills", "kills_sd", "damages"), ">= 0"),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What every benchmark can be asked for."""

    out: Path = Path("benchmarks/results")
    """Where the results file and the figure go."""
    quick: bool = False
    """A smaller run, under a minute on two cores."""
    seed: int = 0
    """Seed of all randomness."""

    def __post_init__(self) -> None:
        check_fields(self, LIMITS)


@dataclass(frozen=True)
class TrainingOptions(Options):
    """What a benchmark of short training runs can be asked for besides."""

    seeds: int = 3
    """Runs of each, with seeds 0, 1, ..."""
    trajectories: int = 5120
    """Training trajectories a run."""
    done: bool = False
    """Only the table of the runs that are there."""
    jobs: int = os.cpu_count() or 1
    """Runs at a time, each on one thread."""


def command_line(main: Callable[[Any], Any], kind: type[Options], doc: str | None) -> None:
    """main(options), as the words on the command line have them; an error of the user's without a traceback."""
    try:
        main(tyro.cli(kind, description=doc))
    except ValueError as wrong:
        sys.exit(str(wrong))


def check_among(options: Options, **known: Iterable[str]) -> None:
    """Raise unless what each of these options names is known."""
    for name, names in known.items():
        if unknown := [v for v in getattr(options, name) if v not in names]:
            raise ValueError(f"{name} must be among {', '.join(names)}, got {', '.join(unknown)}")


def carried_out(work: Callable[..., Any], cases: Sequence[tuple[Any, ...]], workers: int, total: int) -> None:
    """work(*case) for every case, in processes of their own; `total` are those that were done before as well."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(work, *case) for case in cases]
        try:
            for future in tqdm(as_completed(futures), "runs", total=total, initial=total - len(cases)):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def kept(
    work: Callable[..., Any], jobs: Sequence[Any], store: Path, workers: int, *, done: bool = False
) -> dict[Any, Any]:
    """What work(job, STORE) left in STORE/{job.key}.json for each job. Where the file is there it is not done again;
    with `done` none is, and there must be some. The key has the `digest` of what decides the run."""
    store.mkdir(parents=True, exist_ok=True)
    files = {job: store / f"{job.key}.json" for job in jobs}
    if done:
        files = those_there(files, store)
    missing = [job for job in files if not files[job].exists()]
    carried_out(work, [(job, store) for job in missing], workers, len(jobs))
    return {job: json.loads(file.read_text()) for job, file in files.items()}


def those_there(files: dict[Any, Path], store: Path) -> dict[Any, Path]:
    """The files that exist."""
    there = {job: file for job, file in files.items() if file.exists()}
    if not there:
        raise ValueError(f"done: no runs with these options and this code in {store}; leave --done out to make them")
    return there


def search(
    jobs: Sequence[Any], carry_out: Callable[[Sequence[Any]], dict[Any, Any]], value: Callable[[Any, Any], float],
    factor: float, case: Callable[[Any], Any],
) -> dict[Any, Any]:  # fmt: skip
    """The runs of jobs at several learning rates (`job.lr`). Those of one case have one grid, whose best point is that
    with the largest mean value(job, run); it is extended by `factor` until this lies inside."""
    runs: dict[Any, Any] = {}
    while jobs:
        runs |= carry_out(jobs)
        grids: dict[Any, dict[float, list[float]]] = {}
        for job, run in runs.items():
            grids.setdefault(case(job), {}).setdefault(job.lr, []).append(value(job, run))
        wanted = {name: beyond({lr: mean(found) for lr, found in grid.items()}, factor) for name, grid in grids.items()}
        new = {replace(job, lr=lr) for job in runs if (lr := wanted[case(job)]) is not None}
        jobs = sorted(new, key=lambda job: job.key)
    return runs


def beyond(grid: Mapping[float, float], factor: float, most: int = 9) -> float | None:
    """grid: point -> value. Where the largest value is at an edge, the next point there, `factor` further; None where
    it lies inside. Raise where it is at an edge of `most` points."""
    low, best, high = min(grid), max(grid, key=lambda at: grid[at]), max(grid)
    if low < best < high:
        return None
    if len(grid) >= most:
        raise ValueError(f"lr: of {len(grid)} from {low:g} to {high:g} the best is {best:g}, at the edge")
    return float(f"{best * factor if best == high else best / factor:.3g}")


def over_seeds(name: str, values: Sequence[float]) -> Row:
    """NAME, the mean, and NAME_se, its standard error; None where there are too few values."""
    return {
        name: mean(values) if values else None,
        f"{name}_se": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
    }


def leave(row: Mapping[str, Any], store: Path, key: str) -> None:
    """STORE/{key}.json, with the commit it was made at, in one move."""
    part = store / f"{key}.part"
    part.write_text(json.dumps({**row, "commit": COMMIT}))
    os.replace(part, store / f"{key}.json")


def digest(*what: Any) -> str:
    """Eight digits that change with `what`, with the code, the versions of the packages and the device."""
    text = json.dumps([what, code(), versions(), named(device())], default=_described, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@cache
def code() -> str:
    """sha256 of all files of CODE."""
    found = hashlib.sha256()
    files = (f for folder in CODE for f in (ROOT / folder).rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    for file in sorted(files):
        found.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return found.hexdigest()


def _described(value: Any) -> Any:
    """For JSON: a dataclass by its fields, a function or class by its source, else the class."""
    if isinstance(value, Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__qualname__: {f.name: getattr(value, f.name) for f in fields(value)}}
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):  # it is an instance, or not written in Python
        return getattr(value, "__qualname__", type(value).__qualname__)


def with_commits(rows: Sequence[Row], runs: Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows, which these runs were made into; with the commits that the runs were made at, where not all of them
    were made at this one."""
    made = sorted({str(run["commit"]) for run in runs})
    return list(rows) if made == [str(COMMIT)] else [{**row, "commit": ", ".join(made)} for row in rows]


def number(row: Row, name: str) -> float:
    """A cell that holds a number."""
    value = row[name]
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, not a number")
    return float(value)


def command(name: str, options: Options) -> str:
    """`python benchmarks/NAME.py` with the options that differ from their defaults."""
    words = ["python", f"benchmarks/{name}.py"]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name == "out" or value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        words += [flag] if value is True else [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return " ".join(words)


@cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that the numbers depend on; a package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Where `scale` trains: on CUDA where there is any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def named(device: str) -> str:
    """cpu, or the accelerator's name."""
    return device if device == "cpu" else torch.cuda.get_device_name(device)


def rounded(value: Any) -> Any:
    """A float to six significant digits: finer is noise in a figure and in a diff."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write(name: str, options: Options, rows: Sequence[Row], began: float, device: str = "cpu", part: str = "") -> Path:
    """Write OUT/NAME.json, or NAME_PART.json, in one move, so that a reader never sees half a file; `began` is from
    time.perf_counter()."""
    head = {
        "name": name,
        "command": command(name, options),
        "commit": COMMIT,
        "seed": options.seed,
        "versions": versions(),
        "device": named(device),
        "seconds": round(time.perf_counter() - began, 1),
    }
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    names = dict.fromkeys(name for row in rows for name in row)  # every record has every column
    records = [json.dumps({name: rounded(row.get(name)) for name in names}, allow_nan=False) for row in rows]
    lines.append('  "rows": [\n    ' + ",\n    ".join(records) + "\n  ]")
    options.out.mkdir(parents=True, exist_ok=True)
    path = _file(name, options, part)
    unfinished = path.with_suffix(".json.tmp")
    unfinished.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    os.replace(unfinished, path)
    return path


def _file(name: str, options: Options, part: str) -> Path:
    return options.out / f"{name}{part and '_' + part}.json"


def earlier(name: str, options: Options, part: str = "") -> list[Row]:
    """The rows of the file that `write` is to replace, with the commit that they were made at. Rows of --quick and
    others do not share a file."""
    file = _file(name, options, part)
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": [], "command": ""}
    if ("--quick" in found["command"].split()) != options.quick:
        return []
    was = found.get("commit") or "unknown"
    return [row if was == COMMIT else {**row, "commit": row.get("commit") or was} for row in found["rows"]]


def others(rows: Iterable[Row], found: Iterable[Row], by: Sequence[str]) -> list[Row]:
    """Those of `rows` whose case, the cells `by` which one is known, was not found anew."""
    anew = {tuple(row[name] for name in by) for row in found}
    return [
        {k: v for k, v in row.items() if v is not None} for row in rows if tuple(row[name] for name in by) not in anew
    ]


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """The rows' columns, aligned; None is a dash."""
    cells = [list(columns), *[[_cell(row[c]) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
