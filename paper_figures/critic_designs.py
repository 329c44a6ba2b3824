"""Critic loss, critic error and policy progress for each design of a critic: its skip, and what its network sees.

From critics.json, panel `curve` (python benchmarks/critics.py): the actor-critic on mixture-2d, the same but for V.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, grouped, seeds
from paper_figures.style import COLOURS, DOUBLE, band, legend_below, panels, ticks

MEASURES = {
    "critic_loss": "critic loss",
    "critic_error": "regret of the critic's greedy policy",
    "regret": "regret of the policy",
}
DASHES = {"x": ":", "x0hat": "--", "both": "-"}
SEEN = {"x": "$x$", "x0hat": r"$\hat x_0$", "both": r"$x$ and $\hat x_0$"}
"""By what the network sees: the noisy state, the denoised one, both."""


def draw(results: Results) -> Figure:
    """A panel a measure, a colour a skip, dashes by input, a band of one standard error over seeds."""
    figure, axes = panels(DOUBLE, 3.1, 1, len(MEASURES), sharex=True)
    rows = results.rows("critics", "curve")
    for ax, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for (design,), some in grouped(rows, "design").items():
            made, sees = design.split(", ")
            name = made if made == "network" else f"{made} skip"
            band(ax, some, "trajectories", measure, f"{measure}_se", color=COLOURS[name], linestyle=DASHES[sees],
                 label=f"{name}, {SEEN[sees]}")  # fmt: skip
        ticks(ax, (64, 256, 1024, 4096))
        ax.set(yscale="log", title=title, xlabel="trajectories")
        ax.yaxis.set_major_locator(FixedLocator((0.01, 0.02, 0.05, 0.1, 0.2, 0.5)))
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(f"{rows[0]['problem']} (mean, band s.e., {seeds(rows)})")
    legend_below(figure, axes, 4)
    return figure


if __name__ == "__main__":
    main(__file__, draw)
