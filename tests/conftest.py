"""Every test runs in float64 from one seed, and leaves the process as it found it."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries look: a name that is not a model is not asked for five times

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("ctrl", deadline=None, derandomize=True, max_examples=25, print_blob=True)
hypothesis.settings.load_profile("ctrl")
torch.set_num_threads(1)  # the tests' tensors are small: threads cost more than they give


@contextmanager
def restored() -> Iterator[None]:
    """Put torch's default dtype, thread count and grad mode, and every global generator, back as they were."""
    dtype, threads, grad = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """float64 by default, and global generators that start from the same seed whatever ran before."""
    with restored():
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
