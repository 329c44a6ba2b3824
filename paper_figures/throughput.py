"""How fast: times over those of the bare network passes and of other people's code, and where an epoch goes.

From throughput.json (python benchmarks/throughput.py, and for `peer` --panel peer --peer-env FOLDER).
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import DOUBLE, legend_below, panels

OVER = {"limit": ("over its bare passes", "#0072B2"), "solvers": ("over theirs", "#009E73"),
        "peer": ("over TRL's epoch", "#D55E00")}  # fmt: skip
PARTS = {
    "policy": "#56B4E9", "backward, policy": "#009E73", "reference": "#E69F00", "backward, slopes": "#D55E00",
    "critic": "#0072B2", "backward, critic": "#CC79A7", "reward and decoding": "0.88", "optimiser": "0.72",
    "random numbers": "0.56", "arithmetic, memory and Python": "0.4",
}  # fmt: skip
"""Of an epoch, from below: network passes in colour."""


def draw(results: Results) -> Figure:
    """Left, ratios of times: medians and ranges over pairs of runs, a stroke where the bar is. Right, shares of an
    epoch's time."""
    figure, (left, right) = panels(DOUBLE, 4.4, 1, 2)
    rows = [row for panel in OVER for row in results.rows("throughput", panel) if "TRL" not in row["case"]]
    ratios(left, [row for row in rows if "mebibytes" not in row["case"]])
    shares(right, [row for row in results.rows("throughput", "profile") if row["case"].endswith("epoch")])
    legend_below(figure, [left], 3)
    return figure


def ratios(ax: Axes, rows: list[Row]) -> None:
    """A line each."""
    ax.axvline(1, color="black", linewidth=0.8)
    for y, row in enumerate(rows):
        label, colour = OVER[row["panel"]]
        ends = [[row["ratio"] - row["ratio_min"]], [row["ratio_max"] - row["ratio"]]]
        first = row["panel"] not in [r["panel"] for r in rows[:y]]
        ax.errorbar(row["ratio"], y, xerr=ends, fmt="o", color=colour, label=label if first else None)
        if row["bar"] is not None:
            ax.plot([row["bar"]] * 2, [y - 0.4, y + 0.4], color="0.4")
    ax.set_yticks(range(len(rows)), labels=[row["case"].replace(", seconds", "") for row in rows])
    ax.invert_yaxis()
    ax.set(xlabel="time, as a ratio", xscale="log")
    ax.set_xticks([1, 1.5, 2, 3], labels=["1", "1.5", "2", "3"], minor=False)
    ax.minorticks_off()


def shares(ax: Axes, rows: list[Row]) -> None:
    """A stack a case."""
    cases = grouped(rows, "case")
    below = dict.fromkeys(cases, 0.0)
    for part, colour in PARTS.items():
        share = {case: sum(row["share"] for row in some if row["part"] == part) for case, some in cases.items()}
        names = [case for (case,) in cases]
        ax.bar(
            names, [100 * v for v in share.values()], 0.6, [100 * v for v in below.values()], label=part, color=colour
        )
        below = {case: below[case] + share[case] for case in cases}
    ax.set(ylabel="share of an epoch's time (%)", ylim=(0, 100))
    ax.set_xticks(range(len(cases)), labels=[case.partition(",")[0] for (case,) in cases])
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


if __name__ == "__main__":
    main(__file__, draw)
