"""Every code block of the README runs and prints what stands below it, and every name in it exists."""

import importlib
import json
import re
from pathlib import Path

import pytest

import ctrl
from toy import catalogue

ROOT = Path(__file__).parents[1]
README, RESULTS = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n\n[^\n]*\n\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize(("block", "printed"), BLOCKS, ids=[block.splitlines()[0] for block, _ in BLOCKS])
def test_block_prints_what_the_readme_says(block, printed, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out == printed


def test_its_table_of_faults_is_what_was_measured():
    rows = json.loads((RESULTS / "faults.json").read_text())["rows"]
    table = [f"| {row['fault']} | {row['tried']} | {row['survived']} |" for row in rows]
    assert "\n".join(["| fault | tried | survived |", "|---|---|---|", *table]) in README


def test_it_names_every_problem():
    for name in catalogue.NAMES:
        assert name in README


def test_every_name_it_gives_exists():
    for name in re.findall(r"`ctrl\.([a-zA-Z_]+)`", README):
        assert hasattr(ctrl, name) or importlib.import_module(f"ctrl.{name}"), name
