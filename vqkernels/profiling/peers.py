"""Who can be measured, and what a contender is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

from vqkernels import native
from vqkernels.ops import OPS

OURS = "vqkernels"

Search = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer to run forward and backward.

    Attributes:
        forward: from x to z.
        parameters: what gets a gradient beside x.
        codes: (K, D) as they are at the time; None where it does not show them.
        curve: it quantizes to points between codes.
    """

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()
    codes: Callable[[], Tensor] | None = None
    curve: bool = False


Make = Callable[[Tensor, Sequence[Tensor]], Search | Layer]


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    Attributes:
        name: for people and for comparisons of files; ours begin with `OURS`.
        make: from codes (K, D) and all inputs it will see to a `Search` or a `Layer`; what it does is not timed.
        exact: it promises the float64 argmin.
        prepared: a part of the search was done before and is not timed.
        function: that a layer of ours runs; what the reference gives for it is what the layer must give.
        most_pairs: rows times codes from which on it is left out, unless it is asked for by name.
        captured: it is also measured as a CUDA graph.
        compiles: it needs seconds of a compiler first.
        bytes_per_pair: of the memory it needs for each row and code.
        isa: instruction set that our compiled bodies are forced to; None for the best.
    """

    name: str
    make: Make
    exact: bool = False
    prepared: bool = False
    function: str | None = None
    most_pairs: float = float("inf")
    captured: bool = False
    compiles: bool = False
    bytes_per_pair: float = 0.0
    isa: str | None = None

    @property
    def ours(self) -> bool:
        """Whether its failure is ours."""
        return self.name.startswith(OURS)


# what can be installed beside us, and the version that was read
_LAYERS = {"vector_quantize_pytorch": "vector-quantize-pytorch", "diveq": "diveq"}
PEERS = {"flash_kmeans": "flash-kmeans", **_LAYERS}
PEERS_ON_CPU = {"faiss": "faiss-cpu", "sklearn": "scikit-learn", "pykeops": "pykeops", **_LAYERS}


def missing(device: torch.device) -> list[str]:
    """Distributions of peers that are not installed here."""
    table = PEERS if device.type == "cuda" else PEERS_ON_CPU
    return [name for module, name in table.items() if find_spec(module) is None]


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in sorted({*PEERS.values(), *PEERS_ON_CPU.values()}):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def compiled_backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Compiled backends of ours that say they can run an op here."""
    reasons = OPS[op].explain_for(device, (dtype,))
    return [name for name in ("triton", "native") if reasons[name] is None]


def step(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of a layer: z, then the gradients of x and of the parameters."""
    leaf = x.detach().requires_grad_()
    z = layer.forward(leaf)
    wanted = (leaf, *layer.parameters)
    grads = torch.autograd.grad(z, wanted, grad.view(z.shape), allow_unused=True)
    return z.detach().view(x.shape), *(g for g in grads if g is not None)


@dataclass(frozen=True)
class Bound:
    """What is called with x, or with its first rows, and the layer it is a step of."""

    call: Callable[[Tensor], object]
    layer: Layer | None = None

    def __call__(self, x: Tensor) -> object:
        return self.call(x)


def bind(contender: Contender, codes: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> Bound:
    """What is called with x, or with its first rows: a search, or a step of a layer; in the instruction set it wants."""
    made = contender.make(codes, inputs)

    def run(x: Tensor) -> object:
        return step(made, x, grad[: len(x)]) if isinstance(made, Layer) else made(x)

    call = run if contender.isa is None else forced(run, contender.isa)
    return Bound(call, made if isinstance(made, Layer) else None)


def forced(run: Callable[[Tensor], object], isa: str) -> Callable[[Tensor], object]:
    """A call with the CPU bodies of one instruction set, which is in force for no other call."""

    def call(x: Tensor) -> object:
        before = native.facts()["isa"]
        native.set_isa(isa)
        try:
            return run(x)
        finally:
            native.set_isa(before)

    return call
