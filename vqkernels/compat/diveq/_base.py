"""What all faces of diveq have in common: codes, a count of iterations, and forward beside inference."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn

from vqkernels.checks import check_count, check_flag, check_floating, refuse
from vqkernels.compat.face import Face
from vqkernels.nn._random import draw_seed, first_row
from vqkernels.nn.estimators.base import Context
from vqkernels.nn.metrics import perplexity
from vqkernels.nn.quantizers.base import recomputing

# of every face here, in the words of a report
ALWAYS = (
    "The peer calls noise_var a variance and uses it as a standard deviation; ours uses it so too.",
    "The peer draws noise and counts in eval mode; ours is deterministic there and changes nothing.",
    "The peer's perplexity is a float; ours is one on the CPU, and a 0-d tensor on GPUs and compiled.",
    "The peer makes matrices of rows x codes; ours makes none.",
)


class DiveqFace(Face):
    """Base of the faces of diveq 0.1.3.

    Args:
        num_embeddings: K, of each codebook.
        embedding_dim: D, features of the input.
        shape: of the codebooks: (K, D), or (Q, K, D) for several.
        uniform_init: start at U(0, 1/K), else at N(0, 1/K^2).
        allow_warning: whether to warn of unusual options.
    """

    num_embeddings: int
    embedding_dim: int
    codebook: nn.Parameter
    iter_counter: Tensor
    # fewest codes it can work with
    min_codes: ClassVar[int] = 1
    # the released forward is noisy in eval mode too
    entries: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"forward": "inference", "inference": "inference"}
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        shape: tuple[int, ...],
        *,
        uniform_init: bool,
        allow_warning: bool,
    ):
        super().__init__()
        name = type(self).__name__
        self.num_embeddings = check_count(name, "num_embeddings", num_embeddings, minimum=self.min_codes)
        self.embedding_dim = check_count(name, "embedding_dim", embedding_dim, minimum=1)
        self.uniform_init = check_flag(name, "uniform_init", uniform_init)
        self.allow_warning = check_flag(name, "allow_warning", allow_warning)
        draw = torch.rand if uniform_init else torch.randn
        self.codebook = nn.Parameter(draw(shape) / num_embeddings)
        self._register(shape)
        self.register_buffer("iter_counter", torch.zeros(1, dtype=torch.int32))
        # what the counter held when it was last read, and which tensor that was
        self._iteration, self._read = 0, None

    def _register(self, shape: tuple[int, ...]) -> None:
        """Further buffers, which come before the counter in a state dict."""

    @property
    def iteration(self) -> int:
        """Training forwards so far.

        An accelerator is waited for after the counter was loaded, moved or replaced, and by compiled code.
        """
        counter = self.iter_counter
        if torch.compiler.is_compiling():
            # a number of the host would be a constant of the graph, which each forward would make anew
            self._read = None
            return int(counter)
        if counter is not self._read or counter.device.type == "cpu":
            self._iteration, self._read = int(counter), counter
        return self._iteration

    def _advance(self) -> int:
        """Count this training forward; its number, from 1."""
        number = self.iteration
        if recomputing():
            return number
        with torch.no_grad():
            self.iter_counter.add_(1)
        if not torch.compiler.is_compiling():
            self._iteration = number + 1
        return number + 1

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._read = None

    def _check(self, z: Tensor) -> None:
        op = type(self).__name__
        check_floating(op, "z", z)
        if z.dim() != 2 or z.shape[1] != self.embedding_dim:
            fix = "Move the features last and flatten the rest: z.reshape(-1, D)"
            refuse(ValueError, op, "z", f"be (N, {self.embedding_dim})", f"shape {tuple(z.shape)}", fix)

    def _context(self, z: Tensor) -> Context:
        """The noise of this forward: the rows of all ranks are rows of one batch."""
        return Context(draw_seed(z.device), first_row(len(z)))

    def _counts(self, indices: Tensor, finite: Tensor) -> Tensor:
        """Rows of each code (K,), those without a NaN or Inf (N,) alone."""
        counts = torch.zeros(self.num_embeddings, dtype=torch.int64, device=indices.device)
        return counts.index_add_(0, indices, finite.to(torch.int64))

    @classmethod
    def options_of(cls, peer: nn.Module) -> dict[str, object]:
        """The keywords that would construct `peer` anew; those that an older version does not know at their default."""
        parameters = list(inspect.signature(cls).parameters.values())
        return {p.name: getattr(peer, p.name, p.default) for p in parameters}

    def extra_repr(self) -> str:
        names = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def readable(tensor: Tensor) -> bool:
    """Whether its values are at hand: on the CPU, outside of compiled code."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def spread(counts: Tensor) -> float | Tensor:
    """The perplexity of rows of each code (K,) as diveq returns it, where nobody waits for it.

    Returns:
        A float on the CPU; 0-d float32 on an accelerator and in compiled code; nan without a row.
    """
    found = perplexity(counts)
    return found.item() if readable(found) else found


def no_seed(z: Tensor) -> Context:
    """The context of what draws no noise."""
    return Context(torch.zeros((), dtype=torch.int64, device=z.device))
