"""`Product`: groups of features, each quantized by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from vqkernels.checks import check_below, check_count, refuse
from vqkernels.nn._random import split_seed
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Context, Estimate, finite_rows, flat, gather, mark, no_loss
from vqkernels.nn.estimators.diveq import DiVeQ
from vqkernels.nn.methods import Method, Spec, register
from vqkernels.nn.quantizers.base import Quantized, Quantizer, check_decodable
from vqkernels.nn.quantizers.combined import (
    Combined,
    check_quantizers,
    chosen_points,
    cross_once,
    evaluate_child,
    settings,
    stack_codebooks,
)
from vqkernels.nn.quantizers.vector import VectorQuantizer


class Product(Combined):
    """Groups of consecutive features, each quantized by its part; the result is their concatenation.

        z = [f_1(x_1), ..., f_G(x_G)],   loss = sum_g loss_g

    Joint, the groups choose by themselves, and x crosses once to the concatenated points (DiVeQ C.7): one error vector
    and one noise over all D features.

    Parts that are alike (VectorQuantizers with equal K, features, metric and estimator, not projected) are searched in
    one call, and cross in one, where row number `latent * G + g` has the noise of group g.

    Args:
        parts: quantizers whose features sum to D, composed ones too. One given several times is a shared codebook: it
            sees what all its groups see, and commits once.
        joint: None for joint where parts can be and their estimators have no loss, as those of the DiVeQ family.
        channel_dim: the dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        TypeError: a part is not a quantizer.
        ValueError: parts share something without being one object, or cannot cross jointly.
    """

    def __init__(self, parts: Sequence[Quantizer], *, joint: bool | None = None, channel_dim: int = -1):
        children = check_quantizers("Product", "parts", parts)
        super().__init__(
            "parts", children, sum(part.dim for part in children), joint=joint, channel_dim=channel_dim
        )
        self._sizes = [part.dim for part in children]

    @classmethod
    def of(
        cls,
        groups: int,
        make: Callable[[], Quantizer],
        *,
        joint: bool | None = None,
        channel_dim: int = -1,
    ) -> Product:
        """A product of `groups` parts, each made by a call of `make`.

        Args:
            groups: G >= 1.
            make: returns a new quantizer of D / G features; `[make()] * G` in the constructor shares one instead.
            joint, channel_dim: as of `Product`.
        """
        check_count("Product", "groups", groups, minimum=1)
        return cls([make() for _ in range(groups)], joint=joint, channel_dim=channel_dim)

    def _joins(self) -> bool:
        return not any(cast(VectorQuantizer, part).estimator.has_loss for part in self.distinct())

    def train_rows(self, x: Tensor, context: Context) -> Quantized:
        if self.warming:
            for group, part in zip(
                self._groups(mark(x.detach(), finite_rows(x))), self.ordered(), strict=True
            ):
                if part.warming:
                    part.train_rows(group, context)
            return self._passed(x)
        # a row is one: where a group is not finite, no group of it counts
        x = mark(x, finite_rows(x))
        alike = self._alike()
        if self.joint:
            return self._joint(x, context, alike)
        if alike is not None:
            return self._grouped(x, context, alike)
        seeds = split_seed(context.seed, len(self._order))
        found = [
            part.train_rows(group, context._replace(seed=seed))
            for part, group, seed in zip(self.ordered(), self._groups(x), seeds, strict=True)
        ]
        loss = no_loss(x)
        for quantized in found:
            loss = loss + quantized.loss
        z, indices = (torch.cat(tensors, -1) for tensors in zip(*(q[:2] for q in found), strict=True))
        return Quantized(z, indices, loss)

    def _groups(self, x: Tensor) -> list[Tensor]:
        return list(x.split(self._sizes, dim=-1))

    def _alike(self) -> list[VectorQuantizer] | None:
        """The parts in order, if one call can serve them all."""
        parts = self.ordered()
        vectors = [part for part in parts if isinstance(part, VectorQuantizer)]
        if len(vectors) < len(parts):
            return None
        first = vectors[0]
        same = all(
            part.num_codes == first.num_codes
            and part.dim == first.dim
            and part.metric == first.metric
            and part.project_in is None
            and settings(part.estimator) == settings(first.estimator)
            for part in vectors
        )
        return vectors if same and first.estimator.grouped else None

    def _grouped(self, x: Tensor, context: Context, parts: list[VectorQuantizer]) -> Quantized:
        first, groups = parts[0], len(parts)
        y = first.inside(x.unflatten(-1, (groups, first.dim)))
        self._start(y, context, parts)
        codes = torch.stack([part.codes() for part in parts])
        estimate: Estimate = first.estimator(y, codes, _learned(context, parts))
        for g, part in enumerate(parts):
            part.observe(y[..., g, :], estimate.indices[..., g])
        # a mean over the rows of all groups, in place of a mean for each
        return Quantized(estimate.z.flatten(-2).to(x.dtype), estimate.indices, estimate.loss * groups)

    def _joint(self, x: Tensor, context: Context, alike: list[VectorQuantizer] | None) -> Quantized:
        parts = cast("list[VectorQuantizer]", self.ordered())
        estimator, loss = parts[0].estimator, no_loss(x)
        if alike is not None:
            y = x.unflatten(-1, (len(parts), parts[0].dim))
            self._start(y, context, parts)
            codes = torch.stack([part.codes() for part in parts])
            choice = estimator.choose(y.detach(), codes, context)
            points, indices = chosen_points(codes, choice).flatten(-2), choice.indices
            if estimator.has_loss:
                loss = estimator.cross(y, codes, choice, _learned(context, parts)).loss * len(parts)
        else:
            chosen = []
            seeds = split_seed(context.seed, len(parts))
            for part, group, seed in zip(parts, self._groups(x), seeds, strict=True):
                its = context._replace(seed=seed, learned=part.codebook.learned)
                part.start_codes(group, its)
                codes = part.codes()
                choice = part.estimator.choose(group.detach(), codes, its)
                if estimator.has_loss:
                    loss = loss + part.estimator.cross(group, codes, choice, its).loss
                chosen.append((chosen_points(codes, choice), choice.indices[..., None]))
            points, indices = (torch.cat(tensors, -1) for tensors in zip(*chosen, strict=True))
        for g, (part, group) in enumerate(zip(parts, self._groups(x), strict=True)):
            part.observe(group, indices[..., g])
        return Quantized(cross_once(estimator, x, points, context), indices, loss)

    def _start(self, y: Tensor, context: Context, parts: list[VectorQuantizer]) -> None:
        for g, part in enumerate(parts):
            part.start_codes(y[..., g, :], context)

    def start_rows(self, x: Tensor, context: Context) -> None:
        for part, group in zip(self.ordered(), self._groups(mark(x, finite_rows(x))), strict=True):
            part.start_rows(group, context)

    def evaluate_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alike = self._alike()
        if alike is not None and self.initialized and alike[0].estimator.plain:
            indices = self._search(x, alike)
            return self.decode(indices).to(x.dtype), indices
        found = [
            evaluate_child(part, group) for part, group in zip(self.ordered(), self._groups(x), strict=True)
        ]
        z, indices = (torch.cat(tensors, -1) for tensors in zip(*found, strict=True))
        return z.to(x.dtype), torch.where(finite_rows(x), indices, 0)

    def _search(self, x: Tensor, parts: list[VectorQuantizer]) -> Tensor:
        first = parts[0]
        y = first.inside(x.unflatten(-1, (len(parts), first.dim)))
        codes = torch.stack([part.codes().detach() for part in parts])
        indices = first.estimator.encode(y, codes).squeeze(-1)
        # a row is one: where a group is not finite, no group chooses
        return torch.where(finite_rows(x), indices, 0)

    def decode(self, indices: Tensor) -> Tensor:
        alike = self._alike()
        if alike is not None and alike[0].estimator.plain:
            check_decodable(indices, len(alike))
            # one too large would be a code of the next group
            check_below("decode", "indices", indices, self.num_codes)
            return gather(*flat(torch.stack([part.table() for part in alike]), indices)).flatten(-2)
        points = [
            part.decode(index) for part, index in zip(self.ordered(), self._split(indices), strict=True)
        ]
        return torch.cat(points, -1)

    def export(self) -> Tensor:
        """Plain codebooks (Q, K, D), detached, 0 outside their group: z = sum_q export[q, indices[..., q]].

        A composed part gives as many codebooks as it has itself; where K differs, the shorter ones end in rows of NaN.
        """
        codebooks, before = [], 0
        for part in self.ordered():
            after = self.dim - before - part.dim
            codebooks.append(torch.nn.functional.pad(part.export(), (before, after)))
            before += part.dim
        return stack_codebooks(codebooks)


def _learned(context: Context, parts: list[VectorQuantizer]) -> Context:
    return context._replace(learned=any(part.codebook.learned for part in parts))


def _two_groups(spec: Spec) -> Product:
    if spec.dim % 2:
        refuse(ValueError, "build", "dim", "be even for 'product'", spec.dim, "Pass an even dim")

    def make() -> VectorQuantizer:
        upkeep = copy.deepcopy(list(spec.upkeep))
        codebook = Codebook(spec.num_codes, spec.dim // 2)
        return VectorQuantizer(codebook, DiVeQ(noise_std=spec.noise_std), upkeep)

    return Product.of(2, make, channel_dim=spec.channel_dim)


register(
    "product",
    Method(
        "two groups of features with a DiVeQ codebook each: many codes for little memory",
        source="DiVeQ C.7",
        make=_two_groups,
        noisy=True,
        replace=True,
    ),
)
