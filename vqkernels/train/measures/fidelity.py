"""Frechet distances between the features of two sets of images: FID of samples, rFID of reconstructions."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn, Self

import torch
from torch import Tensor

from vqkernels.checks import refuse
from vqkernels.train.config import RunError


class FeatureNet:
    """A network that turns images into features, such as Inception-v3 for FID."""

    def __init__(self, features: Callable[[Tensor], Tensor]) -> None:
        """Wrap any function of pixels.

        Args:
            features: maps (B, C, H, W) uint8 to (B, F) or anything that flattens to it.
        """
        self._features = features

    @classmethod
    def from_file(cls, path: Path, device: torch.device | str = "cpu") -> Self:
        """Load a network: a program of torch.export where the name ends in .pt2, else TorchScript.

        It gets uint8 NCHW images of any batch size, and `return_features=True` where it takes that argument, as the
        `inception-2015-12-05.pt` in wide use does. A TorchScript file can run any operator of torch: load what you
        trust.

        Args:
            path: of the file.
            device: to run on.

        Returns:
            The network.

        Raises:
            RunError: if there is no such file, or it is neither kind.
        """
        if not path.is_file():
            _refuse_file(path, "where there is none")
        if not zipfile.is_zipfile(path):
            _refuse_file(path, "no archive")
        device = torch.device(device)
        try:
            if path.suffix == ".pt2":
                program = torch.export.load(path).module().to(device)
                return cls(lambda pixels: program(pixels.to(device)))
            with warnings.catch_warnings():
                # of what reads the format that these weights come in
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(str(path), map_location=device).eval()
        except (RuntimeError, ValueError, KeyError, OSError) as error:
            _refuse_file(path, str(error).splitlines()[0][:120])
        takes = {argument.name for argument in script.forward.schema.arguments}
        options = {"return_features": True} if "return_features" in takes else {}
        return cls(lambda pixels: script(pixels.to(device), **options))

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Args:
            images: (B, C, H, W) in [-1, 1]; values outside are clamped, and all are rounded to 8 bits.

        Returns:
            (B, F) float64.
        """
        levels = (images.detach().float().clamp(-1, 1) + 1) * 127.5
        return self._features(levels.round().to(torch.uint8)).flatten(1).double()


class FeatureMoments:
    """Mean and covariance of features, gathered batch by batch in float64 without their cancelling."""

    def __init__(self) -> None:
        """Start empty."""
        self.count = 0
        self.mean = self._scatter = torch.zeros(())

    def update(self, features: Tensor) -> None:
        """Count one batch.

        Args:
            features: (B, F) float64.
        """
        batch, mean = len(features), features.mean(0)
        if self.count == 0:
            self.mean = torch.zeros_like(mean)
            self._scatter = features.new_zeros(len(mean), len(mean))
        centred, delta = features - mean, mean - self.mean
        total = self.count + batch
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * batch / total)
        self.mean = self.mean + delta * (batch / total)
        self.count = total

    @property
    def enough(self) -> bool:
        """Whether the covariance can have full rank: more images than features."""
        return self.count > self.mean.numel()

    @property
    def covariance(self) -> Tensor:
        """(F, F) float64, divided by count - 1."""
        return self._scatter / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """|m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    The last trace is the sum of the singular values of S_a^(1/2) S_b^(1/2), which are real and not negative where
    the eigenvalues of the product S_a S_b are rounded to complex numbers.

    Args:
        a, b: moments of two sets, as long as each other.

    Returns:
        The distance, at least 0, in units of a feature squared.

    Raises:
        RunError: if a set has no more images than there are features, where the distance is mostly bias.
    """
    for moments in (a, b):
        if not moments.enough:
            least = moments.mean.numel() + 1
            requirement = f"be at least {least}, one more than its features"
            refuse(
                RunError, "frechet_distance", "images", requirement, moments.count, "Measure on more images"
            )
    trace = a.covariance.trace() + b.covariance.trace()
    shared = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + trace - 2 * shared))


def fid(net: FeatureNet, originals: Iterable[Tensor], samples: Iterable[Tensor]) -> float:
    """Return the Frechet distance of two streams of images.

    Args:
        net: gives the features.
        originals, samples: batches (B, C, H, W) in [-1, 1].

    Returns:
        The distance, at least 0.

    Raises:
        RunError: if a stream has no more images than the net has features.
    """
    moments = FeatureMoments(), FeatureMoments()
    for one, stream in zip(moments, (originals, samples), strict=True):
        for batch in stream:
            one.update(net(batch))
    return frechet_distance(*moments)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _refuse_file(path: Path, reason: str) -> NoReturn:
    fix = "Pass such as --inception inception-2015-12-05.pt"
    requirement = "name a TorchScript file, or a program of torch.export ending in .pt2"
    refuse(RunError, "evaluate", "inception", requirement, f"{path} ({reason})", fix)
