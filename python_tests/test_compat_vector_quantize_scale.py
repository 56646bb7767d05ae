"""`VectorQuantize` with many codes, and with codes that no row has taken for long."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels.compat.vector_quantize_pytorch import VectorQuantize

D, K = 8, 512
OWN = {"learnable_codebook": True, "ema_update": False}


class Large(TorchDispatchMode):
    """Counts the tensors as large as the codes, besides known ones, that live at a time."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive, self.most = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, torch.Tensor) and out.numel() >= K * D:
                self.alive.append(StorageWeakRef(out.untyped_storage()))
        self.alive = [one for one in self.alive if not one.expired()]
        self.most = max(self.most, len({one.cdata for one in self.alive} - self.known))
        return result


@pytest.mark.parametrize(
    "options",
    [{}, OWN, {"threshold_ema_dead_code": 2}, {"use_cosine_sim": True}],
    ids=str,
)
def test_a_step_makes_one_tensor_as_large_as_the_codes(options):
    torch.manual_seed(0)
    quantizer = VectorQuantize(dim=D, codebook_size=K, **options)
    x = torch.randn(1, 20, D, requires_grad=True)
    quantizer(x)
    with Large([*quantizer.parameters(), *quantizer.buffers()]) as large:
        z, _, loss = quantizer(x)
        (z.sum() + loss).backward()
    # sums of the batch, or the gradient of the codes
    assert large.most == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_cosine_code_that_decayed_to_nothing_is_taken_by_no_row(training):
    torch.manual_seed(0)
    quantizer = VectorQuantize(dim=64, codebook_size=32, use_cosine_sim=True).train(training)
    whole = VectorQuantize(dim=64, codebook_size=28, use_cosine_sim=True).train(training)
    with torch.no_grad():
        quantizer._codebook.embed[:, :2] = 0
        quantizer._codebook.embed[:, 2:4] *= 1e-20
        whole.codebook = quantizer.codebook[4:]
    x = torch.randn(1, 100, 64)
    _, indices, _ = quantizer(x)
    assert torch.equal(indices - 4, whole(x)[1])
