"""To a reward on the embedded Stable Diffusion: ours, and TRL's trainers, by its values alone and by its gradient.

From throughput.json, panels `race` and `looks` (python benchmarks/throughput.py --panel race --peer-env FOLDER).
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import COLOURS, DOUBLE, panels

RACERS = {
    "forward matching": ("forward matching (values), 10 steps", COLOURS["forward-matching"]),
    "TRL's DDPO": ("TRL's DDPO (values)", COLOURS["ddpo"]),
    "adjoint matching": ("adjoint matching (gradient), 10 steps", COLOURS["adjoint-matching"]),
    "TRL's AlignProp": ("TRL's AlignProp (gradient)", COLOURS["next-value"]),
}


ACROSS = {"seconds": "seconds of training", "path_kl": "path KL, nats"}


def draw(results: Results) -> Figure:
    """What has been gained against time in training, and against path KL, a line a seed; left and right the steps of
    the judge, and of TRL's training."""
    looks = grouped(results.rows("throughput", "looks"), "case")
    goals = {row["case"]: row["goal"] for row in results.rows("throughput", "race")}
    steps = list(dict.fromkeys(case.partition(", ")[2] for (case,) in looks))
    figure, axes = panels(DOUBLE, 4.6, len(ACROSS), len(steps), sharey=True, sharex="row")
    for ax, (across, words) in zip(axes, product(ACROSS, steps), strict=True):
        for racer in RACERS:
            runs(ax, racer, across, looks.get((f"{racer}, {words}",), []))
        ax.axhline(
            max(goal for case, goal in goals.items() if case.endswith(words) and goal), color="0.5", linewidth=0.8
        )
        ax.set(xlabel=ACROSS[across], ylabel="gain in the mean reward" if words == steps[0] else "")
        if across == "seconds":
            ax.set_title(f"${words}$")
    axes[0].legend()
    return figure


def runs(ax: Axes, racer: str, across: str, looks: list[Row]) -> None:
    """Of one that takes part."""
    label, colour = RACERS[racer]
    for (seed,), some in grouped(looks, "seed").items():
        ax.plot([r[across] for r in some], [r["gain"] for r in some], "o-", color=colour, markersize=2.5, linewidth=1,
                label=None if seed else label)  # fmt: skip


if __name__ == "__main__":
    main(__file__, draw)
