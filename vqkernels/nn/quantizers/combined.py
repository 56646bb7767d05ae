"""What residual and product quantizers have in common: children with one life cycle, and one crossing for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_flag, refuse
from vqkernels.nn.estimators.base import (
    Choice,
    Context,
    Estimator,
    finite_rows,
    flat,
    gather,
    mark,
    masked,
    no_loss,
)
from vqkernels.nn.estimators.sf_diveq import interpolate
from vqkernels.nn.quantizers.base import Quantized, Quantizer, check_decodable
from vqkernels.nn.quantizers.vector import VectorQuantizer


class Combined(Quantizer):
    """Base of quantizers made of others, its children.

    Only this module has a life cycle: children are called by rows, commit when it commits, and are saved once however
    often they are used.

    Args:
        name: what the argument that holds the children is called.
        children: quantizers, used in this order; one given several times is shared.
        dim: D of the whole.
        joint: whether they cross together; None where they can and `joins` says so.
        channel_dim: the dimension of x that holds the D features.
    """

    def __init__(
        self, name: str, children: Sequence[Quantizer], dim: int, *, joint: bool | None, channel_dim: int
    ):
        super().__init__(dim, channel_dim=channel_dim)
        distinct = list(dict.fromkeys(children))
        self._order = [distinct.index(child) for child in children]
        self._modules_of = name
        setattr(self, name, nn.ModuleList(distinct))
        self._check_children(name, distinct)
        self.noisy = any(child.noisy for child in distinct)
        self.changes = any(child.changes for child in distinct)
        why_not = why_not_joint(list(children))
        if joint is None:
            joint = why_not is None and self._joins()
        elif check_flag(type(self).__name__, "joint", joint) and why_not is not None:
            self._refuse("joint", f"be False or None for {why_not}", joint, "Leave it out")
        self.joint = joint

    def _check_children(self, name: str, distinct: list[Quantizer]) -> None:
        owner: dict[nn.Module, Quantizer] = {}
        for child in distinct:
            if child.channel_dim != -1:
                fix = f"Pass channel_dim to {type(self).__name__} alone"
                self._refuse(name, "have channel_dim -1", child.channel_dim, fix)
            if child._followed:
                fix = f"Call follow of the {type(self).__name__} instead"
                self._refuse(name, "follow no optimizer", "one that does", fix)
            for module in child.modules():
                if owner.setdefault(module, child) is not child:
                    requirement = "share nothing with each other unless they are one object"
                    fix = "Give the same quantizer several times"
                    self._refuse(name, requirement, f"two that share a {type(module).__name__}", fix)
        for child in distinct:
            child._whole = type(self).__name__

    def _joins(self) -> bool:
        """Whether children that can cross together do so by default."""
        return True

    def _refuse(self, argument: str, requirement: str, got: object, fix: str) -> NoReturn:
        refuse(ValueError, type(self).__name__, argument, requirement, got, fix)

    def distinct(self) -> list[Quantizer]:
        """The children, each once."""
        return list(getattr(self, self._modules_of))

    def ordered(self) -> list[Quantizer]:
        """The children in the order of their use."""
        distinct = self.distinct()
        return [distinct[i] for i in self._order]

    @property
    def num_codes(self) -> int:
        """K of each stage or group; the largest where they differ."""
        return max(child.num_codes for child in self.distinct())

    @property
    def num_indices(self) -> int:
        """How many values an index can take in the current mode; the largest where children differ."""
        return max(child.num_indices for child in self.distinct())

    @property
    def codes_per_latent(self) -> int:  # type: ignore[override]
        """Q of an evaluation: the sum over stages or groups."""
        return sum(child.codes_per_latent for child in self.ordered())

    @property
    def bits_per_latent(self) -> float:
        """Rate of the evaluation, in bits for each D-dimensional latent; inf where it is not a code."""
        return sum(child.bits_per_latent for child in self.ordered())

    @property
    def initialized(self) -> bool:
        """False while a warm-up runs, or while codes wait for their first batch."""
        return all(child.initialized for child in self.distinct())

    @property
    def warming(self) -> bool:
        """Whether training forwards pass x through for now: while any child's do."""
        return any(child.warming for child in self.distinct())

    @property
    def idle(self) -> bool:
        """Whether no schedule of the host will change anything any more."""
        return all(child.idle for child in self.distinct())

    def commit_parts(self, optimizer: torch.optim.Optimizer | None) -> None:
        for child in self.distinct():
            child.commit(optimizer)

    def _split(self, indices: Tensor) -> list[Tensor]:
        """Indices (..., Q) of an evaluation, as each child takes them."""
        check_decodable(indices, self.codes_per_latent)
        return list(indices.split([child.codes_per_latent for child in self.ordered()], dim=-1))

    def _passed(self, x: Tensor) -> Quantized:
        """What a warm-up returns: x itself, and no index."""
        # all parameters take part, so that data-parallel reducers find their gradient
        idle = sum((0 * parameter.sum() for parameter in self.parameters()), start=x.new_zeros(()))
        z = mark(x, finite_rows(x)) + idle.to(x.dtype)
        indices = torch.full((*x.shape[:-1], len(self._order)), -1, dtype=torch.int64, device=x.device)
        return Quantized(z, indices, no_loss(x))


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where sums are formed: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_quantizers(op: str, argument: str, children: object) -> list[Quantizer]:
    """A list of at least one quantizer."""
    if not isinstance(children, Sequence):
        requirement, got = "be a list of quantizers", type(children).__name__
        refuse(TypeError, op, argument, requirement, got, f"Pass {op}([...])")
    if not children:
        refuse(ValueError, op, argument, "be a list of at least one quantizer", "an empty one", "Pass some")
    for child in children:
        if not isinstance(child, Quantizer):
            fix = "Pass such as VectorQuantizer(Codebook(...), DiVeQ())"
            refuse(TypeError, op, argument, "be quantizers", type(child).__name__, fix)
    return list(children)


def evaluate_child(child: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """z in the dtype of the codes, exactly as `decode` gives it, and indices."""
    if math.isinf(child.bits_per_latent):
        # a point of a curve is no code
        return child.evaluate_rows(x)
    indices = child.encode_rows(x)
    return child.decode(indices), indices


# what every module has, and what a schedule of the host moves
_NO_SETTINGS = frozenset({*Estimator().__dict__, "idle"})


def settings(estimator: Estimator) -> tuple[type, dict[str, object]]:
    """What two estimators must have in common to be one."""
    return type(estimator), {k: v for k, v in estimator.__dict__.items() if k not in _NO_SETTINGS}


def why_not_joint(children: list[Quantizer]) -> str | None:
    """Why these cannot cross together, or None."""
    vectors = [child for child in children if isinstance(child, VectorQuantizer)]
    if len(vectors) < len(children):
        return "quantizers that are not all VectorQuantizers"
    if any(vector.metric != "euclidean" or vector.project_in is not None for vector in vectors):
        return "quantizers with a cosine metric or a projection"
    first = vectors[0].estimator
    if not first.joint:
        return f"{type(first).__name__}, which crosses to no sum of codes"
    if any(settings(vector.estimator) != settings(first) for vector in vectors):
        return "estimators that are not of one kind"
    return None


def chosen_points(codes: Tensor, choice: Choice) -> Tensor:
    """The points that were chosen, (..., [G,] D), differentiable in the codes; float32 or wider, 0 for index -1."""
    codes, indices = flat(codes.to(wide(codes.dtype)), choice.indices)
    if choice.position is None:
        return gather(codes, indices)
    return interpolate(codes, indices, choice.position)


def cross_once(estimator: Estimator, x: Tensor, target: Tensor, context: Context) -> Tensor:
    """z of x (..., D) that crosses to the target (..., D) of its row."""
    rows = torch.arange(x.shape[:-1].numel(), device=x.device).view(x.shape[:-1])
    codes = (target if estimator.reaches_codes else target.detach()).reshape(-1, x.shape[-1])
    if x.numel() == 0:
        # no codebook is empty
        codes = F.pad(codes, (0, 0, 0, 1))
    return estimator.cross(x, codes, Choice(masked(rows, context.mask)), context).z


def stack_codebooks(codebooks: list[Tensor]) -> Tensor:
    """Codebooks (K, D) or (Q, K, D) in one (Q, K, D), ended by rows of NaN where K differs."""
    flat = [codebook if codebook.dim() == 3 else codebook[None] for codebook in codebooks]
    most = max(codebook.shape[1] for codebook in flat)
    return torch.cat([F.pad(c, (0, 0, 0, most - c.shape[1]), value=torch.nan) for c in flat])
