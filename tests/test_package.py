"""What `import ctrl` costs, and what the small root files promise."""

import json
import re
import subprocess
import sys
import tomllib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import restored

ROOT = Path(__file__).parents[1]
HEAVY = {"accelerate", "diffusers", "matplotlib", "torchvision", "transformers"}

IMPORT_CTRL = """
import json, sys, time
import torch
before = time.perf_counter()
import ctrl
print(json.dumps({"seconds": time.perf_counter() - before, "modules": list(sys.modules)}))
"""

IMPORT_EACH = """
import importlib, sys
import torch
for name in sys.argv[1:]:
    for loaded in [m for m in sys.modules if m.partition(".")[0] == "ctrl"]:
        del sys.modules[loaded]
    importlib.import_module(name)
"""


def python(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    """Under a second beyond torch, at best of three on a noisy machine, and nothing that only scale or a plot needs."""
    runs = [json.loads(python(IMPORT_CTRL)) for _ in range(3)]
    modules = set(runs[0]["modules"])
    assert "ctrl" in modules
    assert not modules & HEAVY
    assert not modules & {"ctrl.bridge", "torchsde"}, "the bridge is imported by whoever crosses it"
    assert min(run["seconds"] for run in runs) < 1.0


def test_any_module_may_come_first() -> None:
    """No module relies on another having been imported before it: no cycles."""
    names = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "ctrl").rglob("*.py"))
    done = python(IMPORT_EACH, *(name.removesuffix(".__init__") for name in names))
    assert len(names) > 20 and not done  # it ends well, and no module prints


def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pairs = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line) for line in lines if line]
    assert all(pairs), "constraints.txt holds name==version lines only"
    return {canonicalize_name(pair[1]): pair[2] for pair in pairs if pair}


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(r) for r in [*project["dependencies"], *extras["test"], *extras["dev"]]]
    return [r for r in wanted if canonicalize_name(r.name) != project["name"]]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda r: r.name)
def test_tested_version_is_pinned_and_admitted(requirement: Requirement) -> None:
    assert pins()[canonicalize_name(requirement.name)] in requirement.specifier


def test_tests_run_in_float64() -> None:
    assert torch.zeros(()).dtype == torch.float64


def test_global_state_is_put_back() -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    threads = torch.get_num_threads()

    def peek() -> tuple[object, ...]:
        with restored():
            return torch.rand(()).item(), np.random.rand()  # noqa: NPY002

    first = peek()
    with suppress(ZeroDivisionError), restored():
        torch.set_default_dtype(torch.float32)
        torch.set_num_threads(threads + 1)
        torch.set_grad_enabled(False)
        raise ZeroDivisionError
    assert peek() == first
    assert torch.get_default_dtype() == torch.float64
    assert torch.get_num_threads() == threads
    assert torch.is_grad_enabled()
