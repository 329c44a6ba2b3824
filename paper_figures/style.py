"""How the figures look: sizes, fonts, lines, and what stands around them.

Sizes are those of a two-column paper, in inches, so that a figure goes in as it is. Fonts are those that come with
matplotlib: the same picture on every machine that has the same matplotlib. A method has its colour from
`benchmarks.colours`; what is discrete-time (DDPO) is dashed, what public codes do has hollow marks; DDIM has squares,
2M triangles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from benchmarks.colours import COLOURS
from paper_figures.results import Row

SINGLE, DOUBLE = 3.3, 6.9
"""Widths of one column and of two."""
LOOK: dict[str, Any] = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 9, "axes.titlesize": 9,
    "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.fontsize": 8, "legend.frameon": False,
    "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "xtick.major.size": 2.5,
    "ytick.major.size": 2.5, "axes.grid": True, "axes.axisbelow": True, "grid.color": "0.88", "grid.linewidth": 0.5,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.2, "lines.markersize": 3.5,
    "errorbar.capsize": 2, "savefig.dpi": 160, "pdf.fonttype": 42,
}  # fmt: skip
"""Of matplotlib's settings; font type 42, since publishers refuse type 3."""
MARKS = "os^Dv<>P*"


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, from left to right and from top to bottom."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flatten())


def line(ax: Axes, rows: Sequence[Row], x: str, y: str, method: str, error: str | None = None, **looks: Any) -> None:
    """A method's series, with bars of one standard error where `error` names it; `looks` go before a method's own."""
    colour, solver = COLOURS[method], method.lower()
    looks = {"color": colour, "label": method, "markerfacecolor": "white" if "public" in method else colour,
             "linestyle": "--" if method.startswith("ddpo") else "-",
             "marker": "s" if "ddim" in solver else "^" if "2m" in solver else "o", **looks}  # fmt: skip
    bars = [row[error] or 0.0 for row in rows] if error else None
    ax.errorbar([row[x] for row in rows], [row[y] for row in rows], bars, elinewidth=0.8, **looks)


def band(ax: Axes, rows: Sequence[Row], x: str, y: str, error: str, **looks: Any) -> None:
    """A line, and a band of one standard error up and down."""
    at, mean, se = ([row[name] or 0.0 for row in rows] for name in (x, y, error))
    (drawn,) = ax.plot(at, mean, **looks)
    low, high = ([m + sign * e for m, e in zip(mean, se, strict=True)] for sign in (-1, 1))
    ax.fill_between(at, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)


def shades(colour: str, n: int) -> list[tuple[float, ...]]:
    """n of one hue from light to dark, for what has an order."""
    full, shares = to_rgb(colour), [1.2 * i / max(n - 1, 1) - 0.6 for i in range(n)]
    return [tuple(c + abs(s) * ((s < 0) - c) for c in full) for s in shares]


def ordered(n: int) -> list[tuple[float, float, float, float]]:
    """n colours for what has an order and is no method."""
    return [colormaps["viridis"](0.88 * i / max(n - 1, 1)) for i in range(n)]


def ticks(ax: Axes, at: Iterable[float]) -> None:
    """A logarithmic x axis with these numbers on it and no others."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(sorted(at)))
    ax.xaxis.set_major_formatter("{x:g}")


def slope(ax: Axes, start: tuple[float, float], end: float, order: float, text: str) -> None:
    """A thin guide of that order from `start` to x = end in double logarithmic axes, named at its end."""
    last = start[1] * (end / start[0]) ** order
    ax.plot([start[0], end], [start[1], last], ":", color="0.4", linewidth=0.9, zorder=1)
    ax.annotate(text, (end, last), (2, 0), textcoords="offset points", color="0.3", fontsize=7.5, va="center")


def legend_below(figure: Figure, axes: Iterable[Axes], columns: int) -> None:
    """What the axes show, each name once, under all of them."""
    shown = {name: mark for ax in axes for mark, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=columns)
