"""The demonstration: SF-DiVeQ and the straight-through estimator on the same photographs, steps and seed."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vqkernels.models import ImageAutoencoder
from vqkernels.train.checkpoints.checkpoint import store_of
from vqkernels.train.checkpoints.files import replace_file
from vqkernels.train.config import TrainConfig
from vqkernels.train.data.images import ImageSet
from vqkernels.train.log import Line, read_lines
from vqkernels.train.loop import RunResult, train
from vqkernels.train.measures.evaluate import Evaluation, evaluate, modes_of, reconstruct, to_pixels
from vqkernels.train.reports.plots import Row, draw_reconstructions, draw_training

LABELS: dict[str, str] = {"sf_diveq": "SF-DiVeQ", "ste": "STE"}
COLUMNS = 4


@dataclass(frozen=True)
class DemoRun:
    """One finished model of the demonstration.

    Attributes:
        label: its name in pictures and tables.
        config: of its run.
        lines: of its log.
        evaluations: on the held-out photographs, one per evaluation mode.
        share: part of a training step spent in the quantizer, forward and backward, once it quantizes.
    """

    label: str
    config: TrainConfig
    lines: Sequence[Line]
    evaluations: Sequence[Evaluation]
    share: float | None


def run_demo(
    out: Path,
    *,
    steps: int = 3000,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = False,
    on_line: Callable[[Line], None] | None = None,
) -> tuple[list[DemoRun], str | None]:
    """Train both models, going on where an earlier call stopped, and write pictures and numbers.

    Leaves `<quantizer>/checkpoints` and `<quantizer>/metrics.jsonl` for each, and for both reconstructions.png,
    training.png and metrics.jsonl in `out`.

    Args:
        out: folder of the demonstration.
        steps: optimizer steps of each model.
        seed: of each model.
        fresh: forget earlier runs in `out`.
        progress: show progress bars on standard error.
        on_line: called with every line of a log.

    Returns:
        The finished models, and the name of the signal that stopped the demonstration, or None.

    Raises:
        RunError: if a run cannot start or go on.
    """
    finished: list[DemoRun] = []
    rows: list[Row] = []
    images: ImageSet | None = None
    for name, label in LABELS.items():
        config = TrainConfig(quantizer=name, steps=steps, seed=seed, out=str(out / name))
        if fresh:
            store_of(out / name).clear()
        result = train(config, resume=True, progress=progress, on_line=on_line)
        if result.signal is not None:
            return finished, result.signal
        run, row = _measure(label, config, result)
        finished.append(run)
        rows.append(row)
        images = result.images
    if images is not None:
        draw_models(out / "reconstructions.png", images, rows)
    draw_training(out / "training.png", {run.label: run.lines for run in finished})
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for run in finished for line in _lines(run))
    replace_file(out / "metrics.jsonl", text.encode())
    return finished, None


def _measure(label: str, config: TrainConfig, result: RunResult) -> tuple[DemoRun, Row]:
    model, images = result.model, result.images
    lines = read_lines(config.metrics_path())
    evaluations = [evaluate(model, images, mode=mode) for mode in modes_of(model)]
    shares = [float(share) for line in lines if (share := line.get("quantizer_share")) is not None]
    run = DemoRun(label, config, lines, evaluations, sum(shares) / len(shares) if shares else None)
    return run, reconstruction_row(label, model, images)


def reconstruction_row(label: str, model: ImageAutoencoder, images: ImageSet) -> Row:
    """Reconstruct the first held-out images, with their PSNR and rate as captions.

    Args:
        label: of the row.
        model: with an initialised quantizer.
        images: the held-out part is used.

    Returns:
        The row of a picture.
    """
    shown = list(images.validation(COLUMNS))
    captions = [
        f"PSNR {one.psnr:.2f} dB, {one.bits_per_pixel:g} bits per pixel"
        for one in (evaluate(model, images.only(number), ssim=False) for number in range(len(shown)))
    ]
    return Row(label, reconstruct(model, shown), captions)


def draw_models(path: Path, images: ImageSet, rows: Sequence[Row]) -> None:
    """Draw the first held-out images over their reconstructions.

    Args:
        path: of the PNG to write.
        images: the held-out part is shown.
        rows: of the models, from `reconstruction_row`.
    """
    originals = {shown.name: to_pixels(shown.image) for shown in images.validation(COLUMNS)}
    draw_reconstructions(path, originals, rows)


def _lines(run: DemoRun) -> list[Line]:
    final = [
        {"step": run.config.steps, "split": "final"}
        | {key: None if value == math.inf else value for key, value in dataclasses.asdict(found).items()}
        for found in run.evaluations
    ]
    return [{"run": run.config.quantizer, **line} for line in [*run.lines, *final]]
