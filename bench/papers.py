"""Train every method that the papers' tables name on the same small VQ-VAE and photographs, and draw who collapses.

    python bench/papers.py [--steps 600] [--rows ste ema ...] [--out bench/results/papers.jsonl] [--figure docs/papers.png]

The rows are those of DiVeQ table 1, Huh et al. tables 1 to 3 and Meta-Quantization tables 1, 4, 6 and 7, as far as they
name a way to train a codebook. Each recipe is trained once, from the same weights and crops; what is finished is not
trained again. Usage is the share of codes that the last fifth of the training chose.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import records
import torch
from recipes import DIM, RECIPES, TABLES, Recipe

from vqkernels.models import VQVAE
from vqkernels.nn.metrics import code_counts, perplexity, usage
from vqkernels.train.config import TrainConfig
from vqkernels.train.data import ImageSet, load_images
from vqkernels.train.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
OUT, FIGURE = ROOT / "bench/results/papers.jsonl", ROOT / "docs/papers.png"
CODES, WIDTH, BATCH, SEED = 128, 32, 32, 0
# of the steps, how many at the end tell which codes are in use
WATCHED = 0.2
HELD_OUT_IMAGES = 64


def train(name: str, recipe: Recipe, images: ImageSet, steps: int) -> dict[str, object]:
    """Train one recipe and say how it ended."""
    torch.manual_seed(SEED)
    quantizer = recipe.quantizer(CODES, DIM, steps, images)
    # the same weights whatever the codebook drew
    torch.manual_seed(SEED)
    model = VQVAE(quantizer, width=WIDTH, latent_dim=DIM)
    step = recipe.stepper(model, steps)
    counts = torch.zeros(quantizer.num_indices, dtype=torch.int64)
    began, finite, losses = time.perf_counter(), True, []
    for number in range(steps):
        batch = images.batch(number)
        loss, indices = step(batch, number)
        finite &= math.isfinite(loss)
        losses.append(loss)
        if number >= (1 - WATCHED) * steps:
            counts += code_counts(indices[..., 0], len(counts))
    seconds = time.perf_counter() - began
    quantizer.commit()
    found = evaluate(model, images, ssim=False, limit=HELD_OUT_IMAGES)
    tenth = max(1, steps // 10)
    return {
        "case": "paper",
        "name": name,
        "shape": [BATCH * 64, quantizer.num_codes, DIM],
        "dtype": "float32",
        "ms_p50": None,
        "ms_min": None,
        "ms_max": None,
        "steps": steps,
        "finite": finite,
        "loss_first": round(sum(losses[:tenth]) / tenth, 5),
        "loss_last": round(sum(losses[-tenth:]) / tenth, 5),
        "psnr": round(found.psnr, 3),
        "usage": round(float(usage(counts)), 4),
        "perplexity": round(float(perplexity(counts)), 2),
        "held_out_usage": round(found.usage, 4),
        "held_out_perplexity": round(found.perplexity, 2),
        "seconds": round(seconds, 1),
        **records.facts(torch.device("cpu")),
    }


def markdown(found: Sequence[records.Record]) -> str:
    """One table per paper."""
    by_name = {each["name"]: each for each in found}
    parts = []
    for title, rows in TABLES.items():
        lines = [f"| {title} | PSNR | codes used | perplexity |", "|---|---|---|---|"]
        for label, name in rows:
            if name in by_name:
                one = by_name[name]
                told = f"{one['psnr']:.2f} dB | {one['usage']:.0%} | {one['perplexity']:.0f}"
                lines.append(f"| {label} | {told} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(path: Path, found: Sequence[records.Record]) -> None:
    """Codes in use and held-out PSNR of every row, table by table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_name = {each["name"]: each for each in found}
    tables = {title: [row for row in rows if row[1] in by_name] for title, rows in TABLES.items()}
    tables = {title: rows for title, rows in tables.items() if rows}
    heights = [len(rows) + 1.6 for rows in tables.values()]
    figure, axes = pyplot.subplots(
        len(tables), 2, figsize=(11, 0.235 * sum(heights) + 0.8), height_ratios=heights, squeeze=False
    )
    low = min(each["psnr"] for each in found)
    for (title, rows), (left, right) in zip(tables.items(), axes, strict=True):
        labels = [label for label, _ in rows]
        ones = [by_name[name] for _, name in rows]
        colours = ["C3" if one["usage"] < 0.5 else "C1" if one["usage"] < 0.9 else "C0" for one in ones]
        left.barh(labels, [100 * one["usage"] for one in ones], color=colours)
        right.barh(labels, [one["psnr"] for one in ones], color=colours)
        right.set_yticklabels([])
        left.set_xlim(0, 100)
        right.set_xlim(math.floor(low), math.ceil(max(each["psnr"] for each in found)))
        left.set_title(title, fontsize=10, loc="left")
        for axis in (left, right):
            axis.invert_yaxis()
            axis.grid(alpha=0.25, axis="x")
            axis.tick_params(labelsize=8.5)
        left.axvline(90, color="black", linewidth=0.8, linestyle=":")
    axes[-1][0].set_xlabel("codes in use at the end of the training, % (dotted: 90)")
    axes[-1][1].set_xlabel("held-out PSNR, dB")
    steps = found[-1]["steps"]
    figure.suptitle(f"{CODES} codes of {DIM} features, {steps} steps, photographs, one seed", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, draw, and return 1 where a run was not finite or learned nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rows", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(arguments)
    if options.fresh:
        options.out.unlink(missing_ok=True)
    found = records.read(options.out)[0] if options.out.exists() else []
    done = {each["name"] for each in found if each["steps"] == options.steps}
    # the sums of one thread are the same on every machine, and models this small gain nothing from two
    torch.set_num_threads(1)
    images = load_images(TrainConfig(batch_size=BATCH, seed=SEED))
    for name in options.rows:
        if name in done:
            continue
        one = train(name, RECIPES[name], images, options.steps)
        records.append(options.out, [one])
        found.append(one)
        print(
            f"{name:24s} PSNR {one['psnr']:6.2f} dB  usage {one['usage']:4.0%}  perplexity {one['perplexity']:6.1f}"
            f"  loss {one['loss_first']:.3f} -> {one['loss_last']:.3f}  {one['seconds']:5.1f} s",
            flush=True,
        )
    found = [each for each in found if each["steps"] == options.steps]
    draw(options.figure, found)
    print(f"{len(found)} recipes in {options.figure}")
    bad = [each["name"] for each in found if not each["finite"] or each["loss_last"] >= each["loss_first"]]
    if bad:
        print(f"not finite, or learned nothing: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
