"""Every code block of the README runs, and what it says is so."""

import re
from pathlib import Path

import pytest

from toy import catalogue

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.strip().splitlines()[0])
def test_block_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    J = [float(v) for v in re.findall(r" J ([+-][0-9.]+) \+-", capsys.readouterr().out)]
    assert len(J) == 2
    assert J[0] < J[1]


def test_it_names_every_problem():
    for name in catalogue.NAMES:
        assert name in README


def test_every_name_it_gives_exists():
    import ctrl

    for name in re.findall(r"`ctrl\.([a-zA-Z_]+)`", README):
        assert hasattr(ctrl, name), name
