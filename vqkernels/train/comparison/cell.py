"""One cell of a comparison, in a process of its own: an ordinary run, then its measurements in result.json."""

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

import vqkernels
from vqkernels.models.autoencoder import ImageAutoencoder
from vqkernels.train.checkpoints.files import open_folder, replace_file
from vqkernels.train.checkpoints.lock import locked
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import ImageSet
from vqkernels.train.log import read_lines
from vqkernels.train.loop import train
from vqkernels.train.measures.evaluate import MOST_IMAGES, evaluate, evaluating

FORMAT = "vqkernels cell 1"
CONFIG, RESULT, ERRORS, LOCK = "config.json", "result.json", "stderr.txt", "cell.lock"
STOPPED = 143

# crops to measure on; steps of the additive sequence that fills a square most evenly, 1 / g and 1 / g^2 for
# g^3 = g + 1, because places drawn at random would leave 0.2 dB of chance in what is compared across programs
CROPS, CROPS_STEPS = 512, (0.7548776662466927, 0.5698402909980532)
CROPS_AT_ONCE = 64

Measurements = dict[str, float | None]


@dataclass(frozen=True)
class Result:
    """What a finished cell found.

    Attributes:
        config: of the run.
        measurements: by name: "psnr" (dB, of the mean squared error over all held-out crops), "psnr_images"
            (dB, mean over whole held-out images), "ssim", "perplexity", "usage", "bits_per_latent",
            "distortion" (latents squared), "distortion_per_bit", "seconds_per_step". None where not finite.
        version: of the package that measured.
    """

    config: TrainConfig
    measurements: Measurements
    version: str

    def save(self, folder: Path) -> None:
        """Write result.json as a whole.

        Args:
            folder: of the cell.

        Raises:
            RunError: the folder cannot be written.
        """
        content = {
            "format": FORMAT,
            "version": self.version,
            "config": json.loads(self.config.to_json()),
            "measurements": self.measurements,
        }
        replace_file(folder / RESULT, json.dumps(content, indent=1, allow_nan=False).encode())


def read_result(folder: Path, config: TrainConfig) -> Result | None:
    """Read the result of a cell, if it is there and of this configuration.

    Args:
        folder: of the cell.
        config: that the cell shall have.

    Returns:
        The result; None where there is none, or one of another version of its format or of other settings.
    """
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or content["format"] != FORMAT:
            return None
        found = TrainConfig.from_json(json.dumps(content["config"]))
        measurements = {str(name): value for name, value in content["measurements"].items()}
        result = Result(found, measurements, str(content["version"]))
    except (OSError, ValueError, KeyError, AttributeError, RunError):
        # what cannot be read is trained again
        return None
    return None if found.differences(config) else result


def run_cell(folder: Path, threads: int) -> int:
    """Train the cell whose config.json lies in a folder, or go on with it, and leave result.json.

    Args:
        folder: of the cell.
        threads: that torch may use.

    Returns:
        0 when finished, 143 when a signal stopped it with a checkpoint.

    Raises:
        RunError: the run cannot start or go on.
    """
    torch.set_num_threads(threads)
    config = TrainConfig.from_json((folder / CONFIG).read_text(encoding="utf-8"))
    # a cell that an earlier comparison left behind may still be writing its checkpoint
    with locked(folder / LOCK):
        if read_result(folder, config) is not None:
            return 0
        done = train(config, resume=True)
        if done.signal is not None:
            return STOPPED
        Result(config, measure(done.model, done.images, config), vqkernels.__version__).save(folder)
    return 0


def measure(model: ImageAutoencoder, images: ImageSet, config: TrainConfig) -> Measurements:
    """Measure a trained model on held-out images and crops, with codewords.

    Args:
        model: with an initialised quantizer.
        images: to measure on.
        config: of the run, whose log tells the seconds of a step.

    Returns:
        The measurements that `Result` lists.
    """
    whole = evaluate(model, images, limit=MOST_IMAGES)
    mse = _error(model, held_out_crops(images, config.crop))
    found = {
        "psnr": 10 * math.log10(4 / mse) if mse else math.inf,
        "psnr_images": whole.psnr,
        "ssim": whole.ssim,
        "perplexity": whole.perplexity,
        "usage": whole.usage,
        "bits_per_latent": whole.bits_per_latent,
        "distortion": whole.distortion,
        "distortion_per_bit": whole.distortion_per_bit,
        "seconds_per_step": _seconds_per_step(config),
    }
    return {
        name: value if value is not None and math.isfinite(value) else None for name, value in found.items()
    }


def held_out_crops(images: ImageSet, size: int) -> Tensor:
    """Cut the crops that all runs are measured on, spread evenly over held-out images and positions.

    Args:
        images: the held-out part is used.
        size: side of a crop, in pixels.

    Returns:
        (512, 3, size, size) float32 in [-1, 1].
    """
    few = images.spread(CROPS)
    crops = torch.empty(CROPS, 3, size, size)
    # picture after picture, for a data set of large ones does not fit into memory
    for first, held_out in enumerate(few.validation()):
        for number in range(first, CROPS, len(few.held_out)):
            top, left = (
                int((0.5 + number * step) % 1 * (side - size + 1))
                for step, side in zip(CROPS_STEPS, held_out.image.shape[1:], strict=True)
            )
            crops[number] = held_out.image[:, top : top + size, left : left + size]
    return crops


@torch.no_grad()
def _error(model: ImageAutoencoder, crops: Tensor) -> float:
    """Mean squared error of all pixels of all crops."""
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model, "codeword"):
        for batch in crops.split(CROPS_AT_ONCE):
            originals = batch.to(device)
            pixels = model(originals)[0].float().clamp(-1, 1)
            total += float((pixels - originals).double().square().sum())
    return total / crops.numel()


def _seconds_per_step(config: TrainConfig) -> float | None:
    """The median over lines of the log, without those of a warm-up, which quantizes nothing."""
    times = [
        float(seconds)
        for line in read_lines(config.metrics_path())
        if line.get("perplexity") is not None and (seconds := line.get("seconds_per_step")) is not None
    ]
    return median(times) if times else None


def stop_without_parent() -> None:
    """End this process as SIGTERM would, with a checkpoint, when whoever started it has gone."""

    def watch() -> None:
        # the pipe closes however its other end dies; sys.stdin would hold a lock that the end of python waits for
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> int:
    """Run one cell: FOLDER THREADS.

    Args:
        arguments: the two words.

    Returns:
        The exit code: 0 finished, 2 for a run that cannot be, 143 stopped.
    """
    folder, threads = arguments
    open_folder(Path(folder))
    stop_without_parent()
    try:
        return run_cell(Path(folder), int(threads))
    except RunError as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
