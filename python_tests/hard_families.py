"""Families of latents and codes that break a search which is not the contract's; float64, cast by who uses them."""

import math
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    """N, K, D, and what the values are drawn from."""

    n: int
    k: int
    d: int
    generator: torch.Generator

    def normal(self, *size):
        return torch.randn(size, generator=self.generator, dtype=torch.float64)

    def integers(self, low, high, *size):
        return torch.randint(low, high + 1, size, generator=self.generator).double()

    def pick(self, count):
        """Which code each row is drawn from, or each code from `count` others."""
        return torch.randint(0, count, (self.n,), generator=self.generator)

    def clusters(self, spread=0.3):
        codes = self.normal(self.k, self.d)
        return codes[self.pick(self.k)] + spread * self.normal(self.n, self.d), codes


def powers(s, count, reach):
    """10^-reach to 10^reach, one for each of `count` rows."""
    return 10 ** ((2 * torch.rand(count, 1, generator=s.generator, dtype=torch.float64) - 1) * reach)


def grid(s):
    return s.integers(-2, 2, s.n, s.d), s.integers(-2, 2, s.k, s.d)


def signs(s):
    # all of them the largest there is: sums of products reach what an accumulator can hold
    codes = 2 * s.integers(0, 1, s.k, s.d) - 1
    return codes[s.pick(s.k)], codes


def permuted(s):
    # real ties that only the order of the sum tells apart
    base = s.normal(s.d)
    codes = torch.stack([base[torch.randperm(s.d, generator=s.generator)] for _ in range(s.k)])
    return s.normal(s.n, 1).expand(-1, s.d).contiguous(), codes


def repeated(distinct):
    def make(s):
        x, codes = s.clusters()
        return x, codes[: min(distinct, s.k)].repeat(math.ceil(s.k / distinct), 1)[: s.k]

    return make


def apart(steps):
    def make(s):
        x, codes = s.clusters()
        codes[steps:] = codes[: max(0, s.k - steps)].clone()
        return x, codes

    return make


def one_ulp(s):
    # squares that sum to D - 1, and one that adds an ulp of it, half of one, a quarter or nothing
    codes = 2 * s.integers(0, 1, s.k, s.d) - 1
    ulp = 2.0 ** -(52 - math.floor(math.log2(max(1, s.d - 1))))
    place = torch.randint(0, s.d, (s.k,), generator=s.generator)
    codes[torch.arange(s.k), place] = (ulp * 2.0 ** -s.integers(0, 3, s.k)).sqrt()
    return torch.zeros(s.n, s.d).double(), codes


def ulp_of_a_feature(s):
    # neighbours in float64 of one code: nothing narrower can tell them apart
    x, codes = s.clusters()
    codes = codes[:1].repeat(s.k, 1)
    codes[:, -1] *= 1 + s.integers(-3, 3, s.k) * 2.0**-52
    return x, codes


def gaps_of_every_size(s):
    # pairs of codes from half of to 2^-50 of their size apart: whatever a bound is, some rows are near it
    x, codes = s.clusters()
    odd = codes[1::2]
    apart = 2.0 ** -(1 + 49 * torch.rand(len(odd), 1, generator=s.generator, dtype=torch.float64))
    codes[1::2] = codes[::2][: len(odd)] + apart * s.normal(*odd.shape)
    x = codes[s.pick(s.k)] + 0.3 * s.normal(s.n, s.d)
    # on a plane midway between the two codes of a pair, but for an error that is as small
    first = 2 * s.pick((s.k + 1) // 2)
    normal = codes[(first + 1).clamp(max=s.k - 1)] - codes[first]
    square = normal.square().sum(1, keepdim=True).clamp(min=1e-300)
    x = x - ((x - codes[first]) * normal).sum(1, keepdim=True) / square * normal
    return x + normal * (0.5 + powers(s, s.n, 15).clamp(max=1)), codes


def at_a_code(s):
    _, codes = s.clusters()
    codes[s.k // 2] = codes[0]
    return codes[s.pick(s.k)], codes


def midway(s):
    codes = s.integers(-8, 8, s.k, s.d)
    return (codes[s.pick(s.k)] + codes[s.pick(s.k)]) / 2, codes


def offset(mean, spread):
    def make(s):
        x, codes = s.clusters()
        return mean + spread * x, mean + spread * codes

    return make


def offset_of_rows(s):
    x, codes = s.clusters()
    return 1e3 + 1e-2 * x, codes


def below_a_step(s):
    # one feature sets the scale of a fixed point, the others lie below its steps
    x, codes = (v * 2.0**-18 for v in s.clusters())
    x[:, 0] = codes[:, 0] = 1
    return x, codes


def magnitude(scale):
    def make(s):
        x, codes = s.clusters()
        return scale * x, scale * codes

    return make


def mixed_rows(s):
    x, codes = s.clusters()
    return powers(s, s.n, 3) * x, codes


def mixed_all(s):
    x, codes = s.normal(s.n, s.d), s.normal(s.k, s.d)
    return powers(s, s.n, 12) * x, powers(s, s.k, 12) * codes


def outlier_code(s):
    x, codes = s.clusters()
    codes[s.k // 3] *= 1e6
    return x, codes


def outlier_row(s):
    x, codes = s.clusters()
    x[s.n // 3] *= 1e6
    return x, codes


def huge_feature(s):
    x, codes = s.clusters()
    x[:, s.d // 2] *= 1e6
    codes[:, s.d // 2] *= 1e6
    return x, codes


def cauchy(s):
    x, codes = (v / s.normal(len(v), s.d) for v in (s.normal(s.n, s.d), s.normal(s.k, s.d)))
    return x, codes


def sparse(s):
    return tuple(v * (s.integers(0, 9, *v.shape) == 0) for v in s.clusters())


def zeros(s):
    # c and -c are equally far from 0, and every second code is 0 itself in half of the cases
    x, codes = s.clusters()
    codes[1::2] = -codes[: s.k // 2] if s.k % 2 else 0
    x[::2] = 0
    return x, codes


def bad(s):
    x, codes = s.clusters()
    for v in (x, codes):
        for value in (torch.nan, torch.inf, -torch.inf):
            # about a third of the rows in all, whatever D
            v[(torch.rand(v.shape, generator=s.generator) < 0.1 / s.d)] = value
    return x, codes


def no_good_code(s):
    x, codes = s.clusters()
    codes[:, -1] = torch.nan
    return x, codes


FAMILIES = {
    "integer grid": grid,
    "signs": signs,
    "permuted": permuted,
    "2 codes repeated": repeated(2),
    "40 codes repeated": repeated(40),
    "one code repeated": repeated(1),
    "duplicates 16 apart": apart(16),
    "duplicates 192 apart": apart(192),
    "an ulp of the distance": one_ulp,
    "an ulp of a feature": ulp_of_a_feature,
    "gaps of every size": gaps_of_every_size,
    "at a code": at_a_code,
    "midway": midway,
    "offset 100": offset(100, 0.1),
    "offset 1e4": offset(1e4, 1e-2),
    "offset of rows": offset_of_rows,
    "below a step": below_a_step,
    **{f"magnitude {scale:g}": magnitude(scale) for scale in (1e-310, 1e-40, 1e-30, 1e-20, 1e20, 1e30, 1e38)},
    "mixed rows": mixed_rows,
    "mixed rows and codes": mixed_all,
    "outlier code": outlier_code,
    "outlier row": outlier_row,
    "huge feature": huge_feature,
    "cauchy": cauchy,
    "sparse": sparse,
    "zeros": zeros,
    "not finite": bad,
    "no good code": no_good_code,
}
