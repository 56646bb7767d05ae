"""A step of alternated and of bi-level training beside a step on one gradient.

    python bench/procedures.py [--num-codes 256] [--out bench/results/procedures.jsonl]

The VQ-VAE of the recipe `mq`, an MLP that makes the codes, photographs. Before anything is timed, the closed form of the
indirect gradient must equal the general one, a central difference, on this model and batch. What a procedure costs is
the ratio of medians of steps that alternate in one process. MQ's closed form may cost 3.8 plain steps and must cost
less than the general form: three full passes, and one forward derivative of the encoder.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import records
import torch
from torch import Tensor

from vqkernels.profiling.timing import HostClock, interleaved
from vqkernels.train.config import TrainConfig
from vqkernels.train.data.images import load_images
from vqkernels.train.learners.alternated import Alternated
from vqkernels.train.learners.base import code_group, make_optimizer, rest_group
from vqkernels.train.learners.bilevel import MetaQuantization
from vqkernels.train.learners.losses import ImageLoss
from vqkernels.train.learners.procedure import Joint, Procedure
from vqkernels.train.model import build_model
from vqkernels.train.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench/results/procedures.jsonl"
MOST_TIMES = 3.8
# of the difference of nearby float32 gradients that the general form is
AGREE = 0.02

Make = Callable[..., Procedure]
PROCEDURES: dict[str, tuple[Make, dict[str, object]]] = {
    "joint": (Joint, {}),
    "alternated, inner 1": (Alternated, {"inner": 1}),
    "alternated, inner 2": (Alternated, {"inner": 2}),
    "meta, xi = 0": (MetaQuantization, {"xi": 0.0}),
    "meta, closed": (MetaQuantization, {"hypergradient": "closed"}),
    "meta, general": (MetaQuantization, {"hypergradient": "general"}),
}


def make(config: TrainConfig, name: str) -> Procedure:
    """A procedure around a fresh model, the same for each name."""
    torch.manual_seed(config.seed)
    model = build_model(config)
    kind, options = PROCEDURES[name]
    if kind is MetaQuantization:
        options = {"xi": config.xi, **options}
    return kind(
        model,
        lambda outputs, targets: ImageLoss(config.reconstruction)(outputs, targets).total,
        codebook_optimizer=make_optimizer(config, [code_group(config, model)]),
        model_optimizer=make_optimizer(config, [rest_group(config, model)]),
        **options,
    )


def agreement(config: TrainConfig, batch: Tensor) -> float:
    """How far the closed indirect gradient is from the general one, in units of its length."""
    found = []
    for name in ("meta, closed", "meta, general"):
        procedure = make(config, name)
        # a few steps, so that the codes lie among latents
        for _ in range(3):
            procedure.step(batch)
        found.append(copy.deepcopy(procedure))
    closed, general = found
    general.model.load_state_dict(closed.model.state_dict())
    rows = []
    for procedure in (closed, general):
        torch.manual_seed(1)
        indirect = procedure.hypergradients(batch)[1]
        rows.append(torch.cat([indirect[name].flatten().double() for name in sorted(indirect)]))
    return float((rows[0] - rows[1]).norm() / rows[0].norm())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the lines, and return 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--num-codes", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    config = PRESETS["mq"].config(num_codes=options.num_codes)
    batch = load_images(config).batch(0)
    off = agreement(config, batch)
    if not off < AGREE:
        print(f"the closed form is {off:.3g} of its length from the general one")
        return 1
    runs = {name: make(config, name) for name in PROCEDURES}
    steps = {name: partial(one.step, batch) for name, one in runs.items()}
    times, failed = interleaved(HostClock(), steps, rounds=options.rounds)
    assert not failed, failed
    medians = {name: statistics.median(one) for name, one in times.items()}
    lines = []
    for name, one in times.items():
        quartiles = statistics.quantiles(one, n=4)
        line: records.Record = {
            "case": "procedure",
            "shape": [*batch.shape, options.num_codes],
            "dtype": "float32",
            "name": name,
            "ms_p50": round(medians[name], 4),
            "ms_p25": round(quartiles[0], 4),
            "ms_p75": round(quartiles[2], 4),
            "rounds": len(one),
            "over_joint": round(medians[name] / medians["joint"], 3),
            "closed_off_general": off,
            **records.facts(torch.device("cpu")),
        }
        lines.append(line)
        print(f"{name:22s} {medians[name]:8.1f} ms  {line['over_joint']:5.2f}x joint", flush=True)
    options.out.unlink(missing_ok=True)
    records.append(options.out, lines)
    closed, general = medians["meta, closed"], medians["meta, general"]
    if closed > MOST_TIMES * medians["joint"] or closed >= general:
        print(
            f"the closed form costs {closed / medians['joint']:.2f} plain steps; at most {MOST_TIMES} wanted"
        )
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
