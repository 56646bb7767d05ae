"""`Residual`: each stage quantizes what the stages before it left."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from vqkernels.checks import check_count
from vqkernels.nn._random import DROPOUT, split_seed
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Context, no_loss
from vqkernels.nn.estimators.diveq import DiVeQ
from vqkernels.nn.methods import Method, Spec, register
from vqkernels.nn.quantizers.base import Quantized, Quantizer, mean_rows
from vqkernels.nn.quantizers.combined import (
    Combined,
    check_quantizers,
    chosen_points,
    cross_once,
    evaluate_child,
    stack_codebooks,
    wide,
)
from vqkernels.nn.quantizers.vector import VectorQuantizer
from vqkernels.nn.upkeep.recent import RecentLatents
from vqkernels.ops.philox import philox_op


class Residual(Combined):
    """Each stage quantizes what the stages before it left; the result is the sum (DiVeQ eq. 18 to 21).

    Joint, the stages choose one after the other without gradient, and x crosses once, to the sum (DiVeQ C.7):

        r_q = x - sum_{p<q} c^p,   c^q nearest to r_q (or a dithered point),   z = cross(x, sum_q c^q)
        loss = sum_q loss_q(x - sg[sum_{p<q} c^p], c^q)

    With DiVeQ there is one error vector and one noise, and each chosen code has the same gradient; with SF-DiVeQ the
    two codes of a dithered point have 1 - l and l of it. With STE it is z = x + sg[sum_q c^q - x], and the commitment
    loss of every stage reaches x, as in SoundStream and EnCodec.

    Not joint, it is the composition itself, with the chain rule:

        z = sum_q f_q(x - sum_{p<q} z_p),   loss = sum_q loss_q

    With STE stages dz/dx is the identity too, but what the first stage leaves no longer depends on x: the losses of
    later stages train their codes and reach nothing before them.

    While a stage warms up, z = x for all. Every stage then remembers what the stages that have started leave; when
    codes start as means of latents, what later stages remember becomes what these codes leave of it. A stage that is
    itself composed keeps what it saw.

    Args:
        stages: quantizers of D features each, composed ones too. One given several times is a shared codebook: it sees
            what all its stages see, and commits once.
        joint: None for joint where all stages are VectorQuantizers with estimators of one kind, neither cosine nor
            projected.
        min_stages: in training, each example (index of the first dimension) keeps a number of stages drawn from
            {min_stages, ..., Q}; those dropped have index -1 and see nothing of it. None keeps all.
        channel_dim: the dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        TypeError: a stage is not a quantizer.
        ValueError: stages have different D, share a part without being one object, or cannot cross jointly.
    """

    def __init__(
        self,
        stages: Sequence[Quantizer],
        *,
        joint: bool | None = None,
        min_stages: int | None = None,
        channel_dim: int = -1,
    ):
        children = check_quantizers("Residual", "stages", stages)
        super().__init__("stages", children, children[0].dim, joint=joint, channel_dim=channel_dim)
        if any(stage.dim != self.dim for stage in children):
            dims = ", ".join(str(stage.dim) for stage in children)
            self._refuse("stages", "have the same features", dims, "Pass stages of one dim")
        if min_stages is not None:
            check_count("Residual", "min_stages", min_stages, minimum=1, maximum=len(children))
        self.min_stages = min_stages
        self.noisy = self.noisy or min_stages is not None

    def train_rows(self, x: Tensor, context: Context) -> Quantized:
        if self.warming:
            return self._warm_up(x, context)
        return self._joint(x, context) if self.joint else self._straight(x, context)

    def _straight(self, x: Tensor, context: Context) -> Quantized:
        left = total = None
        indices, loss = [], no_loss(x)
        for stage, its in zip(self.ordered(), self._contexts(x, context), strict=True):
            left = x.to(wide(x.dtype)) if total is None else x - total
            z, index, its_loss = stage.train_rows(left, its)
            total = z if total is None else total + z
            indices.append(index)
            loss = loss + its_loss
        return Quantized(cast(Tensor, total).to(x.dtype), torch.cat(indices, -1), loss)

    def _joint(self, x: Tensor, context: Context) -> Quantized:
        stages = cast("list[VectorQuantizer]", self.ordered())
        left, total = x, None
        indices, loss = [], no_loss(x)
        for stage, its in zip(stages, self._contexts(x, context), strict=True):
            stage.start_codes(left, its)
            codes, estimator = stage.codes(), stage.estimator
            its = its._replace(learned=stage.codebook.learned)
            choice = estimator.choose(left.detach(), codes, its)
            if estimator.has_loss:
                loss = loss + estimator.cross(left, codes, choice, its).loss
            stage.observe(left, choice.indices)
            indices.append(choice.indices)
            points = chosen_points(codes, choice)
            total = points if total is None else total + points
            left = x - total.detach()
        z = cross_once(stages[0].estimator, x, cast(Tensor, total), context)
        return Quantized(z, torch.stack(indices, -1), loss)

    def _contexts(self, x: Tensor, context: Context) -> Iterator[Context]:
        """Seed and mask of each stage."""
        seeds = split_seed(context.seed, len(self._order))
        if self.min_stages is None:
            yield from (context._replace(seed=seed) for seed in seeds)
            return
        kept = self._kept(x, context)
        for q, seed in enumerate(seeds):
            if q < self.min_stages:
                yield context._replace(seed=seed)
                continue
            mask = kept > q if context.mask is None else context.mask & (kept > q)
            rows = mean_rows(x, mask)
            # a mean over no rows is 0
            rows = None if rows is None else torch.where(rows > 0, rows, 1)
            yield Context(seed, context.row_offset, mask, rows)

    def _kept(self, x: Tensor, context: Context) -> Tensor:
        """How many stages each row keeps: (...) int64, the same for all rows of an example."""
        leading = x.shape[:-1]
        examples = leading[0] if leading else 1
        first = context.row_offset // max(1, leading[1:].numel())
        words, _ = philox_op(context.seed, examples, 1, DROPOUT, first)
        least = cast(int, self.min_stages)
        kept = least + ((words[:, 0, 0] >> 8) * (len(self._order) - least + 1) >> 24)
        return kept.view((*leading[:1], *[1] * (len(leading) - 1))).expand(leading)

    def _warm_up(self, x: Tensor, context: Context) -> Quantized:
        left = x.detach().to(wide(x.dtype))
        for stage in self.distinct():
            if stage.warming:
                stage.train_rows(left, context)
            elif stage.initialized:
                left = left - evaluate_child(stage, left)[0].detach()
        return self._passed(x)

    def start_rows(self, x: Tensor, context: Context) -> None:
        left = x
        for stage in self.distinct():
            stage.start_rows(left, context)
            if stage.initialized:
                left = left - evaluate_child(stage, left)[0]

    def evaluate_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, points, indices = x, [], []
        for stage in self.ordered():
            point, index = evaluate_child(stage, left)
            points.append(point)
            indices.append(index)
            left = x - _sum(points).detach()
        return _narrow(_sum(points), points).to(x.dtype), torch.cat(indices, -1)

    def decode(self, indices: Tensor) -> Tensor:
        points = [
            stage.decode(part) for stage, part in zip(self.ordered(), self._split(indices), strict=True)
        ]
        return _narrow(_sum(points), points)

    def export(self) -> Tensor:
        """Plain codebooks (Q, K, D), detached: z = sum_q export[q, indices[..., q]].

        A composed stage gives as many codebooks as it has itself; where K differs, the shorter ones end in rows of NaN.
        """
        return stack_codebooks([stage.export() for stage in self.ordered()])

    def commit_parts(self, optimizer: torch.optim.Optimizer | None) -> None:
        distinct = self.distinct()
        for q, stage in enumerate(distinct):
            waited = stage.warming
            stage.commit(optimizer)
            if waited and not stage.warming:
                for later in distinct[q + 1 :]:
                    _remember_less(later, stage)


@torch.no_grad()
def _remember_less(stage: Quantizer, before: Quantizer) -> None:
    """What the warm-up of `stage` remembers becomes what `before`, whose codes have just started, leaves of it."""
    if isinstance(stage, VectorQuantizer) and stage.project_in is None and stage.metric == "euclidean":
        for part in stage.upkeep:
            recent = getattr(part, "recent", None)
            if isinstance(recent, RecentLatents) and len(recent.rows) > 1:
                rows = recent.rows[:-1]
                rows.sub_(evaluate_child(before, rows)[0])


def _sum(points: list[Tensor]) -> Tensor:
    total = points[0].to(wide(points[0].dtype))
    for point in points[1:]:
        total = total + point
    return total


def _narrow(total: Tensor, points: list[Tensor]) -> Tensor:
    """The sum in the dtype of the codes, however it was formed."""
    dtype = points[0].dtype
    for point in points[1:]:
        dtype = torch.promote_types(dtype, point.dtype)
    return total.to(dtype)


def _two_stages(spec: Spec) -> Residual:
    stages = [
        VectorQuantizer(
            Codebook(spec.num_codes, spec.dim),
            DiVeQ(noise_std=spec.noise_std),
            copy.deepcopy(list(spec.upkeep)),
        )
        for _ in range(2)
    ]
    return Residual(stages, channel_dim=spec.channel_dim)


register(
    "residual",
    Method(
        "two DiVeQ stages, the second on what the first left: more bits with short codebooks",
        source="DiVeQ C.7",
        make=_two_stages,
        noisy=True,
        replace=True,
    ),
)
