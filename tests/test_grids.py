"""Grids and quadratures: exact where they should be, and of the order they claim."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from ctrl import VE, IsotropicNormal, RectifiedFlow, ScoreAsAction, VPCosine, VPLinear, VPTable, fit_order, grids
from toy import catalogue

NOISINGS = {
    "linear": VPLinear(),
    "cosine": VPCosine(),
    "table": VPTable.scaled_linear(),
    "ve": VE(),
    "rectified": RectifiedFlow(),
}
RULES = {
    name: lambda p, times, rule=rule: grids.node_weights(rule(p, times))
    for name, rule in {
        "left": grids.left,
        "trapezoid": grids.trapezoid,
        "clock_trapezoid": grids.clock_trapezoid,
    }.items()
}
every = pytest.mark.parametrize("noising", NOISINGS.values(), ids=NOISINGS.keys())
uneven = st.lists(st.floats(0.01, 1), min_size=1, max_size=12)


def problem(noising, s_min=1e-2, s_max=0.9):
    return ScoreAsAction(
        noising,
        reference=lambda t, x, c: -x,
        reward=lambda x, c: x.sum(1),
        initial=IsotropicNormal((1,)),
        shape=(1,),
        s_min=s_min,
        s_max=s_max,
    )


def grid(p, steps):
    """A grid on [0, T] with these relative steps."""
    times = torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)
    return times / times[-1] * p.horizon


def close(a, b, rtol=1e-12, atol=0.0):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_uniform(steps):
    """t_k = k T/N in float64."""
    times = grids.uniform(problem(VPLinear()), steps)
    assert times.dtype == torch.float64
    close(times, torch.arange(steps + 1, dtype=torch.float64) * 0.89 / steps, 1e-14)
    problem(VPLinear()).check_times(times)


@every
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_log_snr(noising, steps):
    """Uniform in lambda, increasing in t, and both ends hit exactly."""
    p = problem(noising)
    times = grids.log_snr(p, steps)
    assert times.dtype == torch.float64 and times.shape == (steps + 1,)
    assert float(times[0]) == 0.0 and float(times[-1]) == p.horizon
    p.check_times(times)
    lam = noising.log_snr(p.s(times))
    ends = noising.log_snr(torch.tensor([0.9, 0.01], dtype=torch.float64))
    close(lam.diff(), ((ends[1] - ends[0]) / steps).expand(steps), 1e-9, 1e-11)
    close(lam[[0, -1]], ends, 1e-12)


def test_grids_are_float64_whatever_the_default():
    p = problem(VPLinear())
    exact = grids.uniform(p, 10), grids.log_snr(p, 10)
    natural, shift = grids.natural(p, 10), torch.linspace(-0.4, 0.4, 9)
    jittered = grids.jitter(natural, shift)
    torch.set_default_dtype(torch.float32)
    assert torch.equal(grids.natural(p, 10), natural)
    assert torch.equal(grids.jitter(natural, shift), jittered)
    assert grids.jitter(natural, shift.float()).dtype == torch.float64
    assert torch.equal(grids.uniform(p, 10), exact[0])
    assert torch.equal(grids.log_snr(p, 10), exact[1])


@pytest.mark.parametrize("steps", [0, -1, 2.0, "4", None])
@pytest.mark.parametrize("make", [grids.uniform, grids.log_snr, grids.natural])
def test_steps_are_a_positive_integer(make, steps):
    with pytest.raises(ValueError, match="steps must be an integer >= 1"):
        make(problem(VPLinear()), steps)


def test_log_snr_needs_noise_at_the_data_end():
    """lambda is infinite at s = 0 unless sigma > 0 there."""
    for make in (grids.log_snr, grids.natural):
        with pytest.raises(ValueError, match=r"s_min = 0.*s_min > 0"):
            make(problem(VPLinear(), s_min=0.0), 4)
    assert bool(torch.isfinite(grids.log_snr(problem(VE(), s_min=0.0), 4)).all())


def test_weights_by_hand():
    """Two steps, 0.2 and 0.3: left (.2, .3, 0), trapezoid (.1, .25, .15)."""
    p, times = problem(VPLinear()), torch.tensor([0.0, 0.2, 0.5], dtype=torch.float64)
    close(RULES["left"](p, times), torch.tensor([0.2, 0.3, 0.0], dtype=torch.float64))
    close(RULES["trapezoid"](p, times), torch.tensor([0.1, 0.25, 0.15], dtype=torch.float64))


@every
@given(steps=uneven, a=st.floats(-2, 2), b=st.floats(-2, 2))
def test_exactness_on_uneven_grids(noising, steps, a, b):
    """left: constants; trapezoid: a + b t; clock_trapezoid: rate (a + b clock), to a C + b C²/2 over a clock span C."""
    p = problem(noising)
    times, T = grid(p, steps), p.horizon
    close(RULES["left"](p, times).sum(), torch.tensor(T, dtype=torch.float64))
    linear = RULES["trapezoid"](p, times) * (a + b * times)
    close(linear.sum(), torch.tensor(a * T + b * T**2 / 2, dtype=torch.float64), 1e-12, 1e-12)
    clock = p.clock(times)
    low, high = noising.int_g2(torch.tensor([0.01, 0.9], dtype=torch.float64))
    span = high - low
    total = (RULES["clock_trapezoid"](p, times) * p.rate(times) * (a + b * clock)).sum()
    close(total, a * span + b * span**2 / 2, 1e-11, float(1e-12 * (span + span**2)))


@pytest.mark.parametrize("rule, order", [("left", 1), ("trapezoid", 2), ("clock_trapezoid", 2)])
@pytest.mark.parametrize("make", [grids.uniform, grids.log_snr])
def test_orders(rule, order, make):
    """The error on e^{t} cos(3t) falls as N^-order."""
    p = problem(VPLinear(1.0, 4.0), s_min=0.1)
    truth = quad(lambda t: math.exp(t) * math.cos(3 * t), 0, p.horizon, epsabs=1e-13)[0]
    steps = [80, 160, 320, 640]
    errors = []
    for n in steps:
        times = make(p, n)
        errors.append(float((RULES[rule](p, times) * torch.exp(times) * torch.cos(3 * times)).sum()) - truth)
    assert abs(fit_order(steps, errors) - order) < 0.1


@every
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_natural(noising, steps):
    """A quarter of the way from t_k = k T/N to the time at which lambda has gone k/N of its way; increasing, ends
    exact."""
    p = problem(noising)
    times = grids.natural(p, steps)
    assert times.dtype == torch.float64 and times.shape == (steps + 1,)
    assert float(times[0]) == 0.0 and float(times[-1]) == p.horizon
    p.check_times(times)
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    other = 4 * times - 3 * share * p.horizon
    ends = noising.log_snr(torch.tensor([0.9, 0.01], dtype=torch.float64))
    close(noising.log_snr(p.s(other)), ends[0] + share * (ends[1] - ends[0]), 1e-8, 1e-8)


@pytest.mark.parametrize("name", ["lq-1d", "lq-4d"])
def test_natural_is_uniform_without_a_noising(name):
    p = catalogue.get(name).problem
    assert torch.equal(grids.natural(p, 7), grids.uniform(p, 7))


ALMOST_HALF = 0.5 - 1e-9
"""Neighbours that both move this far towards each other keep 2e-9 of the step between them, against rounding of 1e-16
of the horizon and steps of at least 1e-4 of it."""


@given(steps=uneven, data=st.data())
def test_jitter(steps, data):
    """t_k + shift times the step on that side: strictly increasing whatever the shifts, with the ends in place; each
    node stays closer to where it was than half a step; the grid itself is left alone."""
    p = problem(VPLinear())
    times = grid(p, steps)
    before = times.clone()
    shifts = st.floats(-ALMOST_HALF, ALMOST_HALF)
    shift = torch.tensor(data.draw(st.lists(shifts, min_size=len(steps) - 1, max_size=len(steps) - 1)))
    moved = grids.jitter(times, shift)
    assert torch.equal(times, before)
    assert torch.equal(moved[[0, -1]], times[[0, -1]])
    p.check_times(moved)
    for k, v in enumerate(shift.tolist(), 1):
        step = times[k + 1] - times[k] if v > 0 else times[k] - times[k - 1]
        close(moved[k], times[k] + v * step)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("alternating", [False, True])
def test_jitter_at_its_worst(sign, alternating):
    """All nodes as far as they go to one side, or neighbours towards each other, on a grid of a thousand steps."""
    p = problem(VPLinear())
    shift = sign * ALMOST_HALF * (torch.tensor([1.0, -1.0]).repeat(500)[:999] if alternating else torch.ones(999))
    for times in (grids.uniform(p, 1000), grids.log_snr(p, 1000)):
        p.check_times(grids.jitter(times, shift))


def test_jitter_of_one_step_moves_nothing():
    times = torch.tensor([0.0, 0.7], dtype=torch.float64)
    assert torch.equal(grids.jitter(times, torch.zeros(0)), times)


@pytest.mark.parametrize(
    "shift",
    [
        torch.zeros(3),
        torch.zeros(1),
        torch.zeros(2, 1),
        torch.zeros(()),
        torch.tensor([0.5, 0.0]),
        torch.tensor([0.0, -0.5]),
        torch.tensor([0.0, math.inf]),
        torch.tensor([0.0, math.nan]),
    ],
    ids=str,
)
def test_jitter_refuses_what_could_fold_the_grid(shift):
    with pytest.raises(ValueError, match=r"shift must hold 2 numbers in \(-1/2, 1/2\)"):
        grids.jitter(torch.linspace(0, 1, 4), shift)
