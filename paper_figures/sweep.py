"""Whether the default algorithm ever diverges: every problem, every N, many seeds.

From algorithms_sweep.json, panel `regret` (python benchmarks/algorithms.py --sweep).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped, seeds
from paper_figures.style import DOUBLE, MARKS, legend_below, ordered, panels, ticks


def draw(results: Results) -> Figure:
    """Left the mean over seeds, right the worst of them; at 1 nothing has been learned."""
    rows = results.rows("algorithms_sweep", "regret")
    problems = grouped(rows, "problem")
    figure, axes = panels(DOUBLE, 3.2, 1, 2, sharey=True)
    for ax, (column, words) in zip(axes, {"regret": "mean", "regret_worst": "worst"}.items(), strict=True):
        for ((name,), some), colour, mark in zip(problems.items(), ordered(len(problems)), MARKS, strict=True):
            ax.plot([row["steps"] for row in some], [row[column] for row in some], color=colour, marker=mark,
                    label=name)  # fmt: skip
        ax.axhline(1, color="0.5", linewidth=0.8)
        ticks(ax, {row["steps"] for row in rows})
        ax.set(yscale="log", xlabel="steps N", title=f"{words} of {seeds(rows)}")
    axes[0].set_ylabel(f"regret after {rows[0]['trajectories']:,} trajectories")
    legend_below(figure, axes[:1], 5)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
