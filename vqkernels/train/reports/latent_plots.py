"""Pictures of latents, codes and errors."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from vqkernels.train.measures.latents import Embedding
from vqkernels.train.reports.plots import COLUMN_INCHES, DPI, shorten

LATENT_COLOUR, CODE_COLOUR, DEAD_COLOUR = "#4c78a8", "#d1495b", "#222222"
# of a marker, in points squared: an unused code, and the code with the most latents
LEAST_AREA, MOST_AREA = 14.0, 150.0


def embedding_figure(embedding: Embedding) -> Figure:
    """Show latents and codes in the plane of `embed`, codes as large as they are used, dead ones as crosses.

    Args:
        embedding: of a model.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8.6, 7.0), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.scatter(*embedding.latents.T, s=10, color=LATENT_COLOUR, alpha=0.45, linewidth=0)
    keys = [_key(LATENT_COLOUR, "o", f"{len(embedding.latents)} latents")]
    if embedding.codes is not None and embedding.use is not None:
        used = embedding.use > 0
        size = LEAST_AREA + (MOST_AREA - LEAST_AREA) * embedding.use[used] / max(1, embedding.use.max())
        # few codes in use must not hide behind many dead ones
        axes.scatter(
            *embedding.codes[used].T,
            s=size,
            color=CODE_COLOUR,
            alpha=0.75,
            edgecolor="white",
            linewidth=0.6,
            zorder=3,
        )
        keys.append(_key(CODE_COLOUR, "o", f"{used.sum()} codes in use, area by use"))
        if not used.all():
            dead = embedding.codes[~used]
            axes.scatter(*dead.T, s=26, color=DEAD_COLOUR, marker="x", linewidth=1.1)
            keys.append(_key(DEAD_COLOUR, "x", f"{len(dead)} dead codes"))
    axes.set(xticks=[], yticks=[], xlabel="t-SNE axis 1", ylabel="t-SNE axis 2")
    axes.set_title("Latents of held-out crops and codes", fontsize=13)
    axes.spines[:].set_color("0.8")
    axes.set_aspect("equal", adjustable="datalim")
    figure.legend(handles=keys, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    return figure


def use_figure(counts: Sequence[NDArray[np.int64]], *, counted: str = "codes") -> Figure:
    """Show how often each code is used, in the order of use, for each index of a latent.

    Args:
        counts: (K,) uses for each index.
        counted: what they count.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8.6, 4.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    most = max(len(stage) for stage in counts)
    least = 1 / most
    for number, stage in enumerate(counts):
        share = np.sort(stage)[::-1] / max(1, stage.sum())
        used = share[share > 0]
        least = min([least, *used[-1:]])
        label = f"index {number + 1}: " if len(counts) > 1 else ""
        label += f"{len(used)} of {len(stage)} {counted} in use"
        colour = f"C{number % 10}" if len(counts) > 1 else LATENT_COLOUR
        edges = np.arange(len(used) + 1) + 0.5
        axes.stairs(used, edges, baseline=None, color=colour, linewidth=1.8, label=label)
        if len(counts) == 1:
            axes.stairs(used, edges, fill=True, color=colour, alpha=0.25)
            axes.axhline(1 / most, color="0.35", linestyle="--", linewidth=1.2, label="all used alike")
            if len(used) < most:
                # a step of white keeps the band off the last bar
                label = f"{most - len(used)} dead"
                axes.axvspan(len(used) + 0.5, most + 0.5, color="0.9", linewidth=0, label=label)
    axes.set(xlabel=f"{counted}, from the most to the least used", ylabel="share of latents", yscale="log")
    axes.set_xlim(0.5, most + 0.5)
    axes.set_ylim(bottom=least / 2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Use of the codebook on held-out crops", fontsize=13)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    columns = min(3, max(1, len(axes.get_legend_handles_labels()[0])))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    return figure


def error_figure(
    originals: Mapping[str, NDArray[np.uint8]], reconstructions: Sequence[NDArray[np.uint8]]
) -> Figure:
    """Show where reconstructions are wrong: the root of the mean squared error of each pixel over its channels.

    Args:
        originals: (H, W, 3) uint8 by name, one column each.
        reconstructions: of the same sizes.

    Returns:
        The figure, in one scale for all that ends at the 99th percentile.
    """
    maps = [
        np.sqrt(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2, axis=-1))
        for one, other in zip(originals.values(), reconstructions, strict=True)
    ]
    brightest = max(1.0, float(np.percentile(np.concatenate([one.ravel() for one in maps]), 99)))
    ratio = float(np.mean([one.shape[0] / one.shape[1] for one in maps]))
    size = (COLUMN_INCHES * len(maps) + 0.9, COLUMN_INCHES * ratio + 0.7)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(maps), squeeze=False)[0]
    drawn = None
    for axes, name, one in zip(grid, originals, maps, strict=True):
        drawn = axes.imshow(one, cmap="magma", vmin=0, vmax=brightest, interpolation="nearest")
        axes.set(xticks=[], yticks=[], xlabel=f"root mean square {np.sqrt(np.mean(one**2)):.1f}")
        axes.xaxis.label.set_fontsize(11)
        axes.set_title(shorten(name), fontsize=13, parse_math=False)
        axes.spines[:].set_visible(False)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(grid), extend="max", pad=0.015, fraction=0.05)
        bar.set_label("error, 8-bit levels", fontsize=11)
    return figure


def _key(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, markersize=7, linestyle="", label=label)
