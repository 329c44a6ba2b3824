"""Where a run is made on a machine with Apple silicon, whose device has no float64."""

import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_fit import DDPO, fresh_engine, models  # noqa: F401

from ctrl import DDIM
from ctrl.fit import Settings, fit
from ctrl.training.device import make_accelerator
from toy import catalogue

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def apple_silicon(fresh_engine, monkeypatch):  # noqa: F811
    """PyTorch reports MPS, which accelerate then takes."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: None)


def train(**options):
    problem = catalogue.get("mixture-2d").problem
    settings = Settings(epochs=1, samples=4, steps=2, solver=DDIM(), progress=False)
    return fit(problem, models()[0], DDPO(nodes=8), settings=settings, **options)


def test_a_run_is_on_the_cpu_and_prints_why(capsys):
    assert {p.device.type for p in train().policy.parameters()} == {"cpu"}
    assert capsys.readouterr().out == "device: cpu, since MPS has no float64\n"
    assert make_accelerator().device.type == "cpu"  # as accelerate has it by now
    assert capsys.readouterr().out == ""


def test_an_accelerator_on_mps_is_refused():
    with pytest.raises(
        ValueError, match=r"accelerator must not be on MPS, .* Accelerator\(cpu=True\), before any other"
    ):
        train(accelerator=Accelerator())


def test_an_accelerator_on_mps_is_refused_where_it_is_not_given():
    Accelerator()
    with pytest.raises(ValueError, match="accelerator must not be on MPS"):
        train()


def test_no_other_place_chooses_a_device():
    sources = [path for layer in ("ctrl", "toy", "scale") for path in (ROOT / layer).rglob("*.py")]
    assert [path.name for path in sources if re.search(r"\bAccelerator\(", path.read_text())] == ["device.py"]
