"""The regret that each algorithm ends with on each problem, at its own settings, the same for all problems.

From algorithms.json, panel `regret` (python benchmarks/algorithms.py --full).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped, seeds
from paper_figures.style import COLOURS, DOUBLE, panels

STEPS = 20
CLOSER = "mixture-2d"
"""The problem on which every algorithm has been tried."""


def draw(results: Results) -> Figure:
    """Left, a line a problem, with the algorithms that were tried on all of them; right, a line an algorithm."""
    rows = finished(results)
    problems, methods = grouped(rows, "problem"), grouped(rows, "algorithm")
    figure, (left, right) = panels(DOUBLE, 2.9, 1, 2, sharex=True)
    order = sorted((name for (name,) in problems), key=lambda name: min(row["regret"] for row in problems[name,]))
    everywhere = [row for row in rows if len(methods[row["algorithm"],]) == len(problems)]
    for (method,), some in grouped(everywhere, "algorithm").items():
        dots(left, some, [order.index(row["problem"]) for row in some], method)
    lines(left, order, f"every problem ({seeds(everywhere)})")
    left.legend(loc="lower left")
    closer = sorted(finished(results, problem=CLOSER), key=lambda row: row["regret"])
    for y, row in enumerate(closer):
        dots(right, [row], [y], row["algorithm"])
    lines(right, [f"{row['algorithm']} ({row['seeds']} seeds)" for row in closer], CLOSER)
    for ax in (left, right):
        ax.set_xlabel(f"regret, N = {STEPS}, {rows[0]['trajectories']:,} trajectories\n(mean over seeds ± s.e.)")
    return figure


def finished(results: Results, **values: Any) -> list[Row]:
    """Without those of which every run failed."""
    rows = results.rows("algorithms", "regret", steps=STEPS, lr=None, **values)
    return [row for row in rows if row["regret"] is not None]


def dots(ax: Axes, rows: list[Row], y: list[int], method: str) -> None:
    """With one standard error over seeds."""
    regret, error = [row["regret"] for row in rows], [row["regret_se"] or 0.0 for row in rows]
    fill = "white" if "public" in method else COLOURS[method]
    ax.errorbar(regret, y, xerr=error, fmt="o", color=COLOURS[method], markerfacecolor=fill, label=method)


def lines(ax: Axes, names: list[str], title: str) -> None:
    """A line a name, from above."""
    ax.set_yticks(range(len(names)), names)
    ax.set(xscale="log", title=title, ylim=(len(names) - 0.5, -0.5))


if __name__ == "__main__":
    main(__file__, draw)
