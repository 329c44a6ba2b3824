"""What has to do with devices, on a fake one that refuses tensors of the CPU, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def passes_there(file):
    """Whether the tests of a file pass with the fake device as accelerate's default."""
    options = ["-q", "-n", "0", "-p", "tests.fake_device", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, file]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:]
    return " passed" in done.stdout


@pytest.mark.long
def test_ctrl_and_toy_run_on_it():
    assert passes_there("tests/on_fake_device.py")


@pytest.mark.long
@pytest.mark.parametrize("module", ["test_scale", "test_sd15", "test_cifar10"])
def test_the_tests_of_scale_pass_on_it(module):
    assert passes_there(f"tests/{module}.py")
