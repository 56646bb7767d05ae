"""Who takes part in a comparison: short names, and the settings of a run that each stands for."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from vqkernels.checks import refuse
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.options import Start, Upkeep

STARTS: tuple[str, ...] = get_args(Start)
UPKEEPS: tuple[str, ...] = get_args(Upkeep)


@dataclass(frozen=True)
class Contender:
    """A method with the settings under which its paper compares it.

    Attributes:
        label: its name in figures and tables.
        overrides: fields of `TrainConfig` that differ from the comparison's own settings.
    """

    label: str
    overrides: Mapping[str, object] = field(default_factory=dict)

    def config(self, base: TrainConfig) -> TrainConfig:
        """Return the run of this contender.

        Args:
            base: the settings that all contenders share.

        Returns:
            Those settings with the overrides of this contender.

        Raises:
            RunError: the settings do not fit together.
        """
        return with_settings(base, self.overrides)


def with_settings(base: TrainConfig, overrides: Mapping[str, object]) -> TrainConfig:
    """Return a configuration with other values in some fields.

    Args:
        base: of all other fields.
        overrides: values by the name of their field.

    Returns:
        The new configuration.

    Raises:
        RunError: there is no such field, or the values do not fit together.
    """
    unknown = sorted(set(overrides) - {each.name for each in dataclasses.fields(TrainConfig)})
    if unknown:
        fix = "Leave out the methods that need them"
        refuse(RunError, "compare", "settings", "be fields of TrainConfig", ", ".join(unknown), fix)
    # values are checked by the configuration itself
    values: dict[str, object] = {each.name: getattr(base, each.name) for each in dataclasses.fields(base)}
    return TrainConfig(**(values | dict(overrides)))  # pyright: ignore[reportArgumentType]


def _replaced(label: str, quantizer: str, **more: object) -> Contender:
    return Contender(label, {"quantizer": quantizer, "upkeep": "replacement", **more})


def _plain(label: str, quantizer: str, **more: object) -> Contender:
    return Contender(label, {"quantizer": quantizer, "upkeep": "none", **more})


def _hyper(label: str, quantizer: str, procedure: str = "meta", **more: object) -> Contender:
    settings = {"procedure": procedure, "codes_rate": HYPER_RATE, "commitment_weight": COMMITMENT, **more}
    return _plain(label, quantizer, **settings)


# what the parts that all codes share learn faster than the model, MQ's hyper-net and its ablations alike
HYPER_RATE = 5.0
# that of STE (DiVeQ eq. 2); with MQ's own 1, latents of so short a training shrink onto few codes
COMMITMENT = 0.25

CONTENDERS: dict[str, Contender] = {
    "ste": _replaced("STE", "ste"),
    "ste_plain": _plain("STE, no upkeep", "ste"),
    "ste_kmeans": _plain("STE, k-means start", "ste", start="kmeans"),
    "ste_lru": _plain("STE, LRU", "ste", upkeep="lru"),
    "ste_lru_kmeans": _plain("STE, LRU, k-means start", "ste", upkeep="lru", start="kmeans"),
    "ema": _replaced("EMA", "ema"),
    "ema_plain": _plain("EMA, no upkeep", "ema"),
    "rotation": _replaced("rotation trick", "rotation"),
    "nsvq": _replaced("NSVQ", "nsvq"),
    "gumbel": _plain("Gumbel-softmax", "gumbel"),
    "stochastic": _plain("stochastic", "stochastic"),
    "diveq": _replaced("DiVeQ", "diveq"),
    "diveq_plain": _plain("DiVeQ, no upkeep", "diveq"),
    "diveq_detach": _replaced("DiVeQ detach", "diveq_detach"),
    "sf_diveq": Contender("SF-DiVeQ", {"quantizer": "sf_diveq", "upkeep": "warmup"}),
    "sf_diveq_detach": Contender("SF-DiVeQ detach", {"quantizer": "sf_diveq_detach", "upkeep": "warmup"}),
    "sync": _replaced("sync", "sync"),
    "affine": _replaced("affine", "affine", start="kmeans"),
    "affine_plain": _plain("affine, no upkeep", "affine", start="kmeans"),
    "affine_ema": _replaced("affine, moments", "affine_ema"),
    "alternated": _replaced("alternated", "ste", start="kmeans", procedure="alternated"),
    "simvq": _plain("SimVQ", "simvq"),
    "fsq": _plain("FSQ", "fsq"),
    "mq": _hyper("MQ", "mq"),
    "mq_xi0": _hyper("MQ, xi = 0", "mq", xi=0.0),
    "mq_joint": _hyper("MQ, no bi-level", "mq", "joint"),
    "mq_identity": _hyper("MQ, identity", "mq_identity"),
    "mq_linear_1": _hyper("MQ, linear-1", "mq_linear_1"),
    "mq_linear_2": _hyper("MQ, linear-2", "mq_linear_2"),
}


def contender(name: str) -> Contender:
    """Find a contender by its name, with other upkeep where the name says so.

    Args:
        name: a key of `CONTENDERS`, then ":" and an upkeep or a start for each that shall be another:
            "diveq:none", "affine:lru:kmeans".

    Returns:
        The contender.

    Raises:
        RunError: the name or one of its words is unknown.
    """
    short, *words = name.split(":")
    if short not in CONTENDERS:
        fix = "Pass one of " + ", ".join(CONTENDERS)
        refuse(RunError, "compare", "methods", "be known names", repr(short), fix)
    found = CONTENDERS[short]
    changes: dict[str, object] = {}
    for word in words:
        if word not in (*UPKEEPS, *STARTS):
            fix = f"Write {short} and one of :{', :'.join((*UPKEEPS, *STARTS))}"
            refuse(RunError, "compare", "methods", "name an upkeep or a start after ':'", repr(word), fix)
        changes["start" if word in STARTS else "upkeep"] = word
    if not changes:
        return found
    return Contender(f"{found.label} ({', '.join(words)})", {**found.overrides, **changes})


@dataclass(frozen=True)
class Variant:
    """One point of an ablation.

    Attributes:
        label: on the axis and in the table.
        overrides: fields of `TrainConfig`, on top of the contender's.
        value: place on a numeric axis, None where the points have no order.
    """

    label: str
    overrides: Mapping[str, object]
    value: float | None = None


@dataclass(frozen=True)
class Ablation:
    """One thing that is varied while everything else stays.

    Attributes:
        axis: what is varied, in words.
        methods: that take part when nobody chose others.
        variants: the points, from left to right.
        source: the figure or table that this one repeats.
    """

    axis: str
    methods: Sequence[str]
    variants: Sequence[Variant]
    source: str


def _numbers(name: str, values: Sequence[float]) -> tuple[Variant, ...]:
    return tuple(Variant(f"{value:g}", {name: value}, value) for value in values)


ABLATIONS: dict[str, Ablation] = {
    "sigma": Ablation(
        "variance of the direction noise",
        ("diveq", "sf_diveq"),
        tuple(Variant(f"{value:g}", {"noise_std": value**0.5}, value) for value in (1e-4, 1e-3, 1e-2, 1e-1)),
        "DiVeQ, ablation of sigma",
    ),
    "batch_size": Ablation(
        "crops in a batch",
        ("ste", "diveq", "sf_diveq"),
        tuple(Variant(str(value), {"batch_size": value}, value) for value in (16, 32, 64)),
        "DiVeQ, ablation of the batch size",
    ),
    "lr": Ablation(
        "learning rate",
        ("ste", "diveq", "sf_diveq"),
        _numbers("lr", (5e-4, 1e-3, 2e-3, 4e-3)),
        "DiVeQ, ablation of the learning rate",
    ),
    "replacement": Ablation(
        "upkeep of unused codes",
        ("ste", "ema", "rotation", "nsvq", "diveq"),
        tuple(
            Variant(label, {"upkeep": value})
            for label, value in (("none", "none"), ("importance", "replacement"), ("LRU", "lru"))
        ),
        "DiVeQ, table 1 with and without replacement; Huh et al., table 1",
    ),
    "hyper_net": Ablation(
        "hyper-net",
        ("mq",),
        tuple(
            Variant(label, {"quantizer": value})
            for label, value in (
                ("identity", "mq_identity"),
                ("linear-1", "mq_linear_1"),
                ("linear-2", "mq_linear_2"),
                ("MLP", "mq"),
            )
        ),
        "Meta-Quantization, table 7",
    ),
    "bilevel": Ablation(
        "bi-level training",
        ("mq",),
        (
            Variant("without", {"procedure": "joint"}),
            Variant("xi = 0", {"procedure": "meta", "xi": 0.0}),
            Variant("bi-level", {"procedure": "meta"}),
        ),
        "Meta-Quantization, table 6",
    ),
}
