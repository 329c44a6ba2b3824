"""Full fine-tuning at the size of Stable Diffusion v1.5, with random weights, for `benchmarks/throughput.py`.

Pictures of 512 x 512 under guidance, by the actor-critic with a black-box reward, as `scale/sd15.py` trains by default;
each set of options in a process of its own, so that its memory is its own:

    images_per_second   pictures drawn in an epoch, and learned from, over the epoch's time
    gibibytes           the most that was allocated on the device
    utilisation         the UNet's arithmetic, forward and backward, over the device's peak in bf16 (PEAKS): activations
                        that are computed again are not counted
    fits_in             GiB, about: the most that was reserved, and CONTEXT for what CUDA itself keeps

Without an accelerator nothing is measured; a set of options that fails has a row that says how.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script it stands beside the package, not in it

from benchmarks.memory import mebibytes
from benchmarks.report import Row
from benchmarks.timing import Pass, Passes, seconds
from ctrl.fit import Run
from scale import models, sd15
from scale.diffusion import Score

LEAN: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "bf16, checkpointing": LEAN,
    "bf16, checkpointing, reference offloaded": LEAN | {"offload_reference": True},
    "bf16, checkpointing, 8-bit Adam": LEAN | {"eight_bit": True},
    "bf16, checkpointing, 8-bit Adam, reference offloaded": LEAN | {"eight_bit": True, "offload_reference": True},
    "bf16, LoRA of rank 16": {"precision": "bf16", "lora": 16},
    "bf16, checkpointing, LoRA of rank 16": LEAN | {"lora": 16},
    "the least: checkpointing, offloaded, one picture": LEAN | {
        "offload_reference": True, "samples": 2, "batch": 1, "micro_batch": 1,
        "options": ("nodes=4", "critic_updates=1", "actor_updates=1", "keep=1"),
    },
}  # fmt: skip
NEEDS = {"eight_bit": "bitsandbytes", "lora": "peft"}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 in FLOP/s, from the vendor's data sheets."""
CONTEXT = 0.5
"""GiB of a CUDA context, about."""
EPOCHS = 5
OUT_OF_MEMORY = "out of memory"
"""A result like others; what else fails is an error, after everything is written."""
WORK: dict[str, Any] = {
    "algorithm": "actor-critic", "ema": 0.0, "lr": 1e-5, "reward": "jpeg-compressibility", "other_reward": None,
    "prompts": "animals", "steps": 10, "samples": 16, "batch": 8, "micro_batch": 8, "guidance": 5.0,
    "options": ("nodes=32", "critic_updates=2", "actor_updates=2", "keep=1"),
}  # fmt: skip


def gpu(quick: bool) -> list[Row]:
    """A row a set of options; none without an accelerator."""
    if not torch.cuda.is_available():
        print("gpu: there is no accelerator, nothing is measured")
        return []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        models.untrained(models.load(str(sd15.Settings.embedded.with_suffix(""))).tokenizer).save_pretrained(model)
        for name, options in tqdm(list(CASES.items())[: 2 if quick else None], "options"):
            if lacking := [NEEDS[o] for o in options if o in NEEDS and find_spec(NEEDS[o]) is None]:
                print(f"gpu: {name}: not measured, {lacking[0]} is not installed")
                continue
            rows.append({"panel": "gpu", "case": name, "device": torch.cuda.get_device_name(), **apart(model, options)})
    return rows


def apart(model: Path, options: dict[str, Any]) -> Row:
    """What a process of its own measures."""
    command = [sys.executable, __file__, str(model), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        if "OutOfMemoryError" in done.stderr:
            return {"failed": OUT_OF_MEMORY}
        return {"failed": f"exit {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(model: Path, options: dict[str, Any]) -> Row:
    """Two epochs to warm up, and EPOCHS more: the median of their times, and the most memory."""
    from benchmarks.throughput import embedded  # which imports this

    folder = Path(tempfile.mkdtemp())
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in (WORK | options).items()}
    run = embedded("gpu", sd15, folder, 1.0, model=str(model), **given).run
    run.step_epoch()
    done = arithmetic(run, flops(sd15.UNet2DConditionModel.load_config(model, subfolder="unet")))
    cuda, times = torch.cuda.is_available(), list[float]()
    if cuda:
        torch.cuda.empty_cache()
    most = mebibytes(lambda: times.extend(seconds(run.step_epoch) for _ in range(EPOCHS)), 0.0)
    shutil.rmtree(folder, ignore_errors=True)
    spent = median(times)
    peak = next((v for name, v in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    return {
        "images": run.settings.samples, "seconds": spent, "seconds_min": min(times), "seconds_max": max(times),
        "images_per_second": run.settings.samples / spent, "gibibytes": None if most is None else most / 1024,
        "fits_in": torch.cuda.max_memory_reserved() / 2**30 + CONTEXT if cuda else None,
        "teraflops": done / spent / 1e12, "utilisation": None if peak is None else done / spent / peak,
    }  # fmt: skip


def arithmetic(run: Run, forward: int) -> int:
    """Operations of an epoch, `forward` those of one picture's way through the UNet. What is noted are the scores, for
    a UNet that is compiled does not see hooks; under guidance each goes through it twice."""
    both = nn.ModuleList([run.policy, cast(nn.Module, run.problem.reference)])
    scores = [m for m in both.modules() if isinstance(m, Score)]
    halves: dict[nn.Module, int] = {score: 1 if score.guidance == 1 else 2 for score in scores}
    with Passes(*scores) as passes:
        run.step_epoch()
    return forward * sum(halves[p.module] * p.samples * ways(p) for p in passes.passes)


def ways(p: Pass) -> int:
    """How often as much arithmetic as forward: a way back is one, and one more where the weights are trained."""
    return 1 + p.backwards * (1 + all(w.requires_grad for w in p.module.parameters()))


def flops(config: Any, tokens: int = 77) -> int:
    """Of one picture's way through the UNet, counted on tensors without contents."""
    with torch.device("meta"):
        unet = sd15.UNet2DConditionModel.from_config(config)
        size = unet.config.sample_size
        given = torch.zeros(1, unet.config.in_channels, size, size), torch.zeros(1)
        text = torch.zeros(1, tokens, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*given, encoder_hidden_states=text)
    return int(counter.get_total_flops())


def main(arguments: Sequence[str]) -> None:
    """One set of options, in this process."""
    model, options = arguments
    print(json.dumps(measured(Path(model), json.loads(options))))


if __name__ == "__main__":
    main(sys.argv[1:])
