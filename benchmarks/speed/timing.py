"""Times taken side by side, the network passes that a piece of work contains, and where the rest of it goes.

A ratio is the median over pairs of runs, A B A B ...: the two of a pair see much the same machine.
"""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

if TYPE_CHECKING:  # in the environment of a peer it cannot be imported
    from benchmarks.report import Row

# ------------------------------------------------------------------------------------------ side by side


def wait() -> None:
    """Until the accelerator has done what it was asked for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(f: Callable[[], object]) -> float:
    """Wall-clock time of one call; what it returns is let go after the clock has stopped."""
    wait()
    began = time.perf_counter()
    kept = f()
    wait()
    elapsed = time.perf_counter() - began
    del kept
    return elapsed


@dataclass(frozen=True)
class Comparison:
    """Run `ours` against `other`.

    Attributes:
        bar: what the ratio of their times may be at most.
        about: what else the record says.
    """

    panel: str
    case: str
    ours: Callable[[], object]
    other: Callable[[], object]
    bar: float | None = None
    about: Row = field(default_factory=dict)

    def row(self, pairs: Sequence[tuple[float, float]]) -> Row:
        """The record of all pairs."""
        return {
            "panel": self.panel, "case": self.case, **ratio([a / b for a, b in pairs], self.bar),
            "seconds": median(a for a, _ in pairs), "repeats": len(pairs), **self.about,
        }  # fmt: skip


def ratio(ratios: Sequence[float], bar: float | None) -> Row:
    """The median and the range, beside what it may be at most."""
    middle = median(ratios)
    return {
        "ratio": middle, "ratio_min": min(ratios), "ratio_max": max(ratios), "bar": bar,
        "met": None if bar is None else middle <= bar,
    }  # fmt: skip


def interleaved(comparisons: Sequence[Comparison], repeats: int, name: str = "rounds") -> list[Row]:
    """A round of pairs to warm up, then `repeats` rounds of all of them."""
    gc.collect()
    rounds = [
        [(seconds(c.ours), seconds(c.other)) for c in comparisons]
        for _ in tqdm(range(1 + repeats), name, leave=False)
    ]  # fmt: skip
    return [c.row([r[i] for r in rounds[1:]]) for i, c in enumerate(comparisons)]


# ------------------------------------------------------------------------------------------ bare network passes


@dataclass
class Pass:
    """One call of a network, and how often a gradient went back through it."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    graph: bool
    backwards: int = 0

    @property
    def samples(self) -> int:
        """How many went through."""
        return max(len(v) for v in (*self.args, *self.kwargs.values()) if torch.is_tensor(v) and v.ndim)

    def run(self) -> None:
        """Again, with nothing around it."""
        with torch.set_grad_enabled(self.graph):
            out = first(self.module(*self.args, **self.kwargs))
        for left in reversed(range(self.backwards)):
            out.backward(torch.ones_like(out), retain_graph=left > 0)


class Passes:
    """Within the block, the calls of some networks are noted; `run` makes them again, bare: same batches, same
    precision, forward and backward."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.passes = modules, list[Pass]()

    def __enter__(self) -> Self:
        self._hooks = [m.register_forward_hook(self._seen, with_kwargs=True) for m in self.modules]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _seen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        args, kwargs = tree_map_only(Tensor, lambda v: v.detach().requires_grad_(v.requires_grad), (args, kwargs))
        found = Pass(module, args, kwargs, first(out).requires_grad)
        if found.graph:
            first(out).register_hook(lambda _: setattr(found, "backwards", found.backwards + 1))
        self.passes.append(found)

    def run(self) -> None:
        """All of them."""
        for p in self.passes:
            p.run()
        for m in self.modules:
            m.zero_grad()

    @property
    def samples(self) -> int:
        """How many went through."""
        return sum(p.samples for p in self.passes)


def first(out: Any) -> Tensor:
    """The tensor of what a network returns."""
    return out[0] if isinstance(out, tuple | list) else out


# ------------------------------------------------------------------------------------------ where the rest goes


class Profile:
    """Seconds of each part of a piece of work, its own: what another part does within it counts there.

    parts: (owner, name of one of its callables, part); part may be a function of the call's arguments.
    """

    def __init__(self, parts: Iterable[tuple[Any, str, str | Callable[..., str]]]) -> None:
        self.parts, self.seconds = list(parts), defaultdict[str, float](float)
        self._open: list[float] = []

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Everything in the block, but for its parts."""
        wait()
        began = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            wait()
            spent = time.perf_counter() - began
            self.seconds[part] += spent - self._open.pop()
            if self._open:
                self._open[-1] += spent

    def run(self, work: Callable[[], object], rest: str = "rest") -> dict[str, float]:
        """Seconds by part, largest first."""
        changes = [(owner, name, self._wrapped(getattr(owner, name), part)) for owner, name, part in self.parts]
        with patched(changes), self.of(rest):
            work()
        return dict(sorted(self.seconds.items(), key=lambda part: -part[1]))

    def _wrapped(self, f: Callable[..., Any], part: str | Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.of(part if isinstance(part, str) else part(*args, **kwargs)):
                return f(*args, **kwargs)

        return call


@contextmanager
def patched(changes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Attributes replaced, and put back."""
    before = [(owner, name, vars(owner).get(name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            object.__setattr__(owner, name, value) if not isinstance(owner, type) else setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is None:
                delattr(owner, name) if isinstance(owner, type) else vars(owner).pop(name)
            else:
                setattr(owner, name, value) if isinstance(owner, type) else object.__setattr__(owner, name, value)
