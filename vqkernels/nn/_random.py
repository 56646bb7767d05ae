"""Seeds and row numbers that make n processes draw what one would."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from vqkernels.ops.philox import philox_op

# streams of one seed beside those of vqkernels/philox.py: where other seeds are drawn, and how many stages are kept
_SEEDS, DROPOUT = 6, 7


def distributed() -> bool:
    """Whether this call runs in a process group of more than one; asked anew each time."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def draw_seed(device: torch.device) -> Tensor:
    """A 0-d int64 seed from torch's default generator of `device`, that of rank 0 on every rank; no host sync."""
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)
    if distributed():
        dist.broadcast(seed, 0)
    return seed


def split_seed(seed: Tensor, parts: int) -> list[Tensor]:
    """Independent 0-d int64 seeds for the parts of a quantizer, made of one: the same on every rank."""
    words, _ = philox_op(seed, 1, (parts + 1) // 2, _SEEDS, 0)
    first, second = words.view(-1, 2)[:parts].unbind(1)
    return list((first << 31 ^ second).unbind())


def check_equal_ranks(rows: int, device: torch.device) -> None:
    """Every rank must hold equally many rows; the device itself complains, the host does not wait for it."""
    if distributed():
        # made on the device: a copy from the host would wait for it, and no graph can hold it
        most = rows * torch.arange(1, -2, -2, device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        words = (
            f"x must have as many rows on every rank; got {rows} on rank {dist.get_rank()}, others elsewhere"
        )
        message = f"VectorQuantizer: {words}. Drop the last, smaller batch."
        torch.ops.aten._assert_async.msg(most[0] == -most[1], message)


def first_row(rows: int) -> int:
    """Number of rows on lower ranks, where every rank holds as many rows as this one."""
    return dist.get_rank() * rows if distributed() else 0


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if distributed():
        dist.all_reduce(tensor)
    return tensor


def all_rows(tensor: Tensor) -> Tensor:
    """The rows of every rank, in rank order; as many on each."""
    if not distributed():
        return tensor
    check_equal_ranks(len(tensor), tensor.device)
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def draw_seed_aside(device: torch.device) -> Tensor:
    """A seed like that of `draw_seed`, after which the generator is as it was: for what a forward does only once."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        return draw_seed(device)


def of_first_rank(tensor: Tensor) -> Tensor:
    """The tensor of rank 0 on every rank, where sums in another order may have made them differ; in place."""
    if distributed():
        dist.broadcast(tensor, 0)
    return tensor


def rows_before(rows: Tensor) -> tuple[Tensor | int, Tensor]:
    """From a 0-d count on each rank: the sum of those on lower ranks, and the sum of all."""
    if not distributed():
        return 0, rows
    each = rows.new_zeros(dist.get_world_size())
    each[dist.get_rank()] = rows
    upto = all_sum(each).cumsum(0)
    return upto[dist.get_rank()] - rows, upto[-1]
