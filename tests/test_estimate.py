"""Standard errors, z-scores and orders of convergence."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ctrl import Estimate, fit_order, z_bound


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_estimate_of_samples(samples):
    """Mean and scipy.stats.sem (n - 1 in the variance, sqrt(n) under the error)."""
    estimate = Estimate.of(torch.tensor(samples, dtype=torch.float64))
    assert estimate.n == len(samples)
    assert float(estimate.mean) == pytest.approx(np.mean(samples), rel=1e-12, abs=1e-12)
    assert float(estimate.stderr) == pytest.approx(stats.sem(samples), rel=1e-9, abs=1e-12)


def test_estimate_of_arrays():
    """The first axis holds the samples; z is the t statistic of scipy."""
    x = torch.randn(50, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = Estimate.of(x)
    assert estimate.mean.shape == estimate.stderr.shape == (3, 2)
    np.testing.assert_allclose(estimate.z(0.1), stats.ttest_1samp(x.numpy(), 0.1).statistic, rtol=1e-12)
    np.testing.assert_allclose(estimate.z(torch.full((3, 2), 0.1)), estimate.z(0.1))


@pytest.mark.parametrize("n", [0, 1])
def test_estimate_needs_two_draws(n):
    with pytest.raises(ValueError, match="samples must hold at least 2"):
        Estimate.of(torch.zeros(n, 3))


@given(tests=st.integers(1, 10_000), false_alarm=st.floats(1e-8, 0.1))
def test_z_bound_spends_its_false_alarms(tests, false_alarm):
    """tests * P(|z| > bound) = false_alarm."""
    assert tests * 2 * stats.norm.sf(z_bound(tests, false_alarm)) == pytest.approx(false_alarm, rel=1e-3)


def test_z_bound_by_default():
    assert z_bound(1) == pytest.approx(stats.norm.isf(0.5e-6), rel=1e-6)


@given(p=st.floats(-3, 3), C=st.floats(1e-3, 1e3), sign=st.sampled_from([-1, 1]))
def test_fit_order_of_a_power_law(p, C, sign):
    """error = C N^-p has order p, at either sign of the error."""
    steps = [5, 10, 20, 80]
    assert fit_order(steps, [sign * C * n**-p for n in steps]) == pytest.approx(p, abs=1e-10)


def test_fit_order_is_least_squares():
    """The slope of scipy.stats.linregress in logarithms."""
    steps, errors = [4, 8, 16, 32], [0.3, 0.11, 0.02, 0.007]
    assert fit_order(steps, errors) == pytest.approx(-stats.linregress(np.log(steps), np.log(errors)).slope, rel=1e-12)
