"""Upkeep: how codes start and stay alive. It watches training forwards and changes codes in `commit` only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vqkernels import philox
from vqkernels.checks import check_count, check_number, refuse
from vqkernels.nn._random import all_rows, all_sum, draw_seed
from vqkernels.nn.codebooks import Codebook
from vqkernels.nn.metrics import code_counts


class Upkeep(nn.Module):
    """Base of all upkeep."""

    # False while the codes must not be used yet
    ready = True
    # True once a quantizer owns it
    bound = False

    @property
    def idle(self) -> bool:
        """Whether `observe` and `commit` will do nothing any more."""
        return False

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        """Told once, by the quantizer: K, D and how many values a training index takes."""

    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        """Take note of a training batch: x (..., D), indices (...), None before the codes are ready."""

    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        """Change codes after optimizer step number `step` (from 1); returns the (K,) mask of rows replaced."""


class Schedule(Protocol):
    """When something happens."""

    def due(self, step: int) -> bool:
        """Whether it happens after optimizer step number `step` (from 1)."""
        ...


@dataclass(frozen=True)
class TwoPhase:
    """Often at first, seldom later, never near the end (DiVeQ appendix A.1; for VQGANs 50, 5000, 300, 3000).

    Attributes:
        total_steps: length of the training, in optimizer steps.
        first: period while step <= until.
        until: last step of the first phase.
        then: period after it.
        stop_before: nothing happens in this many last steps.
    """

    total_steps: int
    first: int = 100
    until: int = 2000
    then: int = 500
    stop_before: int = 1000

    def __post_init__(self) -> None:
        for name in ("total_steps", "first", "then"):
            check_count("TwoPhase", name, getattr(self, name), minimum=1)
        for name in ("until", "stop_before"):
            check_count("TwoPhase", name, getattr(self, name))

    @classmethod
    def scaled(cls, total_steps: int) -> TwoPhase:
        """The same shape for a short run: half of it in the first phase, a sixth of it left alone at the end."""
        first = max(1, total_steps // 12)
        return cls(total_steps, first, total_steps // 2, 3 * first, total_steps // 6)

    def due(self, step: int) -> bool:
        """Whether replacement happens after this step."""
        period = self.first if step <= self.until else self.then
        return step <= self.total_steps - self.stop_before and step % period == 0


class ImportanceReplacement(Upkeep):
    """Move unused codes next to used ones, drawn in proportion to their use (DiVeQ B.1).

    After each period, a code with fewer than threshold * rows / K rows becomes a copy of a code with more, plus
    noise * rms(that code) * N(0, I). Counts are of rows, over the whole period and all ranks.

    Args:
        schedule: when; such as `TwoPhase(total_steps)`.
        threshold: share of the mean use below which a code is replaced, in [0, 1].
        noise: size of the perturbation, relative to the root mean square of the copied code.
    """

    counts: Tensor

    def __init__(self, schedule: Schedule, *, threshold: float = 0.01, noise: float = 1e-3):
        super().__init__()
        name = "ImportanceReplacement"
        self.schedule = schedule
        self.threshold = check_number(name, "threshold", threshold, up_to=1)
        self.noise = check_number(name, "noise", noise)

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        if num_indices != num_codes:
            requirement = "have one training index per code, so that use can be counted"
            fix = "Leave the replacement out: the space-filling estimators keep their codes in use by themselves"
            got = f"{num_indices} indices for {num_codes} codes"
            refuse(ValueError, "ImportanceReplacement", "estimator", requirement, got, fix)
        self.register_buffer("counts", torch.zeros(num_codes, dtype=torch.int64))

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        if indices is not None:
            # a row that is not finite has index 0 but used nothing
            used = torch.where(x.isfinite().all(-1), indices, -1)
            self.counts += all_sum(code_counts(used, len(self.counts)))

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        if not self.schedule.due(step):
            return None
        counts = self.counts
        codes = codebook.weight
        k, d = codes.shape
        dead = counts < self.threshold * counts.sum() / k
        # cumulative use of the others: a code is drawn where a uniform number falls into its share
        share = torch.where(dead, 0, counts).cumsum(0)
        words = philox.words(
            draw_seed(codes.device), torch.arange(k, device=codes.device), 1 + (d + 3) // 4, philox.UPKEEP
        )
        drawn = (philox.uniforms(words[:, 0, 0]).double() * share[-1]).long()
        source = torch.searchsorted(share, drawn, right=True).clamp_max(k - 1)
        wide = torch.promote_types(codes.dtype, torch.float32)
        copied = codes[source].to(wide)
        scale = self.noise * copied.square().mean(1, keepdim=True).sqrt()
        jitter = philox.normals(words[:, 1:]).flatten(1)[:, :d].to(wide)
        codebook.assign(copied + scale * jitter, dead)
        self.counts.zero_()
        return dead


class LatentMeans(Upkeep):
    """Warm up without quantization, then start the codes as means of recent latents (DiVeQ A.5, eq. 14).

    For `steps` optimizer steps z = x. The codes then become the means of K consecutive blocks of the most recent
    latents, oldest first, so that neighbouring codes, which SF-DiVeQ joins by a line, start near each other.

    Args:
        steps: length of the warm-up, in optimizer steps.
        latents_per_code: latents averaged for each code; the paper suggests 20 to 40.
    """

    recent: Tensor
    seen: Tensor

    def __init__(self, steps: int, *, latents_per_code: int = 40):
        super().__init__()
        self.steps = check_count("LatentMeans", "steps", steps, minimum=1)
        self.latents_per_code = check_count("LatentMeans", "latents_per_code", latents_per_code, minimum=1)
        self.ready = False

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        # a ring, and one more row for what must not be kept
        self.register_buffer("recent", torch.zeros(num_codes * self.latents_per_code + 1, dim))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @property
    def idle(self) -> bool:
        return self.ready

    @torch.no_grad()
    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        if self.ready:
            return
        # every rank keeps the latents of all, so that one can save and each can start the codes
        rows = all_rows(x.reshape(-1, x.shape[-1]).to(self.recent.dtype))
        room = len(self.recent) - 1
        good = rows.isfinite().all(1)
        rank, total = good.cumsum(0) - 1, good.sum()
        slot = torch.where(good & (rank >= total - room), (self.seen + rank) % room, room)
        self.recent.index_copy_(0, slot, rows)
        self.seen += total

    @torch.no_grad()
    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        if self.ready or step < self.steps:
            return None
        # the one host sync of a training, between two steps
        seen, room = int(self.seen), len(self.recent) - 1
        latents = self.recent[:-1].roll(-(seen % room), 0) if seen > room else self.recent[:seen]
        k, d = codebook.weight.shape
        if len(latents) < k:
            fix = "Warm up for more steps or with larger batches"
            refuse(
                RuntimeError, "LatentMeans", "warm-up", f"see at least {k} finite latents", len(latents), fix
            )
        block = len(latents) // k
        codebook.assign(latents[: block * k].view(k, block, d).mean(1))
        self.ready = True
        self.recent = self.recent.new_zeros(0, d)
        return torch.ones(k, dtype=torch.bool, device=latents.device)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.ready)

    def set_extra_state(self, state: Tensor) -> None:
        self.ready = bool(state)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # the ring is gone once the codes have started, so its size is part of what is loaded
        loaded = state_dict.get(prefix + "recent")
        if loaded is not None and loaded.shape[1:] == self.recent.shape[1:]:
            self.recent = self.recent.new_zeros(loaded.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, latents_per_code={self.latents_per_code}, ready={self.ready}"
