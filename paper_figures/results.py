"""What the figures are drawn from: `results.rows("estimators", "dimension")` are the rows of a panel of
benchmarks/results/estimators.json, one at least."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
MADE_BY = {name: f"{name}.py --full" for name in ("algorithms", "discretization_error")} | {
    "algorithms_sweep": "algorithms.py --sweep",
}
"""Results that are not what a benchmark makes without options."""


class Missing(Exception):
    """Rows that are not there, and the command that makes them."""


@dataclass(frozen=True)
class Results:
    """The benchmarks' results files in a folder."""

    folder: Path

    def rows(self, name: str, panel: str, **values: Any) -> list[Row]:
        """The rows of a panel of NAME.json that have these values; where there are none, `Missing`."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            raise Missing(f"there is no {file}; to make it: {command(name)}")
        wanted = {"panel": panel, **values}
        found = [row for row in json.loads(file.read_text())["rows"] if wanted.items() <= row.items()]
        if not found:
            asked = ", ".join(f"{key} = {value}" for key, value in wanted.items())
            raise Missing(f"{file} has no rows with {asked}; to make them: {command(name)}")
        return found


def command(name: str) -> str:
    """What makes NAME.json."""
    return f"python benchmarks/{MADE_BY.get(name, f'{name}.py')}"


def seeds(rows: Sequence[Row]) -> str:
    """How many there are, in words."""
    return " or ".join(str(n) for n in sorted({row["seeds"] for row in rows})) + " seeds"


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by the values of these keys, in the order in which they come."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
