"""What is kept of a measurement: one JSON object per line, and tables made of them."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from vqkernels.profiling import machine
from vqkernels.profiling.machine import Record, Shape
from vqkernels.profiling.timing import Floors

# case of lines that sum up a run
SUMMARY = "summary"
# names of fields that had others, by the old ones
RENAMED = {"tensor_floor_tflops": "floor_tflops", "hbm_tbs": "copy_tbs", "tensor_share": "peak_share"}
# what makes two measurements the same measurement
KEY = ("case", "shape", "dtype", "name")


def facts(device: torch.device) -> Record:
    """Where and with what a process measures, and of which commit."""
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return machine.facts(device) | {"commit": ran.stdout.strip() or None}


def tera(rate: float | None) -> float | None:
    """A rate in units of 10^12 per second."""
    return None if rate is None else round(rate / 1e12, 4)


def floor_fields(floors: Floors) -> Record:
    """What the device can do at most, as fields of a record."""
    fields: Record = {
        "launch_floor_ms": floors.launch_ms,
        "replay_floor_ms": floors.replay_ms,
        "floor_tflops": tera(floors.flops),
        "copy_tbs": tera(floors.bandwidth),
    }
    return fields | (
        {"peaks_tflops": {k: tera(rate) for k, rate in floors.kinds.items()}} if floors.kinds else {}
    )


def floors_line(floors: Floors, facts: Record) -> str:
    """What the device can do at most, for people."""
    words = f"{facts['device']}, torch {facts['torch']}, triton {facts['triton']}: "
    words += f"{tera(floors.flops):.3g} TFLOP/s, copies {1e-9 * (floors.bandwidth or 0):.3g} GB/s"
    if floors.kinds:
        words += (
            " (" + ", ".join(f"{kind} {rate / 1e9:.0f} GFLOP/s" for kind, rate in floors.kinds.items()) + ")"
        )
    if floors.launch_ms is not None and floors.replay_ms is not None:
        words += f", a launch {1e3 * floors.launch_ms:.1f} us, in a graph {1e3 * floors.replay_ms:.1f} us"
    return words


def measurement(
    case: str,
    shape: Shape,
    dtype: torch.dtype,
    name: str,
    times: Sequence[float],
    *,
    floors: Floors,
    over: float,
    extra: Record,
) -> Record:
    """Describe the timed rounds of one contender; `over` is the median it is compared with."""
    n, k, d = shape
    median = statistics.median(times)
    products, memory = machine.bounds_ms(case, shape, dtype.itemsize, floors)
    bound = None if products is None or memory is None else max(products, memory)
    return {
        "case": case,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "name": name,
        "ms_p50": round(median, 5),
        "ms_min": round(min(times), 5),
        "ms_max": round(max(times), 5),
        "rounds": len(times),
        "over_ours": round(median / over, 3),
        "tflops": round(2e-9 * n * k * d / median, 4),
        "peak_share": None if products is None else round(products / median, 4),
        "floor_share": None if bound is None else round(bound / median, 4),
        "floor_ms": None if bound is None else round(bound, 5),
        **extra,
    }


def line(record: Record) -> str:
    """One measurement for people."""
    words = [
        f"  {record['name']!s:36s} {record['ms_p50']:10.3f} ms  ({record['ms_min']:.3f} to {record['ms_max']:.3f})"
        f" {record['rounds']:3d} rounds {record['over_ours']:7.2f}x"
    ]
    if record.get("peak_share") is not None:
        rate = float(record["tflops"])
        shown = f"{rate:6.1f} TFLOP/s" if rate >= 10 else f"{1e3 * rate:6.0f} GFLOP/s"
        words.append(f"{shown} {record['peak_share']:6.1%}")
    if record.get("graph_ms") is not None:
        words.append(f"graph {record['graph_ms']:.4f} ms")
    if record.get("extra_mb") is not None:
        words.append(f"{record['extra_mb']:.1f} MB")
    if record.get("agreement") is not None:
        words.append(f"float64 agreement {record['agreement']:.6f}")
    return "  ".join(words)


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file, whose folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> tuple[list[Record], int]:
    """The records of a file, and how many of its lines are none."""
    found: list[Record] = []
    malformed = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            malformed += 1
            continue
        if _is_record(value):
            found.append({RENAMED.get(name, name): field for name, field in value.items()})
        else:
            malformed += 1
    return found, malformed


def _is_record(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("case"), str):
        return False
    if value["case"] == SUMMARY:
        return isinstance(value.get("name"), str) and isinstance(value.get("ratios"), dict)
    shape, name = value.get("shape"), value.get("name")
    shaped = isinstance(shape, list) and len(shape) == 3 and all(isinstance(size, int) for size in shape)
    if not shaped or not isinstance(name, str):
        return False
    times = [value.get(key) for key in ("ms_p50", "ms_min", "ms_max")]
    # a line without times is a count, not a measurement
    if times == [None] * 3:
        return True
    return all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 < t < 1e9 for t in times)


def key(record: Record) -> tuple:
    """What a measurement is of; lines older than the field dtype are of float32."""
    parts = {"dtype": "float32"} | record
    return tuple(tuple(part) if isinstance(part, list) else part for part in (parts[name] for name in KEY))


def timed(records: Iterable[Record]) -> dict[tuple, Record]:
    """Measurements by key; of several, the last."""
    return {key(record): record for record in records if record.get("ms_p50") is not None}


def table(records: Iterable[Record]) -> str:
    """Milliseconds of every contender, one row per shape; with the share of the largest rate of dot products."""
    records = list(records)
    by_case: dict[tuple, dict[tuple, dict[str, Record]]] = {}
    for (case, shape, dtype, name), record in timed(records).items():
        by_case.setdefault((case, dtype), {}).setdefault(shape, {})[name] = record
    lines: list[str] = []
    for (case, dtype), rows in by_case.items():
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        heads = [short(name) for name in names]
        cells = [[_cell(row.get(name)) for name in names] for row in rows.values()]
        widths = [max(len(s), *(len(row[i]) for row in cells)) for i, s in enumerate(heads)]
        lines.append(f"{case} {dtype}, ms (share of the dot-product peak)")
        lines.append(f"{'N,K,D':20s}" + " ".join(f"{s:>{w}}" for s, w in zip(heads, widths, strict=True)))
        for shape, row in zip(rows, cells, strict=True):
            told = " ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True))
            lines.append(f"{','.join(map(str, shape)):20s}{told}")
    for record in records:
        if record["case"] == "agreement":
            of = f"{record.get('rows_wrong')} of {record['shape'][0]} rows"
            lines.append(f"{record['name']} {record.get('dtype')}: {of} differ from float64")
    return "\n".join(lines)


_WORDS = {
    "vqkernels ": "",
    "torch.cdist + argmin": "cdist",
    "chunked addmm + argmin, bfloat16": "addmm-bf16",
    "chunked addmm + argmin": "addmm",
    "compiled addmm + argmin": "compiled",
    "faiss-cpu IndexFlatL2": "faiss",
    "scikit-learn": "sklearn",
    "flash-kmeans, norms given": "flash-",
    "flash-kmeans": "flash",
    "vector-quantize-pytorch (EMA)": "vqp",
    "vector-quantize-pytorch (directional)": "vqp-dir",
    "plain PyTorch DiVeQ": "plain",
    "compiled PyTorch DiVeQ": "compiled",
    "diveq DIVEQ": "diveq 0.1",
    "diveq SFDIVEQ": "diveq 0.1 SF",
}


def short(name: str) -> str:
    """A contender's name for the head of a column."""
    for long, words in _WORDS.items():
        name = name.replace(long, words)
    return name


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    shown = f"{record['ms_p50']:.3g}"
    return shown if record.get("peak_share") is None else f"{shown} {record['peak_share']:.0%}"
