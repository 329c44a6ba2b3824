"""What processes send one another: gradients, to be summed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BUCKET = 32 * 2**20
"""Bytes of gradients in one message, unless a single one has more."""


def sum_in_place(tensors: Sequence[Tensor]) -> None:
    """Sum each over processes."""
    for bucket in _buckets(tensors):
        flat = torch.cat([v.flatten() for v in bucket])
        torch.distributed.all_reduce(flat)
        for v, total in zip(bucket, flat.split([v.numel() for v in bucket]), strict=True):
            v.copy_(total.view_as(v))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, of one dtype and at most BUCKET bytes, or one larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for v in sorted(tensors, key=lambda v: str(v.dtype)):
        if bucket and (v.dtype != bucket[0].dtype or size + v.nbytes > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(v)
        size += v.nbytes
    yield bucket
