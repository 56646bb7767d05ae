"""`VectorQuantizer`: a codebook, an estimator and upkeep in one module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vqkernels.checks import check_below, check_choice, check_count, check_kind, refuse
from vqkernels.nn._autocast import full_precision
from vqkernels.nn._linear import finite_linear
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Context, Estimator, finite_rows, mark, no_loss
from vqkernels.nn.quantizers.base import Quantized, Quantizer, check_decodable
from vqkernels.nn.upkeep.base import Upkeep, check_upkeep
from vqkernels.ops import unit_rows


class VectorQuantizer(Quantizer):
    """Quantize latents of any layout to a codebook.

        y = W_in x + b,  y = y / |y| and c = c / |c|      (each where asked for)
        z = W_out estimator(y, c) + b

    Args:
        codebook: where codes come from.
        estimator: how gradients cross.
        upkeep: how codes start and stay alive, in the order in which they commit.
        channel_dim: the dimension of x that holds the D features: -1 for (..., D), 1 for NCHW.
        metric: "euclidean", or "cosine": latents and codes are scaled to length 1 in float32 before they are compared,
            and z is the scaled code.
        dim: D where it differs from the features of a code: linear layers lead into the codes' space and back
            (VQGAN-FC, Yu et al. 2022).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the codebook has too few codes for the estimator, or parts do not fit together.
    """

    def __init__(
        self,
        codebook: Codebook,
        estimator: Estimator,
        upkeep: Sequence[Upkeep] = (),
        *,
        channel_dim: int = -1,
        metric: str = "euclidean",
        dim: int | None = None,
    ):
        name = "VectorQuantizer"
        check_kind(name, "codebook", codebook, Codebook, "Pass such as Codebook(num_codes, dim)")
        check_kind(name, "estimator", estimator, Estimator, "Pass such as STE()")
        check_upkeep(name, upkeep)
        super().__init__(
            codebook.dim if dim is None else check_count(name, "dim", dim, minimum=1), channel_dim=channel_dim
        )
        self.metric = check_choice(name, "metric", metric, ("euclidean", "cosine"))
        estimator.check(codebook)
        self.codebook, self.estimator, self.upkeep = codebook, estimator, nn.ModuleList(upkeep)
        self.project_in = self.project_out = None
        if self.dim != codebook.dim:
            self.project_in = nn.Linear(self.dim, codebook.dim)
            self.project_out = nn.Linear(codebook.dim, self.dim)
        self.noisy = estimator.noisy
        for part in upkeep:
            if part.bound:
                fix = f"Make another {type(part).__name__}"
                refuse(ValueError, name, "upkeep", "belong to one quantizer", "one in use", fix)
            part.check(codebook)
            part.bind(codebook.num_codes, codebook.dim, estimator.num_indices(codebook.num_codes, True))
            part.bound = True
        self.to(codebook.device)
        committed = (type(codebook).commit, Codebook.commit), (type(estimator).commit, Estimator.commit)
        self.changes = bool(upkeep) or any(own is not base for own, base in committed)

    @property
    def num_codes(self) -> int:
        """K."""
        return self.codebook.num_codes

    @property
    def num_indices(self) -> int:
        """How many values `indices[..., 0]` can take in the current mode: K, or K - 1 segments."""
        return self.estimator.num_indices(self.num_codes, self.training)

    @property
    def codes_per_latent(self) -> int:  # type: ignore[override]
        """Q of an evaluation: 2 for a segment and its level, else 1."""
        return self.estimator.codes_per_latent

    @property
    def bits_per_latent(self) -> float:
        """Rate of the evaluation, in bits for each D-dimensional latent; inf where it is not a code."""
        return self.estimator.bits_per_latent(self.num_codes)

    @property
    def initialized(self) -> bool:
        """False while a warm-up runs, or while codes wait for their first batch."""
        return all(part.ready and part.started for part in self._parts())

    @property
    def warming(self) -> bool:
        """Whether training forwards pass x through for now."""
        return not all(part.ready for part in self._parts())

    @property
    def idle(self) -> bool:
        """Whether no schedule of the host will change anything any more."""
        return self.estimator.idle and all(part.idle for part in self._parts())

    def _parts(self) -> Iterator[Upkeep]:
        # typed: to a type checker, a ModuleList holds tensors as well
        return (cast(Upkeep, part) for part in self.upkeep)

    def inside(self, x: Tensor) -> Tensor:
        """Latents (..., D) as they are compared with codes: projected and scaled where asked for."""
        if self.project_in is not None:
            x = finite_linear(x, self.project_in)
        if self.metric == "cosine":
            x = unit_rows(x)
        return x

    def codes(self) -> Tensor:
        """Codes (K, D') as latents are compared with them, differentiable where they are learned."""
        with full_precision(self.codebook.device):
            codes = self.codebook.codes()
            if self.metric == "cosine":
                codes = unit_rows(codes)
            return codes

    def outside(self, z: Tensor) -> Tensor:
        """Codes or quantized latents (..., D') as the decoder sees them, (..., D)."""
        return z if self.project_out is None else finite_linear(z, self.project_out)

    def table(self) -> Tensor:
        """The (K, D) codes as the decoder sees them: what indices stand for."""
        return self._table(self.codes())

    def _table(self, codes: Tensor) -> Tensor:
        """The table of `codes`, which may be expensive to make: whoever has them passes them."""
        with full_precision(self.codebook.device):
            return self.outside(codes)

    def train_rows(self, x: Tensor, context: Context) -> Quantized:
        y = self.inside(x)
        if self.warming:
            return self._warm_up(x, y, context)
        self.start_codes(y, context)
        estimate = self.estimator(y, self.codes(), context._replace(learned=self.codebook.learned))
        self.observe(y, estimate.indices)
        z = self.outside(estimate.z).to(x.dtype)
        if context.mask is not None and self.project_out is not None:
            z = torch.where(context.mask[..., None], z, 0)
        return Quantized(z, estimate.indices[..., None], estimate.loss)

    def start_rows(self, x: Tensor, context: Context) -> None:
        self.start_codes(self.inside(x), context)

    def start_codes(self, y: Tensor, context: Context) -> None:
        """Give the codes their first values from y (..., D'), where they wait for them."""
        for part in self._parts():
            if part.started:
                continue
            if torch.compiler.is_compiling():
                fix = "Call quantizer.initialize(x), or run one training forward, before torch.compile"
                requirement = "be initialized to be compiled"
                refuse(RuntimeError, "VectorQuantizer", "codebook", requirement, part.waiting, fix)
            started = part.start(self.codebook, y.detach(), context)
            if started is not None:
                self._replaced(part, started, None if self._optimizer is None else self._optimizer())

    def _replaced(self, part: Upkeep, rows: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
        part.record(rows, self._step)
        if optimizer is not None:
            _reset_moments(optimizer, self.codebook, rows)

    def _warm_up(self, x: Tensor, y: Tensor, context: Context) -> Quantized:
        # a masked row is passed over like one that is not finite
        self.observe(y if context.mask is None else torch.where(context.mask[..., None], y, torch.nan), None)
        # all parameters take part, so that data-parallel reducers find their gradient
        idle = sum((0 * parameter.sum() for parameter in self.parameters()), start=x.new_zeros(()))
        z = mark(x, finite_rows(x)) + idle.to(x.dtype)
        indices = torch.full((*x.shape[:-1], 1), -1, dtype=torch.int64, device=x.device)
        return Quantized(z, indices, no_loss(x))

    def evaluate_rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check_initialized()
        codes = self.codes()
        z, indices = self.estimator.evaluate(self.inside(x), codes, self._table(codes))
        return z.to(x.dtype), indices

    def encode_rows(self, x: Tensor) -> Tensor:
        self._check_initialized()
        return self.estimator.encode(self.inside(x), self.codes())

    def _check_initialized(self) -> None:
        for part in self._parts():
            if not (part.ready and part.started):
                requirement = "be initialized to evaluate"
                refuse(RuntimeError, "VectorQuantizer", "codebook", requirement, part.waiting, part.remedy)

    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        """Let codebook and upkeep take note of x (..., D') and its training indices (...); None in a warm-up."""
        if not self.observing:
            return
        x = x.detach()
        if indices is not None:
            self.codebook.observe(x, indices)
        for part in self._parts():
            part.observe(x, indices)

    def commit_parts(self, optimizer: torch.optim.Optimizer | None) -> None:
        started = self.initialized
        if started:
            self.codebook.commit()
            self.estimator.commit(self._step)
        for part in self._parts():
            # what keeps codes alive waits until they have started
            if started or not part.ready:
                replaced = part.commit(self.codebook, self._step)
                if replaced is not None:
                    self._replaced(part, replaced, optimizer)

    def decode(self, indices: Tensor) -> Tensor:
        check_decodable(indices, self.codes_per_latent)
        check_below("decode", "indices", indices[..., 0], self.estimator.num_indices(self.num_codes, False))
        return self.estimator.decode(indices, self.table())

    def export(self) -> Tensor:
        return self.table().detach().clone()


def _reset_moments(optimizer: torch.optim.Optimizer, codebook: Codebook, rows: Tensor) -> None:
    for parameter in codebook.row_parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0:
                value.masked_fill_(rows.view(-1, *[1] * (value.dim() - 1)), 0)
