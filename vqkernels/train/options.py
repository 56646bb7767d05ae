"""The options of a run, grouped by what they change; the command line shows them in these groups."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from vqkernels.checks import check_choice, check_count, check_noise_std, refuse
from vqkernels.nn import METHODS

if TYPE_CHECKING:
    QuantizerName = str
else:
    QuantizerName = Literal[tuple(METHODS)]
Upkeep = Literal["paper", "none", "replacement", "warmup", "both", "lru", "repeated"]
Start = Literal["plain", "kmeans"]
Backbone = Literal["diveq", "takida", "vqgan"]
Reconstruction = Literal["mse", "l1"]
OptimizerName = Literal["adam", "adamw"]
Schedule = Literal["halving", "cosine", "constant"]
Precision = Literal["no", "fp16", "bf16"]
ProcedureName = Literal["joint", "alternated", "meta"]
Hypergradient = Literal["auto", "closed", "general"]

NAME = "train"


@dataclass(frozen=True)
class QuantizerOptions:
    """How latents become codes, and how codes stay alive."""

    title: ClassVar[str] = "quantizer"

    quantizer: QuantizerName = "sf_diveq"
    """How latents become codes and gradients come back."""

    num_codes: int = 256
    """Codes in the codebook, K."""

    latent_dim: int = 32
    """Features of a latent and of a code, D."""

    noise_std: float = 1e-3**0.5
    """Standard deviation of the direction noise of the DiVeQ family, in units of a latent."""

    upkeep: Upkeep = "paper"
    """Keeping codes alive. paper: what the method's paper does, such as a warm-up for sf_*, replacement for diveq*. replacement: unused codes by importance (DiVeQ B.1); lru: codes unused for 20 steps (Huh 3); repeated: k-means six times in the run (Huh table 1); warmup: no quantization at first, then means of latents; both: warmup and replacement."""

    warmup: float = 0.1
    """Fraction of the steps without quantization; the codes then start as means of recent latents."""

    start: Start = "plain"
    """First codes. plain: the codebook's own distribution; kmeans: fitted to the latents of the first batch."""

    codebook_weight: float | None = None
    """Weight of the codebook loss of an STE-like method; its own when left out."""

    commitment_weight: float | None = None
    """Weight of the commitment loss of an STE-like method; its own when left out."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        check_choice(NAME, "quantizer", self.quantizer, tuple(METHODS))
        check_choice(NAME, "upkeep", self.upkeep, get_args(Upkeep))
        check_choice(NAME, "start", self.start, get_args(Start))
        check_count(NAME, "num_codes", self.num_codes, minimum=2 if METHODS[self.quantizer].segments else 1)
        check_count(NAME, "latent_dim", self.latent_dim, minimum=1)
        check_noise_std(NAME, self.noise_std)
        check_fraction("warmup", self.warmup, 0.2)
        for name in ("codebook_weight", "commitment_weight"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value, 0.25, zero=True)


@dataclass(frozen=True)
class ModelOptions:
    """Encoder and decoder."""

    title: ClassVar[str] = "model"

    backbone: Backbone = "diveq"
    """diveq: the VQ-VAE of DiVeQ table 3; takida: the residual network with batch statistics of SQ-VAE, which Huh and MQ use; vqgan: that of Esser et al., with attention."""

    width: int = 64
    """Channels of the hidden layers; of the first ones in vqgan."""

    downsamplings: int = 2
    """How often height and width are halved; a latent covers 2^downsamplings pixels squared."""

    residual_blocks: int = 2
    """Residual blocks in the encoder, and as many in the decoder; in vqgan, at each resolution."""

    multipliers: tuple[int, ...] = ()
    """Channels at each resolution of vqgan, in units of width; downsamplings + 1 numbers, all 1 when left out."""

    attention: bool = False
    """Whether each block of vqgan at its lowest resolution attends; between its halves it always does."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        check_choice(NAME, "backbone", self.backbone, get_args(Backbone))
        check_count(NAME, "width", self.width, minimum=1)
        check_count(NAME, "downsamplings", self.downsamplings, maximum=16)
        check_count(NAME, "residual_blocks", self.residual_blocks)
        for multiplier in self.multipliers:
            check_count(NAME, "multipliers", multiplier, minimum=1)
        if self.multipliers and len(self.multipliers) != self.downsamplings + 1:
            requirement = f"be downsamplings + 1 = {self.downsamplings + 1} numbers"
            refuse(ValueError, NAME, "multipliers", requirement, len(self.multipliers), "Pass so many")


@dataclass(frozen=True)
class DataOptions:
    """What the model sees."""

    title: ClassVar[str] = "data"

    data: str = "photos"
    """photos: the scenes inside scikit-image; else a folder of images, of CIFAR-10's Python files or of tar shards, a pattern of tar shards, or hf:NAME, a data set of Hugging Face by its path or name."""

    crop: int = 32
    """Height and width of a training crop, in pixels."""

    augment: bool = True
    """Half of the crops are mirrored, and exposure and white balance of all change a little; the flag switches it off."""

    batch_size: int = 64
    """Crops in a step, over all processes together."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        for field in ("crop", "batch_size"):
            check_count(NAME, field, getattr(self, field), minimum=1)
        if not self.data:
            refuse(ValueError, NAME, "data", "name a folder", "an empty string", "Pass --data FOLDER")


@dataclass(frozen=True)
class ObjectiveOptions:
    """What the model minimises, beside the quantizer's own loss."""

    title: ClassVar[str] = "objective"

    reconstruction: Reconstruction = "mse"
    """Mean squared or mean absolute error of images in [-1, 1]."""

    perceptual: str | None = None
    """File with the weights of LPIPS: torchvision's VGG-16 and the linear layers, in one or, comma between, in two."""

    perceptual_weight: float = 1.0
    """Weight of LPIPS beside the reconstruction error."""

    adversarial: float = 0.0
    """Weight of the discriminator's verdict; 0 trains without a discriminator. Esser et al. use 0.8 to 1."""

    discriminator_start: float = 0.5
    """Fraction of the steps after which the discriminator starts."""

    discriminator_width: int = 64
    """Channels of the first layer of the discriminator."""

    discriminator_layers: int = 3
    """Strided layers of the discriminator."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        check_choice(NAME, "reconstruction", self.reconstruction, get_args(Reconstruction))
        for field, usual in (("perceptual_weight", 1.0), ("adversarial", 0.8)):
            check_positive(field, getattr(self, field), usual, zero=True)
        if self.perceptual is not None and not self.perceptual:
            refuse(ValueError, NAME, "perceptual", "name a file", "an empty string", "Leave --perceptual out")
        check_fraction("discriminator_start", self.discriminator_start, 0.5, zero=True)
        check_count(NAME, "discriminator_width", self.discriminator_width, minimum=1)
        check_count(NAME, "discriminator_layers", self.discriminator_layers, minimum=1)


@dataclass(frozen=True)
class OptimizationOptions:
    """How long and how fast it learns."""

    title: ClassVar[str] = "optimization"

    steps: int = 1200
    """Optimizer steps; the learning rate, warm-up and replacement follow fractions of it."""

    lr: float = 5.5e-4
    """Learning rate at its highest."""

    optimizer: OptimizerName = "adam"
    """adamw decays all weights but those of codes."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the means that Adam keeps of a gradient and of its square."""

    weight_decay: float = 0.0
    """Of adamw; codes are never decayed."""

    schedule: Schedule = "halving"
    """halving: at two moments; cosine: half a cycle down to 0; constant."""

    halve_at: tuple[float, float] = (0.4, 0.7)
    """Moments of halving, fractions of the steps: 0.4 and 0.7 for VQ-VAE, 0.5 and 0.75 for VQGAN (DiVeQ A)."""

    rise: float = 0.0
    """Fraction of the steps in which the learning rate rises to lr; 0.1 in Huh and MQ."""

    codes_rate: float = 1.0
    """Learning rate of what codes are made of, in units of lr."""

    accumulate: int = 1
    """Parts that a batch is cut into, whose gradients add up before the step; saves memory."""

    precision: Precision = "no"
    """Mixed precision, through Accelerate."""

    shard: bool = False
    """Cut encoder and decoder and what their optimizer keeps into one part per process (FSDP); else all hold all."""

    weights_ema: float = 0.0
    """Decay of an exponential average of the weights, which is measured and saved beside them; 0 for none."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        for field in ("steps", "accumulate"):
            check_count(NAME, field, getattr(self, field), minimum=1)
        check_choice(NAME, "optimizer", self.optimizer, get_args(OptimizerName))
        check_choice(NAME, "schedule", self.schedule, get_args(Schedule))
        check_choice(NAME, "precision", self.precision, get_args(Precision))
        check_positive("lr", self.lr, 5.5e-4)
        check_positive("codes_rate", self.codes_rate, 1.0, zero=True)
        check_positive("weight_decay", self.weight_decay, 1e-4, zero=True)
        if self.weight_decay and self.optimizer == "adam":
            requirement, fix = "be 0 for adam, which has none", "Pass --optimizer adamw"
            refuse(ValueError, NAME, "weight_decay", requirement, self.weight_decay, fix)
        for field in ("betas", "halve_at"):
            if len(getattr(self, field)) != 2:
                refuse(
                    ValueError, NAME, field, "be two numbers", len(getattr(self, field)), "Pass two numbers"
                )
        for value in self.betas:
            check_fraction("betas", value, 0.9, zero=True)
        for value in self.halve_at:
            check_fraction("halve_at", value, 0.5)
        check_fraction("rise", self.rise, 0.1, zero=True)
        check_fraction("weights_ema", self.weights_ema, 0.999, zero=True)


@dataclass(frozen=True)
class ProcedureOptions:
    """What a step does."""

    title: ClassVar[str] = "procedure"

    procedure: ProcedureName = "joint"
    """joint: one gradient for all; alternated: steps of the codes, then one of the model (Huh 4.2); meta: codes descend the loss after the model's next step (MQ algorithm 1)."""

    inner: int = 1
    """Steps of the codes in a step of alternated, 1 to 8 in Huh's table 10."""

    split: bool = False
    """Whether each of them sees its own part of the batch."""

    xi: float = 1e-4
    """Learning rate of the tentative step of meta."""

    hypergradient: Hypergradient = "auto"
    """Form of meta's indirect gradient: closed, general (finite differences), or closed where it holds."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        check_choice(NAME, "procedure", self.procedure, get_args(ProcedureName))
        check_choice(NAME, "hypergradient", self.hypergradient, get_args(Hypergradient))
        check_count(NAME, "inner", self.inner, minimum=1)
        check_positive("xi", self.xi, 1e-4, zero=True)


@dataclass(frozen=True)
class RunOptions:
    """Where it is kept, and how often one looks."""

    title: ClassVar[str] = "run"

    seed: int = 0
    """Seed of the weights, the crops and the noise."""

    out: str = "runs/train"
    """Folder for checkpoints, metrics.jsonl and pictures."""

    checkpoint_every: int = 100
    """Steps between checkpoints."""

    keep: int = 2
    """Checkpoints that are kept, the newest ones."""

    log_every: int = 20
    """Steps between lines of metrics.jsonl; a line holds means over the steps since the last."""

    evaluate_every: int = 100
    """Steps between measurements on held-out images."""

    tracker: str = "none"
    """Also tell a tracker of Accelerate, such as tensorboard."""

    def check(self) -> None:
        """Raise TypeError or ValueError for values no run can have."""
        check_count(NAME, "seed", self.seed)
        for field in ("checkpoint_every", "keep", "log_every", "evaluate_every"):
            check_count(NAME, field, getattr(self, field), minimum=1)
        if not self.out:
            refuse(ValueError, NAME, "out", "name a folder", "an empty string", "Pass --out FOLDER")


GROUPS = (
    QuantizerOptions,
    ModelOptions,
    DataOptions,
    ObjectiveOptions,
    OptimizationOptions,
    ProcedureOptions,
    RunOptions,
)


def check_fraction(field: str, value: float, usual: float, *, zero: bool = False) -> None:
    """Refuse what is no number between 0 and 1, both excluded but for a zero that is allowed."""
    if not ((zero and value == 0) or 0 < value < 1):
        requirement = "be a fraction between 0 and 1"
        refuse(ValueError, NAME, field, requirement, value, f"Pass, for example, {usual}")


def check_positive(field: str, value: float, usual: float, *, zero: bool = False) -> None:
    """Refuse what is no finite number above 0, or 0 where that is allowed."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        requirement = f"be finite and {'not below' if zero else 'above'} 0"
        refuse(ValueError, NAME, field, requirement, value, f"Pass a number such as {usual}")


def group_of(field: str) -> str:
    """Return the title of the group that an option stands in."""
    return next(g.title for g in GROUPS if field in {f.name for f in dataclasses.fields(g)})
