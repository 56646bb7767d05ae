"""Draw a run on a CPU: how many times slower the peers are, the share of the measured peak, and memory.

python bench/figures.py [--results bench/results/cpu.jsonl] [--figure docs/bench-cpu.png]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import records
from readme import CURVE, LAYER, LAYERS, OURS, ROOT, SEARCHES, peak
from records import Record
from summary import ratios

Shape = tuple[int, int, int]

# head of the legend and colour; a contender keeps its colour in every panel
LOOKS = {
    OURS: ("ours, exact", "black"),
    LAYER: ("ours, DiVeQ", "black"),
    CURVE: ("ours, SF-DiVeQ", "dimgrey"),
    "faiss-cpu IndexFlatL2": ("faiss-cpu", "C0"),
    "scikit-learn": ("scikit-learn", "C1"),
    "torch.cdist + argmin": ("cdist + argmin", "C2"),
    "chunked addmm + argmin": ("chunked addmm", "C3"),
    "chunked addmm + argmin, bfloat16": ("addmm in bfloat16", "C4"),
    "pykeops": ("pykeops", "C5"),
    "diveq DIVEQ": ("diveq, DiVeQ", "C9"),
    "diveq SFDIVEQ": ("diveq, SF-DiVeQ", "steelblue"),
    "vector-quantize-pytorch (EMA)": ("vector-quantize-pytorch, EMA", "C8"),
    "vector-quantize-pytorch (directional)": ("vector-quantize-pytorch, directional", "C6"),
}
# a bar that would not be seen is drawn so high
_LEAST_MB = 0.1


def draw(path: Path, found: Sequence[Record], dtype: str = "float32") -> int:
    """Draw the measurements of one dtype; returns how many bars there are."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [each for each in records.timed(found).values() if each["dtype"] == dtype]
    by_key = {(str(r["case"]), tuple(r["shape"]), str(r["name"])): r for r in measured}
    figure, axes = pyplot.subplots(2, 2, figsize=(15, 9.5), gridspec_kw={"width_ratios": (5, 4)})
    search, layer = [name for name in SEARCHES], [name for name in LAYERS]

    def over(case: str, counterpart: Callable[[str], str]) -> Callable[[Shape, str], float | None]:
        return lambda shape, name: ratios(measured, case, dtype, counterpart(name), name).get(shape)

    def field(case: str, name: str, scale: float, least: float) -> Callable[[Shape, str], float | None]:
        def value(shape: Shape, contender: str) -> float | None:
            record = by_key.get((case, shape, contender))
            known = None if record is None else record.get(name)
            return max(least, scale * float(known)) if isinstance(known, (int, float)) else None

        return value

    shapes = {
        case: list(dict.fromkeys(key[1] for key in by_key if key[0] == case)) for case in ("search", "layer")
    }
    bars = 0
    axis = axes[0][0]
    bars += _bars(axis, shapes["search"], search, over("search", lambda name: OURS), "{:.2g}")
    _ratio_axis(axis, "search: time over that of ours (1 = ours)")
    axis = axes[0][1]
    bars += _bars(axis, shapes["layer"], layer, over("layer", lambda name: LAYERS[name][1]), "{:.2g}")
    _ratio_axis(axis, "layer, forward + backward: time over that of ours, SF over SF (1 = ours)")
    axis = axes[1][0]
    largest = peak(measured)
    share = field("search", "tflops", 100 / largest if largest else 0.0, 0)
    bars += _bars(axis, shapes["search"], [OURS, *search], share, "{:.0f}")
    _peaks(axis, measured)
    axis = axes[1][1]
    memory = field("layer", "extra_mb", 1, _LEAST_MB)
    bars += _bars(axis, shapes["layer"], [LAYER, CURVE, *layer], memory, "{:.2g}")
    axis.set_yscale("log")
    axis.set_title("layer: peak memory above inputs and outputs, MB", fontsize=11)
    _headroom(axis)
    _plain_numbers(axis)
    last = measured[-1] if measured else {}
    figure.suptitle(
        f"{last.get('cpu') or last.get('machine')}, {last.get('threads')} threads, {last.get('isa')}, {dtype}, "
        f"medians of interleaved calls; exact means equal to float64",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return bars


def _bars(
    axis,
    shapes: Sequence[Shape],
    names: Sequence[str],
    value: Callable[[Shape, str], float | None],
    words: str,
) -> int:
    """A group of bars for each shape, each with its number."""
    shown = [name for name in names if any(value(shape, name) is not None for shape in shapes)]
    width = 0.84 / max(1, len(shown))
    count = 0
    for at, name in enumerate(shown):
        points = [
            (i + (at - (len(shown) - 1) / 2) * width, value(shape, name)) for i, shape in enumerate(shapes)
        ]
        points = [(x, y) for x, y in points if y is not None]
        count += len(points)
        axis.bar(
            [x for x, _ in points],
            [y for _, y in points],
            width * 0.92,
            color=LOOKS[name][1],
            label=LOOKS[name][0],
        )
        for x, y in points:
            axis.annotate(
                words.format(y) if y < 10 else f"{y:.0f}",
                (x, y),
                (0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
                rotation=90 if len(shown) > 4 else 0,
            )
    axis.set_xticks(range(len(shapes)), [", ".join(map(str, shape)) for shape in shapes], fontsize=8.5)
    axis.set_xlabel("N, K, D", fontsize=9)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    if shown:
        axis.legend(fontsize=8, ncol=4 if len(shapes) > 3 else 2, loc="upper left", framealpha=0.9)
    return count


def _ratio_axis(axis, title: str) -> None:
    axis.set_yscale("log")
    axis.axhline(1, color="black", linewidth=1.2)
    axis.set_title(title, fontsize=11)
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0.7), high)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low / 1.5 <= tick <= high * 3]
    axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axis.minorticks_off()
    _headroom(axis)


def _plain_numbers(axis) -> None:
    low, high = axis.get_ylim()
    ticks = [10.0**power for power in range(-2, 7) if low <= 10.0**power <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def _headroom(axis) -> None:
    """Room above the bars for the legend."""
    low, high = axis.get_ylim()
    axis.set_ylim(low, high * (high / low) ** 0.27)


def _peaks(axis, measured: Sequence[Record]) -> None:
    """The peaks of the kinds of dot products, as lines across the shares of the largest."""
    peaks = next(
        (r["peaks_tflops"] for r in reversed(measured) if isinstance(r.get("peaks_tflops"), dict)), {}
    )
    assert isinstance(peaks, dict)
    largest = max(peaks.values(), default=1.0)
    for kind, rate in peaks.items():
        # two lines on top of each other would say nothing
        if rate == largest or rate < 0.9 * largest:
            axis.axhline(100 * rate / largest, color="grey", linewidth=1, linestyle="--")
            axis.text(
                0.995,
                100 * rate / largest + 1,
                f"{kind}: {1e3 * rate:.0f} GFLOP/s",
                ha="right",
                fontsize=8,
                color="dimgrey",
                transform=axis.get_yaxis_transform(),
            )
    axis.set_title(
        "search: 2 N K D / time, % of the dot-product peak measured in the same process", fontsize=11
    )
    axis.set_ylim(0, 140)
    axis.set_yticks(range(0, 101, 20))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/cpu.jsonl")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs/bench-cpu.png")
    options = parser.parse_args(arguments)
    found = records.read(options.results)[0] if options.results.exists() else []
    if not records.timed(found):
        print(
            f"figures: {options.results} must hold measurements; got none. Run bench/run.py.", file=sys.stderr
        )
        return 2
    print(f"{draw(options.figure, found)} bars in {options.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
