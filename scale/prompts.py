"""Where prompts come from: `read("prompts.csv")`.

a name       animals; for the embedded model shapes, which it draws as asked, shapes-doubtful, which it draws in a wrong
             colour half the time, and shapes-doubtful-more, the same in other words, to train on
NAME.txt     one prompt a line
NAME.csv     a column `prompt`; the other columns are metadata; a prompt with a comma or a line break stands in quotes
NAME.jsonl   an object a line with a field `prompt`; the other fields are metadata
anything else is a prompt itself.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from scale import shapes

ANIMALS = """
    ant bat bear bee beetle butterfly camel cat chicken cow crab deer dog dolphin donkey duck elephant fish fox
    frog giraffe goat goose gorilla hedgehog horse kangaroo lion lizard llama monkey mouse octopus owl panda
    penguin pig rabbit raccoon rat shark sheep snake spider squirrel tiger turkey turtle whale wolf zebra
"""


@dataclass(frozen=True)
class Prompt:
    """What is drawn, and what a reward may want to know beside it."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


def _animals() -> list[Prompt]:
    return [Prompt(f"{'an' if name[0] in 'aeio' else 'a'} {name}") for name in ANIMALS.split()]


def _shapes(doubtful: bool) -> list[Prompt]:
    return [Prompt(str(scene)) for scene in shapes.one_object(doubtful)]


def _more() -> list[Prompt]:
    """The doubtful compositions, each with a size or a place: none of `shapes-doubtful` is among them."""
    scenes = [
        replace(scene, objects=(replace(item, **{name: value}),))
        for scene in shapes.one_object(True) for item in scene.objects
        for name, values in (("size", shapes.SIZES), ("place", shapes.PLACES)) for value in values
    ]  # fmt: skip
    return [Prompt(str(scene)) for scene in scenes]


NAMES: dict[str, Callable[[], list[Prompt]]] = {
    "animals": _animals,
    "shapes": lambda: _shapes(False),
    "shapes-doubtful": lambda: _shapes(True),
    "shapes-doubtful-more": _more,
}


def read(source: str) -> list[Prompt]:
    """The prompts, at least one."""
    if source in NAMES:
        return NAMES[source]()
    reader = _READERS.get(Path(source).suffix)
    if reader is None:
        if not source.strip():
            raise ValueError("prompts must be a file, a prompt, or one of " + ", ".join(NAMES) + "; it is empty")
        if os.path.exists(source) or (" " not in source and ("/" in source or Path(source).suffix)):
            raise ValueError(f"prompts: {source!r} must end in {', '.join(_READERS)} to be read as a file")
        if " " not in source and (near := get_close_matches(source, NAMES, 1, 0.75)):
            raise ValueError(f"prompts: {source!r} is no list; did you mean {near[0]!r}? A prompt may stand in a file")
        return [Prompt(source)]
    if not os.path.isfile(source):  # Path.is_file raises where a prompt is too long for a file's name
        raise ValueError(f"prompts: there is no file {source}")
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:  # lines end with \n, \r\n or \r and nothing else
            found = reader(file, source)
    except UnicodeDecodeError as wrong:
        raise ValueError(f"prompts: {source} is not UTF-8 text ({wrong})") from wrong
    if not found:
        raise ValueError(f"prompts: {source} has none")
    return found


def _lines(file: TextIO, source: str) -> list[Prompt]:
    return [Prompt(line.strip()) for line in file if line.strip()]


def _csv(file: TextIO, source: str) -> list[Prompt]:
    try:
        return [_prompt(row, f"{source}, row {i}") for i, row in enumerate(csv.DictReader(file, strict=True), 2)]
    except csv.Error as wrong:
        raise ValueError(f"prompts: {source} is not CSV: {wrong}") from wrong


def _jsonl(file: TextIO, source: str) -> list[Prompt]:
    found = []
    for i, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as wrong:
                raise ValueError(f"prompts: {source}, line {i} is not JSON: {wrong}") from wrong
            found.append(_prompt(row, f"{source}, line {i}"))
    return found


def _prompt(row: Any, place: str) -> Prompt:
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"prompts: {place} has no text under `prompt`")
    if None in row:
        raise ValueError(f"prompts: {place} has more cells than the first row: a prompt with a comma stands in quotes")
    return Prompt(text, {str(k): v for k, v in row.items() if k != "prompt"})


_READERS: dict[str, Callable[[TextIO, str], list[Prompt]]] = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl}
