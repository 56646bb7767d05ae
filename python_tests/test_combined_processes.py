"""Residual and product quantizers in two processes equal one."""

import torch
from processes import two_processes
from stages import stage as part

from vqkernels.nn import (
    STE,
    DiVeQ,
    EMACodebook,
    ImportanceReplacement,
    LatentMeans,
    Product,
    Residual,
    SFDiVeQ,
    TwoPhase,
)


def combined():
    """Quantizers with noise, dropout, statistics, losses and upkeep."""
    torch.manual_seed(3)
    replacement = lambda: [ImportanceReplacement(TwoPhase(9, 2, stop_before=0), threshold=0.5)]
    return {
        "residual": Residual([part(DiVeQ(), upkeep=replacement()) for _ in range(3)], min_stages=1),
        "composition": Residual([part(STE()), part(DiVeQ())]),
        "product": Product([part(DiVeQ(), dim=3, upkeep=replacement()) for _ in range(2)]),
        "separate": Product([part(SFDiVeQ(), dim=3) for _ in range(2)], joint=False),
        "losses": Product([part(STE(), dim=3) for _ in range(2)]),
        "shared": Residual([part(STE(codebook_weight=0), codebook=EMACodebook)] * 2, min_stages=1),
        "warm": Residual([part(DiVeQ(), upkeep=[LatentMeans(2, latents_per_code=2)]) for _ in range(2)]),
    }


def steps(batches, rank):
    seen = {}
    for name, quantizer in combined().items():
        quantizer.cpu()
        torch.manual_seed(100 + rank)
        for x in batches:
            # ranks differ in how many rows count
            z, indices, loss = quantizer(x, x[..., 0] < 1)
            quantizer.commit()
        seen[name] = tuple(t.detach() for t in (quantizer.export(), z, indices, loss))
    return seen


def on_rank(rank, batches):
    return steps([batch.chunk(2)[rank] for batch in batches], rank)


def test_two_processes_equal_one():
    """Noise, dropout, statistics, replacement and warm-up of two ranks equal one process on the joint batch."""
    torch.manual_seed(7)
    batches = [torch.randn(40, 3, 6) for _ in range(4)]
    expected, found = steps(batches, 0), two_processes(on_rank, batches)
    for name, (codes, z, indices, loss) in expected.items():
        for rank in range(2):
            torch.testing.assert_close(found[rank][name][0], codes)
        both = [torch.cat([found[rank][name][i] for rank in range(2)]) for i in (1, 2)]
        assert torch.equal(both[1], indices), name
        torch.testing.assert_close(both[0], z)
        torch.testing.assert_close(sum(float(found[rank][name][3]) for rank in range(2)) / 2, float(loss))
