"""Rows on which our exact searches differ from float64, of many, on a device that finds them quickly."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import records
import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.profiling.peers import Contender, Layer
from vqkernels.profiling.timing import Failure, attempt

if TYPE_CHECKING:
    from run import Bench

# rows that are counted, and the codes they meet
ROWS, AT = 10_000_000, (1024, 64)
# what that may take of each dtype's time
SECONDS = 12.0


def count(bench: Bench, dtype: torch.dtype) -> None:
    """Rows on which our exact searches differ from the float64 reference, of many."""
    k, d = AT
    codes = torch.randn(k, d, device=bench.device).to(dtype)
    counted = [each for each in bench.contenders("search", dtype) if each.ours and each.exact]
    wrong = dict.fromkeys((each.name for each in counted), 0)
    rows, where = 0, f"agreement {str(dtype).removeprefix('torch.')}"
    while rows < ROWS and bench.left() > 0 and wrong:
        x = torch.randn(1 << 20, d, device=bench.device).to(dtype)
        expected = vq.nearest_code(x, codes, backend="reference").indices
        for contender in counted:
            if contender.name in wrong:
                found = attempt(partial(differing, contender, x, codes, expected))
                if isinstance(found, Failure):
                    del wrong[contender.name]
                    bench.fail(contender, where, found.reason)
                else:
                    wrong[contender.name] += found
        rows += len(x)
    for contender in counted:
        number = wrong.get(contender.name)
        if number is None:
            continue
        if not rows:
            bench.skip(contender.name, f"{where}: no time left")
            continue
        print(f"{where}: {contender.name} differs from float64 on {number} of {rows} rows")
        record = {"case": "agreement", "shape": [rows, k, d], "dtype": str(dtype).removeprefix("torch.")}
        record |= {"name": contender.name, "rows_wrong": number, **bench.facts}
        records.append(bench.options.out, [record])
        if number:
            bench.fail(contender, where, f"{number} of {rows} rows differ from float64")


def differing(contender: Contender, x: Tensor, codes: Tensor, expected: Tensor) -> int:
    """Rows for which a search finds another index."""
    search = contender.make(codes, [x])
    assert not isinstance(search, Layer)
    return int((search(x).long() != expected).sum())
