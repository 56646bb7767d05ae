"""LPIPS (Zhang et al. 2018): a distance of images that agrees with people better than pixels do."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_floating, refuse

# convolutions of VGG-16 (Simonyan and Zisserman 2015): channels, at their places among its layers
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_PLACES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
_FEATURE = re.compile(r"(?:features|net\.slice\d)\.(\d+)\.(weight|bias)")
_LINEAR = re.compile(r"lin([0-4])\.model\.1\.weight")
# moments of ImageNet's images, for images in [-1, 1]
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_TINY = 1e-10

# height and width, in pixels, below which nothing is left after four halvings
MIN_SIDE = 16


class LPIPS(nn.Module):
    """The learned perceptual distance over VGG-16, frozen.

        d(x, y) = sum_l mean_hw sum_c w_lc (f_lchw(x) / |f_lhw(x)| - f_lchw(y) / |f_lhw(y)|)^2     (eq. 1, w for its w^2)

    where f_l are the activations after the last ReLU of each of the five stages. Built without weights of use:
    `from_files` reads them, and nothing is ever downloaded.
    """

    def __init__(self) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.stages = nn.ModuleList()
        have = 3
        for channels in _STAGES:
            stage = nn.ModuleList()
            for want in channels:
                stage.append(nn.Conv2d(have, want, 3, padding=1))
                have = want
            self.stages.append(stage)
        self.linear = nn.ParameterList([torch.rand(channels[-1]) for channels in _STAGES])
        self.register_buffer("shift", torch.tensor(_SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE)[:, None, None], persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_files(cls, vgg_path: str | Path, linear_path: str | Path | None = None) -> Self:
        """Read the weights.

        Args:
            vgg_path: torchvision's vgg16 state_dict, such as vgg16-397923af.pth; without `linear_path`, one file that
                holds both, such as the state_dict of lpips.LPIPS(net="vgg"), or a folder with the two files.
            linear_path: the lpips package's weights/v0.1/vgg.pth.

        Returns:
            The distance, on the CPU.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a file holds something else.
        """
        paths = [Path(vgg_path)] if linear_path is None else [Path(vgg_path), Path(linear_path)]
        if linear_path is None and paths[0].is_dir():
            paths = sorted([*paths[0].glob("*.pth"), *paths[0].glob("*.pt")]) or paths
        weights: dict[str, Tensor] = {}
        for path in paths:
            weights |= _read(path)
        made = cls()
        wanted = made.state_dict()
        missing = [name for name in wanted if name not in weights]
        where = ", ".join(map(str, paths))
        if missing:
            linear = all(name.startswith("linear") for name in missing)
            part = "the 5 linear layers of lpips" if linear else "the 13 convolutions of VGG-16"
            fix = "Pass weights/v0.1/vgg.pth of the lpips package too, or a folder with both files"
            fix = fix if linear else "Pass torchvision's vgg16 state_dict"
            refuse(ValueError, "LPIPS", "weights", f"hold {part}", f"{where} without them", fix)
        for name, value in wanted.items():
            if weights[name].shape != value.shape:
                got = f"{tuple(weights[name].shape)} for {name} in {where}"
                fix = "Pass the weights of VGG-16, not of another network"
                refuse(ValueError, "LPIPS", "weights", f"be {tuple(value.shape)}", got, fix)
        made.load_state_dict(weights)
        return made

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair of images.

        Args:
            x: (B, 3, H, W) in [-1, 1], 16 pixels each way or more.
            y: the same shape.

        Returns:
            (B,) distances, >= 0 with the published weights.

        Raises:
            TypeError: if the images are not floating-point.
            ValueError: if they have other shapes.
        """
        for name, images in (("x", x), ("y", y)):
            check_floating("LPIPS", name, images)
        if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIDE or x.shape != y.shape:
            requirement = f"be two batches (B, 3, H, W) of one shape, of {MIN_SIDE} pixels each way or more"
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            refuse(ValueError, "LPIPS", "images", requirement, got, "Pass larger images, as pairs")
        distance = x.new_zeros(len(x))
        shift, scale = self.get_buffer("shift"), self.get_buffer("scale")
        x, y = (x - shift) / scale, (y - shift) / scale
        for number, (stage, weight) in enumerate(zip(self.stages, self.linear)):
            x, y = self._stage(stage, x, number), self._stage(stage, y, number)
            squares = (_unit(x) - _unit(y)).square()
            # no matrix product: autocast would make it one of half precision
            distance = distance + (squares * weight[:, None, None]).sum(1).mean((1, 2))
        return distance

    @staticmethod
    def _stage(stage: nn.Module, x: Tensor, number: int) -> Tensor:
        x = x if number == 0 else F.max_pool2d(x, 2)
        for convolution in stage.children():
            x = F.relu(convolution(x))
        return x


def _unit(features: Tensor) -> Tensor:
    # under autocast they may be in half precision, whose squares overflow
    features = features if features.dtype == torch.float64 else features.float()
    # unlike the root of a sum, this norm has a gradient where all features are 0
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + _TINY)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        fix = "Pass the weights of VGG-16 and of lpips; nothing is downloaded"
        refuse(FileNotFoundError, "LPIPS", "weights", "name a file", f"{path}, where there is none", fix)
    fix = "Pass torchvision's vgg16 state_dict, or weights of the lpips package"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, UnicodeDecodeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        got = f"{path} ({reason[0].rstrip('.')})"
        refuse(ValueError, "LPIPS", "weights", "be a state_dict of tensors", got, fix)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        got = f"a {type(content).__name__} in {path}"
        refuse(ValueError, "LPIPS", "weights", "be a state_dict of tensors", got, fix)
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        feature, linear = _FEATURE.fullmatch(name), _LINEAR.fullmatch(name)
        if not isinstance(value, Tensor) or not (feature or linear):
            continue
        if linear:
            found[f"linear.{linear[1]}"] = value.flatten()
            continue
        if feature:
            for stage, places in enumerate(_PLACES):
                if int(feature[1]) in places:
                    found[f"stages.{stage}.{places.index(int(feature[1]))}.{feature[2]}"] = value
    return found
