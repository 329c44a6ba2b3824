"""Half precision: overflows, what is measured in float32, and the same policy in rollouts and updates."""

import copy
import dataclasses
import math
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from test_fit import Once, fresh_engine, models, squares, train  # noqa: F401
from torch import Tensor, nn

from ctrl import Estimate, Multistep2, NetworkCritic, Noise, path_kl
from ctrl.algorithms import DDPO, ActorCritic, Algorithm, PPOClip, PPOPenalty
from ctrl.fit import Run, Settings
from ctrl.regularize import actions_kl
from ctrl.rollout import NotFinite
from ctrl.training import guards
from ctrl.training.precision import FEW, few_of, full, precision_of
from ctrl.training.replay import Replay
from scale import models as models_of_scale
from scale.diffusion import Decoded, Prompts, Score
from scale.diffusion import problem as scale_problem
from scale.settings import ASSETS
from toy import catalogue
from toy.networks import Perceptron, Value


@pytest.fixture(autouse=True)
def float32():
    """States and weights."""
    torch.set_default_dtype(torch.float32)


def engine(precision):
    """accelerate on the CPU; with fp16 it has neither autocast nor a scaler there, so both are attached."""
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    if precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


# float16 where there is none


def test_fp16_is_refused_where_accelerate_has_no_autocast_to_it():
    """It would train in float32."""
    with pytest.raises(ValueError, match="fp16 is not supported on the CPU"):
        train(accelerator=Accelerator(mixed_precision="fp16", cpu=True))


# float16 that overflows


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_is_counted_and_left_out_until_the_scale_is_small_enough(fused):
    """Gradients of 2^k times a loss of order one overflow at the first scales, 2^16 and less, and then no more."""
    policy, critic = models()
    start = nn.utils.parameters_to_vector(policy.parameters()).clone()
    overflows, moved = [], []

    def look(run, metrics):
        overflows.append(metrics.get("overflows", 0))
        moved.append(not torch.equal(nn.utils.parameters_to_vector(run.policy.parameters()), start))

    run = train(
        algorithm=Once(lambda run, n: 2.0**8 * squares(run, n)), built=(policy, critic), callbacks=[look], epochs=12,
        optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=fused), accelerator=engine("fp16"),
    )  # fmt: skip
    first = moved.index(True)
    assert 1 <= first == overflows[first] and overflows[first] == overflows[-1]
    assert overflows[:first] == [*range(1, first + 1)]
    assert ["policy_grad_norm" in metrics for metrics in run.history] == moved
    assert all(math.isfinite(v) for metrics in run.history for v in metrics.values())


@pytest.mark.parametrize("fused", [True, False])
def test_overflows_without_end_are_strikes_once_the_scale_is_below_one(fused):
    """2^16 is halved 17 times; the first strike is then, and `patience` end the run."""
    seen = []
    left_out = pytest.warns(UserWarning, match="policy: the gradient of .* is not finite.*left out")
    with left_out as said, pytest.raises(NotFinite, match="3 in a row"):
        train(
            algorithm=Once(lambda run, n: 2.0**60 * squares(run, n)), epochs=60, accelerator=engine("fp16"),
            callbacks=[lambda run, metrics: seen.append(metrics)],
            optimizer=lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=fused),
        )  # fmt: skip
    assert len(seen) == 18 and len([w for w in said if "left out" in str(w.message)]) == 2
    assert [metrics["overflows"] for metrics in seen] == [*range(1, 19)]
    assert all(math.isfinite(v) for metrics in seen for v in metrics.values())


# KL in float32


class Whole(nn.Module):
    """A score that is a network's output alone, as of a large model."""

    def __init__(self, problem, hidden=32):
        super().__init__()
        self.network = Perceptron(problem, 16, hidden)
        nn.init.kaiming_normal_(self.network.layers[-1].weight)

    def forward(self, t, x, cond=None):
        return self.network(t, x, x, cond)


def whole(**settings):
    """What `train` needs for a policy whose reference is a copy of it, with the critic of an actor-critic."""
    problem = catalogue.get("gaussian-16d").problem
    policy = Whole(problem)
    problem = dataclasses.replace(problem, reference=copy.deepcopy(policy).requires_grad_(False))
    critic = NetworkCritic(problem, Value(problem, 16))
    return {"problem": problem, "built": (policy, critic), "lr": 1e-6, "epochs": 3, **settings}


def float32_kl(problem, batch, policy, other, few):
    """The path KL of two policies along a few paths of a batch, in float32."""
    with torch.no_grad():
        return Estimate.of(path_kl(problem, batch.take(few).trajectory, policy, other))


CRITIC = ActorCritic(critic_updates=1, actor_updates=0, nodes=64, keep=1)


@pytest.mark.parametrize(
    "algorithm",
    [ActorCritic(1, 2, 64), PPOPenalty(updates=2, nodes=64, evaluation=CRITIC), PPOClip(0.5, 2, 64, CRITIC)],
    ids=lambda a: type(a).__name__,
)
def test_kl_is_measured_in_float32_along_a_few_paths(algorithm):
    """kl and PPO's step_kl are path KLs of the policies before and after the epoch; bf16 has some .04 nats more."""
    given = whole(algorithm=algorithm, accelerator=engine("bf16"))
    problem, policies = given["problem"], [copy.deepcopy(given["built"][0])]

    def look(run, metrics):
        few, batch = few_of(24, Noise(0, run.epoch - 1)), run.replay.collections[-1]
        policies.append(copy.deepcopy(run.policy))
        kls = {"kl": (policies[-2], problem.reference), "step_kl": policies[:-3:-1]}
        for name in kls.keys() & metrics.keys():
            nats = float32_kl(problem, batch, *kls[name], few)
            assert metrics[name] == pytest.approx(float(nats.mean), rel=1e-3, abs=1e-9)
            assert metrics[f"{name}_se"] == pytest.approx(float(nats.stderr), rel=1e-3, abs=1e-9)

    train(callbacks=[look], **given)
    assert len(policies) == 4


class Still(Algorithm):
    """Learns nothing."""

    def learn(self, run):
        run.record_actions()
        yield from ()


@pytest.mark.parametrize("world", [3, 2 * FEW])
def test_any_number_of_processes_measures_along_the_same_paths(world):
    """The shares of the mean that processes hold, some of them none, add up to that of one process."""

    def share(rank, world):
        torch.manual_seed(0)
        given = whole()
        nn.init.normal_(given["built"][0].network.layers[-1].bias, std=0.1)
        settings = Settings(samples=24, steps=6, progress=False)
        run = Run(given["problem"], given["built"][0], Still(), None, None, settings, engine("bf16"))
        run.replay = Replay(24, rank, world)
        metrics = run.step_epoch()
        acting = 2 * settings.steps * len(range(rank, 24, world))  # Heun's, of this process alone
        return metrics["kl"], metrics["network_calls"] - acting

    (kl, calls), shares = share(0, 1), [share(rank, world) for rank in range(world)]
    assert sum(part for part, _ in shares) == pytest.approx(kl, rel=0.02)  # states are those of a bf16 policy
    assert {n for _, n in shares} == {calls} and (min(shares)[0] == 0) == (world > FEW)


def test_few_paths_are_drawn_by_seed_and_epoch_and_spread_over_processes():
    for samples in (1, 3, 4, 5, 9, 64):
        few = few_of(samples, Noise(0, 1))
        assert few.tolist() == few_of(samples, Noise(0, 1)).tolist()
        assert len(set(few.tolist())) == min(samples, FEW) and 0 <= int(few.min()) <= int(few.max()) < samples
        for processes in (2, FEW, 2 * FEW):
            at_most = -(-len(few) // min(processes, FEW))
            assert int((few % processes).bincount().max()) <= at_most
    assert len({tuple(few_of(64, Noise(0, epoch)).tolist()) for epoch in range(9)}) == 9


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_multiple_of_the_processes_is_spread_evenly(world):
    """As models that are split ask for: each process then evaluates as many paths."""
    few = few_of(5 * world, Noise(0, 1), 2 * world)
    assert (few % world).bincount().tolist() == [2] * world and len(set(few.tolist())) == 2 * world


def test_full_precision_has_neither_autocast_nor_tf32_and_leaves_both_as_they_were():
    """The older and the newer of PyTorch's switches agree meanwhile: reading the one raises where they do not."""
    matmul, cudnn, x = torch.backends.cuda.matmul, torch.backends.cudnn, torch.ones(2, 2)
    before = matmul.allow_tf32, cudnn.allow_tf32
    on_cuda = SimpleNamespace(native_amp=False, device=torch.device("cuda"))
    try:
        matmul.allow_tf32 = cudnn.allow_tf32 = True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full(torch.device("cpu")):
                assert not matmul.allow_tf32 and not cudnn.allow_tf32
                assert "tf32" not in (matmul.fp32_precision, cudnn.conv.fp32_precision)
                assert precision_of(on_cuda) == "no" and (x @ x).dtype == torch.float32
            assert (x @ x).dtype == torch.bfloat16
        assert matmul.allow_tf32 and cudnn.allow_tf32
        assert precision_of(on_cuda) == "tf32" and precision_of(engine("bf16")) == "bf16"
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


# the same policy in rollouts and in updates


def in_two_parts(layer, x):
    """A linear map or a convolution whose input channels are summed in two parts, cut where the number of rows says: a
    kernel that depends on the shape of what it is given, as those of a GPU do, and rounds accordingly."""
    conv = isinstance(layer, nn.Conv2d)
    weight, channels = layer.weight, layer.weight.shape[1]
    cut = max(1, channels // (1 + len(x)))
    parts = ((slice(cut), None), (slice(cut, None), layer.bias))
    if conv:
        given = {"stride": layer.stride, "padding": layer.padding}
        return sum(nn.functional.conv2d(x[:, c], weight[:, c], bias, **given) for c, bias in parts)
    return sum(nn.functional.linear(x[..., c], weight[:, c], bias) for c, bias in parts)


def embedded(**settings):
    """A run of `Watched` in bf16 on the embedded model, with guidance 5 and such kernels. The chunks of a rollout are
    twice as long as an update's."""
    pipeline = models_of_scale.load(str(ASSETS / "tiny-sd"))
    policy = Score.of(pipeline, 5.0)
    task = scale_problem(policy.frozen(), Decoded(pipeline.vae, brightness), beta=0.1)
    for layer in policy.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.forward = partial(in_two_parts, layer)
    prompts = Prompts.encode(pipeline, ["a red circle", "a blue square"])
    given = {"samples": 4, "steps": 2, "batch": 4, "micro_batch": 2, "solver": Multistep2(), "progress": False}
    return Run(task, policy, Watched(nodes=3), None, prompts, Settings(**given | settings), engine("bf16"))


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))


class Watched(DDPO):
    """DDPO, and the log-ratios of each of its parts."""

    seen: ClassVar[list[Tensor]] = []

    def loss(self, chain, policy, nodes):
        law = chain.law(nodes, policy(nodes.t, nodes.x, nodes.cond), chain.act_before(policy, nodes))
        old = chain.law(nodes, nodes["a_old"], nodes["a_old_before"])
        self.seen.append((law.log_prob(nodes["x_next"]) - old.log_prob(nodes["x_next"])).detach())
        return super().loss(chain, policy, nodes)


def test_a_policy_is_compared_in_the_shapes_of_its_rollout_and_rounding_is_allowed_for_with_guidance(monkeypatch):
    """In the same shapes it is the same to the last bit; in those of an update, rounding is more nats than without
    guidance could be, and less than are allowed."""
    run = embedded(mismatch=math.inf)
    epoch = run.begin_epoch()
    (batch,) = epoch.collections
    update = epoch.at_nodes(run.policy, batch, size=2)[:-1]
    apart = actions_kl(run.problem, batch.trajectory, *(torch.cat([a, a[-1:]]) for a in (update, batch.trajectory.a)))
    allowed = guards.rounding(run.problem, "bf16")
    assert run.problem.error_gain == 5**2 + 4**2
    assert allowed / run.problem.error_gain < float(apart.mean()) < allowed
    monkeypatch.setattr(guards, "rounding", lambda problem, precision: 0.0)
    epoch.settings = dataclasses.replace(run.settings, mismatch=0.0)
    assert guards.check_on_policy(epoch, batch) is None


def test_ratios_are_one_before_the_first_update(monkeypatch):
    """Of all three nodes of a hand, in parts of two."""
    monkeypatch.setattr(Watched, "seen", [])
    run = embedded(mismatch=math.inf)
    run.engine.differentiate(next(run.algorithm.learn(run.begin_epoch())))
    assert [len(part) for part in Watched.seen] == [2, 2]
    assert not torch.cat(Watched.seen).any()
