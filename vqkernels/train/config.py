"""One run in one frozen dataclass: the command line, and what a checkpoint remembers."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from vqkernels.checks import refuse
from vqkernels.models.lpips import MIN_SIDE
from vqkernels.nn import METHODS, Method
from vqkernels.train.options import (
    GROUPS,
    NAME,
    DataOptions,
    ModelOptions,
    ObjectiveOptions,
    OptimizationOptions,
    ProcedureOptions,
    QuantizerOptions,
    RunOptions,
)

# fields that change neither the weights a run ends with nor the numbers it measures
FREE_FIELDS = frozenset(
    {"out", "checkpoint_every", "keep", "log_every", "evaluate_every", "tracker", "shard"}
)

# repeated k-means fits codes anew so often in a run
REFITS = 6


class RunError(RuntimeError):
    """A run cannot start, continue or be read; the message says why and what to do."""


@dataclass(frozen=True)
class StoredConfig:
    """Base of the configurations that a checkpoint stores: dataclasses all of whose fields JSON has.

    Attributes:
        free: fields that change neither the weights a run ends with nor the numbers it measures.
    """

    free: ClassVar[frozenset[str]] = frozenset()

    def to_json(self) -> str:
        """Return the configuration as one JSON object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
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
            refuse(RunError, cls.__name__, "configuration", "be JSON", error.msg, fix)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            got = sorted(set(values) ^ names) if isinstance(values, Mapping) else type(values).__name__
            requirement = "have exactly the fields of this version"
            refuse(RunError, cls.__name__, "configuration", requirement, f"a difference in {got}", fix)
        # JSON has lists where a configuration has tuples
        fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
        return cls(**fields)

    def differences(self, other: Self) -> list[str]:
        """Name the fields that make two runs different.

        Args:
            other: a configuration to compare with.

        Returns:
            "field (this value, other value)" for every field outside `free` that differs.
        """
        return [
            f"{field.name} ({getattr(self, field.name)!r}, {getattr(other, field.name)!r})"
            for field in dataclasses.fields(self)
            if field.name not in self.free and getattr(self, field.name) != getattr(other, field.name)
        ]


@dataclass(frozen=True)
class TrainConfig(
    # fields come in the order of the bases from the last to the first
    RunOptions,
    ProcedureOptions,
    OptimizationOptions,
    ObjectiveOptions,
    DataOptions,
    ModelOptions,
    QuantizerOptions,
    StoredConfig,
):
    """Everything about a run: every field is a flag, and the checkpoint stores them all."""

    free: ClassVar[frozenset[str]] = FREE_FIELDS

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
        for group in GROUPS:
            group.check(self)
        self._check_codes()
        self._check_objective()
        self._check_use()
        if self.crop % self.factor:
            requirement = f"be a multiple of 2^downsamplings = {self.factor}"
            fix = (
                f"Pass --crop {max(1, round(self.crop / self.factor)) * self.factor} or fewer down-samplings"
            )
            refuse(ValueError, NAME, "crop", requirement, self.crop, fix)
        self._check_latents()

    def _check_latents(self) -> None:
        """Codes that are fitted to latents need at least as many of these."""
        a_step = self.batch_size * (self.crop // self.factor) ** 2
        fix = "Pass more --steps or a larger --batch-size"
        for field, asked, latents in (
            ("warmup", self.warms_up, self.warmup_steps * a_step),
            ("upkeep", self.upkeep == "repeated", self.refit_every * a_step),
            ("start", self.start == "kmeans", a_step // self.accumulate),
        ):
            if asked and latents < self.num_codes:
                requirement = f"leave at least num_codes = {self.num_codes} latents to fit the codes to"
                got = f"{getattr(self, field)} with {latents} latents"
                if field == "start":
                    fix = "Pass a larger --batch-size, or leave --start out"
                refuse(ValueError, NAME, field, requirement, got, fix)

    def _check_codes(self) -> None:
        if not self.method.upkeep and self.upkeep not in ("paper", "none"):
            requirement = f"be paper or none for {self.quantizer}, which has no codes to keep alive"
            refuse(ValueError, NAME, "upkeep", requirement, self.upkeep, "Leave --upkeep out")
        if self.replaces and self.method.segments:
            requirement = (
                f"be paper, warmup or none for {self.quantizer}, whose training indices are segments"
            )
            refuse(ValueError, NAME, "upkeep", requirement, self.upkeep, "Leave --upkeep out")
        if self.start == "kmeans" and (self.warms_up or not self.method.upkeep):
            why = "start as means of latents" if self.warms_up else "have no codes that can be overwritten"
            requirement = f"be plain for runs of {self.quantizer}, which {why}"
            refuse(ValueError, NAME, "start", requirement, self.start, "Leave --start out")

    def _check_objective(self) -> None:
        if self.procedure != "joint":
            for field, plain in (("adversarial", 0), ("accumulate", 1), ("precision", None)):
                value = getattr(self, field)
                if value == "fp16" or (plain is not None and value != plain):
                    requirement = (
                        f"be {'no or bf16' if plain is None else plain} with procedure {self.procedure}"
                    )
                    refuse(ValueError, NAME, field, requirement, value, f"Leave --{field} out")
        if self.shard:
            for field, plain in (("procedure", "joint"), ("adversarial", 0), ("weights_ema", 0)):
                if getattr(self, field) != plain:
                    fix = f"Leave --{field.replace('_', '-')} or --shard out"
                    refuse(ValueError, NAME, field, f"be {plain} with shard", getattr(self, field), fix)
            if self.precision == "fp16":
                fix = "Pass --precision bf16"
                refuse(ValueError, NAME, "precision", "be no or bf16 with shard", self.precision, fix)
        if self.accumulate > self.batch_size or self.batch_size % self.accumulate:
            requirement = f"divide batch_size = {self.batch_size}"
            refuse(ValueError, NAME, "accumulate", requirement, self.accumulate, "Pass a divisor")

    def _check_use(self) -> None:
        """Refuse options that would change nothing, and sizes that a part of the run cannot take."""
        for field, unset, of, needed in (
            ("multipliers", (), "backbone", "vqgan"),
            ("attention", False, "backbone", "vqgan"),
            ("split", False, "procedure", "alternated"),
            ("hypergradient", "auto", "procedure", "meta"),
        ):
            value, there = getattr(self, field), getattr(self, of)
            if value != unset and there != needed:
                requirement = f"be left out for {of} {there}, which has no use for it"
                refuse(ValueError, NAME, field, requirement, value, f"Pass --{of} {needed}")
        if self.adversarial and self.discriminator_first_step >= self.steps:
            requirement = f"leave a step of {self.steps} to the discriminator"
            fix = "Pass a smaller one, or leave --adversarial out"
            refuse(ValueError, NAME, "discriminator_start", requirement, self.discriminator_start, fix)
        if self.perceptual and self.perceptual_weight and self.crop < MIN_SIDE:
            fix = "Pass a larger --crop, or leave --perceptual out"
            refuse(ValueError, NAME, "crop", f"be {MIN_SIDE} or more for LPIPS", self.crop, fix)
        if self.backbone == "takida" and self.batch_size == self.accumulate and self.crop == self.factor:
            fix = "Pass a larger --batch-size or --crop, or --backbone diveq"
            requirement = "leave more than one latent for the batch statistics of takida"
            refuse(ValueError, NAME, "batch_size", requirement, self.batch_size // self.accumulate, fix)

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
    def refit_every(self) -> int:
        """Steps between two fits of repeated k-means."""
        return max(1, self.steps // REFITS)

    @property
    def discriminator_first_step(self) -> int:
        """The 0-based step from which on the discriminator takes part."""
        return round(self.discriminator_start * self.steps)

    @property
    def replaces(self) -> bool:
        """Whether unused codes are replaced."""
        return self.upkeep in ("replacement", "both") or (self.upkeep == "paper" and self.method.replace)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of one step: its rise, then its schedule (DiVeQ A; Huh A.4; MQ 5).

        Args:
            step: 0-based step.

        Returns:
            The rate.
        """
        done = step / self.steps
        rise = max(1, round(self.rise * self.steps)) if self.rise else 0
        if step < rise:
            return self.lr * (step + 1) / rise
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * (step - rise) / max(1, self.steps - rise))) / 2
        halved = sum(done >= moment for moment in self.halve_at) if self.schedule == "halving" else 0
        return self.lr * 0.5**halved

    def checkpoint_path(self) -> Path:
        """Return the folder where the run keeps its checkpoints."""
        return Path(self.out) / "checkpoints"

    def metrics_path(self) -> Path:
        """Return where the run keeps its log, one JSON object per line."""
        return Path(self.out) / "metrics.jsonl"
