"""The rows of the papers' tables as trainings: which codebook, estimator, upkeep and procedure each stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqkernels.models import VQVAE
from vqkernels.nn import (
    FSQ,
    LFQ,
    NSVQ,
    STE,
    AffineCodebook,
    AffineEMACodebook,
    Codebook,
    DiVeQ,
    EMACodebook,
    Estimator,
    Every,
    ExponentialTemperature,
    Gumbel,
    HyperNetCodebook,
    ImportanceReplacement,
    KMeansInit,
    LatentMeans,
    LeastRecentlyUsed,
    LinearTemperature,
    ProjectedCodebook,
    Quantizer,
    RepeatedKMeans,
    Rotation,
    SFDiVeQ,
    SimVQCodebook,
    Stochastic,
    TwoPhase,
    Upkeep,
    VectorQuantizer,
    kmeans,
)
from vqkernels.nn.quantizers.fsq import factor_levels
from vqkernels.train.data.images import ImageSet
from vqkernels.train.learners.alternated import Alternated
from vqkernels.train.learners.bilevel import MetaQuantization
from vqkernels.train.learners.procedure import Step

# features of a latent
DIM = 4
# of Adam, for every row; it rises over the first tenth and falls like a cosine (Huh A.4, MQ 5)
LR, RISE = 1e-3, 0.1
# MQ's inner learning rate and Huh's table 10
XI, NU, INNER = 1e-4, 1.0, 2
# Huh tune the affine map's rate for each model
AFFINE_SCALE = 30.0
# how much faster than the rest the hyper-net learns, and its ablation with it
HYPER_RATE = 10.0

Parts = Callable[[int], Sequence[Upkeep]]


def _learned(k: int, d: int) -> Codebook:
    return Codebook(k, d, init="normal")


def _affine(k: int, d: int) -> Codebook:
    return AffineCodebook(k, d, lr_scale=AFFINE_SCALE)


def _affine_ema(k: int, d: int) -> Codebook:
    return AffineEMACodebook(k, d, init="normal")


def _importance(steps: int) -> list[Upkeep]:
    return [ImportanceReplacement(TwoPhase.scaled(steps))]


def _lru(steps: int) -> list[Upkeep]:
    return [LeastRecentlyUsed()]


def _kmeans(*more: Parts) -> Parts:
    return lambda steps: [KMeansInit(), *(part for parts in more for part in parts(steps))]


def _repeated(steps: int) -> list[Upkeep]:
    return [RepeatedKMeans(Every(max(1, steps // 6)))]


def _warm_up(steps: int) -> list[Upkeep]:
    return [LatentMeans(max(1, steps // 10))]


def _none(steps: int) -> list[Upkeep]:
    return []


@dataclass(frozen=True)
class Recipe:
    """A way to train a codebook.

    Attributes:
        estimator: from the number of steps, for schedules.
        codebook: from K and D.
        upkeep: from the number of steps.
        options: of `VectorQuantizer`.
        make: a whole quantizer from K and D, for what is no `VectorQuantizer`.
        procedure: "joint", "alternated" or "meta".
        xi: of "meta".
        rate: learning rate of the codebook, in units of the model's.
        features: whether the codes are a projection of clustered features.
    """

    estimator: Callable[[int], Estimator] = lambda steps: STE()
    codebook: Callable[[int, int], Codebook] = _learned
    upkeep: Parts = _none
    options: dict[str, Any] = field(default_factory=dict)
    make: Callable[[int, int], Quantizer] | None = None
    procedure: str = "joint"
    xi: float = XI
    rate: float = 1.0
    features: bool = False

    def quantizer(self, k: int, d: int, steps: int, images: ImageSet) -> Quantizer:
        """The quantizer, for NCHW latents."""
        if self.make is not None:
            return self.make(k, d)
        codebook = _clustered(k, d, images) if self.features else self.codebook(k, d)
        estimator, upkeep = self.estimator(steps), self.upkeep(steps)
        return VectorQuantizer(codebook, estimator, upkeep, channel_dim=1, **self.options)

    def stepper(self, model: VQVAE, steps: int) -> Callable[[Tensor, int], tuple[float, Tensor]]:
        """A call that trains on a batch and returns the loss and the training indices."""
        codes = {"params": list(model.quantizer.parameters()), "lr": self.rate * LR}
        rest = {"params": [*model.encoder.parameters(), *model.decoder.parameters()], "lr": LR}
        if self.procedure == "joint":
            optimizers = [torch.optim.Adam([rest, codes])]
            train = _joint(model, optimizers[0])
        else:
            optimizers = [torch.optim.Adam([codes]), torch.optim.Adam([rest])]
            parts: dict[str, Any] = {"codebook_optimizer": optimizers[0], "model_optimizer": optimizers[1]}
            if self.procedure == "alternated":
                procedure: Any = Alternated(model, F.mse_loss, inner=INNER, **parts)
            else:
                procedure = MetaQuantization(model, F.mse_loss, xi=self.xi, **parts)
            train = procedure.step
        groups = [(group, group["lr"]) for each in optimizers for group in each.param_groups]

        def run(batch: Tensor, number: int) -> tuple[float, Tensor]:
            for group, rate in groups:
                group["lr"] = rate * _share(number, steps)
            found = train(batch)
            return float(found.loss), found.indices

        return run


def _joint(model: VQVAE, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Step]:
    model.quantizer.follow(optimizer)

    def step(batch: Tensor) -> Step:
        out, indices, loss = model(batch)
        task = F.mse_loss(out, batch)
        optimizer.zero_grad()
        (task + loss).backward()
        optimizer.step()
        return Step((task + loss).detach(), task.detach(), indices)

    return step


def _share(number: int, steps: int) -> float:
    """Of the learning rate at a step: a linear rise, then half a cosine."""
    rise = max(1, int(RISE * steps))
    if number < rise:
        return (number + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (number - rise) / (steps - rise)))


def _clustered(k: int, d: int, images: ImageSet) -> Codebook:
    """A basis in place of a pretrained encoder's features: k-means of 4x4 patches."""
    patches = torch.cat([images.batch(10_000 + i).unfold(2, 4, 4).unfold(3, 4, 4) for i in range(4)])
    rows = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * 16)
    return ProjectedCodebook(kmeans(rows, k, seed=0), d)


def _huh(**more: Any) -> Recipe:
    """Huh's baseline: k-means initialisation, then whatever is added."""
    return replace(Recipe(upkeep=_kmeans()), **more)


def _hyper(kind: str, **more: Any) -> Recipe:
    """MQ's hyper-nets with the widths of the ablation, d' = 32 and K' = K, under its procedure."""
    codebook = lambda k, d: HyperNetCodebook(k, d, kind=kind)  # noqa: E731
    return replace(Recipe(codebook=codebook, procedure="meta", rate=HYPER_RATE), **more)


def _sampling(steps: int) -> Estimator:
    return Stochastic(temperature=LinearTemperature(max(1, int(0.8 * steps)), 1.0, 0.0))


RECIPES: dict[str, Recipe] = {
    "ste": Recipe(),
    "ste kmeans": _huh(),
    "ste replaced": Recipe(upkeep=_importance),
    "ema replaced": Recipe(
        lambda steps: STE(codebook_weight=0), lambda k, d: EMACodebook(k, d, init="normal"), _importance
    ),
    "rotation replaced": Recipe(lambda steps: Rotation(), upkeep=_importance),
    "gumbel": Recipe(lambda steps: Gumbel(temperature=ExponentialTemperature(steps))),
    "nsvq replaced": Recipe(lambda steps: NSVQ(), upkeep=_importance),
    "diveq replaced": Recipe(lambda steps: DiVeQ(), upkeep=_importance),
    "sf_diveq": Recipe(lambda steps: SFDiVeQ(), upkeep=_warm_up),
    "stochastic": Recipe(_sampling),
    "stochastic kmeans": _huh(estimator=_sampling),
    "repeated": Recipe(upkeep=_repeated),
    "repeated kmeans": Recipe(upkeep=_kmeans(_repeated)),
    "lru": Recipe(upkeep=_lru),
    "lru kmeans": Recipe(upkeep=_kmeans(_lru)),
    "affine": _huh(codebook=_affine),
    "affine ema": Recipe(codebook=_affine_ema),
    "sync": _huh(estimator=lambda steps: STE(sync=NU)),
    "alternated": _huh(procedure="alternated"),
    "opt": _huh(estimator=lambda steps: STE(sync=NU), procedure="alternated"),
    "affine opt": _huh(codebook=_affine, estimator=lambda steps: STE(sync=NU), procedure="alternated"),
    "affine opt lru": _huh(
        codebook=_affine,
        estimator=lambda steps: STE(sync=NU),
        procedure="alternated",
        upkeep=_kmeans(_lru),
    ),
    "affine opt lru l2": _huh(
        codebook=_affine,
        estimator=lambda steps: STE(sync=NU),
        procedure="alternated",
        upkeep=_kmeans(_lru),
        options={"metric": "cosine"},
    ),
    "l2": _huh(options={"metric": "cosine"}),
    "l2 lru": _huh(options={"metric": "cosine"}, upkeep=_kmeans(_lru)),
    "mq": _hyper("mlp"),
    "mq xi 0": _hyper("mlp", xi=0.0),
    "mq joint": _hyper("mlp", procedure="joint"),
    "mq identity": _hyper("identity"),
    "mq linear-1": _hyper("linear-1"),
    "mq linear-2": _hyper("linear-2"),
    "ema": Recipe(lambda steps: STE(codebook_weight=0), lambda k, d: EMACodebook(k, d, init="normal")),
    "vqgan_fc": Recipe(codebook=lambda k, d: _learned(k, d - 1), options={"metric": "cosine", "dim": DIM}),
    "vqgan_lc": Recipe(features=True),
    "simvq": Recipe(codebook=SimVQCodebook),
    "fsq": Recipe(make=lambda k, d: FSQ(factor_levels(k), dim=d, channel_dim=1)),
    "lfq": Recipe(make=lambda k, d: LFQ(k.bit_length() - 1, dim=d, channel_dim=1)),
}

Rows = list[tuple[str, str]]
TABLES: dict[str, Rows] = {
    "DiVeQ, table 1 (with replacement, but SF-DiVeQ)": [
        ("STE", "ste replaced"),
        ("EMA", "ema replaced"),
        ("rotation trick", "rotation replaced"),
        ("ST-Gumbel-softmax", "gumbel"),
        ("NSVQ", "nsvq replaced"),
        ("DiVeQ", "diveq replaced"),
        ("SF-DiVeQ", "sf_diveq"),
    ],
    "Huh et al., table 1 (normal start)": [
        ("none", "ste"),
        ("stochastic", "stochastic"),
        ("repeated k-means", "repeated"),
        ("replace (LRU)", "lru"),
    ],
    "Huh et al., table 1 (k-means start)": [
        ("none", "ste kmeans"),
        ("stochastic", "stochastic kmeans"),
        ("repeated k-means", "repeated kmeans"),
        ("replace (LRU)", "lru kmeans"),
    ],
    "Huh et al., table 2": [
        ("baseline", "ste kmeans"),
        ("affine, learned", "affine"),
        ("affine, running moments (normal start)", "affine ema"),
        ("sync", "sync"),
        ("alternated", "alternated"),
        ("replace", "lru kmeans"),
        ("all four", "affine opt lru"),
    ],
    "Huh et al., table 3; Meta-Quantization, table 1": [
        ("VQVAE", "ste kmeans"),
        ("l2", "l2"),
        ("replace (LRU)", "lru kmeans"),
        ("l2 + replace", "l2 lru"),
        ("SQVAE (sampling)", "stochastic kmeans"),
        ("Gumbel-VQVAE", "gumbel"),
        ("affine", "affine"),
        ("OPT (sync + alternated)", "opt"),
        ("affine + OPT", "affine opt"),
        ("affine + OPT + replace", "affine opt lru"),
        ("affine + OPT + replace + l2", "affine opt lru l2"),
        ("MQVAE", "mq"),
    ],
    "Meta-Quantization, table 4": [
        ("VQGAN", "ste"),
        ("VQGAN-EMA", "ema"),
        ("VQGAN-FC", "vqgan_fc"),
        ("FSQ", "fsq"),
        ("LFQ", "lfq"),
        ("VQGAN-LC", "vqgan_lc"),
        ("SimVQ", "simvq"),
        ("MQ", "mq"),
    ],
    "Meta-Quantization, table 6": [
        ("without bi-level", "mq joint"),
        ("bi-level, xi = 0", "mq xi 0"),
        ("bi-level", "mq"),
    ],
    "Meta-Quantization, table 7": [
        ("identity", "mq identity"),
        ("linear-1", "mq linear-1"),
        ("linear-2", "mq linear-2"),
        ("MLP", "mq"),
    ],
}
