"""From an image to indices by torch.export, and back by plain indexing."""

import pytest
import torch
from conftest import INTERPRETED

from vqkernels.models import VQVAE
from vqkernels.nn import METHODS, VectorQuantizer, build
from vqkernels.testing import DEVICE

pytestmark = pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")


class Encoder(torch.nn.Module):
    """Images to indices."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model.quantizer.encode(self.model.encode(images))


@pytest.mark.parametrize("name", list(METHODS))
def test_encoder_to_indices(name, tmp_path):
    """The exported program gives the same indices, for another batch size too, also after a trip to the disk."""
    quantizer = build(name, dim=8, num_codes=16, channel_dim=1)
    model = VQVAE(quantizer, width=8, latent_dim=8, downsamplings=1, residual_blocks=1).to(DEVICE).eval()
    images = torch.randn(4, 3, 8, 8, device=DEVICE)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Encoder(model), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "encoder.pt2")
    loaded = torch.export.load(tmp_path / "encoder.pt2").module()
    for rows in (4, 7):
        images = torch.randn(rows, 3, 8, 8, device=DEVICE)
        expected = model(images).indices
        assert torch.equal(program.module()(images), expected)
        assert torch.equal(loaded(images), expected)


@pytest.mark.parametrize("name", list(METHODS))
def test_a_plain_codebook_decodes_what_was_exported(name):
    """Whoever has no vqkernels decodes by indexing."""
    quantizer = build(name, dim=8, num_codes=16).to(DEVICE).eval()
    if not isinstance(quantizer, VectorQuantizer) and quantizer.codes_per_latent != 1:
        pytest.skip("several codebooks are exported together: their own tests decode them")
    z, indices, _ = quantizer(torch.randn(50, 8, device=DEVICE))
    table = quantizer.export()
    assert table.shape == (16, 8) and not table.requires_grad
    assert torch.equal(table[indices[:, 0]], z)
