"""Fine-tune Stable Diffusion 3 or 3.5, a rectified flow, on a reward, in continuous time: `scale/sd15.py` for another
family.

    python scale/sd3.py                                       SD 3.5 medium where there is CUDA, else the embedded model
    python scale/sd3.py --lora 16 --gradient-checkpointing --reward mine:reward
    python scale/sd3.py evaluate --run runs/sd3               and sample, export, decided as there
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from scale import finetune, settings, tuning
from scale.finetune import evaluate_run, export, sample, train


@dataclass(frozen=True, kw_only=True)
class Settings(settings.Settings):
    """What is trained, on what, and how. The defaults are for Stable Diffusion 3.5 medium."""

    embedded: ClassVar[Path] = settings.ASSETS / "tiny-sd3.yaml"
    events: ClassVar[str] = "sd3"

    model: str = "stabilityai/stable-diffusion-3.5-medium"
    batch: int = 2
    micro_batch: int = 1
    out: Path = Path("runs/sd3")
    eval_samplers: tuple[str, ...] = ("euler", "heun", "dpmsolver++", "unipc")


__all__ = ["Settings", "evaluate_run", "export", "sample", "train"]

main = partial(finetune.main, Settings, __doc__)

if __name__ == "__main__":
    tuning.run_command(main)
