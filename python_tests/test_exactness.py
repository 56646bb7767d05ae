"""Inputs that break a search which is not the contract's, on every instruction set of this CPU, to the last bit."""

import itertools
from collections import Counter

import pytest
import torch
from conftest import DTYPES
from hard_families import FAMILIES, Shape
from test_native import ISAS, isa

from vqkernels import native, nearest_code, prepare
from vqkernels.ops.nearest_code import dithered, nearest_code_op
from vqkernels.testing import LAYOUTS, brute_force, strided

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")

FEATURES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 257, 1000)
CODES = (1, 2, 3, 5, 11, 12, 13, 15, 16, 17, 191, 192, 193, 1000)
ROWS = (1, 15, 16, 17, 31, 32, 33, 250)
STRIDES = (*LAYOUTS, "one row", "one feature")
PAIRS = tuple(itertools.product(DTYPES, DTYPES))


def plan():
    """Cases (family, dtypes, D, K, N, strides): each family with all dtypes, the rest as pairs not yet met."""
    met = Counter()
    for case in itertools.product(FAMILIES, PAIRS):
        for factor, values in enumerate((FEATURES, CODES, ROWS, STRIDES), 2):
            seen = {v: [met[at, c, factor, v] for at, c in enumerate(case)] for v in values}
            # the value that has met fewest of what the case is so far, then the one met most rarely
            case += (min(values, key=lambda v: (-seen[v].count(0), sum(seen[v]))),)
        for (first, a), (second, b) in itertools.combinations(enumerate(case), 2):
            met[first, a, second, b] += 1
        yield case


CASES = tuple(plan())


def test_cases_meet_pairwise():
    factors = (FAMILIES, PAIRS, FEATURES, CODES, ROWS, STRIDES)
    for (first, a), (second, b) in itertools.combinations(enumerate(factors), 2):
        met = {(case[first], case[second]) for case in CASES}
        # a family has 16 cases, which may not hold all values of all factors
        assert len(met) >= (0.8 if first == 0 else 1) * len(a) * len(b), (first, second)


def laid_out(x, layout):
    """x (N, D) behind strides, of which a broadcast changes the values."""
    if layout == "one row":
        return x[:1].expand(len(x), -1)
    if layout == "one feature":
        return x[:, :1].expand(-1, x.shape[1])
    return strided(x, layout)


def check(x, codes, dither=None):
    """Every instruction set, with the codes as they are and prepared, finds what brute force finds."""
    points = codes if dither is None else dithered(codes, dither)
    flat = x.reshape(-1, x.shape[-1])
    expected, least = brute_force(flat, points)
    for name in ISAS:
        with isa(name):
            if dither is not None:
                found = [nearest_code_op(flat[None], codes, dither, True, [], backend="native")]
            else:
                handle = prepare(codes, x_dtype=x.dtype, backend="native")
                found = [nearest_code(x, c, backend="native") for c in (codes, handle)]
        for how, (indices, sq_dist) in zip(("codes", "prepared"), found):
            wrong = (indices.flatten() != expected).nonzero().flatten()[:5]
            assert len(wrong) == 0, (name, how, wrong, indices.flatten()[wrong], expected[wrong])
            off = ~torch.isclose(sq_dist.flatten(), least.to(sq_dist.dtype), rtol=0, atol=0, equal_nan=True)
            assert not off.any(), (name, how, sq_dist.flatten()[off][:5], least[off][:5])


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_literal_loop(family):
    mine = [case[1:] for case in CASES if case[0] == family]
    for number, (pair, d, k, n, layout) in enumerate(mine):
        s = Shape(n, k, d, torch.Generator().manual_seed(number))
        x, codes = (v.to(dtype) for v, dtype in zip(FAMILIES[family](s), pair, strict=True))
        try:
            check(laid_out(x, layout), strided(codes, LAYOUTS[number % 3]))
        except AssertionError as error:
            raise AssertionError(f"{family}: {pair}, D {d}, K {k}, N {n}, {layout}: {error}") from error


@pytest.mark.parametrize("family", FAMILIES)
def test_points_of_the_curve(family):
    f = list(FAMILIES).index(family)
    for turn, pair in enumerate(((torch.float32, torch.float32), PAIRS[f % 16])):
        s = Shape(
            ROWS[f % 7], CODES[1 + f % 13], FEATURES[(5 * f + turn) % 16], torch.Generator().manual_seed(f)
        )
        x, codes = (v.to(dtype) for v, dtype in zip(FAMILIES[family](s), pair, strict=True))
        weights = torch.rand(s.k - 1, generator=s.generator)
        # both ends, where points coincide with codes
        weights[::3], weights[1::5] = 0, 1
        check(x, codes, dither=weights)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(v)[6:] for v in pair))
def test_no_rows(pair):
    codes = torch.randn(17, 9).to(pair[1])
    for x in (torch.empty(0, 9), torch.empty(2, 0, 9), torch.empty(3, 9, 0).transpose(1, 2)):
        indices, sq_dist = nearest_code(x.to(pair[0]), codes, backend="native")
        assert indices.shape == sq_dist.shape == x.shape[:-1]


@pytest.mark.parametrize("family", ["integer grid", "not finite", "offset 100", "mixed rows"])
def test_batches_behind_strides(family):
    s = Shape(60, 193, 17, torch.Generator().manual_seed(5))
    x, codes = (v.float() for v in FAMILIES[family](s))
    batch = x.view(3, 20, 17)
    for view in (
        batch.transpose(1, 2).contiguous().transpose(1, 2),
        batch.transpose(0, 1),
        batch[:1].expand(4, -1, -1),
        batch[:, :1].expand(-1, 7, -1),
        batch[..., :1].expand(-1, -1, 17),
        batch.view(3, 4, 5, 17).permute(0, 2, 1, 3),
        torch.cat((batch, batch), 2)[:, ::2, 17:],
    ):
        check(view, codes)
    check(x, codes[:1].expand(193, -1))
    check(x, codes[:, :1].expand(-1, 17))


def test_a_row_does_not_know_its_neighbours():
    """The same row among rows that are huge, tiny, or not finite finds the same, bit for bit."""
    s = Shape(97, 193, 33, torch.Generator().manual_seed(6))
    x, codes = (v.float() for v in s.clusters())
    for name in ISAS:
        with isa(name):
            alone = nearest_code(x, codes, backend="native")
            for other in (1e30, 1e-30, 0.0, torch.nan, torch.inf):
                mixed = torch.stack((x, x * other), 1).flatten(0, 1)
                indices, sq_dist = nearest_code(mixed, codes, backend="native")
                assert torch.equal(indices[::2], alone.indices), (name, other)
                assert torch.equal(sq_dist[::2], alone.sq_dist), (name, other)


def test_a_handle_outlives_its_instruction_set():
    """Codes prepared by one instruction set are found by another, or the call says no."""
    s = Shape(50, 193, 33, torch.Generator().manual_seed(7))
    x, codes = (v.float() for v in s.clusters())
    expected, _ = brute_force(x, codes)
    for maker, user in itertools.permutations(ISAS, 2):
        with isa(maker):
            handle = prepare(codes, backend="native")
        with isa(user):
            try:
                indices = nearest_code(x, handle).indices
            except (ValueError, RuntimeError):
                continue
        assert torch.equal(indices, expected), (maker, user)


@pytest.mark.parametrize("family", ["signs", "midway", "huge feature", "offset 100", "one code repeated"])
@pytest.mark.parametrize("d", [2048, 4099])
def test_long_rows(family, d):
    s = Shape(17, 33, d, torch.Generator().manual_seed(d))
    check(*(v.float() for v in FAMILIES[family](s)))


@pytest.mark.parametrize(("k", "d"), [(40_000, 9), (70_001, 3), ((1 << 20) + 5, 2)])
def test_many_codes(k, d):
    """Distances tie a thousand, or a million, codes apart, and the last code has rows of its own."""
    s = Shape(9, k, d, torch.Generator().manual_seed(d))
    x, codes = (v.float() for v in s.clusters())
    codes[k // 2 : k - 1] = codes[: k - 1 - k // 2].clone()
    codes[-1] = 9
    x[::4] = codes[-1] + 0.1 * x[::4]
    check(x, codes)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_search_keeps_its_other_promises(family):
    """Without exactness: the distance is that of the index, and what is not finite is treated as ever."""
    f = list(FAMILIES).index(family)
    pair, d, k, n, layout = CASES[16 * f + f % 16][1:]
    s = Shape(n, k, d, torch.Generator().manual_seed(f))
    x, codes = (v.to(dtype) for v, dtype in zip(FAMILIES[family](s), pair, strict=True))
    x = laid_out(x, layout)
    finite = codes.isfinite().all(1)
    lost = ~x.isfinite().all(-1) | ~finite.any()
    for name in ISAS:
        with isa(name):
            indices, sq_dist = nearest_code(x, codes, exact=False, backend="native")
        assert indices[lost].eq(0).all() and sq_dist[lost].isnan().all(), name
        assert finite[indices[~lost]].all(), name
        total = torch.zeros(indices[~lost].shape).double()
        for a, b in zip(x[~lost].double().t(), codes[indices[~lost]].double().t(), strict=True):
            t = a - b
            total += t * t
        assert torch.equal(sq_dist[~lost], total.to(sq_dist.dtype)), name
