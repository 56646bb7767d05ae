"""Binary codes: lookup-free and binary spherical quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.checks import check_count, check_number, refuse
from vqkernels.nn._random import all_sum, distributed
from vqkernels.nn.estimators.base import Context
from vqkernels.nn.methods import Method, Spec, register
from vqkernels.nn.quantizers.implicit import ImplicitQuantizer
from vqkernels.ops import unit_rows

# bits whose joint entropy is exact: 2^12 codes, by products of 2^6
_GROUP = 12


class LFQ(ImplicitQuantizer):
    """Lookup-free quantization: the sign of each of b features is a bit of the index (Yu et al. 2024, MAGVIT-v2).

        z    = y + sg[sign(y) - y],   sign(0) = -1
        loss = entropy (E[H(p)] - diversity H(E[p])) + commitment |y - sg[sign(y)]|^2
        p    = softmax(-sharpness |y - c|^2) over all codes, a product of p_b = sigmoid(4 sharpness y_b)

    H(E[p]) is that of the codebook up to b = 12; beyond, the sum of those of groups of 12 bits or fewer, an upper bound
    (as in Zhao et al. 2025). E is over rows that count, of all processes.

    Args:
        bits: b; K = 2^b codes, at most 2^62.
        dim: D, features of x; linear layers lead to the b features and back where it is not b.
        channel_dim: dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.
        entropy_weight: of both entropies, in nats.
        diversity_weight: of the entropy of the mean beside the mean entropy.
        commitment_weight: of the squared distance to the signs, a mean over rows and features.
        sharpness: inverse temperature of the soft assignment.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    place: Tensor

    def __init__(
        self,
        bits: int,
        *,
        dim: int | None = None,
        channel_dim: int = -1,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        commitment_weight: float = 0.25,
        sharpness: float = 1.0,
    ):
        name = type(self).__name__
        check_count(name, "bits", bits, minimum=1, maximum=62)
        super().__init__(bits if dim is None else dim, bits, channel_dim=channel_dim)
        self.entropy_weight = check_number(name, "entropy_weight", entropy_weight)
        self.diversity_weight = check_number(name, "diversity_weight", diversity_weight)
        self.commitment_weight = check_number(name, "commitment_weight", commitment_weight)
        self.sharpness = check_number(name, "sharpness", sharpness)
        self.keep_constants()

    def constants(self) -> dict[str, Tensor]:
        return {"place": 1 << torch.arange(self.grid_dim, device="cpu")}

    @property
    def num_codes(self) -> int:
        """K = 2^bits."""
        return 1 << self.grid_dim

    @property
    def unit(self) -> float:
        """Distance of a point from 0 in each feature."""
        return 1.0

    def settle(self, y: Tensor) -> Tensor:
        """Where the latents are compared with the points."""
        return y

    def snap(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.settle(y)
        positive = y.detach() > 0
        signs = self.unit * (2 * positive.to(y.dtype) - 1)
        # the value is the point itself
        return (y - y.detach()) + signs, (positive * self.place).sum(-1)

    def points(self, indices: Tensor) -> Tensor:
        positive = (indices[..., None] & self.place) != 0
        return torch.where(positive, self.unit, -self.unit)

    def penalty(self, y: Tensor, counted: Tensor, context: Context) -> Tensor:
        y = self.settle(y)
        weight = counted[..., None].to(y.dtype)
        rows = counted.sum().to(y.dtype) if context.mean_rows is None else context.mean_rows.to(y.dtype)
        rows = rows.clamp_min(1)
        logits = 4 * self.sharpness * y / self.unit
        # ln(1 + e^l); torch's softplus would leave out e^-l from l = 20 on
        softplus = torch.logaddexp(logits, torch.zeros_like(logits))
        # H of a bit, smooth at both ends
        sure = (weight * (softplus - logits * torch.sigmoid(logits))).sum() / rows
        shares = _mean_over_ranks(_share_sums(logits, softplus, weight) / rows)
        # where all rows agree to the last digit, the slope of the entropy is inf * 0
        spread = torch.special.entr(shares.clamp_min(torch.finfo(shares.dtype).tiny))
        loss = self.entropy_weight * (sure - self.diversity_weight * spread.sum())
        if self.commitment_weight:
            off = (y - self.unit * (2 * (y.detach() > 0).to(y.dtype) - 1)).square()
            loss = loss + self.commitment_weight * (weight * off).sum() / (rows * self.grid_dim)
        return loss

    def extra_repr(self) -> str:
        return f"bits={self.grid_dim}, dim={self.dim}"


class BSQ(LFQ):
    """Binary spherical quantization: LFQ of latents on the unit sphere (Zhao et al. 2025).

        u = y/|y|,   z = u + sg[sign(u)/sqrt(b) - u]
        loss as of LFQ, with p_b = sigmoid(4 sharpness sqrt(b) u_b) and no commitment, for |u - z| <= sqrt(2 - 2/sqrt(b))

    Args:
        bits, dim, channel_dim, entropy_weight, diversity_weight, sharpness: as of `LFQ`.
    """

    def __init__(
        self,
        bits: int,
        *,
        dim: int | None = None,
        channel_dim: int = -1,
        entropy_weight: float = 0.1,
        diversity_weight: float = 1.0,
        sharpness: float = 1.0,
    ):
        super().__init__(
            bits,
            dim=dim,
            channel_dim=channel_dim,
            entropy_weight=entropy_weight,
            diversity_weight=diversity_weight,
            commitment_weight=0.0,
            sharpness=sharpness,
        )

    @property
    def unit(self) -> float:
        return self.grid_dim**-0.5

    def settle(self, y: Tensor) -> Tensor:
        return unit_rows(y)


def _share_sums(logits: Tensor, softplus: Tensor, weight: Tensor) -> Tensor:
    """Sums over rows of the probabilities of all codes of each group of bits, in a row: (..., b), (..., 1) -> (groups,)."""
    bits, found = logits.shape[-1], []
    flat = logits.reshape(-1, bits), softplus.reshape(-1, bits)
    for group in zip(*(part.tensor_split(-(-bits // _GROUP), dim=1) for part in flat), strict=True):
        first, second = (
            _products(*half) for half in zip(*(part.tensor_split(2, dim=1) for part in group), strict=True)
        )
        # a code's probability is a product of two: the sum over rows is one small matrix product
        found.append((first.t() @ (weight.reshape(-1, 1) * second)).flatten())
    return torch.cat(found)


def _products(logits: Tensor, softplus: Tensor) -> Tensor:
    """Probabilities of all 2^b settings of independent bits with these logits: (N, b) -> (N, 2^b)."""
    place = torch.arange(logits.shape[1], device=logits.device)
    settings = torch.arange(1 << logits.shape[1], device=logits.device)[:, None] >> place & 1  # (2^b, b)
    # ln p = l - ln(1 + e^l), ln(1 - p) = -ln(1 + e^l)
    return (logits @ settings.t().to(logits.dtype) - softplus.sum(1, keepdim=True)).exp()


def _mean_over_ranks(mean: Tensor) -> Tensor:
    """The mean of means: each rank's own with its gradient, the others' as numbers."""
    if not distributed():
        return mean
    world = torch.distributed.get_world_size()
    return mean + (all_sum(mean.detach().clone()) / world - mean.detach())


def bits_of(name: str, num_codes: int) -> int:
    """b with K = 2^b.

    Raises:
        ValueError: K is no power of two above 1.
    """
    bits = num_codes.bit_length() - 1
    if num_codes < 2 or num_codes != 1 << bits:
        fix = f"Pass {1 << max(1, bits)} or {2 << max(1, bits)}"
        refuse(ValueError, name, "num_codes", "be a power of two above 1", num_codes, fix)
    return bits


def _lfq(spec: Spec) -> LFQ:
    return LFQ(bits_of("LFQ", spec.num_codes), dim=spec.dim, channel_dim=spec.channel_dim)


def _bsq(spec: Spec) -> BSQ:
    return BSQ(bits_of("BSQ", spec.num_codes), dim=spec.dim, channel_dim=spec.channel_dim)


register(
    "lfq",
    Method(
        "binary codes without a table, K up to 2^62; an entropy loss spreads them",
        source="Yu et al. 2024",
        make=_lfq,
        upkeep=False,
    ),
)
register(
    "bsq",
    Method(
        "LFQ on the sphere: bounded error, no commitment loss",
        source="Zhao et al. 2025",
        make=_bsq,
        upkeep=False,
    ),
)
