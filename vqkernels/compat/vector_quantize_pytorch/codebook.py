"""The state that the peer calls `_codebook`: codes, moving averages, and what keeps codes alive."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.compat.vector_quantize_pytorch import affine as moments
from vqkernels.compat.vector_quantize_pytorch.affine import Affine, Kept
from vqkernels.nn._random import all_rows, all_sum, distributed, draw_seed_aside, of_first_rank
from vqkernels.nn.upkeep.kmeans import kmeans
from vqkernels.nn.upkeep.recent import usable
from vqkernels.ops import code_sums, nearest_code, unit_rows

Weight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class Codebook(Kept):
    """Codes (G, K, D) of G heads under the peer's state keys.

        h' = decay h + (1 - decay) n,   m' = decay m + (1 - decay) sum x
        c' = m' / ((h' + eps) / (sum h' + K eps) sum h')                  (van den Oord et al. 2017, with smoothing)

    Args:
        dim: D.
        codebook_size: K.
        num_codebooks: G.
        kmeans_init, kmeans_iters, sync_kmeans: whether codes start by k-means on the first batch, and how.
        decay, eps: of the moving averages.
        threshold_ema_dead_code: a code whose h falls below is replaced by a row of the batch; 0 for never.
        sync: whether ranks share statistics; None for whenever there is a process group.
        learnable: whether codes are a parameter.
        use_cosine_sim: whether codes have length 1.
        ema_update, manual_ema_update: whether codes follow the averages, and whether only `update_ema` makes them.
        affine: how the affine map is kept; None for no such map.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        sync: bool | None = None,
        learnable: bool = False,
        use_cosine_sim: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        affine: Affine | None = None,
    ):
        super().__init__()
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = unit_rows(embed) if use_cosine_sim else embed
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans = kmeans_iters, sync_kmeans
        self.decay, self.eps = decay, eps
        self.threshold_ema_dead_code = self.reset_cluster_size = threshold_ema_dead_code
        self.has_dead_code_replacement = threshold_ema_dead_code > 0
        self.sync, self.use_cosine_sim = sync, use_cosine_sim
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        self.learnable_codebook = learnable
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self.affine = affine
        if affine is not None:
            moments.register(self, num_codebooks, dim)
        # what `initted` says, known to the host; None where it has to be read again
        self._started: bool | None = not kmeans_init

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if self.affine is not None:
            moments.expect(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.ask_whether_started()

    def ask_whether_started(self) -> None:
        """Read `initted` again, as somebody may have written it; at the next forward where it has no value yet."""
        # at once where that can be, for a compiled forward cannot
        read = type(self.initted) is Tensor and not self.initted.is_meta
        self._started = bool(self.initted) if read else None

    @property
    def use_ddp(self) -> bool:
        """Whether ranks share statistics now."""
        return self.sync is not False and distributed()

    def transform_input(self, x: Tensor) -> Tensor:
        """Rows as they are compared with codes: of length 1 where asked for."""
        return unit_rows(x) if self.use_cosine_sim else x

    def codes(self) -> Tensor:
        """The (G, K, D) codes that stand for indices, differentiable where they are learned."""
        codes = self.embed if self.learnable_codebook else self.embed.detach()
        return codes if self.affine is None else moments.outward(self, codes)

    def learn_moments(self, x: Tensor, mask: Tensor | None) -> None:
        """Take the moments of x (G, ..., D) and its mask (G, ...), where there is an affine map."""
        if self.affine is not None:
            moments.learn(self, self.affine, x, mask)

    def searched(self, codes: Tensor) -> Tensor:
        """Codes as rows are compared with them, without gradient: by direction where rows have length 1."""
        codes = codes.detach()
        return _directions(codes) if self.use_cosine_sim else codes

    def nearest(self, x: Tensor, codes: Tensor) -> Tensor:
        """Nearest code of each row: x (G, ..., D), codes (G, K, D) -> (G, ...)."""
        codes = self.searched(codes)
        if len(codes) == 1:
            return nearest_code(x[0], codes[0]).indices[None]
        return nearest_code(x, codes).indices

    def flat(self, indices: Tensor) -> Tensor:
        """Indices (G, ...) into the codes of all heads, (G * K, D); -1 stays."""
        if self.num_codebooks == 1:
            return indices
        first = torch.arange(self.num_codebooks, device=indices.device) * self.codebook_size
        return torch.where(indices < 0, indices, indices + first.view(-1, *[1] * (indices.dim() - 1)))

    def moves(self, ema_update: bool | None = None) -> bool:
        """Whether an update with a batch writes codes."""
        ema_update = self.ema_update if ema_update is None else ema_update
        return ema_update or self.has_dead_code_replacement

    @torch.no_grad()
    def start(self, x: Tensor, mask: Tensor | None) -> None:
        """Give codes that wait for them their first values, from x (G, ..., D) and its mask (G, ...)."""
        # somebody may have copied codes into the buffers; once they have started, the host asks no more
        if not self._started:
            self._started = bool(self.initted)
        if self._started:
            return
        rows = x.float() if mask is None else torch.where(mask[..., None], x.float(), torch.nan)
        for group, own in enumerate(rows.flatten(1, -2)):
            if self.use_ddp and self.sync_kmeans:
                own = all_rows(own)
            own = own[usable(own)]
            codes = self._cluster(own)
            if self.use_ddp:
                of_first_rank(codes)
            counts = code_sums(own, nearest_code(own, codes).indices, self.codebook_size).counts
            if self.use_ddp:
                of_first_rank(counts)
            self.cluster_size[group].copy_(counts)
            self.embed_avg[group].copy_(codes * counts[:, None])
        self.update_ema()
        self.initted.fill_(True)
        self._started = True

    def _cluster(self, rows: Tensor) -> Tensor:
        size = self.codebook_size
        if len(rows) == 0:
            refuse(ValueError, "VectorQuantize", "x", "hold a finite row for kmeans_init", 0, "Pass some")
        if len(rows) < size:
            message = f"VectorQuantize: {len(rows)} rows start {size} codes by k-means; some codes coincide."
            warnings.warn(message, stacklevel=2)
            more = torch.randint(len(rows), (size - len(rows),), device=rows.device)
            return torch.cat([rows, rows[more]])
        seed = draw_seed_aside(rows.device)
        if not self.use_cosine_sim:
            return kmeans(rows, size, iterations=self.kmeans_iters, seed=seed)
        codes = kmeans(rows, size, iterations=0, seed=seed)
        for _ in range(self.kmeans_iters):
            codes = unit_rows(kmeans(rows, size, iterations=1, start=codes))
        return codes

    @torch.no_grad()
    def update_ema(self) -> None:
        """Set the codes to what their averages say."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        divisor = smoothed[..., None]
        if self.use_cosine_sim:
            length = torch.linalg.vector_norm(self.embed_avg, dim=-1, keepdim=True)
            divisor = torch.maximum(length, 1e-6 * divisor)
        # in place: codes may be most of what a model holds
        torch.div(self.embed_avg, divisor, out=self.embed)

    @torch.no_grad()
    def update_codebook(
        self,
        x: Tensor,
        indices: Tensor,
        *,
        ema_update_weight: Weight = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Take the statistics of a batch and move the codes by them.

        Args:
            x: (G, ..., D).
            indices: (G, ...) int64, -1 where a row has no part.
            ema_update_weight: (K,) or (G, K) weights of the news, or a function of (sums, counts) that returns them.
            accum_ema_update: only add the statistics up, for the next update.
            ema_update: in place of the attribute.
        """
        ema_update = self.ema_update if ema_update is None else ema_update
        if not self.moves(ema_update):
            return
        groups, size = self.num_codebooks, self.codebook_size
        counts, sums = code_sums(x, self.flat(indices), groups * size)
        counts, sums = counts.to(sums.dtype).view(groups, size), sums.view(groups, size, -1)
        if self.use_ddp:
            all_sum(counts)
            all_sum(sums)
        if self.affine is not None:
            sums = moments.inward(self, sums, counts)
        weight = ema_update_weight(sums, counts) if callable(ema_update_weight) else ema_update_weight
        if accum_ema_update:
            _accumulate(self.cluster_size, counts)
            _accumulate(self.embed_avg, sums)
            return
        _average(self.cluster_size, counts, self.decay, weight)
        _average(self.embed_avg, sums, self.decay, weight)
        del sums
        if ema_update and not self.manual_ema_update:
            self.update_ema()
        self.expire_codes_(x, indices)

    @torch.no_grad()
    def expire_codes_(self, x: Tensor, indices: Tensor | None = None) -> None:
        """Replace dead codes by rows of x (G, ..., D), those with a negative index (G, ...) left out.

        No row is used twice; dead codes in excess of the rows wait for a later step. All ranks give rows in turn.
        """
        if not self.has_dead_code_replacement or not self.training:
            return
        dead = self.cluster_size < self.threshold_ema_dead_code
        if _seen_for_free(dead) and not dead.any():
            return
        rows = x.flatten(1, -2)
        good = usable(rows, None if indices is None else indices.flatten(1))
        ranks = dist.get_world_size() if self.use_ddp else 1
        for group, (own, alive, gone) in enumerate(zip(rows, good, dead, strict=True)):
            # dead codes queue in random order, the same on all ranks, and so do usable rows
            key = torch.rand(self.codebook_size, device=own.device)
            if self.use_ddp:
                of_first_rank(key)
            queue = torch.where(gone, key, 2.0).argsort()
            order = torch.where(alive, torch.rand(len(own), device=own.device), 2.0)
            most = min(len(own), self.codebook_size)
            chosen = order.topk(most, largest=False).indices
            # ranks may have other numbers of rows, but not of codes
            queue = queue if self.use_ddp else queue[:most]
            place = torch.arange(len(queue), device=own.device)
            turn = place // ranks
            mine = gone[queue] & (turn < alive.sum().clamp_max(most))
            if self.use_ddp:
                mine = mine & (place % ranks == dist.get_rank())
            # a rank without rows still takes part in the sum
            fresh = own[chosen[turn.clamp_max(most - 1)]] if most else own.new_zeros(len(turn), own.shape[1])
            fresh = fresh.float()  # (M, D)
            fresh.masked_fill_(~mine[:, None], 0)
            taken = mine.to(fresh.dtype)
            if self.use_ddp:
                all_sum(fresh)
                all_sum(taken)
            taken, size = taken > 0, self.reset_cluster_size
            _replace(self.embed[group], queue, fresh, taken)
            _replace(self.embed_avg[group], queue, fresh.mul_(size), taken)
            _replace(self.cluster_size[group], queue, torch.full_like(key[: len(queue)], size), taken)


def _directions(codes: Tensor) -> Tensor:
    """Codes (G, K, D) at length 1; those that have none next to the others go where no row is."""
    length = torch.linalg.vector_norm(codes, dim=-1, keepdim=True)
    if _seen_for_free(codes):
        off = (length - 1).abs_() > 8 * torch.finfo(torch.float32).eps
        if not off.any():
            return codes
    # averages of a code that no row takes decay to 0, which would be nearer than most codes of length 1
    lost = length <= 1e-3 * length.amax(-2, keepdim=True)
    return torch.where(lost, 4.0, codes / length)


def _seen_for_free(tensor: Tensor) -> bool:
    """Whether the host may look at a value: a device would have to finish its work, and no graph can hold it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _replace(old: Tensor, at: Tensor, new: Tensor, where: Tensor) -> None:
    """Write rows `new` to the places `at` of `old`, where told to."""
    where = where[:, None] if new.dim() == 2 else where
    old.index_copy_(0, at, torch.where(where, new.to(old.dtype), old[at]))


def _average(old: Tensor, new: Tensor, decay: float, weight: Tensor | None) -> None:
    """Move `old` towards `new`, with what was accumulated in its gradient."""
    if old.grad is not None:
        new = new + old.grad
        old.grad = None
    new = new.to(old)
    if weight is None:
        old.lerp_(new, 1 - decay)
        return
    weight = weight[None] if weight.dim() == 1 else weight
    if weight.shape not in (old.shape[:2], (1, old.shape[1])):
        got, fix = tuple(weight.shape), "Pass a weight per code"
        refuse(ValueError, "VectorQuantize", "ema_update_weight", f"be {tuple(old.shape[:2])}", got, fix)
    weight = weight.to(old).view(*weight.shape, *[1] * (old.dim() - 2))
    old.lerp_(new, ((1 - decay) * weight).expand_as(old))


def _accumulate(old: Tensor, new: Tensor) -> None:
    new = new.to(old)
    if old.grad is None:
        old.grad = new.clone()
    else:
        old.grad += new
