"""What only the compiled backend has: instruction sets, threads, and normals from its own polynomials."""

import math
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from vqkernels import __version__, native
from vqkernels.testing import NORMAL_ERROR, brute_force

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")

FACTS = native.facts()
ISAS = FACTS.get("isas_supported", [])
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
op = torch.ops.vqkernels


@contextmanager
def isa(name):
    native.set_isa(name)
    try:
        yield
    finally:
        native.set_isa("auto")


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def search(x, codes, dither=None, exact=True):
    return op.nearest_code(x, codes, dither, exact, [])


def move(x, codes, indices, position, direction=0):
    return op.directional(x, codes, indices, position, torch.tensor(7), direction, 0.03, 5)


def pull(grad, x, codes, indices, position, direction=0):
    return op.directional_backward(grad, x, codes, indices, position, torch.tensor(7), direction, 0.03, 5)


def run_python(code, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=environment
    )


def test_facts():
    assert FACTS["version"] == __version__
    assert FACTS["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert "portable" in FACTS["isas_built"]
    assert set(FACTS["isas_supported"]) <= set(FACTS["isas_built"])
    assert FACTS["isa"] in FACTS["isas_supported"]
    assert isinstance(FACTS["cuda_archs"], list)
    assert FACTS["torch_target"] == "2.10"


@pytest.mark.parametrize("name", ISAS)
def test_set_isa(name):
    with isa(name):
        assert native.facts()["isa"] == name
    assert native.facts()["isa"] == ISAS[0]


def test_set_isa_refuses():
    message = r"set_isa: name must be 'auto' or one of .*'portable'; got 'mmx'\. Choose one of these\."
    with pytest.raises(ValueError, match=message):
        native.set_isa("mmx")
    assert native.facts()["isa"] == ISAS[0]


def test_isa_by_environment():
    done = run_python("from vqkernels import native; print(native.facts()['isa'])", VQKERNELS_ISA="portable")
    assert done.stdout.strip() == "portable", done.stderr


def test_bad_isa_by_environment():
    done = run_python("import vqkernels", VQKERNELS_ISA="mmx")
    assert done.returncode != 0
    assert "ValueError: VQKERNELS_ISA: name must be 'auto' or one of" in done.stderr


def hard_cases():
    """Names, x (N, D) and codes (K, D) that break a search which is not the contract's."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    codes = randn(129, 17)
    yield "every code is somebody's", codes + 1e-3 * randn(129, 17), codes
    yield "one feature", randn(127, 1), randn(300, 1)
    yield "many features", randn(17, 1000), randn(65, 1000)
    yield "one code", randn(17, 5), randn(1, 5)
    yield "duplicates", randn(127, 17), codes[torch.randint(0, 9, (129,), generator=generator)]
    yield "one code many times", randn(127, 17), codes[:1].expand(129, 17)
    lattice = [torch.randint(-1, 2, (n, 4), generator=generator).float() for n in (300, 200)]
    yield "exact ties", *lattice
    permuted = torch.stack([codes[0][torch.randperm(17, generator=generator)] for _ in range(129)])
    yield "permuted sums", torch.full((3, 17), 0.37), permuted
    yield "offset", 1e3 + 1e-2 * randn(127, 17), 1e3 + 1e-2 * randn(129, 17)
    yield "offset of x alone", 1e3 + 1e-2 * randn(127, 17), codes
    # at x = 0 the bound is a few units
    norms = 1 + 2e-7 * torch.rand(3000, 1, generator=generator).double()
    axes = torch.eye(8).double()[torch.randint(0, 8, (3000,), generator=generator)]
    yield "norms that float32 cannot tell apart", torch.zeros(2, 8).double(), norms * axes
    far = codes.clone()
    far[7], far[8] = 1e4 * codes[7], -1e3 * codes[8]
    yield (
        "codes far from the others",
        torch.cat([randn(60, 17), 0.999 * far[[7, 8]], 5e3 * randn(60, 17)]),
        far,
    )
    # dead codes of an average: rows beside the others are beyond the range of their scale
    ends = 3 * randn(8, 17)
    for scale in (1e-6, 1e-9, 1e-12, 1e-17, 1e-30, 0.0):
        dust = scale * randn(200, 17)
        dust[::25] = ends
        middle = ends * torch.tensor([0.5, 0.5 + 2**-24, 0.5 - 2**-24])[:, None, None]
        rows = torch.cat([ends + 0.1 * randn(8, 17), middle.reshape(-1, 17), 0.3 * randn(20, 17), dust[1:9]])
        yield f"most codes within {scale:g}", rows, dust
        yield f"most codes within {scale:g} of a point", 1e3 + rows.double(), 1e3 + dust.double()
    for scale in (1e-137, 3e-137, 1.0, 3e151):
        # squares of the far code leave the range of float64 where its features do not
        near = torch.randn(256, 64, generator=generator).double()
        near *= scale / 30 / near.norm(dim=1, keepdim=True)
        near[200] = scale * torch.eye(64)[0].double()
        rows = torch.tensor([0.6, 1, 3, 8]).double()[:, None] * near[200]
        yield f"a far code of {scale:g}", rows, near
    for scale in (1e-30, 6e4):
        yield f"{scale:g}", scale * randn(127, 17).clamp(-1, 1), scale * codes.clamp(-1, 1)
    for scale in (1e-310, 1e-200, 1e-162, 1e154, 1e200):
        yield f"float64 {scale:g}", scale * randn(127, 17).double(), scale * codes.double()
    yield "x beyond float32", 1e60 * randn(127, 17).double(), codes
    yield "codes beyond float32", randn(127, 17), 1e60 * codes.double()


@pytest.mark.parametrize("name", ISAS)
def test_isas_meet_the_contract(name):
    for case, x, codes in hard_cases():
        indices, sq_dist = brute_force(x, codes)
        with isa(name):
            got, distance = search(x[None], codes)
        assert torch.equal(got[0], indices), case
        assert torch.equal(distance[0], sq_dist.to(distance.dtype)), case


@pytest.mark.parametrize("name", ISAS)
def test_a_code_among_a_million_zeros(name):
    # so many that equal ones are not looked for; rows whose squares vanish in float32
    for dtype, scale in ((torch.float32, 1e-24), (torch.float64, 1e-30)):
        codes = torch.zeros(2**20 + 64, 2, dtype=dtype)
        codes[77, 0] = scale
        x = torch.tensor([[0.6 * scale, 0], [0.4 * scale, 0]], dtype=dtype)
        with isa(name):
            assert search(x[None], codes)[0].tolist() == [[77, 0]]


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("codes_dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_isas_mixed_dtypes_strides_and_dither(name, dtype, codes_dtype):
    x, codes = torch.randn(3, 45, 20).to(dtype), torch.randn(70, 20).to(codes_dtype)
    weights = torch.rand(69)
    points = (1 - weights.double()[:, None]) * codes[:-1].double() + weights.double()[:, None] * codes[
        1:
    ].double()
    with isa(name):
        for view in (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.repeat_interleave(2, 2)[..., ::2]):
            for rows, table, dither in ((codes, codes.double(), None), (codes, points, weights)):
                indices, sq_dist = brute_force(x.flatten(0, 1), table)
                got, distance = search(view, rows, dither)
                assert torch.equal(got.flatten(), indices)
                assert torch.equal(distance.flatten(), sq_dist.to(distance.dtype))


@pytest.mark.parametrize("name", ISAS)
def test_isas_non_finite(name):
    x, codes = torch.randn(60, 9), torch.randn(40, 9)
    codes[::3, 4] = torch.nan
    codes[1, 0] = torch.inf
    x[::7, 8] = -torch.inf
    x[5, 0] = torch.nan
    with isa(name):
        for table in (codes, torch.full_like(codes, torch.nan)):
            indices, sq_dist = brute_force(x, table)
            got, distance = search(x[None], table)
            assert torch.equal(got[0], indices)
            assert torch.equal(distance[0].isnan(), sq_dist.isnan())


@pytest.mark.parametrize("name", ISAS)
def test_inexact_regret(name):
    # 4 E in squared distance, E of the search's own bound for |x|, |c| <= R: its unit of a code is at most R /
    # 32766, that of a row 2 (1.5 R) 37000 1.05 / (2^31 0.96), and rounding is off by half of either per feature
    x, codes = torch.randn(500, 33), torch.randn(200, 33)
    with isa(name):
        got, distance = search(x[None], codes, exact=False)
    _, least = brute_force(x, codes)
    reach = max(x.norm(dim=1).max().item(), codes.norm(dim=1).max().item())
    units = 1 / 32766 + 3 * 37000 * 1.05 / (2**31 * 0.96)
    bound = 4 * 0.5 * 33**0.5 * units * reach**2
    assert (distance[0].double() - least).max() <= bound + 2.0**-24 * least.max()
    # the distance is the winner's own, whatever the search saw
    own = torch.stack(
        [brute_force(row[None], codes[j][None])[1][0] for row, j in zip(x, got[0], strict=True)]
    )
    assert torch.equal(distance[0], own.float())


def test_isas_agree():
    x, codes = torch.randn(1, 129, 37), torch.randn(50, 37)
    indices, position = torch.randint(-1, 51, (1, 129)), torch.rand(1, 129)
    grad = torch.randn(1, 129, 37)
    results = []
    for name in ISAS:
        with isa(name):
            words, normals = op.philox(torch.tensor(-3), 5, 33, 1, 2**33)
            counts, sums = op.code_sums(x, indices, 50)
            z = move(x, codes, indices, position)
            grads = pull(grad, x, codes, indices, position)
        results.append((words, counts, normals, sums, z, *grads))
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])
        for a, b in zip(results[0][2:], other[2:], strict=True):
            # one order of every sum and no contraction on any of them
            assert torch.equal(a, b)


def box_muller(w):
    """Normals of (n, 2) uint32 words by the published formula in float64."""
    u = (w >> 8).double() * 2.0**-24
    radius = torch.sqrt(-2 * torch.log(u[:, 0] + 2.0**-24))
    angle = 2 * math.pi * u[:, 1]
    return torch.stack((radius * angle.cos(), radius * angle.sin()), 1)


def test_normals_of_drawn_words():
    # test_build goes through every radius and angle; here 2^23 pairs as the vectorised bodies draw them
    worst, low, high = 0.0, 1 << 32, 0
    for start in range(0, 1 << 22, 1 << 20):
        words, normals = op.philox(torch.tensor(11), 1 << 12, 1 << 8, 0, start >> 8)
        pairs = words.view(-1, 2)
        worst = max(worst, (normals.view(-1, 2).double() - box_muller(pairs)).abs().max().item())
        low, high = min(low, pairs[:, 0].min().item()), max(high, pairs[:, 0].max().item())
    assert low >> 8 < 8
    assert high >> 8 >= (1 << 24) - 8
    assert worst <= NORMAL_ERROR


@pytest.mark.parametrize("layout", ["contiguous", "channels_first"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_half_conversions_are_torchs(dtype, layout):
    # detach hands the code over: every bit pattern of a half, and float32 values that round to each
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for source in (bits.view(torch.float16), bits.view(torch.bfloat16)):
        values = source[source.isfinite()].float()
        near = torch.cat([values * f for f in (1, 1 + 2.0**-12, 1 - 2.0**-12, 1 + 2.0**-9)])
        codes = near[: len(near) // 32 * 32].view(-1, 32)
        codes = codes[codes.isfinite().all(1)]
        x = torch.zeros(1, len(codes), 32, dtype=dtype)
        if layout == "channels_first":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        z = move(x, codes, torch.arange(len(codes))[None], None, direction=1)
        assert z.stride() == torch.empty_like(x).stride()
        assert torch.equal(z[0], codes.to(dtype))


def test_empty_inputs():
    x, codes = torch.randn(2, 0, 5), torch.randn(3, 5)
    indices = torch.zeros(2, 0, dtype=torch.int64)
    found, sq_dist = search(x, codes)
    assert found.shape == sq_dist.shape == (2, 0)
    assert move(x, codes, indices, None).shape == x.shape
    grad_x, grad_codes = pull(x, x, codes, indices, None)
    assert grad_x.shape == x.shape
    assert torch.equal(grad_codes, torch.zeros_like(codes))
    counts, sums = op.code_sums(x, indices, 3)
    assert torch.equal(counts, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(sums, torch.zeros(3, 5))


def test_raw_ops_refuse_what_has_no_size():
    """What the Python side refuses earlier must not end the process either."""
    indices = torch.zeros(1, 3, dtype=torch.long)
    for rows, count in ((torch.zeros(1, 3, 0), 4), (torch.zeros(1, 3, 2), 0)):
        with pytest.raises(RuntimeError, match=r"native: x must have features, and num_codes must be"):
            op.code_sums(rows, indices, count)
    x, codes = torch.zeros(1, 3, 2), torch.zeros(4, 2)
    for seed in (torch.zeros(0, dtype=torch.long), torch.zeros(2, dtype=torch.long), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match=r"native: seed must be a 0-d int64 tensor"):
            op.philox(seed, 3, 1, 0, 0)
        with pytest.raises(RuntimeError, match=r"native: seed must be a 0-d int64 tensor"):
            op.directional(x, codes, indices, None, seed, 0, 0.03, 0)
    with pytest.raises(RuntimeError, match=r"native: rows and blocks must be at least 0"):
        op.philox(torch.tensor(1), -1, 1, 0, 0)
