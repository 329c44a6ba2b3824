"""Half precision: overflows, what is measured in float32, and the same policy in rollouts and updates."""

import math

import pytest
import torch
from accelerate import Accelerator
from test_fit import Once, fresh_engine, models, squares, train  # noqa: F401
from torch import nn

from ctrl.rollout import NotFinite


@pytest.fixture(autouse=True)
def float32():
    """States and weights."""
    torch.set_default_dtype(torch.float32)


def engine(precision):
    """accelerate on the CPU; with fp16 it has neither autocast nor a scaler there, so both are attached."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    if precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


# float16 that overflows


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_is_counted_and_left_out_until_the_scale_is_small_enough(fused):
    """Gradients of 2^k times a loss of order one overflow at the first scales, 2^16 and less, and then no more."""
    policy, critic = models()
    start = nn.utils.parameters_to_vector(policy.parameters()).clone()
    overflows, moved = [], []

    def look(run, metrics):
        overflows.append(metrics.get("overflows", 0))
        moved.append(not torch.equal(nn.utils.parameters_to_vector(run.policy.parameters()), start))

    run = train(
        algorithm=Once(lambda run, n: 2.0**8 * squares(run, n)), built=(policy, critic), callbacks=[look], epochs=12,
        optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=fused), accelerator=engine("fp16"),
    )  # fmt: skip
    first = moved.index(True)
    assert 1 <= first == overflows[first] and overflows[first] == overflows[-1]
    assert overflows[:first] == [*range(1, first + 1)]
    assert ["policy_grad_norm" in metrics for metrics in run.history] == moved
    assert all(math.isfinite(v) for metrics in run.history for v in metrics.values())


@pytest.mark.parametrize("fused", [True, False])
def test_overflows_without_end_are_strikes_once_the_scale_is_below_one(fused):
    """2^16 is halved 17 times; the first strike is then, and `patience` end the run."""
    seen = []
    left_out = pytest.warns(UserWarning, match="policy: the gradient of .* is not finite.*left out")
    with left_out as said, pytest.raises(NotFinite, match="3 in a row"):
        train(
            algorithm=Once(lambda run, n: 2.0**60 * squares(run, n)), epochs=60, accelerator=engine("fp16"),
            callbacks=[lambda run, metrics: seen.append(metrics)],
            optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=fused),
        )  # fmt: skip
    assert len(seen) == 18 and len([w for w in said if "left out" in str(w.message)]) == 2
    assert [metrics["overflows"] for metrics in seen] == [*range(1, 19)]
    assert all(math.isfinite(v) for metrics in seen for v in metrics.values())
