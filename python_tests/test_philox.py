"""Noise: the published vectors, equality of all backends, moments, independence, and the arithmetic of rows."""

import math

import pytest
import torch
from conftest import INTERPRETED

from vqkernels import philox
from vqkernels.ops.philox import dither, philox_op
from vqkernels.testing import DEVICE, NORMAL_ERROR

if INTERPRETED:
    import triton
    import triton.language as tl

    from vqkernels.kernels._noise import normal_pair

    @triton.jit
    def pairs(first, second, cosine, sine, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        c, s = normal_pair(tl.load(first + at).to(tl.uint32), tl.load(second + at).to(tl.uint32))
        tl.store(cosine + at, c)
        tl.store(sine + at, s)


# Random123 1.09, tests/kat_vectors, philox4x32 10: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(backend, seed=7, rows=50, blocks=5, stream=0, row_offset=0):
    seed = torch.tensor(seed, dtype=torch.int64, device=DEVICE)
    return philox_op(seed, rows, blocks, stream, row_offset, backend=backend)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    words = philox.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(map(int, words)) == result


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers_of_backends(counter, key, result, backend, need):
    """The published vectors, reached through (seed, row, stream); the block is the position within the row."""
    need("philox")
    block, low, high, stream = counter
    if block > 0 or stream > 0xFF:
        # a block this far is no row of ours: compare all backends with the oracle there instead
        block, low, high, stream = 3, 0xFFFFFFFF, 0x7FFF, 5
        result = tuple(
            map(
                int,
                philox.philox(
                    tuple(map(torch.tensor, (block, low, high, stream))), tuple(map(torch.tensor, key))
                ),
            )
        )
    seed = key[0] | key[1] << 32
    seed -= (seed >> 63) << 64
    words, _ = draw(backend, seed, 1, block + 1, stream, low | high << 32)
    assert tuple(map(int, words[0, block])) == result


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_backends_agree(seed, backend, need):
    """Integers and uniforms to the bit, normals within the stated bound."""
    need("philox")
    for stream, row_offset in ((0, 0), (1, 2**32 - 3), (5, 2**40 + 1)):
        words, normals = draw(backend, seed, stream=stream, row_offset=row_offset)
        expected, exact = draw("reference", seed, stream=stream, row_offset=row_offset)
        assert torch.equal(words, expected)
        assert (normals - exact).abs().max() <= NORMAL_ERROR


@pytest.mark.parametrize("k", [2, 3, 5, 6, 130])
def test_dither(k, backend, need):
    need("philox")
    seed = torch.tensor(5, device=DEVICE)
    lam = dither(seed, k, backend=backend)
    assert lam.shape == (k - 1,) and lam.dtype == torch.float32
    assert torch.equal(lam, dither(seed, k, backend="reference"))
    # one segment's weight does not depend on how many there are
    assert torch.equal(lam, dither(seed, k + 9, backend=backend)[: k - 1])


@pytest.mark.skipif(not INTERPRETED, reason="calls the kernels' own function")
def test_normals_of_every_word():
    """Each of the 2^24 radii, and 2^22 angles with the largest of them, within the stated bound."""

    def worst(first, second, block=1 << 20):
        found = torch.empty(2, first.numel())
        pairs[(first.numel() // block,)](first, second, found[0], found[1], BLOCK=block)
        exact = philox.normals(torch.stack((first, second), -1))
        return (found.t() - exact).abs().max()

    every = torch.arange(1 << 24) << 8
    # the low byte of a word says nothing
    noise = torch.randint(0, 256, every.shape)
    assert worst(every + noise, torch.zeros_like(every) + noise) <= NORMAL_ERROR
    angles = (torch.arange(1 << 22) << 10) + torch.randint(0, 1024, (1 << 22,))
    assert worst(torch.zeros_like(angles), angles) <= NORMAL_ERROR


def test_extreme_words():
    """U' never is 0, so no normal is infinite; U stays below 1."""
    words = torch.tensor([[0, 0, 0xFFFFFFFF, 0xFFFFFFFF]])
    assert torch.isfinite(philox.normals(words)).all()
    assert philox.normals(words)[0, 0] == pytest.approx(math.sqrt(48 * math.log(2)))
    assert philox.uniforms(words).max() < 1 and philox.uniforms(words).min() == 0


def test_moments():
    """Mean, variance, skewness and kurtosis of a million normals within five standard errors."""
    n = 1 << 20
    _, v = draw("reference", rows=n // 64, blocks=16)
    v = v.flatten().double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((v**power).mean() - moment) < 5 * math.sqrt(variance / n), power
    u = philox.uniforms(draw("reference", rows=n // 64, blocks=16)[0]).flatten().double()
    assert abs(u.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    buckets = torch.histc(u, 256, 0, 1)
    chi = ((buckets - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi - 255) < 6 * math.sqrt(2 * 255)


def test_independence():
    """Features, rows, streams, seeds: correlations of 2^16 normals within five standard errors."""
    n = 1 << 16
    a = draw("reference", 1, n, 2)[1].flatten(1).double()
    others = {
        "feature": a[:, 1],
        "pair": a[:, 2],
        "block": a[:, 4],
        "row": a[:, 0].roll(1),
        "stream": draw("reference", 1, n, 2, stream=1)[1][:, 0, 0].double(),
        "seed": draw("reference", 2, n, 2)[1][:, 0, 0].double(),
        "high seed": draw("reference", 1 + 2**32, n, 2)[1][:, 0, 0].double(),
        "high row": draw("reference", 1, n, 2, row_offset=2**32)[1][:, 0, 0].double(),
    }
    for name, b in others.items():
        assert abs((a[:, 0] * b).mean()) < 5 / math.sqrt(n), name
        assert abs((a[:, 0].abs() * b.abs()).mean() - 2 / math.pi) < 5 / math.sqrt(n), name


def test_row_offset(backend, need):
    need("philox")
    whole, _ = draw(backend, rows=20)
    halves = [draw(backend, rows=10, row_offset=start)[0] for start in (0, 10)]
    assert torch.equal(whole, torch.cat(halves))
