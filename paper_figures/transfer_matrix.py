"""Policies trained at one number of steps and sampled at another: regret as the sampler sees it.

From discretization_error.json, panel `transfer` (python benchmarks/discretization_error.py --full). A sampler's few
steps have an error of their own, so the optimum, sampled alike and with the same noise, is the last line; colours are
the distance to it. What lies below the optimum there is fitted to the chain, and not to the problem.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped, seeds
from paper_figures.style import DOUBLE, panels

SAMPLERS = {"actor-critic": "Heun", "ddpo-euler": "IntegratedEuler"}
"""The solver of each method, in training and here."""
COLOUR: dict[str, Any] = {"cmap": "PuOr_r", "norm": SymLogNorm(linthresh=0.01, vmin=-1, vmax=1), "aspect": "auto"}


def draw(results: Results) -> Figure:
    """A panel a problem and method: regret ± its standard error over seeds in %, a line an N of training, a column an N
    of sampling, the limit last."""
    rows = results.rows("discretization_error", "transfer")
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    count = seeds([row for row in rows if row["estimator"] in SAMPLERS])
    figure, axes = panels(DOUBLE, 4.6, len(problems), len(SAMPLERS))
    for ax, (problem, (method, solver)) in zip(axes, product(problems, SAMPLERS.items()), strict=True):
        names = (method, f"optimum by {solver}")
        image = matrix(ax, [row for row in rows if row["problem"] == problem and row["estimator"] in names])
        ax.set_title(f"{problem}, {method}: regret in %")
    for ax in axes[-len(SAMPLERS) :]:
        ax.set_xlabel("sampled at N")
    for ax in axes[:: len(SAMPLERS)]:
        ax.set_ylabel(f"trained at N (± s.e., {count})")
    figure.colorbar(image, ax=axes, label="regret − the optimum's in that column", shrink=0.6, aspect=30)
    return figure


def matrix(ax: Axes, rows: list[Row]) -> AxesImage:
    """The optimum's rows have no N of training; in the limit its regret is 0."""
    lines = {steps: {row["at"]: row for row in some} for (steps,), some in grouped(rows, "steps").items()}
    optimum = lines.pop(None)
    places = [at for at in next(iter(lines.values())) if at.startswith("N =") or at == "limit"]
    table = [*lines.values(), {"limit": {"regret": 0.0, "regret_se": 0.0}, **optimum}]
    best = table[-1]
    image = ax.imshow([[line[at]["regret"] - best[at]["regret"] for at in places] for line in table], **COLOUR)
    for y, x in product(range(len(table)), range(len(places))):
        cell = table[y][places[x]]
        red, green, blue, _ = image.to_rgba(cell["regret"] - best[places[x]]["regret"])
        ink = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.45 else "black"
        ax.text(x, y, percent(cell), ha="center", va="center", fontsize=6.5, color=ink)
    ax.set_xticks(range(len(places)), [at.removeprefix("N = ") for at in places])
    ax.set_yticks(range(len(table)), [*map(str, lines), "optimum"])
    ax.grid(visible=False)
    return image


def percent(cell: Row) -> str:
    """As many digits as the error allows; what is exact has none."""
    value, error = 100 * cell["regret"], 100 * cell["regret_se"]
    digits = 0 if error > 5 else 1 if error > 0.1 else 2
    return f"{value:.{digits}f}\n±{error:.{digits}f}".replace("-", "−") if error else f"{value:g}"


if __name__ == "__main__":
    main(__file__, draw)
