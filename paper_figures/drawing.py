"""From a figure's `draw` to its files, and the command line of every figure.

A figure is a file in this folder with one function, `draw(results) -> Figure`, which reads rows, groups and plots them;
it computes nothing that is a result. `python paper_figures/NAME.py` writes NAME.pdf and NAME.png.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import tyro
from matplotlib import style as settings
from matplotlib.figure import Figure
from PIL import Image

from paper_figures.results import Missing, Results
from paper_figures.style import LOOK

Draw = Callable[[Results], Figure]


@dataclass(frozen=True)
class Options:
    """What every figure can be asked for."""

    results: Path = Path("benchmarks/results")
    """Where the benchmarks' results files are."""
    out: Path = Path("paper_figures/out")
    """Where the figures go."""


def write(name: str, draw: Draw, options: Options) -> None:
    """OUT/NAME.pdf and OUT/NAME.png, whatever matplotlib's settings are here; the same rows give the same bytes."""
    with settings.context(["default", LOOK]):
        figure, picture = draw(Results(options.results)), BytesIO()
        for ax in figure.axes:
            ax.minorticks_off()
        options.out.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, metadata={"Software": None})
        figure.set_layout_engine(None)  # as it is laid out now
        figure.savefig(options.out / f"{name}.pdf", metadata={"CreationDate": None})
    with Image.open(picture) as image:  # with a palette a third of the size
        image.convert("RGB").quantize(256).save(options.out / f"{name}.png", optimize=True)
    print(f"-> {options.out / name}.pdf, .png")


def main(file: str, draw: Draw) -> None:
    """The command line of the figure in that file."""
    options = tyro.cli(Options, description=sys.modules[draw.__module__].__doc__)
    try:
        write(Path(file).stem, draw, options)
    except Missing as why:
        sys.exit(str(why))
