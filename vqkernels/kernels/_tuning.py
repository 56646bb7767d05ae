"""Opt-in tuning of the search: forms measured on this GPU and kept in a file that the user names.

`VQKERNELS_FORMS=<file>` reads the file and, for sizes it does not know, measures the alternatives of the table once
and adds the fastest. Without it nothing is measured or read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from vqkernels.kernels._forms import Form, bucket

FORMS = "VQKERNELS_FORMS"
# a search is the same for all larger batches
_ROWS = (4096, 32768)
_ROUNDS = 7


def key_of(
    device: str, arch: int, features: int, num_points: int, scaled: bool, rows: int, exact: bool
) -> str:
    """What a measured form holds for: this GPU, this compiler, and the sizes in steps."""
    steps = *bucket(arch, features, num_points), next((step for step in _ROWS if rows <= step), 1 << 20)
    kind = f"{'scaled' if scaled else 'halves'}, {'exact' if exact else 'fast'}"
    return f"{device}, triton {triton.__version__}, {kind}, {'x'.join(map(str, steps))}"


def tuned_form(
    path: Path, key: str, default: Form, candidates: list[Form], measure: Callable[[Form], float]
) -> Form:
    """The form that the file gives for `key`; measured and written there if it gives none.

    Args:
        path: a JSON file, which need not exist.
        key: from `key_of`.
        default: the form of the table; it wins ties.
        candidates: other forms.
        measure: milliseconds of a form, inf where it does not run.

    Raises:
        ValueError: the file is not one of forms.
    """
    known = _read(path)
    if key not in known:
        times = {form: measure(form) for form in dict.fromkeys((default, *candidates))}
        best = min(times, key=times.__getitem__)
        found: dict[str, Any] = dataclasses.asdict(best)
        # another process may have added its own in the meantime
        found |= {"ms": times[best], "default_ms": times[default]}
        known = _read(path) | {key: found}
        _write(path, known)
    fields = [field.name for field in dataclasses.fields(Form)]
    try:
        return Form(**{name: known[key][name] for name in fields})
    except (KeyError, TypeError):
        raise ValueError(_foreign(path)) from None


def _foreign(path: Path) -> str:
    return f"{FORMS}: {path} must hold forms of the search; got something else. Name a new file or remove it."


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text())
    except ValueError:
        raise ValueError(_foreign(path)) from None
    if not isinstance(known, dict):
        raise ValueError(_foreign(path))
    return known


def _write(path: Path, known: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(known, file, indent=1, sort_keys=True)
    os.replace(file.name, path)


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of `run` on the current CUDA device, inf where the device cannot run it."""
    try:
        return statistics.median(_times(run))
    except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError):
        return float("inf")


def _times(run: Callable[[], object]) -> Iterator[float]:
    run()
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        yield begin.elapsed_time(end)


def wanted(x: torch.Tensor) -> Path | None:
    """The file to tune by for rows on this device, or None; never while a graph is captured."""
    name = os.environ.get(FORMS)
    if not name or not x.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    return Path(name)
