"""paper_figures: every figure is drawn from the committed results, with the same bytes each time and one colour for
each method; what is missing is named with the command that makes it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from itertools import combinations, product
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from PIL import Image

from benchmarks.colours import COLOURS
from paper_figures.__main__ import FIGURES, main
from paper_figures.drawing import Options, write
from paper_figures.results import Missing, Results, command
from paper_figures.style import DOUBLE, LOOK, SINGLE

ROOT = Path(__file__).parents[1]
COMMITTED = ROOT / "benchmarks" / "results"
QUICK = ("learning_curves", "transfer_matrix")
"""Drawn twice in every run of the tests; the others with -m long."""


def draw_of(name):
    return import_module(f"paper_figures.{name}").draw


def made_up():
    """Rows as benchmarks/sd_tiny.py writes them."""
    for i, method in enumerate(("actor-critic", "ddpo")):
        about = {"reward": "following-soft", "algorithm": method}
        for seed, n in product(range(2), (32, 64, 96)):
            yield {"panel": "curve", **about, "seed": seed, "images": n, "value": 0.4 + n / 1e3 + i / 10, "kl": 0.1}
        for sampler, steps in product(("ddim", "unipc"), (10, 25, 50, 100)):
            yield {"panel": "samplers", **about, "sampler": sampler, "steps": steps, "gain": 0.1 * i, "gain_se": None}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The committed results, and made-up ones in the place of what is not there yet."""
    folder = tmp_path_factory.mktemp("results")
    for file in COMMITTED.glob("*.json"):
        shutil.copy(file, folder)
    shutil.copytree(COMMITTED / "pictures", folder / "pictures")
    if not (folder / "sd_tiny.json").exists():
        (folder / "sd_tiny.json").write_text(json.dumps({"rows": list(made_up())}))
    return folder


@pytest.fixture(scope="module")
def drawn(results, tmp_path_factory):
    """The files of `python -m paper_figures`."""
    out = tmp_path_factory.mktemp("out")
    main(Options(results, out))
    return out


@dataclass(frozen=True)
class Recorded(Results):
    """Results that remember which files were asked for."""

    asked: set[str] = field(default_factory=set)

    def rows(self, name, panel, **values):
        self.asked.add(name)
        return super().rows(name, panel, **values)


@pytest.fixture(scope="module")
def figures(results):
    return {name: draw_of(name)(Results(results)) for name in FIGURES}


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_drawn_in_the_width_of_one_column_or_two(drawn, name):
    with Image.open(drawn / f"{name}.png") as picture:
        assert picture.width in [int(width * LOOK["savefig.dpi"]) for width in (SINGLE, DOUBLE)]
    assert 5_000 < (drawn / f"{name}.png").stat().st_size < 150_000
    assert (drawn / f"{name}.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.skipif(
    f"matplotlib=={version('matplotlib')}" not in (ROOT / "constraints.txt").read_text().splitlines(),
    reason="another matplotlib than that of constraints.txt draws other pixels",
)
@pytest.mark.parametrize("name", FIGURES)
def test_the_committed_figure_is_that_of_the_committed_results(drawn, name):
    """Results that are made anew want their figures drawn anew: `python -m paper_figures`."""
    assert (drawn / f"{name}.png").read_bytes() == (ROOT / "paper_figures" / "out" / f"{name}.png").read_bytes()


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FIGURES]
)
def test_the_same_rows_give_the_same_bytes(drawn, results, name, tmp_path):
    """In a process of its own, by the command of the figure."""
    words = [sys.executable, f"paper_figures/{name}.py", "--results", str(results), "--out", str(tmp_path)]
    subprocess.run(words, cwd=ROOT, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    for file in (f"{name}.png", f"{name}.pdf"):
        assert (tmp_path / file).read_bytes() == (drawn / file).read_bytes()


@pytest.mark.parametrize(
    ("name", "file", "column"),
    [("cost", "discretization_error", "seconds_per_1000"), ("algorithm_regrets", "algorithms", "regret_se")],
)
def test_another_number_gives_another_figure(drawn, results, tmp_path, name, file, column):
    """One number of one row: of a line, and of an error bar."""
    found = json.loads((results / f"{file}.json").read_text())
    next(row for row in found["rows"] if row.get(column))[column] *= 2
    (tmp_path / f"{file}.json").write_text(json.dumps(found))
    write(name, draw_of(name), Options(tmp_path, tmp_path))
    assert (tmp_path / f"{name}.png").read_bytes() != (drawn / f"{name}.png").read_bytes()


def test_a_missing_file_or_panel_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(Missing, match=r"no .*/algorithms\.json; .*: python benchmarks/algorithms\.py --full$"):
        Results(tmp_path).rows("algorithms", "curve")
    (tmp_path / "sd_tiny.json").write_text(json.dumps({"rows": list(made_up())}))
    assert len(Results(tmp_path).rows("sd_tiny", "curve", algorithm="ddpo")) == 6
    with pytest.raises(Missing, match=r"panel = curve, seed = 7; .*: python benchmarks/sd_tiny\.py$"):
        Results(tmp_path).rows("sd_tiny", "curve", seed=7)


def test_what_can_be_drawn_is_drawn_and_the_rest_is_listed(results, tmp_path, monkeypatch):
    monkeypatch.setattr("paper_figures.__main__.FIGURES", ["algorithm_regrets", "cost", "stable_diffusion"])
    shutil.copy(results / "discretization_error.json", tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(Options(tmp_path, tmp_path))
    _, *said = str(stop.value).splitlines()  # to exit with words is to exit with status 1
    assert [line.split(":")[0].strip() for line in said] == ["algorithm_regrets", "stable_diffusion"]
    commands = ["python benchmarks/algorithms.py --full", "python benchmarks/sd_tiny.py"]
    assert all(line.endswith(": " + command) for line, command in zip(said, commands, strict=True))
    assert [file.stem for file in tmp_path.glob("*.png")] == ["cost"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_says_which_commands_made_its_rows(results, name):
    recorded = Recorded(results)
    draw_of(name)(recorded)
    said = re.findall(r"python benchmarks/\w+\.py(?: --full| --sweep)?", import_module(f"paper_figures.{name}").__doc__)
    assert set(said) == {command(file) for file in recorded.asked}


def looks_of(handle):
    """What tells a line from others: colour, dashes, mark and its filling; a bar has its colour alone."""
    if isinstance(handle, BarContainer):
        return (to_hex(handle.patches[0].get_facecolor()),)
    line = handle.lines[0] if isinstance(handle, ErrorbarContainer) else handle
    return to_hex(line.get_color()), line.get_linestyle(), line.get_marker(), to_hex(line.get_markerfacecolor())


def test_a_method_has_one_colour_and_no_two_lines_of_a_panel_look_alike(figures):
    seen = set()
    for ax in [ax for figure in figures.values() for ax in figure.axes]:
        handles, labels = ax.get_legend_handles_labels()
        shown = {label: looks_of(handle) for handle, label in zip(handles, labels, strict=True)}
        for label, looks in shown.items():
            method = max((name for name in COLOURS if label.startswith(name)), key=len, default=None)
            assert method is None or looks[0] == COLOURS[method].lower(), label
            seen.add(method)
        assert all(a != b for a, b in combinations(shown.values(), 2)), shown
    assert seen >= {"actor-critic", "adjoint-matching", "ddpo", "ddpo-euler", "ddpo-2m", "Heun", "2M", "critic", "td"}


def test_the_benchmarks_own_figures_have_these_colours():
    from benchmarks import algorithms, discretization_error, estimators, sd_tiny

    assert sd_tiny.COLOURS.items() <= COLOURS.items()
    shown = [
        *algorithms.METHODS,
        *discretization_error.ESTIMATORS,
        *(line.estimator for line in estimators.BY_DIMENSION),
    ]
    assert set(shown) <= set(COLOURS)
