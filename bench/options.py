"""The command line of the bench, and the shapes it measures unless told others."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from vqkernels import native

Shape = tuple[int, int, int]

# VQ-VAE, VQGAN, an ImageNet tokenizer, long rows, projected codes
SEARCHED_ON_CPU = [
    (65536, 1024, 64),
    (16384, 8192, 256),
    (16384, 65536, 32),
    (65536, 1024, 512),
    (65536, 512, 8),
]
LAYERS_ON_CPU = [(8192, 2048, 512), (65536, 1024, 64), (32768, 16384, 256)]
# VQ-VAE, VQGAN twice, an ImageNet tokenizer, a million rows, a small batch, projected codes; the last for the curve
ON_CUDA = [
    (65536, 1024, 64),
    (65536, 8192, 256),
    (1048576, 1024, 512),
    (131072, 65536, 32),
    (32768, 16384, 256),
    (2048, 16384, 256),
    (65536, 512, 8),
]
SEARCHED_ONLY = [(16384, 1048576, 64)]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CASES = ("search", "layer", "agreement")


def sizes(text: str) -> Shape:
    """N,K,D."""
    n, k, d = map(int, text.split(","))
    return n, k, d


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time our ops beside their peers.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="bfloat16 on cuda, float32 on the cpu")
    parser.add_argument("--shapes", nargs="+", type=sizes, metavar="N,K,D")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument(
        "--isas", nargs="+", default=[], help="instruction sets to force ours to as well, on a CPU"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name contains one of these")
    parser.add_argument("--names", nargs="+", help="contenders of exactly these names")
    parser.add_argument("--avoid", nargs="+", default=[], help="contenders whose name begins like this")
    parser.add_argument("--first", type=int, default=0, help="case to begin with")
    parser.add_argument("--rounds", type=int, help="by default as many as the time of a contender allows")
    parser.add_argument(
        "--each",
        type=float,
        default=2.0,
        help="seconds for all rounds of one contender at one shape, on a CPU",
    )
    parser.add_argument(
        "--cutoff", type=float, default=60.0, help="seconds of a call that is not tried, on a CPU"
    )
    parser.add_argument("--budget", type=float, help="seconds; 240 on cuda, no limit on the cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave out what would take long to compile")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, on a CPU")
    parser.add_argument("--fresh", action="store_true", help="begin the file anew")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    cuda = options.device == "cuda"
    options.dtypes = [DTYPES[name] for name in options.dtypes or [("bfloat16" if cuda else "float32")]]
    options.budget = options.budget or (240.0 if cuda else float("inf"))
    options.out = options.out or Path(__file__).parent / "results" / f"{options.device}.jsonl"
    # others are left out, and said so
    supported = native.facts().get("isas_supported", [])
    options.unsupported = [isa for isa in options.isas if isa not in supported]
    options.isas = [isa for isa in options.isas if isa in supported]
    return options


def cases(options: argparse.Namespace) -> list[tuple[str, Shape]]:
    """Cases in the order they are measured."""
    cuda = options.device == "cuda"
    if cuda or options.shapes:
        given = options.shapes or ON_CUDA
        found = [(case, shape) for shape in given for case in ("search", "layer")]
        found += [("search", shape) for shape in SEARCHED_ONLY] if cuda and not options.shapes else []
    else:
        found = [("search", shape) for shape in SEARCHED_ON_CPU] + [
            ("layer", shape) for shape in LAYERS_ON_CPU
        ]
    return [each for each in found if each[0] in options.cases]
