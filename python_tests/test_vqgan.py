"""The backbones of VQGAN and of SQ-VAE, and PatchGAN: shapes, sizes of the papers, equations and refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqkernels.models import VQGAN, ImageAutoencoder, PatchDiscriminator, TakidaVAE
from vqkernels.models.vqgan import _Attention, _Downsample
from vqkernels.nn import build

SMALL = {"width": 8, "multipliers": (1, 2), "residual_blocks": 1}


def quantizer(dim=4, name="ste"):
    return build(name, dim=dim, num_codes=8, channel_dim=1)


def vqgan(**sizes):
    return VQGAN(quantizer(), **({"latent_dim": 4} | SMALL | sizes))


def takida(**sizes):
    return TakidaVAE(quantizer(), **({"latent_dim": 4, "width": 8} | sizes))


@pytest.mark.parametrize(
    ("model", "factor"),
    [
        (lambda: vqgan(in_channels=2), 2),
        (lambda: vqgan(in_channels=2, multipliers=(3,)), 1),
        (lambda: vqgan(in_channels=2, multipliers=(1, 1, 2, 4), attention=(0, -1)), 8),
        (lambda: vqgan(in_channels=2, residual_blocks=0, hidden_dim=5, attention=()), 2),
        (lambda: takida(in_channels=2), 4),
        (lambda: takida(in_channels=2, downsamplings=1), 2),
        (lambda: takida(in_channels=2, downsamplings=3, residual_blocks=0, batch_norm=False), 8),
    ],
)
def test_shapes_follow_the_factor(model, factor):
    model = model()
    assert isinstance(model, ImageAutoencoder) and model.factor == factor
    images = torch.rand(3, 2, 16, 24)
    reconstruction, indices, loss = model(images)
    assert reconstruction.shape == images.shape and loss.shape == ()
    assert indices.shape == (3, 16 // factor, 24 // factor, 1)
    assert model.encode(images).shape == (3, 4, 16 // factor, 24 // factor)


@pytest.mark.parametrize("model", [vqgan, takida])
def test_every_parameter_gets_a_gradient(model):
    model = model()
    reconstruction, _, loss = model(torch.rand(2, 3, 8, 8))
    (reconstruction.square().mean() + loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("model", [vqgan, takida])
def test_the_last_layer_makes_the_pixels(model):
    model = model()
    before = model(torch.rand(1, 3, 8, 8)).reconstruction
    with torch.no_grad():
        model.last_layer.zero_()
        after = model.eval()(torch.rand(1, 3, 8, 8)).reconstruction
    assert before.std() > 0
    # what is left is the bias of each channel
    assert (after.amax((2, 3)) - after.amin((2, 3))).max() == 0


def test_the_papers_vqgan_by_its_parameters():
    with torch.device("meta"):
        model = VQGAN(quantizer(256))
    assert model.factor == 16

    def conv(n, m, k):
        return n * m * k * k + m

    def block(n, m):
        return conv(n, m, 3) + conv(m, m, 3) + 2 * n + 2 * m + (conv(n, m, 1) if n != m else 0)

    def attention(n):
        return 4 * conv(n, n, 1) + 2 * n

    widths = [128, 128, 256, 256, 512]
    middle = 2 * block(512, 512) + attention(512)
    encoder = conv(3, 128, 3) + middle + 2 * 512 + conv(512, 256, 3) + conv(256, 256, 1)
    decoder = conv(256, 256, 1) + conv(256, 512, 3) + middle + 2 * 128 + conv(128, 3, 3)
    have = 128
    for want in widths:
        encoder += block(have, want) + block(want, want)
        have = want
    have = 512
    for want in reversed(widths):
        decoder += block(have, want) + 2 * block(want, want)
        have = want
    # a convolution between levels, and attention after each block of the coarsest
    encoder += sum(conv(n, n, 3) for n in widths[:-1]) + 2 * attention(512)
    decoder += sum(conv(n, n, 3) for n in widths[1:]) + 3 * attention(512)
    assert sum(p.numel() for p in model.encoder.parameters()) == encoder
    assert sum(p.numel() for p in model.decoder.parameters()) == decoder
    norms = [part for part in model.modules() if isinstance(part, nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(32, 1e-6)}


@pytest.mark.parametrize("width", [1, 2, 6, 7, 12, 40, 100])
def test_groups_divide_small_widths(width):
    for norm in vqgan(width=width).modules():
        if isinstance(norm, nn.GroupNorm):
            assert norm.num_channels % norm.num_groups == 0
            assert norm.num_groups == 1 or norm.num_channels // norm.num_groups >= 4


def test_attention_equals_its_equation():
    part = _Attention(8).double()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64)
    rows = part.norm(x).permute(0, 2, 3, 1).reshape(2, 15, 8)
    weight, bias = part.projections.weight[:, :, 0, 0], part.projections.bias
    query, key, value = (rows @ weight[i : i + 8].T + bias[i : i + 8] for i in (0, 8, 16))
    shares = torch.softmax(torch.einsum("bnc,bmc->bnm", query, key) / math.sqrt(8), -1)
    found = (shares @ value) @ part.out.weight[:, :, 0, 0].T + part.out.bias
    expected = x + found.reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    # four products over 8 or 15 terms, one after the other
    bound = 4 * 15 * torch.finfo(torch.float64).eps * expected.abs().max()
    assert (part(x) - expected).abs().max() <= bound


def test_a_step_down_pads_at_the_right_and_below():
    part = _Downsample(2)
    x = torch.randn(1, 2, 4, 4)
    whole = F.conv2d(F.pad(x, (0, 2, 0, 2)), part.conv.weight, part.conv.bias)
    bound = 18 * torch.finfo(torch.float32).eps * whole.abs().max()
    assert (part(x) - whole[:, :, 0::2, 0::2][:, :, :2, :2]).abs().max() <= bound


def test_sq_vaes_sizes():
    model = TakidaVAE(quantizer(64))
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    layers = [
        [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in half.modules() if isinstance(m, kinds)]
        for half in (model.encoder, model.decoder)
    ]
    blocks = 2 * [(64, 64, 3), (64, 64, 1)]
    assert layers[0] == [(3, 32, 4), (32, 64, 4), (64, 64, 3), *blocks]
    assert layers[1] == [*blocks, (64, 64, 3), (64, 32, 4), (32, 3, 4)]
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 3 + 4 + 4 + 2
    plain = TakidaVAE(quantizer(64), batch_norm=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


def test_patchgans_field_of_view_and_start():
    torch.manual_seed(0)
    model = PatchDiscriminator()
    # the 2.77 million parameters of pix2pix, whose first layer sees 6 channels
    assert sum(p.numel() for p in model.parameters()) == 2_768_705 - 3 * 64 * 16
    images = torch.randn(1, 3, 96, 96, requires_grad=True)
    # without normalisation, whose statistics see everything
    for name, part in list(model.main.named_children()):
        if isinstance(part, nn.BatchNorm2d):
            model.main.set_submodule(name, nn.Identity())
    logits = model(images)
    assert logits.shape == (1, 1, 10, 10)
    logits[0, 0, 5, 5].backward()
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            # four standard errors of a standard deviation
            error = 0.02 / math.sqrt(2 * part.weight.numel())
            assert abs(part.weight.std().item() - 0.02) <= 4 * error


def test_patchgan_keeps_no_statistics():
    model = PatchDiscriminator(width=4, layers=2)
    assert not list(model.buffers())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(images), model.eval()(images))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: vqgan(width=0), "VQGAN: width must be at least 1; got 0."),
        (lambda: vqgan(multipliers=()), "VQGAN: multipliers must name at least one level; got none."),
        (lambda: vqgan(multipliers=(1, 0)), "VQGAN: multipliers must be at least 1; got 0."),
        (lambda: vqgan(attention=(2,)), "VQGAN: attention must name levels from -2 to 1; got 2. Pass -1"),
        (lambda: vqgan()(torch.zeros(1, 3, 8, 9)), "VQGAN: images must have a height and width divisible"),
        (lambda: takida(downsamplings=0), "TakidaVAE: downsamplings must be at least 1; got 0."),
        (lambda: takida()(torch.zeros(3, 8, 8)), "TakidaVAE: images must be (B, 3, H, W); got shape"),
        (lambda: PatchDiscriminator(layers=0), "PatchDiscriminator: layers must be at least 1; got 0."),
        (
            lambda: PatchDiscriminator()(torch.zeros(1, 3, 32, 23)),
            "PatchDiscriminator: images must be (B, 3, H, W) of 24 pixels each way or more; got shape",
        ),
    ],
)
def test_refusals(make, said):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value).startswith(said)
