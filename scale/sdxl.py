"""Fine-tune Stable Diffusion XL on a reward, in continuous time: the command of `scale/sd15.py` for another family.

python scale/sdxl.py --lora 16 --gradient-checkpointing --reward mine:reward
python scale/sdxl.py --model FOLDER --dry-run             what a run comes to, and what it would need
python scale/sdxl.py evaluate --run runs/sdxl             and sample, export, decided as there
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
    """What is trained, on what, and how. The defaults are for Stable Diffusion XL; no small model is embedded."""

    embedded: ClassVar[Path | None] = None
    events: ClassVar[str] = "sdxl"

    model: str = "stabilityai/stable-diffusion-xl-base-1.0"
    batch: int = 2
    micro_batch: int = 1
    out: Path = Path("runs/sdxl")


__all__ = ["Settings", "evaluate_run", "export", "sample", "train"]

main = partial(finetune.main, Settings, __doc__)

if __name__ == "__main__":
    tuning.run_command(main)
