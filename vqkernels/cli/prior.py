"""The commands `tokens`, `prior` and `sample`."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vqkernels.cli.console import stopped, tell
from vqkernels.cli.recipes import named
from vqkernels.train.priors.config import PRESETS, PresetName, PriorConfig


def tokens(
    checkpoint: Path,
    data: str | None = None,
    crop: int | None = None,
    stride: int | None = None,
    cache: Path = Path("runs/tokens"),
) -> int:
    """Encode a whole image set and keep its tokens on the disk; what is there already is not encoded again.

    Args:
        checkpoint: Checkpoint of the autoencoder.
        data: Other images than those of the autoencoder.
        crop: Side of a crop, in pixels; that of the autoencoder when left out.
        stride: Pixels between crops in a grid over each picture, 0 for its middle alone; half a crop on photos
            when left out, else 0.
        cache: Folder where tokens are kept.
    """
    from vqkernels.train.priors.tokens import open_tokens

    found = open_tokens(checkpoint, cache, data=data, crop=crop, stride=stride, say=_say)
    height, width, codes = found.grid
    classes = f", {found.num_classes} classes" if found.num_classes else ""
    print(
        f"{len(found.train)} crops to train on, {len(found.held_out)} held out, each {height}x{width}x{codes}"
    )
    print(f"tokens below {found.num_codes}{classes}: {cache / found.key}")
    return 0


def prior_command(words: Sequence[str]) -> Callable[..., int]:
    """Return the command `prior` with the options of a recipe as its defaults.

    Args:
        words: of the command line after `prior`, which may name the recipe.
    """
    start = PRESETS[named(words, PRESETS)[0]]

    def prior(
        config: Annotated[PriorConfig, tyro.conf.arg(name="")] = start,
        preset: PresetName = "small",
        resume: bool = False,
    ) -> int:
        """Train a prior over the tokens of an autoencoder; leaves prior.pt and a log in --out.

        Args:
            config: Options.
            preset: Recipe of a paper whose options are the defaults here; --help after it shows them.
            resume: Go on from the checkpoint in --out, or start where there is none.
        """
        return run(config, resume=resume)

    return prior


def run(config: PriorConfig, *, resume: bool) -> int:
    """Train a prior and say where it is.

    Args:
        config: of the run.
        resume: whether to go on from a checkpoint.
    """
    from vqkernels.train.priors.prior import train_prior

    terminal = sys.stderr.isatty()
    result = train_prior(
        config, resume=resume, progress=terminal, on_line=None if terminal else tell, say=_say
    )
    if not result.main:
        return 0
    if result.signal is not None:
        where = f"{config.checkpoint_path()} holds step {result.step}; --resume goes on"
        return stopped(result.signal, where)
    print(f"prior: {config.checkpoint_path()} after {result.step} steps; log: {config.metrics_path()}")
    return 0


def sample(
    prior: Path,
    picture: Path = Path("samples.png"),
    checkpoint: Path | None = None,
    count: int = 16,
    classes: tuple[int, ...] | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    iterations: int = 12,
    choice_temperature: float = 4.5,
    seed: int = 0,
    batch_size: int = 64,
) -> int:
    """Draw images from a trained prior into one PNG, a row for each class where it has classes.

    Args:
        prior: The prior.pt of a run of `prior`.
        picture: PNG to write.
        checkpoint: Checkpoint of the autoencoder, where it was moved since.
        count: Images, of each class where there are classes.
        classes: Numbers of the classes to draw; all when left out.
        temperature: Divides the logits; lower is safer and less varied.
        top_k: Draw only among the k likeliest codes.
        iterations: Iterations of MaskGIT.
        choice_temperature: Noise in MaskGIT's choice of what to keep.
        seed: Seed of the draws.
        batch_size: Images drawn together.
    """
    from vqkernels.train.priors.sampling import SampleOptions, sample_grid

    options = SampleOptions(
        count, classes, temperature, top_k, iterations, choice_temperature, seed, batch_size
    )
    rows, columns = sample_grid(prior, picture, options, checkpoint=checkpoint)
    print(f"{rows} x {columns} images: {picture}")
    return 0


def _say(sentence: str) -> None:
    print(sentence, flush=True)
