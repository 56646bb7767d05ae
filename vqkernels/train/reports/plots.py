"""Figures of a run, reconstructions and training curves, and how a figure becomes a PNG file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from vqkernels.train.checkpoints.files import replace_file
from vqkernels.train.log import Line

DPI = 120
COLUMN_INCHES = 4.4
# in characters; more would run into the next column
LONGEST_NAME = 36

NOTE = (
    "A run that warms up has no codes in use at first. Training counts over the steps since the last line; "
    "SF-DiVeQ counts segments there, codes on held-out images."
)


@dataclass(frozen=True)
class Row:
    """One model in a picture of reconstructions.

    Attributes:
        label: shown at the left.
        images: (H, W, 3) uint8, one for each original.
        captions: shown below each image.
    """

    label: str
    images: Sequence[NDArray[np.uint8]]
    captions: Sequence[str]


def shorten(name: str) -> str:
    """Return the end of a name that is too long for a column of a picture.

    Args:
        name: of an image.
    """
    return name if len(name) <= LONGEST_NAME else "\N{HORIZONTAL ELLIPSIS}" + name[1 - LONGEST_NAME :]


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG.

    Args:
        figure: of matplotlib.
    """
    stream = BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def draw_reconstructions(path: Path, originals: Mapping[str, NDArray[np.uint8]], rows: Sequence[Row]) -> None:
    """Draw originals over their reconstructions, one row per model.

    Args:
        path: of the PNG to write, as a whole.
        originals: (H, W, 3) uint8 by name, one column each.
        rows: the models, from top to bottom.

    Raises:
        RunError: the folder cannot be written.
    """
    replace_file(path, png(reconstruction_figure(originals, rows)))


def reconstruction_figure(originals: Mapping[str, NDArray[np.uint8]], rows: Sequence[Row]) -> Figure:
    """Show originals over their reconstructions, one row per model.

    Args:
        originals: (H, W, 3) uint8 by name, one column each.
        rows: the models, from top to bottom.

    Returns:
        The figure.
    """
    ratio = float(np.mean([image.shape[0] / image.shape[1] for image in originals.values()]))
    size = (COLUMN_INCHES * len(originals) + 0.5, (COLUMN_INCHES * ratio + 0.35) * (len(rows) + 1) + 0.3)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows) + 1, len(originals), squeeze=False)
    everything = [Row("original", list(originals.values()), [""] * len(originals)), *rows]
    for axes_row, row in zip(grid, everything, strict=True):
        for axes, image, caption in zip(axes_row, row.images, row.captions, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[], xlabel=caption)
            axes.xaxis.label.set_fontsize(11)
            axes.spines[:].set_visible(False)
        axes_row[0].set_ylabel(row.label, fontsize=13)
    for axes, name in zip(grid[0], originals, strict=True):
        axes.set_title(f"{shorten(name)} (held out)", fontsize=13, parse_math=False)
    return figure


def draw_training(path: Path, runs: Mapping[str, Sequence[Line]]) -> None:
    """Draw loss, PSNR, perplexity and codebook usage against the step, one colour per run.

    Args:
        path: of the PNG to write, as a whole.
        runs: lines of metrics.jsonl by label.

    Raises:
        RunError: the folder cannot be written.
    """
    replace_file(path, png(training_figure(runs)))


def training_figure(runs: Mapping[str, Sequence[Line]]) -> Figure:
    """Show loss, PSNR, perplexity and codebook usage against the step, one colour per run.

    Args:
        runs: lines of metrics.jsonl by label.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(11, 7.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    loss, psnr, perplexity, usage = panels.flat
    for number, lines in enumerate(runs.values()):
        colour = f"C{number}"
        _curve(loss, lines, "train", "loss", colour)
        for axes, key in ((psnr, "psnr"), (perplexity, "perplexity"), (usage, "usage")):
            _curve(axes, lines, "train", key, colour)
            _curve(axes, lines, "held_out", key, colour)
    positive = all(y > 0 for lines in runs.values() for y in _values(lines, "loss"))
    # what a discriminator adds may be below 0
    loss.set(title="Training loss", ylabel="what was minimised", yscale="log" if positive else "linear")
    psnr.set(title="Reconstruction", ylabel="PSNR (dB)")
    perplexity.set(title="Perplexity of the code indices", ylabel="codes in effective use")
    usage.set(title="Codebook usage", ylabel="codes used at least once", ylim=(0, 1.04))
    usage.yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in panels[1]:
        axes.set_xlabel("optimizer step")
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
    perplexity.set_ylim(bottom=0)
    keys = [Line2D([], [], color=f"C{number}", label=label) for number, label in enumerate(runs)]
    keys.append(Line2D([], [], color="0.3", alpha=0.5, linewidth=1, label="training crops"))
    keys.append(Line2D([], [], color="0.3", marker="o", markersize=4, label="whole held-out images"))
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False, fontsize=11)
    figure.supxlabel(NOTE, fontsize=9, color="0.3")
    return figure


def _values(lines: Sequence[Line], key: str) -> list[float]:
    return [float(v) for line in lines if line["split"] == "train" and (v := line.get(key)) is not None]


def _curve(axes: Axes, lines: Sequence[Line], split: str, key: str, colour: str) -> None:
    points = [
        (float(line["step"] or 0), float(value))
        for line in lines
        if line["split"] == split and (value := line.get(key)) is not None
    ]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if split == "train":
        axes.plot(steps, values, color=colour, alpha=1.0 if key == "loss" else 0.5, linewidth=1)
    else:
        axes.plot(steps, values, color=colour, marker="o", markersize=4)
