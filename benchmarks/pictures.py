"""The default run of each command line on its embedded model, and what it draws on the way, always from the same noise.

Leaves the grids of pictures in OUT/pictures, and in the results file

    grid        a row a grid: the run, the epoch, and the reward and path KL of the epoch before it
    evaluation  a row a run: every number of its evaluation.json

Runs are kept in OUT/pictures.runs, so that an interrupted one goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.report import Options, Row, check_among, command_line, device, digest, leave, table, with_commits, write
from scale import cifar10, sd15
from scale.settings import Tuning

NAME = "pictures"
RUNS: dict[str, tuple[type[Tuning], Callable[[Any], Any]]] = {
    "sd15": (sd15.Settings, sd15.train), "cifar10": (cifar10.Settings, cifar10.train),
}  # fmt: skip


@dataclass(frozen=True)
class PictureOptions(Options):
    """What this benchmark can be asked for."""

    run: tuple[str, ...] = tuple(RUNS)
    """sd15, cifar10."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among(self, run=RUNS)


def carry_out(name: str, store: Path, quick: bool) -> Path:
    """The folder of the run, which is made or gone on with."""
    kind, train = RUNS[name]
    small = {"epochs": 1, "samples": 8, "pretrain": 0, "eval_samples": 4, "eval_steps": (),
             "options": ("nodes=8", "updates=1")}  # fmt: skip
    s = replace(kind.read(kind.embedded), **(small if quick else {}))
    out = store / f"{name}-{digest(s.plain())}"
    if not out.with_suffix(".json").exists():
        train(replace(s, out=out, resume=(out / "config.json").exists()))
        leave({}, store, out.name)
    return out


def grids(name: str, out: Path, folder: Path) -> Iterator[Row]:
    """A row a grid, which is copied to the folder."""
    metrics = {row["epoch"]: row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())}
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted((out / "pictures").glob("epoch-*.png")):
        epoch = int(file.stem.removeprefix("epoch-"))
        shutil.copyfile(file, folder / f"{name}-{file.name}")
        seen = metrics.get(epoch, {})
        yield {"panel": "grid", "run": name, "epoch": epoch, "file": f"{NAME}/{name}-{file.name}",
               "reward": seen.get("reward"), "path_kl": seen.get("kl")}  # fmt: skip


def evaluated(name: str, out: Path) -> Row:
    """The run's evaluation, but for what is itself a table."""
    found = json.loads((out / "evaluation.json").read_text())
    return {"panel": "evaluation", "run": name} | {k: v for k, v in found.items() if not isinstance(v, dict | list)}


def main(o: PictureOptions) -> None:
    """Train, copy, print, write."""
    began = time.perf_counter()
    outs = {name: carry_out(name, o.out / f"{NAME}.runs", o.quick) for name in o.run}
    rows = [row for name, out in outs.items() for row in grids(name, out, o.out / NAME)]
    print(table(rows, ["run", "epoch", "reward", "path_kl", "file"]))
    rows += [evaluated(name, out) for name, out in outs.items()]
    runs = [json.loads(out.with_suffix(".json").read_text()) for out in outs.values()]
    path = write(NAME, o, with_commits(rows, runs), began, device())
    print(f"-> {path}; drawn by paper_figures/sample_grids.py")


if __name__ == "__main__":
    command_line(main, PictureOptions, __doc__)
