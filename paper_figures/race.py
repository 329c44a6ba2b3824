"""To a reward on the embedded Stable Diffusion: ours, and TRL's DDPOTrainer.

From throughput.json, panels `race` and `looks` (python benchmarks/throughput.py --panel race --peer-env FOLDER).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import COLOURS, DOUBLE, panels

SIDES = {"ours": ("adjoint matching, 10 steps", COLOURS["adjoint-matching"]), "trl": ("TRL's DDPO", COLOURS["ddpo"])}


def draw(results: Results) -> Figure:
    """What has been gained against time in training, a line a seed; left and right the steps of the judge, and of
    TRL's training."""
    looks = grouped(results.rows("throughput", "looks"), "case")
    over = {row["case"]: row for row in results.rows("throughput", "race")}
    steps = list(dict.fromkeys(case.partition(", ")[2] for (case,) in looks))
    figure, axes = panels(DOUBLE, 2.8, 1, len(steps), sharey=True)
    for ax, words in zip(axes, steps, strict=True):
        for side in SIDES:
            runs(ax, side, looks[(f"{side}, {words}",)], over[f"{side}, {words}"])
        ax.axhline(over[f"ours, {words}"]["goal"], color="0.5", linewidth=0.8)
        ax.set(xlabel="seconds of training", title=f"${words}$")
        ax.legend()
    axes[0].set_ylabel("gain in the mean reward")
    return figure


def runs(ax: Axes, side: str, looks: list[Row], end: Row) -> None:
    """A side's."""
    label, colour = SIDES[side]
    for (seed,), some in grouped(looks, "seed").items():
        ax.plot([r["seconds"] for r in some], [r["gain"] for r in some], "o-", color=colour, markersize=2.5,
                linewidth=1, label=None if seed else f"{label}, {end['path_kl']:.1f} nats")  # fmt: skip


if __name__ == "__main__":
    main(__file__, draw)
