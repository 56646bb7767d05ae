"""nearest_code of groups: each is searched in its own codebook, to the bit as if it had been searched alone."""

import itertools

import pytest
import torch
from conftest import DTYPES, INTERPRETED
from test_native import ISAS, isa, threads

from vqkernels import native, nearest_code, nearest_segment, prepare, use_backend
from vqkernels.ops._layout import collapse_groups
from vqkernels.ops.nearest_code import dithered, nearest_code_op
from vqkernels.testing import DEVICE, brute_force, clusters

# G, N, K, D
SHAPES = [
    (1, 17, 5, 3),
    (3, 1, 1, 1),
    (2, 7, 300, 17),
    *([] if INTERPRETED else [(8, 129, 33, 8), (5, 40, 3, 130)]),
]
needs_native = pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))


def groups_of(g, n, k, d):
    """Latents (N, G, D) seen as (G, N, D), and codebooks (G, K, D) of unlike centre and scale."""
    x, codes = zip(
        *(clusters(n, k, d, seed=i, scale=4.0**-i, offset=3.0 * (i % 3)) for i in range(g)), strict=True
    )
    return torch.stack(x, 1).transpose(0, 1), torch.stack(codes)


def bits(t):
    """A tensor as integers, so that nan equals nan."""
    return t if t.dtype == torch.int64 else t.view({4: torch.int32, 8: torch.int64}[t.element_size()])


def check(x, codes, backend, *, dither=None, exact=True):
    """Search all groups at a time; compare with each alone, and with brute force where the search is exact."""

    def search(rows, book, weights):
        if weights is None:
            return nearest_code(rows, book, exact=exact, backend=backend)
        return nearest_code_op(rows, book, weights, exact, [], backend=backend)

    indices, sq_dist = search(x, codes, dither)
    assert indices.shape == sq_dist.shape == x.shape[:-1]
    assert indices.is_contiguous() and sq_dist.is_contiguous()
    for g in range(len(codes)):
        weights = None if dither is None else dither[g]
        rows = x[g] if dither is None else x[g][None]
        alone = search(rows, codes[g], weights)
        assert torch.equal(indices[g], alone[0].view(indices[g].shape)), g
        assert sq_dist.dtype == alone[1].dtype
        assert torch.equal(bits(sq_dist[g]), bits(alone[1].view(sq_dist[g].shape))), g
        if exact:
            points = codes[g] if weights is None else dithered(codes[g], weights)
            expected, least = brute_force(x[g].reshape(-1, x.shape[-1]), points)
            assert torch.equal(indices[g].flatten(), expected), g
            assert torch.equal(bits(sq_dist[g].flatten()), bits(least.to(sq_dist.dtype))), g
    return indices


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_brute_force_and_separate_calls(shape, dtype, backend, need):
    need("nearest_code", dtype)
    x, codes = groups_of(*shape)
    indices = check(x.to(dtype), codes.to(dtype), backend)
    if shape[0] > 1 and shape[2] > 1 and dtype == torch.float32:
        # were one group searched in the codebook of another, most of its rows would tell
        assert not torch.equal(indices, nearest_code(x, codes.roll(1, 0), backend=backend).indices)


@pytest.mark.parametrize("pair", list(itertools.permutations(DTYPES, 2)), ids=lambda p: f"{p[0]}-{p[1]}")
def test_mixed_dtypes(pair, backend, need):
    need("nearest_code", *pair)
    x, codes = groups_of(3, 65, 37, 24)
    check(x.to(pair[0]), codes.to(pair[1]), backend)


def layouts(x, codes):
    """The same rows (G, 24, D) and codes in other strides."""
    g, _, d = x.shape
    grid = x.reshape(g, 2, 3, 4, d)
    yield "contiguous", x.contiguous(), codes
    yield "features apart", x.transpose(1, 2).contiguous().transpose(1, 2), codes
    yield "every second", torch.stack([x, x], 2).flatten(1, 2)[:, ::2], codes
    yield "every second group", torch.stack([x, -x], 1).flatten(0, 1)[::2], codes
    # (N, G D, H, W) latents
    images = grid.permute(1, 0, 4, 2, 3).contiguous()
    yield "channels", images.permute(1, 0, 3, 4, 2), codes
    yield "three runs", grid.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4), codes
    yield "codes transposed", x, codes.mT.contiguous().mT
    yield "codes by group last", x, codes.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@pytest.mark.parametrize("name", [name for name, *_ in layouts(torch.zeros(2, 24, 3), torch.zeros(2, 4, 3))])
def test_layouts(name, backend, need):
    need("nearest_code", torch.float32)
    x, codes = groups_of(4, 24, 15, 6)
    view, book = next((v, c) for n, v, c in layouts(x, codes) if n == name)
    found = check(view, book, backend)
    assert torch.equal(found.flatten(1), nearest_code(x, codes, backend="reference").indices)


def test_one_codebook_for_all_groups(backend, need):
    need("nearest_code", torch.float32)
    x, codes = groups_of(3, 20, 9, 5)
    check(x, codes[:1].expand(3, -1, -1), backend)
    check(x[:1].expand(3, -1, -1), codes, backend)


def test_a_view_of_latents_is_not_copied():
    latents = torch.randn(12, 4, 5)
    assert collapse_groups(latents.transpose(0, 1)).data_ptr() == latents.data_ptr()
    assert collapse_groups(latents.transpose(0, 1)).shape == (4, 1, 12, 5)
    # (N, G, D, H, W) seen as (G, N, H, W, D)
    images = torch.randn(2, 3, 5, 4, 6)
    seen = collapse_groups(images.permute(1, 0, 3, 4, 2))
    assert seen.data_ptr() == images.data_ptr() and seen.shape == (3, 2, 24, 5)
    assert torch.equal(seen.flatten(1, 2), images.permute(1, 0, 3, 4, 2).flatten(1, 3))


def test_a_row_per_group(backend, need):
    need("nearest_code", torch.float32)
    x, codes = groups_of(4, 1, 6, 3)
    indices, _ = nearest_code(x[:, 0], codes, backend=backend)
    assert indices.shape == (4,)
    assert torch.equal(indices[:, None], nearest_code(x, codes, backend=backend).indices)


@pytest.mark.parametrize("shape", [(3, 0, 8), (1, 0, 8), (3, 2, 0, 8)], ids=str)
def test_no_rows(shape, backend, need):
    need("nearest_code", torch.float32)
    codes = torch.zeros(shape[0], 4, 8, device=DEVICE)
    indices, sq_dist = nearest_code(torch.zeros(shape, device=DEVICE), codes, backend=backend)
    assert indices.shape == sq_dist.shape == shape[:-1]
    assert indices.dtype == torch.int64 and sq_dist.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 50, 2, 5), (4, 70, 33, 9), (1, 9, 17, 4)], ids=str)
def test_dither(shape, dtype, backend, need):
    need("nearest_code", dtype)
    x, codes = groups_of(*shape)
    codes[0, 1] = codes[0, 0]
    weights = torch.rand(shape[0], shape[2] - 1, device=DEVICE)
    check(x.to(dtype), codes.to(dtype), backend, dither=weights)
    check(x.to(dtype), codes.to(dtype), backend, dither=weights.t().contiguous().t())


def test_fast_search(backend, need):
    need("nearest_code", torch.float32)
    check(*groups_of(4, 200, 90, 12), backend, exact=False)


def test_exact_ties_and_repeated_codes(backend, need):
    """Multiples of 1/4: many exact ties, many codes twice, in every group other ones."""
    need("nearest_code", torch.float32)
    x = torch.randint(-3, 4, (60, 5, 4), device=DEVICE) / 4
    codes = torch.randint(-3, 4, (5, 90, 4), device=DEVICE) / 4
    codes[3] = 0
    check(x.transpose(0, 1), codes, backend)


@pytest.mark.parametrize("group", [0, 2])
def test_what_is_not_finite_stays_in_its_group(group, backend, need):
    need("nearest_code", torch.float32)
    x, codes = groups_of(3, 60, 20, 6)
    clean = nearest_code(x, codes, backend=backend)
    others = [g for g in range(3) if g != group]
    x[group, 5, 3], x[group, 59, 0] = torch.nan, torch.inf
    codes[group, 4, 1], codes[group, 19, 5] = torch.nan, -torch.inf
    found = check(x, codes, backend)
    assert torch.equal(found[others], clean.indices[others])
    assert found[group, 5] == found[group, 59] == 0
    # a group without a finite code
    codes[group] = torch.nan
    indices, sq_dist = nearest_code(x, codes, backend=backend)
    assert indices[group].eq(0).all() and sq_dist[group].isnan().all()
    assert torch.equal(indices[others], clean.indices[others])
    assert torch.equal(sq_dist[others], clean.sq_dist[others])


def test_the_op_takes_rows_with_and_without_a_batch(backend, need):
    need("nearest_code", torch.float32)
    x, codes = groups_of(3, 24, 10, 4)
    expected = nearest_code(x, codes, backend=backend)
    for rows in (x, x[:, None], x.reshape(3, 2, 12, 4)):
        indices, sq_dist = nearest_code_op(rows, codes, None, True, [], backend=backend)
        assert indices.shape == sq_dist.shape == rows.shape[:-1]
        assert torch.equal(indices.flatten(1), expected.indices)
        assert torch.equal(sq_dist.flatten(1), expected.sq_dist)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dithers", [False, True])
def test_opcheck(dithers, exact, backend, need):
    need("nearest_code")
    x, codes = groups_of(3, 12, 7, 5)
    weights = torch.rand(3, 6, device=DEVICE) if dithers else None
    for rows in (x, x.contiguous(), x.reshape(3, 2, 6, 5)):
        torch.library.opcheck(
            nearest_code_op.backends[backend].run,
            (rows, codes, weights, exact, []),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_break(dynamic, backend, need):
    need("nearest_code")
    if dynamic and INTERPRETED:
        pytest.skip("sizes are tested beside the compiled backends")
    torch._dynamo.reset()

    def run(latents, codes):
        found = nearest_code(latents.transpose(0, 1), codes)
        return found.indices.t(), found.sq_dist.t()

    with use_backend(backend):
        compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for n in (6, 11):
            latents, codes = torch.randn(n, 3, 5, device=DEVICE), torch.randn(3, 8, 5, device=DEVICE)
            for a, b in zip(compiled(latents, codes), run(latents, codes), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride()


def test_no_gradient_flows(backend, need):
    need("nearest_code", torch.float32)
    x, codes = groups_of(2, 5, 3, 4)
    found = nearest_code(x.requires_grad_(), codes.requires_grad_(), backend=backend)
    assert not found.sq_dist.requires_grad and not found.indices.requires_grad


@needs_native
@pytest.mark.parametrize(
    "shape", [(8, 700, 70, 8), (3, 40, 1100, 24), (2, 5, 2100, 6), (5, 1, 7, 3)], ids=str
)
@pytest.mark.parametrize("name", ISAS)
def test_threads_and_instruction_sets(name, shape):
    """Rows of all groups, or the codes of few rows, are shared out: no thread changes a bit, and no ISA does."""
    x, codes = (t.cpu() for t in groups_of(*shape))
    # rows that the certificate leaves open
    codes[0, shape[2] // 2 :] = codes[0, : shape[2] - shape[2] // 2] * (1 + 2**-22)
    x[-1, 0, 0] = torch.nan
    weights = torch.rand(shape[0], shape[2] - 1)

    def run():
        searches = [nearest_code(x, codes, exact=exact, backend="native") for exact in (True, False)]
        return [*searches[0], *searches[1], *nearest_code_op(x, codes, weights, True, [], backend="native")]

    with isa(name):
        with threads(1):
            alone = run()
        for count in (2, 3, 4):
            with threads(count):
                for a, b in zip(alone, run(), strict=True):
                    assert torch.equal(bits(a), bits(b)), count
    assert torch.equal(alone[0], nearest_code(x, codes, backend="reference").indices)


X, C = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
ERRORS = {
    "rank of the codebook": (
        (X, C[None]),
        r"codebook must be \(K, D\) or \(G, K, D\); got shape \(1, 3, 5, 4\)",
    ),
    "another G": (
        (X[:2], C),
        r"x must be \(3, \.\.\., 4\) to match the groups .*; got \(2, 6, 4\)\. Move the groups",
    ),
    "groups elsewhere": ((X.transpose(0, 1), C), r"x must be \(3, \.\.\., 4\) .*; got \(6, 3, 4\)"),
    "a single row": ((X[0, 0], C), r"x must be \(3, \.\.\., 4\) .*; got \(4,\)"),
    "another D": (
        (X[..., :3], C),
        r"codebook must be \(G, K, 3\) to match x of shape \(3, 6, 3\); got \(3, 5, 4\)",
    ),
    "codes transposed": ((X, C.mT), r"codebook must be \(G, K, 4\) .*; got \(3, 4, 5\)\. Pass codebook\.mT"),
    "no group": ((X[:0], C[:0]), r"codebook must have at least one group; got 0"),
    "no code": ((X, C[:, :0]), r"codebook must have at least 1 code; got 0"),
    "no feature": ((X[..., :0], C[..., :0]), r"codebook must have at least one feature; got 0"),
}


@pytest.mark.parametrize("case", ERRORS.values(), ids=ERRORS.keys())
def test_errors(case):
    given, words = case
    with pytest.raises(ValueError, match=rf"^nearest_code: {words}"):
        nearest_code(*given)


def test_what_takes_no_groups_says_so():
    words = r"codebook must be \(K, D\); got shape \(3, 5, 4\)\. Pass the codebook of one group at a time"
    with pytest.raises(ValueError, match=f"prepare: {words}"):
        prepare(C)
    with pytest.raises(ValueError, match=f"nearest_segment: {words}"):
        nearest_segment(X, C)


@needs_native
def test_the_compiled_op_checks_groups_itself():
    op = torch.ops.vqkernels.nearest_code
    with pytest.raises(RuntimeError, match=r"x must be \(G, B, M, D\) or \(G, M, D\)"):
        op(X[:2], C, None, True, [])
    with pytest.raises(RuntimeError, match=r"dither must be \(G, K - 1\)"):
        op(X, C, torch.rand(4), True, [])
    with pytest.raises(RuntimeError, match=r"dither must be \(K - 1,\)"):
        op(X, C, torch.rand(3, 5), True, [])
    with pytest.raises(RuntimeError, match=r"parts must be empty with groups"):
        op(X, C, None, True, prepare(C[0], backend="native").parts)
