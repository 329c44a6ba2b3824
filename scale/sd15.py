"""Fine-tune Stable Diffusion 1.x or 2.x on a reward: reinforcement learning in continuous time, by `ctrl.fit`.

    python scale/sd15.py                                      SD v1.5 where there is CUDA, else the small embedded model
    python scale/sd15.py --reward pickscore --prompts my.txt --kl 20
    python scale/sd15.py --config mine.yaml --dry-run         what a file of settings comes to, and what it would need
    python scale/sd15.py decided --reward mine:reward         where along its paths the reward is decided, first of all
    python scale/sd15.py evaluate --run runs/sd15             what a run gained, by other samplers, steps, prompts
    python scale/sd15.py sample --run runs/sd15 --prompts "a fox"
    python scale/sd15.py export --run runs/sd15               the pipeline of its best checkpoint
    accelerate launch scale/sd15.py ...                       the same on many devices

A run leaves in OUT: config.json, metrics.jsonl, tensorboard's events, checkpoints (`--resume` goes on from the last),
pictures on the same noise over training, evaluation.json, report.html, and pipeline/, which diffusers loads.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from scale import finetune, tuning
from scale.finetune import evaluate_run, export, sample, train
from scale.settings import Settings

__all__ = ["Settings", "evaluate_run", "export", "sample", "train"]

main = partial(finetune.main, Settings, __doc__)

if __name__ == "__main__":
    tuning.run_command(main)
