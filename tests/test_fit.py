"""The loop: the same numbers whatever the processes, chunks and micro-batches; metrics; refusals; one loop for all."""

import ast
import atexit
import copy
import dataclasses
import functools
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

import ctrl.algorithms
from ctrl import DDIM, Estimate, EulerMaruyama, Heun, Multistep2, Noise, StructuredCritic, grids, path_kl
from ctrl.algorithms import (
    AWM,
    DDPO,
    ActorCritic,
    AdjointMatching,
    Algorithm,
    ForwardMatching,
    GaussianNetwork,
    NextValue,
    PathConsistency,
    PPOPenalty,
    QLearning,
)
from ctrl.algorithms.base import Update
from ctrl.fit import Settings, fit, linear_decay
from ctrl.training.lock import FILE
from tests.processes import member, several
from toy import catalogue
from toy.networks import Policy, Value

ROOT = Path(__file__).parents[1]
ACTOR_CRITIC = ActorCritic(critic_updates=3, actor_updates=3, nodes=64, keep=2)


@pytest.fixture(autouse=True)
def fresh_engine(monkeypatch):
    """accelerate keeps one state a process: the device and precision of one test are not those of the next."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class ClassPolicy(nn.Module):
    """a = a_ref + one vector a class: wrong wherever a node has another's condition. One parameter is never used."""

    def __init__(self, problem):
        super().__init__()
        self.problem, self.push, self.unused = problem, nn.Embedding(3, 2), nn.Parameter(torch.ones(2))
        nn.init.zeros_(self.push.weight)

    def forward(self, t, x, cond):
        return self.problem.reference(t, x, cond) + self.push(cond)


def models(name="mixture-2d", init=7):
    """A policy and a critic."""
    torch.manual_seed(init)
    problem = catalogue.get(name).problem
    policy = ClassPolicy(problem) if "conditional" in name else Policy(problem, 16)
    return policy, StructuredCritic(problem, Value(problem, 16))


@dataclasses.dataclass
class Trained:
    """What a run left: its result, and every epoch's trajectories on this process."""

    result: object
    paths: list

    @property
    def parameters(self):
        """Of policy, averaged policy and critic, in one vector."""
        parts = (self.result.policy, self.result.ema, self.result.critic)
        return torch.cat([p.detach().flatten() for m in parts if isinstance(m, nn.Module) for p in m.parameters()])

    @property
    def history(self):
        """The metrics but for the time they took."""
        return [{name: v for name, v in record.items() if name != "seconds"} for record in self.result.history]

    def plain(self):
        """As tensors and lists."""
        paths = [{"ids": p.ids, "t": p.t, "x": p.x, "reward": p.reward} for p in self.paths]
        return {"parameters": self.parameters, "history": self.history, "paths": paths}


def train(
    name="mixture-2d", algorithm=ACTOR_CRITIC, *, init=7, built=None, problem=None, callbacks=(), resume=False,
    overwrite=False, accelerator=None, **settings,
):  # fmt: skip
    """A small run on the CPU. init: seed of the models, unless they are `built`."""
    entry, paths = catalogue.get(name), []
    policy, critic = built or models(name, init)
    result = fit(
        problem or entry.problem,
        policy,
        algorithm,
        critic=critic,
        conditions=entry.condition if "conditional" in name else None,
        settings=Settings(**{"epochs": 3, "samples": 24, "steps": 6, "progress": False, **settings}),
        callbacks=(lambda run, metrics: paths.extend(b.trajectory for b in run.replay.collections[-1:]), *callbacks),
        resume=resume,
        overwrite=overwrite,
        accelerator=accelerator,
    )
    return Trained(result, paths)


def close(a, b, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def same_history(a, b):
    assert [list(record) for record in a] == [list(record) for record in b]
    for x, y in zip(a, b, strict=True):
        assert list(x.values()) == pytest.approx(list(y.values()), rel=1e-9, abs=1e-11)


def test_learning_rates_rise_to_their_full_size():
    seen = []

    def watch(run, metrics):
        seen.append({name: learner.optimizer.param_groups[0]["lr"] for name, learner in run.engine.learners.items()})

    train(epochs=5, warmup=3, lr=0.4, critic_lr=0.8, schedule=lambda p: 1 - p / 2, callbacks=[watch])
    expected = [0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6]
    assert [s["policy"] for s in seen] == pytest.approx([0.4 * v for v in expected])
    assert [s["critic"] for s in seen] == pytest.approx([0.8 * v for v in expected])


# processes

CASES = {
    "actor-critic": {"ema": 0.5},
    "actor-critic, 23 samples": {"samples": 23, "batch": 5, "micro_batch": 7},
    "ddpo, 23 samples": {"algorithm": DDPO(nodes=64), "samples": 23, "solver": Multistep2()},
    "ddpo, groups of 3": {"algorithm": DDPO(nodes=64, group=3), "samples": 21, "solver": DDIM(), "epochs": 2},
    "whole trajectories": {"algorithm": PathConsistency(updates=3, paths=16, keep=2), "samples": 23, "epochs": 2},
    "forward nodes, by condition": {
        "name": "mixture-2d-conditional", "samples": 23, "epochs": 2,
        "algorithm": ForwardMatching(updates=3, nodes=64, keep=2, target="anchored", critic_updates=0),
    },
    "awm, 23 samples": {"algorithm": AWM(updates=3, nodes=64), "samples": 23, "epochs": 2},
    "conditions, hands of 3 nodes": {
        "name": "mixture-2d-conditional", "algorithm": dataclasses.replace(ACTOR_CRITIC, nodes=3),
        "samples": 10, "optimizer": functools.partial(torch.optim.AdamW, weight_decay=1.0),
    },
}  # fmt: skip


BEGUN = {**CASES["actor-critic, 23 samples"], "epochs": 2, "ema": 0.5, "schedule": lambda progress: 1.0}
LEFT = tempfile.mkdtemp()
atexit.register(shutil.rmtree, LEFT)


def stop(epoch):
    """A callback that interrupts."""

    def callback(run, metrics):
        if run.epoch == epoch:
            raise KeyboardInterrupt

    return callback


def interrupted(epoch, **case):
    """A run that is broken off after an epoch, and gone on with from its newest checkpoint by other objects."""
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[stop(epoch)], **case)
    return train(init=8, resume=True, **case)


def seeded(seed):
    """A problem whose reference has weights drawn from that seed."""
    torch.manual_seed(seed)
    problem = catalogue.get("mixture-2d").problem
    return dataclasses.replace(problem, reference=Policy(problem, 16).requires_grad_(False))


def apart(**case):
    """What a run says that has other weights on each process."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        train(**case)
    return str(refused.value)


class Dealt(Algorithm):
    """Deals hands of 13 nodes of two epochs, and learns nothing from them."""

    keep = 2

    def __init__(self):
        self.hands = []

    def learn(self, run):
        run.record_actions()
        for nodes in run.minibatches(5, 13):
            assert torch.equal(nodes.cond, nodes.ids % 3)
            cards = zip(nodes.k.tolist(), nodes.ids.tolist(), strict=True)
            self.hands.append(dict(zip(cards, torch.cat([nodes.x, nodes["a_old"]], 1), strict=True)))
        yield from ()


def dealt():
    """The nodes of every hand, by (k, id)."""
    train("mixture-2d-conditional", algorithm := Dealt(), samples=10, batch=30, epochs=2)
    return algorithm.hands


def half():
    """The metrics of a first epoch in bf16, of a policy that is not the reference."""
    AcceleratorState._reset_state()
    torch.set_default_dtype(torch.float32)
    policy, critic = models()
    nn.init.normal_(policy.network.layers[-1].weight, std=0.1)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    (metrics,) = train(built=(policy, critic), epochs=1, accelerator=accelerator).history
    return metrics


def worker(folder, rank, world):
    """One process of several: what it has of every run goes to a file."""
    torch.set_default_dtype(torch.float64)
    with member(folder, rank, world):
        runs = {name: train(**case) for name, case in CASES.items()}
        runs["resumed"] = interrupted(2, out=f"{folder}/run", checkpoint_every=2, **CASES["actor-critic"])
        told = {name: run.plain() for name, run in runs.items()}
        train(out=f"{folder}/begun", **BEGUN)
        taken = Path(folder, "taken")
        taken.mkdir(exist_ok=True)
        (taken / FILE).write_text('{"pid": 7, "host": "elsewhere"}')
        with pytest.raises(ValueError, match="taken by process 7 on elsewhere") as refused:
            train(out=taken)
        told["dealt"] = dealt()
        told["apart"] = [apart(**case) for case in ({"init": rank}, {"problem": seeded(rank)})]
        told["refused"], told["left"] = str(refused.value), sorted(file.name for file in Path(folder, "run").iterdir())
        told["half"] = half()
        torch.save(told, f"{folder}/{rank}.pt")


@functools.cache
def together(world):
    """What each of several processes has of every run, [rank][run]."""
    with tempfile.TemporaryDirectory() as folder:
        with several(world, __file__, folder):
            pass
        shutil.move(f"{folder}/begun", f"{LEFT}/{world}")
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]


def begun(world):
    """The folder of a run that several processes left after two epochs."""
    together(world)
    return Path(LEFT, str(world))


@functools.cache
def alone(name):
    return train(**CASES[name]).plain()


worlds = pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.long)])


@worlds
@pytest.mark.parametrize("name", CASES)
def test_the_number_of_processes_changes_nothing(name, world):
    """Trajectories, rewards, metrics and parameters, to rounding; and every process ends with the same."""
    one, many = alone(name), [run[name] for run in together(world)]
    for run in many:
        close(run["parameters"], one["parameters"])
        same_history(run["history"], one["history"])
    for epoch, path in enumerate(one["paths"]):
        parts = [run["paths"][epoch] for run in many]
        ids = torch.cat([p["ids"] for p in parts])
        assert {len(p["ids"]) for p in parts} == {len(ids) // world, -(-len(ids) // world)}
        assert torch.equal(ids.sort().values, path["ids"])
        close(torch.cat([p["x"] for p in parts], 1)[:, ids.argsort()], path["x"])
        close(torch.cat([p["reward"] for p in parts])[ids.argsort()], path["reward"])
        assert all(torch.equal(p["t"], path["t"]) for p in parts)


@worlds
def test_kl_in_float32_is_that_of_one_process(world):
    """Below float32 it is measured along the same few paths, whoever holds them."""
    one = half()
    for run in together(world):
        for name in ("kl", "kl_se"):
            assert run["half"][name] == pytest.approx(one[name], rel=0.02)  # states are those of a bf16 policy
        assert run["half"]["network_calls"] == one["network_calls"]


@worlds
def test_several_processes_resume(world):
    """Each goes on from its own part of the store."""
    one = alone("actor-critic")
    for run in together(world):
        close(run["resumed"]["parameters"], one["parameters"])
        same_history(run["resumed"]["history"], one["history"])


@worlds
def test_one_process_goes_on_where_several_stopped(world, tmp_path):
    """It takes over the trajectories that each of them held."""
    shutil.copytree(begun(world), out := tmp_path / "run")
    resumed = train(out=out, init=8, resume=True, **BEGUN | {"epochs": 4})
    one = train(**BEGUN | {"epochs": 4})
    close(resumed.parameters, one.parameters)
    same_history(resumed.history, one.history)


@worlds
def test_several_processes_hold_one_folder(world):
    """All of them are refused where the main one is, and nothing of the lock stays."""
    runs = together(world)
    assert len({run["refused"] for run in runs}) == 1
    assert all(run["left"] == ["checkpoints", "metrics.jsonl"] for run in runs)


@worlds
def test_every_process_has_an_equal_share_of_a_hand(world):
    """Together they have the nodes that one process has, each with its own state, action and condition."""
    for whole, *parts in zip(dealt(), *(run["dealt"] for run in together(world)), strict=True):
        assert [len(part) for part in parts] == [(13 + world - 1 - rank) // world for rank in range(world)]
        assert {card for part in parts for card in part} == set(whole)
        for part in parts:
            for card, v in part.items():
                close(v, whole[card])


def test_processes_that_begin_with_other_weights_are_refused():
    """By all of them, before anything is simulated."""
    for run in together(2):
        learners, reference = run["apart"]
        assert learners.startswith(
            "weights of policy, weights of critic must be the same on all 2 processes, and differ"
        )
        assert reference.startswith("reference must be the same") and "torch.manual_seed(seed)" in reference


# chunks, micro-batches, seeds


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_micro_batches_change_nothing(name):
    other = train(**{**CASES[name], "batch": 11, "micro_batch": 2 if "hands" in name else 9})
    close(other.parameters, alone(name)["parameters"])
    same_history(other.history, alone(name)["history"])


class Annotating(Algorithm):
    """Draws annotated minibatches, and learns nothing from them."""

    keep = 2

    def __init__(self, seen):
        self.seen = seen

    def learn(self, run):
        run.record_actions()
        before = dict(run.metrics.counts)

        def annotate(nodes):
            self.seen.append(len(nodes))
            return {"twice": 2 * nodes.x, "policy": run.policy(nodes.t, nodes.x, nodes.cond)}

        for nodes in run.minibatches(7, 10, annotate=annotate):
            assert len(nodes) == 10
            close(nodes["twice"], 2 * nodes.x)
            close(nodes["policy"], run.policy(nodes.t, nodes.x, nodes.cond).detach())
            assert not nodes["policy"].requires_grad
        assert run.metrics.counts["network_calls"] - before["network_calls"] == 70
        yield from ()


@pytest.mark.parametrize("batch, pieces", [(1000, [70]), (25, [20, 20, 20, 10]), (4, 7 * [4, 4, 2])])
@pytest.mark.parametrize("name", ["mixture-2d", "mixture-2d-conditional"])
def test_nodes_have_their_annotations(name, batch, pieces):
    """However many minibatches are drawn at a time: never more nodes than `batch`, nor less than a minibatch."""
    seen = []
    train(name, Annotating(seen), batch=batch, micro_batch=batch, epochs=2)
    assert seen == 2 * pieces


WITH_SLOPES = {
    "actor-critic": ACTOR_CRITIC,
    "actor-critic, its gradient as control": dataclasses.replace(ACTOR_CRITIC, critic_control=True),
    "ppo": PPOPenalty(updates=2, nodes=64, evaluation=dataclasses.replace(ACTOR_CRITIC, actor_updates=0, keep=1)),
    "q-learning": QLearning(critic_updates=2, q_updates=2, nodes=64),
    "next-value": NextValue(nodes=64),
    "lean adjoint": AdjointMatching(updates=2, nodes=64),
    "adjoint": AdjointMatching(updates=2, nodes=64, lean=False),
}


@pytest.mark.parametrize("name", WITH_SLOPES)
def test_gradients_in_the_state_are_taken_a_micro_batch_at_a_time(name, monkeypatch):
    """Through the reference they hold a graph as large as an update's, so `batch` does not bound them."""
    entry, sizes = catalogue.get("mixture-2d"), []

    def reference(t, x, cond=None):
        if torch.is_grad_enabled() and x.requires_grad:
            sizes.append(len(x))
        return entry.problem.reference(t, x, cond)

    gamma = 0.1 if name == "q-learning" else 0.0
    problem = dataclasses.replace(entry.problem, gamma=gamma, reference=reference)
    torch.manual_seed(7)
    policy = Policy(entry.problem, 16)
    policy = GaussianNetwork(problem, policy) if name == "q-learning" else policy
    critic = StructuredCritic(problem, Value(entry.problem, 16))
    train(
        algorithm=WITH_SLOPES[name], problem=problem, built=(policy, critic), epochs=2, batch=48, micro_batch=5,
        solver=Multistep2(),
    )  # fmt: skip
    assert max(sizes) == 5


class Alone:
    """What accelerate gives where it does not see the other processes."""

    num_processes = 1

    def free_memory(self):
        pass


class Once(Algorithm):
    """One optimiser step an epoch on a loss of its own, and the nodes it saw."""

    keep = 2

    def __init__(self, loss, size=100):
        self.loss, self.size, self.hands = loss, size, []

    def learn(self, run):
        run.record_actions()
        for nodes in run.minibatches(1, self.size):
            self.hands.append(nodes)
            yield Update("policy", lambda n: self.loss(run, n), nodes, self.size)


@dataclasses.dataclass(frozen=True)
class Mine(Algorithm):
    """A user's, whose fields have names that built-in ones have too, and limits of its own."""

    gain: float = 0.0
    nodes: Annotated[int, "in [0, 100]"] = 0
    clip: Annotated[float, "in [-1, 1)"] = -1.0

    def learn(self, run):
        run.record_actions()
        for nodes in run.minibatches(2, 50):
            yield Update("policy", lambda n: self.gain + squares(run, n), nodes, 50)


def test_an_algorithm_states_the_limits_of_its_own_fields():
    metrics = train(algorithm=Mine(), epochs=1).history[-1]
    assert metrics["policy_loss"] > 0
    for changes, message in (
        ({"nodes": 101}, r"nodes must be in \[0, 100\], got 101"),
        ({"clip": 1.0}, r"clip must be in \[-1, 1\), got 1.0"),
        ({"gain": "much"}, "gain must be a number, got 'much'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Mine(**changes)


def test_an_algorithm_that_yields_nothing_is_told_so():
    class Old(Algorithm):
        def learn(self, run):
            run.record_actions()

    with pytest.raises(TypeError, match=r"Old\.learn must yield what is to be updated, .* got NoneType"):
        train(algorithm=Old(), epochs=1)


def squares(run, nodes):
    """w |a - 1|²."""
    return nodes.w * (run.policy(nodes.t, nodes.x, nodes.cond) - 1).square().sum(1)


DESCENT = {"epochs": 1, "optimizer": torch.optim.SGD, "lr": 1.0, "schedule": lambda progress: 1.0}


@pytest.mark.parametrize("micro_batch", [1000, 7])
def test_an_update_descends_the_mean_over_nodes(micro_batch):
    """Gradient descent at rate 1 takes off the gradient of the mean, and says the mean and the gradient's norm."""
    before, algorithm = models()[0], Once(squares)
    run = train(algorithm=algorithm, micro_batch=micro_batch, max_grad_norm=1e9, **DESCENT)
    (nodes,), (metrics,) = algorithm.hands, run.history
    assert len(nodes) == 100
    loss = (nodes.w * (before(nodes.t, nodes.x) - 1).square().sum(1)).mean()
    grad = torch.autograd.grad(loss, list(before.parameters()))
    norm = torch.cat([g.flatten() for g in grad]).norm()
    for old, new, g in zip(before.parameters(), run.result.policy.parameters(), grad, strict=True):
        close(old - new, g)
    assert metrics["policy_loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    assert metrics["policy_grad_norm"] == pytest.approx(float(norm), rel=1e-12)


def test_a_long_gradient_is_shortened():
    run = train(algorithm=Once(squares), max_grad_norm=0.1, **DESCENT)
    (metrics,) = run.history
    assert metrics["policy_grad_norm"] > 1
    moved = nn.utils.parameters_to_vector(models()[0].parameters()) - nn.utils.parameters_to_vector(
        run.result.policy.parameters()
    )
    assert float(moved.detach().norm()) == pytest.approx(0.1, rel=1e-5)


def test_a_trust_region_holds_the_actor_back():
    """The distance to what the actor regresses on is the square root of the KL that is allowed."""
    start = nn.utils.parameters_to_vector(models()[0].parameters())

    def moved(nats):
        run = train(algorithm=dataclasses.replace(ACTOR_CRITIC, nats=nats), **DESCENT)
        return float((nn.utils.parameters_to_vector(run.result.policy.parameters()) - start).detach().norm())

    free, held, tighter = (moved(nats) for nats in (math.inf, 1e-8, 1e-10))
    assert held < free / 10
    assert held / tighter == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("case", [{"ema": 0.5}, {"algorithm": DDPO(nodes=64), "solver": DDIM()}], ids=["ac", "ddpo"])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(case):
    first, again, other = (train(**case, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.parameters, again.parameters)
    assert first.history == again.history
    assert all(torch.equal(a.x, b.x) for a, b in zip(first.paths, again.paths, strict=True))
    assert not torch.isclose(first.parameters, other.parameters).all()
    for a, b in zip(first.paths, other.paths, strict=True):
        assert not torch.isclose(a.x[0], b.x[0]).any()
        assert not torch.isclose(a.t[1:-1], b.t[1:-1]).any()


def test_hands_are_drawn_by_seed_and_epoch():
    def dealt(seed):
        algorithm = Once(squares)
        train(algorithm=algorithm, samples=200, seed=seed)
        return [tuple((200 * hand.k + hand.ids % 200).tolist()) for hand in algorithm.hands]

    first, again, other = dealt(0), dealt(0), dealt(1)
    assert first == again
    assert len({*first, *other}) == 6


def test_every_epoch_has_samples_and_times_of_its_own():
    paths = train(samples=4).paths
    assert torch.cat([p.ids for p in paths]).tolist() == list(range(12))
    natural = grids.natural(catalogue.get("mixture-2d").problem, 6)
    for path in paths:
        assert torch.equal(path.t[[0, -1]], natural[[0, -1]])
        step = torch.maximum(natural.diff()[1:], natural.diff()[:-1])
        assert bool(((path.t - natural)[1:-1].abs() <= 0.4 * step).all())
    assert not torch.isclose(paths[0].t[1:-1], paths[1].t[1:-1]).any()
    assert all(torch.equal(path.t, natural) for path in train(samples=4, jitter=0.0).paths)
    problem, along = catalogue.get("mixture-2d").problem, Settings(steps=6)
    assert all(torch.equal(path.t, along.times(problem, Noise(0, epoch))) for epoch, path in enumerate(paths))


def test_one_step_and_one_sample():
    assert train(samples=1, steps=1).paths[0].x.shape == (2, 1, 2)


# what is learned, and what is said about it


def test_metrics_by_hand():
    """Two epochs with Heun (two calls a step), 24 samples, 6 steps, hands of 64, both kept: rollouts, the last action,
    a_ref and V of the new batch, a and V of the old one, one call for a node of each optimiser step, and one for the
    critic's gradient where the policy learns."""
    first, second = train(epochs=2).result.history
    nodes, rollout, updates = 24 * 7, 24 * 6 * 2, (3 + 3 + 3) * 64
    epoch = rollout + 24 + 2 * nodes + updates
    assert first["network_calls"] == epoch
    assert second["network_calls"] == 2 * epoch + 2 * nodes
    assert (first["epoch"], second["epoch"]) == (1, 2)
    assert (first["trajectories"], second["trajectories"]) == (24, 48)
    asked = nodes + (3 + 3) * 64  # V of a batch, of the critic's hands and of those it labels, by a structured critic
    assert (first["reward_calls"], second["reward_calls"]) == (24 + asked, 48 + 2 * asked + nodes)
    assert list(first) == [
        "epoch", "trajectories", "network_calls", "reward_calls", "reward", "reward_std", "spread", "kl",
        "kl_se", "critic_loss", "critic_grad_norm", "policy_loss", "policy_grad_norm", "seconds",
    ]  # fmt: skip
    assert 0 < first["seconds"] < 60


@pytest.mark.parametrize("name", ["mixture-2d", "mixture-2d-conditional"])
@pytest.mark.parametrize("solver", [Heun(), EulerMaruyama()], ids=str)
def test_reward_and_kl_are_those_of_the_batch(name, solver):
    """KL is ctrl's path KL of the policy that made the trajectories, by the solver's own quadrature."""
    entry, policies, seen = catalogue.get(name), [models(name)[0]], []

    @torch.no_grad()
    def look(run, metrics):
        path = run.replay.collections[-1].trajectory
        path = dataclasses.replace(path, cond=entry.condition(path.ids))
        nats = Estimate.of(path_kl(entry.problem, path, policies[-1]))
        seen.append((metrics["kl"], float(nats.mean)))
        assert metrics["kl_se"] == pytest.approx(float(nats.stderr), rel=1e-10, abs=1e-14)
        reward = entry.problem.reward(path.x[-1], path.cond)
        assert metrics["reward"] == pytest.approx(float(reward.mean()), rel=1e-12)
        assert metrics["reward_std"] == pytest.approx(float(reward.std(correction=0)), rel=1e-12)
        variance = path.x[-1].var(0, correction=0).mean()
        assert metrics["spread"] == pytest.approx(float(variance.sqrt()), rel=1e-12)
        policies.append(copy.deepcopy(run.policy))

    train(name, solver=solver, callbacks=[look], lr=0.05)
    assert seen[-1][0] > 1e-3
    assert [kl for kl, _ in seen] == pytest.approx([exact for _, exact in seen], rel=1e-10, abs=1e-14)


def test_nodes_have_the_condition_of_their_sample():
    """In hands and in micro-batches; and the state too is that of the node they name."""

    def look(run, nodes):
        assert torch.equal(nodes.cond, nodes.ids % 3)
        for t, x, k, i in zip(nodes.t, nodes.x, nodes.k.tolist(), nodes.ids.tolist(), strict=True):
            path = run.collections[i // 10 - max(0, run.noise.epoch - 1)].trajectory
            assert torch.equal(x, path.x[k, i % 10])
            assert float(t) == float(path.t[k])
        return squares(run, nodes)

    algorithm = Once(look)
    train("mixture-2d-conditional", algorithm, samples=10, micro_batch=7)
    assert {int(c) for c in algorithm.hands[-1].cond} == {0, 1, 2}
    assert {int(i) // 10 for i in algorithm.hands[-1].ids} == {1, 2}  # the last two epochs


def test_learning_rates_follow_the_schedule():
    seen = []

    def look(run, metrics):
        seen.append([run.engine.learners[name].optimizer.param_groups[0]["lr"] for name in ("policy", "critic")])

    train(epochs=4, lr=0.02, critic_lr=0.03, callbacks=[look])
    assert seen == [[0.02 * linear_decay(e / 4), 0.03 * linear_decay(e / 4)] for e in range(4)]
    assert (linear_decay(0), linear_decay(1)) == pytest.approx((1, 0.1))


def test_the_averaged_policy():
    """ema <- 0.9 ema + 0.1 theta after every step of the policy's, from the first policy on."""
    average, errors = nn.utils.parameters_to_vector(models()[0].parameters()).detach(), []

    def look(run, metrics):
        nonlocal average
        average = 0.9 * average + 0.1 * nn.utils.parameters_to_vector(run.policy.parameters()).detach()
        errors.append(float((nn.utils.parameters_to_vector(run.ema.parameters()) - average).abs().max()))

    result = train(algorithm=dataclasses.replace(ACTOR_CRITIC, actor_updates=1), ema=0.9, callbacks=[look]).result
    assert errors == pytest.approx([0, 0, 0], abs=1e-15)
    assert not any(p.requires_grad for p in result.ema.parameters())
    assert train(epochs=1).result.ema is None


def test_an_exact_critic_is_left_as_it_is():
    critic = catalogue.get("mixture-2d").value
    run = train(built=(models()[0], critic), epochs=1)
    assert run.result.critic is critic
    assert "critic_loss" not in run.history[0]
    assert run.history[0]["policy_loss"] > 0


def test_a_critic_takes_its_level_from_the_first_epoch_and_keeps_it():
    """The mean reward; also in a later run, and of a critic that is not trained none."""
    built = models()
    first = train(built=built, samples=23)
    level = first.history[0]["reward"]
    assert float(built[1].level) == pytest.approx(level, rel=1e-12) and level != first.history[1]["reward"]
    train(built=built, seed=1)
    assert float(built[1].level) == pytest.approx(level, rel=1e-12)
    policy, fixed = models()
    train(built=(policy, fixed.requires_grad_(False)), epochs=1)
    assert float(fixed.level) == 0


def test_bfloat16():
    """Networks run in bfloat16, but once where the KL is measured; states and parameters stay float32; the averaged
    policy is a network of its own."""
    torch.set_default_dtype(torch.float32)
    seen = []
    built = models()
    for network in (built[0].network, built[1].network.network):
        network.layers[0].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    run = train(built=built, epochs=1, ema=0.5, accelerator=Accelerator(mixed_precision="bf16"))
    assert set(seen) == {torch.bfloat16, torch.float32} and seen.count(torch.float32) == 1
    assert run.paths[0].x.dtype == run.paths[0].reward.dtype == torch.float32
    assert {p.dtype for p in built[0].parameters()} == {torch.float32}
    t, x = torch.full((5,), 0.5), torch.randn(5, 2)
    averaged, policy = run.result.ema(t, x), run.result.policy(t, x)
    assert averaged.dtype == policy.dtype == torch.float32
    nn.init.ones_(built[0].network.layers[-1].weight)
    assert torch.equal(run.result.ema(t, x), averaged)
    assert not torch.equal(run.result.policy(t, x), policy)


# what is refused


class Untouched(nn.Module):
    """A policy that must not be called: what is wrong shows before anything is simulated."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, t, x, cond):
        raise AssertionError("the policy was called")


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("epochs", 0, "epochs must be >= 1, got 0"),
        ("samples", 8.0, "samples must be an integer, got 8.0"),
        ("steps", 0, "steps must"),
        ("batch", 0, "batch must"),
        ("micro_batch", -1, "micro_batch must"),
        ("checkpoint_every", 0, "checkpoint_every must"),
        ("max_grad_norm", -1.0, r"max_grad_norm must be in \(0, inf\], got -1.0"),
        ("max_grad_norm", float("nan"), "max_grad_norm must"),
        ("jitter", 0.5, r"jitter must be in \[0, 0.5\), got 0.5"),
        ("jitter", -0.1, "jitter must"),
        ("ema", 1.0, r"ema must be in \[0, 1\), got 1.0"),
        ("ema", -0.1, "ema must"),
    ],
)
def test_settings_are_checked(name, value, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{name: value})


@pytest.mark.parametrize(
    "algorithm, critic, settings, message",
    [
        (ACTOR_CRITIC, None, {}, r"critic must be given: .* \(see ctrl.NetworkCritic\)"),
        (DDPO(), None, {"solver": Heun()}, "solver Heun has no transition density, .* take EulerMaruyama, DDIM"),
        (DDPO(), None, {"solver": DDIM(), "resume": True}, "resume needs settings.out"),
    ],
)
def test_what_cannot_work_is_refused_before_any_rollout(algorithm, critic, settings, message):
    with pytest.raises(ValueError, match=message):
        train(algorithm=algorithm, built=(Untouched(), critic), **settings)


@pytest.mark.parametrize(
    "policy, got",
    [
        (Untouched().requires_grad_(False), "Untouched"),
        (nn.Identity(), "Identity"),
        (catalogue.get("mixture-2d").problem.reference, "method"),
    ],
)
def test_a_policy_must_have_something_to_train(policy, got):
    with pytest.raises(ValueError, match=f"policy has nothing to train: .* require a gradient, got {got}"):
        train(built=(policy, models()[1]))


def test_every_process_must_have_a_sample(monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 30)
    with pytest.raises(ValueError, match="samples must be at least one for each of the 30 processes, got 24"):
        train(built=(Untouched(), models()[1]))


def test_accumulation_is_the_loops_own():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps = 1: .* settings.micro_batch"):
        train(built=(Untouched(), models()[1]), accelerator=Accelerator(gradient_accumulation_steps=2))


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda x, cond: x, r"reward must return one number a sample, a tensor of shape \(24,\), got \(24, 2\)"),
        (lambda x, cond: x.sum(), r"shape \(24,\), got \(\)"),
        (lambda x, cond: x.sum(1).tolist(), r"shape \(24,\), got list"),
        (lambda x, cond: x.sum(1).numpy(), r"shape \(24,\), got ndarray"),
        (lambda x, cond: torch.arange(24.0).where(torch.arange(24) != 5, torch.nan), "not finite for sample id 5"),
        (lambda x, cond: x.sum(1) / 0, "not finite for sample id 0"),
    ],
)
def test_a_wrong_reward_is_refused(reward, message):
    entry = catalogue.get("mixture-2d")
    problem = dataclasses.replace(entry.problem, reward=reward)
    with pytest.raises(ValueError, match=message):
        train(built=(models()[0], entry.value), problem=problem, patience=1)


def test_an_error_in_the_reward_comes_through():
    def reward(x, cond):
        raise ConnectionError("no answer")

    problem = dataclasses.replace(catalogue.get("mixture-2d").problem, reward=reward)
    with pytest.raises(ConnectionError, match="no answer"):
        train(problem=problem)


def test_models_that_something_else_splits_are_refused(monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match=r"splits models in its own way, .* set settings\.split"):
        train(built=(Untouched(), catalogue.get("mixture-2d").value))


def test_processes_that_do_not_see_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"there are 2 processes \(WORLD_SIZE\), and each would train alone"):
        train(built=(Untouched(), catalogue.get("mixture-2d").value), accelerator=Alone())


def test_a_loss_must_be_one_number_a_node():
    with pytest.raises(ValueError, match=r"loss must return one number a node, shape \(100,\)"):
        train(algorithm=Once(lambda run, n: squares(run, n).mean()))


# one loop

OURS = {*ctrl.algorithms.__all__, "Optimizer"} - {"GaussianNetwork"}


def loops(source):
    """Lines on which a source trains by itself, or makes an algorithm of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, of = node.func.attr, ast.unparse(node.func.value).lower()
            if name in ("backward", "zero_grad") or (name == "step" and "opt" in of):
                yield node.lineno
        elif isinstance(node, ast.ClassDef) and {ast.unparse(b).rpartition(".")[2] for b in node.bases} & OURS:
            yield node.lineno


def test_no_other_training_loop():
    """Toy problems and large models reach `ctrl.fit`, and its algorithms as they are."""
    sources = [path for layer in ("toy", "scale") for path in sorted((ROOT / layer).rglob("*.py"))]
    made = sorted((ROOT / "scale" / "recipes").glob("*.py"))  # models are made there
    for path in (*made, ROOT / "scale" / "requirements.py"):  # and measured here
        sources.remove(path)
    assert [f"{path}:{line}" for path in sources for line in loops(path.read_text())] == []
    assert len(sources) > 5


@pytest.mark.parametrize(
    "source",
    [
        "loss.backward()",
        "self.accelerator.backward(loss)",
        "optimizer.step()",
        "self.opt.step()",
        "learner.optimizer.zero_grad()",
        "class A(Algorithm): pass",
        "class A(ctrl.algorithms.ActorCritic): pass",
        "class A(torch.optim.Optimizer): pass",
    ],
)
def test_another_loop_is_caught(source):
    assert list(loops(source)) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "scheduler.step(x, t)",
        "solver.step(x)",
        "class A(Problem): pass",
        "class A(Run): pass",
    ],
)
def test_what_is_no_loop_is_not(source):
    assert list(loops(source)) == []


# ddpo


def test_the_baseline_is_the_mean_over_others_of_the_group():
    """Of returns to go: reward less the cost that is still to come. In a group of two it is the other's."""
    found = []

    def look(run, metrics):
        batch = run.replay.collections[-1]
        found.append((batch.fields["advantage"][:-1], batch.trajectory.reward))

    problem = catalogue.get("gaussian-1d").problem
    for group in (2, 0):
        settings = Settings(samples=6, epochs=1, steps=3, solver=DDIM(), progress=False)
        fit(problem, Policy(problem), DDPO(nodes=6, group=group), settings=settings, callbacks=[look])
    (pairs, reward), (everyone, _) = found  # a policy that starts at the reference pays nothing
    torch.testing.assert_close(pairs, (reward - reward.view(3, 2).flip(1).flatten()).expand(3, 6))
    torch.testing.assert_close(everyone, ((reward - reward.mean()) * 6 / 5).expand(3, 6))


@pytest.mark.parametrize("group", [1, 4])
def test_groups_that_do_not_fit(group):
    problem = catalogue.get("gaussian-1d").problem
    with pytest.raises(ValueError, match=f"divide the 6 samples of an epoch, got {group}"):
        fit(problem, Policy(problem), DDPO(group=group), settings=Settings(samples=6, solver=DDIM(), progress=False))


def test_without_a_price_nobody_asks_the_reference_and_only_the_reward_counts():
    """beta = 0, as public codes have it: the advantages are rewards, and a call of the network is one of the policy."""
    problem = catalogue.get("gaussian-1d").problem
    policy = Policy(problem)  # starts at the reference, and holds it

    def asked(t, x, cond=None):
        raise AssertionError

    found = []

    def look(run, metrics):
        batch = run.replay.collections[-1]
        found.append((batch.fields["advantage"][:-1], batch.trajectory.reward, metrics))

    free = dataclasses.replace(problem, beta=0.0, reference=asked)
    settings = Settings(samples=6, epochs=2, steps=3, solver=DDIM(), lr=0.1, progress=False)
    fit(free, policy, DDPO(passes=1, nodes=6), settings=settings, callbacks=[look])
    for advantage, reward, metrics in found:
        torch.testing.assert_close(advantage, ((reward - reward.mean()) * 6 / 5).expand(3, 6))
        assert "kl" not in metrics
    assert found[-1][2]["network_calls"] == 2 * (6 * 3 + 6 + 6 * 3)  # rollout, its last node, update


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
