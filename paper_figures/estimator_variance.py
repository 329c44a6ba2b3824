"""How the variance of a gradient estimator grows with the dimension d, and what theory says.

From estimators.json, panel `dimension` (python benchmarks/estimators.py), and discretization_error.json, panel
`dimension` (python benchmarks/discretization_error.py --full): d independent copies of gaussian-1d, N = 20, exact V.
|grad J| is proportional to d, so what has a variance of order d falls as d^-1/2 on the left.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped
from paper_figures.style import DOUBLE, line, panels, slope, ticks


def draw(results: Results) -> Figure:
    """Left, every estimator's sd over |grad J|, with its standard error; right, the variance itself, for DDPO and the
    continuous form."""
    figure, (left, right) = panels(DOUBLE, 3.3, 1, 2)
    for (name,), rows in grouped(results.rows("estimators", "dimension"), "estimator").items():
        line(left, rows, "dimension", "sd", name, "sd_se")
    slope(left, (8, 0.045), 64, -0.5, r"$d^{-1/2}$")
    for (name,), rows in grouped(results.rows("discretization_error", "dimension"), "estimator").items():
        line(right, rows, "dimension", "variance", name, label=f"{name} (fit: $d^{{{rows[0]['growth']:.2f}}}$)")
    slope(right, (4, 20.0), 256, 2, "$d^2$")
    slope(right, (16, 0.7), 256, 1, "$d$")
    ticks(left, (1, 4, 16, 64))
    ticks(right, (1, 4, 16, 64, 256))
    left.set(title="every estimator, on Heun's method", ylabel="relative sd of a trajectory (± s.e.)")
    right.set(
        title=f"beside DDPO ({rows[0]['trajectories']:,} trajectories)", ylabel="variance of a trajectory's gradient"
    )
    for ax in (left, right):
        ax.set(yscale="log", xlabel="dimension d")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=7.5)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
