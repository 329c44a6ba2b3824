"""What processes send one another."""

import torch

from ctrl import processes


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
