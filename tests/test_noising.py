"""Noising processes against their defining equations: autograd, quadrature, published formulas, composition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from ctrl import VE, VP, RectifiedFlow, VPCosine, VPLinear, VPTable

EPS = torch.finfo(torch.float64).eps
SHORT = (0.02, 0.3, 0.05, 0.4, 0.01)
CASES = {
    "linear": VPLinear(),
    "constant": VPLinear(1.5, 1.5),
    "cosine": VPCosine(),
    "table": VPTable.scaled_linear(),
    "short": VPTable(SHORT),
    "zero-terminal": VPTable([0.01, 0.04, 0.2, 0.5, 1.0]),
    "ve": VE(),
    "rectified": RectifiedFlow(),
}
every = pytest.mark.parametrize("noising", CASES.values(), ids=CASES.keys())
vp = pytest.mark.parametrize(
    "noising", [n for n in CASES.values() if isinstance(n, VP)], ids=[k for k, n in CASES.items() if isinstance(n, VP)]
)
tables = st.lists(st.floats(1e-3, 0.9), min_size=2, max_size=8).map(VPTable)
processes = st.one_of(
    tables,
    st.tuples(st.floats(0.01, 2), st.floats(2, 30)).map(lambda p: VPLinear(*p)),
    st.floats(1e-3, 0.1).map(VPCosine),
    st.tuples(st.floats(1e-3, 0.5), st.floats(1, 100)).map(lambda p: VE(*p)),
    st.just(RectifiedFlow()),
)
"""Any process, with random parameters."""


def interior(noising, n=41):
    """n times strictly inside (0, s_max), none of them a node of a table."""
    return torch.linspace(0, 1, n + 2, dtype=torch.float64)[1:-1] * noising.s_max * math.cos(0.1)


def derivative(h, s):
    """dh/ds by autograd, elementwise."""
    s = s.clone().requires_grad_()
    y = h(s)
    return torch.autograd.grad(y.sum(), s)[0] if y.requires_grad else torch.zeros_like(s)


def close(a, b, rtol, atol=0.0):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@given(noising=processes)
def test_g2_and_f_by_autograd(noising):
    """g² = -sigma² dlambda/ds (arXiv 2107.00630), g² = dsigma²/ds - 2 f sigma², f = dlog alpha/ds."""
    s = interior(noising)
    sigma2 = noising.sigma(s).square()
    close(-sigma2 * derivative(noising.log_snr, s), noising.g2(s), 1e-8)
    close(derivative(lambda u: noising.sigma(u).square(), s) - 2 * noising.f(s) * sigma2, noising.g2(s), 1e-8)
    close(derivative(noising.log_alpha, s), noising.f(s), 1e-8, 1e-12)


def test_g2_and_f_of_stable_diffusion_by_autograd():
    noising = CASES["table"]
    s = interior(noising, 1500)
    close(-noising.sigma(s).square() * derivative(noising.log_snr, s), noising.g2(s), 1e-8)
    close(derivative(noising.log_alpha, s), noising.f(s), 1e-8)


@every
@pytest.mark.parametrize("fraction", [0.07, 0.31, 0.8])
def test_int_g2_is_the_integral_of_g2(noising, fraction):
    """int_g2(s) = integral of g² over [0, s], by scipy's adaptive quadrature."""
    s = fraction * noising.s_max
    kinks = None
    if isinstance(noising, VPTable):
        s = min(s, 0.15 if noising is CASES["table"] else 1.0)
        kinks = [k / len(noising.betas) for k in range(1, len(noising.betas)) if k / len(noising.betas) < s] or None
    truth, error = quad(
        lambda u: float(noising.g2(torch.tensor(u, dtype=torch.float64))),
        0,
        s,
        points=kinks,
        epsabs=0,
        epsrel=1e-11,
        limit=300,
    )
    assert error < 1e-9 * truth
    assert float(noising.int_g2(torch.tensor(s, dtype=torch.float64))) == pytest.approx(truth, rel=1e-9)


@given(noising=processes)
def test_log_snr_inverts_both_ways(noising):
    """s(lambda(s)) = s and lambda(s(lambda)) = lambda, to rounding: |ds| ~ eps |lambda/lambda'| + eps, and back."""
    s = interior(noising, 101)
    lam, slope = noising.log_snr(s), derivative(noising.log_snr, s).abs()
    back = noising.s_of_log_snr(lam)
    assert bool(((back - s).abs() <= 64 * EPS * (1 + (1 + lam.abs()) / slope)).all())
    lam = torch.linspace(float(lam[0]), float(lam[-1]), 101, dtype=torch.float64)
    s = noising.s_of_log_snr(lam)
    slope = derivative(noising.log_snr, s).abs()
    assert bool(((noising.log_snr(s) - lam).abs() <= 64 * EPS * (1 + lam.abs() + slope)).all())


@given(noising=tables)
def test_a_table_inverts_at_its_own_nodes(noising):
    """s(lambda) at a node, and for a scalar."""
    nodes = torch.arange(1, len(noising.betas), dtype=torch.float64) / len(noising.betas)
    lam, slope = noising.log_snr(nodes), derivative(noising.log_snr, nodes).abs()
    tolerance = 64 * EPS * (1 + (1 + lam.abs()) / slope)
    assert bool(((noising.s_of_log_snr(lam) - nodes).abs() <= tolerance).all())
    assert bool(((torch.stack([noising.s_of_log_snr(x) for x in lam]) - nodes).abs() <= tolerance).all())


def test_a_table_inverts_at_its_ends_where_g2_may_vanish():
    """s(G) at both ends; the monotone cubic is flat at an end whose cell rises less than a third of its neighbour's."""
    noising = VPTable([0.01, 0.5, 0.5, 0.01])
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    close(noising.g2(ends), torch.zeros(2, dtype=torch.float64), 0.0, 1e-12)
    # G is quadratic there, so that a rounding of G moves s by its square root
    close(noising.s_of_int_g2(noising.int_g2(ends)), ends, 0.0, 64 * EPS**0.5)
    assert float(noising.s_of_log_snr(torch.tensor(math.inf, dtype=torch.float64))) == 0.0


@given(noising=tables)
def test_a_table_passes_through_its_betas(noising):
    """alpha² at s = (k+1)/K is prod_{j<=k} (1 - beta_j), and g² has no jump there."""
    K = len(noising.betas)
    nodes = torch.arange(1, K + 1, dtype=torch.float64) / K
    abar = np.cumprod(1 - np.array(noising.betas))
    close(noising.alpha(nodes).square(), torch.from_numpy(abar), 1e-12)
    close(noising.sigma(nodes).square(), torch.from_numpy(1 - abar), 1e-12)
    # with 0 <= dG/du <= 3 Delta in every cell (Fritsch & Carlson), |d²G/du²| <= 36 max Delta
    cells, gap = nodes[:-1], 1e-7
    jump = noising.g2(cells + gap / K) - noising.g2(cells - gap / K)
    assert float(jump.abs().max()) <= 2 * gap * 36 * float(-np.log1p(-np.array(noising.betas)).min()) * K


def test_a_table_that_ends_in_zero_signal_loses_its_last_node():
    noising = CASES["zero-terminal"]
    assert noising.s_max == 4 / 5
    nodes = torch.arange(1, 5, dtype=torch.float64) / 5
    close(
        noising.alpha(nodes).square(),
        torch.tensor([0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.8, 0.99 * 0.96 * 0.4], dtype=torch.float64),
        1e-12,
    )
    s = torch.tensor(noising.s_max, dtype=torch.float64)
    assert all(math.isfinite(float(h(s))) for h in (noising.log_snr, noising.g2, noising.f))
    shortest = VPTable([0.5, 1.0])
    assert shortest.s_max == 0.5
    assert float(shortest.g2(s / 4)) == pytest.approx(2 * math.log(2), rel=1e-12)


def test_stable_diffusions_table_is_diffusers():
    """diffusers multiplies 1000 factors in float32, so the two differ by up to 1000 * 2 roundings."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    nodes = torch.arange(1, 1001, dtype=torch.float64) / 1000
    close(CASES["table"].alpha(nodes).square(), scheduler.alphas_cumprod.double(), 1000 * 2 * 2.0**-24)
    ratio = CASES["table"].sigma(nodes) / CASES["table"].alpha(nodes)
    close(ratio[[0, -1]], torch.tensor([0.0292, 14.6146], dtype=torch.float64), 2e-3)  # the range of its samplers


def test_published_formulas():
    """alpha and sigma as the papers state them: arXiv 2011.13456 (29, 33), arXiv 2102.09672 (17), arXiv 2209.03003."""
    s = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    log_alpha = -(s**2) * (20 - 0.1) / 4 - s * 0.1 / 2
    close(VPLinear().alpha(s), log_alpha.exp(), 1e-12)
    close(VPLinear().sigma(s), (1 - (2 * log_alpha).exp()).sqrt(), 1e-10)
    root_abar = torch.cos((s + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    close(VPCosine().alpha(s), root_abar, 1e-12)
    close(VE().sigma(s), 0.01 * (50 / 0.01) ** s, 1e-12)
    close(VE().alpha(s), torch.ones_like(s), 0.0)
    close(RectifiedFlow().alpha(s), 1 - s, 1e-12)
    close(RectifiedFlow().sigma(s), s, 0.0)


@vp
def test_vp_preserves_variance(noising):
    """alpha² + sigma² = 1, and lambda = log(alpha²/sigma²)."""
    s = interior(noising)
    close(noising.alpha(s).square() + noising.sigma(s).square(), torch.ones_like(s), 1e-14)
    alpha2 = noising.alpha(s).square()
    close(noising.log_snr(s), (alpha2 / (1 - alpha2)).log(), 1e-9, 1e-11)


@given(noising=processes)
def test_log_snr_falls_and_the_clock_rises(noising):
    s = interior(noising, 200)
    assert bool((noising.log_snr(s).diff() < 0).all())
    assert bool((noising.int_g2(s).diff() > 0).all())
    assert bool((noising.g2(s) > 0).all())
    assert float(noising.int_g2(torch.zeros((), dtype=torch.float64))) == 0


@given(noising=processes, cuts=st.tuples(*[st.floats(0.05, 1)] * 3))
def test_transitions_compose(noising, cuts):
    """X_{s0} -> X_{s1} -> X_{s2}: alpha_02 = alpha_12 alpha_01, v_02 = alpha_12² v_01 + v_12; so from the data, too."""
    s0, s1, s2 = (torch.as_tensor(cuts, dtype=torch.float64).cumsum(0) / 3 * noising.s_max).unbind()
    (a01, v01), (a02, v02) = noising.between(s1, float(s0)), noising.between(s2, float(s0))
    a12, v12 = noising.between(s2, float(s1))
    close(a12 * a01, a02, 1e-12)
    close(a12**2 * v01 + v12, v02, 1e-11)
    assert float(v01) > 0 and float(v12) > 0
    for start, end in ((s0, s1), (s0, s2), (s1, s2)):
        a, v = noising.between(end, float(start))
        close(a * noising.alpha(start), noising.alpha(end), 1e-12)
        close(a**2 * noising.sigma(start) ** 2 + v, noising.sigma(end) ** 2, 1e-11)
    clean = noising.between(s2)
    close(clean[0], noising.alpha(s2), 1e-15)
    close(clean[1], noising.sigma(s2) ** 2, 1e-15)


@every
@pytest.mark.parametrize("s0", [0.0, 0.13, 0.5])
def test_tweedie_at_its_own_time_is_the_state(noising, s0):
    """E[X_{s0} | X_{s0} = x] = x, at the clean end too."""
    x, score = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind(0)
    at = torch.tensor(s0, dtype=torch.float64)
    close(noising.tweedie(at, x, score, s0), x, 0.0)
    close(noising.tweedie(at.expand(3), x, score, s0), x, 0.0)


@every
@pytest.mark.parametrize("s0", [None, 0.0, 0.2])
def test_tweedie_is_the_posterior_mean_of_gaussian_data(noising, s0):
    """X ~ N(m, C): E[X_{s0} | X_s = x] = alpha_0 m + (alpha/alpha_0) C_0 C_s^-1 (x - alpha m), by joint Gaussianity."""
    m = torch.tensor([0.7, -1.2], dtype=torch.float64)
    C = torch.tensor([[1.3, 0.4], [0.4, 0.6]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    s = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    x = torch.tensor([[0.3, 2.0], [-1.0, 0.4], [5.0, -3.0]], dtype=torch.float64)
    start = None if s0 is None else torch.tensor(s0, dtype=torch.float64)
    alpha0, sigma0 = (1.0, 0.0) if start is None else (float(noising.alpha(start)), float(noising.sigma(start)))
    alpha, sigma = noising.alpha(s), noising.sigma(s)
    Cs = alpha[:, None, None] ** 2 * C + sigma[:, None, None] ** 2 * eye
    whitened = torch.linalg.solve(Cs, x - alpha[:, None] * m)
    C0 = alpha0**2 * C + sigma0**2 * eye
    truth = alpha0 * m + (alpha / alpha0)[:, None] * (whitened @ C0)
    close(noising.tweedie(s, x, -whitened, s0), truth, 1e-9, 1e-9)
    close(noising.tweedie(s[0], x[:1], -whitened[:1], s0), truth[:1], 1e-9, 1e-9)


@every
def test_float32_is_accurate_to_float32(noising):
    """|error| <= 32 eps32 (|y| + |y'|): the rounding of y, and that of s, of order one, through y."""
    s = interior(noising, 60).float()
    u = 32 * torch.finfo(torch.float32).eps
    s0 = float(s[0])
    for h in (
        noising.log_alpha,
        noising.alpha,
        noising.sigma,
        noising.f,
        noising.g2,
        noising.int_g2,
        noising.log_snr,
        lambda s: noising.between(s, s0)[0],
        lambda s: noising.between(s, s0)[1],
    ):
        y, exact, slope = h(s), h(s.double()), derivative(h, s.double())
        assert y.dtype == torch.float32 and bool(torch.isfinite(y).all())
        bound = u * (exact.abs() + torch.nan_to_num(slope).abs())
        assert bool(((y.double() - exact).abs() <= bound + 1e-30).all())
    lam = noising.log_snr(s.double()).float()
    back = noising.s_of_log_snr(lam)
    slope = derivative(noising.log_snr, s.double()).abs()
    assert back.dtype == torch.float32
    assert bool(((back.double() - noising.s_of_log_snr(lam.double())).abs() <= u * (1 + lam.abs() / slope)).all())
    x = torch.linspace(-2, 2, 60)[:, None].float()
    assert noising.tweedie(s, x, -x, s0).dtype == torch.float32
    close(noising.tweedie(s[:1], x[:1], -x[:1], s0), x[:1], 0.0)


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: VPLinear(0.0, 1.0), "g2_min"),
        (lambda: VPLinear(-1.0, 1.0), "g2_min"),
        (lambda: VPLinear(2.0, 1.0), "g2_max"),
        (lambda: VPLinear(0.1, math.nan), "g2_max"),
        (lambda: VPCosine(offset=0.0), "offset"),
        (lambda: VPCosine(s_max=1.0), "s_max"),
        (lambda: VPCosine(s_max=0.0), "s_max"),
        (lambda: VPTable([]), "betas"),
        (lambda: VPTable([0.1]), "betas"),
        (lambda: VPTable([[0.1, 0.2]]), "betas"),
        (lambda: VPTable([0.0, 0.1]), "betas"),
        (lambda: VPTable([0.1, 1.1]), "betas"),
        (lambda: VPTable([0.1, math.nan]), "betas"),
        (lambda: VPTable([0.1, 1.0, 0.2]), "betas may reach 1"),
        (lambda: VE(0.0, 1.0), "sigma_min"),
        (lambda: VE(1.0, 1.0), "sigma_max"),
        (lambda: VE(0.1, math.nan), "sigma_max"),
        (lambda: RectifiedFlow(s_max=1.0), "s_max"),
        (lambda: RectifiedFlow(s_max=0.0), "s_max"),
    ],
)
def test_invalid_arguments_are_named(make, name):
    with pytest.raises(ValueError, match=name):
        make()
