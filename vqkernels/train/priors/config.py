"""One training of a prior in one frozen dataclass, and the papers' settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from vqkernels.checks import check_choice, check_count, check_flag, check_number, refuse
from vqkernels.train.config import RunError, StoredConfig

PriorName = Literal["gpt", "maskgit"]
Precision = Literal["no", "fp16", "bf16"]
PresetName = Literal["small", "gpt-diveq", "gpt-diveq-afhq", "maskgit-slim"]

# what tokens a run is of is compared by their key, whatever the paths are
TOKEN_FIELDS = frozenset({"checkpoint", "data", "crop", "stride", "cache"})
FREE_FIELDS = TOKEN_FIELDS | {"out", "checkpoint_every", "log_every", "evaluate_every"}


@dataclass(frozen=True)
class PriorConfig(StoredConfig):
    """Train a prior over the tokens of an autoencoder: every field is a flag, and the checkpoint stores them all."""

    free: ClassVar[frozenset[str]] = FREE_FIELDS

    checkpoint: str = "runs/train"
    """Checkpoint of the autoencoder whose tokens are learned, or the folder of its run for the newest."""

    data: str | None = None
    """Other images than those of the autoencoder."""

    crop: int | None = None
    """Side of a crop that is one sequence, in pixels; that of the autoencoder when left out."""

    stride: int | None = None
    """Pixels between crops in a grid over each picture, 0 for its middle; half a crop on photos when left out, else 0."""

    cache: str = "runs/tokens"
    """Folder where tokens are kept."""

    model: PriorName = "gpt"
    """gpt: one token after the other. maskgit: many at once, the surest first."""

    layers: int = 6
    """Transformer blocks."""

    heads: int = 8
    """Attention heads in a block."""

    width: int = 256
    """Features of a token inside."""

    dropout: float = 0.1
    """Probability of dropout."""

    conditional: bool = False
    """Learn the images of each class; the data must have classes."""

    keep_start: float | None = None
    """Probability p_keep that a token shown is the true one, at the first step; else it is any. 0.5 for gpt when left
    out; 1 for maskgit, which hides tokens instead."""

    keep_end: float | None = None
    """The same at the last step, 0.95 for gpt and 1 for maskgit when left out; in between it changes evenly."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all codes; 0.1 in MaskGIT."""

    batch_size: int = 32
    """Sequences in a step, over all processes together."""

    steps: int = 2000
    """Optimizer steps."""

    lr: float = 3e-4
    """Highest learning rate of AdamW."""

    rise: float = 0.05
    """Fraction of the steps in which the learning rate grows evenly from near 0."""

    final_lr: float = 0.01
    """Learning rate of the last step in units of --lr; a cosine leads there."""

    beta1: float = 0.9
    """First decay of AdamW."""

    beta2: float = 0.95
    """Second decay of AdamW."""

    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices alone."""

    clip: float = 1.0
    """Largest norm of the gradient, 0 for any."""

    precision: Precision = "no"
    """Mixed precision, through Accelerate."""

    seed: int = 0
    """Seed of the weights, the batches and the noise."""

    out: str = "runs/prior"
    """Folder for prior.pt, prior.previous.pt and metrics.jsonl."""

    checkpoint_every: int = 100
    """Steps between checkpoints."""

    log_every: int = 20
    """Steps between lines of metrics.jsonl; a line holds means over the steps since the last."""

    evaluate_every: int = 100
    """Steps between measurements on held-out images."""

    def __post_init__(self) -> None:
        """Refuse values no run can have.

        Raises:
            RunError: if a field has the wrong type or is out of range, or two fields do not fit together.
        """
        try:
            self._check()
        except (TypeError, ValueError) as error:
            raise RunError(str(error)) from error

    def _check(self) -> None:
        name = "prior"
        check_choice(name, "model", self.model, get_args(PriorName))
        check_choice(name, "precision", self.precision, get_args(Precision))
        for field in ("layers", "heads", "width", "batch_size", "steps"):
            check_count(name, field, getattr(self, field), minimum=1)
        for field in ("checkpoint_every", "log_every", "evaluate_every"):
            check_count(name, field, getattr(self, field), minimum=1)
        check_count(name, "seed", self.seed)
        check_flag(name, "conditional", self.conditional)
        for field in ("dropout", "label_smoothing", "beta1", "beta2"):
            check_number(name, field, getattr(self, field), below=1)
        for field in ("rise", "final_lr"):
            check_number(name, field, getattr(self, field), up_to=1)
        for field in ("keep_start", "keep_end"):
            if getattr(self, field) is not None:
                check_number(name, field, getattr(self, field), up_to=1)
        for field in ("lr", "weight_decay", "clip"):
            check_number(name, field, getattr(self, field))
        if self.lr == 0:
            refuse(ValueError, name, "lr", "be above 0", self.lr, "Pass a rate such as 3e-4")
        if self.width % self.heads:
            fix = f"Pass --width {math.ceil(self.width / self.heads) * self.heads}"
            refuse(ValueError, name, "width", f"be a multiple of heads = {self.heads}", self.width, fix)
        for field in ("checkpoint", "cache", "out"):
            if not getattr(self, field):
                refuse(ValueError, name, field, "name a path", "an empty string", f"Pass --{field} PATH")

    def lr_at(self, step: int) -> float:
        """Return the learning rate of one step: a linear rise, then a cosine to `final_lr` (DiVeQ, A.2).

        Args:
            step: 0-based step.

        Returns:
            The rate.
        """
        rising = round(self.rise * self.steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - 1 - rising)
        return self.lr * (self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2)

    def keep_at(self, step: int) -> float:
        """Return p_keep of one step, evenly from `keep_start` to `keep_end` (DiVeQ, A.2; MaskGIT has none).

        Args:
            step: 0-based step.

        Returns:
            The probability.
        """
        done = step / max(1, self.steps - 1)
        first, last = (0.5, 0.95) if self.model == "gpt" else (1.0, 1.0)
        first = first if self.keep_start is None else self.keep_start
        last = last if self.keep_end is None else self.keep_end
        return first * (1 - done) + last * done

    def checkpoint_path(self) -> Path:
        """Return where the run keeps its checkpoint."""
        return Path(self.out) / "prior.pt"

    def metrics_path(self) -> Path:
        """Return where the run keeps its log, one JSON object per line."""
        return Path(self.out) / "metrics.jsonl"


# table 4 and appendix A.2 of DiVeQ, whose warm-up is 10000 steps; the slim MaskGIT of MQ with the optimizer of
# Chang et al. 2022, A.2
PRESETS: Mapping[str, PriorConfig] = {
    "small": PriorConfig(),
    "gpt-diveq": PriorConfig(
        layers=28, heads=16, width=1024, batch_size=32, lr=4.5e-5, steps=500_000, rise=0.02
    ),
    "gpt-diveq-afhq": PriorConfig(
        layers=20, heads=16, width=768, batch_size=32, lr=4.5e-5, steps=100_000, rise=0.1
    ),
    "maskgit-slim": PriorConfig(
        model="maskgit",
        layers=8,
        heads=8,
        width=768,
        label_smoothing=0.1,
        batch_size=256,
        lr=1e-4,
        beta2=0.96,
        weight_decay=0.045,
        steps=100_000,
    ),
}
