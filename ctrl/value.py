"""Critics: V(t, x) and its gradient, exact or learned behind one interface.

A plain network of (t, x, x0hat) learns its end, V(T, .) = r, from the targets there. The structured critic (arXiv
2502.01819) starts from the reward itself: at the data end V = r, and before it r at the reference's Tweedie mean x0hat
is a first guess, which a network corrects:

    V(t, x) = c_skip(u) r(x0hat(t, x)) + c_out(u) F(t, x, x0hat, cond),   u = 1 - t/T the time to go,
    c_skip(0) = 1, c_out(0) = 0, so that V(T, .) = r exactly (x0hat = x there).

A constant in the reward is no preference: with r + c in place of r

    V becomes V + e^{-rho (T - t)} c,   grad V, q and the greedy action stay what they are,

but a network would have to learn c, and on the way grad V would be wrong by as much as c is large. So a learned critic
carries a level m, the mean reward of the first epoch that it meets, and adds m_t = e^{-rho (T - t)} m to V:

    V = m_t + F,   V = m_t + c_skip(u) (r(x0hat) - m) + c_out(u) F,   V(T, .) = r as before.

With r + c the level is m + c, the target of V (`ctrl.evaluation`) and V both rise by e^{-rho (T - t)} c, and so the
residuals of F, its gradients and its weights are the same: r and r + c train alike, to the rounding of r + c. (A
learned stand-in takes the place of r - m.)

Between far modes x0hat turns sharply with x, and r(x0hat) with it: grad V then starts with an error that F has to
cancel, so the toy problems take the plain network. `benchmarks/algorithms.py` has both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ctrl.linop import same_shape
from ctrl.problem import Problem


class Critic(ABC):
    """V and grad V at times t (B,) and states x (B, *D)."""

    @abstractmethod
    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """V(t, x), (B,)."""

    def set_level(self, reward: Tensor) -> None:  # noqa: B027
        """`fit` calls this for a critic that it trains, before each epoch of learning, with that epoch's mean reward,
        (); an exact V has no level to set."""

    def value_given_reference(self, t: Tensor, x: Tensor, a_ref: Tensor, cond: Any = None) -> Tensor:
        """V(t, x), (B,), where a_ref(t, x), (B, *D'), is known: a critic that asks the reference may save the call."""
        return self.value(t, x, cond)

    def grad(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        """grad_x V(t, x), (B, *D), by automatic differentiation; a closed form may replace it."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = self.value(t, x, cond)
            grad = torch.autograd.grad(value.sum(), x, allow_unused=True)[0] if value.requires_grad else None
            if grad is None:
                raise ValueError(f"{type(self).__name__} is not differentiable in x: it has values, but no gradient")
            return grad


@dataclass(frozen=True)
class Skip:
    """The pair c_skip(u), c_out(u) of a structured critic, as functions of the time to go u in [0, 1]."""

    c_skip: Callable[[Tensor], Tensor]
    c_out: Callable[[Tensor], Tensor]


Network = Callable[[Tensor, Tensor, Tensor, Any], Tensor]
"""network(t, x, x0hat, cond) -> (B,): it may look at the noisy state, at the guess of where it ends, or at both."""

COSINE = Skip(lambda u: torch.cos(math.pi / 2 * u), lambda u: torch.sin(math.pi / 2 * u))
LINEAR = Skip(lambda u: 1 - u, lambda u: u)


class LearnedCritic(nn.Module, Critic):
    """A critic that looks at the state and at the reference's guess of where it ends.

    Attributes:
        level: m, (), zero until it is set; the state_dict has it.
        level_is_set: (), whether it is.
    """

    level: Tensor
    level_is_set: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        self.register_buffer("level", torch.zeros(()))
        self.register_buffer("level_is_set", torch.tensor(False))

    def set_level(self, reward: Tensor) -> None:
        """The first call sets m; later ones change nothing. For a network that knows the level of the reward already,
        call it with zero before `fit` does."""
        if not self.level_is_set:
            self.level.copy_(reward)
            self.level_is_set.fill_(True)

    def level_at(self, t: Tensor, x: Tensor) -> Tensor:
        """m_t = e^{-rho (T - t)} m, (B,), in the dtype of x."""
        return (torch.exp(self.problem.discount * (t - self.problem.horizon)) * self.level).to(x.dtype)

    @abstractmethod
    def combine(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any) -> Tensor:
        """V, (B,)."""

    def value(self, t: Tensor, x: Tensor, cond: Any = None) -> Tensor:
        return self.value_given_reference(t, x, self.problem.reference(t, x, cond), cond)

    def value_given_reference(self, t: Tensor, x: Tensor, a_ref: Tensor, cond: Any = None) -> Tensor:
        return self.combine(t, x, self.problem.endpoint(t, x, a_ref), cond)


class NetworkCritic(LearnedCritic):
    """V = m_t + F(t, x, x0hat, cond), a network and the level."""

    def __init__(self, problem: Problem, network: Network) -> None:
        super().__init__(problem)
        self.network = network

    def combine(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any) -> Tensor:
        level, correction = self.level_at(t, x), self.network(t, x, x0hat, cond)
        same_shape(network=correction, level=level)
        return level + correction


class StructuredCritic(LearnedCritic):
    """V = m_t + c_skip(u) (r(x0hat) - m) + c_out(u) F(t, x, x0hat, cond).

    Args:
        network: F, (t, x, x0hat, cond) -> (B,).
        reward: stands in for r - m where the reward is not differentiable: a module (x, cond) -> (B,), trained with F,
            since V is fitted to the reward itself at t = T.
    """

    def __init__(
        self, problem: Problem, network: Network, skip: Skip = COSINE, reward: nn.Module | None = None
    ) -> None:
        super().__init__(problem)
        self.network, self.skip = network, skip
        self.stand_in = reward  # the problem's own reward is not the critic's to train, even if it is a module
        self.asked = 0  # how often the problem's own was asked, since somebody last looked

    def combine(self, t: Tensor, x: Tensor, x0hat: Tensor, cond: Any) -> Tensor:
        u = (1 - t / self.problem.horizon).clamp(0, 1).to(x.dtype)
        if self.stand_in is None:
            self.asked += len(x)
            reward = self.problem.reward(x0hat, cond) - self.level
        else:
            reward = self.stand_in(x0hat, cond)
        correction = self.network(t, x, x0hat, cond)
        same_shape(reward=reward, network=correction, u=u)
        if torch.is_grad_enabled() and x.requires_grad and not reward.requires_grad:  # or grad V lacks its part
            raise ValueError(
                "the reward is not differentiable in x, so V has values, but no gradient: give StructuredCritic a "
                "learned stand-in, reward=module(x, cond) -> (B,)"
            )
        return self.level_at(t, x) + self.skip.c_skip(u) * reward + self.skip.c_out(u) * correction
