"""Write the table of quantizers into Markdown files: what each short name is for, what it costs, how the papers' rows fare.

    python bench/family.py docs/quantizers.md docs/papers.md

Names, words and sources come from `vqkernels.nn.METHODS`; costs from bench/results/quantizers.jsonl, trainings from
bench/results/papers.jsonl. A file holds one or more of the pairs of marks in `BLOCKS`; what is between is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import papers
import quantizers
import readme
import records
from records import Record

from vqkernels.nn import METHODS


def table(costs: Sequence[Record], trained: Sequence[Record]) -> str:
    """Every short name: when to use it, its source, what is advised beside it, what a step costs, and memory."""
    by_name = {each["name"]: each for each in costs}
    lines = [
        "| name | when to use it | source | noise | advised | x `diveq` | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        one = by_name.get(name)
        megabytes = "-" if one is None or one["extra_mb"] is None else f"{one['extra_mb']:.0f} MB"
        advised = "warm-up" if method.warm_up else "replacement" if method.replace else ""
        noise = "`noise_std`" if method.noisy else ""
        cells = [f"`{name}`", method.summary, method.source, noise, advised, _times(one), megabytes]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def trainings(costs: Sequence[Record], trained: Sequence[Record]) -> str:
    """The papers' tables with our numbers."""
    return papers.markdown(trained)


def _times(one: Record | None) -> str:
    return (
        "-"
        if one is None
        else f"{one['over_diveq']:.2f}"
        if one["over_diveq"] < 9.95
        else f"{one['over_diveq']:.0f}"
    )


Block = Callable[[Sequence[Record], Sequence[Record]], str]
BLOCKS: dict[str, Block] = {"all quantizers": table, "papers": trainings}


def texts() -> dict[str, str]:
    """What each block says now."""
    costs, trained = (records.read(path)[0] if path.exists() else [] for path in (quantizers.OUT, papers.OUT))
    return {name: block(costs, trained) for name, block in BLOCKS.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    found = texts()
    for path in options.files:
        whole = path.read_text(encoding="utf-8")
        held = [name for name in BLOCKS if readme.marks(name)[0] in whole]
        if not held:
            print(
                f"family: {path} must hold a block; got none. Add {readme.marks('all quantizers')[0]}.",
                file=sys.stderr,
            )
            return 2
        for name in held:
            readme.write(path, found[name], *readme.marks(name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
