"""Settings that are wrong are refused by name, with what they may be. A field's limit stands beside its type:

nodes: Count = 1024                          # or Annotated[int, ">= 1"], "> 0", "in [0, 1)"
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

Count = Annotated[int, ">= 1"]
Amount = Annotated[int, ">= 0"]
Positive = Annotated[float, "> 0"]
NotNegative = Annotated[float, ">= 0"]

_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def check_fields(made: Any, limits: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise ValueError at the first field of a dataclass that is not of its type or not within its limit: ">= 1",
    "> 0", "in [0, 1)". Only an interval that is closed at inf holds it. What is not of a plain type is not looked at.

    limits: further ones, by name.
    """
    kinds = typing.get_type_hints(type(made), include_extras=True)
    for name in (field.name for field in dataclasses.fields(made)):
        kind, value = kinds[name], getattr(made, name)
        annotated = typing.get_origin(kind) is Annotated
        said = _fault(value, typing.get_args(kind)[0] if annotated else kind)
        if said is not None:
            raise ValueError(f"{name} must be {said}, got {value!r}")
        for limit in (*(kind.__metadata__ if annotated else ()), *filter(None, [limits.get(name)])):
            if value is not None and not within(value, limit):
                raise ValueError(f"{name} must be {limit}, got {value!r}")


def _fault(value: Any, kind: Any) -> str | None:
    """What the value should be, if it is not."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType or origin is typing.Union:
        faults = [_fault(value, one) for one in inner]
        return None if None in faults else " or ".join(str(fault) for fault in faults)
    if origin is Literal:
        return None if value in inner and type(value) in map(type, inner) else "one of " + ", ".join(map(str, inner))
    if origin is tuple and len(inner) == 2 and inner[1] is ...:
        if not isinstance(value, tuple):
            return "a list"
        return next((f"a list, each {fault}" for v in value if (fault := _fault(v, inner[0]))), None)
    if kind is type(None):
        return None if value is None else "nothing"
    if kind is float:
        right = isinstance(value, int | float) and not isinstance(value, bool) and value == value  # NaN is not
        return None if right else _WORDS[float]
    if kind is int:
        return None if isinstance(value, int) and not isinstance(value, bool) else _WORDS[int]
    if kind in _WORDS:
        return None if isinstance(value, kind) else _WORDS[kind]
    return None


def within(value: float, limit: str) -> bool:
    """Whether a number is where the limit says."""
    word, _, rest = limit.partition(" ")
    if word == "in":
        low, high = (float(end) for end in rest[1:-1].split(","))
        return (low <= value if rest[0] == "[" else low < value) and (
            value <= high if rest[-1] == "]" else value < high
        )
    return value < math.inf and (value >= float(rest) if word == ">=" else value > float(rest))


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raise unless the value is a known one, and say which is near."""
    if value not in known:
        near = difflib.get_close_matches(value, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}{hint}")
