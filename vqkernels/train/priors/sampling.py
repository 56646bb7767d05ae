"""From a prior to pictures: tokens, latents, images, a grid."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqkernels.checks import check_count, check_number, refuse
from vqkernels.models import ImageAutoencoder
from vqkernels.models.priors import MaskGITPrior
from vqkernels.train.checkpoints.checkpoint import find_checkpoint
from vqkernels.train.checkpoints.files import open_folder, replace_file
from vqkernels.train.checkpoints.restore import load_model
from vqkernels.train.config import RunError
from vqkernels.train.measures.evaluate import to_pixels
from vqkernels.train.priors.prior import LoadedPrior, load_prior
from vqkernels.train.priors.token_key import file_digest

# between the pictures of a grid, in pixels and white
GAP = 2
BACKGROUND = 255


@dataclass(frozen=True)
class SampleOptions:
    """How images are drawn.

    Attributes:
        count: images, or images of each class from a prior with classes.
        classes: which to draw, in this order; None for all.
        temperature: divides the logits of the codes.
        top_k: only the k likeliest codes are drawn; None for all.
        iterations: of MaskGIT.
        choice_temperature: of the noise in MaskGIT's choice of what to keep.
        seed: of the draws.
        batch_size: images drawn together.
    """

    count: int = 16
    classes: Sequence[int] | None = None
    temperature: float = 1.0
    top_k: int | None = None
    iterations: int = 12
    choice_temperature: float = 4.5
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        """Refuse values that nothing can be drawn with.

        Raises:
            RunError: if a field has the wrong type or is out of range.
        """
        try:
            for field in ("count", "iterations", "batch_size"):
                check_count("sample", field, getattr(self, field), minimum=1)
            check_count("sample", "seed", self.seed, maximum=2**63 - 1)
            if self.top_k is not None:
                check_count("sample", "top_k", self.top_k, minimum=1)
            check_number("sample", "choice_temperature", self.choice_temperature)
            if check_number("sample", "temperature", self.temperature) == 0:
                refuse(
                    ValueError, "sample", "temperature", "be above 0", 0, "Pass --top-k 1 for the likeliest"
                )
        except (TypeError, ValueError) as error:
            raise RunError(str(error)) from error


def sample_grid(
    prior_path: Path, picture: Path, options: SampleOptions, *, checkpoint: Path | None = None
) -> tuple[int, int]:
    """Draw images and write them into one PNG; a prior with classes has a row for each.

    Args:
        prior_path: prior.pt of a run.
        picture: PNG to write.
        options: of the draws.
        checkpoint: of the autoencoder, where it no longer lies where the prior was trained with it.

    Returns:
        Rows and columns of the grid.

    Raises:
        RunError: if a file cannot be used, or the autoencoder is another than the prior's.
    """
    if picture.suffix.lower() != ".png" or picture.is_dir():
        refuse(RunError, "sample", "picture", "name a .png file", picture, "Pass --picture FILE.png")
    loaded = load_prior(prior_path)
    path = find_checkpoint(Path(loaded.config.checkpoint) if checkpoint is None else checkpoint)
    model = load_model(path)[0]
    if file_digest(path) != loaded.checkpoint_digest:
        fix = "Pass --checkpoint with the file the prior was trained with, or train the prior again"
        requirement = f"be the autoencoder that {prior_path} was trained with"
        refuse(RunError, "sample", "checkpoint", requirement, f"another one, {path}", fix)
    open_folder(picture.parent, "picture")
    device = next(model.parameters()).device
    loaded.prior.to(device)
    classes = _classes(loaded, options)
    images = [to_pixels(image) for image in decode_tokens(model, draw(loaded, options, classes))]
    columns = options.count if classes else math.ceil(math.sqrt(len(images)))
    buffer = io.BytesIO()
    Image.fromarray(tile(images, columns)).save(buffer, format="PNG")
    replace_file(picture, buffer.getbuffer())
    return math.ceil(len(images) / columns), columns


def draw(loaded: LoadedPrior, options: SampleOptions, classes: Sequence[int] = ()) -> Tensor:
    """Draw the tokens of images.

    Args:
        loaded: the prior.
        options: of the draws.
        classes: to draw `options.count` images of each; none for a prior without classes.

    Returns:
        (n, h, w, Q) int64, class after class.
    """
    prior = loaded.prior
    labels = torch.tensor(classes, dtype=torch.int64).repeat_interleave(options.count).to(prior.device)
    total = len(labels) if classes else options.count
    generator = torch.Generator(prior.device).manual_seed(options.seed)
    parts: list[Tensor] = []
    for first in range(0, total, options.batch_size):
        count = min(options.batch_size, total - first)
        of = labels[first : first + count] if classes else None
        if isinstance(prior, MaskGITPrior):
            tokens = prior.sample(
                count,
                of,
                temperature=options.temperature,
                top_k=options.top_k,
                generator=generator,
                iterations=options.iterations,
                choice_temperature=options.choice_temperature,
            )
        else:
            tokens = prior.sample(
                count, of, temperature=options.temperature, top_k=options.top_k, generator=generator
            )
        parts.append(tokens.view(count, *loaded.grid))
    return torch.cat(parts)


@torch.no_grad()
def decode_tokens(model: ImageAutoencoder, tokens: Tensor, *, batch_size: int = 64) -> Tensor:
    """Return the images that tokens stand for.

    Args:
        model: the autoencoder; its training flag is left as it was.
        tokens: (n, h, w, Q) int64.
        batch_size: images decoded together.

    Returns:
        (n, C, H, W) in about [-1, 1].
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        return torch.cat(
            [
                model.decode(model.quantizer.decode(part.to(device)).permute(0, 3, 1, 2))
                for part in tokens.split(batch_size)
            ]
        )
    finally:
        model.train(training)


def tile(images: Sequence[NDArray[np.uint8]], columns: int) -> NDArray[np.uint8]:
    """Put images of one size side by side, row by row.

    Args:
        images: (H, W, 3) uint8 each.
        columns: images in a row.

    Returns:
        One (H', W', 3) uint8 image; what the last row lacks is white, as the gaps are.
    """
    height, width, channels = images[0].shape
    rows = math.ceil(len(images) / columns)
    shape = (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels)
    grid = np.full(shape, BACKGROUND, dtype=np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + GAP), (number % columns) * (width + GAP)
        grid[top : top + height, left : left + width] = image
    return grid


def _classes(loaded: LoadedPrior, options: SampleOptions) -> list[int]:
    most = loaded.prior.num_classes
    if options.classes is None:
        return list(range(most))
    if not most:
        fix = "Leave --classes out, or train the prior with --conditional"
        refuse(RunError, "sample", "classes", "be left out for a prior without classes", options.classes, fix)
    if not options.classes or not all(0 <= one < most for one in options.classes):
        got = list(options.classes)
        refuse(RunError, "sample", "classes", f"be classes from 0 to {most - 1}", got, "Pass such --classes")
    return list(options.classes)
