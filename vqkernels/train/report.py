"""Measurements as text."""

from collections.abc import Sequence

from vqkernels.train.evaluate import Evaluation

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
