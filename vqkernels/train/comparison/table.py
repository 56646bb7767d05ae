"""A comparison as numbers: means and spreads over seeds, in Markdown and CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from vqkernels.train.comparison.compare import CellState, Grid
from vqkernels.train.measures.evaluate import MOST_IMAGES

COLUMNS: dict[str, str] = {
    "psnr": "PSNR of crops (dB)",
    "psnr_images": "PSNR of images (dB)",
    "ssim": "SSIM",
    "perplexity": "perplexity",
    "usage": "codes in use",
    "distortion_per_bit": "distortion per bit",
    "step_ratio": "step time x STE",
    "seconds_per_step": "seconds a step",
}
_FORMATS = {
    "psnr": "{:.2f}",
    "psnr_images": "{:.2f}",
    "ssim": "{:.3f}",
    "perplexity": "{:.0f}",
    "usage": "{:.0%}",
    "distortion_per_bit": "{:.3g}",
    "step_ratio": "{:.2f}",
    "seconds_per_step": "{:.3f}",
}


@dataclass(frozen=True)
class Spread:
    """A measurement over seeds.

    Attributes:
        mean: over the seeds that have one.
        deviation: sample standard deviation over them, 0 for one seed.
        count: of seeds that have one.
    """

    mean: float
    deviation: float
    count: int


@dataclass(frozen=True)
class Entry:
    """The cells that differ by their seed alone.

    Attributes:
        method: name of the contender.
        label: of the contender.
        variant: label of the point of an ablation, "" without one.
        value: its place on a numeric axis, None without one.
        num_codes: K.
        spreads: by the names of `COLUMNS` and of `Result.measurements`; a name is missing where nothing was measured.
        done: finished cells.
        of: all cells.
        errors: of those that failed, each once.
        settings: what the contender changes.
        versions: of the package that trained and measured the finished cells.
    """

    method: str
    label: str
    variant: str
    value: float | None
    num_codes: int
    spreads: Mapping[str, Spread]
    done: int
    of: int
    errors: Sequence[str]
    settings: str
    versions: frozenset[str]


def summarise(states: Sequence[CellState]) -> list[Entry]:
    """Put the cells that differ by their seed together.

    Args:
        states: of the cells of a grid.

    Returns:
        One entry for each method, point and codebook size, in the order of the cells.
    """
    groups: dict[tuple[str, str, int], list[CellState]] = {}
    for state in states:
        cell = state.cell
        groups.setdefault((cell.method, cell.variant.label, cell.config.num_codes), []).append(state)
    base = _step_times(groups)
    return [_entry(group, base.get((key[1], key[2]))) for key, group in groups.items()]


def markdown(grid: Grid, entries: Sequence[Entry]) -> str:
    """Write a table for people, best first within each codebook size.

    Args:
        grid: of the comparison.
        entries: from `summarise`.

    Returns:
        Markdown text.
    """
    swept = grid.ablation is not None
    headings = ["K", *([grid.sweep.axis] if swept else []), "method", *COLUMNS.values(), "seeds"]
    lines = [
        _row(headings),
        _row(["---:", *(["---"] if swept else []), "---", *["---:"] * (len(COLUMNS) + 1)]),
    ]
    order = {variant.label: number for number, variant in enumerate(grid.variants)}
    for entry in sorted(entries, key=lambda e: (e.num_codes, order[e.variant], -_psnr(e))):
        cells = [_words(name, entry.spreads.get(name)) for name in COLUMNS]
        point = [entry.variant] if swept else []
        lines.append(_row([str(entry.num_codes), *point, entry.label, *cells, f"{entry.done} of {entry.of}"]))
    return "\n".join([*_heading(grid), "", *lines, "", *_notes(grid, entries), ""])


def as_csv(entries: Sequence[Entry]) -> str:
    """Write a table for programs, in the order of the entries.

    Args:
        entries: from `summarise`.

    Returns:
        CSV text, with the mean and the standard deviation over seeds of each measurement.
    """
    names = list(dict.fromkeys([*COLUMNS, "bits_per_latent", "distortion"]))
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    heads = [head for name in names for head in (name, f"{name}_deviation")]
    table.writerow(["method", "label", "variant", "num_codes", "seeds", "of", *heads, "settings", "errors"])
    for entry in entries:
        row: list[object] = [entry.method, entry.label, entry.variant, entry.num_codes, entry.done, entry.of]
        for name in names:
            found = entry.spreads.get(name)
            row += ["", ""] if found is None else [f"{found.mean:.6g}", f"{found.deviation:.3g}"]
        table.writerow([*row, entry.settings, "; ".join(entry.errors)])
    return stream.getvalue()


def _entry(group: Sequence[CellState], base: float | None) -> Entry:
    cell = group[0].cell
    found = [state.result.measurements for state in group if state.result is not None]
    spreads: dict[str, Spread] = {}
    for name in dict.fromkeys(name for each in found for name in each):
        spread = _spread([value for each in found if (value := each.get(name)) is not None])
        if spread is not None:
            spreads[name] = spread
    times = [value for each in found if (value := each.get("seconds_per_step")) is not None]
    ratio = None if base is None else _spread([value / base for value in times])
    if ratio is not None:
        spreads["step_ratio"] = ratio
    errors = list(dict.fromkeys(state.error for state in group if state.error is not None))
    return Entry(
        method=cell.method,
        label=cell.label,
        variant=cell.variant.label,
        value=cell.variant.value,
        num_codes=cell.config.num_codes,
        spreads=spreads,
        done=len(found),
        of=len(group),
        errors=errors,
        settings=cell.settings,
        versions=frozenset(state.result.version for state in group if state.result is not None),
    )


def _step_times(groups: Mapping[tuple[str, str, int], Sequence[CellState]]) -> dict[tuple[str, int], float]:
    """Mean seconds of a step of STE, by point of the ablation and K."""
    found: dict[tuple[str, int], float] = {}
    for (method, variant, num_codes), group in groups.items():
        times = [
            seconds
            for state in group
            if state.result is not None
            and (seconds := state.result.measurements.get("seconds_per_step")) is not None
        ]
        if method == "ste" and times:
            found[variant, num_codes] = mean(times)
    return found


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))


def _psnr(entry: Entry) -> float:
    found = entry.spreads.get("psnr")
    return -math.inf if found is None else found.mean


def _words(name: str, found: Spread | None) -> str:
    if found is None:
        return "-"
    words = _FORMATS[name].format(found.mean)
    return words if found.count < 2 else f"{words} ± {_FORMATS[name].format(found.deviation)}"


def _heading(grid: Grid) -> list[str]:
    base = grid.base
    title = "Methods" if grid.ablation is None else grid.sweep.axis.capitalize()
    crops = f"{base.batch_size} crops of {base.crop}x{base.crop} pixels"
    augmented = ", mirrored, of other exposure and white balance" if base.augment else ""
    rise = f" after a rise over {base.rise:.0%} of the steps" if base.rise else ""
    return [
        f"# Comparison: {title}",
        "",
        f"All cells: {base.steps} steps of {crops} from {base.data}{augmented}; {base.optimizer}, learning rate "
        f"{base.lr:g}, {base.schedule}{rise}; codes of {base.latent_dim} features; warm-ups take {base.warmup:.0%} "
        f"of the steps; seeds {', '.join(map(str, grid.seeds))}.",
    ]


def _notes(grid: Grid, entries: Sequence[Entry]) -> list[str]:
    notes = [
        "PSNR of crops is of the mean squared error over 512 held-out crops together, PSNR of images the mean over "
        f"whole held-out images, evenly spaced ones of more than {MOST_IMAGES}, as are SSIM, perplexity, codes in use and the distortion of latents, in their squared "
        "units per bit of entropy. All measure codewords. ± is the standard deviation over seeds. "
        "Step times are medians of a run, of cells that shared a machine.",
        "",
        "Settings, beside those of all cells:" if grid.ablation is None else "Settings by point:",
        "",
    ]
    swept = {(e.label, e.variant): e.settings for e in entries}
    for (label, variant), settings in swept.items():
        notes.append(f"- {label}{f', {variant}' if variant else ''}: {settings}")
    versions = sorted(frozenset[str]().union(*(e.versions for e in entries)))
    if len(versions) > 1:
        fix = "cells of an older one are trained again once their folders are removed"
        notes += ["", f"Measured by vqkernels {', '.join(versions)}; {fix}."]
    failed = [e for e in entries if e.errors]
    if failed:
        notes += ["", "Failed, to be tried again by the same command:", ""]
        for entry in failed:
            point = f", {entry.variant}" if entry.variant else ""
            notes += [f"- {entry.label}{point}, K = {entry.num_codes}: {error}" for error in entry.errors]
    return notes


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
