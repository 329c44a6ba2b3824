"""Pictures that can be drawn from their captions, and judged against them: coloured shapes on a ground, 32 x 32.

    scene = parse("a large red circle on the left on a striped grey ground")
    images = render([scene], torch.Generator().manual_seed(0))     # (1, 3, 32, 32) in [0, 1]
    following(images, [str(scene)])                                # (1,), near 1

What a caption leaves open is drawn at random; of two objects, which stand side by side, that is size and place always.
`following` looks at colour, shape and ground: which pixels have the colour that was asked for, how well the shape that
was asked for covers them, how much of the rest is ground. Size, place and pattern it does not judge.
DOUBTFUL are compositions of which the captions that the embedded model learns from are wrong half the time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

SIDE = 32
COLOURS = {
    "red": (0.85, 0.15, 0.15), "green": (0.15, 0.65, 0.25), "blue": (0.15, 0.30, 0.90), "yellow": (0.95, 0.85, 0.15),
    "purple": (0.60, 0.20, 0.75), "orange": (0.95, 0.50, 0.10),
}  # fmt: skip
GROUNDS = {"white": (0.95, 0.95, 0.95), "grey": (0.55, 0.55, 0.55), "black": (0.08, 0.08, 0.08)}
PATTERNS = ("striped", "checked")
SIZES = {"small": 6.0, "large": 10.0}
PLACES = {
    "on the left": (-7.0, 0.0),
    "on the right": (7.0, 0.0),
    "at the top": (0.0, -7.0),
    "at the bottom": (0.0, 7.0),
}
TONES = {name: tuple(v + (-0.18 if name == "white" else 0.18) for v in c) for name, c in GROUNDS.items()}
"""The second tone of a pattern: darker on white, lighter elsewhere."""


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return (x.square() + y.square()).sqrt() - 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.85


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.8, (x.abs() * 2 - y - 1.2) / math.sqrt(5))


def _cross(x: Tensor, y: Tensor) -> Tensor:
    far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    return torch.maximum(far - 1, near - 0.33)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross,
}  # fmt: skip
"""Distance to the edge, about, negative inside, for a shape of radius 1 around the origin; y points down."""
DOUBTFUL = frozenset({
    ("circle", "green"), ("square", "purple"), ("triangle", "yellow"), ("cross", "blue"), ("triangle", "red"),
    ("cross", "orange"),
})  # fmt: skip


@dataclass(frozen=True)
class Object:
    """A shape; None leaves to chance."""

    shape: str
    colour: str
    size: str | None = None
    place: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape, self.place) if word)


@dataclass(frozen=True)
class Scene:
    """One object, or two side by side, on a ground."""

    objects: tuple[Object, ...]
    ground: str
    pattern: str | None = None

    def __post_init__(self) -> None:
        if len(self.objects) == 2 and any(item.size or item.place for item in self.objects):
            raise ValueError("prompt: of two objects neither size nor place can be asked for")

    def __str__(self) -> str:
        ground = " ".join(word for word in (self.pattern, self.ground) if word)
        return f"{' and '.join(map(str, self.objects))} on a {ground} ground"


_OBJECT = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})(?: ({'|'.join(PLACES)}))?"
_SCENE = re.compile(rf"{_OBJECT}(?: and {_OBJECT})? on a (?:({'|'.join(PATTERNS)}) )?({'|'.join(GROUNDS)}) ground")


def parse(caption: str) -> Scene:
    """The scene that a caption describes."""
    found = _SCENE.fullmatch(caption)
    if found is None:
        raise ValueError(
            "prompt must be of the form 'a [size] colour shape [place] [and a ...] on a [pattern] ground', such as "
            f"'a large red circle on a striped white ground', got {caption!r}"
        )
    words: list[Any] = list(found.groups())
    objects = [Object(shape, colour, size, place) for size, colour, shape, place in (words[:4], words[4:8]) if shape]
    return Scene(tuple(objects), words[9], words[8])


def one_object(doubtful: bool) -> list[Scene]:
    """Every scene of one object on a plain ground, of the doubtful compositions or of the others."""
    pairs = [p for p in product(SHAPES, COLOURS) if (p in DOUBTFUL) is doubtful]
    return [Scene((Object(*pair),), ground) for pair, ground in product(pairs, GROUNDS)]


def draw_scenes(n: int, rng: torch.Generator) -> list[Scene]:
    """n scenes to learn from; a fifth have two objects."""
    pairs = list(product(SHAPES, COLOURS))

    def pick(options: Sequence[Any], chance: float = 1.0) -> Any:
        some, which = torch.rand(2, generator=rng).tolist()
        return options[int(which * len(options))] if some < chance else None

    scenes = []
    for _ in range(n):
        if float(torch.rand((), generator=rng)) < 0.2:
            objects = [Object(*pick(pairs)), Object(*pick(pairs))]
        else:
            objects = [Object(*pick(pairs), pick([*SIZES], 0.4), pick([*PLACES], 0.3))]
        scenes.append(Scene(tuple(objects), pick([*GROUNDS]), pick(PATTERNS, 0.3)))
    return scenes


def shown(caption: Scene, rng: torch.Generator) -> Scene:
    """What the picture with that caption shows: of a doubtful composition, half the time another colour."""

    def one(item: Object) -> Object:
        wrong, which = torch.rand(2, generator=rng).tolist()
        others = [colour for colour in COLOURS if colour != item.colour]
        mistaken = (item.shape, item.colour) in DOUBTFUL and wrong < 0.5
        return replace(item, colour=others[int(which * len(others))]) if mistaken else item

    return replace(caption, objects=tuple(one(item) for item in caption.objects))


# drawing


def render(scenes: Sequence[Scene], rng: torch.Generator) -> Tensor:
    """(n, 3, 32, 32) in [0, 1]; what the scenes leave open is drawn from rng."""
    return torch.stack([_render(scene, torch.rand(2, 4, generator=rng).tolist()) for scene in scenes])


def _pixels() -> tuple[Tensor, Tensor]:
    """x and y of the pixels' centres, (32, 32) each, the picture's centre at 0."""
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    return axis.expand(SIDE, SIDE), axis[:, None].expand(SIDE, SIDE)


def _render(scene: Scene, chance: list[list[float]]) -> Tensor:
    picture = ground_of(scene)
    for i, (item, (u, v, p, q)) in enumerate(zip(scene.objects, chance, strict=False)):
        radius = SIZES[item.size] if item.size else 6 + 4 * u
        if len(scene.objects) == 2:
            radius, centre = 5.5 + 1.5 * u, ((-7.5, 7.5)[i], 6 * (v - 0.5))
        elif item.place:
            centre = PLACES[item.place]
        else:
            centre = (8 * (p - 0.5), 8 * (q - 0.5))
        cover = coverage(item.shape, radius, centre)
        picture = picture + cover * (torch.tensor(COLOURS[item.colour])[:, None, None] - picture)
    return picture


def coverage(shape: str, radius: float | Tensor, centre: tuple[float | Tensor, float | Tensor]) -> Tensor:
    """How much of each pixel a shape covers, (32, 32)."""
    x, y = _pixels()
    return (0.5 - radius * SHAPES[shape]((x - centre[0]) / radius, (y - centre[1]) / radius)).clamp(0, 1)


def ground_of(scene: Scene) -> Tensor:
    """The picture without its objects, (3, 32, 32)."""
    x, y = _pixels()
    base, tone = (torch.tensor(c[scene.ground])[:, None, None].expand(3, SIDE, SIDE) for c in (GROUNDS, TONES))
    if scene.pattern is None:
        return base.clone()
    stripes, rows = ((v / 4).floor() % 2 for v in (x, y))
    second = stripes if scene.pattern == "striped" else (stripes + rows) % 2
    return base + second * (tone - base)


# judging

LEAST = 20
"""Pixels of a colour below which there is no object."""
BLUR = 0.04
"""Squared distance in colour over which a soft mask fades: sharper ones have no slope where a colour is wrong."""


@dataclass(frozen=True)
class Verdict:
    """What a picture shows of what its caption asks for.

    Attributes:
        cover: how well the requested shape covers the pixels of the requested colour, intersection over union, in
            [0, 1], mean over objects, ().
        ground: how much of the rest has the requested ground's colour, in [0, 1], ().
        right: every object's colour is there, its best cover is by the requested shape, and most of the rest is ground.
    """

    cover: Tensor
    ground: Tensor
    right: bool

    @property
    def score(self) -> Tensor:
        """In [0, 1]: three parts the cover, one part the ground."""
        return 0.75 * self.cover + 0.25 * self.ground


def judge(image: Tensor, scene: Scene, soft: bool = False) -> Verdict:
    """Look at one picture, (3, 32, 32). soft: each pixel is shared among colours that are near, instead of having the
    nearest, so that the verdict has a gradient; it is never right, then."""
    if image.shape != (3, SIDE, SIDE):
        raise ValueError(f"following judges pictures of shape (3, {SIDE}, {SIDE}), got {tuple(image.shape)}")
    colours, grounds = _shares(image, soft)
    covers, right, rest = [], not soft, torch.ones(SIDE, SIDE)
    for i, item in enumerate(scene.objects):
        mask = colours[list(COLOURS).index(item.colour)]
        if len(scene.objects) == 2:  # each has its half
            mask = mask * ((_pixels()[0] < 0) == (i == 0))
        rest = rest - mask
        covers.append(_fit(mask, item.shape, soft))
        if right:
            fits = {shape: float(_fit(mask, shape)) for shape in SHAPES}
            right = fits[item.shape] > 0 and max(fits, key=lambda shape: fits[shape]) == item.shape
    ground = (rest * grounds[list(GROUNDS).index(scene.ground)]).sum() / rest.sum().clamp(min=1)
    return Verdict(sum(covers) / len(covers), ground, right and float(ground) > 0.5)  # type: ignore[arg-type]


class Following:
    """How well each picture follows its prompt, (n,) in [0, 1]; the soft one has a gradient."""

    def __init__(self, soft: bool = False) -> None:
        self.differentiable = soft

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Any = None) -> Tensor:
        pairs = zip(images.float().cpu(), prompts, strict=True)
        scores = [judge(image, parse(prompt), self.differentiable).score for image, prompt in pairs]
        return torch.stack(scores).to(images.device)

    def ceiling(self, prompts: Sequence[str], n: int = 512) -> float:
        """That of pictures which were drawn as they should be."""
        asked = [prompts[i % len(prompts)] for i in range(n)]
        return float(self(render([parse(p) for p in asked], torch.Generator().manual_seed(0)), asked).mean())


following, following_soft = Following(), Following(soft=True)


def _shares(image: Tensor, soft: bool) -> tuple[Tensor, Tensor]:
    """How much of each pixel has each object colour, (6, 32, 32), and each ground, (3, 32, 32)."""
    palette = torch.tensor([*COLOURS.values(), *GROUNDS.values(), *TONES.values()])
    far = (image[None] - palette[:, :, None, None]).square().sum(1)
    if soft:
        share = torch.softmax(-far / BLUR, 0)
    else:
        share = nn.functional.one_hot(far.argmin(0), len(palette)).permute(2, 0, 1).float()
    colours, plain, toned = share.split([len(COLOURS), len(GROUNDS), len(GROUNDS)])
    return colours, plain + toned


def _fit(mask: Tensor, shape: str, soft: bool = False) -> Tensor:
    """Intersection over union of the mask with the shape put where the mask is, as large as the mask, ()."""
    area = mask.sum()
    if area < LEAST and not soft:
        return torch.zeros(())
    x, y = _pixels()
    unit = coverage(shape, 10.0, (0.0, 0.0))
    lift = float((unit * y).sum() / unit.sum()) / 10  # a triangle's centroid is not its centre
    radius = 10 * (area.clamp(min=LEAST) / unit.sum()).sqrt()
    share = mask / area.clamp(min=1e-6)
    cover = coverage(shape, radius, ((share * x).sum(), (share * y).sum() - lift * radius))
    both = (cover * mask).sum()
    return both / (area + cover.sum() - both)
