"""How much of a training step the quantizer takes, measured on a few steps."""

import time
from typing import Any, Self

import torch
from torch import Tensor, nn

SAMPLE_EVERY = 10


class QuantizerShare:
    """Times the quantizer's forward and backward on every tenth step, from hooks on its input and output.

    The clock of the backward runs from the gradient of z to the gradient of x; on CUDA a sampled step waits
    for the device at each mark, the other steps never do. The upkeep in `commit()` is not in it.
    """

    def __init__(self, quantizer: nn.Module, device: torch.device) -> None:
        """Attach to a quantizer.

        Args:
            quantizer: maps x to a result with a field `z`.
            device: of its tensors.
        """
        self._device = device
        self._active = False
        self._marks: dict[str, float] = {}
        self._handles = (
            quantizer.register_forward_pre_hook(self._before_forward),
            quantizer.register_forward_hook(self._after_forward),
        )
        self.clear()

    def clear(self) -> None:
        """Forget the measurements."""
        self._quantizer_seconds = 0.0
        self._step_seconds = 0.0

    def begin(self, step: int, *, active: bool) -> None:
        """Mark the start of a step.

        Args:
            step: 0-based; every tenth is measured.
            active: False while the quantizer only passes latents through.
        """
        self._active = active and step % SAMPLE_EVERY == 0
        self._mark("begin")

    def end(self) -> None:
        """Mark the end of a step."""
        self._mark("end")
        marks = self._marks
        if self._active and "x_gradient" in marks:
            forward = marks["after"] - marks["before"]
            backward = marks["x_gradient"] - marks["z_gradient"]
            self._quantizer_seconds += forward + backward
            self._step_seconds += marks["end"] - marks["begin"]
        self._active = False
        self._marks = {}

    def share(self) -> float | None:
        """Return the measured share, between 0 and 1, or None without a measured step."""
        return self._quantizer_seconds / self._step_seconds if self._step_seconds else None

    def __enter__(self) -> Self:
        """Return the clock."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks from the quantizer."""
        for handle in self._handles:
            handle.remove()

    def _mark(self, name: str) -> None:
        if self._active:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._marks[name] = time.perf_counter()

    def _before_forward(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self._active and module.training and inputs[0].requires_grad:
            inputs[0].register_hook(lambda gradient: self._mark("x_gradient"))
        self._mark("before")

    def _after_forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        self._mark("after")
        if self._active and module.training and output.z.requires_grad:
            output.z.register_hook(lambda gradient: self._mark("z_gradient"))
