"""The command `evaluate`."""

from pathlib import Path

from vqkernels.checks import refuse
from vqkernels.train.config import RunError


def evaluate(checkpoint: Path, data: str | None = None, picture: Path | None = None) -> int:
    """Measure a checkpoint on whole held-out images, in every evaluation mode.

    Args:
        checkpoint: A checkpoint, or the folder of a run, which gives its newest.
        data: Other images; of a folder every tenth is held out and measured, as in training. Those of the run
            when left out.
        picture: Also draw the first reconstructions into this PNG.
    """
    from vqkernels.train.demo import draw_models, reconstruction_row
    from vqkernels.train.evaluate import evaluate as measure
    from vqkernels.train.evaluate import modes_of
    from vqkernels.train.files import open_folder
    from vqkernels.train.report import format_table
    from vqkernels.train.restore import load_run

    if picture is not None:
        if picture.suffix.lower() != ".png" or picture.is_dir():
            refuse(RunError, "evaluate", "picture", "name a .png file", picture, "Pass --picture FILE.png")
        open_folder(picture.parent, "picture")
    model, images, config = load_run(checkpoint, data)
    found = [measure(model, images, mode=mode) for mode in modes_of(model)]
    plural = "" if found[0].images == 1 else "s"
    print(f"{found[0].images} whole held-out image{plural} of {data or config.data}")
    print(format_table([(config.quantizer, one, None) for one in found]))
    if picture is not None:
        draw_models(picture, images, [reconstruction_row(config.quantizer, model, images)])
        print(f"picture: {picture}")
    return 0
