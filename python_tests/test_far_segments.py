"""nearest_segment on codebooks with a few codes much longer than the rest."""

import time

import pytest
import torch
from test_native import ISAS, isa, threads
from test_nearest_segment import check_native, compiled, native_segments


def with_far_codes(codes, places, factor):
    far = codes.clone()
    far[places] *= factor
    return far


# 320 codes, of which at most 5 can be far: at the ends, alone, as neighbours, and more of them than can be
FAR = {
    "first": [0],
    "last": [319],
    "middle": [150],
    "ends": [0, 319],
    "neighbours": [99, 100],
    "around one": [200, 202],
    "five": [0, 11, 12, 13, 319],
    "six": [0, 11, 12, 13, 180, 319],
}


@compiled
@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("factor", [5, 1e2, 1e4])
def test_isas_far_codes(factor, name):
    """Segments to codes much longer than the rest, which pass near rows of every length."""
    x, codes = torch.randn(60, 9), torch.randn(320, 9)
    with isa(name):
        for what, places in FAR.items():
            far = with_far_codes(codes, places, factor)
            # points of the segments beside far codes, their nodes, and rows between the far and the others
            t = torch.rand(len(far) - 1, 1)
            along = (far[:-1] + t * (far[1:] - far[:-1]))[[max(p - 1, 0) for p in places]]
            rows = torch.cat(
                (x, factor**0.5 * x, along, along + 0.1 * x[: len(along)], far[places], far[::9])
            )
            check_native(rows, far, what)
            check_native(rows.double(), far.double(), f"{what}, float64")
            check_native(0.1 * rows + 100, 0.1 * far + 100, f"{what}, offset")
            holes = far.clone()
            holes[[p - 1 for p in places if p]] = torch.nan
            check_native(rows, holes, f"{what}, holes")


@compiled
@pytest.mark.parametrize("name", ISAS)
def test_isas_ties_of_far_codes(name):
    """A usual and a far segment as near as each other: the lower wins, whichever it is."""
    codes = torch.randint(-1, 2, (320, 3)).float()
    x = torch.cat((torch.randint(-2, 3, (200, 3)) / 2, 1000 * codes[::20]))
    far = with_far_codes(codes, [5, 6, 100, 310], 1000)
    with isa(name):
        check_native(x, far, "lattice")
        # the same curve again, so that each segment beside a far code has a twin
        check_native(x, torch.cat((codes, far[:16], codes)), "twins")
    # the nearest point is the node between two segments, one of which leads far away
    line = torch.arange(128.0)[:, None].mul(torch.tensor([1.0, 0, 0]))
    for place in (40, 41, 42):
        bent = line.clone()
        bent[place] = torch.tensor([0.0, 1e5, 0])
        with isa(name):
            check_native(line - torch.tensor([0.0, 0, 2]), bent, place)


@compiled
@pytest.mark.parametrize("factor", [1e2, 1e4])
def test_far_codes_cost_little(factor):
    """Every row against every segment in float64 takes ten times as long or more, in time of one processor."""
    x, codes = torch.randn(256, 128), torch.randn(2048, 128)
    cases = {
        "usual": codes,
        "one": with_far_codes(codes, [700], factor),
        "32": with_far_codes(codes, list(range(0, 2048, 64)), factor),
        # more than are set apart
        "33": with_far_codes(codes, [*range(0, 2048, 64), 1], factor),
    }

    def seconds(table):
        begin = time.thread_time()
        native_segments(x, table)
        return time.thread_time() - begin

    with threads(1):
        least = {what: min(seconds(table) for _ in range(7)) for what, table in cases.items()}
    assert least["one"] < least["33"] / 3 and least["32"] < least["33"] / 3, least
