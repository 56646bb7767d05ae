"""What all upkeep has in common: it watches training forwards and changes codes in `commit` only."""

from __future__ import annotations

from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn.codebooks.learned import Codebook
from vqkernels.nn.estimators.base import Context


class Upkeep(nn.Module):
    """Base of all upkeep."""

    # False while the codes must not be used yet
    ready = True
    # False until `start` has given the codes their first values
    started = True
    # True once a quantizer owns it
    bound = False
    # whether it overwrites codes
    assigns = True

    @property
    def idle(self) -> bool:
        """Whether `observe` and `commit` will do nothing any more."""
        return False

    def check(self, codebook: Codebook) -> None:
        """Refuse a codebook that this upkeep cannot serve.

        Raises:
            ValueError: its codes are made of something else and cannot be overwritten.
        """
        if self.assigns and not codebook.assignable:
            requirement = f"have codes that can be overwritten for {type(self).__name__}"
            fix = "Leave the upkeep out: a generator moves all codes together"
            refuse(ValueError, "VectorQuantizer", "codebook", requirement, type(codebook).__name__, fix)

    def start(self, codebook: Codebook, x: Tensor, context: Context) -> None:
        """Give the codes their first values from the first training batch x (..., D), before it is quantized."""

    def bind(self, num_codes: int, dim: int, num_indices: int) -> None:
        """Told once, by the quantizer: K, D and how many values a training index takes."""

    def observe(self, x: Tensor, indices: Tensor | None) -> None:
        """Take note of a training batch: x (..., D), indices (...), None before the codes are ready."""

    def commit(self, codebook: Codebook, step: int) -> Tensor | None:
        """Change codes after optimizer step number `step` (from 1); returns the (K,) mask of rows replaced."""
