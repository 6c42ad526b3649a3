"""What all workers of a trial must see alike: one that alone went another way would leave the others waiting."""

from __future__ import annotations

import torch
import torch.distributed as dist


def sum_over_workers(value: torch.Tensor, workers: int) -> torch.Tensor:
    """The same number on every worker: if one alone saw a NaN, the others would wait for it for ever."""
    if workers > 1:
        dist.all_reduce(value)
    return value


def largest(values: list[int], device: torch.device, workers: int) -> list[int]:
    """Of each value, the largest that a worker has."""
    both = torch.tensor(values, dtype=torch.int64, device=device)
    if workers > 1:
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return [int(value) for value in both.tolist()]


def told_by_first(value: int, device: torch.device, workers: int) -> int:
    """Worker 0's value, on every worker."""
    told = torch.tensor(value, dtype=torch.int64, device=device)
    if workers > 1:
        dist.broadcast(told, src=0)
    return int(told.item())


def all_say_yes(own: bool, device: torch.device, workers: int) -> bool:
    """Whether it is true on every worker."""
    return largest([int(not own)], device, workers) == [0]
