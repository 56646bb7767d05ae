"""Measurements on held-out images against their definitions, for every kind of quantizer."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vqkernels.models import VQVAE
from vqkernels.nn import (
    FSQ,
    LFQ,
    STE,
    Codebook,
    EMACodebook,
    LatentMeans,
    Product,
    Residual,
    SFDiVeQ,
    VectorQuantizer,
)
from vqkernels.nn.gradient_gap import loss_gradient_gap
from vqkernels.train.config import RunError
from vqkernels.train.data.images import ImageSet, Picture
from vqkernels.train.measures.evaluate import evaluate, modes_of, reconstruct
from vqkernels.train.measures.fidelity import FeatureNet, fid
from vqkernels.train.measures.held_out import crop_batches, index_sizes
from vqkernels.train.measures.latents import LatentStudy, embed, measure_gradient_gap, study_latents
from vqkernels.train.reports.latent_plots import embedding_figure
from vqkernels.train.reports.plots import png

D, K = 4, 8


def vector(dim=D, estimator=None, codes=K, **options):
    return VectorQuantizer(
        Codebook(codes, dim, init="normal"), STE() if estimator is None else estimator, **options
    )


QUANTIZERS = {
    "ste": lambda: vector(channel_dim=1),
    "sf_diveq": lambda: vector(estimator=SFDiVeQ(bits=5), channel_dim=1),
    "cosine": lambda: vector(metric="cosine", channel_dim=1),
    "projected": lambda: VectorQuantizer(Codebook(K, 3, init="normal"), STE(), dim=D, channel_dim=1),
    "residual": lambda: Residual([vector(), vector(codes=5)], channel_dim=1),
    "product": lambda: Product([vector(2), vector(2)], channel_dim=1),
    "fsq": lambda: FSQ((3, 4), dim=D, channel_dim=1),
    "lfq": lambda: LFQ(4, dim=D, channel_dim=1),
}


def autoencoder(name="ste"):
    torch.manual_seed(0)
    model = VQVAE(QUANTIZERS[name](), width=6, latent_dim=D, residual_blocks=1)
    # latents as large as codes and about zero, so that many codes are used
    with torch.no_grad():
        last = model.encoder[-1]
        scale, mean = torch.std_mean(model.encode(torch.rand(8, 3, 24, 24) * 2 - 1), (0, 2, 3))
        last.weight.div_(scale[:, None, None, None])
        last.bias.sub_(mean).div_(scale)
    return model


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    sizes = [(24, 20), (24, 20), (17, 30)]
    shown = [Picture(f"{h}x{w}", h, w, pixels=rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in sizes]
    return ImageSet(shown, shown, crop=8, batch_size=2, factor=4, seed=0)


def by_hand(model, batches):
    """Reconstructions, latents (N, D), quantized (N, D) and indices (N, Q), through the parts of a model."""
    model = copy.deepcopy(model).eval()
    errors, found = [], []
    with torch.no_grad():
        for batch in batches:
            latents = model.encode(batch)
            quantized = model.quantizer(latents)
            errors.append((model.decode(quantized.z).clamp(-1, 1) - batch).double().square())
            rows = [t.permute(0, 2, 3, 1).reshape(-1, D) for t in (latents, quantized.z)]
            found.append((*rows, quantized.indices.flatten(0, -2)))
    return errors, *(torch.cat(parts) for parts in zip(*found, strict=True))


def entropies(indices):
    """Bits of each column."""
    found = []
    for column in indices.T.tolist():
        shares = [column.count(value) / len(column) for value in set(column)]
        found.append(-sum(p * math.log2(p) for p in shares))
    return found


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_against_the_definitions(name, images):
    model = autoencoder(name)
    found = evaluate(model, images, crops=30)
    errors, latents, quantized, indices = by_hand(model, (one.image[None] for one in images.validation()))
    bits = entropies(indices)
    # sums of a few hundred float32 numbers, in two orders of summation
    close = {"rel": 1e-5}
    psnrs = [10 * math.log10(4 / float(error.mean())) for error in errors]
    assert found.psnr == pytest.approx(sum(psnrs) / 3, **close)
    size = index_sizes(model.eval().quantizer)[0]
    assert bits[0] > 0
    assert found.dead_codes == size - len(set(indices[:, 0].tolist()))
    assert found.usage == pytest.approx(1 - found.dead_codes / size, **close)
    assert found.perplexity == pytest.approx(2 ** bits[0], **close)
    distortion = float((latents - quantized).double().square().sum(1).mean())
    assert found.distortion == pytest.approx(distortion, **close)
    assert found.distortion_per_bit == pytest.approx(
        distortion / sum(bits) if sum(bits) else math.inf, **close
    )
    pixels = sum(one.image.shape[1] * one.image.shape[2] for one in images.validation())
    rate = model.quantizer.bits_per_latent
    assert found.bits_per_pixel == pytest.approx(rate * len(indices) / pixels, rel=1e-14)
    errors, *_ = by_hand(model, crop_batches(images, 30, side=8))
    assert found.crop_psnr == pytest.approx(10 * math.log10(4 / float(torch.cat(errors).mean())), **close)
    assert (found.crops, found.images, found.lpips, found.rfid) == (30, 3, None, None)


def test_indices_of_each_mode_are_counted_to_their_own_size(images):
    model = autoencoder("sf_diveq")
    found = {mode: evaluate(model, images, mode=mode) for mode in modes_of(model)}
    assert found["curve"].distortion_per_bit is None and found["curve"].bits_per_pixel == math.inf
    assert found["curve"].distortion <= found["codeword"].distortion
    assert found["segment"].dead_codes == round((1 - found["segment"].usage) * (K - 1))
    model.quantizer.estimator.evaluation = "segment"
    # more levels than segments: none of them may fall off the count
    assert index_sizes(model.quantizer.eval()) == (K - 1, 32)
    *_, indices = by_hand(model, (one.image[None] for one in images.validation()))
    expected = found["segment"].distortion / sum(entropies(indices))
    assert found["segment"].distortion_per_bit == pytest.approx(expected, rel=1e-5)


def test_crops_are_the_same_ones_and_cover_every_position(images):
    drawn = torch.cat(list(crop_batches(images, 400, side=16)))
    assert drawn.shape == (400, 3, 16, 16)
    assert torch.equal(drawn, torch.cat(list(crop_batches(images, 400, side=16))))
    assert not torch.equal(drawn, torch.cat(list(crop_batches(images, 400, side=16, seed=2))))
    expected = [one.image.unfold(1, 16, 1).unfold(2, 16, 1).flatten(1, 2) for one in images.validation()]
    windows = torch.cat([one.movedim(1, 0).flatten(1) for one in expected])
    which = (drawn.flatten(1)[:, None] == windows).all(-1)
    # 9 + 1 places vertically times 5 or 13 horizontally; the chance that a place stays empty is below one in a hundred
    assert which.any(1).all() and which.any(0).double().mean() > 0.9


class Distance(nn.Module):
    def forward(self, a, b):
        return (a - b).abs().amax((1, 2, 3))


def test_lpips_is_the_mean_over_images(images):
    model = autoencoder()
    found = evaluate(model, images, lpips=Distance(), ssim=False)
    model.eval()
    with torch.no_grad():
        pairs = [(one.image, model(one.image[None]).reconstruction[0]) for one in images.validation()]
    expected = sum(float((a - b.clamp(-1, 1)).abs().max()) for a, b in pairs) / 3
    assert found.lpips == pytest.approx(expected, rel=1e-5) and found.ssim is None


def test_rfid_takes_images_where_there_are_enough_and_crops_else(images):
    model = autoencoder()
    few = FeatureNet(lambda pixels: pixels[:, :2].float().mean((2, 3)))
    many = FeatureNet(lambda pixels: pixels.float().mean(3)[:, :, :2].flatten(1))
    on_images = evaluate(model, images, features=few, crops=7)
    assert on_images.rfid_on == "images"
    model.eval()
    with torch.no_grad():
        whole = [one.image[None] for one in images.validation()]
        made = [model(one).reconstruction for one in whole]
        assert on_images.rfid == pytest.approx(fid(few, whole, made), rel=1e-6)
        on_crops = evaluate(model, images, features=many, crops=7)
        assert on_crops.rfid_on == "crops"
        crops = list(crop_batches(images, 7, side=8))
        made = [model(one).reconstruction for one in crops]
        assert on_crops.rfid == pytest.approx(fid(many, crops, made), rel=1e-6)
    said = (
        r"evaluate: crops must be at least 7, one more than the features of the network; got 6, and 3 whole"
    )
    with pytest.raises(RunError, match=said):
        evaluate(model, images, features=many, crops=6)


class Other(nn.Module):
    """An autoencoder that is no VQVAE, with its quantizer in the middle and the latents last."""

    def __init__(self, quantizer):
        super().__init__()
        self.encoder, self.quantizer = nn.Conv2d(3, D, 4, stride=4), quantizer
        self.decoder = nn.ConvTranspose2d(D, 3, 4, stride=4)
        self.normal = nn.BatchNorm2d(3)

    def forward(self, images):
        quantized = self.quantizer(self.encoder(images).movedim(1, -1))
        return self.normal(self.decoder(quantized.z.movedim(-1, 1))), quantized.loss


def test_any_autoencoder_with_a_quantizer_is_measured_and_left_alone(images):
    torch.manual_seed(0)
    model = Other(VectorQuantizer(EMACodebook(K, D), STE()))
    model.train().decoder.eval()
    flags = [module.training for module in model.modules()]
    before, noise = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = evaluate(model, images, crops=5)
    study = study_latents(model, images, crops=5)
    assert found.bits_per_pixel == math.log2(K) / 16 and len(reconstruct(model, images.validation(2))) == 2
    assert study.gradient_gap is not None and study.gradient_gap >= 0
    assert flags == [module.training for module in model.modules()]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(noise, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(TypeError, match=r"evaluate: model must have a Quantizer as model.quantizer; got"):
        modes_of(nn.Linear(1, 1))


def test_the_gradient_gap_against_gradients_through_the_parts(images):
    model = autoencoder()
    found = measure_gradient_gap(model, images, crops=6)
    (batch,) = crop_batches(images, 6, side=8)
    latents = model.encode(batch)
    codes = model.quantizer.codebook.codes().detach()
    nearest = codes[torch.cdist(latents.permute(0, 2, 3, 1), codes).argmin(-1)].permute(0, 3, 1, 2)
    layers = list(model.encoder.parameters())
    quantized = F.mse_loss(model.decode(latents + (nearest - latents).detach()), batch)
    plain = F.mse_loss(model.decode(latents), batch)
    assert found == pytest.approx(float(loss_gradient_gap(quantized, plain, layers)), rel=1e-4)
    noisy = autoencoder("sf_diveq")
    assert measure_gradient_gap(noisy, images, crops=6) == measure_gradient_gap(noisy, images, crops=6)
    assert measure_gradient_gap(model.requires_grad_(False), images) is None


@pytest.mark.parametrize("name", QUANTIZERS)
def test_latents_are_studied_among_the_codes_they_are_compared_with(name, images):
    model = autoencoder(name)
    study = study_latents(model, images, crops=10, points=25)
    *_, indices = by_hand(model, crop_batches(images, 10, side=8))
    assert study.total == len(indices) == 40 and len(study.latents) == 25
    for counts, column in zip(study.counts, indices.T.tolist(), strict=True):
        assert counts.tolist() == [column.count(value) for value in range(len(counts))]
    if name in ("product", "fsq", "lfq"):
        assert study.codes is None and study.divergence is None
        return
    # the codes of the first stage are the nearest ones where the study says so
    whole = study_latents(model, images, crops=10, points=40)
    sq_dist = torch.cdist(whole.latents.double(), whole.codes.double()).square().amin(1)
    assert whole.divergence == pytest.approx(float(sq_dist.mean()), rel=1e-5)
    chosen = torch.cdist(whole.latents, whole.codes).argmin(1)
    assert torch.equal(torch.bincount(chosen, minlength=len(whole.codes)), whole.counts[0])


def test_the_layout_in_a_plane_is_the_same_every_time_and_keeps_neighbours(images):
    pytest.importorskip("sklearn")
    study = study_latents(autoencoder(), images, crops=20, points=60)
    one, other = embed(study), embed(study)
    assert np.array_equal(one.latents, other.latents) and np.array_equal(one.codes, other.codes)
    assert one.latents.shape == (60, 2) and one.codes.shape == (K, 2)
    assert one.use.tolist() == study.counts[0].tolist()
    # of two latents that were neighbours, most are neighbours in the plane
    near = torch.cdist(study.latents, study.latents).fill_diagonal_(torch.inf).argmin(1)
    plane = torch.from_numpy(one.latents)
    rank = torch.cdist(plane, plane).argsort(1).argsort(1)[torch.arange(60), near]
    assert rank.double().median() <= 5


def test_a_quantizer_that_warms_up_is_refused(images):
    quantizer = vector(channel_dim=1, upkeep=[LatentMeans(5)])
    model = VQVAE(quantizer, width=6, latent_dim=D, residual_blocks=1)
    with pytest.raises(RuntimeError, match="be initialized to evaluate"):
        evaluate(model, images)
    assert model.training


@pytest.mark.parametrize(
    ("points", "codes", "dim"), [(1, None, 3), (1, 1, 3), (2, 2, 1), (40, 4, 1), (6, 3, 2)]
)
@pytest.mark.parametrize("collapsed", [False, True])
def test_few_or_collapsed_latents_have_a_layout_too(points, codes, dim, collapsed):
    rng = np.random.default_rng(0)
    scale = 0.0 if collapsed else 1.0
    latents, table = (
        None if count is None else torch.from_numpy((0.3 + scale * rng.normal(size=(count, dim))).astype("f"))
        for count in (points, codes)
    )
    counts = (torch.ones(codes or 1, dtype=torch.int64),)
    found = embed(LatentStudy(latents, table, counts, None, None, points))
    assert found.latents.shape == (points, 2) and np.isfinite(found.latents).all()
    assert found.codes is None if codes is None else found.codes.shape == (codes, 2)
    assert png(embedding_figure(found))
