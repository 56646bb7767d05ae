"""k-means against its literal in float64, and k-means++ against its law."""

import importlib
import itertools
import math

import pytest
import torch

from vqkernels import nearest_code
from vqkernels.nn import kmeans
from vqkernels.testing import DEVICE, brute_force, clusters

D, K = 5, 8


def lloyd(x, codes):
    """One iteration, to the letter: float64, one code at a time."""
    x, codes = x.double(), codes.double()
    indices, _ = brute_force(x, codes)
    return torch.stack([x[indices == j].mean(0) for j in range(len(codes))])


def inertia(x, codes):
    return brute_force(x, codes)[1].sum()


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_lloyd(dtype, offset):
    x = (torch.randn(300, D, device=DEVICE) + offset).to(dtype)
    codes = kmeans(x, K, iterations=0, seed=1)
    for _ in range(5):
        expected, found = lloyd(x, codes), kmeans(x, K, iterations=1, start=codes)
        wide = torch.promote_types(dtype, torch.float32)
        assert found.dtype == wide and len(found) == K
        # a mean moves from its code by a sum of at most 300 differences, each rounded once
        eps, size = torch.finfo(wide).eps, x.double().abs().max()
        spread = (x.double().amax(0) - x.double().amin(0)).max()
        assert (found - expected).abs().max() <= 2 * eps * size + 300 * eps * spread
        codes = found
    assert torch.equal(codes, kmeans(x, K, iterations=5, start=kmeans(x, K, iterations=0, seed=1)))
    assert torch.equal(codes, kmeans(x, K, iterations=5, seed=1))


@pytest.mark.parametrize("bad_start", [False, True])
def test_inertia_never_grows(bad_start):
    x = torch.randn(400, D, device=DEVICE, dtype=torch.float64)
    # all but one of the bad codes are nobody's
    start = torch.full((K, D), 100.0, device=DEVICE).double() + torch.arange(K, device=DEVICE)[:, None]
    start = start if bad_start else kmeans(x, K, iterations=0, seed=2)
    sizes = [inertia(x, kmeans(x, K, iterations=n, start=start)) for n in range(12)]
    # sums of 400 terms round
    assert all(after <= before * (1 + 400 * 2.0**-52) for before, after in itertools.pairwise(sizes))
    assert sizes[-1] < 0.8 * (sizes[0] if not bad_start else inertia(x, x.mean(0)[None]))


POINTS = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 1], [3, 2], [-1, 4]], dtype=torch.float64, device=DEVICE)


def law(x, num_codes):
    """The probability of each set of rows under k-means++, by enumeration."""
    d2 = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in x] for p in x]
    sets: dict[frozenset, float] = {}
    for order in itertools.permutations(range(len(x)), num_codes):
        p = 1 / len(x)
        for done in range(1, num_codes):
            least = [min(d2[n][c] for c in order[:done]) for n in range(len(x))]
            p *= least[order[done]] / sum(least)
        sets[frozenset(order)] = sets.get(frozenset(order), 0) + p
    return sets


def chi_square(x, num_codes, runs):
    """The probability of a worse fit to the law than that of kmeans with seeds 0, 1, 2, ..."""
    expected = law(x.tolist(), num_codes)
    assert math.isclose(sum(expected.values()), 1)
    counts = dict.fromkeys(expected, 0)
    for seed in range(runs):
        codes = kmeans(x, num_codes, iterations=0, seed=seed)
        counts[frozenset((codes[:, None] == x).all(2).nonzero()[:, 1].tolist())] += 1
    # the approximation holds for cells of five or more; the rest are one cell
    cells = [(counts[s], runs * p) for s, p in expected.items() if runs * p >= 5]
    rest = runs - sum(c for c, _ in cells), runs - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 1 else []
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return torch.special.gammaincc(
        torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), torch.tensor(statistic / 2).double()
    )


def test_the_law_of_the_start():
    """Draws follow D^2 exactly, also where several candidates come from one distribution."""
    # a right law passes a fixed set of seeds but for one choice of seeds in 10^4
    assert chi_square(POINTS, 4, 1500) > 1e-4
    assert chi_square(POINTS[:4], 2, 500) > 1e-4


@pytest.mark.parametrize("broken", ["draws", "acceptance"])
def test_the_test_of_the_law_can_fail(broken, monkeypatch):
    module = importlib.import_module("vqkernels.nn.upkeep.kmeans")
    draw, accepted = module._draw, module._accepted
    if broken == "draws":
        monkeypatch.setattr(module, "_draw", lambda shares, words: draw((shares > 0).long(), words))
    else:
        # what was right before others were accepted, unless it is one of them
        monkeypatch.setattr(
            module, "_accepted", lambda x, then, words, most: accepted(x, then, 0 * words, most)
        )
    assert chi_square(POINTS, 4, 600) < 1e-4


@pytest.mark.parametrize(("n", "k"), [(40, 40), (2000, 600), (3, 2), (1, 1)])
def test_a_start_is_different_rows(n, k):
    x = torch.randn(n, D, device=DEVICE)
    codes = kmeans(x, k, iterations=0, seed=4)
    assert len(codes.unique(dim=0)) == k
    assert not nearest_code(codes, x).sq_dist.any()


def test_far_clusters_get_a_code_each():
    x, centres = clusters(1600, 16, D, spread=1e-3, scale=100.0)
    for seed in range(5):
        codes = kmeans(x, 16, iterations=3, seed=seed)
        assert nearest_code(codes, centres).indices.sort().values.tolist() == list(range(16))
        # each is the mean of 100 rows, five standard errors and the rounding of rows
        assert nearest_code(codes, centres).sq_dist.max() < D * (5 * 0.1 / 10) ** 2


def test_a_code_without_rows_moves_to_the_farthest_rows():
    x = torch.tensor([[0.0], [1], [2], [10], [14]], device=DEVICE)
    start = torch.tensor([[1.0], [500], [600]], device=DEVICE)
    found = kmeans(x, 3, iterations=1, start=start)
    assert found.flatten().tolist() == [pytest.approx(27 / 5, rel=1e-6), 14, 10]


def test_fewer_different_rows_than_codes():
    x = torch.tensor([[0.0, 0], [1, 0], [0, 5]], device=DEVICE).repeat(10, 1)
    for seed in range(5):
        for iterations in (0, 4):
            codes = kmeans(x, 6, iterations=iterations, seed=seed)
            assert torch.equal(codes.unique(dim=0), x.unique(dim=0))


def test_a_function_of_rows_and_seed():
    x = torch.randn(3000, 16, device=DEVICE)
    codes = kmeans(x, 40, iterations=3, seed=7)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            assert torch.equal(codes, kmeans(x, 40, iterations=3, seed=7))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(
        codes, kmeans(x.view(30, 100, 16), 40, iterations=3, seed=torch.tensor(7, device=DEVICE))
    )
    assert not torch.equal(codes, kmeans(x, 40, iterations=3, seed=8))
    torch.manual_seed(5)
    first, second = (kmeans(x, 40, iterations=0) for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, kmeans(x, 40, iterations=0)) and not torch.equal(first, second)


@pytest.mark.parametrize("power", [-110, 110])
def test_no_scale_is_too_small_or_too_large(power):
    """Squared distances of such rows are no float32."""
    x = torch.randn(200, D, device=DEVICE)
    assert torch.equal(kmeans(x * 2.0**power, K, seed=1), kmeans(x, K, seed=1) * 2.0**power)


def test_rows_that_are_not_finite_have_no_part():
    x = torch.randn(200, D, device=DEVICE)
    dirty = torch.cat([torch.full((1, D), torch.nan, device=DEVICE), x, x[:1] * torch.inf])
    assert torch.equal(kmeans(dirty, K, seed=1), kmeans(x, K, seed=1))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            (torch.full((9, 2), torch.nan), 4),
            ValueError,
            "x must have at least 4 finite rows, one per code; got 0",
        ),
        ((torch.zeros(3, 2), 4), ValueError, "x must have at least 4 finite rows, one per code; got 3"),
        ((torch.zeros(3, 2), 0), ValueError, "num_codes must be at least 1; got 0"),
        ((torch.zeros(3, 2).long(), 1), TypeError, "x must be float16"),
    ],
    ids=["nan", "few", "none", "dtype"],
)
def test_refused(arguments, error, words):
    with pytest.raises(error, match=f"kmeans: {words}"):
        kmeans(*arguments)


def test_starts_that_do_not_fit():
    x = torch.zeros(9, 2)
    with pytest.raises(ValueError, match=r"kmeans: start must have 4 codes; got 3\."):
        kmeans(x, 4, start=x[:3])
    with pytest.raises(ValueError, match=r"iterations must be at least 0; got -1\."):
        kmeans(x, 4, iterations=-1)
