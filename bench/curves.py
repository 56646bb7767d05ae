"""Time and memory of a search against N, K and D, over two decades each, drawn and fitted.

    python bench/curves.py [--out bench/results/cpu-curves.jsonl] [--figure docs/curves-cpu.png]

On a CPU, float32, ours and faiss-cpu in one process, interleaved, and checked like everything that `run.py` times.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import records
import run
import torch
from options import parse
from readme import FAISS, OURS, ROOT
from records import Record

Shape = tuple[int, int, int]

# the least of N, K and D when they grow, and what they are while another grows
LEAST = (1024, 256, 8)
FIXED = ((0, 1024, 64), (16384, 0, 64), (16384, 1024, 0))
AXES = "NKD"
DECADES, STEPS = 2, 2
SHOWN = {OURS: "ours, exact", FAISS: "faiss-cpu"}
# what is less is no memory worth drawing
_LEAST_MB = 0.1


def shapes(least: Sequence[int] = LEAST) -> list[tuple[str, Shape]]:
    """The letter that grows and the shape, point by point."""
    found = []
    for at, letter in enumerate(AXES):
        for step in range(DECADES * STEPS + 1):
            shape = list(FIXED[at])
            shape[at] = round(least[at] * 10 ** (step / STEPS))
            found.append((letter, (shape[0], shape[1], shape[2])))
    return found


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of a line through the logarithms of (size, value), by least squares."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / spread


def points(found: Sequence[Record], letter: str, name: str, field: str) -> list[tuple[float, float]]:
    """Size and value of one curve, in the order of the sizes."""
    at = AXES.index(letter)
    curve = [each for each in found if each.get("axis") == letter and each["name"] == name]
    return sorted(
        (float(each["shape"][at]), float(each[field])) for each in curve if each.get(field) is not None
    )


def fits(found: Sequence[Record]) -> list[str]:
    """The exponents of time and of memory of each curve, whole and over its upper decade."""
    lines = []
    for name in SHOWN:
        for letter in AXES:
            time = points(found, letter, name, "ms_p50")
            if len(time) < 3:
                continue
            upper = [point for point in time if point[0] >= time[-1][0] / 10.5]
            least = [(x, max(y, _LEAST_MB)) for x, y in points(found, letter, name, "extra_mb")]
            words = f"{name}: time grows as {letter}^{exponent(time):.2f}, over the upper decade {exponent(upper):.2f}"
            if len(least) > 1:
                most = max(y for _, y in least)
                words += f"; memory as {letter}^{exponent(least):.2f}, at most {most:.1f} MB"
            lines.append(words)
    return lines


def draw(path: Path, found: Sequence[Record]) -> int:
    """One row of panels for time and one for memory; returns how many points there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 8), sharex="col")
    count = 0
    for column, letter in enumerate(AXES):
        time, memory = axes[0][column], axes[1][column]
        for order, (name, words) in enumerate(SHOWN.items()):
            colour = "black" if order == 0 else "C0"
            taken = points(found, letter, name, "ms_p50")
            held = [(x, max(y, _LEAST_MB)) for x, y in points(found, letter, name, "extra_mb")]
            count += len(taken) + len(held)
            if len(taken) > 1:
                label = f"{words}: {letter}^{exponent(taken):.2f}"
                time.plot(*zip(*taken, strict=True), "o-", color=colour, label=label, markersize=5)
            if held:
                label = f"{words}: at most {max(y for _, y in held):.1f} MB"
                memory.plot(*zip(*held, strict=True), "o-", color=colour, label=label, markersize=5)
        _guide(time, points(found, letter, OURS, "ms_p50"))
        seen: list[Shape] = sorted({tuple(r["shape"]) for r in found if r.get("axis") == letter})
        _sizes(memory, letter, seen)
        fixed = ", ".join(f"{a} = {size}" for a, size in zip(AXES, seen[0], strict=True) if a != letter)
        time.set_title(fixed, fontsize=11)
        memory.set_xlabel(letter)
        for axis in (time, memory):
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.25, which="both", linewidth=0.5)
            axis.legend(fontsize=8.5, loc="upper left")
        low, high = time.get_ylim()
        time.set_ylim(low, 6 * high)
        low, high = memory.get_ylim()
        memory.set_ylim(min(low, _LEAST_MB / 2), 30 * high)
    axes[0][0].set_ylabel("milliseconds")
    axes[1][0].set_ylabel("peak memory above inputs and outputs, MB")
    last = found[-1] if found else {}
    figure.suptitle(
        f"search, float32, {last.get('cpu') or last.get('machine')}, {last.get('threads')} threads, {last.get('isa')}; "
        "exponents are fitted to the whole curve",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return count


def _guide(axis, curve: Sequence[tuple[float, float]]) -> None:
    """A line of slope 1 through the last point."""
    if curve:
        (x, y), first = curve[-1], curve[0][0]
        axis.plot([first, x], [y * first / x, y], "--", color="grey", linewidth=1, label="slope 1")


def _sizes(axis, letter: str, curve: Sequence[Shape]) -> None:
    """What one matrix of N x K distances would take, and what the codes take."""
    at = AXES.index(letter)
    for words, style, factors in (("one N x K matrix", ":", (0, 1)), ("the codebook itself", "--", (1, 2))):
        sizes = [(shape[at], 4e-6 * shape[factors[0]] * shape[factors[1]]) for shape in curve]
        axis.plot(
            *zip(*sizes, strict=True), style, color="C3" if style == ":" else "grey", label=words, linewidth=1
        )


def measure(arguments: Sequence[str], least: Sequence[int] = LEAST) -> tuple[list[Record], int]:
    """Records of every point, and the exit status: 1 where one of ours was wrong."""
    bench = run.Bench(parse([*arguments, "--names", *SHOWN]))
    if bench.options.fresh:
        bench.options.out.unlink(missing_ok=True)
    bench.measure_floors(torch.float32)
    for letter, shape in shapes(least):
        bench.tags = {"axis": letter}
        bench.case("search", torch.float32, shape, math.inf)
    return bench.measured, 1 if bench.failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, draw, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu-curves.jsonl")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/curves-cpu.png")
    parser.add_argument("--each", type=float, default=0.7, help="seconds for all rounds of a point")
    parser.add_argument("--draw-only", action="store_true", help="what was measured before")
    options = parser.parse_args(arguments)
    status = 0
    if options.draw_only:
        found = records.read(options.out)[0] if options.out.exists() else []
    else:
        found, status = measure(["--out", str(options.out), "--each", str(options.each), "--fresh"])
    if not found:
        print(f"curves: {options.out} must hold measurements; got none. Measure first.", file=sys.stderr)
        return 2
    for words in fits(found):
        print(words)
    print(f"{draw(options.figure, found)} points in {options.figure}")
    return status


if __name__ == "__main__":
    sys.exit(main())
