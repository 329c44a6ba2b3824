"""Train the two classifiers of `scale.classifiers`, and fit a Gaussian to the judge's features of the pictures.

python scale/recipes/make_classifiers.py --data data --out scale/assets
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it stands beside the package, not in it

from scale import data
from scale.classifiers import ASSETS, LAYERS, Classifier, Moments


@dataclass(frozen=True)
class Recipe:
    """How they are made."""

    data: Path = Path("data")
    """CIFAR-10 in any of its layouts."""
    out: Path = ASSETS
    """Where cifar10-reward, -judge and -moments.safetensors and cifar10-classifiers.json go."""
    epochs: int = 10
    """Passes over the pictures."""
    batch: int = 128
    """Pictures a step."""
    lr: float = 3e-3
    """The largest learning rate."""
    seed: int = 0
    """Of everything that is drawn; the judge has the next one."""


def train(name: str, pictures: data.Pictures, r: Recipe, seed: int) -> Classifier:
    """AdamW on one cycle; pictures flipped, and moved by up to three pixels."""
    torch.manual_seed(seed)
    model, rng = Classifier(LAYERS[name]), torch.Generator().manual_seed(seed)
    steps = r.epochs * (len(pictures) // r.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=r.lr, weight_decay=2e-2)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, r.lr, total_steps=steps)
    assert pictures.labels is not None
    bar = tqdm(range(steps), name)
    for step in bar:
        if step % (len(pictures) // r.batch) == 0:
            deck = torch.randperm(len(pictures), generator=rng)
        index, deck = deck[: r.batch], deck[r.batch :]
        x = pictures.batch(index, torch.rand(r.batch, generator=rng) < 0.5) / 2 + 0.5
        dy, dx = torch.randint(-3, 4, (2,), generator=rng).tolist()
        loss = nn.functional.cross_entropy(model(moved(x, dy, dx)), pictures.labels[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 20 == 19:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval().requires_grad_(False)


def moved(x: Tensor, dy: int, dx: int) -> Tensor:
    """Pictures moved, their border repeated."""
    return nn.functional.pad(x, (3, 3, 3, 3), mode="replicate")[:, :, 3 + dy : 35 + dy, 3 + dx : 35 + dx]


@torch.no_grad()
def accuracy(model: Classifier, pictures: data.Pictures) -> float:
    """The share of pictures whose class it names."""
    assert pictures.labels is not None
    right = [
        (model(pictures.batch(index) / 2 + 0.5).argmax(1) == pictures.labels[index]).sum()
        for index in torch.arange(len(pictures)).split(500)
    ]
    return float(torch.stack(right).sum()) / len(pictures)


def main(r: Recipe) -> None:
    """Train both, and write them in half precision with how often they are right on the test pictures."""
    pictures, test = data.read(r.data), data.read(r.data, test=True)
    told: dict[str, Any] = {"pictures": len(pictures), "epochs": r.epochs, "batch": r.batch, "lr": r.lr, "seed": r.seed}
    r.out.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(LAYERS):
        began = time.perf_counter()
        model = train(name, pictures, r, r.seed + i)
        file = r.out / f"cifar10-{name}.safetensors"
        save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, file)
        model.load_state_dict(load_file(file))  # what is judged is what is shipped
        file.chmod(0o644)
        told[name] = {
            "accuracy": round(accuracy(model, test), 4), "test_pictures": len(test),
            "parameters": sum(p.numel() for p in model.parameters()), "bytes": file.stat().st_size,
            "seconds": round(time.perf_counter() - began),
        }  # fmt: skip
    parts = torch.arange(len(pictures)).split(500)
    found = torch.cat([model.features(pictures.batch(index) / 2 + 0.5) for index in parts])
    Moments.of(found).save(r.out / "cifar10-moments.safetensors")
    (r.out / "cifar10-classifiers.json").write_text(json.dumps(told, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Recipe, description=__doc__))
