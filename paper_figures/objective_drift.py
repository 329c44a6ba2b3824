"""How far the optimum of the N-step objective itself lies from the problem's: the regret of where it is.

From discretization_error.json, panel `drift` (python benchmarks/discretization_error.py --full). Exact, on gaussian-1d.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped
from paper_figures.style import SINGLE, legend_below, line, panels, slope, ticks


def draw(results: Results) -> Figure:
    """A line an objective: with the KL of the chain's own transitions (public), with Girsanov's, or by Heun with its
    quadrature. That of ddpo-euler lies under that of ddpo-ddim."""
    figure, (ax,) = panels(SINGLE, 3.4)
    rows = results.rows("discretization_error", "drift")
    for (name,), some in grouped(rows, "estimator").items():
        line(ax, some, "nfe", "regret", name)
    ticks(ax, (10, 20, 40, 100, 200))
    slope(ax, (105, 3e-3), 200, -2, "order 2")
    slope(ax, (30, 4e-5), 200, -4, "order 4")
    ax.set(yscale="log", title=f"optimum of the N-step objective, {rows[0]['problem']}",
           xlabel="network calls a trajectory", ylabel="regret")  # fmt: skip
    legend_below(figure, [ax], 3)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
