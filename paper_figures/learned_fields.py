"""What was learned, as a picture: value and score of mixture-2d, beside the exact ones.

From critics.json, panel `field` (python benchmarks/critics.py): one run, on both the noisy and the denoised state.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import DOUBLE, panels

SIDES = {"exact": "_exact", "learned": ""}
LEVELS = 14


def draw(results: Results) -> Figure:
    """Exact above, learned below; a column a time to go u. Colours are V, arrows beta (a - s_ref), which is grad V at
    the optimum; the scales are one in each column."""
    times = grouped(results.rows("critics", "field"), "to_go")
    figure, axes = panels(DOUBLE, 4.9, len(SIDES), len(times), sharex=True, sharey=True)
    for i, ((u,), rows) in enumerate(times.items()):
        levels = np.linspace(*limits([row["V_exact"] for row in rows]), LEVELS)
        for ax, (side, suffix) in zip(axes[i :: len(times)], SIDES.items(), strict=True):
            shown = field(ax, rows, suffix, levels)
            ax.set(title=f"{side}, u = {u:g}", aspect="equal")
        bar = figure.colorbar(shown, ax=axes[i :: len(times)], location="bottom", shrink=0.85, aspect=30, label="V")
        bar.set_ticks(MaxNLocator(4).tick_values(levels[0], levels[-1])[1:-1])
    for ax in axes[-len(times) :]:
        ax.set_xlabel("$x_1$")
    for ax in axes[:: len(times)]:
        ax.set_ylabel("$x_2$")
    return figure


def limits(values: list[float]) -> tuple[float, float]:
    """Of the colours: all but the lowest tenth, far from the data."""
    return float(np.quantile(values, 0.1)), max(values)


def field(ax: Axes, rows: list[Row], suffix: str, levels: np.ndarray) -> QuadContourSet:
    """V as filled contours, the push as arrows."""
    side = sorted({row["x1"] for row in rows})
    V = np.array([row[f"V{suffix}"] for row in rows]).reshape(len(side), len(side)).T
    shown = ax.contourf(side, side, V, levels, cmap="viridis", extend="both")
    x, y, p, q = (np.array([row[name] for row in rows]) for name in ("x1", "x2", f"push1{suffix}", f"push2{suffix}"))
    longest = np.quantile(np.hypot(*(np.array([row[f"push{i}_exact"] for row in rows]) for i in (1, 2))), 0.8)
    cut = np.minimum(1, longest / np.hypot(p, q).clip(1e-9))  # the longest fifth is drawn as long as the next
    ax.quiver(x, y, cut * p, cut * q, color="white", scale=13 * longest, width=0.006, pivot="mid")
    ax.grid(visible=False)
    return shown


if __name__ == "__main__":
    main(__file__, draw)
