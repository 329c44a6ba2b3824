"""scale/requirements.py: memory, disk and work of a run, against what real runs of the embedded model come to."""

import dataclasses
import inspect
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel, UNet2DModel

from ctrl.training import checkpoint, files
from ctrl.training.device import make_accelerator
from ctrl.training.replay import epoch_bytes
from ctrl.training.split import whole_at_once
from scale import cifar10, finetune, models, pixels, settings, tuning
from scale.families import family_of
from scale.prompts import read
from scale.recipes.make_tiny_sd import untrained
from scale.requirements import Meter, learning, measured, memory, rehearsed
from scale.rewards import reward_of, unmade
from scale.settings import ALGORITHMS, Settings

BLACK_BOX = "jpeg-compressibility"
FEW = ("nodes=8", "critic_updates=1")
OPTIONS = {
    "actor-critic": (*FEW, "actor_updates=2", "keep=2"), "ddpo": ("nodes=8",),
    "adjoint-matching": ("nodes=8", "updates=2"),
    "ppo": ("nodes=8", "updates=1", "evaluation.nodes=8", "evaluation.critic_updates=1"),
    "ppo-clip": ("nodes=8", "updates=2", "evaluation.nodes=8", "evaluation.critic_updates=1"),
    "forward-matching": ("nodes=8", "updates=2", "keep=2"),
    "awm": ("nodes=8", "updates=2"), "diffusion-nft": ("nodes=8", "updates=2"),
    "path-consistency": ("paths=2", "updates=1", "keep=2"), "policy-iteration": (*FEW, "actor_updates=1", "rounds=2"),
    "q-learning": (*FEW, "q_updates=1"), "td-form": ("nodes=8", "evaluation.nodes=8", "evaluation.critic_updates=1"),
    "next-value": ("nodes=8", "evaluation.nodes=8", "evaluation.critic_updates=1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The embedded model's parts, untrained."""
    path = tmp_path_factory.mktemp("requirements") / "model"
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    untrained().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def float32():
    """And accelerate, which has one precision a process, begins anew."""
    torch.set_default_dtype(torch.float32)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def short(model, out, **changes):
    """Four images of three steps an epoch."""
    plain = {
        "model": str(model), "reward": BLACK_BOX, "other_reward": None, "prompts": "shapes-doubtful-more", "lr": 1e-5,
        "epochs": 1, "samples": 4, "steps": 3, "guidance": 2.0, "batch": 64, "micro_batch": 64, "out": out,
        "critic_width": 8, "log_with": "none", "precision": "no",
    }  # fmt: skip
    return Settings(**{**plain, **changes})


class Watched:
    """Counts the rows that UNets are given, and those whose gradient comes back to what they returned."""

    def __init__(self, *unets):
        self.seen = Counter()
        self.hooks = [unet.register_forward_hook(self.look) for unet in unets]

    def look(self, unet, given, out):
        out, n = (out[0] if isinstance(out, tuple) else out.sample), len(given[0])
        self.seen["forward"] += n
        if out.requires_grad:
            out.register_hook(lambda _: self.seen.update(back=n))


@pytest.mark.parametrize(
    "algorithm, changes",
    [
        *((name, {}) for name in ALGORITHMS),
        ("actor-critic", {"epochs": 4, "pretrain": 2, "reward": "following-soft", "critic": "structured"}),
        ("ddpo", {"precision": "bf16", "guidance": 1.0}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_a_rehearsal_counts_the_calls_of_a_run(model, tmp_path, algorithm, changes):
    """The rows of both UNets, forwards and backwards, and each epoch's network_calls."""
    if algorithm == "adjoint-matching":
        changes = {"reward": "following-soft"}
    gamma = 1e-4 if algorithm == "q-learning" else 0.0
    s = short(model, tmp_path, algorithm=algorithm, options=OPTIONS[algorithm], gamma=gamma, **changes)
    accelerator = make_accelerator(mixed_precision=s.precision)
    gradient = tuning.differentiable(s)
    outline = models.outline(s.model)
    expected = rehearsed(s, outline, partial(finetune.parts, s, gradient), gradient, accelerator)
    task = finetune.assemble(s, None, accelerator)
    real = Watched(task.policy.network, task.problem.reference.network)
    history = tuning.learn(s, task, accelerator)
    calls = [epoch["network_calls"] for epoch in history]
    assert [c["network_calls"] for c in expected[s.pretrain :]] == [
        b - a for a, b in zip([0, *calls], calls, strict=False)
    ]
    whole = sum(expected, Counter())
    assert {name: whole[name] for name in ("forward", "back")} == real.seen


@pytest.mark.long
def test_the_table_of_passes_is_what_a_rehearsal_counts(model):
    """At full settings but for the size of the networks: a pass forward is one, and one back to the state or to the
    weights another. Besides, a rehearsal compares rollout and update at 64 nodes, under guidance 128 passes, unless the
    policy explores."""
    table = re.findall(r"([a-z-]+) +([\d.]+) \(", inspect.getsource(settings).partition("In passes per epoch")[2])
    assert {name for name, _ in table} == set(ALGORITHMS) - {"ppo-clip"}
    for name, thousands in table:
        gradient, explores = name == "adjoint-matching", name == "q-learning"
        s = dataclasses.replace(
            short(model, "unused"), algorithm=name, samples=64, steps=20, guidance=5.0, epochs=5, batch=8,
            micro_batch=4, gamma=1e-4 if explores else 0.0, reward="following-soft" if gradient else BLACK_BOX,
        )  # fmt: skip
        last = rehearsed(
            s, models.outline(s.model), partial(finetune.parts, s, gradient), gradient, make_accelerator()
        )[-1]
        passes = last["forward"] + last["back"] + last["weights"] - (0 if explores else 128)
        assert passes / 1000 == pytest.approx(float(thousands), abs=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "algorithm": "actor-critic",
            "options": ("nodes=32", "keep=2", "critic_updates=2", "actor_updates=2"),
            "ema": 0.5,
        },
        {"algorithm": "adjoint-matching", "options": ("nodes=32", "updates=2"), "reward": "following-soft"},
        {"algorithm": "ddpo", "options": ("nodes=32",), "lora": 2, "precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=lambda changes: changes["algorithm"],
)
def test_the_account_of_memory_and_disk_is_what_a_run_takes(model, tmp_path, changes):
    """Of memory the most that is alive at a time in training, to a quarter; of the disk a checkpoint, to a tenth, or,
    where the weights are few, to what the files hold besides: 147 bytes a tensor in the weights' and 816 in the
    optimiser's, and 15 KiB for random states and counters."""
    s = short(model, tmp_path, samples=16, batch=16, micro_batch=16, **changes)
    accelerator, gradient = make_accelerator(mixed_precision=s.precision), tuning.differentiable(s)
    outline = models.outline(s.model)
    held, disk = account(s, outline, partial(finetune.parts, s, gradient), gradient, accelerator)
    task = finetune.assemble(s, None, accelerator)
    with Meter() as meter:
        tuning.learn(s, task, accelerator)
    before = held["weights"] + held["untuned weights"]
    assert meter.most == pytest.approx(sum(held.values()) - before, rel=0.25)
    written = sum(f.stat().st_size for f in files.newest(tmp_path).rglob("*"))
    tensors = sum(p.requires_grad for module in learning(task).values() for p in module.parameters())
    assert written == pytest.approx(disk, rel=0.1, abs=2**10 * tensors + 2**14)


def account(s, outline, parts, gradient, accelerator):
    """Bytes by purpose, and of a checkpoint."""
    if s.lora:
        finetune.add_adapters(s, outline)
    tuning.lay_out(s, outline.unet)
    counts = sum(rehearsed(s, outline, parts, gradient, accelerator), Counter())
    task = parts(outline, unmade)
    epoch = epoch_bytes(s.samples, s.steps, task.problem.shape)
    disk = checkpoint.size(learning(task), bool(s.ema), epoch, task.algorithm.keep)
    return memory(s, task, measured(s, task, outline.vae, counts), {}, 1), disk


@pytest.mark.parametrize("processes", [2, 3])
def test_what_is_split_takes_a_share_of_the_memory(model, tmp_path, processes):
    """Of weights, gradients, moments, reference and average; and what a process has whole at once comes on top."""
    changes = {"algorithm": "adjoint-matching", "options": ("nodes=32", "updates=2"), "ema": 0.5, "samples": 6}
    whole, split = (short(model, tmp_path, split=split, **changes) for split in (False, True))
    outline = models.outline(whole.model)
    task = finetune.parts(whole, True, outline, unmade)
    one, shared = (memory(s, task, {"forward": SimpleNamespace(peak=0)}, {}, processes) for s in (whole, split))
    for name in ("weights", "gradients", "optimiser", "untuned weights", "average"):
        assert shared[name] == one[name] // processes > 0
    assert shared["weights whole at once"] == 4 * whole_at_once(task.policy) < one["weights"]
    assert memory(split, task, {"forward": SimpleNamespace(peak=0)}, {}, 1) == one | {
        "trajectories": processes * one["trajectories"]
    }


def test_a_meter_counts_what_is_alive_and_products():
    """Three exponentials keep their values; the gradient is made beside them, then in their place."""
    x = torch.zeros(1000, requires_grad=True)
    with Meter() as meter:
        y = x.exp().exp().exp()
        assert meter.now == meter.most == 3 * 4000
        with torch.no_grad():
            x * 2
        assert (meter.now, meter.most) == (3 * 4000, 4 * 4000)
        del y
        assert meter.now == 0
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    assert meter.flops == 2 * 3 * 5 * 7


def test_the_calls_of_an_evaluation_are_counted(model, tmp_path):
    """Heun's sampler calls twice a step but for the last; the path KL has Heun's steps and both UNets at the nodes."""
    s = short(model, tmp_path, eval_samples=3, eval_kl_samples=2, eval_headline=4, eval_grid_samples=2,
              eval_samplers=("heun", "ddim"), eval_steps=(2, 5))  # fmt: skip
    pipeline, untuned = models.load(s.model), models.load(s.model)
    real = Watched(pipeline.unet, untuned.unet)
    finetune.judged(s, pipeline, untuned, read("shapes-doubtful"), {"reward": reward_of(BLACK_BOX)})
    plan = finetune.plan_of_evaluation(s, family_of(pipeline))
    assert (
        real.seen["forward"]
        == finetune.calls_of_evaluation(models.outline(s.model), **plan)
        == 2 * (2 * (3 * 4 + 2 * (3 + 9 + 2 + 5)) + 2 * (8 + 10))
    )


def test_the_calls_of_an_evaluation_of_pictures_are_counted(tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler(variance_type="fixed_small")).save_pretrained(tmp_path / "model")
    s = cifar10.Settings(model=str(tmp_path / "model"), steps=4, eval_samples=3, eval_kl_samples=2, eval_grid_samples=2,
                         eval_samplers=("ancestral", "unipc"), eval_steps=(5,), batch=3)  # fmt: skip
    pipeline, untuned = pixels.load(s.model), pixels.load(s.model)
    real = Watched(pipeline.unet, untuned.unet)
    cifar10.judged(s, pipeline, untuned, reward_of("cifar10-class=ship"), None)
    assert real.seen["forward"] == pixels.calls_of_evaluation(**cifar10.plan_of_evaluation(s))


def test_the_energy_is_rehearsed(tmp_path):
    """A reward that is learned is trained in the rehearsal too."""
    s = cifar10.Settings(reward=cifar10.ENERGY, data=tmp_path, epochs=3, samples=4, steps=4, options=("nodes=8",),
                         model="embedded", precision="no").resolved()  # fmt: skip
    outline = pixels.outline(s.model)
    (one, *_, last) = rehearsed(s, outline, partial(cifar10.parts, s, True, True), True, make_accelerator())
    assert one == last and one["forward"] > one["back"] > one["weights"] > 0


@pytest.mark.long
def test_a_call_of_stable_diffusion_costs_what_it_is_known_to(monkeypatch):
    """803 GFLOP per latent; its activations take 1.75 GiB in float32, .88 in bf16 besides 1.56 for the weights."""
    for precision, activations in (("no", 1.75), ("bf16", 0.88 + 1.56)):
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(models.SD15_UNET)
        outline = models.outline("scale/assets/tiny-sd").replace(unet=unet, vae=None)
        outline = dataclasses.replace(outline, widths=dataclasses.replace(outline.widths, embeds=768))
        s = short("embedded", "unused", guidance=1.0, batch=1, micro_batch=1, precision=precision)
        task = finetune.parts(s, False, outline, unmade)
        found = measured(s, task, None, Counter())
        assert found["forward"].flops == pytest.approx(803e9, rel=0.01)
        assert found["update"].flops == pytest.approx(3 * 803e9, rel=0.05)
        assert 1 <= found["update"].peak / 2**30 / activations < 1.3
