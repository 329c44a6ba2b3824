"""The embedded CIFAR-10 model as a sampler of ten steps: which form of the update learns the data's energy best?

From cifar10.json, panels `curve`, `untuned` and `forms` (python benchmarks/cifar10.py). Frechet distances are between
the judging classifier's features, and no FID.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped, seeds
from paper_figures.style import COLOURS, DOUBLE, legend_below, panels

NAMES = {"ancestral": "ancestral", "ddim": "DDIM", "dpmsolver++": "DPM-Solver++", "sde-dpmsolver++": "SDE-DPM-Solver++",
         "unipc": "UniPC", "2m": "2M"}  # fmt: skip


def draw(results: Results) -> Figure:
    """Left, of the last epochs' pictures while training, a line a seed; right, at the end, by 2M as it was trained,
    beside the untuned model by each sampler."""
    figure, (left, right) = panels(DOUBLE, 2.8, 1, 2)
    for (method, _), curve in grouped(results.rows("cifar10", "curve"), "algorithm", "seed").items():
        left.plot([row["images"] for row in curve], [row["frechet"] for row in curve], color=COLOURS[method],
                  linewidth=0.9, label=method)  # fmt: skip
    left.set(xlabel="pictures drawn", ylabel="Frechet distance\nof the last 256 pictures")
    forms = results.rows("cifar10", "forms")
    ends(right, results.rows("cifar10", "untuned"), forms)
    right.set(xlabel=f"Frechet distance at ten steps (± s.e., {seeds(forms)})")
    legend_below(figure, [left], 4)
    return figure


def ends(ax: Axes, untuned: list[Row], forms: list[Row]) -> None:
    """A line a sampler of the untuned model, and one a form."""
    for y, row in enumerate((*untuned, *forms)):
        colour = COLOURS[row["algorithm"]] if row["panel"] == "forms" else "0.5"
        ax.errorbar(row["frechet"], y, xerr=row["frechet_se"] or 0.0, fmt="o", color=colour)
    labels = [f"{NAMES[row['sampler']]}, untuned" for row in untuned] + [row["algorithm"] for row in forms]
    ax.set_yticks(range(len(labels)), labels=labels)
    ax.invert_yaxis()


if __name__ == "__main__":
    main(__file__, draw)
