"""A benchmark in words: one table for each shape, and who is missing."""

from __future__ import annotations

from collections.abc import Sequence

from vqkernels.profiling.machine import Shape
from vqkernels.profiling.measuring import Benchmark, Measurement
from vqkernels.profiling.step_profile import columns

_HEADS = ("", "ms", "(least to most)", "to ours", "GFLOP/s", "of peak", "GB/s", "MB extra", "float64")


def machine_line(made: Benchmark) -> str:
    """What the machine is and reached, in one line."""
    facts, floors = made.facts, made.floors
    where = facts["device"] if made.device.type == "cuda" else facts["cpu"] or facts["machine"]
    words = [str(where), f"torch {facts['torch']}"]
    if made.device.type == "cpu":
        words.insert(1, f"{facts['threads']} threads")
    if floors.flops is not None:
        kinds = [f"{kind} {rate / 1e9:.0f}" for kind, rate in floors.kinds.items()]
        words.append("measured peaks: " + (", ".join(kinds) or f"{floors.flops / 1e9:.0f}") + " GFLOP/s")
    if floors.bandwidth is not None:
        words.append(f"copies {floors.bandwidth / 1e9:.1f} GB/s")
    return ", ".join(words)


def format_table(made: Benchmark) -> str:
    """Every measurement, fastest first, and every contender that has none with its reason."""
    lines = [machine_line(made)]
    for case, shape in dict.fromkeys((each.case, each.shape) for each in made.measurements):
        rows = rows_of(made, case, shape)
        n, k, d = shape
        what = "nearest code" if case == "search" else "layer, forward + backward"
        lines += ["", f"{what}: N={n} K={k} D={d} {rows[0].dtype}"]
        base = base_ms(rows)
        lines += columns(
            [_HEADS, *(_cells(row, base) for row in sorted(rows, key=lambda row: row.ms))], left=1
        )
    if made.skipped:
        lines += ["", "left out:"]
    for each in made.skipped:
        at = "" if each.shape is None else f" at {'x'.join(map(str, each.shape))}"
        case = "" if each.case == "both" else f" ({each.case}{at})"
        lines.append(f"  {each.name}{case}: {each.reason}")
    return "\n".join(lines)


def base_ms(rows: Sequence[Measurement]) -> float:
    """What ratios are taken of: the first of ours that was measured, the reference last of all; else the first."""
    ours = sorted((row for row in rows if row.ours), key=lambda row: "reference" in row.name)
    return (ours or rows)[0].ms


def rows_of(made: Benchmark, case: str, shape: Shape) -> list[Measurement]:
    """The measurements of one shape, in their order."""
    return [each for each in made.measurements if (each.case, each.shape) == (case, shape)]


def _cells(row: Measurement, base: float) -> tuple[str, ...]:
    checked = "within bounds" if row.ours else "plausible"
    return (
        row.name,
        number(row.ms),
        f"({number(row.ms_min)} to {number(row.ms_max)})",
        f"{row.ms / base:.2f}x",
        f"{row.flops / 1e9:.3g}",
        "-" if row.peak_share is None else f"{100 * row.peak_share:.2g}%",
        f"{row.bandwidth / 1e9:.2f}",
        "-" if row.extra_bytes is None else f"{row.extra_bytes / 1e6:.1f}",
        checked if row.agreement is None else _share(row.agreement, row.agreement_rows or 0),
    )


def number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _share(agreement: float, rows: int) -> str:
    wrong = round((1 - agreement) * rows)
    return "all rows" if not wrong else f"{wrong} of {rows} differ"
