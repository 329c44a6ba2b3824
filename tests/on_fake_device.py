"""`ctrl` and `toy` where tensors refuse those of the CPU: `pytest -p tests.fake_device tests/on_fake_device.py`.

The fake device computes on the CPU, so a run there has the numbers of a run on the CPU, to rounding.
"""

import copy
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import ctrl.training.replay
from ctrl import (
    DDIM,
    EulerMaruyama,
    Exponential,
    Heun,
    IntegratedEuler,
    Multistep2,
    Noise,
    StructuredCritic,
    grids,
    path_kl,
    rollout,
)
from ctrl.algorithms import (
    AWM,
    DDPO,
    ActorCritic,
    AdjointMatching,
    DiffusionNFT,
    ForwardMatching,
    GaussianNetwork,
    InverseRL,
    KLBudget,
    NextValue,
    PathConsistency,
    PolicyIteration,
    PPOClip,
    PPOPenalty,
    QLearning,
    TDForm,
)
from ctrl.fit import Settings, fit
from ctrl.rollout import NotFinite
from ctrl.value import NetworkCritic
from tests.fake_device import DEVICE, host_syncs
from toy import catalogue
from toy.networks import Policy, Value
from toy.scoreboard import check, score

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


# what the device refuses, as CUDA does


def on(v):
    return v.to(DEVICE)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x + torch.ones(2),
        lambda x: x @ torch.ones(2),
        lambda x: x.add_(torch.ones(2)),
        lambda x: torch.ones(2).add_(x),
        lambda x: torch.ones(()).add_(x[0]),
        lambda x: torch.cat([x, torch.ones(2)]),
        lambda x: torch.ones(2)[on(torch.tensor([0]))],
        lambda x: x.gather(0, torch.tensor([0])),
        lambda x: x.index_add_(0, torch.tensor([0, 1]), x),
        lambda x: torch.where(torch.tensor([True, False]), x, x),
        lambda x: torch.equal(x, torch.ones(2)),
        lambda x: x.index_put_((torch.tensor([0]),), torch.ones(1)),
        lambda x: nn.functional.linear(x, torch.ones(2, 2)),
        lambda x: x.numpy(),
    ],
)
def test_tensors_of_the_cpu_are_refused(operator):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|numpy"):
        operator(on(torch.zeros(2)))


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: x * torch.tensor(2.0),
        lambda x: torch.tensor(2.0) * x,
        lambda x: x[torch.tensor([0, 1])] * 2,
        lambda x: x.masked_fill(x > 5, torch.tensor(0.0)) * 2,
        lambda x: torch.add(x, torch.ones(2).to(DEVICE)).copy_(2 * x.cpu()),
        lambda x: torch.where(x > 5, torch.tensor(0.0), x) * 2,
    ],
)
def test_numbers_and_indices_of_the_cpu_are_not(operator):
    found = operator(on(torch.ones(2)))
    assert found.device == DEVICE and found.tolist() == [2.0, 2.0]


def test_waits_of_the_host_are_counted():
    x = on(torch.ones(3))
    with host_syncs() as counted:
        2 * x + x.sum()
        x.to(torch.float32)
        assert not counted
        float(x[0]), bool(x[0] > 0), x.nonzero(), x[x > 0], x.cpu(), x.tolist(), torch.ones(1).to(DEVICE)
        x[torch.tensor([0])]
        x.to(DEVICE, non_blocking=True)
    assert counted == {"elsewhere: read": 4, "elsewhere: to the host": 2, "elsewhere: from the host": 2}


# ctrl


def models(problem, explores=False):
    torch.manual_seed(7)
    policy = Policy(problem, 16)
    return GaussianNetwork(problem, policy) if explores else policy, StructuredCritic(problem, Value(problem, 16))


class Energy(nn.Module):
    """A reward that learns."""

    differentiable = True

    def __init__(self, d=2):
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(d))

    def forward(self, x, cond=None):
        return -(x - self.centre).square().sum(1)


EXPLORING = {"problem": dataclasses.replace(catalogue.get("mixture-2d").problem, gamma=0.5)}
LEARNED = {"problem": dataclasses.replace(catalogue.get("mixture-2d").problem, reward=Energy())}
CASES = {
    "actor-critic": (ActorCritic(critic_updates=2, actor_updates=2, nodes=32, keep=2), {"ema": 0.5}),
    "its critic's gradient": (ActorCritic(critic_updates=1, actor_updates=1, nodes=32, critic_control=True), {}),
    "adjoint matching": (AdjointMatching(updates=2, nodes=32), {}),
    "full adjoint": (AdjointMatching(updates=1, nodes=32, lean=False), {}),
    "forward matching": (ForwardMatching(updates=2, nodes=32, keep=2, critic_updates=1), {}),
    "forward matching, anchored": (
        ForwardMatching(updates=2, nodes=32, keep=2, target="anchored", critic_updates=0),
        {},
    ),
    "awm": (AWM(updates=2, nodes=32), {}),
    "diffusion nft": (DiffusionNFT(updates=2, nodes=32), {}),
    "ddpo": (DDPO(nodes=32), {"solver": DDIM()}),
    "ddpo, 2M, groups": (DDPO(nodes=32, group=2, chain_kl=True), {"solver": Multistep2()}),
    "ppo-clip": (PPOClip(), {"epochs": 1}),
    "ppo-penalty": (PPOPenalty(), {"epochs": 1}),
    "path consistency": (PathConsistency(updates=2, paths=8), {}),
    "policy iteration": (PolicyIteration(rounds=1, critic_updates=1, actor_updates=1, nodes=32), {}),
    "q-learning": (QLearning(critic_updates=1, q_updates=1, nodes=32), EXPLORING),
    "td form": (TDForm(nodes=32, evaluation=ActorCritic(2, 0, 32, keep=1)), {"solver": DDIM()}),
    "next value": (NextValue(nodes=32, evaluation=ActorCritic(2, 0, 32, keep=1)), {"solver": DDIM()}),
    "inverse rl": (InverseRL(AdjointMatching(updates=1, nodes=32), lambda ids: torch.ones(len(ids), 2)), LEARNED),
    "kl budget": (KLBudget(ActorCritic(critic_updates=1, actor_updates=1, nodes=32), 0.1), {}),
}


def train(algorithm, *, problem=None, callbacks=(), cpu=False, **settings):
    """A small run, there or on the CPU."""
    problem = copy.deepcopy(problem or catalogue.get("mixture-2d").problem)
    policy, critic = models(problem, explores=problem.gamma > 0)
    more = {name: settings.pop(name) for name in ("resume", "critic") if name in settings}
    AcceleratorState._reset_state(reset_partial_state=True)
    return fit(
        problem, policy, algorithm, **{"critic": critic, **more}, callbacks=callbacks, accelerator=Accelerator(cpu=cpu),
        settings=Settings(**{"epochs": 2, "samples": 8, "steps": 4, "progress": False, **settings}),
    )  # fmt: skip


def weights(result):
    found = [p for m in (result.policy, result.ema, result.critic) if isinstance(m, nn.Module) for p in m.parameters()]
    return torch.cat([p.detach().cpu().flatten() for p in found])


def numbers(result):
    return [[v for name, v in epoch.items() if name != "seconds"] for epoch in result.history]


def same(a, b):
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-9, atol=1e-11)
    for x, y in zip(numbers(a), numbers(b), strict=True):
        assert x == pytest.approx(y, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_every_algorithm_has_the_numbers_of_the_cpu(name):
    algorithm, settings = CASES[name]
    there = train(algorithm, **settings)
    assert {p.device for p in there.policy.parameters()} == {DEVICE}
    same(there, train(algorithm, **settings, cpu=True))


def stop(run, metrics):
    if run.epoch == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["actor-critic", "q-learning", "inverse rl"])
def test_a_run_resumes(name, tmp_path):
    algorithm, settings = CASES[name]
    settings = {**settings, "epochs": 3}
    whole = train(algorithm, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(algorithm, **settings, out=tmp_path, checkpoint_every=2, callbacks=[stop])
    same(train(algorithm, **settings, out=tmp_path, checkpoint_every=2, resume=True), whole)


STORED = {
    "actor-critic": (ActorCritic(critic_updates=2, actor_updates=2, nodes=32, keep=3), {}),
    "its critic's gradient": (dataclasses.replace(CASES["its critic's gradient"][0], keep=3), {}),
    "q-learning": (QLearning(critic_updates=1, q_updates=1, nodes=32, keep=3), EXPLORING),
    "path consistency": (PathConsistency(updates=2, paths=8, keep=3), {}),
}


@pytest.mark.parametrize("name", STORED)
def test_older_epochs_are_in_host_memory_beyond_a_size(name, monkeypatch, tmp_path):
    """The newest stays, whatever its size; the numbers are those of the CPU, resumed or not."""
    monkeypatch.setattr(ctrl.training.replay, "ON_DEVICE", 0, raising=False)
    algorithm, settings = STORED[name]
    settings, places = {**settings, "epochs": 3}, []

    def look(run, metrics):
        places.append([{v.device.type for v in (b.trajectory.x, *b.fields.values())} for b in run.replay.collections])

    same(train(algorithm, **settings, callbacks=[look]), whole := train(algorithm, **settings, cpu=True))
    with pytest.raises(KeyboardInterrupt):
        train(algorithm, **settings, out=tmp_path, checkpoint_every=2, callbacks=[stop])
    same(train(algorithm, **settings, out=tmp_path, checkpoint_every=2, callbacks=[look], resume=True), whole)
    assert places[2] == places[-1] == [{"cpu"}, {"cpu"}, {DEVICE.type}]


def test_what_is_not_finite_is_kept(tmp_path):
    """A reward of one epoch, then the loss of every update."""
    broken = dataclasses.replace(catalogue.get("mixture-2d").problem, reward=lambda x, cond: x[:, 0] / 0)
    with pytest.warns(UserWarning, match="reward is not finite"), pytest.raises(NotFinite):
        train(CASES["ddpo"][0], problem=broken, solver=DDIM(), out=tmp_path, patience=2)
    assert len(list((tmp_path / "not-finite").iterdir())) == 2

    class Broken(DDPO):
        def loss(self, chain, policy, nodes):
            return super().loss(chain, policy, nodes) / 0

    with pytest.warns(UserWarning, match="policy: the loss is"), pytest.raises(NotFinite):
        train(Broken(nodes=32), solver=DDIM(), patience=2, out=tmp_path / "loss")


def test_dropout_is_noticed():
    torch.manual_seed(0)
    problem = catalogue.get("mixture-2d").problem
    policy = Policy(problem, 16)
    nn.init.ones_(policy.network.layers[-1].weight)
    policy.network.layers.insert(1, nn.Dropout())
    with pytest.raises(ValueError, match=r"the policy|policies"):
        fit(problem, policy, DDPO(), settings=Settings(samples=4, steps=3, solver=DDIM(), progress=False))


def block(name):
    """A block of the README, of two epochs."""
    (found,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if f"class {name}" in b)
    return re.sub(r"epochs=\d+", "epochs=2", found)


def test_the_readmes_own_model_trains():
    """Its reference is a module, which `fit` moves."""
    exec(compile(block("Mine"), "README.md", "exec"), found := {})
    modules = found["policy"], found["reference"], found["critic"]
    assert {p.device for m in modules for p in m.parameters()} == {DEVICE}


def test_a_module_that_the_class_of_a_problem_holds_is_moved():
    mine = block("Wells").replace("lambda self, x, cond: -(x[:, 0] - 1).square()", "held")
    exec(compile(mine.partition("assert")[0], "README.md", "exec"), {"held": (held := Energy(1).requires_grad_(False))})
    assert held.centre.device == DEVICE


def test_offloaded_weights_stay_where_they_are():
    problem = catalogue.get("mixture-2d").problem

    class Offloaded(nn.Module):
        """As accelerate leaves it: the weights are elsewhere."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, device="meta"), requires_grad=False)

        def forward(self, t, x, cond=None):
            return problem.reference(t, x, cond)

    reference = Offloaded()
    train(CASES["ddpo"][0], problem=dataclasses.replace(problem, reference=reference), solver=DDIM(), epochs=1)
    assert reference.weight.is_meta


# when the host waits: beyond what an epoch does once


def own_model(**changes):
    """Problem, policy and critic of a block of the README: toy problems send tables to the device in every call."""
    exec(compile(block("Mine").rpartition("fit(")[0], "README.md", "exec"), found := {})
    return dataclasses.replace(found["problem"], **changes), found["policy"], found["critic"]


def waits(algorithm, solver, **changes):
    """Of an epoch of 8 samples in 4 steps, hands drawn one by one."""
    problem, policy, critic = own_model(**changes)
    policy = GaussianNetwork(problem, policy) if problem.gamma else policy
    settings = Settings(epochs=1, samples=8, steps=4, batch=8, solver=solver, progress=False)
    with host_syncs() as counted:
        fit(problem, policy, algorithm, critic=critic, settings=settings)
    return counted


CHECKED = {"ctrl/training/engine.py Engine.step: read": 1}
"""Loss and gradient are finite: or else the step is left out."""
DENSITY = "ctrl/gaussian.py Gaussian._check_density: read"
"""A standard deviation is not zero: for each density that a loss takes."""
EVALUATION = ActorCritic(1, 0, 8, keep=1)
UPDATES = {
    "actor-critic, critic": (lambda n: ActorCritic(n, 1, 8), Heun(), {}),
    "actor-critic, actor": (lambda n: ActorCritic(1, n, 8), Heun(), {}),
    "adjoint matching": (lambda n: AdjointMatching(n, 8), Heun(), {}),
    "forward matching": (lambda n: ForwardMatching(n, 8, target="anchored", critic_updates=0), Heun(), {}),
    "forward matching, critic": (lambda n: ForwardMatching(1, 8, critic_updates=n), Heun(), {}),
    "awm": (lambda n: AWM(n, 8), Heun(), {}),
    "diffusion nft": (lambda n: DiffusionNFT(n, 8), Heun(), {}),
    "ddpo": (lambda n: DDPO(passes=n, nodes=32), DDIM(), {DENSITY: 2}),
    "ddpo, 2M": (lambda n: DDPO(passes=n, nodes=32), Multistep2(), {DENSITY: 2}),
    "ppo-clip": (lambda n: PPOClip(updates=n, nodes=8, evaluation=EVALUATION), Heun(), {}),
    "ppo-penalty": (lambda n: PPOPenalty(updates=n, nodes=8, evaluation=EVALUATION), Heun(), {}),
    "td form": (lambda n: TDForm(n, 8, EVALUATION), DDIM(), {}),
    "next value": (lambda n: NextValue(n, 8, EVALUATION), DDIM(), {}),
    "path consistency, both": (lambda n: PathConsistency(n, 4), Heun(), CHECKED),
    "q-learning, q": (lambda n: QLearning(1, n, 8), Heun(), {DENSITY: 1}),
}


@pytest.mark.parametrize("name", UPDATES)
def test_an_update_waits_once_and_for_what_is_named(name):
    make, solver, named = UPDATES[name]
    few, many = (waits(make(n), solver, gamma=0.5 if "q-" in name else 0.0) for n in (1, 3))
    each = Counter(CHECKED) + Counter(named)
    assert many - few == {site: 2 * n for site, n in each.items()}
    assert few - many == {}


@pytest.mark.parametrize(
    "solver", [EulerMaruyama(), IntegratedEuler(), Heun(), Exponential(), DDIM(), Multistep2()], ids=str
)
def test_a_step_of_a_rollout_does_not_wait(solver, monkeypatch):
    """Even where each step draws its noise by itself, as large states do."""
    monkeypatch.setattr("ctrl.noise._AT_ONCE", 1)
    problem, policy, _ = own_model()
    policy.to(DEVICE)

    def counted(steps):
        with host_syncs() as found:
            rollout(
                problem, policy, grids.natural(problem, steps), Noise(0), torch.arange(4, device=DEVICE), solver=solver
            )
        return found

    counted(2)  # whatever travels once
    assert counted(4) == counted(12)


def test_stable_diffusion_waits_no_more_often():
    """The embedded model with guidance: once for an update, and not for a step."""
    from scale.diffusion import Decoded, Prompts, Score, problem
    from scale.diffusion import Value as ImageValue
    from scale.models import load
    from scale.settings import EMBEDDED

    torch.set_default_dtype(torch.float32)
    pipeline = load(str(EMBEDDED.with_suffix(""))).to(DEVICE)
    prompts, policy = Prompts.encode(pipeline, ["a red circle", "a blue square"]), Score.of(pipeline, guidance=3.0)
    task = problem(policy.frozen(), Decoded(pipeline.vae, lambda images, *_: images.mean((1, 2, 3))), beta=0.1)
    critic = NetworkCritic(task, ImageValue(4, task.shape[-1], prompts.width, 8))

    def waits(updates, steps):
        settings = Settings(epochs=1, samples=2, steps=steps, batch=2, micro_batch=1, progress=False)
        with host_syncs() as counted:
            fit(task, policy, ActorCritic(1, updates, 2), critic=critic, conditions=prompts, settings=settings)
        return counted

    waits(1, 2)  # what is read once
    few, many, longer = waits(1, 2), waits(2, 2), waits(1, 4)
    assert few == longer
    assert many - few == CHECKED


# toy


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_a_problem_of_the_catalogue(name):
    """Its exact answers and a rollout of its optimum."""
    entry = catalogue.get(name)
    problem, ids = entry.problem, torch.arange(8, device=DEVICE)
    cond = entry.condition(ids)
    path = rollout(problem, entry.optimal_policy, grids.natural(problem, 4), Noise(0), ids, solver=Heun(), cond=cond)
    assert path.x.device == DEVICE
    kl, reward = path_kl(problem, path, entry.optimal_policy), problem.reward(path.x[-1], cond)
    t = torch.full((8,), 0.3, device=DEVICE)
    assert {v.device for v in (kl, reward, entry.value.value(t, path.x[2], cond))} == {DEVICE}
    assert entry.value.grad(t, path.x[2], cond).shape == path.x[2].shape


def test_a_policy_that_was_trained_there_is_scored_and_its_algorithm_checked():
    entry = catalogue.get("gaussian-1d")
    policy, critic = Policy(entry.problem), NetworkCritic(entry.problem, Value(entry.problem))
    fit(
        entry.problem,
        policy,
        ActorCritic(),
        critic=critic,
        settings=Settings(epochs=1, samples=8, steps=3, progress=False),
    )
    found = score(entry, policy, critic, samples=16, steps=5)
    assert found.regret.mean > 0
    assert all(finding.right for finding in check(DDPO(), samples=64, epochs=4))
