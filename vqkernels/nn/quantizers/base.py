"""What all quantizers have in common: layout, masks, and when their state changes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vqkernels.checks import check_floating, check_kind, check_mask, refuse
from vqkernels.nn._random import all_sum, check_equal_ranks, distributed, draw_seed, first_row
from vqkernels.nn.estimators.base import Context, finite_rows, no_loss
from vqkernels.nn.upkeep.base import Upkeep, UpkeepReport


class Quantized(NamedTuple):
    """What a quantizer returns.

    Attributes:
        z: shape and dtype of x, with the estimator's gradient.
        indices: int64, the shape of x without its channel dimension, plus Q codes per latent at the end.
        loss: 0-d, what the trainer adds to its own loss.
    """

    z: Tensor
    indices: Tensor
    loss: Tensor


class Quantizer(nn.Module):
    """Base of all quantizers: latents of any layout in, `Quantized` out.

    In training mode the estimator runs, and codebook and upkeep only take note of the batch; codes change in
    `commit`, once per optimizer step: by itself after `follow(optimizer)`, else at the start of the next training
    forward, so that without `follow` each forward must have had its backward before the next one. In evaluation
    mode the result is deterministic and `decode(indices).to(x.dtype)` equals z for finite rows, except in the mode
    "curve", which is no code. In a process group every rank must hold as many rows as the others.

    A row with a NaN or Inf gives a row of NaN, and a masked row gives 0 and index -1; neither has a part in any loss,
    statistic or gradient of a code.

    A training step can be captured in a CUDA graph, after a few steps that were not, and draws new noise on each
    replay. What has a schedule runs on the host: with replacement, leave the optimizer unfollowed and call
    `commit(optimizer)` before the capture and after each replay. Without, `follow` as always.

    A subclass writes `train_rows`, `evaluate_rows`, `encode_rows`, `decode`, `export`, `num_codes` and
    `bits_per_latent`, and, where it has something to change, `commit_parts`.

    Args:
        dim: D, features of x.
        channel_dim: the dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        TypeError: `channel_dim` is not an int.
    """

    # Q, codes per latent of an evaluation and of training
    codes_per_latent: int = 1
    # whether a training forward needs a seed, and whether a commit changes anything
    noisy: bool = False
    changes: bool = False

    def __init__(self, dim: int, *, channel_dim: int = -1):
        super().__init__()
        self.dim, self.channel_dim = dim, check_channel_dim(type(self).__name__, channel_dim)
        self._step = 0
        self._uncommitted = self._followed = False
        self._observing = True
        self._hook: RemovableHandle | None = None
        self._optimizer: weakref.ref | None = None

    @property
    def num_codes(self) -> int:
        """K, of each stage or group."""
        raise NotImplementedError

    @property
    def num_indices(self) -> int:
        """How many values `indices[..., 0]` can take in the current mode: K, or K - 1 segments."""
        return self.num_codes

    @property
    def bits_per_latent(self) -> float:
        """Rate of the evaluation, in bits for each D-dimensional latent; inf where it is not a code."""
        raise NotImplementedError

    @property
    def initialized(self) -> bool:
        """False while a warm-up runs, or while codes wait for their first batch."""
        return True

    @property
    def warming(self) -> bool:
        """Whether training forwards pass x through for now."""
        return False

    @property
    def idle(self) -> bool:
        """Whether no schedule of the host will change anything any more."""
        return True

    @property
    def observing(self) -> bool:
        """Whether a training forward takes note of its batch: not in `unobserved`, nor inside a backward pass."""
        return self._observing and not recomputing()

    @property
    def uncommitted(self) -> bool:
        """Whether a training forward waits for its commit."""
        return self._uncommitted

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Training forwards inside take no note of their batch and wait for no commit: probes of a loss, or steps of
        the codes alone."""
        parts = [(part, part._observing) for part in self.modules() if isinstance(part, Quantizer)]
        try:
            for part, _ in parts:
                part._observing = False
            yield
        finally:
            for part, before in parts:
                part._observing = before

    def train_rows(self, x: Tensor, context: Context) -> Quantized:
        """Quantize x (..., D) in training; indices (..., Q)."""
        raise NotImplementedError

    def start_rows(self, x: Tensor, context: Context) -> None:
        """Give codes that wait for a batch their first values from x (..., D)."""

    def evaluate_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize x (..., D) without noise: z in x's dtype and indices (..., Q)."""
        raise NotImplementedError

    def encode_rows(self, x: Tensor) -> Tensor:
        """Indices (..., Q) of x (..., D) without noise."""
        return self.evaluate_rows(x)[1]

    def decode(self, indices: Tensor) -> Tensor:
        """The latents that indices stand for: int64 (..., Q) -> (..., D) in the dtype of the codes.

        The D features come last whatever `channel_dim` is; negative indices (masked rows) give 0.

        Raises:
            TypeError: the indices are not int64.
            ValueError: they have another Q than this evaluation mode, or the mode is "curve", or, on the CPU, one of
                them stands for no code. Elsewhere that would wait for the device, which then complains by itself, or
                returns what means nothing.
        """
        raise NotImplementedError

    def export(self) -> Tensor:
        """A plain (K, D) codebook that decodes identically, detached: a copy that later training does not change."""
        raise NotImplementedError

    def commit_parts(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Change codes by what training forwards have seen since the last commit."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize x, of any shape with D features in `channel_dim`.

        Args:
            x: float16, bfloat16, float32 or float64.
            mask: bool, the shape of x without `channel_dim`: False where a row takes no part, such as padding.

        Raises:
            TypeError, ValueError: x is not floating-point or has another number of features, or the mask does not fit.
            RuntimeError: evaluation before the codes were initialized.
        """
        rows = self._rows(x, mask)
        if self.training:
            z, indices, loss = self._train(rows, mask)
        else:
            z, indices = self.evaluate_rows(rows)
            z, loss = torch.where(finite_rows(rows), z, torch.nan), no_loss(rows)
            if mask is not None:
                z, indices = torch.where(mask[..., None], z, 0), torch.where(mask[..., None], indices, -1)
        return Quantized(laid_out(z.movedim(-1, self.channel_dim), x), indices, loss)

    def initialize(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Start the codes from x, as the first training forward does by itself where upkeep such as `KMeansInit` asks.

        It does nothing where no code waits for a batch. Call it before `torch.compile` or the capture of a CUDA graph,
        on every rank.

        Args:
            x, mask: as of a forward.
        """
        rows = self._rows(x, mask).detach()
        seed = torch.zeros((), dtype=torch.int64, device=rows.device)
        with torch.no_grad():
            self.start_rows(rows, Context(seed, mask=mask))

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Indices of an evaluation, int64 (..., Q), in any mode: no noise, no statistics, no gradient.

        Args:
            x, mask: as of a forward.
        """
        indices = self.encode_rows(self._rows(x, mask).detach())
        return indices if mask is None else torch.where(mask[..., None], indices, -1)

    def _rows(self, x: Tensor, mask: Tensor | None) -> Tensor:
        rows = latent_rows(type(self).__name__, x, self.dim, self.channel_dim, mask)
        if mask is None:
            return rows
        # what padding holds must reach nothing, not even as 0 * nan
        return torch.where(mask[..., None], rows, 0)

    def _train(self, x: Tensor, mask: Tensor | None) -> Quantized:
        self._begin()
        rows = x.shape[:-1].numel()
        if self.noisy:
            check_equal_ranks(rows, x.device)
            seed = draw_seed(x.device)
        else:
            seed = torch.zeros((), dtype=torch.int64, device=x.device)
        return self.train_rows(x, Context(seed, first_row(rows), mask, mean_rows(x, mask)))

    def _begin(self) -> None:
        """Catch up with the commit that nobody called since the last training forward."""
        if not self.observing:
            return
        if _capturing(self._device()):
            self._check_capture()
        if self._followed:
            self._uncommitted = True
            return
        if torch.compiler.is_compiling():
            # codes change between compiled steps, by the hook of the optimizer
            if self.changes:
                fix = "Call quantizer.follow(optimizer) before torch.compile"
                refuse(RuntimeError, type(self).__name__, "optimizer", "be followed to compile", "none", fix)
            return
        if self._uncommitted:
            self.commit()
        self._uncommitted = True

    def _device(self) -> torch.device:
        tensors = next(self.parameters(), None), next(self.buffers(), None)
        return next((t.device for t in tensors if t is not None), torch.device("cpu"))

    def _check_capture(self) -> None:
        """Refuse what a replay would do otherwise than a step: the host's part in it happens only once."""
        op = type(self).__name__
        if not self.initialized:
            requirement = "be initialized to be captured in a CUDA graph"
            fix = "Capture after the warm-up, or after quantizer.initialize(x) where there is none"
            refuse(RuntimeError, op, "codebook", requirement, "one that has not started", fix)
        if (self._followed or self._uncommitted) and not self.idle:
            requirement = (
                "be committed by hand where a CUDA graph is captured, for replays advance no schedule"
            )
            got = "a followed optimizer" if self._followed else "a forward that waits for its commit"
            fix = (
                "Call quantizer.commit(optimizer) before the capture and after each replay, and follow nobody"
            )
            refuse(RuntimeError, op, "upkeep", requirement, got, fix)

    def commit(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change codes by what training forwards have seen since the last commit; once per optimizer step.

        Args:
            optimizer: its moments of replaced codes are reset. Adam's count of steps is one for all codes and is not:
                the first steps of a replaced code are up to (1 - beta1) / sqrt(1 - beta2) learning rates long.
        """
        self._step += 1
        self._uncommitted = False
        self.commit_parts(optimizer)

    def report(self) -> list[UpkeepReport]:
        """What each upkeep has replaced so far, those of stages or groups included; waits for no device."""
        parts = ((name, part) for name, part in self.named_modules() if isinstance(part, Upkeep))
        return [part.report(name) for name, part in parts]

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Commit after every step of `optimizer`, and reset its moments of replaced codes.

        A step without a training forward before it commits nothing. Following another optimizer ends following
        the first; a copy of this module follows nobody until it is told to.

        Args:
            optimizer: the one that steps; not a wrapper around it.

        Raises:
            TypeError: it is no torch optimizer.
        """
        fix = "Pass the torch optimizer itself"
        check_kind(type(self).__name__, "optimizer", optimizer, torch.optim.Optimizer, fix)
        if self._optimizer is not None and self._optimizer() is optimizer:
            return
        if self._hook is not None:
            self._hook.remove()
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self._optimizer, self._followed = weakref.ref(optimizer), True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._uncommitted:
            self.commit(optimizer)

    def __getstate__(self) -> dict:
        # hooks stay with the optimizer of the original
        return self.__dict__ | {"_followed": False, "_hook": None, "_optimizer": None}

    def get_extra_state(self) -> Tensor:
        """The number of commits so far, and whether a forward waits for one, as a tensor."""
        return torch.tensor([self._step, int(self._uncommitted)])

    def set_extra_state(self, state: Tensor) -> None:
        """Continue counting commits from a loaded state."""
        self._step, self._uncommitted = int(state[0]), bool(state[1])


def check_channel_dim(op: str, channel_dim: int) -> int:
    """An int."""
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        fix = "Pass -1 for (..., D), 1 for NCHW"
        refuse(TypeError, op, "channel_dim", "be an int", repr(channel_dim), fix)
    return channel_dim


def latent_rows(op: str, x: Tensor, dim: int, channel_dim: int, mask: Tensor | None) -> Tensor:
    """x with its features last (..., D), and a mask, where there is one, that fits: bool (...)."""
    check_floating(op, "x", x)
    if not -x.dim() <= channel_dim < x.dim() or x.shape[channel_dim] != dim:
        requirement = f"have {dim} features in dimension {channel_dim}"
        fix = "Pass the channel_dim that holds them"
        refuse(ValueError, op, "x", requirement, f"shape {tuple(x.shape)}", fix)
    rows = x.movedim(channel_dim, -1)
    if mask is not None:
        check_mask(op, mask, rows.shape[:-1], x.device)
    return rows


def check_decodable(indices: Tensor, codes_per_latent: int) -> None:
    """Indices that `decode` can take: int64 (..., Q)."""
    if not isinstance(indices, Tensor):
        refuse(
            TypeError,
            "decode",
            "indices",
            "be a tensor",
            type(indices).__name__,
            "Pass torch.tensor(indices)",
        )
    if indices.dtype != torch.int64:
        refuse(TypeError, "decode", "indices", "be int64", indices.dtype, "Call indices.long()")
    if indices.dim() < 1 or indices.shape[-1] != codes_per_latent:
        fix = "Pass the indices that a forward of this quantizer returned"
        refuse(ValueError, "decode", "indices", f"be (..., {codes_per_latent})", tuple(indices.shape), fix)


def laid_out(z: Tensor, x: Tensor) -> Tensor:
    """z in the layout of x, so that convolutions behind a quantizer find the memory format they had before it."""
    like = torch.empty_like(x, dtype=z.dtype)
    return z if z.stride() == like.stride() else like.copy_(z)


def mean_rows(x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Rows that count, averaged over ranks; None in one process, where whoever needs it counts them."""
    if not distributed():
        return None
    counted = finite_rows(x).squeeze(-1)
    counted = counted if mask is None else counted & mask
    return all_sum(counted.sum()) / dist.get_world_size()


def _capturing(device: torch.device) -> bool:
    """Whether this forward is captured in a CUDA graph, whose replays do not run it again."""
    # a build of torch without cuda has no answer to the question
    on_cuda = device.type == "cuda" and not torch.compiler.is_compiling()
    return on_cuda and torch.cuda.is_current_stream_capturing()


def recomputing() -> bool:
    """Whether this forward is run again inside a backward pass, by activation checkpointing."""
    # a compiled graph is recomputed by the compiler, without running this module
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
