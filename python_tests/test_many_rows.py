"""Ten million rows in all against float64, streamed: ties, duplicates, offsets and magnitudes in every chunk."""

import time

import pytest
import torch
from test_native import ISAS, isa

from vqkernels import native, nearest_code
from vqkernels.testing import brute_force

pytestmark = pytest.mark.skipif(native.MISSING is not None, reason=f"native: {native.MISSING}")

SHAPES = ((96, 6), (512, 8), (256, 32), (1024, 64))
ROWS = 10**7 // len(SHAPES)


def oracle(x, codes):
    """Indices and squared distances: float64 scores say who could win, the contract's loop decides among these.

    Args:
        x: (N, D) finite. codes: (K, D) finite. float64, small enough that no square overflows.
    """
    n, d = x.shape
    score = torch.addmm(codes.square().sum(1) / 2, x, codes.t(), alpha=-1)  # (N, K)
    reach = x.norm(dim=1) + codes.norm(dim=1).amax()
    # a score and a literal distance each err by fewer than d + 4 roundings of reach^2; two codes are compared, and
    # a score is half a distance
    eps, tiny = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
    bound = 4 * (d + 4) * (eps * reach.square() + tiny)
    row, code = (score <= (score.amin(1) + bound)[:, None]).nonzero(as_tuple=True)
    total = torch.zeros(len(row), dtype=torch.float64)
    for a, b in zip(x.t().contiguous(), codes.t().contiguous(), strict=True):
        t = a[row] - b[code]
        total += t * t
    least = torch.full((n,), torch.inf, dtype=torch.float64).scatter_reduce(0, row, total, "amin")
    won = total == least[row]
    return torch.full((n,), len(codes)).scatter_reduce(0, row[won], code[won], "amin"), least


def codebooks(k, d, generator):
    """Codes (K, D) float32 that are hard in one way each."""

    def randn(*size):
        return torch.randn(size, generator=generator)

    normal = randn(k, d)
    yield "normal", normal
    yield "integers", torch.randint(-3, 4, (k, d), generator=generator) / 4
    yield "duplicates", torch.cat((normal[: k // 2], normal[: k // 2].roll(16, 0), normal[: k - k // 2 * 2]))
    # neighbours at every distance down to a rounding of float32
    apart = 2.0 ** -(1 + 24 * torch.rand(k // 2, 1, generator=generator))
    near = torch.cat((normal[: k - k // 2], normal[: k // 2] * (1 + apart * randn(k // 2, d))))
    yield "gaps of every size", near
    yield "gaps and an offset", 10 + near
    yield "offset", 100 + 0.1 * normal
    yield "far offset", 1e4 + 1e-2 * normal
    yield "magnitudes", normal * 10 ** (6 * torch.rand(k, 1, generator=generator) - 3)
    yield "small", 1e-20 * normal
    outlier = normal.clone()
    outlier[k // 3] *= 1e6
    yield "outlier", outlier


def rows_near(codes, count, generator):
    """Rows (N, D) float32, a sixth of each kind: at, near and midway between codes, far, scaled, half zero."""
    each = count // 6

    def pick(size=each):
        return codes[torch.randint(0, len(codes), (size,), generator=generator)]

    def noise(size=each):
        spread = (codes - codes.mean(0)).square().mean().sqrt()
        return spread * torch.randn(size, codes.shape[1], generator=generator)

    powers = 10 ** (6 * torch.rand(each, 1, generator=generator) - 3)
    kinds = (
        pick(),
        pick() + 0.3 * noise(),
        (pick() + pick()) / 2,
        codes.mean(0) + noise(),
        powers * (pick() + 0.3 * noise()),
    )
    last = pick(count - 5 * each)
    last[:, ::2] = 0
    return torch.cat((*kinds, last))[torch.randperm(count, generator=generator)]


def test_the_oracle_is_the_contract():
    generator = torch.Generator().manual_seed(1)
    for k, d in ((70, 5), (33, 40)):
        for name, codes in codebooks(k, d, generator):
            x = rows_near(codes, 500, generator)
            for found, expected in zip(
                oracle(x.double(), codes.double()), brute_force(x, codes), strict=True
            ):
                assert torch.equal(found, expected), name


@pytest.mark.slow
@pytest.mark.parametrize(("k", "d"), SHAPES)
def test_ten_million_rows(k, d, capsys):
    generator = torch.Generator().manual_seed(k + d)
    tables = list(codebooks(k, d, generator))
    chunk = (1 << 23) // k
    ours = theirs = 0.0
    done = turn = 0
    while done < ROWS:
        kind, codes = tables[turn % len(tables)]
        x = rows_near(codes, min(chunk, ROWS - done), generator)
        bad = torch.randint(0, len(x), (3,), generator=generator)
        clean = x.double()
        clean[bad] = 0
        began = time.perf_counter()
        expected, least = oracle(clean, codes.double())
        theirs += time.perf_counter() - began
        x[bad, turn % d] = (torch.nan, torch.inf, -torch.inf)[turn % 3]
        expected[bad], least[bad] = 0, torch.nan
        # the best instruction set on all rows, the others on each kind of codes now and then
        for name in ISAS if turn % 7 == 0 else ISAS[:1]:
            with isa(name):
                began = time.perf_counter()
                indices, sq_dist = nearest_code(x, codes, backend="native")
                ours += (time.perf_counter() - began) * (name == ISAS[0])
            wrong = (indices != expected).nonzero().flatten()[:5]
            assert len(wrong) == 0, (name, kind, done + wrong, indices[wrong], expected[wrong])
            assert torch.allclose(sq_dist, least.float(), rtol=0, atol=0, equal_nan=True), (name, kind)
        done, turn = done + len(x), turn + 1
    with capsys.disabled():
        speed = f"{done / ours:.3g} rows/s, float64 {done / theirs:.3g} rows/s"
        print(f"\n{done} rows, K {k}, D {d}, {ISAS[0]}, {torch.get_num_threads()} threads: {speed}")
