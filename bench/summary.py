"""What a run comes to: how many times faster than a peer at each shape, on the whole, and at worst."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import records
from records import SUMMARY, Record

from vqkernels.profiling.peers import OURS

# whom the searches and the layers are held to
SEARCHES = ("faiss-cpu IndexFlatL2", "flash-kmeans")
LAYERS = (
    "diveq DIVEQ",
    "diveq SFDIVEQ",
    "vector-quantize-pytorch (EMA)",
    "vector-quantize-pytorch (directional)",
)


def alike(ours: str, other: str) -> bool:
    """Whether both quantize to the curve, or both to the codes."""
    return ("sf_diveq" in ours) == ("sf_diveq" in other or "SF" in other)


def comparable(ours: str, peer: str) -> bool:
    """Whether a peer does what ours does: the curve is compared with the curve."""
    return alike(ours, peer) or not peer.startswith("diveq")


def ratios(measured: Iterable[Record], case: str, dtype: str, ours: str, peer: str) -> dict[tuple, float]:
    """Time of a peer over ours by shape, where both were measured."""
    timed = records.timed(measured)
    shapes = [key[1] for key in timed if key[0] == case and key[2:] == (dtype, ours)]
    pairs = {shape: [timed.get((case, shape, dtype, name)) for name in (ours, peer)] for shape in shapes}
    return {
        shape: float(theirs["ms_p50"]) / float(mine["ms_p50"])
        for shape, (mine, theirs) in pairs.items()
        if mine is not None and theirs is not None
    }


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def summaries(measured: Sequence[Record], facts: Record) -> list[Record]:
    """A record for each of ours and each peer it is held to."""
    found: list[Record] = []
    for case, dtype in dict.fromkeys((str(r["case"]), str(r["dtype"])) for r in measured):
        names = dict.fromkeys(str(r["name"]) for r in measured if r["case"] == case)
        for ours in (name for name in names if name.startswith(OURS) and "reference" not in name):
            for peer in SEARCHES if case == "search" else LAYERS:
                by_shape = ratios(measured, case, dtype, ours, peer) if comparable(ours, peer) else {}
                if not by_shape:
                    continue
                told = {",".join(map(str, shape)): round(ratio, 3) for shape, ratio in by_shape.items()}
                found.append(
                    {
                        "case": SUMMARY,
                        "of": case,
                        "dtype": dtype,
                        "name": ours,
                        "over": peer,
                        "geometric_mean": round(geometric_mean(by_shape.values()), 3),
                        "least": min(told.values()),
                        "ratios": told,
                        **facts,
                    }
                )
    return found


def line(record: Record) -> str:
    """One summary for people."""
    by_shape = record["ratios"]
    worst = min(by_shape, key=lambda shape: by_shape[shape])
    each = ", ".join(f"{ratio:.2f}" for ratio in by_shape.values())
    return (
        f"{record['of']} {record['dtype']}: {record['name']} is {record['geometric_mean']:.2f}x {record['over']} "
        f"over {len(by_shape)} shapes ({each}), at least {record['least']:.2f}x, at {worst}"
    )
