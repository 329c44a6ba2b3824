"""Policy iteration: quadratic on linear-quadratic problems (Newton-Kleinman) and in continuous time, and PI-FT's linear
bound in discrete time.

From policy_iteration.json (python benchmarks/policy_iteration.py). All but q-learning is exact.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import DOUBLE, MARKS, band, ordered, panels, slope

NAME = "policy_iteration"
STEPS = (100, 200)
"""Of PI-FT's chain."""


def draw(results: Results) -> Figure:
    """Above, Newton-Kleinman, regret by the one before, and q-learning, where all of it is learned; below, mixture-1d:
    policy iteration in continuous time, and PI-FT at each N with its bound."""
    figure, axes = panels(DOUBLE, 5.0, 2, 3)
    newton, continuous = grouped(results.rows(NAME, "newton"), "problem"), grouped(results.rows(NAME, "pde"), "beta")
    by_iteration(axes[0], newton, "{}")
    axes[0].set(title="linear-quadratic: Newton-Kleinman", xlabel="iteration")
    by_the_one_before(axes[1], list(newton.values()), "linear-quadratic", "s")
    by_the_one_before(axes[1], list(continuous.values()), "mixture-1d, continuous", "o")
    guides(axes[1])
    learned(axes[2], results.rows(NAME, "q-learning"))
    by_iteration(axes[3], continuous, "β = {:g}")
    axes[3].set(title="mixture-1d: continuous time", xlabel="iteration")
    for ax, steps in zip(axes[4:], STEPS, strict=True):
        runs = grouped(results.rows(NAME, "pi-ft", steps=steps), "beta")
        by_iteration(ax, runs)
        bounds(ax, list(runs.values()))
        ax.set(title=f"PI-FT, N = {steps} (dotted: bound)", xlabel="iterations in each step")
        ax.sharey(axes[3])
    for ax in axes[::3]:
        ax.set_ylabel(r"regret $J^\star - J$")
        ax.legend(loc="lower left", fontsize=7.5, handlelength=1.5)
    return figure


def by_iteration(ax: Axes, runs: dict[tuple[Any, ...], list[Row]], label: str = "") -> None:
    """A line a problem or a price of KL."""
    for (key, rows), colour, mark in zip(runs.items(), ordered(len(runs)), MARKS, strict=False):
        ax.plot([row["iteration"] for row in rows], [row["regret"] for row in rows], color=colour, marker=mark,
                label=label.format(*key))  # fmt: skip
    ax.set_yscale("log")


def bounds(ax: Axes, runs: list[list[Row]]) -> None:
    """regret_0 bound^n, in the colour of the run."""
    for rows, colour in zip(runs, ordered(len(runs)), strict=True):
        n, (first, *_) = [row["iteration"] for row in rows], rows
        ax.plot(n, [first["regret"] * first["bound"] ** i for i in n], ":", color=colour)


def by_the_one_before(ax: Axes, runs: list[list[Row]], label: str, mark: str) -> None:
    """Every pair of successive regrets."""
    pairs = [pair for rows in runs for pair in pairwise(row["regret"] for row in rows)]
    fill = "0.25" if mark == "s" else "white"
    ax.plot(*zip(*pairs, strict=True), mark, color="0.25", markerfacecolor=fill, label=label)


def guides(ax: Axes) -> None:
    """A quadratic rate is of order 2 there, a linear one of order 1."""
    ax.set(xscale="log", yscale="log", title="is it quadratic?", xlabel="regret", ylabel="regret, one iteration on")
    slope(ax, (1e-11, 1e-28), 1e-4, 2, "quadratic")
    slope(ax, (1e-14, 1e-15), 1e-7, 1, "linear")
    ax.legend(loc="upper left", fontsize=7.5, handlelength=1.0)


def learned(ax: Axes, rows: list[Row]) -> None:
    """By epoch, with bands of one standard error over seeds."""
    measures = {"regret": "regret", "value_error": "error of V, relative"}
    for (name, label), colour in zip(measures.items(), ordered(2), strict=True):
        band(ax, rows, "iteration", name, f"{name}_se", color=colour, label=label)
    ax.set(yscale="log", title="lq-1d: q-learning (band s.e.)", xlabel="epoch")
    ax.legend(fontsize=7.5, handlelength=1.5)


if __name__ == "__main__":
    main(__file__, draw)
