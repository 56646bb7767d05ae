"""`VectorQuant`, and what the layers of vqtorch have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_count, check_flag, check_number, refuse
from vqkernels.compat._copies import kept
from vqkernels.compat.face import Face, unserved
from vqkernels.compat.vqtorch.nn.adoption import carry, options_of
from vqkernels.compat.vqtorch.nn.affine import AffineTransform
from vqkernels.compat.vqtorch.nn.norms import check_cb_norm, norm_of_latents, normalize_codes
from vqkernels.compat.vqtorch.nn.upkeep import centroids, inner_step, lru_replacement, replace_unused
from vqkernels.nn._autocast import full_precision
from vqkernels.nn.quantizers.base import recomputing
from vqkernels.ops import nearest_code, straight_through

Optimizers = Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]


class Search(NamedTuple):
    """What a search of all groups found.

    Attributes:
        indices: (..., G) int64 codes of all codebooks together.
        sq_dist: (..., G).
        rows: (S, n, D) what each codebook searched for.
        chosen: (S, n) the indices in that order.
    """

    indices: Tensor
    sq_dist: Tensor
    rows: Tensor
    chosen: Tensor


class VectorQuant(Face):
    """vqtorch's straight-through quantizer with its remedies for collapse (Huh et al. 2023).

        z_q  = z + sg[c_i - z] + nu (c_i - sg[c_i]),   i = argmin_j |z - c_j|                         (eq. 21)
        loss = (1 - beta) mean (z - sg[c_i])^2 + beta mean (sg[z] - c_i)^2

    The search is exact in every dtype and needs no N x K matrix; the value of z_q is the code itself. A latent in half
    precision meets codes in float32 and z_q is float32.

    What vqtorch does otherwise is in `differences`. Codes that a forward replaces, starts or moves by
    `inplace_optimizer` have changed when it returns; the gradient is of the codes before. A checkpointed region whose
    codes change inside forward sees the new ones when it runs again, without counting twice.

    Args:
        feature_size: D, features of a latent.
        num_codes: K.
        beta: share of the codebook loss, in [0, 1].
        sync_nu: nu >= 0, the share of the task's gradient that goes to the code.
        affine_lr: > 0 puts a learned scale and bias, 0 at first, between codes and latents.
        affine_groups: blocks of consecutive codes that have a scale and a bias each; divides K.
        replace_freq: forwards after which an unused code becomes a latent of the batch, 2 or more; 0 for never.
        inplace_optimizer: makes an optimizer of an iterator of parameters, which takes a step on mean (z - c_i)^2 in
            each training forward before z_q is made; with `beta` = 1 alone.
        dim: where the features are in z.
        norm: of latents: None, "none", "l2" (unit length), "l2c" (length 10 at most), "bn", "gn" or "in".
        cb_norm: of codes, in every forward: None, "none", "l2" (length 10 at most) or "l2c" (unit length).
        kmeans_init: start the codes by k-means on the first training batch, before it is quantized.
        code_vector_size: None or `feature_size`.

    Raises:
        UnservedOption: `code_vector_size` is another number, which vqtorch does not use either.
        TypeError, ValueError: an argument is out of range.
    """

    peers = ("vqtorch.nn.vq.VectorQuant",)
    differences = (
        "The peer searches in float16 on CUDA; ours searches exactly everywhere.",
        "The peer runs kmeans_init after the first training forward; ours before it quantizes.",
        "The peer's kmeans_init needs torchpq, and has fewer codes where rows are few; ours has all.",
        "The peer replaces codes by input latents; ours by those that were searched, behind the affine map.",
        "The peer replaces unused codes on each rank by its own latents; ours does alike on all ranks.",
        "The peer's inplace_optimizer fails with affine_lr; ours steps with it.",
        "The peer's inplace_optimizer moves nothing in groups; ours steps once per forward.",
        "The peer's inplace_optimizer steps along left-over gradients and clears them; ours leaves them.",
        "The peer fails at `requires_grad` and `set_requires_grad`; ours serves them.",
    )
    cdist_chunk_size = 1024
    enabled = True
    topk = 1
    # replacement, by `lru_replacement`
    replace_freq = 0
    replace_rho = 0.0
    # features are split into this many groups before the search
    parts = 1
    inplace_codebook_optimizer: torch.optim.Optimizer | None = None
    _counts: Tensor
    data_initialized: Tensor

    def __init__(
        self,
        feature_size: int,
        num_codes: int,
        beta: float = 0.95,
        sync_nu: float = 0.0,
        affine_lr: float = 0.0,
        affine_groups: int = 1,
        replace_freq: int = 0,
        inplace_optimizer: Optimizers | None = None,
        dim: int = 1,
        norm: str | None = "none",
        cb_norm: str | None = "none",
        kmeans_init: bool = False,
        code_vector_size: int | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.feature_size = check_count(name, "feature_size", feature_size, minimum=1)
        if code_vector_size not in (None, feature_size):
            unserved(name, "code_vector_size", code_vector_size, "Leave it out")
        self._build(
            feature_size,
            num_codes,
            1,
            beta=beta,
            sync_nu=sync_nu,
            affine_lr=affine_lr,
            affine_groups=affine_groups,
            replace_freq=replace_freq,
            inplace_optimizer=inplace_optimizer,
            dim=dim,
            norm=norm,
            cb_norm=cb_norm,
            kmeans_init=kmeans_init,
        )

    def _build(
        self,
        width: int,
        num_codes: int,
        books: int,
        *,
        beta: float,
        sync_nu: float,
        affine_lr: float,
        affine_groups: int,
        replace_freq: int,
        inplace_optimizer: Optimizers | None,
        dim: int,
        norm: str | None,
        cb_norm: str | None,
        kmeans_init: bool,
    ) -> None:
        """Everything of a layer with S = `books` codebooks of K // S codes of `width` features."""
        name = type(self).__name__
        self.code_vector_size, self.groups, self.share = width, 1, True
        self.num_codes = check_count(name, "num_codes", num_codes, minimum=books)
        self.group_size, self.books = num_codes // books, books
        self.beta = check_number(name, "beta", beta, up_to=1)
        self.nu = check_number(name, "sync_nu", sync_nu)
        self.affine_lr = check_number(name, "affine_lr", affine_lr)
        check_count(name, "affine_groups", affine_groups, minimum=1)
        self.dim, self.norm, self.codebook_norm = dim, norm, check_cb_norm(name, cb_norm)
        self.norm_layer, self.norm_before_grouping = norm_of_latents(name, norm, self.feature_size)
        # None while only the buffer knows
        self._started: bool | None = True
        if check_flag(name, "kmeans_init", kmeans_init):
            self.register_buffer("data_initialized", torch.zeros(1))
            self._started = None
        self.codebook = nn.Embedding(self.group_size * books, width)
        if inplace_optimizer is not None:
            if beta != 1:
                fix = "Pass beta=1.0: the codes move in forward"
                refuse(ValueError, name, "beta", "be 1 with inplace_optimizer", beta, fix)
            self.inplace_codebook_optimizer = inplace_optimizer(self.codebook.parameters())
        if affine_lr > 0:
            if self.group_size % affine_groups:
                requirement = f"divide {self.group_size} codes"
                refuse(ValueError, name, "affine_groups", requirement, affine_groups, "Pass affine_groups=1")
            self.affine_transform = AffineTransform(width, lr_scale=affine_lr, num_groups=affine_groups)
        if check_count(name, "replace_freq", replace_freq) > 0:
            lru_replacement(self, rho=0.01, timeout=replace_freq)

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Quantize.

        Args:
            z: 3 dimensions or more, features at `dim`.

        Returns:
            z_q: the shape of z.
            What was found, with G = 1 but in groups: "z" and "z_q" (..., G, D) with features last, "d" (..., G) the
            distance to the code, "q" (..., G) int64 the code, "loss", "perplexity" None. Empty where not `enabled`.

        Raises:
            ValueError: z has too few dimensions or other features.
        """
        rows = self.prepare_inputs(z, self.parts)  # (..., G, D)
        if not self.enabled:
            return self.to_original_format(rows), {}
        with full_precision(z.device):
            if self.training:
                self._start(rows)
            normalize_codes(self.codebook.weight, self.codebook_norm)
            found = self._search(rows, self._codes().detach())
            if self.training and self.inplace_codebook_optimizer is not None and not recomputing():
                inner_step(self, found.rows, found.chosen)
            codes = self._codes()  # (S, K, D)
            z_q, result = self._cross(rows, codes.flatten(0, 1), found)
            if self.training and self.replace_freq > 0:
                replace_unused(self, found.rows, found.chosen)
        return self.to_original_format(z_q), result

    def _search(self, rows: Tensor, codes: Tensor) -> Search:
        """The nearest code of each group of rows (..., G, D) in codes (S, K, D)."""
        rows = rows.detach()
        if self.books == 1:
            indices, sq_dist = nearest_code(rows, codes[0])
            return Search(indices, sq_dist, rows.reshape(1, -1, rows.shape[-1]), indices.view(1, -1))
        grouped = rows.movedim(-2, 0)  # (G, ..., D)
        indices, sq_dist = nearest_code(grouped, codes)
        first = torch.arange(self.books, device=rows.device) * self.group_size
        indices = indices + first.view(-1, *[1] * (indices.dim() - 1))
        return Search(
            indices.movedim(0, -1).contiguous(),
            sq_dist.movedim(0, -1).contiguous(),
            grouped.flatten(1, -2),
            indices.flatten(1),
        )

    def _cross(self, rows: Tensor, codes: Tensor, found: Search) -> tuple[Tensor, dict[str, Any]]:
        """z_q (..., G, D) with its gradient, and the dict that goes with it."""
        z_q, loss = straight_through(
            self._wide(rows, codes),
            codes,
            found.indices,
            commitment=1 - self.beta,
            codebook_weight=self.beta,
            sync=self.nu,
        )
        return z_q, self._result(rows, F.embedding(found.indices, codes), found, loss, rows.dtype)

    def _result(
        self, rows: Tensor, z_q: Tensor, found: Search, loss: Tensor, dtype: torch.dtype
    ) -> dict[str, Any]:
        distance = found.sq_dist.sqrt().to(dtype)
        return {"z": rows, "z_q": z_q, "d": distance, "q": found.indices, "loss": loss, "perplexity": None}

    @staticmethod
    def _wide(rows: Tensor, codes: Tensor) -> Tensor:
        return rows.to(torch.promote_types(rows.dtype, codes.dtype))

    def _sample_loss(self, z: Tensor, z_q: Tensor) -> Tensor:
        """The loss of each sample, (B,)."""
        commitment = (z - z_q.detach()).square().flatten(1).mean(1)
        return (1 - self.beta) * commitment + self.beta * (z.detach() - z_q).square().flatten(1).mean(1)

    def _codes(self) -> Tensor:
        """Codes as latents meet them, (S, K, D)."""
        weight = self.codebook.weight
        changes = self.inplace_codebook_optimizer is not None or self.replace_freq > 0
        if torch.is_grad_enabled() and (changes or self.codebook_norm in ("l2", "l2c")):
            # a backward that is pending must not see what a later forward writes
            weight = kept(weight)
        codes = weight.view(self.books, self.group_size, -1)
        return self.affine_transform(codes) if hasattr(self, "affine_transform") else codes

    @torch.no_grad()
    def assign(self, codes: Tensor, where: Tensor | None = None) -> None:
        """Overwrite codes (S, K, D) as latents meet them: all, or those of the (S, K) mask `where`."""
        weight = self.codebook.weight
        old = weight.view(codes.shape)
        new = self.affine_transform.inverse(codes, old) if hasattr(self, "affine_transform") else codes
        new = new.to(weight.dtype)
        weight.copy_((new if where is None else torch.where(where[..., None], new, old)).view_as(weight))

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        if self._started is None:
            # waits for the device, once
            self._started = bool(self.data_initialized)
        if not self._started:
            self.assign(self._first_codes(rows.detach()))
            self.data_initialized.fill_(1)
            self._started = True

    def _first_codes(self, rows: Tensor) -> Tensor:
        books = rows.reshape(1, -1, rows.shape[-1]) if self.books == 1 else rows.movedim(-2, 0).flatten(1, -2)
        return torch.stack([centroids(book, self.group_size) for book in books])

    def prepare_inputs(self, z: Tensor, groups: int) -> Tensor:
        """Latents (..., G, D), normalised, of a tensor z with features at `dim`.

        Raises:
            ValueError: z has too few dimensions or other features.
        """
        name = type(self).__name__
        if z.dim() <= 2:
            shape = f"shape {tuple(z.shape)}"
            refuse(ValueError, name, "z", "have 3 dimensions or more", shape, "Call z[:, None] with dim=-1")
        if z.shape[self.dim] != self.feature_size:
            requirement = f"have {self.feature_size} features at dim {self.dim}"
            refuse(ValueError, name, "z", requirement, f"shape {tuple(z.shape)}", "Pass another dim")
        return self._grouped(z, groups, self.norm_layer)

    def _grouped(self, z: Tensor, groups: int, norm_layer: nn.Module) -> Tensor:
        z = norm_layer(z) if self.norm_before_grouping else z
        z = z.moveaxis(self.dim, -1).contiguous().unflatten(-1, (groups, -1))
        return z if self.norm_before_grouping else norm_layer(z)

    def to_original_format(self, x: Tensor) -> Tensor:
        """Undo the layout of `prepare_inputs`."""
        return x.flatten(-2, -1).moveaxis(-1, self.dim)

    @torch.no_grad()
    def get_codebook(self) -> Tensor:
        """The codes (K, D) as latents meet them."""
        return self._codes().flatten(0, 1)

    def get_codebook_affine_params(self) -> tuple[Tensor, Tensor] | None:
        """Scale and bias, each (A, 1, D), or None without them."""
        return self.affine_transform.get_affine_params() if hasattr(self, "affine_transform") else None

    @property
    def requires_grad(self) -> bool:
        """Whether the codes learn."""
        return self.codebook.weight.requires_grad

    def set_requires_grad(self, requires_grad: bool) -> None:
        """Let the codes learn, or not."""
        self.codebook.weight.requires_grad = requires_grad

    def extra_repr(self) -> str:
        """Sizes."""
        return f"num_codes={self.num_codes}, groups={self.groups}, enabled={self.enabled}"

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if "data_initialized" in self._buffers:
            self._started = None

    @classmethod
    def options_of(cls, peer: nn.Module) -> dict[str, object]:
        """The keywords that would construct `peer` anew."""
        return options_of(cls.__name__, peer)

    def carry(self, peer: nn.Module) -> None:
        """The peer's own submodules, switch and optimizer; its hooks that start and replace codes are left behind."""
        carry(self, peer)

    @staticmethod
    def outcome(result: tuple) -> tuple[Tensor, Tensor]:
        """z_q and "q"."""
        return result[0], result[1]["q"]

    @torch.no_grad()
    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor:
        """Squared distances (..., G) in float64 of what is searched in x to the codes `indices`."""
        rows = self._grouped(x, self.parts, deepcopy(self.norm_layer)).double()
        chosen = F.embedding(indices, self.get_codebook().double())
        return (self._searched(rows, chosen) - chosen).square().sum(-1)

    @staticmethod
    def _searched(rows: Tensor, chosen: Tensor) -> Tensor:
        """What was searched in rows (..., G, D) before `chosen` were found."""
        return rows
