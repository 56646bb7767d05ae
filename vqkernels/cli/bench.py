"""The command `bench`."""

import json
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from vqkernels.checks import refuse
from vqkernels.profiling.machine import Shape
from vqkernels.profiling.measuring import benchmark
from vqkernels.train.checkpoints.files import open_folder, replace_file
from vqkernels.train.config import RunError

# VQ-VAE and VQGAN, of few enough rows for a minute on two cores; and whole on a GPU
SHAPES: dict[str, dict[str, tuple[Shape, ...]]] = {
    "cpu": {"search": ((32768, 1024, 64), (8192, 4096, 256)), "layer": ((8192, 1024, 64),)},
    "cuda": {
        "search": ((65536, 1024, 64), (65536, 8192, 256), (131072, 65536, 32)),
        "layer": ((65536, 1024, 64), (65536, 8192, 256)),
    },
}


def bench(
    case: Annotated[Literal["both", "search", "layer"], tyro.conf.Positional] = "both",
    shapes: tuple[str, ...] = (),
    backends: tuple[Literal["native", "triton", "reference"], ...] = (),
    peers: tuple[str, ...] = (),
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: Literal["cpu", "cuda"] | None = None,
    seconds: float = 40.0,
    json_file: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    out: Path = Path("runs/bench"),
) -> int:
    """Time the ops beside the peers that are installed, and draw a roofline and bars.

    Every result is checked against float64 before it is timed. Rates count 2 N K D operations, GB/s what must be moved
    at least; shares are of the fastest dot products measured in the same process.

    Args:
        case: search: the nearest code; layer: forward and backward of a quantizer.
        shapes: Such as 65536x1024x64: N rows, K codes, D features.
        backends: Of ours; those that can run here when left out.
        peers: Parts of names, such as faiss or cdist, or none; all that are installed when left out.
        dtype: Of rows and codes; float32 on the CPU and bfloat16 on a GPU when left out.
        device: A GPU where torch has one when left out.
        seconds: About, for everything; a peer that would take too much of it is left out and named.
        json_file: Also write every number into this file.
        out: Folder for the pictures.
    """
    from vqkernels.profiling.figures import bars, roofline
    from vqkernels.profiling.table import format_table

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        refuse(RunError, "bench", "device", "be one that torch can use", "cuda", "Pass --device cpu")
    cases = ("search", "layer") if case == "both" else (case,)
    given = [sizes(text) for text in shapes]
    planned = [(each, shape) for each in cases for shape in given or SHAPES[place.type][each]]
    if not seconds > 0:
        refuse(RunError, "bench", "seconds", "be above 0", seconds, "Pass --seconds 40")
    if "none" in peers and len(peers) > 1:
        refuse(RunError, "bench", "peers", "be none alone, or parts of names", " ".join(peers), "Drop none")
    open_folder(out, op="bench")
    if json_file is not None:
        if json_file.is_dir():
            fix = f"Pass --json {json_file / 'bench.json'}"
            refuse(RunError, "bench", "json", "be a file", f"{json_file}, a folder", fix)
        open_folder(json_file.parent, "json", op="bench")
    try:
        made = benchmark(
            planned,
            device=place,
            dtype=getattr(torch, dtype or ("bfloat16" if place.type == "cuda" else "float32")),
            backends=backends or None,
            peers=None if not peers else () if peers == ("none",) else peers,
            seconds=seconds,
            tell=lambda words: print(f"{words} ...", flush=True),
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    print(format_table(made))
    if json_file is not None:
        replace_file(json_file, json.dumps(made.to_dict(), indent=1).encode(), "json", op="bench")
        print(f"numbers: {json_file}")
    for each in cases:
        if any(found.case == each for found in made.measurements):
            for kind, draw in (("roofline", roofline), ("bars", bars)):
                path = out / f"{each}-{kind}.png"
                replace_file(path, draw(made, each), op="bench")
                print(f"{kind}: {path}")
    # a result of ours that was wrong is among those left out
    lost = [each for each in made.skipped if each.name.startswith("vqkernels") and each.failed]
    return 1 if lost or not made.measurements else 0


def sizes(text: str) -> Shape:
    """Return N, K, D of words such as 65536x1024x64.

    Args:
        text: of the command line.

    Raises:
        RunError: it is not three numbers above 0.
    """
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        refuse(RunError, "bench", "shapes", "be NxKxD, numbers above 0", repr(text), "Pass 65536x1024x64")
    n, k, d = map(int, parts)
    return n, k, d
