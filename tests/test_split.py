"""ctrl/training/split.py: models held in shares by several processes learn what one process learns from whole ones."""

import dataclasses
import functools
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import UNet2DConditionModel
from test_fit import fresh_engine, same_history, stop, train  # noqa: F401
from torch import nn

from ctrl import NetworkCritic
from ctrl.algorithms import (
    DDPO,
    ActorCritic,
    AdjointMatching,
    ForwardMatching,
    GaussianNetwork,
    PathConsistency,
    PPOPenalty,
    QLearning,
)  # fmt: skip
from ctrl.solvers import DDIM
from ctrl.training import files
from ctrl.training.interrupts import RunFailed
from ctrl.training.split import PARTS, _network, is_split, parts_of, whole, whole_at_once
from scale import finetune, sd3, sd15
from scale import models as pipelines
from scale.families import network_of
from tests.processes import member, several
from toy import catalogue
from toy.networks import Policy, Value

EVALUATION = ActorCritic(critic_updates=2, actor_updates=0, nodes=65, keep=1)
CASES = {
    "actor-critic": {"algorithm": ActorCritic(3, 3, 65, keep=3), "ema": 0.9},
    "actor-critic, its gradient as control": {"algorithm": ActorCritic(2, 2, 65, keep=2, critic_control=True)},
    "ppo": {"algorithm": PPOPenalty(updates=2, nodes=65, evaluation=EVALUATION)},
    "ddpo": {"algorithm": DDPO(nodes=33), "solver": DDIM()},
    "lean adjoint": {"algorithm": AdjointMatching(updates=2, nodes=65)},
    "adjoint": {"algorithm": AdjointMatching(updates=2, nodes=65, lean=False)},
    "forward matching": {"algorithm": ForwardMatching(updates=2, nodes=65, keep=2, critic_updates=2)},
}
"""Updates of an odd number of nodes: processes have unequal shares, which take unequal numbers of micro-batches."""
RESUMED = {**CASES["actor-critic"], "epochs": 4, "schedule": lambda progress: 1.0}
SD3 = "forward-matching on a rectified flow"
LONG = {
    "adjoint-matching": {
        "algorithm": "adjoint-matching", "options": ("nodes=32", "updates=2"), "ema": 0.9, "pictures_every": 2,
    },
    "ddpo": {
        "algorithm": "ddpo", "solver": "ddim", "jitter": 0.0, "in_a_row": 4, "pictures_every": 0,
        "options": ("nodes=16", "group=4", "passes=1", "clip=0.2"),
    },
    "actor-critic": {
        "algorithm": "actor-critic", "critic": "network", "pretrain": 1, "pictures_every": 0,
        "options": ("nodes=32", "critic_updates=3", "actor_updates=2", "keep=2"),
    },
    SD3: {"algorithm": "forward-matching", "options": ("nodes=32", "updates=2"), "pictures_every": 0},
}  # fmt: skip


def models():
    """A policy and a critic that look at nothing but their own network."""
    torch.manual_seed(7)
    problem = catalogue.get("mixture-2d").problem
    policy = Policy(problem, 16)
    nn.init.normal_(policy.network.layers[-1].weight, std=0.05)
    return policy, NetworkCritic(problem, Value(problem, 16))


def run(**case):
    """Its whole weights, and its metrics."""
    given = {"samples": 18, "batch": 7, "micro_batch": 16, **case}
    result = train(built=given.pop("built", None) or models(), **given)
    parts = {"policy": result.result.policy, "ema": result.result.ema, "critic": result.result.critic}
    state = {name: whole(dict(m.state_dict())) for name, m in parts.items() if isinstance(m, nn.Module)}
    return {"state": state, "history": result.history}


def bytes_held(run, metrics):
    """Of a process: weights, gradients and moments of all learners, in shares and whole; and half a row of each, which
    a share may be off."""
    tensors = [
        v
        for learner in run.engine.learners.values()
        for p in learner.trained
        for v in (p, p.grad, *learner.optimizer.state[p].values())
        if v is not None and v.ndim
    ]
    here, everywhere = sum(v.to_local().nbytes for v in tensors), sum(v.nbytes for v in tensors)
    SHARES.append((here, everywhere, sum(v.nbytes / len(v) for v in tensors) / 2))


SHARES = []


def exploring():
    """A policy with weights of its own beside the network, and a problem for it."""
    policy, critic = models()
    problem = dataclasses.replace(catalogue.get("mixture-2d").problem, gamma=0.1)
    return {"built": (GaussianNetwork(problem, policy), critic), "problem": problem, "algorithm": QLearning(1, 1, 64)}


REFUSED = {
    lambda: {"samples": 17}: "samples must be a multiple of the 2 processes if models are split, got 17",
    lambda: {"algorithm": PathConsistency(updates=2, paths=8)}: "processes have unequal ones of whole trajectories",
    lambda: {"algorithm": DDPO(nodes=1), "solver": DDIM()}: "nodes: an update must have at least one for each of the 2",
    exploring: r"policy has weights beside its network (log_width), which cannot be split",
}


def half(split):
    """Metrics of an epoch in bf16, gradient descent at a small rate."""
    AcceleratorState._reset_state()
    torch.set_default_dtype(torch.float32)
    built, accelerator = models(), Accelerator(mixed_precision="bf16", cpu=True)
    case = {**CASES["ppo"], "optimizer": torch.optim.SGD, "lr": 1e-3, "critic_lr": 1e-3, "epochs": 1}
    return run(split=split, built=built, accelerator=accelerator, **case)["history"][0]


def failing_on(rank):
    """A problem whose reward fails on the second process, in its first chunk of several."""

    def reward(x, cond):
        if rank:
            raise ConnectionError("no answer")
        return x.sum(1)

    return dataclasses.replace(catalogue.get("mixture-2d").problem, reward=reward)


def embedded(out, split, algorithm, **changes):
    """A short run of the command on the embedded model."""
    AcceleratorState._reset_state()
    command = sd3 if algorithm == SD3 else sd15
    settings = dataclasses.replace(
        command.Settings.read(command.Settings.embedded), out=Path(out), split=split, log_with="none", epochs=3,
        samples=8, steps=4, eval_samples=4, eval_headline=4, eval_grid_samples=2, eval_steps=(4,),
        eval_samplers=("euler",), eval_kl_samples=2, checkpoint_every=1, seed=5, **LONG[algorithm], **changes,
    )  # fmt: skip
    return finetune.train(settings)


def worker(folder, algorithm, rank, world):
    """One process of several: of the command, or of small runs whose results go to a file."""
    with member(folder, rank, world):
        if algorithm != "toys":
            torch.set_default_dtype(torch.float32)
            embedded(f"{folder}/run", True, algorithm)
            return
        torch.set_default_dtype(torch.float64)
        found = {name: run(split=True, **case) for name, case in CASES.items()}
        run(split=True, callbacks=[bytes_held], **CASES["actor-critic"])
        found["shares"] = SHARES[-1]
        with pytest.raises(KeyboardInterrupt):
            run(split=True, callbacks=[stop(3)], out=f"{folder}/run", checkpoint_every=2, **RESUMED)
        found["resumed"] = run(split=True, out=f"{folder}/run", resume=True, **RESUMED)
        found["refused"] = []
        for case in REFUSED:
            with pytest.raises(ValueError) as refused:  # noqa: PT011
                run(split=True, epochs=1, **case())
            found["refused"].append(str(refused.value))
        found["bf16"] = [half(split) for split in (True, False)]
        with pytest.raises((ConnectionError, RunFailed)) as failed:
            run(split=True, problem=failing_on(rank))
        found["failed"] = f"{failed.type.__name__}: {failed.value}"
        torch.save(found, f"{folder}/{rank}.pt")


@functools.cache
def toys():
    """What two processes have of every small run, and a folder with a checkpoint of theirs."""
    folder = tempfile.mkdtemp()
    with several(2, __file__, folder, "toys"):
        pass
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(2)], Path(folder) / "run"


def same(found, expected, rtol):
    """Weights relative to their norm, and metrics."""
    assert found.keys() == expected.keys()
    for name, v in expected.items():
        if v.is_floating_point():
            assert float((found[name] - v).norm()) <= rtol * float(v.norm()) + 1e-12, name


@pytest.mark.parametrize("name", CASES)
def test_what_is_split_learns_what_is_whole(name):
    """Weights, averages and metrics, to rounding; both processes have the same."""
    one = run(**CASES[name])
    for two in toys()[0]:
        for part, state in one["state"].items():
            same(two[name]["state"][part], state, 1e-9)
        same_history(two[name]["history"], one["history"])


def test_a_process_holds_half():
    """Of weights, gradients and both moments."""
    (first, everywhere, half_rows), (second, *_) = (found["shares"] for found in toys()[0])
    assert first + second == everywhere
    assert abs(first - everywhere / 2) <= half_rows < 0.05 * everywhere


def test_what_was_split_is_resumed():
    """On as many processes, as if nothing had happened."""
    one = run(**RESUMED)
    for two in toys()[0]:
        for part, state in one["state"].items():
            same(two["resumed"]["state"][part], state, 1e-9)
        same_history(two["resumed"]["history"], one["history"])


def test_one_process_goes_on_where_two_stopped_and_has_models_whole(tmp_path):
    shutil.copytree(toys()[1], out := tmp_path / "run")
    shutil.rmtree(files.newest(out))
    assert files.newest(out).name == "epoch-000002"
    resumed, one = run(out=out, resume=True, **RESUMED), run(**RESUMED)
    for part, state in one["state"].items():
        same(resumed["state"][part], state, 1e-9)
    same_history(resumed["history"], one["history"])


def test_what_cannot_be_split_is_refused():
    for found in toys()[0]:
        for said, expected in zip(found["refused"], REFUSED.values(), strict=True):
            assert expected in said


def test_bf16_on_shares_is_bf16_on_whole_models():
    """Networks see the same numbers in the same shapes. Sums of gradients have another order, in float32; a weight that
    differs in its last bit may turn the rounding of a number to bf16, by 2^-8 of it."""
    for found in toys()[0]:
        split, whole_models = found["bf16"]
        assert split.keys() == whole_models.keys() and {"kl", "step_kl", "policy_loss"} < split.keys()
        for name, v in whole_models.items():
            assert split[name] == pytest.approx(v, rel=2**-8, abs=1e-9), name


def test_a_reward_that_fails_on_one_process_ends_all():
    """None waits for another in a rollout that does not come."""
    first, second = (found["failed"] for found in toys()[0])
    assert first.startswith("RunFailed: another process failed") and second == "ConnectionError: no answer"


def sizes(modules):
    return [sum(p.numel() for p in module.parameters()) for module in modules]


@pytest.mark.parametrize("blocks", [(32, 64), (32, 64, 64)])
def test_the_parts_of_a_network_are_small_and_few(blocks):
    """None shares weights with another; none has more than a 16th of all, unless it is a single layer; each is worth
    its message. What is in none of them, and two of them, are whole at once."""
    unet = UNet2DConditionModel(
        block_out_channels=blocks, down_block_types=("CrossAttnDownBlock2D",) * len(blocks),
        up_block_types=("CrossAttnUpBlock2D",) * len(blocks), cross_attention_dim=16, attention_head_dim=8,
        layers_per_block=1,
    )  # fmt: skip
    (total,), parts = sizes([unet]), parts_of(unet)
    held = {id(p): p.numel() for part in parts for p in part.parameters()}
    assert sum(sizes(parts)) == sum(held.values())
    for part, size in zip(parts, sizes(parts), strict=True):
        assert total // PARTS // 4 < size and (size <= total // PARTS or not any(sizes(part.children())))
    rest = sum(p.numel() for p in unet.parameters() if id(p) not in held)
    assert whole_at_once(unet) == rest + sum(sorted(sizes(parts))[-2:]) < total
    assert not is_split(unet)


def test_a_list_of_blocks_is_no_network():
    """That a transformer has nearly all its weights in one does not make it what is called."""
    network = nn.Module()
    network.blocks, network.last = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)]), nn.Linear(2, 2)
    assert _network(nn.Sequential(network)) is network


@pytest.mark.long
@pytest.mark.parametrize("algorithm", LONG)
def test_stable_diffusion_is_split(algorithm, tmp_path):
    """The command on two processes writes the pipeline that it writes on one. It draws pictures on the way, and one
    process goes on where two stopped."""
    torch.set_default_dtype(torch.float32)
    with several(2, __file__, tmp_path, algorithm):
        whole_run = embedded(tmp_path / "whole", False, algorithm)
    expected = network_of(whole_run.pipeline).state_dict()
    found = network_of(pipelines.load(str(tmp_path / "run" / "pipeline"))).state_dict()
    same(found, expected, 1e-4)
    assert {"report.html", "evaluation.json"} <= {file.name for file in (tmp_path / "run").iterdir()}
    if not LONG[algorithm]["pictures_every"]:
        return
    assert (tmp_path / "run" / "pictures" / "epoch-000002.png").exists()
    shutil.rmtree(files.newest(tmp_path / "run"))
    resumed = embedded(tmp_path / "run", False, algorithm, resume=True)
    same(network_of(resumed.pipeline).state_dict(), expected, 1e-4)


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
