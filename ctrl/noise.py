"""Randomness keyed by (seed, epoch, global sample id): the same numbers on 1, 2 or 4 processes, and on any grid.

A counter-based generator: every normal is a hash of its own address, so no state is carried and any subset of
samples can be drawn in any order, on any device. No library gives this for torch; the hash is the finaliser of
SplitMix64 (Steele, Lea & Flood 2014), applied once per level of the address, and normals are the inverse Gaussian
distribution function of 52 bits (so |xi| < 8.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB

INITIAL, PATH, ACTION, GRID, FORWARD = range(5)
"""First words of an address: the initial state, the driving noise, exploration (by step: actions have no path), what an
epoch draws for all samples at once, and the noise of ends that are noised anew."""
_AT_ONCE = 1 << 16
"""Numbers of the driving noise: small steps are drawn together, up to this many."""


def _mix_word(z: int) -> int:
    """SplitMix64's finaliser on one 64-bit word."""
    z = (z ^ z >> 30) * _MIX1 & _WORD
    z = (z ^ z >> 27) * _MIX2 & _WORD
    return z ^ z >> 31


def _signed(z: int) -> int:
    """The int64 with the same bits: torch has no arithmetic on unsigned words."""
    return z - (1 << 64) if z >> 63 else z


def _mix(z: Tensor) -> Tensor:
    """The same on int64, wrapping; `>>` is arithmetic there, so the copied sign bits are masked off."""
    z = (z ^ (z >> 30).bitwise_and_(_WORD >> 30)).mul_(_signed(_MIX1))
    z = z.bitwise_xor_((z >> 27).bitwise_and_(_WORD >> 27)).mul_(_signed(_MIX2))
    return z.bitwise_xor_((z >> 31).bitwise_and_(_WORD >> 31))


@lru_cache(maxsize=16)
def _elements(n: int, device: torch.device) -> Tensor:
    """The hashes of the places 1 ... n within a sample, (n,)."""
    return _mix(torch.arange(1, n + 1, device=device) * _signed(_GOLDEN))


@dataclass(frozen=True)
class Noise:
    """Independent standard normals for every (seed, epoch, sample id, address).

    `fine` is the grid on which the driving path is made, (M+1,) times; every rollout grid must be a subset of it, so
    that coarse and fine runs see one path. Without it each rollout makes its path on its own grid.
    """

    seed: int
    epoch: int = 0
    fine: Tensor | None = None

    def word(self, *address: int) -> int:
        """64 bits that belong to (seed, epoch, address) and to no sample."""
        key = 0
        for word in (self.seed, self.epoch, *address):
            key = _mix_word((key ^ word) + _GOLDEN & _WORD)
        return key

    def uniform(self, ids: Tensor, shape: Sequence[int], *address: int) -> Tensor:
        """Uniform on (0, 1), float64, (B, *shape); ids: (B,) int64."""
        return self._uniforms(ids, shape, [address])[0]

    def _uniforms(self, ids: Tensor, shape: Sequence[int], addresses: Iterable[Sequence[int]]) -> Tensor:
        """The same at K addresses, (K, B, *shape)."""
        if ids.ndim != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be a 1-D int64 tensor, got {ids.dtype} of shape {tuple(ids.shape)}")
        words = torch.tensor([_signed(self.word(*address)) for address in addresses]).to(ids.device, non_blocking=True)
        sample = _mix(_mix(ids + _signed(_GOLDEN)) ^ words[:, None])
        bits = _mix(sample[..., None] ^ _elements(math.prod(shape), ids.device))
        fraction = (bits >> 12).bitwise_and_(_WORD >> 12).double()
        return fraction.add_(0.5).mul_(2.0**-52).reshape(*sample.shape, *shape)  # exact; 53 bits would round up to 1

    def normal(self, ids: Tensor, shape: Sequence[int], *address: int) -> Tensor:
        """Standard normals, float64, (B, *shape)."""
        return self._normals(ids, shape, [address])[0]

    def _normals(self, ids: Tensor, shape: Sequence[int], addresses: Iterable[Sequence[int]]) -> Tensor:
        """The same at K addresses, (K, B, *shape)."""
        return torch.special.ndtri(self._uniforms(ids, shape, addresses))

    def path(
        self, ids: Tensor, shape: Sequence[int], times: Tensor, clock: Callable[[Tensor], Tensor]
    ) -> Iterator[Tensor]:
        """Yield xi_k, (B, *shape): the increments of one Brownian path W in `clock` over the grid, standardised.

        W(clock(t_{k+1})) - W(clock(t_k)) = sqrt(clock(t_{k+1}) - clock(t_k)) xi_k. A coarse increment is exactly the
        sum of the fine ones it spans.
        """
        fine = (times if self.fine is None else self.fine.to(times)).contiguous()
        index = torch.searchsorted(fine, times.contiguous())
        if not torch.equal(fine[index.clamp(max=len(fine) - 1)], times):
            raise ValueError("times must be a subset of the noise's `fine` grid, so that both see one path")
        elapsed, nodes = clock(fine), index.tolist()
        draws = self._draws(ids, shape, range(nodes[0], nodes[-1]))
        for first, last in pairwise(nodes):
            if last == first + 1:
                yield next(draws)
                continue
            share = (elapsed[first : last + 1].diff() / (elapsed[last] - elapsed[first])).sqrt().tolist()
            yield torch.stack([w * next(draws) for w in share]).sum(0)

    def _draws(self, ids: Tensor, shape: Sequence[int], steps: range) -> Iterator[Tensor]:
        """The normals of the driving noise step by step."""
        many = max(_AT_ONCE // max(len(ids) * math.prod(shape), 1), 1)
        for first in range(0, len(steps), many):
            yield from self._normals(ids, shape, [(PATH, m) for m in steps[first : first + many]])
