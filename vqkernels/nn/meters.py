"""The metrics of `vqkernels.nn.metrics` as torchmetrics: over many updates and all processes, on the device.

Every class works in a `MetricCollection`, where `update(x=x, z=q.z, indices=q.indices)` gives each what it takes by
name. `update` does not wait for the device; a collection compares states on the host in its first update, unless it is
told the `compute_groups`, as `codebook_metrics` does. `compute` adds up over processes, by torchmetrics' own
synchronisation, and returns 0-d float32 tensors unless said otherwise.

`window` is the number of last updates that count, on every process; None counts all since `reset`. A window of W keeps
W times the tensors and gathers them all in `compute`. In a `state_dict` after `metric.persistent(True)`, as always in
torchmetrics. A compiled graph can hold `update`, but torchmetrics counts updates in a Python int that a graph takes for
a constant: set `torch._dynamo.config.allow_unspec_int_on_nn_module`, or call `update` outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vqkernels.checks import check_count, refuse
from vqkernels.nn import metrics

try:
    from torchmetrics import Metric, MetricCollection
except ImportError as error:
    _FIX = "Run pip install torchmetrics, or use the functions of vqkernels.nn.metrics"
    refuse(ImportError, "vqkernels.nn.meters", "torchmetrics", "be installed", error, _FIX)


class Windowed(Metric):
    """Base of the metrics here: sums over the last `window` updates, or over all, that also add up over processes.

    Args:
        window: updates that count; None for all since `reset`.
        process_group: of the processes to add up over; None for all.
        sync_on_compute: whether `compute` adds up over processes.

    Raises:
        TypeError, ValueError: `window` is not a positive int.
    """

    is_differentiable = False
    higher_is_better = None
    slot: Tensor
    # the 0-d sums of a class; classes that sum other things use other names, or a collection might take them for one
    scalars: ClassVar[dict[str, torch.dtype]] = {}

    def __init__(
        self, *, window: int | None = None, process_group: Any = None, sync_on_compute: bool = True
    ) -> None:
        super().__init__(process_group=process_group, sync_on_compute=sync_on_compute)
        if window is not None:
            check_count(type(self).__name__, "window", window, minimum=1)
            # where the next update goes, on the device so that a state_dict and a CUDA graph hold it
            self.add_state("slot", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")
        self.window = window
        for name, dtype in self.scalars.items():
            self.add_sum(name, dtype=dtype)

    @property
    def full_state_update(self) -> bool:
        """Whether `forward` must update twice: one batch cannot be merged into a window."""
        return self.window is not None

    def add_sum(self, name: str, shape: tuple[int, ...] = (), *, dtype: torch.dtype = torch.int64) -> None:
        """Register a sum over updates, of a tensor of this shape and dtype."""
        # a row even where all updates share one: compiled graphs lose what they add to a 0-d float64 on the cpu
        self.add_state(name, torch.zeros((self.window or 1, *shape), dtype=dtype), dist_reduce_fx="sum")

    def take(self, **parts: Tensor) -> None:
        """Add what one update contributes to each sum; all of them, once per update."""
        for name, part in parts.items():
            total = getattr(self, name)
            if self.window is None:
                total.add_(part)
            else:
                total.index_copy_(0, self.slot.view(1), part.to(total.dtype)[None])
        if self.window is not None:
            self.slot.add_(1).remainder_(self.window)

    def total(self, name: str) -> Tensor:
        """One of the sums, over the updates that count."""
        return getattr(self, name).sum(0)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
        # a model that becomes bfloat16 takes its metrics along, whose sums must not
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, exclude_state)

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name, default in self._defaults.items():
            loaded = state_dict.get(prefix + name)
            if loaded is None:
                continue
            if not isinstance(default, Tensor) or loaded.shape != default.shape:
                found, own = tuple(loaded.shape), tuple(getattr(default, "shape", ()))
                error_msgs.append(f"size mismatch for {prefix}{name}: {found} was saved, {own} is here.")
                del state_dict[prefix + name]
            else:
                # updates write in place: into a copy on this device, not into what was loaded
                state_dict[prefix + name] = loaded.to(self.device, default.dtype, copy=True)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class OfLatents(Windowed):
    """Base of the metrics that are given latents x.

    Args:
        channel_dim: the dimension of x that holds the features.
        window, process_group, sync_on_compute: as in `Windowed`.
    """

    def __init__(
        self,
        *,
        channel_dim: int = -1,
        window: int | None = None,
        process_group: Any = None,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__(window=window, process_group=process_group, sync_on_compute=sync_on_compute)
        self.channel_dim = channel_dim


class Counted(OfLatents):
    """Base of the metrics of code counts.

    Args:
        num_codes: K; `quantizer.num_indices` where training indices are segments.
        stages: Q, for one result per code of a latent, (Q,); None for one of all codes together.
        channel_dim: the dimension of x that holds the features.
        window, process_group, sync_on_compute: as in `Windowed`.

    Raises:
        TypeError, ValueError: a count is not a positive int.
    """

    def __init__(
        self,
        num_codes: int,
        *,
        stages: int | None = None,
        channel_dim: int = -1,
        window: int | None = None,
        process_group: Any = None,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__(
            channel_dim=channel_dim,
            window=window,
            process_group=process_group,
            sync_on_compute=sync_on_compute,
        )
        name = type(self).__name__
        self.num_codes = check_count(name, "num_codes", num_codes, minimum=1)
        self.stages = None if stages is None else check_count(name, "stages", stages, minimum=1)
        self.add_sum("counts", (num_codes,) if stages is None else (stages, num_codes))

    def update(self, indices: Tensor, x: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            indices: (...) or (..., Q) int64; negative ones count for nothing.
            x: the latents, of which rows that are not finite are left out.

        Raises:
            TypeError: the indices are not int64.
            ValueError: they do not match x or `stages`.
        """
        self.take(counts=self.count(indices, x))

    def count(self, indices: Tensor, x: Tensor | None) -> Tensor:
        """Counts of one batch, (K,) or (Q, K)."""
        if self.stages is not None and (indices.dim() < 1 or indices.shape[-1] != self.stages):
            fix = f"Pass stages={indices.shape[-1]}" if indices.dim() else "Call indices.unsqueeze(-1)"
            requirement = f"be (..., {self.stages}), one per stage"
            refuse(ValueError, type(self).__name__, "indices", requirement, tuple(indices.shape), fix)
        if x is not None:
            indices = metrics.used_indices(indices, x, channel_dim=self.channel_dim)
        return metrics.code_counts(indices, self.num_codes, per_stage=self.stages is not None)


class Perplexity(Counted):
    """exp of the entropy of the code indices (DiVeQ eq. 15), 1 to K; nan without counts."""

    def compute(self) -> Tensor:
        """The perplexity, 0-d or (Q,)."""
        return metrics.perplexity(self.total("counts"))


class Usage(Counted):
    """Share of the codes used at least once, 0 to 1."""

    def compute(self) -> Tensor:
        """The share, 0-d or (Q,)."""
        return metrics.usage(self.total("counts"))


class DeadCodes(Counted):
    """How many codes were never used."""

    def compute(self) -> Tensor:
        """The number, int64, 0-d or (Q,)."""
        return metrics.dead_codes(self.total("counts"))


class CodebookEntropy(Counted):
    """Entropy of the code indices in bits (DiVeQ eq. 17), 0 to log2 K; nan without counts."""

    def compute(self) -> Tensor:
        """The entropy in bits per code, 0-d or (Q,)."""
        return metrics.entropy_bits(self.total("counts"))


class DistortionPerBit(Counted):
    """Distortion over entropy in bits (DiVeQ eq. 17); inf at an entropy of 0, nan without counts.

    With `stages` the entropies of the stages add up to bits per latent; without, the entropy is that of all codes
    together.
    """

    scalars: ClassVar = {"sq_error": torch.float64, "rows": torch.int64}

    def update(self, x: Tensor, z: Tensor, indices: Tensor) -> None:
        """Add a batch: latents, what they were quantized to, and the indices, as in `metrics.distortion`."""
        sq_error, rows = metrics.sq_error_sum(x, z, indices, channel_dim=self.channel_dim)
        self.take(counts=self.count(indices, x), sq_error=sq_error, rows=rows)

    def compute(self) -> Tensor:
        """The distortion per bit, 0-d."""
        return metrics.distortion_per_bit(self.total("sq_error") / self.total("rows"), self.total("counts"))


class Distortion(OfLatents):
    """Mean of |x - z|^2, summed over the D features (DiVeQ eq. 17); nan where no row takes part."""

    scalars: ClassVar = {"sq_error": torch.float64, "rows": torch.int64}

    def update(self, x: Tensor, z: Tensor, indices: Tensor | None = None) -> None:
        """Add a batch: latents, what they were quantized to, and the indices, as in `metrics.distortion`."""
        sq_error, rows = metrics.sq_error_sum(x, z, indices, channel_dim=self.channel_dim)
        self.take(sq_error=sq_error, rows=rows)

    def compute(self) -> Tensor:
        """The distortion, 0-d, units of x squared."""
        return (self.total("sq_error") / self.total("rows")).float()


class Divergence(OfLatents):
    """D(P, C), mean squared distance of latents to their nearest codes (Huh eq. 13); nan where no row takes part."""

    scalars: ClassVar = {"sq_dist": torch.float64, "searched": torch.int64}

    def update(self, x: Tensor, codebook: Tensor, indices: Tensor | None = None) -> None:
        """Add a batch of latents and the codes of the moment, (K, D), as in `metrics.divergence`."""
        sq_dist, searched = metrics.nearest_sum(x, codebook, indices, channel_dim=self.channel_dim)
        self.take(sq_dist=sq_dist, searched=searched)

    def compute(self) -> Tensor:
        """The divergence, 0-d, units of x squared."""
        return (self.total("sq_dist") / self.total("searched")).float()


class GradientGap(Windowed):
    """Mean over updates and processes of the gradient gap (Huh eq. 14, A.3); nan without updates.

    The square of a sum is no sum of squares: processes that pass gradients of their own batches get the mean of their
    gaps; for the gap of the joint batch, pass gradients that are averaged over processes.
    """

    scalars: ClassVar = {"gap": torch.float64, "gaps": torch.int64}

    def update(self, gradients: Sequence[Tensor | None], reference: Sequence[Tensor | None]) -> None:
        """Add the gradients of one batch, with the quantizer and without it, as in `metrics.gradient_gap`."""
        gap = metrics.gradient_gap(gradients, reference).double()
        self.take(gap=gap.to(self.device), gaps=torch.ones((), dtype=torch.int64, device=self.device))

    def compute(self) -> Tensor:
        """The mean gap, 0-d."""
        return (self.total("gap") / self.total("gaps")).float()


class PSNR(Windowed):
    """Peak signal-to-noise ratio in dB of the mean squared error over all images; inf where all are equal.

    torchmetrics' own `PeakSignalNoiseRatio` sums in float32, and `Running`, its window, makes it nan.

    Args:
        data_range: greatest less least possible value: 2 for [-1, 1], 255 for bytes.
        window, process_group, sync_on_compute: as in `Windowed`.

    Raises:
        TypeError, ValueError: `data_range` is not a positive number.
    """

    scalars: ClassVar = {"pixel_error": torch.float64, "pixels": torch.int64}

    def __init__(
        self,
        *,
        data_range: float,
        window: int | None = None,
        process_group: Any = None,
        sync_on_compute: bool = True,
    ) -> None:
        super().__init__(window=window, process_group=process_group, sync_on_compute=sync_on_compute)
        self.data_range = metrics.check_data_range("PSNR", data_range)

    def update(self, reconstruction: Tensor, image: Tensor) -> None:
        """Add a batch of images, of any shape and dtype, and their reconstructions."""
        pixels = torch.full((), image.numel(), device=image.device)
        self.take(pixel_error=metrics.pixel_error_sum(reconstruction, image), pixels=pixels)

    def compute(self) -> Tensor:
        """The ratio in dB, 0-d."""
        mse = self.total("pixel_error") / self.total("pixels")
        return (10 * torch.log10(self.data_range**2 / mse)).float()


def codebook_metrics(
    num_codes: int,
    *,
    stages: int | None = None,
    channel_dim: int = -1,
    window: int | None = None,
    process_group: Any = None,
    sync_on_compute: bool = True,
) -> MetricCollection:
    """Collect what can be told of a quantizer from `update(x=x, z=q.z, indices=q.indices)`.

    Args:
        num_codes, stages, channel_dim, window, process_group, sync_on_compute: as in `Counted`.

    Returns:
        "perplexity", "usage", "dead_codes", "entropy_bits" (which share their counts), "distortion" and
        "distortion_per_bit". No update of it waits for the device.

    Raises:
        TypeError, ValueError: a count is not a positive int.
    """
    options: dict[str, Any] = {
        "channel_dim": channel_dim,
        "window": window,
        "process_group": process_group,
        "sync_on_compute": sync_on_compute,
    }
    of_counts: dict[str, Any] = {
        "perplexity": Perplexity(num_codes, stages=stages, **options),
        "usage": Usage(num_codes, stages=stages, **options),
        "dead_codes": DeadCodes(num_codes, stages=stages, **options),
        "entropy_bits": CodebookEntropy(num_codes, stages=stages, **options),
    }
    others: dict[str, Any] = {
        "distortion": Distortion(**options),
        "distortion_per_bit": DistortionPerBit(num_codes, stages=stages, **options),
    }
    # told and not found out: to compare states, a collection waits for the device
    groups = [list(of_counts), *([name] for name in others)]
    return MetricCollection(of_counts | others, compute_groups=groups)
