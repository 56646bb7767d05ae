"""`VectorQuantizer`: a codebook, an estimator and upkeep in one module."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vqkernels.checks import check_floating, refuse
from vqkernels.nn._random import check_equal_ranks, draw_seed, first_row
from vqkernels.nn.codebooks import Codebook
from vqkernels.nn.estimators import Estimator, finite_rows, mark
from vqkernels.nn.upkeep import Upkeep


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


class VectorQuantizer(nn.Module):
    """Quantize latents of any layout to a codebook.

    In training mode the estimator runs, and codebook and upkeep only take note of the batch; codes change in
    `commit`, once per optimizer step: by itself after `follow(optimizer)`, else at the start of the next training
    forward, so that without `follow` each forward must have had its backward before the next one. In evaluation
    mode the result is deterministic and `decode(indices).to(x.dtype)` equals z for finite rows, except in the mode
    "curve", which is no code. In a process group every rank must hold as many rows as the others.

    A training step can be captured in a CUDA graph, after a few steps that were not, and draws new noise on each
    replay. What has a schedule runs on the host: with replacement, leave the optimizer unfollowed and call
    `commit(optimizer)` before the capture and after each replay. Without, `follow` as always.

    Args:
        codebook: where codes come from.
        estimator: how gradients cross.
        upkeep: how codes start and stay alive, in the order in which they commit.
        channel_dim: the dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.

    Raises:
        ValueError: the codebook has too few codes for the estimator, or an upkeep cannot serve it.
    """

    def __init__(
        self,
        codebook: Codebook,
        estimator: Estimator,
        upkeep: Sequence[Upkeep] = (),
        *,
        channel_dim: int = -1,
    ):
        super().__init__()
        if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
            fix = "Pass -1 for (..., D), 1 for NCHW"
            refuse(TypeError, "VectorQuantizer", "channel_dim", "be an int", repr(channel_dim), fix)
        if codebook.num_codes < estimator.min_codes:
            requirement = f"have at least {estimator.min_codes} codes for {type(estimator).__name__}"
            refuse(
                ValueError,
                "VectorQuantizer",
                "codebook",
                requirement,
                codebook.num_codes,
                "Pass more num_codes",
            )
        self.codebook, self.estimator, self.upkeep = codebook, estimator, nn.ModuleList(upkeep)
        self.channel_dim = channel_dim
        for part in upkeep:
            if part.bound:
                fix = f"Make another {type(part).__name__}"
                refuse(ValueError, "VectorQuantizer", "upkeep", "belong to one quantizer", "one in use", fix)
            part.bind(codebook.num_codes, codebook.dim, estimator.num_indices(codebook.num_codes, True))
            part.bound = True
        self.to(codebook.weight.device)
        self._step = 0
        self._uncommitted = self._followed = False
        self._hook: RemovableHandle | None = None
        self._optimizer: weakref.ref | None = None

    @property
    def num_codes(self) -> int:
        """K."""
        return self.codebook.num_codes

    @property
    def num_indices(self) -> int:
        """How many values `indices[..., 0]` can take in the current mode: K, or K - 1 segments."""
        return self.estimator.num_indices(self.num_codes, self.training)

    @property
    def bits_per_latent(self) -> float:
        """Rate of the evaluation, in bits for each D-dimensional latent; inf where it is not a code."""
        return self.estimator.bits_per_latent(self.num_codes)

    @property
    def initialized(self) -> bool:
        """False while a warm-up runs."""
        return all(part.ready for part in self._parts())

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x, of any shape with D features in `channel_dim`.

        Raises:
            TypeError, ValueError: x is not floating-point or has another number of features.
            RuntimeError: evaluation before the codes were initialized.
        """
        check_floating("VectorQuantizer", "x", x)
        if not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != self.codebook.dim:
            requirement = f"have {self.codebook.dim} features in dimension {self.channel_dim}"
            fix = "Pass the channel_dim that holds them"
            refuse(ValueError, "VectorQuantizer", "x", requirement, f"shape {tuple(x.shape)}", fix)
        rows = x.movedim(self.channel_dim, -1)
        if not self.training:
            z, indices, loss = self._evaluate(rows)
        elif self.initialized:
            z, indices, loss = self._train(rows)
        else:
            z, indices, loss = self._warm_up(rows)
        return Quantized(z.movedim(-1, self.channel_dim), indices, loss)

    def _parts(self) -> Iterator[Upkeep]:
        # typed: to a type checker, a ModuleList holds tensors as well
        return (cast(Upkeep, part) for part in self.upkeep)

    def _train(self, x: Tensor) -> Quantized:
        self._begin()
        rows = x.shape[:-1].numel()
        if self.estimator.noisy:
            check_equal_ranks(rows, x.device)
            seed = draw_seed(x.device)
        else:
            seed = torch.zeros((), dtype=torch.int64, device=x.device)
        z, indices, loss = self.estimator(x, self.codebook.codes(), seed, first_row(rows))
        self._observe(x, indices)
        return Quantized(z, indices[..., None], loss)

    def _warm_up(self, x: Tensor) -> Quantized:
        self._begin()
        self._observe(x, None)
        # the codes take part, so that data-parallel reducers find their gradient
        codes = self.codebook.codes()
        z = mark(x, finite_rows(x)) + (0 * codes.sum()).to(x.dtype)
        indices = torch.full((*x.shape[:-1], 1), -1, dtype=torch.int64, device=x.device)
        return Quantized(z, indices, x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)))

    def _evaluate(self, x: Tensor) -> Quantized:
        if not self.initialized:
            fix = "Train through the warm-up first, or load a state_dict"
            refuse(
                RuntimeError,
                "VectorQuantizer",
                "codebook",
                "be initialized to evaluate",
                "a warm-up under way",
                fix,
            )
        z, indices = self.estimator.evaluate(x, self.codebook.codes())
        z = mark(z.to(x.dtype), finite_rows(x))
        return Quantized(z, indices, x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)))

    def _begin(self) -> None:
        """Catch up with the commit that nobody called since the last training forward."""
        if _recomputing():
            return
        if _capturing(self.codebook.weight.device):
            self._check_capture()
        if self._followed:
            self._uncommitted = True
            return
        if torch.compiler.is_compiling():
            # codes change between compiled steps, by the hook of the optimizer
            if len(self.upkeep) or type(self.codebook).commit is not Codebook.commit:
                fix = "Call quantizer.follow(optimizer) before torch.compile"
                refuse(RuntimeError, "VectorQuantizer", "optimizer", "be followed to compile", "none", fix)
            return
        if self._uncommitted:
            self.commit()
        self._uncommitted = True

    def _check_capture(self) -> None:
        """Refuse what a replay would do otherwise than a step: the host's part in it happens only once."""
        op = "VectorQuantizer"
        if not self.initialized:
            requirement = "be initialized to be captured in a CUDA graph"
            refuse(RuntimeError, op, "codebook", requirement, "a warm-up under way", "Capture after it")
        if (self._followed or self._uncommitted) and not all(part.idle for part in self._parts()):
            requirement = (
                "be committed by hand where a CUDA graph is captured, for replays advance no schedule"
            )
            got = "a followed optimizer" if self._followed else "a forward that waits for its commit"
            fix = (
                "Call quantizer.commit(optimizer) before the capture and after each replay, and follow nobody"
            )
            refuse(RuntimeError, op, "upkeep", requirement, got, fix)

    def _observe(self, x: Tensor, indices: Tensor | None) -> None:
        if _recomputing():
            return
        x = x.detach()
        if indices is not None:
            self.codebook.observe(x, indices)
        for part in self._parts():
            part.observe(x, indices)

    def commit(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Change codes by what training forwards have seen since the last commit; once per optimizer step.

        Args:
            optimizer: its moments of replaced codes are reset.
        """
        self._step += 1
        self._uncommitted = False
        started = self.initialized
        if started:
            self.codebook.commit()
        for part in self._parts():
            # what keeps codes alive waits until they have started
            if started or not part.ready:
                replaced = part.commit(self.codebook, self._step)
                if replaced is not None and optimizer is not None:
                    _reset_moments(optimizer, self.codebook, replaced)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Commit after every step of `optimizer`, and reset its moments of replaced codes.

        A step without a training forward before it commits nothing. Following another optimizer ends following
        the first; a copy of this module follows nobody until it is told to.

        Args:
            optimizer: the one that steps; not a wrapper around it.
        """
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

    def decode(self, indices: Tensor) -> Tensor:
        """The latents that indices stand for: int64 (..., Q) -> (..., D) in the dtype of the codes.

        The D features come last whatever `channel_dim` is; negative indices (masked rows) give 0.

        Raises:
            TypeError: the indices are not int64.
            ValueError: they have another Q than this evaluation mode, or the mode is "curve".
        """
        codes_per_latent = self.estimator.codes_per_latent
        if indices.dtype != torch.int64:
            refuse(TypeError, "decode", "indices", "be int64", indices.dtype, "Call indices.long()")
        if indices.dim() < 1 or indices.shape[-1] != codes_per_latent:
            fix = "Pass the indices that a forward of this quantizer returned"
            refuse(
                ValueError, "decode", "indices", f"be (..., {codes_per_latent})", tuple(indices.shape), fix
            )
        return self.estimator.decode(indices, self.codebook.codes())

    def export(self) -> Tensor:
        """A plain (K, D) codebook, detached: a copy that later training does not change."""
        return self.codebook.codes().detach().clone()

    def get_extra_state(self) -> Tensor:
        """The number of commits so far, and whether a forward waits for one, as a tensor."""
        return torch.tensor([self._step, int(self._uncommitted)])

    def set_extra_state(self, state: Tensor) -> None:
        """Continue counting commits from a loaded state."""
        self._step, self._uncommitted = int(state[0]), bool(state[1])


def _capturing(device: torch.device) -> bool:
    """Whether this forward is captured in a CUDA graph, whose replays do not run it again."""
    # a build of torch without cuda has no answer to the question
    on_cuda = device.type == "cuda" and not torch.compiler.is_compiling()
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _recomputing() -> bool:
    """Whether this forward is run again inside a backward pass, by activation checkpointing."""
    # a compiled graph is recomputed by the compiler, without running this module
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _reset_moments(optimizer: torch.optim.Optimizer, codebook: Codebook, rows: Tensor) -> None:
    for parameter in codebook.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == codebook.weight.shape == parameter.shape:
                value.masked_fill_(rows[:, None], 0)
