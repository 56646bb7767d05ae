"""Measurements as text, and the report of one run."""

import dataclasses
import inspect
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

import vqkernels
from vqkernels.train.config import TrainConfig
from vqkernels.train.data.images import ImageSet
from vqkernels.train.log import Line
from vqkernels.train.measures.evaluate import Evaluation, evaluate, reconstruct, to_pixels
from vqkernels.train.measures.held_out import quantizer_of
from vqkernels.train.measures.latents import Embedding, LatentStudy, embed
from vqkernels.train.reports.extra_plots import extras_figure
from vqkernels.train.reports.latent_plots import embedding_figure, error_figure, use_figure
from vqkernels.train.reports.pages import Illustration, Report, Table
from vqkernels.train.reports.plots import Row, png, reconstruction_figure, training_figure

# held-out images in a picture
COLUMNS = 4

_HEADINGS = (
    "model",
    "evaluation",
    "PSNR dB",
    "SSIM",
    "bits/latent",
    "bits/pixel",
    "perplexity",
    "usage",
    "quantizer time",
)
PACKAGES = ("torch", "accelerate", "numpy", "scikit-image", "scikit-learn", "matplotlib")

_NOTE = (
    "Means over whole held-out images; crop PSNR pools the squared error of all crops of the training size. "
    "Perplexity, usage and dead count the first index. Distortion is |x - z|^2 of a latent, per bit of entropy of its "
    "indices. The rate is inf, and has no distortion per bit, where indices do not determine the reconstruction."
)


def format_table(rows: Sequence[tuple[str, Evaluation, float | None]]) -> str:
    """Return a table of measurements on held-out images.

    Args:
        rows: name of the model, its measurements, and the quantizer's share of a training step or None.

    Returns:
        Aligned lines: headings, a rule, one line per row.
    """
    cells = [_HEADINGS] + [_cells(*row) for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def format_more(evaluations: Sequence[Evaluation]) -> str:
    """Return what `format_table` has no column for, one line per evaluation mode.

    Args:
        evaluations: of one model.

    Returns:
        Lines such as "codeword: 512 crops 24.28 dB, 28 dead codes, distortion 0.0213, 0.0027 per bit".
    """
    lines = []
    for found in evaluations:
        parts = [f"{found.crops} crops {found.crop_psnr:.2f} dB"] if found.crop_psnr is not None else []
        parts += [f"{found.dead_codes} dead {found.counted}", f"distortion {found.distortion:.3g}"]
        if found.distortion_per_bit is not None:
            parts.append(f"{found.distortion_per_bit:.3g} per bit")
        if found.lpips is not None:
            parts.append(f"LPIPS {found.lpips:.4f}")
        if found.rfid is not None:
            parts.append(f"rFID {found.rfid:.2f} on {found.rfid_on}")
        lines.append(f"{found.mode}: {', '.join(parts)}")
    return "\n".join(lines)


def make_report(
    model: nn.Module,
    images: ImageSet,
    config: TrainConfig,
    *,
    evaluations: Sequence[Evaluation],
    study: LatentStudy,
    lines: Sequence[Line] = (),
    step: int | None = None,
    data: str | None = None,
) -> Report:
    """Put measurements, pictures and circumstances of a run together.

    Args:
        model: with an initialised `quantizer`.
        images: the held-out part is shown.
        config: of the run.
        evaluations: one per evaluation mode, the first of which is shown.
        study: of its latents.
        lines: of its log; none for a report without training curves.
        step: of the checkpoint; that of the whole run when left out.
        data: what the images are, where they are not those of the run.

    Returns:
        The report, with its pictures drawn.
    """
    step = config.steps if step is None else step
    first = evaluations[0]
    plural = "" if first.images == 1 else "s"
    lead = (
        f"{first.images} whole held-out image{plural} and {first.crops} held-out crops of {images.crop} x "
        f"{images.crop} pixels of {data or config.data}, after {step} of {config.steps} optimizer steps."
    )
    return Report(
        title=f"{config.quantizer}, {quantizer_of(model).num_codes} codes",
        lead=lead,
        tables=[_measurements(evaluations), _of_latents(study)],
        illustrations=_illustrations(model, images, config, first, study, lines),
        configuration=_configuration(config),
        surroundings=_surroundings(next(model.parameters()).device),
    )


def _measurements(evaluations: Sequence[Evaluation]) -> Table:
    columns = {
        "evaluation": [found.mode for found in evaluations],
        "PSNR dB": [f"{found.psnr:.2f}" for found in evaluations],
        "crop PSNR dB": [_number(found.crop_psnr, ".2f") for found in evaluations],
        "SSIM": [_number(found.ssim, ".3f") for found in evaluations],
        "LPIPS": [_number(found.lpips, ".4f") for found in evaluations],
        "rFID": [_number(found.rfid, ".2f") for found in evaluations],
        "bits/latent": [_number(found.bits_per_latent, ".2f") for found in evaluations],
        "bits/pixel": [_number(found.bits_per_pixel, ".3f") for found in evaluations],
        "perplexity": [f"{found.perplexity:.1f}" for found in evaluations],
        "usage": [f"{found.usage:.1%} of {found.counted}" for found in evaluations],
        "dead": [str(found.dead_codes) for found in evaluations],
        "distortion": [f"{found.distortion:.4g}" for found in evaluations],
        "per bit": [_number(found.distortion_per_bit, ".3g") for found in evaluations],
    }
    shown = {name: cells for name, cells in columns.items() if set(cells) != {"-"}}
    note = _NOTE
    if evaluations[0].rfid is not None:
        note += f" rFID is taken over {evaluations[0].rfid_on}."
    return Table("Held-out measurements", list(shown), list(zip(*shown.values(), strict=True)), note)


def _of_latents(study: LatentStudy) -> Table:
    rows = [
        ("latents counted", f"{study.total}"),
        ("gradient gap, |g - g0|^2 over the encoder's parameters", _number(study.gradient_gap, ".4g")),
        ("divergence, mean |x - nearest code|^2", _number(study.divergence, ".4g")),
    ]
    return Table("Latents", (), rows, "On held-out crops, codes as in evaluation mode codeword.")


def _illustrations(
    model: nn.Module,
    images: ImageSet,
    config: TrainConfig,
    first: Evaluation,
    study: LatentStudy,
    lines: Sequence[Line],
) -> list[Illustration]:
    shown = list(images.validation(COLUMNS))
    originals = {one.name: to_pixels(one.image) for one in shown}
    made = reconstruct(model, shown, mode=first.mode)
    each = [evaluate(model, images.only(n), mode=first.mode, ssim=False) for n in range(len(shown))]
    captions = [f"PSNR {one.psnr:.2f} dB, {one.bits_per_pixel:g} bits per pixel" for one in each]
    rows = [Row(config.quantizer, made, captions)]
    embedding = embed(study)
    found = [
        Illustration(
            "Reconstructions",
            f"Held-out images above what the decoder makes of their codes, in evaluation mode {first.mode}.",
            png(reconstruction_figure(originals, rows)),
        ),
        Illustration(
            "Errors",
            "Root of the mean squared error over the channels of each pixel, in 8-bit levels; one scale for all.",
            png(error_figure(originals, made)),
        ),
        Illustration(
            "Codebook use",
            f"How often each code is chosen for {study.total} latents of held-out crops, in the order of use.",
            png(use_figure([stage.numpy() for stage in study.counts])),
        ),
        Illustration("Latent space", _embedding_caption(study, embedding), png(embedding_figure(embedding))),
    ]
    if lines:
        text = "Loss, PSNR, perplexity and usage against the optimizer step, as metrics.jsonl holds them."
        picture = png(training_figure({config.quantizer: lines}))
        found.insert(0, Illustration("Training", text, picture))
        extras = extras_figure(lines)
        if extras is not None:
            text = "What this training logs besides, means over the steps since the last line."
            found.insert(1, Illustration("Further training curves", text, png(extras)))
    return found


def _configuration(config: TrainConfig) -> list[Table]:
    """One table per class that options come from."""
    groups: dict[type, list[tuple[str, str]]] = {}
    owners = [base for base in type(config).__mro__ if dataclasses.is_dataclass(base)]
    for field in dataclasses.fields(config):
        owner = next(base for base in reversed(owners) if field.name in inspect.get_annotations(base))
        groups.setdefault(owner, []).append((field.name, str(getattr(config, field.name))))
    return [Table(str(vars(owner).get("title", owner.__name__)), (), rows) for owner, rows in groups.items()]


def _surroundings(device: torch.device) -> Table:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    rows = [
        ("vqkernels", vqkernels.__version__),
        ("Python", platform.python_version()),
        *((package, _version(package)) for package in PACKAGES),
        ("device", f"{device.type}, {name}"),
        ("threads", str(torch.get_num_threads())),
        ("system", f"{platform.system()} {platform.release()}"),
    ]
    return Table("Versions and machine", (), rows)


def _embedding_caption(study: LatentStudy, embedding: Embedding) -> str:
    text = f"t-SNE of {len(study.latents)} latents of held-out crops"
    if embedding.codes is None:
        return f"{text}; this quantizer has no table of codes."
    shown = len(embedding.codes)
    codes = (
        f"all {shown} codes" if shown == embedding.num_codes else f"{shown} of {embedding.num_codes} codes"
    )
    stage = " of the first stage" if len(study.counts) > 1 else ""
    return f"{text} and {codes}{stage}, laid out together; a code's area grows with its use."


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cells(name: str, found: Evaluation, share: float | None) -> tuple[str, ...]:
    return (
        name,
        found.mode,
        f"{found.psnr:.2f}",
        "-" if found.ssim is None else f"{found.ssim:.3f}",
        f"{found.bits_per_latent:.2f}",
        f"{found.bits_per_pixel:.3f}",
        f"{found.perplexity:.1f}",
        f"{found.usage:.0%} of {found.counted}",
        "-" if share is None else f"{share:.0%}",
    )
