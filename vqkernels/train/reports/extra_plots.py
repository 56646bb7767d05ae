"""What the log of some trainings holds beside loss and PSNR: Meta-Quantization's gradients, the game of a VQGAN."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from vqkernels.train.log import Line
from vqkernels.train.reports.plots import DPI


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: above it.
        unit: of the vertical axis.
        curves: labels by keys of a log's lines.
        log: whether the axis is logarithmic.
    """

    title: str
    unit: str
    curves: Mapping[str, str]
    log: bool = False


PANELS = (
    Panel(
        "Hypergradient (MQ figure 4)",
        "length of the gradient",
        {"direct_norm": "direct", "indirect_norm": "indirect"},
        log=True,
    ),
    Panel("Their angle", "cosine", {"cosine": "direct, indirect"}),
    Panel("Discriminator", "loss", {"discriminator_loss": "discriminator"}),
    Panel("Its verdicts", "mean logit", {"logits_real": "images", "logits_fake": "reconstructions"}),
    Panel("Weight of the game", "adversarial weight x adaptive weight", {"gan_weight": "weight"}, log=True),
    Panel("Perceptual distance", "LPIPS", {"perceptual": "training crops"}),
)


def extras_figure(lines: Sequence[Line]) -> Figure | None:
    """Show what a log holds beside loss and PSNR, each against the step.

    Args:
        lines: of metrics.jsonl.

    Returns:
        The figure, or None where the log holds no more.
    """
    train = [line for line in lines if line["split"] == "train"]
    panels = [panel for panel in PANELS if any(_points(train, key) for key in panel.curves)]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        for key, label in panel.curves.items():
            points = _points(train, key)
            axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1, label=label)
        positive = all(y > 0 for key in panel.curves for _, y in _points(train, key))
        axes.set(title=panel.title, ylabel=panel.unit, xlabel="optimizer step")
        axes.set_yscale("log" if panel.log and positive else "linear")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    return figure


def _points(lines: Sequence[Line], key: str) -> list[tuple[float, float]]:
    return [(float(line["step"] or 0), float(v)) for line in lines if (v := line.get(key)) is not None]
