"""The searches: ours, and everybody else's way to the nearest code."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.profiling.peers import OURS, Contender, Make, Search, compiled_backends


def chunk_rows(rows: int, codes: int, device: torch.device) -> int:
    """Rows whose scores are held at once: about the size of a cache, and on a GPU at most 32 chunks to unroll."""
    if device.type == "cpu":
        return max(1, (1 << 22) // codes)
    return max((1 << 25) // codes, -(-rows // 32), 1)


def addmm(x: Tensor, codes: Tensor, half: Tensor, rows: int) -> Tensor:
    """The expanded form over chunks of rows in the dtype of the inputs, no N x K matrix."""
    return torch.cat([torch.addmm(half, part, codes.t(), alpha=-1).argmin(1) for part in x.split(rows)])


def compiled_anew(function: Callable) -> Callable:
    """A function compiled for the sizes it will see, however often that was done before."""
    # after a few sizes of one function dynamo would give up and run it as it is
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _addmm(compiled: bool, dtype: torch.dtype | None = None) -> Make:
    def search(x: Tensor, codes: Tensor, rows: int) -> Tensor:
        half = codes.square().sum(1) / 2
        if dtype is not None:
            x, codes, half = x.to(dtype), codes.to(dtype), half.to(dtype)
        return addmm(x, codes, half, rows)

    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
        rows = chunk_rows(len(inputs[0]), len(codes), codes.device)
        run = compiled_anew(search) if compiled else search
        return lambda x: run(x, codes, rows)

    return make


def _cdist(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
    return lambda x: torch.cdist(x, codes).argmin(1)


def _ours(backend: str, exact: bool = True) -> Make:
    return lambda codes, _: lambda x: vq.nearest_code(x, codes, exact=exact, backend=backend).indices


def _prepared(backend: str) -> Make:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
        handle = vq.prepare(codes, backend=backend)
        return lambda x: vq.nearest_code(x, handle, backend=backend).indices

    return make


def _flash(given: bool) -> Make:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
        from flash_kmeans.assign_euclid_triton import euclid_assign_triton  # pyright: ignore[reportMissingImports]

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

    faiss.omp_set_num_threads(torch.get_num_threads())

    def search(x: Tensor) -> Tensor:
        index = faiss.IndexFlatL2(codes.shape[1])
        index.add(codes.numpy())
        return torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])

    return search


def _sklearn(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
    from sklearn.metrics import pairwise_distances_argmin

    return lambda x: torch.from_numpy(pairwise_distances_argmin(x.numpy(), codes.numpy()))


def _keops(codes: Tensor, inputs: Sequence[Tensor]) -> Search:
    # it talks of every formula it compiles; the one variable comes too late for the library under it, which has another
    for name in ("PYKEOPS_VERBOSE", "KEOPS_VERBOSE"):
        os.environ.setdefault(name, "0")
    from pykeops.torch import LazyTensor  # pyright: ignore[reportMissingImports]

    def search(x: Tensor) -> Tensor:
        rows, columns = LazyTensor(x[:, None, :]), LazyTensor(codes[None, :, :])
        return ((rows - columns) ** 2).sum(-1).argmin(dim=1)[:, 0]

    return search


def searches(
    device: torch.device,
    dtype: torch.dtype,
    isas: Sequence[str] = (),
    *,
    backends: Sequence[str] | None = None,
) -> list[Contender]:
    """Every search that this machine can run, ours first; on a CPU also ours forced to `isas`.

    Args:
        device, dtype: of x and codes.
        isas: instruction sets of a CPU that ours are forced to as well.
        backends: of ours, those that can run here; all compiled ones and, on a CPU, the reference when left out.
    """
    found: list[Contender] = []
    compiled = compiled_backends("nearest_code", device, dtype)
    for backend in compiled if backends is None else backends:
        if backend == "reference":
            # it stands behind the compiled ones
            continue
        name = f"{OURS} {backend}"
        found.append(Contender(name, _ours(backend), exact=True, captured=True))
        if device.type == "cuda":
            found.append(Contender(f"{name} fast", _ours(backend, exact=False), captured=True))
        found.append(
            Contender(f"{name} prepared", _prepared(backend), exact=True, prepared=True, captured=True)
        )
        if backend == "native" and device.type == "cpu":
            found += [Contender(f"{name} {isa}", _ours(backend), exact=True, isa=isa) for isa in isas]
    if "reference" in (backends or ()) or (backends is None and device.type == "cpu"):
        found.append(Contender(f"{OURS} reference", _ours("reference"), exact=True))
    whole = 2 * dtype.itemsize
    return found + (_on_gpu(whole) if device.type == "cuda" else _on_cpu(dtype, whole))


def _on_gpu(whole: int) -> list[Contender]:
    flash = [
        Contender("flash-kmeans", _flash(False), captured=True),
        Contender("flash-kmeans, norms given", _flash(True), captured=True),
    ]
    return [
        *(flash if find_spec("flash_kmeans") else []),
        Contender("torch.cdist + argmin", _cdist, bytes_per_pair=whole),
        Contender("chunked addmm + argmin", _addmm(False)),
        Contender("compiled addmm + argmin", _addmm(True), compiles=True),
    ]


def _on_cpu(dtype: torch.dtype, whole: int) -> list[Contender]:
    found = [
        Contender("torch.cdist + argmin", _cdist, bytes_per_pair=whole),
        Contender("chunked addmm + argmin", _addmm(False)),
    ]
    if dtype != torch.bfloat16:
        found.append(Contender("chunked addmm + argmin, bfloat16", _addmm(False, torch.bfloat16)))
    if dtype == torch.float32:
        numpy_peers = {"faiss": ("faiss-cpu IndexFlatL2", _faiss), "sklearn": ("scikit-learn", _sklearn)}
        found += [Contender(*peer) for module, peer in numpy_peers.items() if find_spec(module)]
        if find_spec("pykeops"):
            found.append(Contender("pykeops", _keops, compiles=True))
    return found
