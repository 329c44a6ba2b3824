"""What a learner sees: every node once a deck, the same hands whatever the processes, weights that integrate."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl import EulerMaruyama, Exponential, Heun, Multistep2, Noise, grids, rollout
from ctrl.nodes import Collection
from ctrl.rollout import Trajectory, with_reward
from ctrl.training.replay import Replay
from toy import catalogue

COUNTS = st.integers(1, 7)


def batch(epoch, samples, steps, rank=0, world=1):
    """The part of an epoch that a process holds; x is (node, id), and so is what is attached to it, thrice over."""
    ids = torch.arange(epoch * samples + rank, (epoch + 1) * samples, world)
    t = torch.linspace(0, 1, steps + 1) ** (1 + epoch)
    k = torch.arange(steps + 1.0)[:, None].expand(-1, len(ids))
    x = torch.stack([k, ids.double().expand(steps + 1, -1)], -1)
    part = Collection(Trajectory(t, x, None, None, grids.left(None, t), ids, reward=ids.double()))
    part.attach("thrice", 3 * x)
    return part


def replay(epochs, samples, steps, rank=0, world=1):
    store = Replay(samples, rank, world)
    for epoch in range(epochs):
        store.add(batch(epoch, samples, steps, rank, world), epochs)
    return store


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def minibatches(store, updates, size, last, generator, together=1):
    """Each minibatch by itself."""
    for nodes, owner in store.minibatches(updates, size, last, generator, together):
        sizes = (owner == store.rank).sum(1).tolist()
        assert sum(sizes) == len(nodes)
        for n, end in zip(sizes, itertools.accumulate(sizes), strict=True):
            yield nodes.part(slice(end - n, end))


def cards(nodes):
    return list(zip(nodes.k.tolist(), nodes.ids.tolist(), strict=True))


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 60), st.booleans())
def test_a_shuffle_has_every_node_once(epochs, samples, steps, size, but_the_last):
    """However often one is used up in the middle of a minibatch: no node is drawn again before all others were."""
    last = steps - 1 if but_the_last else steps
    every = [(k, i) for k in range(last + 1) for i in range(epochs * samples)]
    seen = Counter(dict.fromkeys(every, 0))
    for n, nodes in enumerate(minibatches(replay(epochs, samples, steps), 12, size, last, seeded()), 1):
        assert len(nodes) == size
        seen.update(cards(nodes))
        assert len(seen) == len(every)
        shuffles, rest = divmod(n * size, len(every))
        assert Counter(seen.values()) == +Counter({shuffles: len(every) - rest, shuffles + 1: rest})


def test_every_shuffle_is_another():
    shuffles = [cards(nodes) for nodes in minibatches(replay(1, 7, 7), 3, 56, 7, seeded())]
    assert shuffles[0] != shuffles[1] != shuffles[2] != shuffles[0]
    assert sorted(shuffles[0]) not in shuffles


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 40), st.integers(2, 5))
def test_processes_share_a_minibatch(epochs, samples, steps, size, world):
    """The union is what one process would draw, and no node is with two."""
    world = min(world, samples)
    one = minibatches(replay(epochs, samples, steps), 5, size, steps, seeded(3))
    parts = [minibatches(replay(epochs, samples, steps, r, world), 5, size, steps, seeded(3)) for r in range(world)]
    for whole, *shares in zip(one, *parts, strict=True):
        assert Counter(cards(whole)) == sum((Counter(cards(share)) for share in shares), Counter())
        for rank, share in enumerate(shares):
            assert all(i % samples % world == rank for _, i in cards(share))


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 3))
def test_a_node_carries_what_is_its_own(epochs, samples, steps, world):
    for rank in range(min(world, samples)):
        for nodes in minibatches(replay(epochs, samples, steps, rank, world), 3, 25, steps, seeded()):
            assert torch.equal(nodes.x, torch.stack([nodes.k, nodes.ids], 1).double())
            assert torch.equal(nodes["thrice"], 3 * nodes.x)
            torch.testing.assert_close(nodes.t, (nodes.k / steps) ** (1 + nodes.ids // samples), rtol=1e-14, atol=0)
            t = [torch.linspace(0, 1, steps + 1) ** (1 + e) for e in range(epochs)]
            step = torch.stack([torch.cat([v.diff(), torch.zeros(1)]) for v in t])
            torch.testing.assert_close(nodes.w, (steps + 1) * step[nodes.ids // samples, nodes.k])


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 40), st.integers(1, 3), st.integers(1, 9))
def test_minibatches_are_the_same_however_many_are_drawn_together(epochs, samples, steps, size, world, together):
    for rank in range(min(world, samples)):
        store = replay(epochs, samples, steps, rank, min(world, samples))
        one, many = (minibatches(store, 7, size, steps, seeded(), n) for n in (1, together))
        assert [sorted(cards(nodes)) for nodes in one] == [sorted(cards(nodes)) for nodes in many]


def test_a_generator_decides_the_order():
    def drawn(seed):
        return [cards(nodes) for nodes in minibatches(replay(2, 5, 3), 4, 10, 3, seeded(seed))]

    assert drawn(1) == drawn(1) != drawn(2)


@given(
    st.sampled_from([EulerMaruyama(), Heun(), Exponential(), Multistep2()]),
    st.sampled_from([grids.uniform, grids.log_snr, grids.natural]),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_the_mean_of_w_h_over_nodes_is_the_integral(solver, grid, steps, seed):
    """For the quadrature of every solver, on jittered grids: sums over nodes are the trajectory's own integrals."""
    problem = catalogue.get("mixture-2d").problem
    times = grids.jitter(grid(problem, steps), torch.rand(steps - 1, generator=seeded(seed)) - 0.5)
    path = rollout(problem, problem.reference, times, Noise(seed), torch.arange(5), solver=solver)
    store = Replay(5, collections=[Collection(path)])
    (nodes,) = minibatches(store, 1, 5 * (steps + 1), steps, seeded(seed))

    def h(t, x, cond):
        return torch.cos(3 * t) * x[:, 0] + x.square().sum(1)

    mean = (nodes.w * h(nodes.t, nodes.x, None)).mean()
    torch.testing.assert_close(mean, path.integrate(h).mean(), rtol=1e-12, atol=1e-12)
    at_nodes = path.at_nodes(h)
    torch.testing.assert_close(Collection(path).integrate(at_nodes), path.integrate(h), rtol=1e-12, atol=1e-12)


def test_the_oldest_is_forgotten():
    store = Replay(4)
    for epoch in range(5):
        store.add(batch(epoch, 4, 2), keep=3)
        assert [int(b.trajectory.ids[0]) // 4 for b in store.collections] == list(range(max(0, epoch - 2), epoch + 1))
    store.add(batch(5, 4, 2), keep=1)
    assert [int(b.trajectory.ids[0]) // 4 for b in store.collections] == [5]


# whole trajectories


@given(st.integers(1, 3), COUNTS, st.integers(1, 3), COUNTS)
def test_a_shuffle_has_every_trajectory_once(epochs, samples, steps, size):
    """But for those that would make a short minibatch; and each is of one epoch."""
    size = min(size, samples)
    each = samples // size
    found = list(replay(epochs, samples, steps).path_minibatches(2 * epochs * each, size, seeded()))
    for shuffle in (found[: epochs * each], found[epochs * each :]):
        drawn = [paths.trajectory.ids.tolist() for paths in shuffle]
        assert all(len(ids) == size and len({i // samples for i in ids}) == 1 for ids in drawn)
        assert len({i for ids in drawn for i in ids}) == epochs * each * size
        assert Counter(ids[0] // samples for ids in drawn) == dict.fromkeys(range(epochs), each)


@given(st.integers(1, 3), COUNTS, st.integers(1, 3), COUNTS, st.integers(2, 4))
def test_processes_share_a_minibatch_of_trajectories(epochs, samples, steps, size, world):
    size, world = min(size, samples), min(world, samples)
    one = replay(epochs, samples, steps).path_minibatches(5, size, seeded(3))
    parts = [replay(epochs, samples, steps, r, world).path_minibatches(5, size, seeded(3)) for r in range(world)]
    for whole, *shares in zip(one, *parts, strict=True):
        ids = [share.trajectory.ids.tolist() for share in shares]
        assert sorted(whole.trajectory.ids.tolist()) == sorted(i for part in ids for i in part)
        for share in shares:
            path = share.trajectory
            assert torch.equal(path.x[..., 1], path.ids.double().expand(steps + 1, -1))
            assert torch.equal(path.reward, path.ids.double())
            assert torch.equal(share.fields["thrice"], 3 * path.x)
            assert torch.equal(path.t, whole.trajectory.t)


# another number of processes


@given(st.integers(1, 3), st.integers(4, 9), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_another_number_of_processes_takes_over_what_is_in_store(epochs, samples, steps, before, after):
    """Each ends with the trajectories that it would have collected itself."""
    states = [replay(epochs, samples, steps, rank, before).state_dict(epochs) for rank in range(before)]
    for rank in range(after):
        store, own = Replay(samples, rank, after), replay(epochs, samples, steps, rank, after)
        store.load_state_dict(*states)
        for found, expected in zip(store.collections, own.collections, strict=True):
            assert found.tensors.keys() == expected.tensors.keys()
            assert all(torch.equal(found.tensors[name], v) for name, v in expected.tensors.items())


# attaching, parting


def test_what_is_attached_to_left_nodes_is_zero_at_the_last():
    part = batch(0, 3, 4)
    part.attach("left", torch.ones(4, 3, 2))
    assert part.fields["left"].shape == (5, 3, 2)
    assert part.fields["left"].sum((1, 2)).tolist() == [6, 6, 6, 6, 0]


@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (5, 2), (5,)])
def test_what_is_attached_must_fit(shape):
    with pytest.raises(
        ValueError, match=r"target must be given at the nodes, shape \(5, 3, ...\), got \(" + str(shape[0])
    ):
        batch(0, 3, 4).attach("target", torch.zeros(shape))


def test_a_part_has_its_own_conditions():
    (nodes,) = minibatches(replay(2, 3, 2), 1, 10, 2, seeded())
    nodes = dataclasses.replace(nodes, cond=nodes.ids % 3)
    part = nodes.part(slice(4, 7))
    assert len(part) == 3
    assert torch.equal(part.cond, part.ids % 3)
    assert torch.equal(part.x, nodes.x[4:7])
    assert torch.equal(part["thrice"], 3 * part.x)
    assert nodes.each(lambda v: v).cond is None


# rewards


def test_a_reward_carries_no_graph_and_the_states_precision():
    path = batch(0, 3, 2).trajectory
    reward = with_reward(path, torch.arange(3.0, dtype=torch.float32, requires_grad=True) * 2).reward
    assert reward.dtype == torch.float64
    assert not reward.requires_grad
    assert with_reward(path, torch.tensor([1, 0, 2])).reward.tolist() == [1.0, 0.0, 2.0]
