"""What processes send one another: equal shares of every hand, and gradients in bounded messages."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ctrl.training import processes
from ctrl.training.processes import equal_shares


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_shares_differ_by_one_node_and_no_more_travel_than_must(hands, size, world, seed):
    owner = torch.randint(world, (hands, size), generator=torch.Generator().manual_seed(seed))
    target = equal_shares(owner, world)
    for before, after in zip(owner, target, strict=True):
        held, shares = before.bincount(minlength=world), after.bincount(minlength=world)
        assert int(shares.max() - shares.min()) == (1 if size % world else 0)
        assert int((before != after).sum()) == int((held - shares).clamp(min=0).sum())


def test_what_is_shared_out_equally_stays():
    owner = torch.tensor([[0, 1, 2, 0, 1], [2, 1, 0, 1, 0]])
    assert torch.equal(equal_shares(owner, 3), owner)


def test_gradients_travel_in_buckets(monkeypatch):
    """Of one dtype and 64 bytes, or one gradient that has more; each of them once, in place."""
    messages = []
    monkeypatch.setattr(processes, "BUCKET", 64)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda v: messages.append(v.clone()) or v.mul_(2))
    sizes = [(3,), (2, 2), (30,), (1,), (), (4, 2)]
    dtypes = [torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float64, torch.float64]
    before = [torch.full(size, float(i), dtype=d) for i, (size, d) in enumerate(zip(sizes, dtypes, strict=True))]
    grads = [v.clone() for v in before]
    processes.sum_in_place(grads)
    assert all(torch.equal(v, 2 * old) for v, old in zip(grads, before, strict=True))
    assert sum(m.nbytes for m in messages) == sum(v.nbytes for v in before)
    assert sorted(m.nbytes for m in messages) == [2, 8, 16, 24, 64, 240]
