"""Every figure that can be drawn; of the others, the commands that make what they lack."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import tyro

from paper_figures.drawing import Options, write
from paper_figures.results import Missing

SHARED = ("__main__", "drawing", "results", "style")
FIGURES = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if file.stem not in SHARED)


def main(options: Options) -> None:
    """Draw, and exit with 1 where something is missing."""
    missing = []
    for name in FIGURES:
        try:
            write(name, import_module(f"paper_figures.{name}").draw, options)
        except Missing as why:
            missing.append(f"{name}: {why}")
    if missing:
        sys.exit("not drawn:\n  " + "\n  ".join(missing))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
