"""What the embedded models draw while they learn: a grid an epoch, always from the same noise (and prompts).

From pictures.json, panel `grid`, and the pictures that it names (python benchmarks/pictures.py).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from paper_figures.drawing import main
from paper_figures.results import Results, Row, grouped
from paper_figures.style import DOUBLE

TITLES = {"sd15": "scale/sd15.py", "cifar10": "scale/cifar10.py"}


def draw(results: Results) -> Figure:
    """A row of grids a run, an epoch each; they are four times as wide as high."""
    runs = grouped(results.rows("pictures", "grid"), "run")
    columns = max(map(len, runs.values()))
    figure = Figure(figsize=(DOUBLE, len(runs) * (DOUBLE / columns / 4 + 0.25)), layout="constrained")
    axes = figure.subplots(len(runs), columns, squeeze=False)
    for line, ((run,), rows) in zip(axes, runs.items(), strict=True):
        for ax in line:
            ax.axis("off")
        for ax, row in zip(line, rows, strict=False):
            ax.imshow(picture(results, row), interpolation="nearest")
            ax.set_title(f"{TITLES[run]}, epoch {row['epoch']}", fontsize=7)
    return figure


def picture(results: Results, row: Row) -> np.ndarray:
    """The grid of a row."""
    with Image.open(results.folder / row["file"]) as image:
        return np.asarray(image.convert("RGB"))


if __name__ == "__main__":
    main(__file__, draw)
