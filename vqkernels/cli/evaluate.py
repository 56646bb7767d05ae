"""The command `evaluate`."""

from pathlib import Path

from vqkernels.checks import check_count, refuse
from vqkernels.train.config import RunError

CROPS = 512


def evaluate(
    checkpoint: Path,
    data: str | None = None,
    picture: Path | None = None,
    report: Path | None = None,
    lpips: str | None = None,
    inception: Path | None = None,
    crops: int = CROPS,
) -> int:
    """Measure a checkpoint on held-out images, whole and in crops, in every evaluation mode.

    Args:
        checkpoint: A checkpoint, or the folder of a run, which gives its newest.
        data: Other images; of a folder every tenth is held out and measured, as in training. Those of the run
            when left out.
        picture: Also draw the first reconstructions into this PNG.
        report: Also write a report with pictures: one .html file, or .md and a folder of PNGs beside it.
        lpips: File with the weights of LPIPS: torchvision's VGG-16 and the linear layers, in one or, comma between,
            in two.
        inception: File with a network of image features for rFID: TorchScript such as inception-2015-12-05.pt, or
            torch.export ending in .pt2; uint8 images in, features out. It must be a file you trust.
        crops: Held-out crops of the training size to measure as well; rFID is taken over them where there are fewer
            whole images than features.
    """
    from vqkernels.train.checkpoints.checkpoint import load_checkpoint
    from vqkernels.train.checkpoints.files import open_folder
    from vqkernels.train.checkpoints.restore import load_run
    from vqkernels.train.demo import draw_models, reconstruction_row
    from vqkernels.train.learners.losses import load_lpips
    from vqkernels.train.log import read_lines
    from vqkernels.train.measures.evaluate import evaluate as measure
    from vqkernels.train.measures.evaluate import modes_of
    from vqkernels.train.measures.fidelity import FeatureNet
    from vqkernels.train.measures.latents import study_latents
    from vqkernels.train.reports.pages import check_report_path, write_report
    from vqkernels.train.reports.report import format_more, format_table, make_report

    try:
        check_count("evaluate", "crops", crops, minimum=1)
    except ValueError as error:
        raise RunError(str(error)) from error
    if picture is not None:
        if picture.suffix.lower() != ".png" or picture.is_dir():
            refuse(RunError, "evaluate", "picture", "name a .png file", picture, "Pass --picture FILE.png")
        open_folder(picture.parent, "picture")
    if report is not None:
        check_report_path(report)
    model, images, config = load_run(checkpoint, data)
    device = next(model.parameters()).device
    perceptual = None
    if lpips is not None:
        perceptual = load_lpips(lpips).to(device).eval()
    features = None if inception is None else FeatureNet.from_file(inception, device)
    found = [
        measure(model, images, mode=mode, crops=crops, lpips=perceptual, features=features)
        for mode in modes_of(model)
    ]
    plural = "" if found[0].images == 1 else "s"
    print(f"{found[0].images} whole held-out image{plural} of {data or config.data}")
    print(format_table([(config.quantizer, one, None) for one in found]))
    print(format_more(found))
    if picture is not None:
        draw_models(picture, images, [reconstruction_row(config.quantizer, model, images)])
        print(f"picture: {picture}")
    if report is not None:
        # a checkpoint lies in a folder of the run's, or is the run's folder
        places = (checkpoint, checkpoint.parent, checkpoint.parent.parent)
        log = next((p / "metrics.jsonl" for p in places if (p / "metrics.jsonl").is_file()), places[-1])
        study = study_latents(model, images, crops=crops)
        page = make_report(
            model,
            images,
            config,
            evaluations=found,
            study=study,
            lines=read_lines(log) if log.is_file() else (),
            step=load_checkpoint(checkpoint).step,
            data=data,
        )
        write_report(report, page)
        print(f"report: {report}" + ("" if log.is_file() else f" (no training curves: {log} is missing)"))
    return 0
