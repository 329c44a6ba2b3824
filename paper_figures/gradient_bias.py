"""The bias of the policy gradient against network calls: discrete-time RL beside the continuous-time form.

From discretization_error.json, panel `bias` (python benchmarks/discretization_error.py --full). Expectations are exact,
so there are no error bars.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results
from paper_figures.style import DOUBLE, legend_below, line, panels, slope, ticks

PROBLEMS = ("gaussian-1d", "gaussian-16d")
SHOWN = ("DDIM, left", "Heun", "2M", "random times, Heun", "ddpo-euler-public", "ddpo-ddim-public", "ddpo-euler",
         "ddpo-ddim", "ddpo-2m")  # fmt: skip
GUIDED = 80
"""Calls from which the guides of order 1 and 2 start, above and below all that is drawn."""


def draw(results: Results) -> Figure:
    """|E g - grad J| / |grad J| on the uniform grid, a row a problem, with the KL term and without."""
    figure, axes = panels(DOUBLE, 5.0, 2, 2, sharex=True)
    for ax, (problem, kl) in zip(axes, product(PROBLEMS, (True, False)), strict=True):
        rows = results.rows("discretization_error", "bias", problem=problem, kl=kl, grid="uniform")
        rows = [row for row in rows if row["estimator"] in SHOWN]
        for name in SHOWN:
            line(ax, [row for row in rows if row["estimator"] == name], "nfe", "relative_error", name)
        ticks(ax, {row["nfe"] for row in rows})
        errors = [row["relative_error"] for row in rows if row["nfe"] == GUIDED]
        slope(ax, (GUIDED, 4 * max(errors)), 4 * GUIDED, -1, "order 1")
        slope(ax, (GUIDED, 0.3 * min(errors)), 4 * GUIDED, -2, "order 2")
        ax.set(yscale="log", title=f"{problem}, {'reward and KL' if kl else 'reward alone'}")
    for ax in axes[2:]:
        ax.set_xlabel("network calls a trajectory")
    for ax in axes[::2]:
        ax.set_ylabel("relative bias of the gradient")
    legend_below(figure, axes, 5)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
