"""What learning costs: CPU time and network calls a trajectory, those of updates included.

From discretization_error.json, panel `cost` (python benchmarks/discretization_error.py --full).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped
from paper_figures.style import MARKS, SINGLE, legend_below, line, panels, ticks

MEASURES = {
    "seconds_per_1000": "CPU s / 1,000 trajectories",
    "network_calls_per_trajectory": "network calls a trajectory",
}


def draw(results: Results) -> Figure:
    """Above seconds, below calls, which are the same for every problem; a line a method and problem."""
    figure, axes = panels(SINGLE, 4.2, 2, 1, sharex=True)
    rows = results.rows("discretization_error", "cost")
    marks = dict(zip(grouped(rows, "problem"), MARKS, strict=False))
    for ax, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for (method, problem), some in grouped(rows, "estimator", "problem").items():
            line(ax, some, "steps", measure, method, label=f"{method}, {problem}", marker=marks[problem,])
        ticks(ax, {row["steps"] for row in rows})
        ax.set(yscale="log", ylabel=label)
    axes[-1].set_xlabel("steps N in training")
    legend_below(figure, axes, 2)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
