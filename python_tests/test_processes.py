"""Data-parallel training of every short name: two processes equal one on the joint batch."""

import pytest
import torch
from processes import two_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import METHODS, Codebook, ImportanceReplacement, LatentMeans, TwoPhase, build
from vqkernels.testing import DEVICE

B, T, FEATURES, D, K, STEPS = 8, 6, 4, 6, 16, 3
# sums of B T rows of D terms in another order, each step from the one before
TOLERANCE = B * T * D * STEPS * torch.finfo(torch.float64).eps
# row 2 of example 5, which is on the second rank
BAD = (5, 2)
# buffers that the wrapper copies from the first rank, or leaves alone, and latents that are quantized again
WAYS = {
    "copied": {"broadcast_buffers": True},
    "own": {"broadcast_buffers": False},
    "recomputed": {"broadcast_buffers": False, "recompute": True},
}


class Model(nn.Module):
    """A small encoder and decoder around a quantizer, which activation checkpointing can run again."""

    def __init__(self, name, recompute):
        super().__init__()
        self.recompute = recompute
        method = METHODS[name]
        upkeep = [LatentMeans(1, latents_per_code=2)] if method.warm_up else []
        if method.upkeep and not method.segments:
            upkeep.append(ImportanceReplacement(TwoPhase(9, 1, stop_before=0), threshold=0.5))
        self.encoder, self.decoder = nn.Linear(FEATURES, D), nn.Linear(D, FEATURES)
        self.quantizer = build(name, dim=D, num_codes=K, upkeep=upkeep)
        for part in self.quantizer.modules():
            if isinstance(part, Codebook) and part.assignable:
                part.assign(torch.randn(part.num_codes, part.dim))

    def forward(self, x, mask, bad):
        # a latent that is not finite, made where no gradient flows back to the encoder
        latents = torch.where(bad[..., None], torch.nan, self.encoder(x))
        if self.recompute:
            z, indices, loss = checkpoint(self.quantizer, latents, mask, use_reentrant=False)
        else:
            z, indices, loss = self.quantizer(latents, mask)
        return self.decoder(torch.where((mask & ~bad)[..., None], z, 0)), z, indices, loss


def batches():
    """x, a mask with different rows of each example, and which latents are not finite."""
    generator = torch.Generator().manual_seed(7)
    made = []
    for number in range(STEPS):
        x = torch.randn(B, T, FEATURES, generator=generator, dtype=torch.float64)
        bad = torch.zeros(B, T, dtype=torch.bool)
        bad[BAD] = number > 0
        made.append((x, torch.rand(B, T, generator=generator) < torch.linspace(1, 0.4, B)[:, None], bad))
    return made


def train(name, rank=0, world=1, *, recompute=False, **options):
    """Three steps of one method on this rank's share of the examples, and all that could differ after them."""
    torch.manual_seed(3)
    model = Model(name, recompute).double()
    whole = DistributedDataParallel(model, **options) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.quantizer.follow(optimizer)
    # what another rank draws for itself must not matter
    torch.manual_seed(100 + rank)
    losses = []
    for batch in batches():
        rows = (batch[1] & ~batch[2]).sum() / world
        x, mask, bad = (each.chunk(world)[rank] for each in batch)
        y, z, indices, loss = whole(x, mask, bad)
        task = ((y - x).square() * (mask & ~bad)[..., None]).sum() / rows
        optimizer.zero_grad()
        (task + loss).backward()
        losses.append(torch.stack([task, loss]).detach())
        waiting = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer.step()
    return {
        "state": model.state_dict(),
        "waiting": waiting,
        "gradients": {key: parameter.grad for key, parameter in model.named_parameters()},
        "losses": torch.stack(losses),
        "z": z,
        "indices": indices,
    }


def on_rank(rank):
    """Every method in every way of the wrapper."""
    return {(name, way): train(name, rank, 2, **WAYS[way]) for name in METHODS for way in WAYS}


def close(found, expected, what):
    torch.testing.assert_close(
        found, expected, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, msg=lambda words: f"{what}: {words}"
    )


@pytest.mark.skipif(DEVICE.type != "cpu", reason="gloo reduces tensors of the cpu")
def test_two_processes_equal_one():
    """Parameters, statistics, upkeep, losses and outputs, with noise, masks, and NaN on one rank."""
    found = two_processes(on_rank)
    for name in METHODS:
        expected = train(name)
        for way in WAYS:
            first, second = (found[rank][name, way] for rank in range(2))
            for kind in ("state", "waiting", "gradients"):
                for key, value in expected[kind].items():
                    assert torch.equal(first[kind][key], second[kind][key]), (name, way, kind, key)
                    close(first[kind][key], value, (name, way, kind, key))
            close((first["losses"] + second["losses"]) / 2, expected["losses"], (name, way, "losses"))
            close(torch.cat((first["z"], second["z"])), expected["z"], (name, way, "z"))
            assert torch.equal(torch.cat((first["indices"], second["indices"])), expected["indices"]), (
                name,
                way,
            )
        # the comparison is one of codes that were trained, and of replacement where there is some
        assert expected["z"][BAD].isnan().all() and (expected["indices"][~batches()[-1][1]] == -1).all()
        for key, value in expected["state"].items():
            assert not key.endswith("history") or value[-1] > 0 or name == "affine_ema", (name, key)
