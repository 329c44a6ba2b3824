"""Full fine-tuning at the size of Stable Diffusion v1.5, with random weights, for `benchmarks/throughput.py`.

By the default settings of `scale/sd15.py`, but for the reward, which is a black box that needs no model, and for the
size of an epoch: it has one in SHARE of the images, and of the nodes of each update, so that the work per image is that
of the defaults. What an epoch keeps (the trajectories in store) is the same share. Each set of options has a process of
its own, so that its memory is its own:

    images_per_second   images drawn in an epoch, and learned from, over the epoch's time
    network_calls       of policy, reference and critic per image, as `fit` counts them
    share               the images of an epoch over those by default
    gibibytes           the most that was allocated on the device
    utilisation         the UNet's arithmetic, forward and backward, over the device's peak in bf16 (PEAKS): activations
                        that are computed again are not counted
    fits_in             GiB, about: the most that was reserved, and CONTEXT for what CUDA itself keeps
    fits                whether an epoch passes where the device gives no more than that

Without an accelerator nothing is measured; a set of options that fails has a row that says how.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))  # as a script it stands beside the package, not in it

from benchmarks.memory import mebibytes
from benchmarks.report import Row, number
from benchmarks.speed.subjects import fine_tuning
from benchmarks.speed.timing import Pass, Passes, seconds
from ctrl.fit import Run
from scale import finetune, models, tuning
from scale.diffusion import Score

LEAN: dict[str, Any] = {"precision": "bf16", "gradient_checkpointing": True}
CASES: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "float32 with TensorFloat-32": {"precision": "no"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
    "bf16, checkpointing": LEAN,
    "bf16, checkpointing, reference offloaded": LEAN | {"offload_reference": True},
    "bf16, checkpointing, 8-bit Adam": LEAN | {"eight_bit": True},
    "bf16, checkpointing, 8-bit Adam, reference offloaded": LEAN | {"eight_bit": True, "offload_reference": True},
    "bf16, LoRA of rank 16": {"precision": "bf16", "lora": 16},
    "bf16, checkpointing, LoRA of rank 16": LEAN | {"lora": 16},
    "the least: checkpointing, offloaded, one image": LEAN | {
        "offload_reference": True, "samples": 2, "batch": 1, "micro_batch": 1,
        "options": ("nodes=4", "updates=1", "keep=1"),
    },
}  # fmt: skip
NEEDS = {"eight_bit": "bitsandbytes", "lora": "peft"}
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bf16 in FLOP/s, from the vendor's data sheets."""
CONTEXT = 0.5
"""GiB of a CUDA context, about."""
EPOCHS, SHARE = 3, 8
OUT_OF_MEMORY = "out of memory"
"""A result like others; what else fails is an error, after everything is written."""


def settings(model: Path, out: Path, share: int = SHARE, **options: Any) -> finetune.Settings:
    """The defaults, at one in `share` of the images and nodes of an epoch."""
    s = finetune.Settings(
        model=str(model), out=out, reward="jpeg-compressibility", other_reward=None, log_with="none", epochs=10**6
    )
    nodes = tuning.algorithm_of(s, noisy=True).nodes
    few: dict[str, Any] = {"samples": s.samples // share, "options": (*s.options, f"nodes={nodes // share}")}
    return replace(s, **{k: tuple(v) if isinstance(v, list) else v for k, v in (few | options).items()})


def gpu(quick: bool) -> list[Row]:
    """A row a set of options; none without an accelerator."""
    if not torch.cuda.is_available():
        print("gpu: there is no accelerator, nothing is measured")
        return []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        models.untrained(models.load(str(finetune.Settings.embedded.with_suffix(""))).tokenizer).save_pretrained(model)
        for name, options in tqdm(list(CASES.items())[: 2 if quick else None], "options"):
            if lacking := [NEEDS[o] for o in options if o in NEEDS and find_spec(NEEDS[o]) is None]:
                print(f"gpu: {name}: not measured, {lacking[0]} is not installed")
                continue
            about: Row = {"panel": "gpu", "case": name, "device": torch.cuda.get_device_name()}
            rows.append(about | within(model, options, apart(model, options)))
    return rows


def within(model: Path, options: dict[str, Any], found: Row) -> Row:
    """What was found, and whether the memory that it names is enough; another failure is one."""
    if "failed" in found:
        return found
    failed = apart(model, options, number(found, "fits_in"))
    return found | {"fits": not failed} | ({} if failed.get("failed") == OUT_OF_MEMORY else failed)


def apart(model: Path, options: dict[str, Any], gibibytes: float | None = None) -> Row:
    """What a process of its own measures, in as much of the device's memory."""
    limit = [] if gibibytes is None else [str(gibibytes)]
    command = [sys.executable, __file__, str(model), json.dumps(options), *limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        if "OutOfMemoryError" in done.stderr:
            return {"failed": OUT_OF_MEMORY}
        return {"failed": f"exit {done.returncode}: {(done.stderr.splitlines() or [''])[-1]}"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def prepared(model: Path, options: dict[str, Any], folder: str) -> Run:
    """A run whose store is full and which has warmed up."""
    run = fine_tuning("gpu", finetune, settings(model, Path(folder), **options), 1.0).run
    for _ in range(run.algorithm.keep):
        run.step_epoch()
    return run


def tried(model: Path, options: dict[str, Any], gibibytes: float, folder: str) -> Row:
    """Nothing, where the device gives no more than that, or an error."""
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((gibibytes - CONTEXT) * 2**30 / total)
    prepared(model, options, folder)
    return {}


def measured(model: Path, options: dict[str, Any], folder: str) -> Row:
    """The median time of EPOCHS, and the most memory."""
    run = prepared(model, options, folder)
    done = arithmetic(run, flops(UNet2DConditionModel.load_config(model, subfolder="unet")))
    cuda, times = torch.cuda.is_available(), list[float]()
    if cuda:
        torch.cuda.empty_cache()
    before = run.metrics.counts["network_calls"]
    most = mebibytes(lambda: times.extend(seconds(run.step_epoch) for _ in range(EPOCHS)), 0.0)
    images = run.settings.samples
    spent = median(times)
    peak = next((v for name, v in PEAKS.items() if cuda and name in torch.cuda.get_device_name()), None)
    return {
        "images": images, "share": images / finetune.Settings.samples, "seconds": spent, "seconds_min": min(times),
        "seconds_max": max(times), "images_per_second": images / spent,
        "network_calls": (run.metrics.counts["network_calls"] - before) / (EPOCHS * images),
        "gibibytes": None if most is None else most / 1024,
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
        unet = UNet2DConditionModel.from_config(config)
        size = unet.config.sample_size
        given = torch.zeros(1, unet.config.in_channels, size, size), torch.zeros(1)
        text = torch.zeros(1, tokens, unet.config.cross_attention_dim)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(*given, encoder_hidden_states=text)
    return int(counter.get_total_flops())


def main(arguments: Sequence[str]) -> None:
    """One set of options, in this process."""
    model, options, *gibibytes = arguments
    given = Path(model), json.loads(options)
    with tempfile.TemporaryDirectory() as folder:
        found = tried(*given, float(gibibytes[0]), folder) if gibibytes else measured(*given, folder)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
