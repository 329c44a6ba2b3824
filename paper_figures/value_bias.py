"""The value-function bias: how far from the tilted law the optimum itself ends, by the memory rho of the initial noise.

From value_bias.json, panels `exact` and `learned` (python benchmarks/value_bias.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, seeds
from paper_figures.style import COLOURS, DOUBLE, legend_below, panels

MEASURES = {
    "kl_to_target": "KL to the tilted law (nats)",
    "mean": r"mean of $Y_T$",
    "variance": r"variance of $Y_T$",
}


def draw(results: Results) -> Figure:
    """KL, mean and variance against rho: exact lines, learned points with one standard error over seeds."""
    figure, axes = panels(DOUBLE, 2.4, 1, len(MEASURES), sharex=True)
    exact, learned = (results.rows("value_bias", panel) for panel in ("exact", "learned"))
    for ax, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        ax.plot([row["rho"] for row in exact], [row[measure] for row in exact], color="black", label="optimum, exact")
        ax.errorbar(
            [row["rho"] for row in learned], [row[measure] for row in learned],
            [row[f"{measure}_se"] or 0.0 for row in learned], fmt="o", color=COLOURS["actor-critic"],
            label=f"actor-critic, learned ({seeds(learned)})",
        )  # fmt: skip
        ax.set(xlabel=r"$\rho$, memory of the noise", ylabel=label)
    for ax, name in zip(axes[1:], ("target_mean", "target_variance"), strict=True):
        ax.axhline(exact[0][name], color="0.5", linestyle=":", linewidth=0.9, label="tilted law")
    legend_below(figure, axes, 3)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
