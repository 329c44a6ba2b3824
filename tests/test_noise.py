"""The counter-based generator: the published hash, keyed reproducibility, distribution, independence, nesting.

Statistics are z-scores on fixed seeds; all of them together raise a false alarm with probability at most 1e-6.
"""

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import ctrl.noise
from ctrl import Estimate, Noise, z_bound
from ctrl.noise import ACTION, GRID, INITIAL, PATH

N = 2**16
BITS = 52
BOUND = z_bound(400)
"""Fewer than 400 z-scores and p-values are computed in this file."""
words = st.integers(-(2**62), 2**62)


def draw(n=N, shape=(3,), seed=7, epoch=0, address=(PATH, 0), first=0):
    return Noise(seed, epoch).normal(torch.arange(first, first + n), shape, *address)


def assert_zero(samples):
    """The mean of independent rows is zero."""
    assert float(Estimate.of(samples).z(0.0).abs().max()) < BOUND


def splitmix64(z):
    """The finaliser as printed by Steele, Lea & Flood (2014), in exact integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def signed(z):
    return (z + 2**63) % 2**64 - 2**63


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_mix_is_splitmix64(values):
    """int64 with masked arithmetic shifts equals unsigned 64-bit arithmetic."""
    truth = [signed(splitmix64(v % 2**64)) for v in values]
    mixed = ctrl.noise._mix(torch.tensor(values)).tolist()
    assert mixed == truth


def test_mix_gives_the_published_stream():
    """The first numbers of SplitMix64 from state 1234567 (Vigna's reference implementation)."""
    golden = 0x9E3779B97F4A7C15
    stream = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = torch.tensor([signed((1234567 + k * golden) % 2**64) for k in range(1, 6)])
    assert [v % 2**64 for v in ctrl.noise._mix(states).tolist()] == stream


@given(seed=words, epoch=words, ids=st.lists(st.integers(0, 2**40), min_size=1), address=st.tuples(words, words))
def test_a_number_depends_on_its_address_alone(seed, epoch, ids, address):
    """Any subset in any order, and any way of shaping the elements, gives the same numbers."""
    noise, ids = Noise(seed, epoch), torch.tensor(ids)
    x = noise.normal(ids, (2, 3), *address)
    assert x.shape == (len(ids), 2, 3) and x.dtype == torch.float64
    order = torch.arange(len(ids)).flip(0)
    assert torch.equal(Noise(seed, epoch).normal(ids[order], (2, 3), *address), x[order])
    assert torch.equal(torch.cat([noise.normal(i[None], (2, 3), *address) for i in ids]), x)
    assert torch.equal(noise.normal(ids, (6,), *address).reshape(x.shape), x)
    assert torch.equal(noise.normal(ids, (), *address), x[:, 0, 0])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_see_the_same_numbers(processes):
    """Rows split over processes, contiguous or strided, are the rows of one process; paths, too."""
    ids, whole = torch.arange(100, 108), draw(8, (2,), first=100)
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    path = torch.stack(list(Noise(7).path(ids, (2,), times, lambda t: t)))
    for rank in range(processes):
        for mine in (torch.arange(8).chunk(processes)[rank], torch.arange(8)[rank::processes]):
            assert torch.equal(Noise(7).normal(ids[mine], (2,), PATH, 0), whole[mine])
            assert torch.equal(torch.stack(list(Noise(7).path(ids[mine], (2,), times, lambda t: t))), path[:, mine])


def test_every_word_of_the_address_counts():
    """Seed, epoch, address, its order and its length, sample and element: no two numbers agree."""
    ids = torch.arange(16)
    addresses = ((), (INITIAL,), (PATH, 0), (PATH, 1), (ACTION, 1), (0, PATH))
    keys = itertools.product((0, 1, -1, 2**62), (0, 1, 2), addresses)
    draws = [Noise(seed, epoch).uniform(ids, (4,), *address) for seed, epoch, address in keys]
    numbers = torch.stack(draws).flatten()
    assert len(numbers.unique()) == len(numbers) == 72 * 64
    assert len({INITIAL, PATH, ACTION, GRID}) == 4
    many = draw(2**14, (4,)).flatten()  # a collision among 2^16 of 2^52 values: probability 5e-7
    assert len(many.unique()) == len(many)


def test_uniform_is_strictly_inside():
    """The extreme words map to 2^-53 and 1 - 2^-53, where the normal is finite: |xi| < 8.3, and symmetric."""
    ids = torch.arange(3)
    words = {-1: 1 - 2.0**-53, 0: 2.0**-53, 2**63 - 1: 0.5 - 2.0**-53, -(2**63): 0.5 + 2.0**-53}
    for word, u in words.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ctrl.noise, "_mix", lambda z, word=word: torch.full_like(z, word))
            uniform, normal = Noise(0).uniform(ids, (2,)), Noise(0).normal(ids, (2,))
        assert bool((uniform == u).all())
        assert bool((normal.abs() < 8.3).all())


def test_normals_are_quantiles():
    """Phi(xi) = u, increasing."""
    u = Noise(7).uniform(torch.arange(1000), (3,), PATH, 0)
    torch.testing.assert_close(torch.special.ndtr(draw(1000)), u, rtol=1e-12, atol=0)


def test_moments():
    """Mean, variance, skewness and kurtosis of the normals, each coordinate."""
    x = draw()
    for power, truth in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert_zero(x**power - truth)


@pytest.mark.parametrize("key", [{}, {"seed": 0}, {"epoch": 3}, {"address": (INITIAL,)}, {"shape": (), "first": 2**33}])
def test_kolmogorov_smirnov(key):
    """The whole distribution, against the normal's."""
    assert stats.kstest(draw(**key).flatten()[:N].numpy(), "norm").pvalue > 1e-6 / 400


def test_every_bit_is_fair():
    """Each of the bits of a uniform is a fair coin, independent of the next bit and of the sample's own parity."""
    ids = torch.arange(N)
    bits = (Noise(5).uniform(ids, (), PATH, 0) * 2.0**BITS).floor().long()
    coins = 2.0 * (bits[:, None] >> torch.arange(BITS) & 1) - 1
    assert_zero(coins)
    assert_zero(coins[:, 1:] * coins[:, :-1])
    assert_zero(coins * (2 * (ids % 2) - 1)[:, None])


PAIRS = {
    "ids": lambda: (draw(N + 1)[1:], draw()),
    "distant ids": lambda: (draw(first=2**32), draw()),
    "steps": lambda: (draw(address=(PATH, 1)), draw()),
    "dimensions": lambda: (draw(shape=(4,))[:, 1:], draw()),
    "diagonal": lambda: (draw(N + 1, shape=(4,))[1:, 1:], draw()),
    "seeds": lambda: (draw(seed=8), draw()),
    "epochs": lambda: (draw(epoch=1), draw()),
    "seed and epoch": lambda: (draw(seed=1, epoch=2), draw(seed=2, epoch=1)),
    "purposes": lambda: (draw(address=(ACTION, 0)), draw()),
    "lengths": lambda: (draw(address=(PATH,)), draw()),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
def test_neighbours_are_independent(pair):
    """E xy = 0, E (x² - 1)(y² - 1) = 0 and E x² y = 0 for neighbouring addresses."""
    x, y = pair()
    assert_zero(x * y)
    assert_zero((x**2 - 1) * (y**2 - 1))
    assert_zero((x**2 - 1) * y)


def test_a_sum_over_ids_has_the_variance_of_independent_terms():
    """Blocks of 64 consecutive samples: the block sums have variance 64 (no drift, no lattice)."""
    sums = draw().reshape(-1, 64, 3).sum(1) / 8
    assert_zero(sums)
    assert_zero(sums**2 - 1)


def clock(t):
    return t + t**2


def grid_of(steps):
    return torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)


@given(steps=st.lists(st.floats(0.01, 1), min_size=2, max_size=10), data=st.data())
def test_coarse_increments_are_sums_of_fine_ones(steps, data):
    """W on a coarse grid is W on the fine one, for any nested grid that need not start or end with it."""
    fine = grid_of(steps)
    chosen = data.draw(st.sets(st.integers(0, len(steps)), min_size=2).map(sorted))
    noise, ids = Noise(3, fine=fine), torch.arange(4)
    dW = torch.stack(
        [
            math.sqrt(float(span)) * xi
            for span, xi in zip(clock(fine).diff(), noise.path(ids, (2,), fine, clock), strict=True)
        ]
    )
    assert torch.equal(
        torch.stack(list(noise.path(ids, (2,), fine, clock))), torch.stack(list(Noise(3).path(ids, (2,), fine, clock)))
    )
    coarse = fine[chosen]
    xi = list(noise.path(ids, (2,), coarse, clock))
    assert len(xi) == len(coarse) - 1
    for first, last, z in zip(chosen, chosen[1:], xi, strict=False):
        span = float(clock(fine[last]) - clock(fine[first]))
        torch.testing.assert_close(math.sqrt(span) * z, dW[first:last].sum(0), rtol=1e-14, atol=1e-13)


def test_increments_are_standard_and_independent():
    """On a coarse grid with uneven fine steps each xi has mean 0, variance 1, and no correlation with its neighbour."""
    fine = grid_of([0.1, 0.5, 0.01, 0.3, 0.7, 0.2])
    first, second = Noise(11, fine=fine).path(torch.arange(N), (2,), fine[[0, 3, 6]], clock)
    assert_zero(first), assert_zero(second)
    assert_zero(first**2 - 1), assert_zero(second**2 - 1)
    assert_zero(first * second)


@pytest.mark.parametrize("times", [[0.0, 0.3, 1.0], [0.0, 0.5, 1.25], [-0.5, 0.5], [0.0, 0.5 + 1e-12]])
def test_a_grid_that_is_not_nested_is_refused(times):
    noise = Noise(0, fine=torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="`fine`"):
        list(noise.path(torch.arange(2), (1,), torch.tensor(times, dtype=torch.float64), clock))


@pytest.mark.parametrize(
    "ids", [torch.arange(3).int(), torch.arange(3.0), torch.arange(4).reshape(2, 2), torch.tensor(1)]
)
def test_ids_are_a_list_of_int64(ids):
    with pytest.raises(ValueError, match="ids must be a 1-D int64 tensor"):
        Noise(0).normal(ids, (2,))


@given(seed=words, epoch=words, address=st.lists(words, max_size=3))
def test_word_folds_the_address(seed, epoch, address):
    """key <- splitmix64((key ^ word) + golden) over (seed, epoch, *address), from 0, in 64 bits."""
    key = 0
    for word in (seed, epoch, *address):
        key = splitmix64(((key ^ word % 2**64) + 0x9E3779B97F4A7C15) % 2**64)
    assert Noise(seed, epoch).word(*address) == key
    assert 0 <= key < 2**64


def test_no_two_words_agree():
    """They differ by seed, by epoch, by address, by its order and by its length; the grid `fine` does not matter."""
    addresses = ((), (GRID,), (GRID, 0), (GRID, 1), (0, GRID), (PATH,), (GRID, 1, 1))
    keys = list(itertools.product((0, 1, -1, 2**62), range(50), addresses))
    assert len({Noise(seed, epoch).word(*address) for seed, epoch, address in keys}) == len(keys)
    assert Noise(3, 4, torch.zeros(2)).word(GRID) == Noise(3, 4).word(GRID)


def test_bits_of_words_are_fair():
    """Each of the 64 bits over epochs, and independent from one epoch to the next."""
    values = [Noise(5, epoch).word(GRID) for epoch in range(2**12)]
    coins = torch.tensor([[float(value >> i & 1) for i in range(64)] for value in values]) * 2 - 1
    assert_zero(coins)
    assert_zero(coins[1:] * coins[:-1])


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 40))
def test_a_path_is_made_of_its_steps_own_numbers_however_many_are_drawn_together(samples, steps, at_once):
    ids, times = torch.arange(samples), torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    with patch.object(ctrl.noise, "_AT_ONCE", at_once):
        path = list(Noise(3).path(ids, (2,), times, lambda t: t))
    assert len(path) == steps
    for k, xi in enumerate(path):
        assert torch.equal(xi, Noise(3).normal(ids, (2,), PATH, k))
