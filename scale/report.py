"""What a run leaves for people to look at: grids of pictures, a report in one HTML file, a pipeline with its card."""

from __future__ import annotations

import base64
import html as escape
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from scale.evaluate import Evaluation, Pictures
from scale.settings import Settings

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


def html(
    file: Path, settings: dict[str, Any], history: Sequence[dict[str, Any]], found: Evaluation,
    sides: Sequence[Pictures],
) -> None:  # fmt: skip
    """One file that needs no other: what was gained, pictures before and after, curves, samplers, settings."""
    prompts = list(dict.fromkeys(p.text for p in sides[0].prompts))
    body = [
        f"<h1>{_text(settings['model'])}, tuned on {_text(settings['reward'])}</h1>",
        f'<p class="big">{"<br>".join(_text(line) for line in found.summary().splitlines())}</p>',
        "<h2>The same noise, before and after</h2>",
        *(f"<figure>{name}<br>{_image(_png(grid(side.images)))}</figure>"
          for name, side in zip(("before", "after"), sides, strict=True)),
        f"<p>Row by row: {_text('; '.join(prompts))}.</p>",
        f"<h2>Training</h2>{_image(_curves(history))}" if history else "",
        f"<h2>By sampler and number of steps</h2>{_image(_samplers(found))}{_rows(found.grid)}" if found.grid else "",
        "<h2>Settings</h2><pre>" + _text("\n".join(f"{k}: {v}" for k, v in settings.items())) + "</pre>",
    ]  # fmt: skip
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(settings["reward"])}</title>'
    file.write_text(f"{page}<style>{STYLE}</style>{''.join(body)}</html>\n", encoding="utf-8")


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


def _curves(history: Sequence[dict[str, Any]]) -> bytes:
    """Each metric against pictures drawn."""
    shown = [name for name in CURVES if any(name in epoch for epoch in history)]
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
    return _drawn(figure)


def _samplers(found: Evaluation) -> bytes:
    """Reward against steps, a line a sampler, one standard error; grey is before."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    ax = figure.subplots()
    colours = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#882255", "#000000")
    for name, colour in zip(dict.fromkeys(row["sampler"] for row in found.grid), colours, strict=False):
        rows = [row for row in found.grid if row["sampler"] == name]
        steps = [row["steps"] for row in rows]
        ax.errorbar(steps, [row["reward_after"] for row in rows], [row["reward_gain_se"] for row in rows],
                    color=colour, marker="o", markersize=3.5, capsize=2, label=name)  # fmt: skip
        ax.plot(steps, [row["reward_before"] for row in rows], color=colour, linestyle=":", linewidth=1)
    ax.set(xscale="log", xlabel="steps", ylabel="reward (dotted: before)")
    ticks = sorted({row["steps"] for row in found.grid})
    ax.set_xticks(ticks, labels=[str(n) for n in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return _drawn(figure)


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    head = "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in rows[0])
    lines = "".join(
        "<tr>" + "".join(f"<td>{f'{v:.4g}' if isinstance(v, float) else _text(v)}</td>" for v in row.values()) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{lines}</table>"


# ------------------------------------------------------------------------------------------ the pipeline


def save(s: Settings, pipeline: StableDiffusionPipeline) -> None:
    """OUT/pipeline, with whatever the model had beside what was trained, its safety checker too; or OUT/lora."""
    if s.lora:
        from peft import get_peft_model_state_dict

        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipeline.unet))
        StableDiffusionPipeline.save_lora_weights(s.out / "lora", unet_lora_layers=layers)
        return
    parts = {k: v for k, v in pipeline.components.items() if k not in ("safety_checker", "feature_extractor")}
    whole = StableDiffusionPipeline.from_pretrained(s.model, revision=s.revision, use_safetensors=True, **parts)
    whole.save_pretrained(s.out / "pipeline")
    for file in (s.out / "pipeline").rglob("*.safetensors"):
        file.chmod(0o644)  # they come as the writer's alone


def card(s: Settings, found: Evaluation) -> None:
    """Beside the weights, a model card as the hub reads it."""
    loading = (
        f'pipeline = StableDiffusionPipeline.from_pretrained("{s.model}")\npipeline.load_lora_weights("lora")'
        if s.lora else 'pipeline = StableDiffusionPipeline.from_pretrained("pipeline")'
    )  # fmt: skip
    adapter = "base_model_relation: adapter" if s.lora else "base_model_relation: finetune"
    text = f"""---
library_name: diffusers
pipeline_tag: text-to-image
base_model: {s.model}
{adapter}
tags: [stable-diffusion, text-to-image, reinforcement-learning, score-as-action]
---

# Tuned on {s.reward}

{s.model}, fine-tuned by {s.algorithm} in continuous time (arXiv 2502.01819) on the reward `{s.reward}`, guidance
{s.guidance:g}. The license is the base model's.

```python
from diffusers import StableDiffusionPipeline

{loading}
image = pipeline("{found.prompt}", guidance_scale={s.guidance:g}).images[0]
```

{found.summary()}
"""
    (s.out / ("lora" if s.lora else "pipeline") / "README.md").write_text(text)
