"""The forms in which the kernels of nearest_code are compiled: what the dtypes and the sizes decide."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vqkernels.kernels._certificate import certify
from vqkernels.kernels._common import INTERPRETED, TYPES, Configuration, feature_block
from vqkernels.kernels._finish import finish
from vqkernels.kernels._forms import LOOP_BLOCK, PAD, Form, all_buckets, choose, chunks_of, padded_features_of
from vqkernels.kernels._points import prepare, survey
from vqkernels.kernels._rescue import candidates, settle
from vqkernels.kernels._search import halve, search

SURVEYS = 2 if INTERPRETED else 64
PREPARES = 2 if INTERPRETED else 256
# elements of a tile of rows in the finish
_FINISH_TILE = 1 << 16 if INTERPRETED else 1 << 11
_LONGEST_WHOLE = 512
_MOST_FINISHED = 4096 if INTERPRETED else 32
# groups that are listed for an open row; of these rows at most a quarter of all (or 8192) has a list
LENGTH = 8
_RESCUE = Form(128 if INTERPRETED else 64, PAD if INTERPRETED else 128, 8, False, 4, 2)
TOGETHER = 4
_LANES = 32
PROGRAMS = 1 if INTERPRETED else 4


@dataclass(frozen=True)
class Plan:
    """What the dtypes decide: exact halves, or float16 copies that are centred and scaled."""

    x: torch.dtype
    codes: torch.dtype
    dithered: bool

    @property
    def scaled(self) -> bool:
        return self.x != self.codes or self.x == torch.float32 or self.dithered

    @property
    def searched(self) -> torch.dtype:
        """What is multiplied."""
        return torch.float16 if self.scaled else self.x

    @property
    def far(self) -> float:
        """The half norm of what must lose: beyond every score that is trusted, even times the ratio of scales."""
        return 1e30 if self.scaled else 1e38

    @property
    def name(self) -> str:
        return f"{TYPES[self.x]}_{TYPES[self.codes]}{'_dithered' if self.dithered else ''}"


@functools.cache
def survey_form(plan: Plan) -> Configuration:
    """Sums and largest magnitude of the codes."""
    return Configuration(
        name=f"nearest_code_survey_{TYPES[plan.codes]}",
        kernel=survey,
        constants={"BLOCK_K": PAD if INTERPRETED else 64, "BLOCK_D": 16},
        types={"codes": f"*{TYPES[plan.codes]}", "sums": "*fp32", "largest": "*fp32"},
        ones=("stride_feature",),
        multiples=("features", "padded_features", "stride_code"),
        warps=8,
    )


@functools.cache
def prepare_form(plan: Plan) -> Configuration:
    """Copies, norms and facts of the points."""
    return Configuration(
        name=f"nearest_code_prepare_{plan.name}",
        kernel=prepare,
        constants={
            "DITHERED": plan.dithered,
            "SCALED": plan.scaled,
            "SURVEYS": SURVEYS,
            "FAR": plan.far,
            "BLOCK_K": PAD if INTERPRETED else 32,
            "BLOCK_D": 16,
        },
        types={
            "codes": f"*{TYPES[plan.codes]}",
            "dither": "*fp32",
            "sums": "*fp32",
            "largest": "*fp32",
            "points": f"*{TYPES[plan.searched]}",
            "half_norms": "*fp32",
            "centre": "*fp32",
            "facts": "*fp64",
        },
        ones=("stride_feature",),
        multiples=("features", "padded_features", "padded_points", "stride_code"),
        warps=4,
        fused=False,
    )


@functools.cache
def halve_form(plan: Plan, rows: int) -> Configuration:
    """Scaled copies of long rows, one scale for so many."""
    return Configuration(
        name=f"nearest_code_halve_{TYPES[plan.x]}_{rows}",
        kernel=halve,
        constants={"BLOCK_N": rows, "BLOCK_D": LOOP_BLOCK},
        types={"x": f"*{TYPES[plan.x]}", "centre": "*fp32", "halves": "*fp16", "scales": "*fp32"},
        ones=("x_feature",),
        multiples=("features", "padded_features", "x_inner", "x_outer"),
        warps=8,
    )


@functools.cache
def search_form(plan: Plan, form: Form, features: int, arch: int, exact: bool = True) -> Configuration:
    """The search in this form for rows of these features."""
    chunks = chunks_of(features)
    padded = padded_features_of(features)
    first, second, third = (*chunks, 0, 0, 0)[:3] if chunks else (LOOP_BLOCK, 0, 0)
    # long rows were copied before, if they had to be scaled
    source = torch.float16 if plan.scaled and not chunks else plan.x
    # one descriptor has one block: it cannot serve rows of several chunks
    described = form.described and not second
    even = features == padded or (plan.scaled and not chunks)
    return Configuration(
        name=f"nearest_code_search_{TYPES[source]}_{TYPES[plan.searched]}{'_scaled' if plan.scaled else ''}"
        f"_d{'+'.join(map(str, chunks)) or 'loop'}{'' if even else '_odd'}_{form.block_n}x{form.block_k}"
        f"_g{form.group}{'_packed' if form.packed else ''}{'_parts' if form.parts > 1 else ''}{'_described' if described else ''}{'' if exact else '_fast'}",
        kernel=search,
        constants={
            "SCALED": plan.scaled,
            "EVEN": even,
            "INTEGER": arch >= 90,
            "PACKED": form.packed,
            "CERTIFIED": exact,
            "GROUP": form.group,
            "PARTS": form.parts,
            "BLOCK_N": form.block_n,
            "BLOCK_K": form.block_k,
            "BLOCK_D": first,
            "SECOND_D": second,
            "THIRD_D": third,
            "LOOP": not chunks,
            "DESCRIBED": described,
            "BLOCK_P": PREPARES,
        },
        types={
            "x": f"*{TYPES[source]}",
            "points": f"tensordesc<{TYPES[plan.searched]}[{form.block_k}, {first}]>"
            if described
            else f"*{TYPES[plan.searched]}",
            "half_norms": "*fp32",
            "centre": "*fp32",
            "scales": "*fp32",
            "facts": "*fp64",
            "merged": "*fp64",
            "counters": "*i32",
            "best_out": "*fp32",
            "next_out": "*fp32",
            "base_out": "*i32",
        },
        ones=("x_feature",),
        multiples=("features", "padded_features", "x_inner", "x_outer"),
        warps=form.warps,
        stages=form.stages,
    )


@functools.cache
def finish_form(plan: Plan, form: Form, exact: bool, features: int) -> Configuration:
    """The certificate and the answer."""
    block = feature_block(features, _LONGEST_WHOLE)
    # what is kept per row outweighs short rows, and loops keep more
    rows = max(1, min(_FINISH_TILE // block // (1 if features <= block else 2), _MOST_FINISHED))
    return Configuration(
        name=f"nearest_code_finish_{plan.name}_d{block}{'' if features <= block else '_loop'}"
        f"_of{form.members}x{form.span}{'_exact' if exact else ''}",
        kernel=finish,
        constants={
            "EXACT": exact,
            "DITHERED": plan.dithered,
            "SCALED": plan.scaled,
            "COPIED": plan.scaled and not chunks_of(features),
            "WHOLE": features <= block,
            "MEMBERS": form.members,
            "SPAN": form.span,
            "FAR": plan.far,
            "BLOCK_N": rows,
            "BLOCK_D": block,
        },
        types={
            "x": f"*{TYPES[plan.x]}",
            "codes": f"*{TYPES[plan.codes]}",
            "dither": "*fp32",
            "half_norms": "*fp32",
            "centre": "*fp32",
            "scales": "*fp32",
            "merged": "*fp64",
            "best_score": "*fp32",
            "base": "*i32",
            "indices": "*i64",
            "sq_dist": "*fp32",
            "measures": "*fp32",
            "exact_dist": "*fp64",
        },
        ones=("x_feature", "stride_feature"),
        multiples=("features", "padded_features", "x_inner", "x_outer", "stride_code"),
        fused=False,
    )


@functools.cache
def certify_form(plan: Plan, members: int, features: int) -> Configuration:
    """The certificate, one row for a thread."""
    copied = plan.scaled and not chunks_of(features)
    return Configuration(
        name=f"nearest_code_certify_{'scaled' if plan.scaled else 'halves'}{'_copied' if copied else ''}"
        f"{'_dithered' if plan.dithered else ''}_of{members}",
        kernel=certify,
        constants={
            "DITHERED": plan.dithered,
            "SCALED": plan.scaled,
            "COPIED": copied,
            "MEMBERS": members,
            "LENGTH": LENGTH,
            "TOGETHER": TOGETHER,
            "FAR": plan.far,
            "BLOCK_N": 4096 if INTERPRETED else 128,
        },
        types={
            "centre": "*fp32",
            "scales": "*fp32",
            "merged": "*fp64",
            "best_score": "*fp32",
            "next_score": "*fp32",
            "measures": "*fp32",
            "exact_dist": "*fp64",
            "open_rows": "*i32",
            "thresholds": "*fp32",
            "hits": "*i32",
            "counters": "*i32",
            "arrived": "*i32",
        },
        multiples=("features", "padded_features"),
        fused=False,
    )


@functools.cache
def candidates_form(plan: Plan, features: int) -> Configuration:
    """The second search, of open rows."""
    padded = padded_features_of(features)
    block = min(64, padded & -padded)
    return Configuration(
        name=f"nearest_code_candidates_{TYPES[plan.x]}_{TYPES[plan.searched]}{'_scaled' if plan.scaled else ''}"
        f"_d{block}",
        kernel=candidates,
        constants={
            "SCALED": plan.scaled,
            "GROUP": _RESCUE.group,
            "LENGTH": LENGTH,
            "BLOCK_N": _RESCUE.block_n,
            "BLOCK_K": _RESCUE.block_k,
            "BLOCK_D": block,
        },
        types={
            "x": f"*{TYPES[plan.x]}",
            "points": f"*{TYPES[plan.searched]}",
            "half_norms": "*fp32",
            "centre": "*fp32",
            "open_rows": "*i32",
            "thresholds": "*fp32",
            "hits": "*i32",
            "lists": "*i32",
            "counters": "*i32",
        },
        ones=("x_feature",),
        multiples=("features", "padded_features", "x_inner", "x_outer"),
        warps=_RESCUE.warps,
        stages=_RESCUE.stages,
    )


@functools.cache
def settle_form(plan: Plan) -> Configuration:
    """The contract for open rows."""
    return Configuration(
        name=f"nearest_code_settle_{plan.name}",
        kernel=settle,
        constants={
            "DITHERED": plan.dithered,
            "GROUP": _RESCUE.group,
            "SPAN": _RESCUE.span,
            "LENGTH": LENGTH,
            "FAR": plan.far,
            "BLOCK_R": TOGETHER,
            "BLOCK_L": _LANES,
            "BLOCK_K": PAD if INTERPRETED else 128,
        },
        types={
            "x": f"*{TYPES[plan.x]}",
            "codes": f"*{TYPES[plan.codes]}",
            "dither": "*fp32",
            "half_norms": "*fp32",
            "open_rows": "*i32",
            "hits": "*i32",
            "lists": "*i32",
            "counters": "*i32",
            "part_dist": "*fp64",
            "part_code": "*i32",
            "arrived": "*i32",
            "indices": "*i64",
            "sq_dist": "*fp32",
        },
        ones=("x_feature", "stride_feature"),
        multiples=("features", "x_inner", "x_outer", "stride_code"),
        fused=False,
    )


# dtypes of x and codes, and whether the points are dithered
_PLANS = [
    Plan(torch.bfloat16, torch.bfloat16, False),
    Plan(torch.float32, torch.float32, False),
    Plan(torch.bfloat16, torch.float32, True),
]


def searches(arch: int) -> list[tuple[Configuration, Form]]:
    """Every line of the table for this generation, of exact halves and of scaled rows, and odd numbers of features."""
    generation = arch
    found = {}
    for of, width, codes in all_buckets():
        if of == generation:
            for plan in _PLANS[:2]:
                form = choose(generation, width, codes, plan.scaled)
                each = search_form(plan, form, width, arch)
                found[each.name] = (each, form)
    for plan, features in (
        (_PLANS[0], 32),
        (_PLANS[1], 32),
        (_PLANS[0], 8),
        (_PLANS[0], 112),
        (_PLANS[2], 200),
    ):
        form = choose(generation, features, 1024, plan.scaled)
        each = search_form(plan, form, features, arch)
        found[each.name] = (each, form)
    for features, codes in ((64, 4096), (64, 16384), (256, 4096)):
        form = choose(generation, features, codes, False)
        each = search_form(_PLANS[0], form, features, arch, exact=False)
        found[each.name] = (each, form)
    return list(found.values())


def configurations() -> list[Configuration]:
    """The forms in which the kernels of this file are launched; other dtypes compile to the like."""
    group, packed = Form(128, 128, 8, False, 4, 3), Form(128, 128, 4, True, 8, 3)
    half, single, mixed = _PLANS
    return [
        survey_form(single),
        *(prepare_form(plan) for plan in _PLANS),
        halve_form(single, 128),
        finish_form(half, group, True, 64),
        finish_form(half, packed, True, 512),
        finish_form(single, group, True, 256),
        finish_form(single, packed, True, 1024),
        finish_form(mixed, group, True, 64),
        finish_form(half, group, False, 64),
        finish_form(single, group, True, 8),
        certify_form(half, 8, 64),
        certify_form(single, 1, 1024),
        certify_form(mixed, 8, 64),
        candidates_form(half, 64),
        candidates_form(single, 512),
        candidates_form(mixed, 16),
        settle_form(half),
        settle_form(mixed),
    ]
