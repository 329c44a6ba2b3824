"""Noising processes: X_s = alpha(s) X_0 + sigma(s) eps on the forward clock s in [0, 1] (0 = data).

With f = d log alpha/ds and g² = d sigma²/ds - 2 f sigma² the process solves dX = f X ds + g dW. Writing
lambda = log(alpha²/sigma²) for the log signal-to-noise ratio,

    g² = -sigma² dlambda/ds                                                  (Kingma et al. 2021, arXiv 2107.00630)

so lambda is the natural clock. Between two times s0 < s the process is a noising of the same kind,
X_s = alpha(s)/alpha(s0) X_{s0} + N(0, sigma(s)² (1 - e^{lambda(s) - lambda(s0)})), which makes a problem cut at
s_min > 0 an exact problem in its own right, whose data are X_{s_min}.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ctrl.linop import broadcast


class Noising(ABC):
    """alpha, sigma, g², log-SNR and its inverse; every method takes s of any shape and works elementwise."""

    s_max: float = 1.0
    """The end of the clock: lambda and g² are finite up to here."""

    @abstractmethod
    def log_alpha(self, s: Tensor) -> Tensor:
        """log alpha(s)."""

    @abstractmethod
    def sigma(self, s: Tensor) -> Tensor:
        """sigma(s)."""

    @abstractmethod
    def f(self, s: Tensor) -> Tensor:
        """d log alpha / ds."""

    @abstractmethod
    def g2(self, s: Tensor) -> Tensor:
        """g(s)²."""

    @abstractmethod
    def int_g2(self, s: Tensor) -> Tensor:
        """The integral of g² from 0 to s: the clock in which the noise is constant."""

    @abstractmethod
    def s_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """The s at which lambda(s) = log_snr."""

    def alpha(self, s: Tensor) -> Tensor:
        """alpha(s)."""
        return self.log_alpha(s).exp()

    def log_snr(self, s: Tensor) -> Tensor:
        """lambda(s) = log alpha(s)²/sigma(s)²."""
        return 2 * (self.log_alpha(s) - self.sigma(s).log())

    def between(self, s: Tensor, s0: float | None = None) -> tuple[Tensor, Tensor]:
        """(alpha, sigma²) of X_s given X_{s0}: X_s = alpha X_{s0} + sigma eps. Without s0: given the clean data."""
        if s0 is None:
            return self.alpha(s), self.sigma(s).square()
        start = s.new_full((), s0)
        alpha = (self.log_alpha(s) - self.log_alpha(start)).exp()
        variance = -self.sigma(s).square() * torch.expm1(self.log_snr(s) - self.log_snr(start))
        return alpha, torch.where(s == start, torch.zeros_like(s), variance)  # lambda is infinite at clean data

    def tweedie(self, s: Tensor, x: Tensor, score: Tensor, s0: float | None = None) -> Tensor:
        """x0hat = E[X_{s0} | X_s = x] = (x + sigma² score) / alpha, alpha and sigma taken between s0 and s.

        At s = s0 it is x itself, whatever the score. s: () or (B,); x, score: (B, *D).
        """
        alpha, variance = (broadcast(c.to(x.dtype), x) for c in self.between(s, s0))
        return (x + variance * torch.where(variance > 0, score, torch.zeros_like(score))) / alpha


class VP(Noising):
    """Variance preserving: sigma² = 1 - alpha², f = -g²/2; everything follows from G(s), the integral of g².

    log alpha = -G/2, sigma² = 1 - e^{-G}, lambda = -log(e^G - 1).  (Song et al. 2021, arXiv 2011.13456)
    """

    @abstractmethod
    def s_of_int_g2(self, G: Tensor) -> Tensor:
        """The inverse of int_g2."""

    def log_alpha(self, s: Tensor) -> Tensor:
        return -self.int_g2(s) / 2

    def sigma(self, s: Tensor) -> Tensor:
        return (-torch.expm1(-self.int_g2(s))).sqrt()

    def f(self, s: Tensor) -> Tensor:
        return -self.g2(s) / 2

    def log_snr(self, s: Tensor) -> Tensor:
        return -torch.expm1(self.int_g2(s)).log()

    def between(self, s: Tensor, s0: float | None = None) -> tuple[Tensor, Tensor]:
        span = self.int_g2(s)
        if s0 is not None:
            span = span - self.int_g2(s.new_full((), s0))
        return (-span / 2).exp(), -torch.expm1(-span)

    def s_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return self.s_of_int_g2(torch.logaddexp(torch.zeros_like(log_snr), -log_snr))


@dataclass(frozen=True)
class VPLinear(VP):
    """g² linear in s, from g2_min to g2_max; equal values give constant noise."""

    g2_min: float = 0.1
    g2_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.g2_min <= self.g2_max:
            raise ValueError(f"g2_min and g2_max must satisfy 0 < g2_min <= g2_max, got {self.g2_min}, {self.g2_max}")

    def g2(self, s: Tensor) -> Tensor:
        return self.g2_min + (self.g2_max - self.g2_min) * s

    def int_g2(self, s: Tensor) -> Tensor:
        return s * (self.g2_min + (self.g2_max - self.g2_min) / 2 * s)

    def s_of_int_g2(self, G: Tensor) -> Tensor:
        slope = self.g2_max - self.g2_min
        return 2 * G / (self.g2_min + (self.g2_min**2 + 2 * slope * G).sqrt())


@dataclass(frozen=True)
class VPCosine(VP):
    """alpha = cos(phi(s)) / cos(phi(0)), phi = (pi/2) (s + offset)/(1 + offset) (Nichol & Dhariwal 2021).

    g² is infinite at s = 1, where alpha = 0: the process is cut at s_max.
    """

    offset: float = 0.008
    s_max: float = 0.999

    def __post_init__(self) -> None:
        if not (self.offset > 0 and 0 < self.s_max < 1):
            raise ValueError(f"offset must be > 0 and s_max in (0, 1), got {self.offset}, {self.s_max}")

    def _phi(self, s: Tensor) -> Tensor:
        return (math.pi / 2) * (s + self.offset) / (1 + self.offset)

    @property
    def _phi0(self) -> float:
        return (math.pi / 2) * self.offset / (1 + self.offset)

    def g2(self, s: Tensor) -> Tensor:
        return math.pi / (1 + self.offset) * torch.tan(self._phi(s))

    def int_g2(self, s: Tensor) -> Tensor:
        # -2 log[cos(phi)/cos(phi0)] = -2 log(1 + d), d = -2 sin((phi+phi0)/2) sin((phi-phi0)/2) / cos(phi0): no
        # cancellation
        phi, phi0 = self._phi(s), self._phi0
        d = -2 * torch.sin((phi + phi0) / 2) * torch.sin((phi - phi0) / 2) / math.cos(phi0)
        return -2 * torch.log1p(d)

    def s_of_int_g2(self, G: Tensor) -> Tensor:
        phi0 = self._phi0
        cos2 = math.cos(phi0) ** 2
        sin2 = math.sin(phi0) ** 2 - cos2 * torch.expm1(-G)
        phi = torch.atan2(sin2.sqrt(), math.cos(phi0) * torch.exp(-G / 2))
        return phi * (2 / math.pi) * (1 + self.offset) - self.offset


@dataclass(frozen=True)
class VPTable(VP):
    """A table of discrete betas made continuous: timestep k = 0 ... K-1 of a discrete scheduler sits at s = (k+1)/K.

    There G = -log prod_{j<=k} (1 - beta_j) exactly; in between G is the monotone cubic (Fritsch & Carlson 1980), so
    that g² = dG/ds is continuous: no jump in the noise. The network's own time is k = K s - 1. A table that ends in
    zero signal (beta = 1, "zero-terminal SNR") loses that node, and s_max is the node before it.
    """

    betas: Sequence[float]
    s_max: float = field(init=False)
    _G: Tensor = field(init=False, repr=False, compare=False)
    _cells: dict[torch.device, Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from scipy.interpolate import PchipInterpolator  # only here: a table is read once

        betas = torch.as_tensor(self.betas, dtype=torch.float64)
        if betas.ndim != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError("betas must be a sequence of at least two numbers in (0, 1]")
        if bool((betas[:-1] == 1).any()):
            raise ValueError("betas may reach 1 (zero signal) only at the last entry")
        G = torch.cat([torch.zeros(1, dtype=torch.float64), -torch.log1p(-betas).cumsum(0)])
        G = G[torch.isfinite(G)]
        cells = PchipInterpolator(torch.arange(len(G)).numpy(), G.numpy()).c
        object.__setattr__(self, "betas", tuple(betas.tolist()))
        object.__setattr__(self, "s_max", (len(G) - 1) / len(betas))
        object.__setattr__(self, "_G", G)
        object.__setattr__(self, "_cells", {G.device: torch.from_numpy(cells[::-1].T.copy())})

    @staticmethod
    def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> VPTable:
        """Stable Diffusion's table: sqrt(beta) linear in k (Rombach et al. 2022, arXiv 2112.10752)."""
        return VPTable(torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square().tolist())

    def _cubic(self, i: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """G and dG/du at the fraction u of cell i."""
        if u.device not in self._cells:  # the table travels once
            self._cells[u.device] = self._cells[self._G.device].to(u.device)
        rows = self._cells[u.device][i.flatten()].view(*i.shape, 4)  # an index () would be read from the device
        c0, c1, c2, c3 = rows.to(u.dtype).unbind(-1)
        return c0 + u * (c1 + u * (c2 + u * c3)), c1 + u * (2 * c2 + u * 3 * c3)

    def _at(self, s: Tensor) -> tuple[Tensor, Tensor]:
        x = s * len(self.betas)
        i = x.floor().long().clamp(0, len(self._G) - 2)
        return self._cubic(i, x - i)

    def int_g2(self, s: Tensor) -> Tensor:
        return self._at(s)[0]

    def g2(self, s: Tensor) -> Tensor:
        return self._at(s)[1] * len(self.betas)

    def s_of_int_g2(self, G: Tensor) -> Tensor:
        nodes = self._G.to(G)
        i = (torch.searchsorted(nodes, G.contiguous(), right=True) - 1).clamp(0, len(self._G) - 2)
        low, high = torch.zeros_like(G), torch.ones_like(G)
        u = (G - nodes[i]) / (nodes[i + 1] - nodes[i])
        for _ in range(60):  # Newton kept inside a bracket: the cubic is monotone in its cell
            value, slope = self._cubic(i, u)
            low, high = torch.where(value < G, u, low), torch.where(value < G, high, u)
            newton = u - (value - G) / slope
            step = torch.where((newton > low) & (newton < high), newton, (low + high) / 2)
            if torch.equal(step, u):
                break
            u = step
        return (i + u) / len(self.betas)


@dataclass(frozen=True)
class VE(Noising):
    """Variance exploding: alpha = 1, sigma = sigma_min^(1-s) sigma_max^s (Song et al. 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max, "
                f"got {self.sigma_min}, {self.sigma_max}"
            )

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def log_alpha(self, s: Tensor) -> Tensor:
        return torch.zeros_like(s)

    def sigma(self, s: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._log_ratio * s)

    def f(self, s: Tensor) -> Tensor:
        return torch.zeros_like(s)

    def g2(self, s: Tensor) -> Tensor:
        return 2 * self._log_ratio * self.sigma(s).square()

    def int_g2(self, s: Tensor) -> Tensor:
        return self.sigma_min**2 * torch.expm1(2 * self._log_ratio * s)

    def s_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return (-log_snr / 2 - math.log(self.sigma_min)) / self._log_ratio


@dataclass(frozen=True)
class RectifiedFlow(Noising):
    """The straight path alpha = 1 - s, sigma = s (Liu et al. 2022, arXiv 2209.03003); cut at s_max < 1."""

    s_max: float = 0.999

    def __post_init__(self) -> None:
        if not 0 < self.s_max < 1:
            raise ValueError(f"s_max must lie in (0, 1), because g² is infinite at s = 1; got {self.s_max}")

    def log_alpha(self, s: Tensor) -> Tensor:
        return torch.log1p(-s)

    def sigma(self, s: Tensor) -> Tensor:
        return s

    def f(self, s: Tensor) -> Tensor:
        return -1 / (1 - s)

    def g2(self, s: Tensor) -> Tensor:
        return 2 * s / (1 - s)

    def int_g2(self, s: Tensor) -> Tensor:
        return -2 * (s + torch.log1p(-s))

    def s_of_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2)
