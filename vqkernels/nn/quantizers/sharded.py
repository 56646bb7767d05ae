"""A codebook that is spread over processes, for more codes than one device holds."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqkernels.checks import check_below, check_kind, refuse
from vqkernels.nn._random import all_rows, all_sum, distributed
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Choice, Context, Estimator, gather, nearest
from vqkernels.nn.quantizers.base import Quantized, Quantizer, check_decodable
from vqkernels.ops import code_sums


class ShardedVectorQuantizer(Quantizer):
    """A `VectorQuantizer` whose K codes are shared out evenly over the ranks, in their order.

    Each rank holds K / ranks codes as its own parameter and its own rows of x. A forward gathers the rows of all ranks,
    each rank searches its shard, and all agree on the least distance, formed in float64 in the order of `nearest_code`,
    and on the lowest index that has it: indices equal those of one codebook on one device. Then each rank receives the
    codes of its rows. The gradient of a code is the mean over ranks, as DistributedDataParallel makes it of everything
    else: wrap a model after `ignore_shards(model)`, which keeps DDP's hands off the shards. Every rank must take part
    in every forward, `decode` and `export`, with equally many rows. In a single process this is a `VectorQuantizer`.

    Args:
        codebook: this rank's learned codes (K / ranks, D), different from those of other ranks.
        estimator: one whose rows choose single codes without needing all of them: STE, rotation, NSVQ, DiVeQ, ...
        channel_dim: dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        TypeError: the codebook is not a plain learned one.
        ValueError: the estimator needs all codes at once.
    """

    def __init__(self, codebook: Codebook, estimator: Estimator, *, channel_dim: int = -1):
        name = type(self).__name__
        if type(codebook) is not Codebook:
            fix = "Pass a Codebook: statistics and generators are of whole codebooks"
            refuse(TypeError, name, "codebook", "be a plain learned one", type(codebook).__name__, fix)
        check_kind(name, "estimator", estimator, Estimator, "Pass such as STE()")
        if type(estimator).choose is not Estimator.choose or type(estimator).encode is not Estimator.encode:
            got = type(estimator).__name__
            fix = "Pass one such as STE or DiVeQ, whose rows take their nearest code"
            refuse(ValueError, name, "estimator", "search single codes", got, fix)
        super().__init__(codebook.dim, channel_dim=channel_dim)
        estimator.check(codebook)
        self.codebook, self.estimator = codebook, estimator
        self.noisy = estimator.noisy
        self.to(codebook.device)

    @property
    def num_codes(self) -> int:
        """K, of all ranks together."""
        return self.codebook.num_codes * _world()

    @property
    def bits_per_latent(self) -> float:
        """log2 K."""
        return math.log2(self.num_codes)

    def train_rows(self, x: Tensor, context: Context) -> Quantized:
        indices = self._search(x.detach())
        if context.mask is not None:
            indices = torch.where(context.mask, indices, -1)
        target = _Fetch.apply(self.codebook.codes(), indices).reshape(-1, self.dim)
        if not len(target):
            # no codebook is empty
            target = F.pad(target, (0, 0, 0, 1))
        # each row has its own code now
        own = torch.arange(indices.numel(), device=x.device).view(indices.shape)
        own = torch.where(indices >= 0, own, -1)
        its = context._replace(learned=self.codebook.learned)
        estimate = self.estimator.cross(x, target, Choice(own), its)
        return Quantized(estimate.z, indices[..., None], estimate.loss)

    def evaluate_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = self.encode_rows(x)
        return self.decode(indices).to(x.dtype), indices

    def encode_rows(self, x: Tensor) -> Tensor:
        return self._search(x.detach())[..., None]

    def _search(self, x: Tensor) -> Tensor:
        """The nearest of all ranks' codes: (..., D) -> (...)."""
        codes = self.codebook.codes().detach()
        rows = all_rows(x.reshape(-1, self.dim))
        best = nearest(rows, codes)
        if distributed():
            sq_dist = _sq_dist(rows, codes[best])
            # a code that is not finite loses even to an infinite distance; of none finite, the first is taken
            known = codes[best].isfinite().all(1) & rows.isfinite().all(1)
            nobody = torch.full_like(best, torch.iinfo(torch.int64).max)
            sq_dist = torch.where(known, sq_dist.nan_to_num(nan=torch.inf), torch.inf)
            least = sq_dist.clone()
            dist.all_reduce(least, dist.ReduceOp.MIN)
            best = torch.where(known & (sq_dist == least), best + dist.get_rank() * len(codes), nobody)
            dist.all_reduce(best, dist.ReduceOp.MIN)
            best = torch.where(best == nobody, 0, best).view(_world(), -1)[dist.get_rank()]
        return best.view(x.shape[:-1])

    def decode(self, indices: Tensor) -> Tensor:
        check_decodable(indices, 1)
        check_below("decode", "indices", indices, self.num_codes)
        return _Fetch.apply(self.codebook.codes(), indices.squeeze(-1))

    def export(self) -> Tensor:
        """The plain (K, D) codebook of all ranks, on each of them; where one device holds so much."""
        return all_rows(self.codebook.codes().detach()).clone()


class _Fetch(torch.autograd.Function):
    """Codes of this rank's indices from whoever has them: shard (K / ranks, D), indices (...) -> (..., D)."""

    @staticmethod
    def forward(ctx, codes: Tensor, indices: Tensor) -> Tensor:
        flat = all_rows(indices.reshape(-1))
        first = (dist.get_rank() if distributed() else 0) * len(codes)
        held = (flat >= first) & (flat < first + len(codes))
        own = torch.where(held, flat - first, -1)
        ctx.save_for_backward(own)
        ctx.shape, ctx.dtype = codes.shape, codes.dtype
        rows = all_sum(gather(codes, own))
        rank = dist.get_rank() if distributed() else 0
        return rows.view(_world(), -1, codes.shape[1])[rank].reshape(*indices.shape, codes.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (own,) = ctx.saved_tensors
        rows = all_rows(grad.reshape(-1, ctx.shape[1]))
        return (code_sums(rows, own, ctx.shape[0]).sums / _world()).to(ctx.dtype), None


def _sq_dist(x: Tensor, codes: Tensor) -> Tensor:
    """|x - c|^2 row by row, as the contract of `nearest_code` forms it: features ascending, nothing fused."""
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for column, code in zip(x.double().t(), codes.double().t(), strict=True):
        t = column - code
        total = total + t * t
    return total


def _world() -> int:
    return dist.get_world_size() if distributed() else 1


def ignore_shards(model: nn.Module) -> list[str]:
    """Tell DistributedDataParallel to leave sharded codebooks alone; call it before wrapping the model.

    Args:
        model: the module that will be wrapped.

    Returns:
        The names of the parameters that it will neither broadcast nor average.
    """
    names = []
    for prefix, module in model.named_modules():
        if isinstance(module, ShardedVectorQuantizer):
            names += [
                f"{prefix}{'.' if prefix else ''}codebook.{name}"
                for name, _ in module.codebook.named_parameters()
            ]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return names
