"""A comparison as pictures: quality against rate, training logs, and ablations."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from vqkernels.train.checkpoints.files import replace_file
from vqkernels.train.comparison.compare import CellState, Grid
from vqkernels.train.comparison.table import Entry
from vqkernels.train.log import Line, read_lines
from vqkernels.train.reports.plots import DPI, png

# told apart also by readers who confuse red and green (Okabe and Ito, then darker and lighter ones)
COLOURS = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#7F7F7F",
    "#8C510A",
    "#111111",
    "#B2DF8A",
    "#6A3D9A",
    "#FFD92F",
)
MARKERS = "osD^vPX<>ph*"
# panels of the figures of quality: measurement, title, unit on the axis
PANELS = (
    ("psnr", "Reconstruction", "PSNR of held-out crops (dB)"),
    ("ssim", "Structure", "SSIM of held-out images"),
    ("perplexity", "Codes in effective use", "perplexity"),
    ("distortion_per_bit", "Quantization", "distortion per bit (latents squared)"),
)
LOGS = (
    ("loss", "training loss"),
    ("psnr", "PSNR (dB)"),
    ("perplexity", "perplexity"),
    ("usage", "codes in use"),
)
SPREAD = "mean and standard deviation over {} seeds"

Style = tuple[str, str]


def draw_comparison(path: Path, grid: Grid, entries: Sequence[Entry]) -> None:
    """Draw measurements against the rate, one colour for each method (DiVeQ figure 6).

    Args:
        path: of the PNG to write, as a whole.
        grid: of the comparison.
        entries: from `summarise`.
    """
    sizes = sorted(grid.num_codes)
    styles = _styles(grid, entries)
    figure, panels = _panels()
    for axes, (name, title, unit) in zip(panels.flat, PANELS, strict=True):
        for place, (label, style) in enumerate(styles.items()):
            rows = sorted(
                (e for e in entries if e.label == label and name in e.spreads), key=lambda e: e.num_codes
            )
            # side by side, for bars of one rate would hide each other
            aside = 0.036 * (place - (len(styles) - 1) / 2) * _gap(sizes)
            _points(axes, [math.log2(e.num_codes) + aside for e in rows], rows, name, style)
        axes.set(title=title, ylabel=unit)
        margin = 0.036 * len(styles) / 2 * _gap(sizes) + 0.15 * _gap(sizes)
        axes.set_xlim(math.log2(sizes[0]) - margin, math.log2(sizes[-1]) + margin)
        axes.xaxis.set_major_locator(FixedLocator([math.log2(size) for size in sizes]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}\nK = {2**bits:.0f}"))
        _scales(axes, name)
    for axes in panels[1]:
        axes.set_xlabel("bits per latent")
    _finish(figure, path, styles, f"{_budget(grid)}; {SPREAD.format(len(grid.seeds))}")


def draw_ablation(path: Path, grid: Grid, entries: Sequence[Entry]) -> None:
    """Draw measurements against what an ablation varies, one colour for each method and codebook size.

    Args:
        path: of the PNG to write, as a whole.
        grid: with an ablation.
        entries: from `summarise`.
    """
    variants = grid.variants
    values = [variant.value for variant in variants]
    ordered = all(value is not None for value in values)
    spots = {v.label: math.log2(v.value) if v.value else float(n) for n, v in enumerate(variants)}
    several = len(grid.num_codes) > 1
    names = dict.fromkeys((e.label, k) for e in entries for k in sorted(grid.num_codes))
    keys = {key: f"{key[0]}, K = {key[1]}" if several else key[0] for key in names}
    styles = {text: _style(number) for number, text in enumerate(keys.values())}
    gap = _gap_of(sorted(spots.values()))
    figure, panels = _panels()
    for axes, (name, title, unit) in zip(panels.flat, PANELS, strict=True):
        for place, ((label, num_codes), text) in enumerate(keys.items()):
            rows = [e for e in entries if e.label == label and e.num_codes == num_codes and name in e.spreads]
            aside = 0.06 * gap * (place - (len(keys) - 1) / 2)
            _points(axes, [spots[e.variant] + aside for e in rows], rows, name, styles[text], line=ordered)
        axes.set(title=title, ylabel=unit)
        axes.xaxis.set_major_locator(FixedLocator(list(spots.values())))
        axes.set_xticks(list(spots.values()), list(spots))
        axes.set_xlim(min(spots.values()) - 0.5 * gap, max(spots.values()) + 0.5 * gap)
        _scales(axes, name)
    for axes in panels[1]:
        axes.set_xlabel(grid.sweep.axis)
    size = "" if several else f"K = {grid.num_codes[0]}; "
    _finish(figure, path, styles, f"{size}{_budget(grid)}; {SPREAD.format(len(grid.seeds))}")


def draw_logs(path: Path, grid: Grid, states: Sequence[CellState]) -> None:
    """Draw loss, PSNR, perplexity and usage over the steps, a column for each codebook size (DiVeQ figure 25).

    Args:
        path: of the PNG to write, as a whole.
        grid: of the comparison.
        states: of its cells; the logs of finished ones are drawn.
    """
    sizes = sorted(grid.num_codes)
    labels = dict.fromkeys(state.cell.label for state in states)
    styles = {label: _style(number) for number, label in enumerate(labels)}
    figure = Figure(figsize=(4.6 * len(sizes) + 2.2, 11), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(LOGS), len(sizes), sharex=True, sharey="row", squeeze=False)
    for column, num_codes in zip(panels.T, sizes, strict=True):
        for label, (colour, _) in styles.items():
            logs = [
                read_lines(state.cell.config.metrics_path())
                for state in states
                if state.result is not None
                and (state.cell.label, state.cell.config.num_codes) == (label, num_codes)
            ]
            for axes, (name, _) in zip(column, LOGS, strict=True):
                _band(axes, logs, name, colour)
        column[0].set_title(f"K = {num_codes}, {math.log2(num_codes):g} bits per latent")
        column[-1].set_xlabel("optimizer step")
    for row, (name, unit) in zip(panels, LOGS, strict=True):
        row[0].set_ylabel(unit)
        for axes in row:
            axes.grid(alpha=0.25)
            axes.set_xlim(0, grid.base.steps)
            if name == "usage":
                axes.set_ylim(0, 1.04)
                axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            if name == "loss":
                axes.set_yscale("log")
            if name == "perplexity":
                axes.set_ylim(bottom=0)
    note = (
        "training crops, means between two lines of the log; lines are means over seeds, bands their range. "
        "A warm-up quantizes nothing; SF-DiVeQ counts segments"
    )
    _finish(figure, path, styles, note)


def _panels() -> tuple[Figure, NDArray[Any]]:
    figure = Figure(figsize=(12.4, 8.2), dpi=DPI, layout="constrained")
    return figure, figure.subplots(2, 2, sharex=True)


def _finish(figure: Figure, path: Path, styles: Mapping[str, Style], note: str) -> None:
    keys = [
        Line2D([], [], color=colour, marker=marker, markersize=6, label=label)
        for label, (colour, marker) in styles.items()
    ]
    figure.legend(handles=keys, loc="outside right upper", frameon=False, fontsize=11)
    # the data may have dollar signs in its path
    figure.supxlabel(note, fontsize=9, color="0.35", parse_math=False)
    replace_file(path, png(figure))


def _points(
    axes: Axes, x: Sequence[float], rows: Sequence[Entry], name: str, style: Style, *, line: bool = True
) -> None:
    if not rows:
        return
    colour, marker = style
    means = [entry.spreads[name].mean for entry in rows]
    deviations = [entry.spreads[name].deviation for entry in rows]
    axes.errorbar(
        x,
        means,
        yerr=deviations,
        color=colour,
        marker=marker,
        markersize=6.5,
        markeredgecolor="white",
        markeredgewidth=0.6,
        linewidth=1.4 if line else 0,
        elinewidth=1.4,
        capsize=2.5,
    )


def _scales(axes: Axes, name: str) -> None:
    axes.grid(alpha=0.25)
    if name == "perplexity":
        axes.set_ylim(bottom=0)
    if name == "distortion_per_bit":
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _band(axes: Axes, logs: Sequence[Sequence[Line]], name: str, colour: str) -> None:
    """The mean over runs at each step that they have in common, and from the least to the most of them."""
    values: dict[float, list[float]] = {}
    for lines in logs:
        for line in lines:
            value = line.get(name)
            if line["split"] == "train" and value is not None:
                values.setdefault(float(line["step"] or 0), []).append(float(value))
    common = {step: found for step, found in sorted(values.items()) if len(found) == len(logs)}
    if not common:
        return
    steps = list(common)
    runs = np.array(list(common.values()))  # (steps, seeds)
    axes.plot(steps, runs.mean(1), color=colour, linewidth=1.3)
    axes.fill_between(steps, runs.min(1), runs.max(1), color=colour, alpha=0.15, linewidth=0)


def _styles(grid: Grid, entries: Sequence[Entry]) -> dict[str, Style]:
    labels = dict.fromkeys(entry.label for entry in entries)
    return {label: _style(number) for number, label in enumerate(labels)}


def _style(number: int) -> Style:
    # beyond the palette a colour comes back with another mark
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def _gap(sizes: Sequence[int]) -> float:
    return _gap_of([math.log2(size) for size in sizes])


def _gap_of(places: Sequence[float]) -> float:
    """The least distance between two neighbours; 1 where there is one place alone."""
    return min((b - a for a, b in pairwise(places)), default=1.0)


def _budget(grid: Grid) -> str:
    base = grid.base
    return f"{base.steps} steps of {base.batch_size} crops of {base.crop}x{base.crop} pixels from {base.data}"
