"""Nearest code in Triton: prepare the points, search by tensor cores, certify, and settle the rows left open.

Six kernels, no host synchronisation: `prepare` (copies and norms of the points, after a `survey` where they are scaled;
`halve` copies long rows that must be), `search` (best group and runner-up of each row), `finish` (its code and
distance), `certify` (which rows stay open), `candidates` and `settle` (these rows). A codebook that stays is prepared once, by `prepare_codes`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vqkernels.dispatch import BackendError
from vqkernels.kernels._common import architecture, cdiv, on_device_of, processors
from vqkernels.kernels._forms import PAD, Form, alternatives, choose, chunks_of, padded_features_of
from vqkernels.kernels._plans import (
    LENGTH,
    PREPARES,
    PROGRAMS,
    SURVEYS,
    TOGETHER,
    Plan,
    candidates_form,
    certify_form,
    finish_form,
    halve_form,
    prepare_form,
    search_form,
    settle_form,
    survey_form,
)
from vqkernels.kernels._plans import configurations as configurations
from vqkernels.kernels._plans import searches as searches
from vqkernels.kernels._points import NUM_FACTS
from vqkernels.kernels._tuning import key_of, milliseconds, tuned_form, wanted


def prepare_codes(codebook: Tensor, x_dtype: torch.dtype) -> list[Tensor]:
    """What `launch` needs of a codebook that will be searched for rows of this dtype, as its argument `parts`."""
    with on_device_of(codebook):
        return _parts(codebook, None, Plan(x_dtype, codebook.dtype, False))


def _parts(codebook: Tensor, dither: Tensor | None, plan: Plan) -> list[Tensor]:
    """Points, half norms, centre and scale, and facts, of all points."""
    num_codes, features = codebook.shape
    num_points = num_codes - plan.dithered
    padded_features = padded_features_of(features)
    padded_points = cdiv(num_points, PAD) * PAD
    programs = min(PREPARES, cdiv(padded_points, 32))
    points = codebook.new_empty((padded_points, padded_features), dtype=plan.searched)
    half_norms = codebook.new_empty((padded_points,), dtype=torch.float32)
    centre = codebook.new_empty((padded_features + 1,), dtype=torch.float32)
    facts = codebook.new_empty((programs, int(NUM_FACTS)), dtype=torch.float64)
    sums = largest = centre
    surveys = min(SURVEYS, cdiv(num_codes, 32))
    if plan.scaled:
        sums = codebook.new_empty((surveys, padded_features), dtype=torch.float32)
        largest = codebook.new_empty((surveys,), dtype=torch.float32)
        survey_form(plan).launch(
            (surveys,), codebook, sums, largest, num_codes, features, padded_features, *codebook.stride()
        )
    prepare_form(plan).launch(
        (programs,),
        codebook,
        half_norms if dither is None else dither.contiguous(),
        sums,
        largest,
        points,
        half_norms,
        centre,
        facts,
        num_points,
        num_codes,
        surveys,
        features,
        padded_features,
        padded_points,
        *codebook.stride(),
    )
    return [points, half_norms, centre, facts]


def launch(
    x: Tensor, codebook: Tensor, dither: Tensor | None, exact: bool, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Indices int64 and squared distances float32 of (B, M, D) rows, or of (G, B, M, D) in codebooks (G, K, D)."""
    # of one search, before anything of that size is made
    rows = x.shape[:-1].numel() // (1 if codebook.dim() == 2 else max(1, len(codebook)))
    if rows >= 1 << 31:
        raise BackendError(f"nearest_code: triton takes fewer than 2^31 rows; got {rows}. Split the batch.")
    indices = x.new_empty(x.shape[:-1], dtype=torch.int64)
    sq_dist = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if codebook.dim() == 2:
        _search(x, codebook, dither, exact, parts, indices, sq_dist)
        return indices, sq_dist
    for g, codes in enumerate(codebook):
        weights = None if dither is None else dither[g]
        rows = x[g] if x.dim() == 4 else x[g : g + 1]
        _search(rows, codes, weights, exact, [], indices[g], sq_dist[g])
    return indices, sq_dist


def _search(
    x: Tensor,
    codebook: Tensor,
    dither: Tensor | None,
    exact: bool,
    parts: list[Tensor],
    indices: Tensor,
    sq_dist: Tensor,
) -> None:
    """One search of (B, M, D) rows, into indices and squared distances."""
    rows = indices.numel()
    if rows == 0:
        return
    plan = Plan(x.dtype, codebook.dtype, dither is not None)
    sizes = architecture(x), x.shape[-1], len(codebook) - plan.dithered, plan.scaled
    with on_device_of(x):
        prepared = parts or _parts(codebook, dither, plan)

        def run(form: Form) -> None:
            _launch(x, codebook, dither, exact, prepared, plan, form, indices, sq_dist)

        form = choose(*sizes)
        file = wanted(x)
        if file is not None:
            key = key_of(torch.cuda.get_device_name(x.device), *sizes, rows, exact)
            form = tuned_form(
                file, key, form, alternatives(*sizes), lambda each: milliseconds(lambda: run(each))
            )
        run(form)


def _launch(
    x: Tensor,
    codebook: Tensor,
    dither: Tensor | None,
    exact: bool,
    parts: list[Tensor],
    plan: Plan,
    form: Form,
    indices: Tensor,
    sq_dist: Tensor,
) -> None:
    points, half_norms, centre, facts = parts
    rows, features, inner = indices.numel(), x.shape[-1], x.shape[1]
    num_points, padded_features = len(codebook) - plan.dithered, points.shape[1]
    arch = architecture(x)
    row_tiles, tiles = cdiv(rows, form.block_n), cdiv(num_points, form.block_k)
    # a small batch fills the device by splitting the points
    shares = max(1, min(tiles, 2 * processors(x) // row_tiles, 64))
    numbers = cdiv(tiles, shares) * (form.group if form.packed else 1)
    mask = -(1 << (numbers - 1).bit_length())

    counters = x.new_empty((1,), dtype=torch.int32)
    merged = facts.new_empty((facts.shape[1],))
    scales = x.new_empty((row_tiles if plan.scaled else 1,), dtype=torch.float32)
    best_score = x.new_empty((shares, rows), dtype=torch.float32)
    next_score = torch.empty_like(best_score) if exact else best_score
    base = x.new_empty((shares, rows), dtype=torch.int32)
    source, source_inner = x, inner
    if plan.scaled and not chunks_of(features):
        source = x.new_empty((1, rows, padded_features), dtype=torch.float16)
        source_inner = rows
        halve_form(plan, form.block_n).launch(
            (row_tiles,), x, centre, source, scales, rows, inner, features, padded_features, *x.stride()
        )
    searching = search_form(plan, form, features, arch, exact)
    described = searching.constants["DESCRIBED"]
    block = [form.block_k, searching.constants["BLOCK_D"]]
    searching.launch(
        (row_tiles, shares),
        source,
        TensorDescriptor(points, list(points.shape), list(points.stride()), block) if described else points,
        half_norms,
        centre,
        scales,
        facts,
        merged,
        counters,
        best_score,
        next_score,
        base,
        rows,
        source_inner,
        features,
        padded_features,
        num_points,
        mask,
        len(facts),
        *source.stride(),
    )

    weights = half_norms if dither is None else dither.contiguous()
    measures = best_score.new_empty((6 if form.members > 1 else 4, rows) if exact else (1,))
    exact_dist = merged.new_empty((rows if exact else 1,))
    finishing = finish_form(plan, form, exact, features)
    finishing.launch(
        (cdiv(rows, finishing.constants["BLOCK_N"]),),
        x,
        codebook,
        weights,
        half_norms,
        centre,
        scales,
        merged,
        best_score,
        base,
        indices,
        sq_dist,
        measures,
        exact_dist,
        rows,
        inner,
        features,
        padded_features,
        num_points,
        shares,
        form.block_n,
        *x.stride(),
        *codebook.stride(),
    )
    if not exact:
        return

    # lists for a quarter of the rows, or all of a small batch
    capacity = min(rows, max(8192, rows // 4))
    open_rows = counters.new_empty((rows,))
    thresholds = best_score.new_empty((capacity,))
    hits = counters.new_empty((capacity,))
    arrived = counters.new_empty((cdiv(rows, TOGETHER),))
    certifying = certify_form(plan, form.members, features)
    certifying.launch(
        (cdiv(rows, certifying.constants["BLOCK_N"]),),
        centre,
        scales,
        merged,
        best_score,
        next_score,
        measures,
        exact_dist,
        open_rows,
        thresholds,
        hits,
        counters,
        arrived,
        rows,
        features,
        padded_features,
        shares,
        mask,
        form.block_n,
        capacity,
    )

    programs = PROGRAMS * processors(x)
    lists = counters.new_empty((capacity, LENGTH))
    candidates_form(plan, features).launch(
        (programs,),
        x,
        points,
        half_norms,
        centre,
        open_rows,
        thresholds,
        hits,
        lists,
        counters,
        inner,
        features,
        padded_features,
        num_points,
        capacity,
        *x.stride(),
    )
    # these wait for memory and not for tensor cores: more of them fit
    settlers = 4 * programs
    part_dist = facts.new_empty((TOGETHER * settlers,))
    part_code = counters.new_empty((TOGETHER * settlers,))
    settle_form(plan).launch(
        (settlers,),
        x,
        codebook,
        weights,
        half_norms,
        open_rows,
        hits,
        lists,
        counters,
        part_dist,
        part_code,
        arrived,
        indices,
        sq_dist,
        inner,
        features,
        num_points,
        capacity,
        *x.stride(),
        *codebook.stride(),
    )
