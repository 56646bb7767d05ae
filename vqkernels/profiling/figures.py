"""A benchmark as pictures: a roofline of what the machine reached, and bars of time and memory."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from vqkernels.profiling.machine import Shape
from vqkernels.profiling.measuring import Benchmark, Measurement
from vqkernels.profiling.table import base_ms, number, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

DPI = 130
# ours in blues; peers told apart also by readers who confuse red and green (Okabe and Ito)
_OURS = ("#0B3C6F", "#2E7EBB", "#79B5DE", "#12827C", "#5A4FCF")
_PEERS = ("#E69F00", "#D55E00", "#CC79A7", "#009E73", "#8C510A", "#7F7F7F", "#B8A100", "#111111")
_MARKERS = "osD^vPX*"
_TITLES = {"search": "nearest code", "layer": "layer, forward + backward"}
# of the lines of peaks, from the highest on
_STYLES = ("-", "--", ":")
# factor between points of one intensity
_ASIDE = 1.05


def roofline(made: Benchmark, case: str) -> bytes:
    """Rates over arithmetic intensity under the measured peaks and the measured bandwidth, as a PNG.

    A point is a contender at one shape: 2 N K D over its median time, and over the bytes that it moves at least. Its
    line goes from its slowest to its fastest call.

    Args:
        made: with at least one measurement of `case`, a peak and a bandwidth.
        case: "search" or "layer".
    """
    from matplotlib.lines import Line2D

    found = [each for each in made.measurements if each.case == case]
    figure = _figure(10, 5.4)
    axis = figure.add_subplot()
    shapes, looks = list(dict.fromkeys(each.shape for each in found)), _looks(found)
    unit, word = (1e12, "TFLOP/s") if max(each.flops for each in found) > 2e13 else (1e9, "GFLOP/s")
    places = list(looks)
    for each in found:
        total = each.flops * each.ms
        # those of one intensity stand side by side, so that none hides another
        place = each.intensity * _ASIDE ** (places.index(each.name) - (len(places) - 1) / 2)
        axis.plot(
            [place] * 2,
            [total / each.ms_max / unit, total / each.ms_min / unit],
            color=looks[each.name],
            linewidth=1.4,
            alpha=0.6,
        )
        axis.plot(
            place,
            each.flops / unit,
            _MARKERS[shapes.index(each.shape) % len(_MARKERS)],
            color=looks[each.name],
            markersize=8.5 if each.ours else 7,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=3,
        )
    roofs = _roofs(axis, made, found, unit, word)
    axis.set_xlabel("arithmetic intensity: 2 N K D operations per byte moved")
    axis.set_ylabel(word)
    axis.set_title(f"{_TITLES[case]}, {found[0].dtype}: {_where(made)}", fontsize=10.5, loc="left")
    axis.grid(alpha=0.2, which="major")
    names = [Line2D([], [], color=colour, linewidth=6, label=name) for name, colour in looks.items()]
    marks = [
        Line2D([], [], color="dimgrey", marker=_MARKERS[i % len(_MARKERS)], linestyle="", label=_size(shape))
        for i, shape in enumerate(shapes)
    ]
    figure.legend(handles=[*roofs, *names, *marks], loc="outside right upper", fontsize=8.5, frameon=False)
    return _png(figure)


def _roofs(axis: Axes, made: Benchmark, found: Sequence[Measurement], unit: float, word: str) -> list[Line2D]:
    peaks = dict(made.floors.kinds) or ({"matrix product": made.floors.flops} if made.floors.flops else {})
    rows = [each.intensity for each in found]
    top = max(peaks.values(), default=max(each.flops for each in found))
    bandwidth = made.floors.bandwidth
    # to the left as far as the slope is the roof
    ridge = top / bandwidth if bandwidth else min(rows)
    low, high = min(*rows, ridge) / 4, max(*rows, ridge) * 3
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(low, high)
    bottom = min(min(each.flops * each.ms / each.ms_max for each in found), (bandwidth or top) * low) / 1.6
    axis.set_ylim(bottom / unit, 2.2 * top / unit)
    lines = []
    if bandwidth:
        lines += axis.plot(
            [low, ridge],
            [low * bandwidth / unit, top / unit],
            color="dimgrey",
            linewidth=2.4,
            label=f"measured copies: {bandwidth / 1e9:.0f} GB/s",
        )
    # their words stand in the legend: a point may lie anywhere below a roof
    for (kind, rate), style in zip(sorted(peaks.items(), key=lambda item: -item[1]), cycle(_STYLES)):
        lines += axis.plot(
            [rate / bandwidth if bandwidth else low, high],
            [rate / unit] * 2,
            color="black",
            linewidth=1.6 if style == "-" else 1.1,
            linestyle=style,
            label=f"measured {kind}: {rate / unit:.0f} {word}",
        )
    return lines


def bars(made: Benchmark, case: str) -> bytes:
    """Median time and peak memory of every contender, one row of panels for each shape, as a PNG.

    Args:
        made: with at least one measurement of `case`.
        case: "search" or "layer".
    """
    found = [each for each in made.measurements if each.case == case]
    shapes = list(dict.fromkeys(each.shape for each in found))
    counts = [len(rows_of(made, case, shape)) for shape in shapes]
    figure = _figure(11, 0.6 + sum(0.85 + 0.27 * count for count in counts))
    axes = figure.subplots(
        len(shapes), 2, squeeze=False, gridspec_kw={"height_ratios": [0.85 + 0.27 * c for c in counts]}
    )
    looks = _looks(found)
    for shape, (left, right) in zip(shapes, axes):
        rows = rows_of(made, case, shape)
        base = base_ms(rows)
        rows = sorted(rows, key=lambda row: row.ms)
        colours = [looks[row.name] for row in rows]
        places = range(len(rows))
        least = [row.ms - row.ms_min for row in rows]
        most = [row.ms_max - row.ms for row in rows]
        left.barh(places, [row.ms for row in rows], color=colours, xerr=[least, most], ecolor="dimgrey")
        for place, row in zip(places, rows):
            _tell(left, place, row.ms_max, f"{number(row.ms)} ms, {number(row.ms / base)}x")
        left.set_yticks(places, [row.name for row in rows], fontsize=9)
        left.set_xlim(0, 1.38 * max(row.ms_max for row in rows))
        left.set_xlabel("milliseconds, median of interleaved calls (line: least to most)", fontsize=9)
        left.set_title(_size(shape), fontsize=10, loc="left")
        known = [(place, row) for place, row in zip(places, rows) if row.extra_bytes is not None]
        megabytes = [(row.extra_bytes or 0) / 1e6 for _, row in known]
        right.barh([place for place, _ in known], megabytes, color=[looks[row.name] for _, row in known])
        for (place, _), size in zip(known, megabytes):
            _tell(right, place, size, "< 0.1 MB" if size < 0.1 else f"{size:.3g} MB")
        if not known:
            right.text(0.5, 0.5, "not measured", transform=right.transAxes, ha="center", color="dimgrey")
        right.set_yticks(places, [""] * len(rows))
        right.set_xlim(0, 1.22 * max([*megabytes, 1e-3]))
        right.set_xlabel("peak memory above inputs and outputs, MB", fontsize=9)
        for axis in (left, right):
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="x", alpha=0.2)
            axis.set_axisbelow(True)
    figure.suptitle(f"{_TITLES[case]}, {found[0].dtype}: {_where(made)}", fontsize=10.5, x=0.01, ha="left")
    return _png(figure)


def _tell(axis: Axes, place: int, end: float, words: str) -> None:
    axis.annotate(words, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8.5)


def _looks(found: Sequence[Measurement]) -> dict[str, str]:
    """A colour for each contender, the same at every shape."""
    names = list(dict.fromkeys((each.ours, each.name) for each in found))
    ours = [name for is_ours, name in names if is_ours]
    peers = [name for is_ours, name in names if not is_ours]
    pairs = [(name, _OURS[i % len(_OURS)]) for i, name in enumerate(ours)]
    return dict(pairs + [(name, _PEERS[i % len(_PEERS)]) for i, name in enumerate(peers)])


def _where(made: Benchmark) -> str:
    facts = made.facts
    if made.device.type == "cuda":
        return str(facts["device"])
    return f"{facts['cpu'] or facts['machine']}, {facts['threads']} threads, torch {facts['torch']}"


def _size(shape: Shape) -> str:
    return "N={}, K={}, D={}".format(*shape)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
