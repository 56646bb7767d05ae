"""The layers: forward and backward of our quantizers and of other libraries'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

import vqkernels as vq
from vqkernels.profiling.peers import OURS, Contender, Layer, Make, compiled_backends
from vqkernels.profiling.searches import addmm, chunk_rows, compiled_anew
from vqkernels.profiling.steps import NOISE_STD


def plain_diveq(x: Tensor, codes: Tensor, rows: int) -> Tensor:
    """DiVeQ as a few lines of PyTorch in the dtype of the inputs, without exactness (DiVeQ eq. 8)."""
    with torch.no_grad():
        indices = addmm(x, codes, codes.square().sum(1) / 2, rows)
    error = codes[indices] - x
    with torch.no_grad():
        along = error + NOISE_STD * torch.randn_like(x)
        unit = along / along.norm(dim=1, keepdim=True)
    return x + error.norm(dim=1, keepdim=True) * unit


def _plain(compiled: bool) -> Make:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
        codes = codes.clone().requires_grad_()
        rows = chunk_rows(len(inputs[0]), len(codes), codes.device)
        run = compiled_anew(plain_diveq) if compiled else plain_diveq
        return Layer(lambda x: run(x, codes, rows), (codes,), lambda: codes)

    return make


def _our_layer(name: str, backend: str | None) -> Make:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
        codes = codes.clone().requires_grad_()
        return Layer(lambda x: getattr(vq, name)(x, codes, backend=backend).z, (codes,))

    return make


def _vector_quantize(directional: bool) -> Make:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
        from vector_quantize_pytorch import VectorQuantize

        # what it wants beside its directional reparameterization
        options = {"directional_reparam": True, "threshold_ema_dead_code": 2} if directional else {}
        layer = VectorQuantize(codes.shape[1], len(codes), **options).to(codes.device)
        return Layer(lambda x: layer(x[None])[0], tuple(layer.parameters()), lambda: layer.codebook)

    return make


def _diveq(space_filling: bool) -> Make:
    def make(codes: Tensor, inputs: Sequence[Tensor]) -> Layer:
        import diveq

        if space_filling:
            # quantizing from the first call on
            layer = diveq.SFDIVEQ(len(codes), codes.shape[1], skip_iters=1, avg_iters=0, allow_warning=False)
        else:
            options = {"codebook_reset": False, "allow_warning": False, "verbose": False}
            layer = diveq.DIVEQ(len(codes), codes.shape[1], **options)
        layer = layer.to(codes.device, codes.dtype)
        with torch.no_grad():
            layer.codebook.copy_(codes)
        return Layer(lambda x: layer(x)[0], tuple(layer.parameters()), lambda: layer.codebook, space_filling)

    return make


def layers(
    device: torch.device,
    dtype: torch.dtype,
    isas: Sequence[str] = (),
    *,
    backends: Sequence[str] | None = None,
) -> list[Contender]:
    """Every layer that this machine can run forward and backward, ours first; on a CPU also ours in `isas`.

    Args:
        device, dtype: of x and codes.
        isas: instruction sets of a CPU that ours are forced to as well.
        backends: of ours, those that can run here; on a CPU what ours choose, on a GPU all compiled ones when left out.
    """
    found: list[Contender] = []
    compiled = compiled_backends("directional_backward", device, dtype)
    for function in ("diveq", "sf_diveq"):
        if device.type == "cpu" and backends is None:
            found.append(Contender(f"{OURS} {function}", _our_layer(function, None), function=function))
            found += [
                Contender(
                    f"{OURS} {isa} {function}", _our_layer(function, "native"), function=function, isa=isa
                )
                for isa in isas
            ]
            continue
        for backend in compiled if backends is None else backends:
            name = f"{OURS} {backend} {function}"
            found.append(Contender(name, _our_layer(function, backend), function=function, captured=True))
    if device.type == "cuda":
        found.append(Contender("plain PyTorch DiVeQ", _plain(False)))
        found.append(Contender("compiled PyTorch DiVeQ", _plain(True), compiles=True))
    if find_spec("diveq"):
        pair = 3 * dtype.itemsize + 8
        found.append(Contender("diveq DIVEQ", _diveq(False), bytes_per_pair=pair))
        if device.type == "cpu":
            found.append(Contender("diveq SFDIVEQ", _diveq(True), bytes_per_pair=pair))
    if find_spec("vector_quantize_pytorch"):
        # distances, their copy, and a one-hot matrix of int64 and of float32
        name = "vector-quantize-pytorch"
        found.append(Contender(f"{name} (EMA)", _vector_quantize(False), bytes_per_pair=20))
        if device.type == "cpu":
            # a call beyond takes half a minute, as that of the other one does, which is measured there
            directional = Contender(f"{name} (directional)", _vector_quantize(True), bytes_per_pair=20)
            found.append(replace(directional, most_pairs=1 << 28))
    return found
