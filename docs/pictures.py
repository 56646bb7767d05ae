"""Draw the pictures of the pages that explain, from our own ops and from what was measured.

python docs/pictures.py [exactness estimators memory] [--out docs]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from vqkernels import diveq, nearest_code, sf_diveq
from vqkernels.ops import straight_through

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.collections import LineCollection

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREEN, GREY = "#3b5bdb", "#e8590c", "#2b8a3e", "#868e96"
SHOWN = 9


def exactness(path: Path) -> None:
    """Scores of one certain and one open row in bfloat16, with the interval that float64 must be in."""
    torch.manual_seed(3)
    codebook, rows = torch.randn(256, 64), torch.randn(512, 64)
    half = codebook.square().sum(1) / 2
    codes16, rows16 = codebook.bfloat16().float(), rows.bfloat16().float()
    scores = rows16 @ codes16.T - half
    # the measured part of the bound (Cauchy-Schwarz); rounding of the sums is too small to be seen
    bound = (rows - rows16).norm(dim=1) * codes16.norm(dim=1).max()
    bound += rows.norm(dim=1) * (codebook - codes16).norm(dim=1).max()
    best, order = scores.topk(SHOWN)
    gap = best[:, 0] - best[:, 1]
    exact = rows.double() @ codebook.double().T - codebook.double().square().sum(1) / 2
    winners = nearest_code(rows, codebook).indices
    wrong = (winners != order[:, 0]).nonzero().flatten()
    # an open row whose low precision is misled, and a row with room
    chosen = (int((gap - 4 * bound).abs().argmin()), int(wrong[0]))
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 3.9), sharey=False)
    for axis, row, title in zip(axes, chosen, ("certain: one pass", "open: float64 decides"), strict=True):
        span = float(bound[row])
        limit = float(best[row, 0]) - 2 * span
        axis.axhspan(limit, float(best[row, 0]) + span, color=ORANGE, alpha=0.08, lw=0)
        axis.axhline(limit, color=ORANGE, lw=1, ls="--")
        axis.text(SHOWN - 0.7, limit, "best score - 2E ", ha="right", va="bottom", color=ORANGE, fontsize=9)
        places = list(range(SHOWN))
        axis.errorbar(
            places,
            best[row].tolist(),
            yerr=span,
            fmt="o",
            ms=4,
            color=GREY,
            capsize=3,
            label="bfloat16 score ± E",
        )
        axis.plot(
            places, exact[row, order[row]].tolist(), "_", ms=14, mew=2, color=BLUE, label="float64 score"
        )
        at = order[row].tolist().index(int(winners[row]))
        value = float(exact[row, winners[row]])
        axis.plot(at, value, "*", ms=15, color=GREEN, label="nearest_code", zorder=5)
        axis.set_xticks(places, [str(int(code)) for code in order[row]])
        axis.set_xlabel("code, by bfloat16 score")
        axis.set_title(f"a row that is {title}", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("x · c - |c|² / 2")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    _save(figure, path)


def estimators(path: Path) -> None:
    """Where latents of two features go with the straight-through estimator, DiVeQ and SF-DiVeQ, and how."""
    torch.manual_seed(5)
    angles = torch.linspace(0.1, 1.4 * math.pi, 9)
    codebook = torch.stack([angles.cos(), angles.sin()], 1) * torch.linspace(0.6, 1.4, 9)[:, None]
    codebook += 0.08 * torch.randn(9, 2)
    x = torch.randn(70, 2) * 0.85
    indices = nearest_code(x, codebook).indices
    noise = 0.12
    reached = (
        ("STE: z is the code, dL/dx = dL/dz", straight_through(x, codebook, indices).z, None),
        (
            f"DiVeQ: as far as the code, noise_std {noise}",
            diveq(x, codebook, noise_std=noise, seed=1).z,
            None,
        ),
        (
            "SF-DiVeQ: to points on the curve through the codes",
            sf_diveq(x, codebook, noise_std=0.02, seed=1).z,
            codebook,
        ),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), sharex=True, sharey=True)
    for axis, (title, z, curve) in zip(axes, reached, strict=True):
        if curve is None:
            _voronoi(axis, codebook)
        else:
            axis.plot(*curve.T, color=ORANGE, lw=2, alpha=0.6, zorder=1)
        lines = LineCollection(torch.stack([x, z], 1).tolist(), colors=BLUE, lw=0.7, alpha=0.55)
        axis.add_collection(lines)
        axis.plot(*x.T, ".", ms=4, color=GREY, label="latent x")
        axis.plot(*z.T, ".", ms=6, color=BLUE, label="z")
        axis.plot(*codebook.T, "o", ms=9, mfc="none", mec=ORANGE, mew=2, label="code")
        axis.set_title(title, fontsize=11)
        axis.set_aspect("equal")
        axis.set(xlim=(-2.1, 2.1), ylim=(-2.1, 2.1), xticks=[], yticks=[])
    axes[0].legend(frameon=True, fontsize=9, loc="lower right")
    _save(figure, path)


def _voronoi(axis: Any, codebook: Tensor) -> None:
    """Borders between the cells of the codes, found by the search itself."""
    steps = torch.linspace(-2.1, 2.1, 420)
    grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1)
    cells = nearest_code(grid, codebook).indices
    edge = (cells[1:, 1:] != cells[:-1, 1:]) | (cells[1:, 1:] != cells[1:, :-1])
    axis.contourf(steps[1:], steps[1:], edge.float(), levels=[0.5, 1], colors=["#ced4da"], zorder=0)


def memory(path: Path) -> None:
    """Memory beyond inputs and outputs against N, as measured, beside what a matrix of all distances would take."""
    found = [json.loads(line) for line in (ROOT / "bench/results/cpu-curves.jsonl").read_text().splitlines()]
    found = [each for each in found if each.get("axis") == "N" and each["dtype"] == "float32"]
    figure, axis = pyplot.subplots(figsize=(6.6, 4.2))
    looks = {"vqkernels native": ("ours, exact", GREEN), "faiss-cpu IndexFlatL2": ("faiss-cpu", BLUE)}
    for name, (words, colour) in looks.items():
        mine = [each for each in found if each["name"] == name]
        axis.plot(
            [r["shape"][0] for r in mine], [r["extra_mb"] for r in mine], "o-", color=colour, label=words
        )
    shapes = sorted({tuple(each["shape"]) for each in found})
    matrix = [4e-6 * n * k for n, k, _ in shapes]
    axis.plot(
        [n for n, _, _ in shapes],
        matrix,
        "--",
        color=ORANGE,
        label="N x K float32 (arithmetic, not measured)",
    )
    axis.set(xscale="log", yscale="log", xlabel="rows N", ylabel="MB beyond inputs and outputs")
    axis.set_title(f"search, K = {shapes[0][1]}, D = {shapes[0][2]}, float32", fontsize=11)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    # no date and no version inside: the same ops draw the same file
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


PICTURES = {"exactness": exactness, "estimators": estimators, "memory": memory}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("pictures", nargs="*", help="all of them if none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    options = parser.parse_args(arguments)
    if unknown := set(options.pictures) - set(PICTURES):
        parser.error(
            f"pictures must be of {', '.join(PICTURES)}; got {', '.join(sorted(unknown))}. Name these."
        )
    for name in options.pictures or PICTURES:
        PICTURES[name](options.out / f"{name}.png")
        print(options.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
