"""Tabulate and draw what other libraries' models do before and after `convert`.

    python bench/adoption_report.py [docs/adoption.md] [--results bench/results/adoption.jsonl] [--figure docs/adoption.png]
        [--readme README.md]

The page and the README hold the lines `<!-- adoption: begin -->` and `<!-- adoption: end -->`; what is between them is
replaced: by the table in the page, by a sentence about the largest codebooks in the README.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import readme
import records
from records import Record

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- adoption: begin -->", "<!-- adoption: end -->"
SIDES = ("before", "after")
COLORS = {"before": "C1", "after": "black"}
# steps at the end whose mean loss is told
LAST = 20
# a bar that would not be seen is drawn so high, MB; times the peak of a process is told in pages
LEAST_MB = 0.01


def pairs(found: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Lines of a model before and after, in the order of the file."""
    by_key = {(each["name"], each["side"]): each for each in found if each.get("case") == "adoption"}
    names = dict.fromkeys(name for name, _ in by_key)
    return [(by_key[name, "before"], by_key[name, "after"]) for name in names if (name, "after") in by_key]


def markdown(found: Sequence[Record]) -> str:
    """What was measured, on what, and a table with a row for each model."""
    both = pairs(found)
    if not both:
        return ""
    last = both[-1][0]
    words = (
        f"{last['steps']} steps on crops of the photographs of scikit-image, the same weights, batches and seeds on "
        f"both sides, whose steps alternate; {last['threads']} threads, {last['cpu'] or last['machine']}, {last['isa']}, torch "
        f"{last['torch']}. Loss: mean of the last {LAST} steps. PSNR: middles of held-out photographs. The quantizer's "
        "forward and backward alone, with the library's trained weights and latents on both sides, and its peak memory above "
        "inputs and outputs."
    )
    rows = [
        "| model (rows, K, D) | first loss differs by | loss | PSNR | step | quantizer | its memory |",
        "|" + "---|" * 7,
        *(_row(*pair) for pair in both),
    ]
    return "\n\n".join([textwrap.fill(words, 120), "\n".join(rows)])


def sentence(found: Sequence[Record]) -> str:
    """What the models with the most codes gain."""
    both = pairs(found)
    most = max((before["shape"][1] for before, _ in both), default=0)
    gains = []
    for before, after in both:
        if before["shape"][1] == most:
            gain = f"{before['library']}'s {_times(before, after, 'quantizer_ms')} time"
            # where a system does not tell a process its peak, nobody knows
            if before["quantizer_mb"] is not None and after["quantizer_mb"] is not None:
                gain += f" and {_times(before, after, 'quantizer_mb', LEAST_MB)} memory"
            gains.append(gain)
    gained = ", ".join(gains)
    words = f"With K = {most}, a step of the quantizer alone then takes: {gained} ([before and after](docs/adoption.md))."
    return textwrap.fill(words, 120)


def _row(before: Record, after: Record) -> str:
    shape = ", ".join(map(str, before["shape"]))
    first = abs(after["losses"][0] / before["losses"][0] - 1)
    loss = [statistics.fmean(each["losses"][-LAST:]) for each in (before, after)]
    cells = [
        f"{before['library']} {before['version']} `{before['quantizer']}` ({shape})",
        f"{first:.1e}" if first else "0",
        f"{loss[0]:.4f} → {loss[1]:.4f}",
        f"{before['psnr']:.2f} → {after['psnr']:.2f} dB",
        f"{before['step_ms']:.0f} → {after['step_ms']:.0f} ms",
        f"{_plain(before['quantizer_ms'])} → {_plain(after['quantizer_ms'])} ms, {_times(before, after, 'quantizer_ms')}",
    ]
    if before["quantizer_mb"] is None or after["quantizer_mb"] is None:
        cells.append("-")
    else:
        megabytes = f"{_plain(before['quantizer_mb'])} → {after['quantizer_mb']:.2g} MB"
        cells.append(f"{megabytes}, {_times(before, after, 'quantizer_mb', LEAST_MB)}")
    return "| " + " | ".join(cells) + " |"


def _plain(value: float) -> str:
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _times(before: Record, after: Record, field: str, least: float = 0.0) -> str:
    ratio = max(before[field], least) / max(after[field], least)
    shown = f"{ratio:.2g}x" if ratio < 100 else f"{ratio:.0f}x"
    return f"{shown} less" if ratio >= 1 else f"{1 / ratio:.2g}x more"


def draw(path: Path, found: Sequence[Record]) -> None:
    """Curves of the losses on top of each other, and under them bars of time and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    both = pairs(found)
    figure, axes = pyplot.subplots(
        2, len(both), figsize=(3.9 * len(both), 7.2), squeeze=False, constrained_layout=True
    )
    for column, pair in enumerate(both):
        n, k, d = pair[0]["shape"]
        axis = axes[0][column]
        for line in pair:
            wide = {"linewidth": 3.5, "alpha": 0.6} if line["side"] == "before" else {"linewidth": 1.1}
            label = f"{line['side']}, {line['psnr']:.2f} dB held out"
            axis.plot(line["losses"], color=COLORS[line["side"]], label=label, **wide)
        words = f"{pair[0]['library']} {pair[0]['quantizer']}\nK = {k}, D = {d}, {n} rows"
        axis.set_title(words, fontsize=9)
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.legend(fontsize=8)
        _bars(axes[1][column], pair)
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel("milliseconds, megabytes")
    last = both[-1][0]
    figure.suptitle(
        f"Before and after convert: {last['cpu'] or last['machine']}, {last['threads']} threads, {last['isa']}, "
        "float32, medians of alternating steps",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis, pair: tuple[Record, Record]) -> None:
    """Before beside after, for the step, its quantizer and the quantizer's memory."""
    fields = {"step_ms": "step,\nms", "quantizer_ms": "quantizer,\nms", "quantizer_mb": "quantizer,\nMB"}
    for side, line in enumerate(pair):
        for place, field in enumerate(fields):
            if line[field] is None:
                continue
            value = max(line[field], LEAST_MB)
            where = place + 0.4 * side
            axis.bar(where, value, 0.38, color=COLORS[line["side"]], label=None if place else line["side"])
            axis.annotate(_plain(line[field]), (where, value), ha="center", va="bottom", fontsize=8)
    axis.set_yscale("log")
    axis.margins(y=0.12)
    axis.set_xticks([place + 0.2 for place in range(len(fields))], list(fields.values()), fontsize=9)
    axis.legend(fontsize=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, write and draw; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("page", nargs="?", type=Path, help="print the table if it is left out")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/adoption.jsonl")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args(arguments)
    found = records.read(options.results)[0]
    text = markdown(found)
    if not text:
        print(f"adoption_report: {options.results} must hold measurements; got none. Run bench/adoption.py.")
        return 2
    if options.figure is not None:
        draw(options.figure, found)
    if options.readme is not None:
        readme.write(options.readme, sentence(found), BEGIN, END)
    if options.page is None:
        print(text)
    else:
        readme.write(options.page, text, BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
