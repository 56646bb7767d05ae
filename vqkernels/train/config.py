"""One run in one frozen dataclass: the command line, and what a checkpoint remembers."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from vqkernels.checks import check_choice, check_count, check_noise_std, refuse
from vqkernels.nn import METHODS, Method

if TYPE_CHECKING:
    QuantizerName = str
else:
    QuantizerName = Literal[tuple(METHODS)]
Upkeep = Literal["paper", "none", "replacement", "warmup", "both"]
Precision = Literal["no", "fp16", "bf16"]

# fields that change neither the weights a run ends with nor the numbers it measures
FREE_FIELDS = frozenset({"out", "checkpoint_every", "log_every", "evaluate_every"})


class RunError(RuntimeError):
    """A run cannot start, continue or be read; the message says why and what to do."""


@dataclass(frozen=True)
class TrainConfig:
    """Train a VQ-VAE: every field is a flag, and the checkpoint stores them all."""

    quantizer: QuantizerName = "sf_diveq"
    """How latents become codes and gradients come back."""

    num_codes: int = 256
    """Codes in the codebook, K."""

    latent_dim: int = 32
    """Features of a latent and of a code, D."""

    noise_std: float = 1e-3**0.5
    """Standard deviation of the direction noise of the DiVeQ family, in units of a latent."""

    upkeep: Upkeep = "paper"
    """Keeping codes alive. paper: what the method's paper does, such as a warm-up for sf_*, replacement for diveq*."""

    warmup: float = 0.1
    """Fraction of the steps without quantization; the codes then start as means of recent latents."""

    width: int = 64
    """Channels of the hidden layers."""

    downsamplings: int = 2
    """How often height and width are halved; a latent covers 2^downsamplings pixels squared."""

    residual_blocks: int = 2
    """Residual blocks in the encoder, and as many in the decoder."""

    data: str = "photos"
    """photos: the scenes inside scikit-image; else a folder of images, or of CIFAR-10's Python files."""

    crop: int = 32
    """Height and width of a training crop, in pixels."""

    augment: bool = True
    """Half of the crops are mirrored and the exposure of all is changed a little; the flag switches it off."""

    batch_size: int = 64
    """Crops in a step, over all processes together."""

    steps: int = 1200
    """Optimizer steps; the learning rate, warm-up and replacement follow fractions of it."""

    lr: float = 5.5e-4
    """Learning rate of Adam, halved at 40 % and again at 70 % of the steps."""

    precision: Precision = "no"
    """Mixed precision, through Accelerate."""

    seed: int = 0
    """Seed of the weights, the crops and the noise."""

    out: str = "runs/train"
    """Folder for checkpoint.pt and metrics.jsonl."""

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
        name = "train"
        check_choice(name, "quantizer", self.quantizer, tuple(METHODS))
        check_choice(name, "upkeep", self.upkeep, get_args(Upkeep))
        check_choice(name, "precision", self.precision, get_args(Precision))
        check_count(name, "num_codes", self.num_codes, minimum=2 if self.method.segments else 1)
        for field in ("latent_dim", "width", "crop", "batch_size", "steps"):
            check_count(name, field, getattr(self, field), minimum=1)
        for field in ("checkpoint_every", "log_every", "evaluate_every"):
            check_count(name, field, getattr(self, field), minimum=1)
        check_count(name, "downsamplings", self.downsamplings, maximum=16)
        for field in ("residual_blocks", "seed"):
            check_count(name, field, getattr(self, field))
        if not (math.isfinite(self.lr) and self.lr > 0):
            refuse(ValueError, name, "lr", "be finite and above 0", self.lr, "Pass a rate such as 5.5e-4")
        check_noise_std(name, self.noise_std)
        if not 0 < self.warmup < 1:
            refuse(
                ValueError,
                name,
                "warmup",
                "be a fraction between 0 and 1",
                self.warmup,
                "Pass, for example, 0.2",
            )
        if not self.data or not self.out:
            field = "out" if self.data else "data"
            refuse(ValueError, name, field, "name a folder", "an empty string", f"Pass --{field} FOLDER")
        if not self.method.upkeep and self.upkeep not in ("paper", "none"):
            requirement = f"be paper or none for {self.quantizer}, which has no codes to keep alive"
            refuse(ValueError, name, "upkeep", requirement, self.upkeep, "Leave --upkeep out")
        if self.replaces and self.method.segments:
            requirement = (
                f"be paper, warmup or none for {self.quantizer}, whose training indices are segments"
            )
            refuse(ValueError, name, "upkeep", requirement, self.upkeep, "Leave --upkeep out")
        if self.crop % self.factor:
            requirement = f"be a multiple of 2^downsamplings = {self.factor}"
            fix = (
                f"Pass --crop {max(1, round(self.crop / self.factor)) * self.factor} or fewer down-samplings"
            )
            refuse(ValueError, name, "crop", requirement, self.crop, fix)
        latents = self.warmup_steps * self.batch_size * (self.crop // self.factor) ** 2
        if self.warms_up and latents < self.num_codes:
            requirement = f"leave at least num_codes = {self.num_codes} latents to start the codes from"
            got = f"{self.warmup_steps} steps with {latents} latents"
            refuse(ValueError, name, "warmup", requirement, got, "Pass more --steps or a larger --batch-size")

    @property
    def method(self) -> Method:
        """The line of the table that `quantizer` names."""
        return METHODS[self.quantizer]

    @property
    def factor(self) -> int:
        """Pixels along one side of what a latent covers."""
        return 2**self.downsamplings

    @property
    def warms_up(self) -> bool:
        """Whether the run starts without quantization."""
        return self.upkeep in ("warmup", "both") or (self.upkeep == "paper" and self.method.warm_up)

    @property
    def warmup_steps(self) -> int:
        """Steps without quantization, 0 for none."""
        return max(1, round(self.warmup * self.steps)) if self.warms_up else 0

    @property
    def replaces(self) -> bool:
        """Whether unused codes are replaced."""
        return self.upkeep in ("replacement", "both") or (self.upkeep == "paper" and self.method.replace)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of one step: halved at 40 % and at 70 % of the run (DiVeQ).

        Args:
            step: 0-based step.

        Returns:
            The rate.
        """
        return self.lr * (1.0 if step < 0.4 * self.steps else 0.5 if step < 0.7 * self.steps else 0.25)

    def to_json(self) -> str:
        """Return the configuration as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "TrainConfig":
        """Read what `to_json` wrote.

        Args:
            text: one JSON object with exactly the fields of this class.

        Returns:
            The configuration.

        Raises:
            RunError: if the text is not such an object, or a value is out of range.
        """
        fix = "Use the version of vqkernels that wrote it"
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            refuse(RunError, "TrainConfig", "configuration", "be JSON", error.msg, fix)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            got = sorted(set(values) ^ names) if isinstance(values, Mapping) else type(values).__name__
            requirement = "have exactly the fields of this version"
            refuse(RunError, "TrainConfig", "configuration", requirement, f"a difference in {got}", fix)
        return cls(**values)

    def differences(self, other: "TrainConfig") -> list[str]:
        """Name the fields that make two runs different.

        Args:
            other: a configuration to compare with.

        Returns:
            "field (this value, other value)" for every field outside `FREE_FIELDS` that differs.
        """
        return [
            f"{field.name} ({getattr(self, field.name)!r}, {getattr(other, field.name)!r})"
            for field in dataclasses.fields(self)
            if field.name not in FREE_FIELDS and getattr(self, field.name) != getattr(other, field.name)
        ]

    def checkpoint_path(self) -> Path:
        """Return where the run keeps its checkpoint."""
        return Path(self.out) / "checkpoint.pt"

    def metrics_path(self) -> Path:
        """Return where the run keeps its log, one JSON object per line."""
        return Path(self.out) / "metrics.jsonl"
