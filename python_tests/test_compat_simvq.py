"""The face of SimVQ beside the installed vector-quantize-pytorch."""

import pytest
import torch
from face_pairs import assert_not_farther, assert_same, pair, run
from torch import nn

peers = pytest.importorskip("vector_quantize_pytorch")

from vqkernels.compat.vector_quantize_pytorch import SimVQ  # noqa: E402

K, D = 23, 6
# two reductions over D for the codes and the rotation each, forward and backward
ROUNDINGS = 8 * D

CASES = {
    "rotation": ({}, (2, 9, D)),
    "straight through": ({"rotation_trick": False, "input_to_quantize_commit_loss_weight": 0.5}, (3, D)),
    "images": ({"channel_first": True, "commitment_weight": 2.0}, (2, D, 3, 4)),
    "narrow basis": ({"frozen_codebook_dim": 4, "init_fn": lambda codes: 2 * codes}, (2, 2, 3, D)),
}


@pytest.mark.parametrize("case", CASES)
def test_simvq_is_its_peer(case):
    options, shape = CASES[case]
    face, peer, adopted = pair(SimVQ, peers.SimVQ, D, K, **options)
    x = torch.randn(shape)
    for training in (True, False):
        for module in (face, peer, adopted):
            module.train(training)
        want = run(peer, x)
        for module in (face, adopted):
            got = run(module, x)
            assert assert_not_farther(module, x, got[0][1], want[0][1]) == 0
            assert_same(got, want, ROUNDINGS)
            assert torch.equal(module.indices_to_codes(got[0][1]), got[0][0])
    assert face.codebook.shape == (K, D)


def test_simvq_decodes_what_a_transform_over_rows_made():
    """A batch norm sees the whole basis in forward; decoding some rows alone would see other moments."""
    transform = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))
    face = SimVQ(D, K, transform)
    x = torch.randn(2, 5, D)
    z, indices, _ = face(x)
    assert transform[1].num_batches_tracked == 1
    # the moments are those of the batch, which is the basis
    assert torch.equal(face.indices_to_codes(indices), z)


def test_simvq_adopts_transforms_and_modes():
    transform = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, D))
    peer = peers.SimVQ(D, K, transform, frozen_codebook_dim=4)
    transform[1].eval()
    face = SimVQ.adopt(peer)
    assert face.training and not transform[1].training
    x = torch.randn(2, 5, D)
    # reductions over 8 features in the transform
    assert_same(run(face, x), run(peer, x), ROUNDINGS + 8 * 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_simvq_takes_any_float(dtype):
    """The peer raises on latents of another dtype than its codes."""
    face = SimVQ(D, K)
    x = torch.randn(4, 7, D).to(dtype).requires_grad_()
    z, indices, loss = face(x)
    distance = (x.detach().double()[..., None, :] - face.codebook.double()).square().sum(-1)
    assert torch.equal(indices, distance.argmin(-1))
    assert z.dtype == dtype and torch.equal(z, face.codebook[indices].to(dtype))
    (z.sum().float() + loss).backward()
    assert x.grad.isfinite().all() and face.code_transform.weight.grad.isfinite().all()
