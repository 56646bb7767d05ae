"""Frechet distances against scipy's matrix root, and the networks of features that files hold."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from vqkernels.train.config import RunError
from vqkernels.train.measures.fidelity import FeatureMoments, FeatureNet, fid, frechet_distance

linalg = pytest.importorskip("scipy.linalg")


def moments(features, batches=3):
    gathered = FeatureMoments()
    for part in features.tensor_split(batches):
        gathered.update(part)
    return gathered


def features(count, width, seed, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + offset


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_those_of_all_rows_at_once(offset):
    rows = features(103, 7, 0, offset)
    found = moments(rows, batches=5)
    expected = torch.cov(rows.T)
    # centred before they are squared, so that only what rounds in a row of size |offset| is left
    tolerance = 103 * torch.finfo(torch.float64).eps * max(offset, 1) * float(expected.abs().max())
    assert found.count == 103
    assert torch.allclose(found.mean, rows.mean(0), rtol=0, atol=103 * 2.3e-16 * max(offset, 10))
    assert torch.allclose(found.covariance, expected, rtol=0, atol=tolerance)


def test_frechet_distance_against_the_matrix_root_of_scipy():
    a, b = features(60, 9, 1), features(80, 9, 2, offset=0.5)
    means = a.mean(0) - b.mean(0)
    covariances = [np.cov(one.numpy().T) for one in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    traces = sum(np.trace(one) for one in covariances) - 2 * np.trace(root)
    expected = float(means @ means) + float(traces)
    scale = sum(np.trace(one) for one in covariances)
    # a root doubles the relative error of an eigenvalue that is sqrt(eps) small
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(expected, abs=9 * 1.5e-8 * scale)


def test_frechet_distance_of_gaussians_on_a_line():
    # means 1 and 7, deviations 2 and 6
    a = torch.tensor([[-1.0], [1.0], [3.0]], dtype=torch.float64)
    b = a * 3 + 4
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(6.0**2 + (2 - 6) ** 2, rel=1e-14)


def test_a_set_is_at_no_distance_from_itself():
    rows = features(50, 12, 3)
    found = frechet_distance(moments(rows, 2), moments(rows, 7))
    assert 0 <= found <= 12 * 1.5e-8 * float(torch.cov(rows.T).trace())


def test_too_few_images_are_refused():
    few, enough = moments(features(9, 9, 0)), moments(features(10, 9, 0))
    said = (
        r"frechet_distance: images must be at least 10, one more than its features; got 9\. Measure on more"
    )
    with pytest.raises(RunError, match=said):
        frechet_distance(enough, few)
    assert math.isfinite(frechet_distance(enough, enough))
    with pytest.raises(RunError, match="images must be at least"):
        fid(FeatureNet(lambda pixels: pixels), [torch.zeros(20, 1, 2, 2)], [])


class Means(nn.Module):
    """Features that a reader can compute: mean and greatest level of each channel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        levels = images.float()
        return torch.cat((levels.mean((2, 3)), levels.amax((2, 3))), dim=1)


class Inception(nn.Module):
    """The interface of the Inception file: features only when they are asked for."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        levels = images.float()
        if return_features:
            return levels.mean((2, 3))
        return levels.sum((1, 2, 3))


def test_torchscript_and_exported_networks_see_eight_bit_levels(tmp_path):
    images = torch.rand(5, 3, 8, 6) * 2.4 - 1.2
    levels = ((images.clamp(-1, 1) + 1) * 127.5).round()
    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    example = torch.zeros(2, 3, 8, 6, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(
        torch.export.export(Means(), (example,), dynamic_shapes=({0: batch},)), tmp_path / "means.pt2"
    )
    for name in ("means.pt", "means.pt2"):
        found = FeatureNet.from_file(tmp_path / name)(images)
        expected = torch.cat((levels.mean((2, 3)), levels.amax((2, 3))), dim=1)
        assert found.dtype == torch.float64 and found.shape == (5, 6)
        # a mean of 48 levels of up to 255 in float32
        assert torch.allclose(found, expected.double(), rtol=0, atol=48 * 255 * 1.2e-7)
    torch.jit.script(Inception()).save(str(tmp_path / "inception.pt"))
    assert FeatureNet.from_file(tmp_path / "inception.pt")(images).shape == (5, 3)


def test_fid_tells_a_shift_of_the_light(tmp_path):
    generator = torch.Generator().manual_seed(0)
    originals = torch.rand(40, 1, 4, 4, generator=generator) - 0.5
    brighter = originals + 20 / 127.5
    net = FeatureNet(lambda pixels: pixels.float().mean((2, 3)))
    # means move by 20 levels but for rounding of each pixel by half a level; deviations hardly move
    assert fid(net, originals.split(16), brighter.split(7)) == pytest.approx(400, abs=2 * 20 + 1)
    assert fid(net, originals.split(16), originals.split(7)) < 1e-6


def test_files_that_hold_no_network_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pt2")
    (tmp_path / "text.pt").write_text("no archive")
    (tmp_path / "text.pt2").write_text("no archive")
    for name in ("none.pt", "weights.pt", "weights.pt2", "text.pt", "text.pt2"):
        with pytest.raises(RunError, match=r"evaluate: inception must name a TorchScript file, or a program"):
            FeatureNet.from_file(tmp_path / name)
