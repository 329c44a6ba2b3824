"""What a run leaves for people to look at: grids of pictures, a report in one HTML file."""

from __future__ import annotations

import base64
import html as escape
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

LARGE = 96  # pixels; smaller pictures are shown enlarged, each of their pixels a square


# ------------------------------------------------------------------------------------------ pictures


def picture(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1], as it is."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


def grid(images: Tensor, columns: int = 8) -> Image.Image:
    """(n, 3, H, W) side by side."""
    scale = max(1, LARGE // images.shape[-1])
    shown = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, _, h, w = shown.shape
    columns, gap = min(columns, n), 2
    sheet = torch.ones(3, -(-n // columns) * (h + gap) - gap, columns * (w + gap) - gap)
    for i, image in enumerate(shown):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return picture(sheet)


def array(image: Image.Image) -> Any:
    """(H, W, 3), for tensorboard."""
    return np.asarray(image)


def keep(image: Image.Image, file: Path) -> None:
    """As PNG, in one move."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    image.save(part, "png")
    os.replace(part, file)


def keep_all(images: Tensor, out: Path) -> None:
    """OUT/0000.png ... of (n, 3, H, W), and OUT/grid.png."""
    for i, image in enumerate(images):
        keep(picture(image), out / f"{i:04d}.png")
    keep(grid(images), out / "grid.png")
    print(f"{len(images)} pictures in {out}")


# ------------------------------------------------------------------------------------------ the report


CURVES = ("reward", "kl", "beta", "policy_loss", "critic_loss", "policy_grad_norm")
"""Metrics that are drawn, where they are."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2rem .7rem; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
img { max-width: 100% } figure { margin: 0 0 1rem } pre { background: #f4f4f4; padding: .7rem; overflow-x: auto }
.big { font-size: 1.15rem }
"""


def html(file: Path, title: str, summary: str, sections: Mapping[str, str]) -> None:
    """One file that needs no other. sections: what follows a heading, made by the functions below; an empty one is
    left out."""
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="big">{"<br>".join(_text(line) for line in summary.splitlines())}</p>',
        *(f"<h2>{_text(heading)}</h2>{content}" for heading, content in sections.items() if content),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
    file.write_text(f"{page}<style>{STYLE}</style>{''.join(body)}</html>\n", encoding="utf-8")


def paragraph(text: str) -> str:
    """As it is."""
    return f"<p>{_text(text)}</p>"


def listed(settings: Mapping[str, Any]) -> str:
    """A line each."""
    return "<pre>" + _text("\n".join(f"{k}: {v}" for k, v in settings.items())) + "</pre>"


def pictures(rows: Mapping[str, Tensor]) -> str:
    """A grid of each, (n, 3, H, W), under its name."""
    return "".join(f"<figure>{_text(name)}<br>{_image(_png(grid(images)))}</figure>" for name, images in rows.items())


def _text(value: Any) -> str:
    return escape.escape(str(value))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def _image(png: bytes) -> str:
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _drawn(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def curves(history: Sequence[dict[str, Any]]) -> str:
    """Each metric against pictures drawn."""
    shown = [name for name in CURVES if any(name in epoch for epoch in history)]
    if not shown:
        return ""
    figure = Figure(figsize=(9, 2.4 * -(-len(shown) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // 3), 3, squeeze=False).flatten()
    for ax, name in zip(axes, shown, strict=False):
        points = [(epoch["trajectories"], epoch[name]) for epoch in history if name in epoch]
        ax.plot(*zip(*points, strict=True), color="#0072B2", linewidth=1.2)
        ax.set_title(name.replace("_", " "), fontsize="medium")
        ax.set_xlabel("pictures", fontsize="small")
        ax.grid(alpha=0.3)
    for ax in axes[len(shown) :]:
        ax.set_axis_off()
    return _image(_drawn(figure))


def samplers(rows: Sequence[dict[str, Any]]) -> str:
    """An evaluation's grid: reward against steps, a line a sampler, one standard error, dotted before; and a table."""
    if not rows:
        return ""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#882255", "#000000")
    for name, colour in zip(dict.fromkeys(row["sampler"] for row in rows), colours, strict=False):
        line = [row for row in rows if row["sampler"] == name]
        steps = [row["steps"] for row in line]
        ax.errorbar(steps, [row["reward_after"] for row in line], [row["reward_gain_se"] for row in line],
                    color=colour, marker="o", markersize=3.5, capsize=2, label=name)  # fmt: skip
        ax.plot(steps, [row["reward_before"] for row in line], color=colour, linestyle=":", linewidth=1)
    ax.set(xscale="log", xlabel="steps", ylabel="reward (dotted: before)")
    ticks = sorted({row["steps"] for row in rows})
    ax.set_xticks(ticks, labels=[str(n) for n in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return _image(_drawn(figure)) + table(rows)


def plot_decided(rows: Sequence[dict[str, Any]]) -> Figure:
    """How much of the reward's variance is decided at a log-SNR, with one standard error."""
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    ax = figure.subplots()
    ax.errorbar([row["log_snr"] for row in rows], [row["share"] for row in rows], [row["se"] for row in rows],
                color="#0072B2", marker="o", markersize=3.5, capsize=2)  # fmt: skip
    ax.set(xlabel="log-SNR of the state", ylabel="decided, of the reward's variance", ylim=(-0.05, 1.05))
    ax.grid(alpha=0.3)
    return figure


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a row, under the names of the first."""
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in rows[0])
    lines = "".join(
        "<tr>" + "".join(f"<td>{f'{v:.4g}' if isinstance(v, float) else _text(v)}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"
