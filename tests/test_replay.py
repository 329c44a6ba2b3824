"""What a learner sees: every node once a deck, the same hands whatever the processes, weights that integrate."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl import EulerMaruyama, Exponential, Heun, Multistep2, Noise, grids, rollout
from ctrl.replay import Batch, Replay, with_reward
from ctrl.rollout import Trajectory
from toy import catalogue

COUNTS = st.integers(1, 7)


def batch(epoch, samples, steps, rank=0, world=1):
    """The part of an epoch that a process holds; x is (node, id), and so is what lies beside it, thrice over."""
    ids = torch.arange(epoch * samples + rank, (epoch + 1) * samples, world)
    t = torch.linspace(0, 1, steps + 1) ** (1 + epoch)
    k = torch.arange(steps + 1.0)[:, None].expand(-1, len(ids))
    x = torch.stack([k, ids.double().expand(steps + 1, -1)], -1)
    part = Batch(Trajectory(t, x, None, None, grids.left(None, t), ids, reward=ids.double()))
    part.lay("thrice", 3 * x)
    return part


def replay(epochs, samples, steps, rank=0, world=1):
    store = Replay(samples, rank, world)
    for epoch in range(epochs):
        store.add(batch(epoch, samples, steps, rank, world), epochs)
    return store


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hands(store, updates, size, first, last, generator, together=1):
    """Each hand by itself."""
    for nodes, owner in store.deal(updates, size, first, last, generator, together):
        sizes = (owner == store.rank).sum(1).tolist()
        assert sum(sizes) == len(nodes)
        for n, end in zip(sizes, itertools.accumulate(sizes), strict=True):
            yield nodes.part(slice(end - n, end))


def cards(nodes):
    return list(zip(nodes.k.tolist(), nodes.ids.tolist(), strict=True))


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 60), st.booleans())
def test_a_deck_has_every_node_once(epochs, samples, steps, size, inner):
    """However often decks are used up in the middle of a hand: no node is dealt again before all others were."""
    first, last = (1, steps - 1) if inner and steps > 1 else (0, steps)
    every = [(k, i) for k in range(first, last + 1) for i in range(epochs * samples)]
    seen = Counter(dict.fromkeys(every, 0))
    for n, hand in enumerate(hands(replay(epochs, samples, steps), 12, size, first, last, seeded()), 1):
        assert len(hand) == size
        seen.update(cards(hand))
        assert len(seen) == len(every)
        decks, rest = divmod(n * size, len(every))
        assert Counter(seen.values()) == +Counter({decks: len(every) - rest, decks + 1: rest})


def test_every_deck_is_shuffled_anew():
    decks = [cards(hand) for hand in hands(replay(1, 7, 7), 3, 56, 0, 7, seeded())]
    assert decks[0] != decks[1] != decks[2] != decks[0]
    assert sorted(decks[0]) not in decks


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 40), st.integers(2, 5))
def test_processes_share_a_hand(epochs, samples, steps, size, world):
    """The union is what one process would be dealt, and no node is with two."""
    world = min(world, samples)
    one = hands(replay(epochs, samples, steps), 5, size, 0, steps, seeded(3))
    parts = [hands(replay(epochs, samples, steps, r, world), 5, size, 0, steps, seeded(3)) for r in range(world)]
    for whole, *shares in zip(one, *parts, strict=True):
        assert Counter(cards(whole)) == sum((Counter(cards(share)) for share in shares), Counter())
        for rank, share in enumerate(shares):
            assert all(i % samples % world == rank for _, i in cards(share))


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 3))
def test_a_node_carries_what_is_its_own(epochs, samples, steps, world):
    for rank in range(min(world, samples)):
        for nodes in hands(replay(epochs, samples, steps, rank, world), 3, 25, 0, steps, seeded()):
            assert torch.equal(nodes.x, torch.stack([nodes.k, nodes.ids], 1).double())
            assert torch.equal(nodes["thrice"], 3 * nodes.x)
            torch.testing.assert_close(nodes.t, (nodes.k / steps) ** (1 + nodes.ids // samples), rtol=1e-14, atol=0)
            t = [torch.linspace(0, 1, steps + 1) ** (1 + e) for e in range(epochs)]
            step = torch.stack([torch.cat([v.diff(), torch.zeros(1)]) for v in t])
            torch.testing.assert_close(nodes.w, (steps + 1) * step[nodes.ids // samples, nodes.k])


@given(COUNTS, COUNTS, COUNTS, st.integers(1, 40), st.integers(1, 3), st.integers(1, 9))
def test_hands_are_the_same_however_many_are_drawn_together(epochs, samples, steps, size, world, together):
    for rank in range(min(world, samples)):
        store = replay(epochs, samples, steps, rank, min(world, samples))
        one, many = (hands(store, 7, size, 0, steps, seeded(), n) for n in (1, together))
        assert [sorted(cards(hand)) for hand in one] == [sorted(cards(hand)) for hand in many]


def test_a_generator_decides_the_order():
    def dealt(seed):
        return [cards(hand) for hand in hands(replay(2, 5, 3), 4, 10, 0, 3, seeded(seed))]

    assert dealt(1) == dealt(1) != dealt(2)


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
    store = Replay(5, batches=[Batch(path)])
    (nodes,) = hands(store, 1, 5 * (steps + 1), 0, steps, seeded(seed))

    def h(t, x, cond):
        return torch.cos(3 * t) * x[:, 0] + x.square().sum(1)

    mean = (nodes.w * h(nodes.t, nodes.x, None)).mean()
    torch.testing.assert_close(mean, path.integrate(h).mean(), rtol=1e-12, atol=1e-12)
    at_nodes = path.at_nodes(h)
    torch.testing.assert_close(Batch(path).integrate(at_nodes), path.integrate(h), rtol=1e-12, atol=1e-12)


def test_the_oldest_is_forgotten():
    store = Replay(4)
    for epoch in range(5):
        store.add(batch(epoch, 4, 2), keep=3)
        assert [int(b.trajectory.ids[0]) // 4 for b in store.batches] == list(range(max(0, epoch - 2), epoch + 1))
    store.add(batch(5, 4, 2), keep=1)
    assert [int(b.trajectory.ids[0]) // 4 for b in store.batches] == [5]


# whole trajectories


@given(st.integers(1, 3), COUNTS, st.integers(1, 3), COUNTS)
def test_a_deck_has_every_trajectory_once(epochs, samples, steps, size):
    """But for those that would make a short hand; and a hand is of one epoch."""
    size = min(size, samples)
    each = samples // size
    hands = list(replay(epochs, samples, steps).deal_paths(2 * epochs * each, size, seeded()))
    for deck in (hands[: epochs * each], hands[epochs * each :]):
        dealt = [hand.trajectory.ids.tolist() for hand in deck]
        assert all(len(ids) == size and len({i // samples for i in ids}) == 1 for ids in dealt)
        assert len({i for ids in dealt for i in ids}) == epochs * each * size
        assert Counter(ids[0] // samples for ids in dealt) == dict.fromkeys(range(epochs), each)


@given(st.integers(1, 3), COUNTS, st.integers(1, 3), COUNTS, st.integers(2, 4))
def test_processes_share_a_hand_of_trajectories(epochs, samples, steps, size, world):
    size, world = min(size, samples), min(world, samples)
    one = replay(epochs, samples, steps).deal_paths(5, size, seeded(3))
    parts = [replay(epochs, samples, steps, r, world).deal_paths(5, size, seeded(3)) for r in range(world)]
    for whole, *shares in zip(one, *parts, strict=True):
        ids = [share.trajectory.ids.tolist() for share in shares]
        assert sorted(whole.trajectory.ids.tolist()) == sorted(i for part in ids for i in part)
        for share in shares:
            path = share.trajectory
            assert torch.equal(path.x[..., 1], path.ids.double().expand(steps + 1, -1))
            assert torch.equal(path.reward, path.ids.double())
            assert torch.equal(share.fields["thrice"], 3 * path.x)
            assert torch.equal(path.t, whole.trajectory.t)


# laying, parting


def test_what_is_laid_beside_the_left_nodes_is_zero_at_the_last():
    part = batch(0, 3, 4)
    part.lay("left", torch.ones(4, 3, 2))
    assert part.fields["left"].shape == (5, 3, 2)
    assert part.fields["left"].sum((1, 2)).tolist() == [6, 6, 6, 6, 0]


@pytest.mark.parametrize("shape", [(3, 3), (6, 3), (5, 2), (5,)])
def test_what_is_laid_must_fit(shape):
    with pytest.raises(
        ValueError, match=r"target must be given at the nodes, shape \(5, 3, ...\), got \(" + str(shape[0])
    ):
        batch(0, 3, 4).lay("target", torch.zeros(shape))


def test_a_part_has_its_own_conditions():
    (nodes,) = hands(replay(2, 3, 2), 1, 10, 0, 2, seeded())
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
