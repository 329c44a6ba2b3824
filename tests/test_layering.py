"""Imports point one way: ctrl <- toy <- benchmarks <- paper_figures, and ctrl <- scale <- benchmarks; and no files in
a circle."""

import ast
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT = {
    "ctrl": {"ctrl"},
    "toy": {"ctrl", "toy"},
    "scale": {"ctrl", "scale"},
    "benchmarks": {"ctrl", "toy", "scale", "benchmarks"},
    "paper_figures": {"ctrl", "toy", "scale", "benchmarks", "paper_figures"},
}
OURS = {*MAY_IMPORT, "tests"}
NOT_IN_CTRL = {"diffusers", "transformers", "torchvision", "matplotlib"}
DYNAMIC = {"import_module", "__import__", "run_module"}  # of importlib, builtins and runpy, under any alias


def imported(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of all that a source imports: at any depth, relative, or by a constant string."""
    tree = ast.parse(source)
    package = module if is_package else module.rpartition(".")[0]
    dynamic = DYNAMIC | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in DYNAMIC and alias.asname
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = above(package, node.level - 1) if node.level else ""
            for alias in node.names:
                yield node.lineno, ".".join(part for part in (base, node.module, alias.name) if part)
        elif isinstance(node, ast.Call) and terminal(node.func) in dynamic:
            for value in [*node.args[:1], *(k.value for k in node.keywords if k.arg in ("name", "mod_name"))]:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    name = value.value
                    dots = len(name) - len(name.lstrip("."))
                    base = above(anchor(node) or package, dots - 1) if dots else ""
                    yield node.lineno, f"{base}.{name[dots:]}".lstrip(".")


def above(package: str, steps: int) -> str:
    """The package `steps` levels up; beyond the top it is empty, where `from .. import toy` names a sibling of ctrl."""
    parts = package.split(".")
    return ".".join(parts[: max(len(parts) - steps, 0)])


def anchor(call: ast.Call) -> str | None:
    """The package against which import_module resolves a relative name, where it is spelled out."""
    for value in [*call.args[1:2], *(k.value for k in call.keywords if k.arg == "package")]:
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            return value.value
    return None


def terminal(func: ast.expr) -> str:
    """b of `a.b`, or of `b`."""
    return func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    layer = module.partition(".")[0]
    forbidden = OURS - MAY_IMPORT[layer] | (NOT_IN_CTRL if layer == "ctrl" else set())
    return [
        f"{module}:{line} imports {name}"
        for line, name in imported(source, module, is_package)
        if name.partition(".")[0] in forbidden
    ]


def files(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_imports_point_one_way(layer: str) -> None:
    found = []
    for path in files(layer):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        found += breaches(path.read_text(), ".".join(parts[:-1] if is_package else parts), is_package)
    assert not found, "\n".join(found)


def graph() -> dict[str, set[str]]:
    """Which modules of ours each one imports, wherever in the file."""
    every = {}
    for layer in MAY_IMPORT:
        for path in files(layer):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            every[module] = [name for _, name in imported(path.read_text(), module, is_package)]
    return {
        module: {m for name in names if (m := longest(name, every)) and m != module} for module, names in every.items()
    }


def longest(name: str, modules: Collection[str]) -> str | None:
    """The module that is meant by ctrl.linop.dot, or ctrl.linop."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a row, the first one once more at the end; none if there is no such row."""
    done: set[str] = set()

    def walk(module: str, row: list[str]) -> list[str]:
        if module in row:
            return [*row[row.index(module) :], module]
        if module in done:
            return []
        found = next((found for m in sorted(imports[module]) if (found := walk(m, [*row, module]))), [])
        done.add(module)
        return found

    return next((found for module in sorted(imports) if (found := walk(module, []))), [])


def test_no_files_import_one_another_in_a_circle() -> None:
    assert circle(graph()) == []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"a"}, "d": set()}) == ["a", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_there_is_something_to_read() -> None:
    assert all(len(files(layer)) > 5 for layer in MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ctrl.a", "import toy"),
        ("ctrl.a", "import os, toy.lq as q"),
        ("ctrl.a", "from toy import lq"),
        ("ctrl.a", "from toy.lq import V"),
        ("ctrl.a", "from .. import toy"),
        ("ctrl.a", "from ..toy import lq"),
        ("ctrl.algorithms.a", "from ... import scale"),
        ("ctrl.algorithms.a", "from ...scale.diffusion import Model"),
        ("ctrl.a", "def f():\n    from toy import lq"),
        ("ctrl.a", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import scale"),
        ("ctrl.a", "try:\n    import diffusers\nexcept ImportError:\n    pass"),
        ("ctrl.a", "import matplotlib.pyplot as plt"),
        ("ctrl.a", "from transformers import CLIPTextModel"),
        ("ctrl.a", "import torchvision"),
        ("ctrl.a", "import tests.conftest"),
        ("ctrl.a", "import importlib\nimportlib.import_module('toy')"),
        ("ctrl.a", "import importlib as i\ni.import_module(name='toy.lq')"),
        ("ctrl.a", "from importlib import import_module as load\nload('scale')"),
        ("ctrl.a", "import importlib\nimportlib.import_module('..toy', package='ctrl')"),
        ("ctrl.a", "import importlib\nimportlib.import_module('..toy', __package__)"),
        ("ctrl.a", "__import__('toy')"),
        ("ctrl.a", "lambda: __import__('torchvision').ops"),
        ("ctrl.a", "import runpy\nrunpy.run_module('toy.lq')"),
        ("toy.a", "import scale"),
        ("toy.a", "from benchmarks import order"),
        ("scale.a", "from toy.lq import V"),
        ("benchmarks.a", "import paper_figures"),
        ("paper_figures.a", "import tests"),
    ],
)
def test_a_breach_is_caught(module: str, source: str) -> None:
    assert len(breaches(source, module)) == 1


def test_a_breach_is_caught_in_a_package() -> None:
    """In ctrl/__init__.py one dot is ctrl itself, two are what lies beside it."""
    assert breaches("from .. import toy", "ctrl", is_package=True)
    assert breaches("from ..toy import lq", "ctrl", is_package=True)
    assert not breaches("from . import toy", "ctrl", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ctrl.a", "import math, torch, torchsde\nfrom ctrl import grids\nfrom ctrl.grids import trapezoid"),
        ("ctrl.a", "from . import toy\nfrom .toy import x"),
        ("ctrl.algorithms.a", "from .. import scale\nfrom ..scale import x"),
        ("ctrl.a", "import toys\nfrom ctrl import toy, scale"),
        ("ctrl.a", "import importlib\nimportlib.import_module('ctrl.bridge')\nimportlib.import_module('.toy', 'ctrl')"),
        ("ctrl.a", "import importlib\nimportlib.import_module('..toy', package='ctrl.a')"),
        ("toy.a", "import ctrl, matplotlib"),
        ("scale.a", "import ctrl, diffusers, transformers"),
        ("benchmarks.a", "import ctrl, toy, scale, benchmarks.b"),
        ("paper_figures.a", "import benchmarks"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert breaches(source, module) == []
