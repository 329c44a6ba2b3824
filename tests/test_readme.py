"""Every code block of the README runs and prints what stands below it, and every name in it exists."""

import importlib
import re
from pathlib import Path

import pytest

import ctrl
from toy import catalogue

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n[^\n]*\n\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize(("block", "printed"), BLOCKS, ids=[block.splitlines()[0] for block, _ in BLOCKS])
def test_block_prints_what_the_readme_says(block, printed, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_it_names_every_problem():
    for name in catalogue.NAMES:
        assert name in README


def test_every_name_it_gives_exists():
    for name in re.findall(r"`ctrl\.([a-zA-Z_]+)`", README):
        assert hasattr(ctrl, name) or importlib.import_module(f"ctrl.{name}"), name
