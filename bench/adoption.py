"""Other libraries' models before and after `convert`: loss, PSNR, time and memory side by side, on photographs.

    python bench/adoption.py [--cases vq diveq-large ...] [--steps 200] [--out bench/results/adoption.jsonl]

A model and its converted copy start from the same weights and see the same batches; their steps alternate, each with
the same seed, so that what else the machine does meets both. Memory is that of a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import records
import torch
from strangers import CASES, FACTOR, Autoencoder, Case
from torch import Tensor

from vqkernels import convert
from vqkernels.profiling import memory
from vqkernels.profiling.timing import HostClock, interleaved
from vqkernels.train.data.images import ImageSet
from vqkernels.train.data.pictures import Parts, photos

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench/results/adoption.jsonl"
SIDES = ("before", "after")
SEED = 0
# steps whose times warm caches up
WARMED = 5
# the targets, of the cases that they bind
FASTER, SMALLER = 10, 20
# rows of the call that comes before the one whose memory is measured
FEW = 64


def models(case: Case) -> dict[str, Autoencoder]:
    """The library's model, and a copy of it whose quantizer was swapped."""
    torch.manual_seed(SEED)
    before = case.make(case.num_codes, case.dim)
    return {"before": before, "after": converted(before)}


def converted(before: Autoencoder) -> Autoencoder:
    """A copy whose quantizer is ours."""
    report = convert(copy.deepcopy(before))
    if not isinstance(report.model, Autoencoder) or type(report.model.quantizer) is type(before.quantizer):
        raise ValueError(
            f"adoption: {type(before.quantizer).__name__} must be converted; got {report}. See its reason."
        )
    return report.model


def step(model: Autoencoder, optimizer: torch.optim.Optimizer, images: Tensor) -> float:
    """One step of training; its loss."""
    optimizer.zero_grad()
    loss = model.loss(images)
    loss.backward()
    optimizer.step()
    return loss.item()


def train(both: dict[str, Autoencoder], images: ImageSet, steps: int) -> tuple[dict, dict]:
    """Train both models in turns; losses and milliseconds of every step, by side."""
    clock = HostClock()
    optimizers = {side: model.optimizer() for side, model in both.items()}
    losses: dict[str, list[float]] = {side: [] for side in both}
    times: dict[str, list[float]] = {side: [] for side in both}
    for number in range(steps):
        batch = images.batch(number).contiguous()
        for side, model in both.items():
            torch.manual_seed(number)
            run = partial(step, model, optimizers[side], batch)
            times[side].append(clock.time(lambda r=run, s=side: losses[s].append(r())))
    return losses, times


@torch.no_grad()
def psnr(model: Autoencoder, images: ImageSet, crop: int) -> float:
    """Mean over the held-out photographs' middles, dB; pixels are in [-1, 1]."""
    model.eval()
    found = []
    for sample in images.walk("held_out", crop):
        error = (model(sample.image[None])[0].clamp(-1, 1) - sample.image).square().mean()
        found.append(10 * math.log10(4 / float(error)))
    model.train()
    return sum(found) / len(found)


def quantizer_step(model: Autoencoder, latents: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward of the quantizer alone; what it returns is what a trainer would keep."""
    parameters = [p for p in model.quantizer.parameters() if p.requires_grad]

    def run() -> object:
        latents.grad = None
        for parameter in parameters:
            parameter.grad = None
        z, extra = model.quantize(latents)
        torch.autograd.backward(z, grad, retain_graph=extra.requires_grad)
        if extra.requires_grad:
            extra.backward()
        return z, latents.grad, [p.grad for p in parameters]

    return run


def quantizer_times(
    both: dict[str, Autoencoder], images: ImageSet, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of the quantizers alone, in turns, both with the weights and latents of the library's trained model."""
    trained = both["before"]
    with torch.no_grad():
        latents = trained.encoder(images.batch(steps))
    torch.manual_seed(SEED)
    grad = torch.randn_like(latents)
    runs = {
        side: quantizer_step(model, latents.clone().requires_grad_(), grad)
        # copies: averages move in every forward
        for side, model in zip(SIDES, (copy.deepcopy(trained), converted(trained)), strict=True)
    }
    times, failed = interleaved(HostClock(), runs, rounds=rounds)
    if failed:
        raise ValueError(f"adoption: {failed}")
    return times


def megabytes(case: Case, side: str, tiny: bool) -> float | None:
    """Peak memory of a quantizer's step above inputs and outputs, in a process that does nothing else."""
    if not memory.supported():
        return None
    command = [
        sys.executable,
        __file__,
        "--cases",
        case.name,
        "--memory",
        side,
        *(["--tiny"] if tiny else []),
    ]
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | returned, check=True)
    return round(json.loads(ran.stdout.splitlines()[-1]) / 1e6, 2)


def tell_memory(case: Case, side: str) -> None:
    """Print the bytes for `megabytes`."""
    model = models(case)[side]
    side_of = case.crop // FACTOR
    x = torch.randn(case.batch, case.dim, side_of, side_of)
    few = (
        x.flatten(2).transpose(1, 2).reshape(-1, case.dim)[:FEW].t().reshape(1, case.dim, -1, 1).contiguous()
    )
    quantizer_step(model, few.requires_grad_(), torch.randn_like(few))()
    run = quantizer_step(model, x.requires_grad_(), torch.randn_like(x))
    print(memory.peak_bytes(run))


def measure(case: Case, *, steps: int, rounds: int, tiny: bool) -> list[records.Record]:
    """Train a model and its copy; one line for each."""
    sized = case.tiny() if tiny else case
    images = photographs(sized)
    both = models(sized)
    losses, times = train(both, images, steps)
    alone = quantizer_times(both, images, steps, rounds)
    facts = records.facts(torch.device("cpu"))
    lines = []
    for side in SIDES:
        warm = times[side][WARMED:] or times[side]
        lines.append(
            {
                "case": "adoption",
                "name": case.name,
                "side": side,
                "library": case.library,
                "version": version(case.library),
                "quantizer": case.quantizer,
                "shape": [sized.rows, sized.num_codes, sized.dim],
                "steps": steps,
                "losses": [round(loss, 6) for loss in losses[side]],
                "psnr": round(psnr(both[side], images, sized.crop if tiny else 256), 3),
                "step_ms": round(statistics.median(warm), 3),
                "quantizer_ms": round(statistics.median(alone[side]), 3),
                "rounds": len(alone[side]),
                "quantizer_mb": megabytes(case, side, tiny),
                **facts,
            }
        )
    return lines


@cache
def decoded() -> Parts:
    """The photographs that come with scikit-image, to train on and held out, in memory."""
    training, held_out = ([replace(p, pixels=p.read()) for p in part] for part in photos()[:2])
    return Parts(training, held_out)


def photographs(case: Case) -> ImageSet:
    """Crops of the photographs."""
    parts = decoded()
    return ImageSet(
        parts.training, parts.held_out, crop=case.crop, batch_size=case.batch, factor=FACTOR, seed=SEED
    )


def missed(lines: Sequence[records.Record]) -> list[str]:
    """What of the targets a run does not reach, in words."""
    found = {(each["name"], each["side"]): each for each in lines}
    words = []
    for case in CASES:
        before, after = (found.get((case.name, side)) for side in SIDES)
        if not case.bound or before is None or after is None:
            continue
        for field, least in (("quantizer_ms", FASTER), ("quantizer_mb", SMALLER)):
            if before[field] is not None and before[field] < least * after[field]:
                words.append(
                    f"{case.name}: {field} {before[field]} -> {after[field]}, less than {least} times"
                )
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the lines, and return 1 where a target is missed."""
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15, help="of the quantizers alone")
    parser.add_argument("--tiny", action="store_true", help="sizes for tests")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    chosen = [case for case in CASES if case.name in options.cases]
    if options.memory:
        tell_memory(chosen[0].tiny() if options.tiny else chosen[0], options.memory)
        return 0
    found: list[records.Record] = []
    for case in chosen:
        found += measure(case, steps=options.steps, rounds=options.rounds, tiny=options.tiny)
        for line in found[-2:]:
            print(
                f"{line['name']:15s} {line['side']:6s} loss {line['losses'][-1]:.5f}  {line['psnr']:.2f} dB  "
                f"step {line['step_ms']:8.1f} ms  quantizer {line['quantizer_ms']:8.2f} ms {line['quantizer_mb']} MB",
                flush=True,
            )
    kept = records.read(options.out)[0] if options.out.exists() else []
    kept = [each for each in kept if each["name"] not in options.cases]
    options.out.unlink(missing_ok=True)
    order = lambda each: (names.index(each["name"]), SIDES.index(each["side"]))  # noqa: E731
    records.append(options.out, sorted([*kept, *found], key=order))
    words = [] if options.tiny else missed(found)
    for each in words:
        print(each)
    return 1 if words else 0


if __name__ == "__main__":
    sys.exit(main())
