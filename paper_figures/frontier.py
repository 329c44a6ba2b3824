"""Reward against path KL: the exact frontier, and what each algorithm reaches at each beta.

From frontier.json, panels `exact` and `learned` (python benchmarks/frontier.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped, seeds
from paper_figures.style import COLOURS, DOUBLE, legend_below, line, panels, ticks


def draw(results: Results) -> Figure:
    """Left, reward against KL; right, how far below the frontier, by beta. Bars are one standard error over seeds."""
    figure, (left, right) = panels(DOUBLE, 3.2, 1, 2)
    exact = results.rows("frontier", "exact")
    left.plot([row["path_kl"] for row in exact], [row["reward"] for row in exact], color="black", label="exact")
    rows = [row for row in results.rows("frontier", "learned") if row["reward"] is not None]
    for (method,), some in grouped(rows, "algorithm").items():
        reached(left, some, method)
        line(right, some, "beta", "short", method, "short_se")
    left.set(
        xlabel="path KL (nats)",
        ylabel=r"$E\,r$",
        title=f"{rows[0]['problem']}, {rows[0]['trajectories']:,} trajectories",
    )
    ticks(right, {row["beta"] for row in rows})
    right.set(
        yscale="log",
        xlabel=r"$\beta$",
        ylabel=r"$J^\star - J$, in units of reward",
        title=f"regret (± s.e., {seeds(rows)})",
    )
    legend_below(figure, [left], 4)
    return figure


def reached(ax: Axes, rows: list[Row], method: str) -> None:
    """A method's points, joined, with bars both ways."""
    (x, dx), (y, dy) = (
        ([row[name] for row in rows], [row[f"{name}_se"] or 0.0 for row in rows]) for name in ("path_kl", "reward")
    )
    ax.errorbar(x, y, dy, dx, elinewidth=0.8, color=COLOURS[method], marker="o", linewidth=0.7, label=method,
                linestyle="--" if method.startswith("ddpo") else "-")  # fmt: skip


if __name__ == "__main__":
    main(__file__, draw)
