"""Compare two files of measurements, fail where ours became slower, and draw what they reached.

    python bench/compare.py OLD.jsonl NEW.jsonl [--figure PNG]
    python bench/compare.py NEW.jsonl --figure PNG

A measurement of ours is a regression when its median is more than 5 % above the old one, above the slowest old round,
and even its fastest round is above the old median. The exit status is 1 with a regression, 2 with nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import records
from records import Record

from vqkernels.profiling.peers import OURS

TOLERATED = 1.05
# on a GPU, features of tensor-core work in the time of one ALU instruction per row and code, at 790 TFLOP/s
FEATURES_PER_ALU = 23.6
# ALU instructions per row and code of an epilogue: a good one, and that of flash-kmeans
EPILOGUES = {"1.3 ALU per pair": 1.3, "6.75 ALU per pair": 6.75}
MARKERS = "osD^vP*X<>hd"


def regressed(old: Record, new: Record) -> bool:
    """Slower by more than is tolerated, and by more than the rounds of either file spread."""
    limit = max(TOLERATED * number(old, "ms_p50"), number(old, "ms_max"))
    return number(new, "ms_p50") > limit and number(new, "ms_min") > number(old, "ms_p50")


def number(record: Record, name: str) -> float:
    """A field that was checked to be a number when the file was read."""
    value = record[name]
    assert isinstance(value, (int, float))
    return float(value)


def compare(old: dict[tuple, Record], new: dict[tuple, Record]) -> tuple[list[str], list[str]]:
    """The lines of the table, and the names of what became slower."""
    lines = [f"{'':64s} {'old ms':>10s} {'new ms':>10s} {'new/old':>8s}"]
    slower = []
    for key in [key for key in new if key in old]:
        case, shape, dtype, name = key
        ratio = number(new[key], "ms_p50") / number(old[key], "ms_p50")
        mark = ""
        if regressed(old[key], new[key]):
            mark = "slower"
            if name.startswith(OURS):
                mark = "REGRESSION"
                slower.append(f"{case} {','.join(map(str, shape))} {dtype} {name}: {ratio:.3f}x")
        elif regressed(new[key], old[key]):
            mark = "faster"
        where = f"{case} {','.join(map(str, shape))} {dtype}"
        times = f"{number(old[key], 'ms_p50'):10.4f} {number(new[key], 'ms_p50'):10.4f}"
        lines.append(f"{where}  {name}"[:64].ljust(64) + f" {times} {ratio:8.3f}  {mark}".rstrip())
    for words, keys in (("only in OLD", old.keys() - new.keys()), ("only in NEW", new.keys() - old.keys())):
        if keys:
            lines.append(
                f"{words}: {len(keys)} measurements, {sum(key[3].startswith(OURS) for key in keys)} of ours"
            )
    return lines, slower


def draw(path: Path, files: Sequence[tuple[str, dict[tuple, Record]]]) -> int:
    """Draw speed against features, with the floors; returns how many points there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = sorted({(key[0], key[2]) for _, found in files for key in found}, reverse=True)
    figure, axes = pyplot.subplots(1, len(cases), figsize=(7.5 * len(cases), 7.5), squeeze=False)
    count = 0
    for axis, case in zip(axes[0], cases, strict=True):
        here = [(label, {k: r for k, r in found.items() if (k[0], k[2]) == case}) for label, found in files]
        peak = _floors(axis, [record for _, found in here for record in found.values()])
        shapes = sorted({key[1] for _, found in here for key in found})
        names = sorted(
            {key[3] for _, found in here for key in found}, key=lambda n: (not n.startswith(OURS), n)
        )
        for at, name in enumerate(names):
            for order, (label, found) in enumerate(here):
                # what is compared with is hollow
                hollow = order + 1 < len(files)
                points = [
                    (_place(key[1], shapes), float(record["tflops"]))
                    for key, record in sorted(found.items())
                    if key[3] == name and record.get("tflops")
                ]
                if not points:
                    continue
                count += len(points)
                axis.plot(
                    *zip(*points, strict=True),
                    MARKERS[at % len(MARKERS)],
                    markersize=9 if name.startswith(OURS) else 6,
                    color=f"C{at % 10}",
                    markerfacecolor="none" if hollow else f"C{at % 10}",
                    label=f"{name} ({label})" if len(files) > 1 else name,
                )
        _label(axis, case, shapes, peak)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return count


def _place(shape: tuple[int, int, int], shapes: Sequence[tuple[int, int, int]]) -> float:
    """D, moved a little where several shapes have it."""
    same = [other for other in shapes if other[2] == shape[2]]
    return shape[2] * 1.09 ** (same.index(shape) - (len(same) - 1) / 2)


def _floors(axis, found: Sequence[Record]) -> float | None:
    """The largest rate of dot products, and what epilogues let through of it; None where nobody measured it."""
    peaks = [float(record["floor_tflops"]) for record in found if record.get("floor_tflops")]
    if not peaks:
        return None
    peak = max(peaks)
    axis.axhline(peak, color="black", linewidth=1)
    axis.text(
        0.99, peak, f"dot products, {peak:.3g} TFLOP/s", ha="right", va="bottom", transform=_across(axis)
    )
    features = [4 * 2 ** (step / 4) for step in range(37)]
    for words, instructions in EPILOGUES.items():
        bound = [min(peak, peak * d / (FEATURES_PER_ALU * instructions)) for d in features]
        axis.plot(features, bound, "--", color="grey", linewidth=1)
        at = 2 if instructions < 3 else 6
        axis.text(features[at], bound[at], words, color="grey", fontsize=8, rotation=38, va="bottom")
    return peak


def _across(axis):
    return axis.get_yaxis_transform()


def _label(axis, case: tuple[str, str], shapes: Sequence[tuple[int, int, int]], peak: float | None) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_title(f"{case[0]}, {case[1]}")
    axis.set_xlabel("features D (N, K above the axis)")
    axis.set_ylabel("2 N K D / time, TFLOP/s")
    low, high = axis.get_ylim()
    axis.set_ylim(low / 4, high * 1.4 if peak is None else peak * 1.8)
    for shape in shapes:
        words = f"{_round(shape[0])}, {_round(shape[1])}"
        axis.text(_place(shape, shapes), low / 3.6, words, rotation=90, fontsize=7, ha="center", va="bottom")
    ticks = sorted({shape[2] for shape in shapes})
    axis.set_xticks(ticks, [str(d) for d in ticks])
    axis.minorticks_off()
    axis.set_xlim(min(ticks) / 1.6, max(ticks) * 1.6)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncol=2, frameon=False)


def _round(size: int) -> str:
    return f"{size >> 20}M" if size >= 1 << 20 else f"{size >> 10}k" if size >= 1 << 10 else str(size)


def load(path: Path) -> dict[tuple, Record]:
    """The measurements of a file; says on standard error what in it is none."""
    found, malformed = records.read(path)
    if malformed:
        print(f"{path}: {malformed} lines are no measurements", file=sys.stderr)
    return records.timed(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, draw, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="JSONL", help="OLD and NEW, or NEW alone")
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    options = parser.parse_args(arguments)
    if len(options.files) > 2:
        parser.error("compare at most two files")
    if len(options.files) == 1 and options.figure is None:
        parser.error("one file alone can only be drawn: pass --figure PNG")
    unread = [path for path in options.files if not path.is_file()]
    if unread:
        print(
            f"compare: {unread[0]} must be a file; got none. Pass what bench/run.py wrote.", file=sys.stderr
        )
        return 2
    loaded = [(path.name, load(path)) for path in options.files]
    status = 0
    if len(loaded) == 2:
        (_, old), (_, new) = loaded
        if not old.keys() & new.keys():
            print("compare: the files must share a measurement; got none in common.", file=sys.stderr)
            return 2
        devices = [{str(record.get("device", "cpu")) for record in found.values()} for found in (old, new)]
        if devices[0] != devices[1]:
            print(f"these are of different devices: {', '.join(sorted(devices[0] | devices[1]))}")
        lines, slower = compare(old, new)
        print("\n".join(lines))
        for words in slower:
            print(f"regression: {words}")
        status = 1 if slower else 0
    if options.figure is not None:
        if not any(found for _, found in loaded):
            print("compare: the file must hold a measurement to draw; got none.", file=sys.stderr)
            return 2
        points = draw(options.figure, loaded)
        print(f"{points} points in {options.figure}")
    return status


if __name__ == "__main__":
    sys.exit(main())
