"""Write the tables of a run into Markdown files, between marks.

    python bench/readme.py [README.md docs/speed.md docs/memory.md] [--results bench/results/cpu.jsonl]

A file holds the lines `<!-- bench: begin -->` and `<!-- bench: end -->`, between which the table of searches is put, or
`<!-- all benches: begin -->` and `<!-- all benches: end -->` for all there is to say, pictures included; `memory` is the
table of what layers take.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import records
from records import Record
from summary import geometric_mean, ratios

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs"
OURS, OURS_ON_AVX2, FAISS = "vqkernels native", "vqkernels native avx2", "faiss-cpu IndexFlatL2"
LAYER, CURVE = "vqkernels diveq", "vqkernels sf_diveq"

# calls whose median is worth the name, the sign of fewer, and what is said of it under a table
FEWEST, FEW = 3, " †"
NOTE = "† one or two calls; where one takes very long, that which was checked, before the others were timed."
CHECKS = (
    "Before they are timed, all rows of the searches are compared with float64, which ours must equal. Of our layers "
    "z and both gradients are held to float64 within bounds of rounding (2048 rows at either end of a batch; of the "
    "whole batch the sum of both gradients); of peers' layers some rows must move as far as the nearest of their "
    "codes is (SF: move, and no farther than a code), with gradients that are finite."
)
EMA = (
    "The EMA peer updates its codebook inside the timed forward and computes no gradient of it; ours computes that "
    "gradient."
)
# heads of columns, in their order; the version is that of the distribution
SEARCHES = {
    FAISS: "faiss-cpu {faiss-cpu}",
    "scikit-learn": "scikit-learn {scikit-learn}",
    "torch.cdist + argmin": "`cdist` + `argmin`",
    "chunked addmm + argmin": "chunked `addmm`",
    "chunked addmm + argmin, bfloat16": "`addmm` in bfloat16",
    "pykeops": "pykeops {pykeops}",
}
LAYERS = {
    "diveq DIVEQ": ("diveq {diveq}", LAYER),
    "diveq SFDIVEQ": ("diveq {diveq}, SF", CURVE),
    "vector-quantize-pytorch (EMA)": ("vector-quantize-pytorch {vector-quantize-pytorch}, EMA", LAYER),
    "vector-quantize-pytorch (directional)": ("its directional", LAYER),
}
FIGURES = {
    "bench-cpu.png": "Time, share of the peak and memory beside the peers",
    "curves-cpu.png": "Time and memory against N, K and D",
}


def short(found: Iterable[Record], dtype: str = "float32", *, root: Path = PICTURES) -> str:
    """The table of searches of a run, and what it was measured on."""
    measured = [each for each in records.timed(found).values() if each["dtype"] == dtype]
    search = [each for each in measured if each["case"] == "search"]
    return f"{textwrap.fill(_measured_on(measured), 120)}\n\n{_searches(search, dtype)}" if search else ""


def markdown(found: Iterable[Record], dtype: str = "float32", *, root: Path = PICTURES) -> str:
    """The tables of a run: searches, layers, and what they were measured on; pictures of the folder `root`."""
    measured = [each for each in records.timed(found).values() if each["dtype"] == dtype]
    search = [each for each in measured if each["case"] == "search"]
    layer = [each for each in measured if each["case"] == "layer"]
    parts = [_preface(measured)] if measured else []
    parts += [_searches(search, dtype)] if search else []
    parts += [_forced(search, dtype)] if any(each["name"] == OURS_ON_AVX2 for each in search) else []
    parts += [_layers(layer, dtype)] if layer else []
    if parts:
        parts += [f"![{words}]({path})" for path, words in FIGURES.items() if (root / path).exists()]
    return "\n\n".join(parts)


def memory(found: Iterable[Record], dtype: str = "float32", *, root: Path = PICTURES) -> str:
    """The table of what forward and backward of layers take beyond inputs, outputs and gradients."""
    measured = [each for each in records.timed(found).values() if each["dtype"] == dtype]
    layer = [each for each in measured if each["case"] == "layer"]
    versions = _versions(layer) if layer else _Versions()
    heads = {LAYER: "`diveq`", CURVE: "`sf_diveq`"}
    heads |= {name: head.format_map(versions) for name, (head, _) in LAYERS.items()}
    names = [name for name in heads if any(each["name"] == name for each in layer)]
    by_key = {(tuple(each["shape"]), each["name"]): each for each in layer}
    rows = [["forward + backward (N, K, D)", *(heads[name] for name in names)]]
    for shape in dict.fromkeys(tuple(each["shape"]) for each in layer):
        cells = [by_key.get((shape, name)) for name in names]
        rows.append([_shape(shape), *("-" if one is None else _memory(one) for one in cells)])
    return _table(rows)


def peak(measured: Iterable[Record]) -> float | None:
    """The most that a run saw of what its dot products can reach, TFLOP/s: later measurements know better."""
    return max((float(r["floor_tflops"]) for r in measured if r.get("floor_tflops")), default=None)


def _measured_on(measured: Sequence[Record]) -> str:
    last = measured[-1]
    where = f"{last.get('threads')} cores ({last.get('cpu') or last['machine']}, {last['isa']})"
    return (
        f"Medians of interleaved calls in one process, {last['dtype']} inputs, {where}, packing included; times "
        "relative to ours (N rows, K codes, D features)."
    )


def _preface(measured: Sequence[Record]) -> str:
    peaks = measured[-1].get("peaks_tflops")
    peaks = peaks if isinstance(peaks, dict) else {}
    told = ", ".join(
        f"{1e3 * peaks[kind]:.0f} in {kind}" for kind in ("float32", "int16", "bfloat16") if kind in peaks
    )
    words = f"{_measured_on(measured)} {CHECKS}"
    if told:
        words += f" GFLOP/s that dot products in registers reach here: {told}; the share is of the largest."
    return textwrap.fill(words, 120)


def _searches(search: Sequence[Record], dtype: str) -> str:
    versions = _versions(search)
    names = [name for name in SEARCHES if any(each["name"] == name for each in search)]
    shapes = list(dict.fromkeys(tuple(each["shape"]) for each in search))
    by_key = {(tuple(each["shape"]), each["name"]): each for each in search}
    over = {name: ratios(search, "search", dtype, OURS, name) for name in names}
    largest = peak(search)
    rows = [
        ["search (N, K, D)", "ours, exact", "of the peak", *(SEARCHES[n].format_map(versions) for n in names)]
    ]
    for shape in shapes:
        mine = by_key.get((shape, OURS))
        time, share = ("-", "-") if mine is None else (_ms(mine) + _few(mine), _percent(mine, largest))
        cells = [_ratio(over[name].get(shape)) + _few(by_key.get((shape, name))) for name in names]
        rows.append([_shape(shape), time, share, *cells])
    rows.append(["geometric mean", "1x", "", *(_mean(over[name].values(), len(shapes)) for name in names)])
    for words, tell in (("most memory", _most_memory), ("equal to float64", _least_agreement)):
        cells = [tell([each for each in search if each["name"] == name]) for name in (OURS, *names)]
        rows.append([words, cells[0], "", *cells[1:]])
    return _noted(rows)


def _forced(search: Sequence[Record], dtype: str) -> str:
    over = ratios(search, "search", dtype, OURS_ON_AVX2, FAISS)
    if not over:
        return ""
    mean = geometric_mean(over.values())
    return f"Forced to AVX2: {_ratio(mean, 2)} faiss-cpu in the geometric mean, at least {_ratio(min(over.values()), 2)}."


def _layers(layer: Sequence[Record], dtype: str) -> str:
    versions = _versions(layer)
    names = [name for name in LAYERS if any(each["name"] == name for each in layer)]
    shapes = list(dict.fromkeys(tuple(each["shape"]) for each in layer))
    by_key = {(tuple(each["shape"]), each["name"]): each for each in layer}
    heads = [LAYERS[name][0].format_map(versions) for name in names]
    rows = [["layer, forward + backward", "`diveq`", "`sf_diveq`", *heads]]
    for shape in shapes:
        cells = []
        for name in (LAYER, CURVE):
            mine = by_key.get((shape, name))
            cells.append("-" if mine is None else f"{_ms(mine)}{_few(mine)}, {_memory(mine)}")
        for name in names:
            theirs = by_key.get((shape, name))
            ratio = ratios(layer, "layer", dtype, LAYERS[name][1], name).get(shape)
            known = theirs is not None and ratio is not None
            cells.append(f"{_ratio(ratio)}{_few(theirs)}, {_memory(theirs)}" if known else "-")
        rows.append([_shape(shape), *cells])
    ema = any("EMA" in name for name in names)
    return _noted(rows, *([textwrap.fill(EMA, 120)] if ema else []))


def _few(record: Record | None) -> str:
    """The sign of a median of few calls; records that do not tell are not marked."""
    return FEW if record is not None and int(record.get("rounds", FEWEST)) < FEWEST else ""


def _noted(rows: Sequence[Sequence[str]], *notes: str) -> str:
    """A table, and under it what is to be said of it."""
    few = any(FEW in cell for row in rows for cell in row)
    return "\n\n".join([_table(rows), *([NOTE] if few else []), *notes])


class _Versions(dict):
    def __missing__(self, name: str) -> str:
        return ""


def _versions(measured: Sequence[Record]) -> _Versions:
    peers = measured[-1].get("peers")
    return _Versions(peers if isinstance(peers, dict) else {})


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _shape(shape: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _ms(record: Record) -> str:
    return f"{record['ms_p50']:.3g} ms" if float(record["ms_p50"]) < 1e3 else f"{record['ms_p50']:.0f} ms"


def _ratio(ratio: float | None, decimals: int = 1) -> str:
    if ratio is None:
        return "-"
    shown = f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.{decimals}f}x" if ratio < 9.95 else f"{ratio:.0f}x"
    # where somebody else is faster, nobody shall have to look for it
    return f"**{shown}**" if ratio < 1 else shown


def _mean(found: Iterable[float], whole: int) -> str:
    """The geometric mean, and of how many shapes where that is not all."""
    found = list(found)
    if not found:
        return "-"
    return _ratio(geometric_mean(found), 2) + ("" if len(found) == whole else f" (of {len(found)})")


def _percent(record: Record, largest: float | None) -> str:
    return "-" if largest is None else f"{100 * float(record['tflops']) / largest:.0f} %"


def _memory(record: Record) -> str:
    megabytes = record.get("extra_mb")
    if not isinstance(megabytes, (int, float)):
        return "-"
    if megabytes < 1:
        return "< 1 MB"
    return f"{megabytes:.0f} MB" if megabytes < 999.5 else f"{megabytes / 1e3:.2g} GB"


def _most_memory(of_one: Sequence[Record]) -> str:
    known = [each for each in of_one if each.get("extra_mb") is not None]
    return _memory(max(known, key=lambda each: float(each["extra_mb"]))) if known else "-"


def _least_agreement(of_one: Sequence[Record]) -> str:
    known = [float(each["agreement"]) for each in of_one if each.get("agreement") is not None]
    if not known:
        return "-"
    # never rounded up to all rows
    return "100 %" if min(known) == 1 else f"{min(_floored(min(known)), 99.999):.5g} %"


def _floored(share: float) -> float:
    """Percent with three decimals, rounded down."""
    return int(share * 1e5) / 1e3


# what stands between which marks
BLOCKS: dict[str, Callable[..., str]] = {"bench": short, "all benches": markdown, "memory": memory}


def marks(name: str) -> tuple[str, str]:
    """The lines between which a block stands."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write(path: Path, text: str, begin: str, end: str) -> None:
    """Replace what is between the marks of a file; ValueError where they are not there."""
    whole = path.read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(
            f"readme: {path.name} must hold the lines {begin} and {end} once each; got another number. Add them "
            "where the tables belong."
        )
    before, after = whole[: whole.index(begin)], whole[whole.index(end) :]
    path.write_text(f"{before}{begin}\n{text}\n{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, write, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="print the tables if none is named")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/cpu.jsonl")
    options = parser.parse_args(arguments)
    found = records.read(options.results)[0]
    text = markdown(found)
    if not text:
        print(
            f"readme: {options.results} must hold measurements; got none. Run bench/run.py.", file=sys.stderr
        )
        return 2
    if not options.files:
        print(text)
        return 0
    try:
        for path in options.files:
            _fill(path, found)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _fill(path: Path, found: Sequence[Record]) -> None:
    """Write the blocks that a file holds; one that holds none is refused as one without the first."""
    whole = path.read_text(encoding="utf-8")
    held = [name for name in BLOCKS if marks(name)[0] in whole] or ["bench"]
    for name in held:
        # pictures are those beside the file that shows them
        write(path, BLOCKS[name](found, root=path.resolve().parent), *marks(name))


if __name__ == "__main__":
    sys.exit(main())
