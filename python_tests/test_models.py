"""The VQ-VAE: shapes, sizes of the paper, gradients and refusals."""

import pytest
import torch

from vqkernels.models import VQVAE
from vqkernels.nn import build


def make(name="diveq", **sizes):
    dim = sizes.setdefault("latent_dim", 4)
    return VQVAE(build(name, dim=dim, num_codes=8, channel_dim=1), **sizes)


@pytest.mark.parametrize("downsamplings", [0, 1, 2, 3])
def test_shapes_follow_the_downsampling(downsamplings):
    model = make(width=6, downsamplings=downsamplings, residual_blocks=1, in_channels=2)
    images = torch.rand(3, 2, 16, 24)
    reconstruction, indices, loss = model(images)
    factor = 2**downsamplings
    assert reconstruction.shape == images.shape
    assert indices.shape == (3, 16 // factor, 24 // factor, 1)
    assert loss.shape == ()
    assert model.encode(images).shape == (3, 4, 16 // factor, 24 // factor)


def test_every_parameter_gets_a_gradient():
    model = make("ste", width=6, residual_blocks=2)
    reconstruction, _, loss = model(torch.rand(2, 3, 8, 8))
    (reconstruction.square().mean() + loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_the_models_decode_undoes_its_indices():
    model = make(width=6).eval()
    images = torch.rand(2, 3, 8, 8)
    reconstruction, indices, _ = model(images)
    latents = model.quantizer.decode(indices).movedim(-1, 1)
    # the same values through the same convolutions, in another memory layout: sums in another order
    bound = 64 * 16 * torch.finfo(torch.float32).eps * reconstruction.abs().max().item()
    assert (model.decode(latents) - reconstruction).abs().max() <= bound


def test_full_size_of_the_paper_is_reachable():
    with torch.device("meta"):
        sizes = {"width": 256, "latent_dim": 512, "downsamplings": 4, "residual_blocks": 6}
        model = make(**sizes)
    convolutions = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    strided = [m for m in convolutions if m.stride == (2, 2)]
    assert [m.kernel_size for m in strided] == [(4, 4)] * 4
    assert len(convolutions) == 4 + 2 * 6 + 1
    assert convolutions[-1].kernel_size == (1, 1) and convolutions[-1].out_channels == 512
    assert model.factor == 16


def test_a_training_batch_can_be_learned_by_heart():
    torch.manual_seed(1)
    model = make("diveq", width=16, residual_blocks=1, downsamplings=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    images = torch.rand(2, 3, 8, 8).mul(2).sub(1)
    losses = []
    for _ in range(150):
        reconstruction, _, loss = model(images)
        total = (reconstruction - images).square().mean() + loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((3, 8, 8), "VQVAE: images must be (B, 3, H, W); got shape (3, 8, 8). Pass a batch"),
        ((1, 1, 8, 8), "VQVAE: images must be (B, 3, H, W); got shape (1, 1, 8, 8)."),
        ((1, 3, 8, 10), "VQVAE: images must have a height and width divisible by 4; got 8x10. Crop"),
    ],
)
def test_images_that_do_not_fit(shape, said):
    with pytest.raises(ValueError) as caught:
        make(width=4)(torch.zeros(shape))
    assert str(caught.value).startswith(said)


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match=r"VQVAE: width must be at least 1; got 0. "):
        make(width=0)
    with pytest.raises(ValueError, match=r"VQVAE: downsamplings must be at least 0; got -1. "):
        make(downsamplings=-1)
