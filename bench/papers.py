"""Train every method that the papers' tables name on the same small VQ-VAE and photographs, and draw who collapses.

    python bench/papers.py [--steps 600] [--rows ste ema ...] [--out bench/results/papers.jsonl] [--figure docs/papers.png]

The rows are those of DiVeQ table 1, Huh et al. tables 1 to 3 and Meta-Quantization tables 1, 4, 6 and 7. Each recipe is trained once, from the same weights and crops; what is finished is not
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
from recipes import DIM, RECIPES, TABLES, Recipe, Rows

from vqkernels.models import VQVAE
from vqkernels.nn.metrics import code_counts, perplexity
from vqkernels.nn.metrics import usage as share_used
from vqkernels.train.config import TrainConfig
from vqkernels.train.data.images import ImageSet, load_images
from vqkernels.train.measures.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
OUT, FIGURE = ROOT / "bench/results/papers.jsonl", ROOT / "docs/papers.png"
CODES, WIDTH, BATCH, SEED = 128, 32, 32, 0
# of the steps, how many at the end tell which codes are in use
WATCHED = 0.2
HELD_OUT_IMAGES = 64


def train(name: str, recipe: Recipe, images: ImageSet, steps: int, seed: int = SEED) -> dict[str, object]:
    """Train one recipe and say how it ended."""
    torch.manual_seed(seed)
    quantizer = recipe.quantizer(CODES, DIM, steps, images)
    # the same weights whatever the codebook drew
    torch.manual_seed(seed)
    model = VQVAE(quantizer, width=WIDTH, latent_dim=DIM)
    step = recipe.stepper(model, steps)
    counts = torch.zeros(quantizer.num_indices, dtype=torch.int64)
    began, finite, losses = time.perf_counter(), True, []
    for number in range(steps):
        batch = images.batch(number)
        loss, indices = step(batch, number)
        finite &= math.isfinite(loss)
        losses.append(loss)
        if number >= math.floor((1 - WATCHED) * steps):
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
        "seed": seed,
        "finite": finite,
        "loss_first": round(sum(losses[:tenth]) / tenth, 5),
        "loss_last": round(sum(losses[-tenth:]) / tenth, 5),
        "psnr": round(found.psnr, 3),
        "usage": round(float(share_used(counts)), 4),
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
    """Codes in use of every row, table by table in two columns, with the held-out PSNR beside."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    by_name = {each["name"]: each for each in found}
    tables = [(title, [row for row in rows if row[1] in by_name]) for title, rows in TABLES.items()]
    tables = [(title, rows) for title, rows in tables if rows]
    columns = _columns(tables)
    tall = max(sum(len(rows) + 2.1 for _, rows in column) for column in columns)
    figure = pyplot.figure(figsize=(12, 0.18 * tall + 0.9), layout="constrained")
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column in zip(parts, columns, strict=True):
        heights = [len(rows) for _, rows in column]
        axes = part.subplots(len(column), 1, height_ratios=heights, squeeze=False)[:, 0]
        for axis, (title, rows) in zip(axes, column, strict=True):
            ones = [by_name[name] for _, name in rows]
            # a label may come twice, a bar has its own place
            places = range(len(rows))
            axis.barh(
                places, [100 * one["usage"] for one in ones], color=[_colour(one["usage"]) for one in ones]
            )
            axis.set_yticks(places, [label for label, _ in rows])
            for place, one in zip(places, ones, strict=True):
                axis.text(102, place, f"{one['psnr']:.1f} dB", va="center", fontsize=8)
            axis.set_xlim(0, 100)
            axis.invert_yaxis()
            axis.grid(alpha=0.25, axis="x")
            axis.axvline(90, color="black", linewidth=0.8, linestyle=":")
            axis.tick_params(labelsize=8)
            axis.set_title(title, fontsize=9, loc="left", fontweight="bold")
        axes[-1].set_xlabel("codes in use at the end of the training, %; held-out PSNR beside", fontsize=8)
    words = {0.0: "under 50 %", 0.5: "50 to 90 %", 0.9: "90 % or more"}
    patches = [Patch(color=_colour(usage), label=f"{label} in use") for usage, label in words.items()]
    figure.legend(handles=patches, loc="outside upper right", ncols=3, fontsize=8.5, frameon=False)
    title = f"{CODES} codes of {DIM} features, {found[-1]['steps']} steps on photographs, one seed"
    figure.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _columns(tables: list[tuple[str, Rows]]) -> list[list[tuple[str, Rows]]]:
    """The tables in two columns in their order, as even as that allows."""
    sizes = [len(rows) + 2 for _, rows in tables]
    cut = min(range(len(sizes)), key=lambda at: max(sum(sizes[:at]), sum(sizes[at:])))
    return [column for column in (tables[:cut], tables[cut:]) if column]


def _colour(usage: float) -> str:
    return "C3" if usage < 0.5 else "C1" if usage < 0.9 else "C0"


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is not finished, draw, and return 1 where a run was not finite or learned nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--rows", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args(arguments)
    if options.fresh:
        options.out.unlink(missing_ok=True)
    found = records.read(options.out)[0] if options.out.exists() else []
    done = {each["name"] for each in found if (each["steps"], each["seed"]) == (options.steps, options.seed)}
    # the sums of one thread are the same on every machine, and models this small gain nothing from two
    torch.set_num_threads(1)
    images = load_images(TrainConfig(batch_size=BATCH, seed=options.seed))
    for name in options.rows:
        if name in done:
            continue
        one = train(name, RECIPES[name], images, options.steps, options.seed)
        records.append(options.out, [one])
        found.append(one)
        print(
            f"{name:24s} PSNR {one['psnr']:6.2f} dB  usage {one['usage']:4.0%}  perplexity {one['perplexity']:6.1f}"
            f"  loss {one['loss_first']:.3f} -> {one['loss_last']:.3f}  {one['seconds']:5.1f} s",
            flush=True,
        )
    found = [each for each in found if (each["steps"], each["seed"]) == (options.steps, options.seed)]
    draw(options.figure, found)
    print(f"{len(found)} recipes in {options.figure}")
    bad = [each["name"] for each in found if not each["finite"] or each["loss_last"] >= each["loss_first"]]
    if bad:
        print(f"not finite, or learned nothing: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
