"""What the number of steps leaves in a trained policy: its regret in the limit of fine steps, and how far that lies
apart over N.

From discretization_error.json, panels `transfer` and `invariance` (python benchmarks/discretization_error.py --full).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped, seeds
from paper_figures.style import COLOURS, DOUBLE, legend_below, line, panels, ticks

METHODS = ("actor-critic", "ddpo-euler")


def draw(results: Results) -> Figure:
    """A panel a problem; the last one has final regrets over N, largest less least, beside what chance would make of
    it."""
    problems = grouped(results.rows("discretization_error", "transfer", at="limit"), "problem")
    figure, axes = panels(DOUBLE, 2.7, 1, len(problems) + 1)
    for ax, ((problem,), rows) in zip(axes, problems.items(), strict=False):
        for method in METHODS:
            chosen = [row for row in rows if row["estimator"] == method]
            label = f"{method}, trained on {chosen[0]['trajectories']:,} trajectories"
            line(ax, chosen, "nfe", "regret", method, "regret_se", label=label)
        ticks(ax, (5, 10, 20, 40, 100, 200))
        ax.set(yscale="log", title=f"{problem}, limit of fine steps", xlabel="network calls a trajectory")
    axes[0].set_ylabel(f"regret (mean ± s.e., {seeds(rows)})")
    legend_below(figure, axes[:-1], len(METHODS))
    over_steps(axes[-1], results)
    return figure


def over_steps(ax: Axes, results: Results) -> None:
    """A row a problem and method."""
    rows = results.rows("discretization_error", "invariance")
    for y, row in enumerate(rows):
        colour = COLOURS[row["estimator"]]
        ax.plot(row["apart"], y, "o", color=colour, markersize=5)
        ax.plot(row["by_chance"], y, "|", color=colour, markersize=10, markeredgewidth=1.5)
    ax.set_yticks(range(len(rows)), [f"{row['problem']}\n{row['estimator']}" for row in rows], fontsize=7.5)
    ax.set(xscale="log", ylim=(len(rows) - 0.5, -0.5), xlabel="largest − least regret (| by chance)",
           title=f"over N = {rows[0]['from']} ... {rows[0]['to']}")  # fmt: skip


if __name__ == "__main__":
    main(__file__, draw)
