"""Who is measured: our backends and everybody else's way to the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.ops import OPS

OURS = "vqkernels"
NOISE_STD = 1e-3**0.5

Search = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """A layer to run forward and backward: z of x, and the parameters that get a gradient."""

    forward: Callable[[Tensor], Tensor]
    parameters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Contender:
    """One line of the tables.

    Attributes:
        name: for people and for comparisons of files; ours begin with `OURS`.
        make: from codes (K, D) and all inputs it will see to a `Search` or a `Layer`; what it does is not timed.
        exact: it promises the float64 argmin.
        captured: it is also measured as a CUDA graph.
        compiles: it needs seconds of a compiler first.
        bytes_per_pair: of the memory it needs for each row and code.
    """

    name: str
    make: Callable[[Tensor, Sequence[Tensor]], Search | Layer]
    exact: bool = False
    captured: bool = False
    compiles: bool = False
    bytes_per_pair: float = 0.0

    @property
    def ours(self) -> bool:
        """Whether its failure is ours."""
        return self.name.startswith(OURS)


# what can be installed beside us, and the version that was read
PEERS = {
    "flash_kmeans": "flash-kmeans",
    "vector_quantize_pytorch": "vector-quantize-pytorch",
    "diveq": "diveq",
}
PEERS_ON_CPU = {"faiss": "faiss-cpu", **{k: v for k, v in PEERS.items() if k != "flash_kmeans"}}


def missing(device: torch.device) -> list[str]:
    """Distributions of peers that are not installed here."""
    table = PEERS if device.type == "cuda" else PEERS_ON_CPU
    return [name for module, name in table.items() if find_spec(module) is None]


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in {*PEERS.values(), *PEERS_ON_CPU.values()}:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def backends(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Compiled backends of ours that say they can run an op here."""
    reasons = OPS[op].explain_for(device, (dtype,))
    return [name for name in ("triton", "native") if reasons[name] is None]


def chunk_rows(rows: int, codes: int, device: torch.device) -> int:
    """Rows whose scores are held at once: about the size of L2, and at most 32 chunks to unroll."""
    return 4096 if device.type == "cpu" else max((1 << 25) // codes, -(-rows // 32), 1)


def addmm(x: Tensor, codes: Tensor, half: Tensor, rows: int) -> Tensor:
    """The expanded form over chunks of rows in the dtype of the inputs, no N x K matrix."""
    return torch.cat([torch.addmm(half, part, codes.t(), alpha=-1).argmin(1) for part in x.split(rows)])


def compiled_anew(function: Callable) -> Callable:
    """A function compiled for the sizes it will see, however often that was done before."""
    # after a few sizes of one function dynamo would give up and run it as it is
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _addmm(compiled: bool) -> Callable[[Tensor, Sequence[Tensor]], Search]:
    def search(x: Tensor, codes: Tensor, rows: int) -> Tensor:
        return addmm(x, codes, codes.square().sum(1) / 2, rows)

    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
        rows = chunk_rows(len(inputs[0]), len(codes), codes.device)
        run = compiled_anew(search) if compiled else search
        return lambda x: run(x, codes, rows)

    return make


def _cdist(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
    return lambda x: torch.cdist(x, codes).argmin(1)


def _ours(backend: str, exact: bool = True) -> Callable[[Tensor, Sequence[Tensor]], Search]:
    return lambda codes, _: lambda x: vq.nearest_code(x, codes, exact=exact, backend=backend).indices


def _prepared(backend: str) -> Callable[[Tensor, Sequence[Tensor]], Search]:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
        handle = vq.prepare(codes, backend=backend)
        return lambda x: vq.nearest_code(x, handle, backend=backend).indices

    return make


def _flash(given: bool) -> Callable[[Tensor, Sequence[Tensor]], Search]:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton

        table = codes[None]
        if not given:
            # what its own k-means does before it assigns
            return lambda x: euclid_assign_triton(x[None], table, (x**2).sum(1)[None])[0]
        code_norms = (table.float() ** 2).sum(-1)
        norms = {(x.data_ptr(), len(x)): x.float().square().sum(1)[None] for x in inputs}

        def search(x: Tensor) -> Tensor:
            known = norms.get((x.data_ptr(), len(x)))
            known = x.float().square().sum(1)[None] if known is None else known
            return euclid_assign_triton(x[None], table, known, c_sq=code_norms)[0]

        return search

    return make


def _faiss(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
    import faiss

    def search(x: Tensor) -> Tensor:
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

    return search


def searches(device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Every search that this machine can run, ours first."""
    half_bytes = dtype.itemsize
    found: list[Contender] = []
    for backend in backends("nearest_code", device, dtype):
        found.append(Contender(f"{OURS} {backend}", _ours(backend), exact=True, captured=True))
        if device.type == "cuda":
            found.append(Contender(f"{OURS} {backend} fast", _ours(backend, exact=False), captured=True))
            if hasattr(vq, "prepare"):
                name = f"{OURS} {backend} prepared"
                found.append(Contender(name, _prepared(backend), exact=True, captured=True))
    if device.type == "cpu":
        found.append(Contender(f"{OURS} reference", _ours("reference"), exact=True))
    elif find_spec("flash_kmeans"):
        found.append(Contender("flash-kmeans", _flash(False), captured=True))
        found.append(Contender("flash-kmeans, norms given", _flash(True), captured=True))
    found.append(Contender("torch.cdist + argmin", _cdist, bytes_per_pair=2 * half_bytes))
    found.append(Contender("chunked addmm + argmin", _addmm(False)))
    if device.type == "cuda":
        found.append(Contender("compiled addmm + argmin", _addmm(True), compiles=True))
    elif find_spec("faiss"):
        found.append(Contender("faiss-cpu IndexFlatL2", _faiss))
    return found


def plain_diveq(x: Tensor, codes: Tensor, rows: int) -> Tensor:
    """DiVeQ as a few lines of PyTorch in the dtype of the inputs, without exactness (DiVeQ eq. 8)."""
    with torch.no_grad():
        indices = addmm(x, codes, codes.square().sum(1) / 2, rows)
    error = codes[indices] - x
    with torch.no_grad():
        along = error + NOISE_STD * torch.randn_like(x)
        unit = along / along.norm(dim=1, keepdim=True)
    return x + error.norm(dim=1, keepdim=True) * unit


def _plain(compiled: bool) -> Callable[[Tensor, Sequence[Tensor]], Layer]:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
        codes = codes.clone().requires_grad_()
        rows = chunk_rows(len(inputs[0]), len(codes), codes.device)
        run = compiled_anew(plain_diveq) if compiled else plain_diveq
        return Layer(lambda x: run(x, codes, rows), (codes,))

    return make


def _our_layer(name: str, backend: str | None) -> Callable[[Tensor, Sequence[Tensor]], Layer]:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
        codes = codes.clone().requires_grad_()
        return Layer(lambda x: getattr(vq, name)(x, codes, backend=backend).z, (codes,))

    return make


def _vector_quantize(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(codes.shape[1], len(codes)).to(codes.device)
    return Layer(lambda x: layer(x[None])[0])


def _diveq(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
    import diveq

    options = {"codebook_reset": False, "allow_warning": False, "verbose": False}
    layer = diveq.DIVEQ(len(codes), codes.shape[1], **options).to(codes.device, codes.dtype)
    with torch.no_grad():
        layer.codebook.copy_(codes)
    return Layer(lambda x: layer(x)[0], tuple(layer.parameters()))


def layers(device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """Every layer that this machine can run forward and backward, ours first."""
    found: list[Contender] = []
    for function in ("diveq", "sf_diveq"):
        if device.type == "cpu":
            found.append(Contender(f"{OURS} {function}", _our_layer(function, None)))
            continue
        for backend in backends("directional_backward", device, dtype):
            name = f"{OURS} {backend} {function}"
            found.append(Contender(name, _our_layer(function, backend), captured=True))
    if device.type == "cuda":
        found.append(Contender("plain PyTorch DiVeQ", _plain(False)))
        found.append(Contender("compiled PyTorch DiVeQ", _plain(True), compiles=True))
    if find_spec("vector_quantize_pytorch"):
        # distances, their copy, and a one-hot matrix of int64 and of float32
        name = "vector-quantize-pytorch (EMA)"
        found.append(Contender(name, _vector_quantize, bytes_per_pair=20))
    if find_spec("diveq"):
        found.append(Contender("diveq DIVEQ", _diveq, bytes_per_pair=3 * dtype.itemsize + 8))
    return found


def step(layer: Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward of a layer: z, then the gradients of x and of the parameters."""
    leaf = x.detach().requires_grad_()
    z = layer.forward(leaf)
    wanted = (leaf, *layer.parameters)
    grads = torch.autograd.grad(z, wanted, grad.view(z.shape), allow_unused=True)
    return z.detach().view(x.shape), *(g for g in grads if g is not None)
