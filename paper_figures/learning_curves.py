"""Learning curves at several numbers of steps N with the same hyper-parameters: actor-critic, and DDPO on three chains.

From algorithms.json, panel `curve` (python benchmarks/algorithms.py --full).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped, seeds
from paper_figures.style import COLOURS, DOUBLE, band, panels, shades

PROBLEM = "mixture-2d"
METHODS = ("actor-critic", "ddpo-maruyama", "ddpo-euler-public", "ddpo-2m")


def draw(results: Results) -> Figure:
    """Regret on a fine grid, a panel a method, a line an N, light for few steps and dark for many."""
    figure, axes = panels(DOUBLE, 2.5, 1, len(METHODS), sharex=True, sharey=True)
    for ax, method in zip(axes, METHODS, strict=True):
        curves = grouped(results.rows("algorithms", "curve", problem=PROBLEM, algorithm=method, lr=None), "steps")
        for ((steps,), rows), colour in zip(curves.items(), shades(COLOURS[method], len(curves)), strict=True):
            band(ax, rows, "trajectories", "regret", "regret_se", color=colour, label=f"N = {steps}")
        ax.set(xscale="log", yscale="log", title=method, xlabel="trajectories")
        ax.legend(loc="lower left", fontsize=7, handlelength=1.2, borderaxespad=0.1)
    axes[0].set_ylabel(f"regret on {PROBLEM}\n(mean, band s.e., {seeds(rows)})")
    return figure


if __name__ == "__main__":
    main(__file__, draw)
