"""Images whose training batch is a pure function of the seed and the step."""

import math
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.checks import refuse
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.cifar import is_cifar
from vqkernels.train.data.huggingface import HF_PREFIX, hf_pictures
from vqkernels.train.data.order import EpochOrder
from vqkernels.train.data.pictures import (
    Parts,
    Picture,
    cifar_pictures,
    folder_pictures,
    image_files,
    photos,
    sizes_of,
)
from vqkernels.train.data.shards import is_pattern, pattern_shards, shard_pictures

# decoded pictures up to this many bytes stay in memory; beyond it every use decodes anew
KEEP_BYTES = 1 << 30

# side of the window of the structural similarity
MIN_HELD_OUT_SIDE = 11


# exposure of a training crop: light is multiplied and added, in units where black is -1 and white is 1
GAIN = (0.7, 1.2)
OFFSET = 0.15
# and of its white balance: each colour is multiplied
TINT = (0.75, 1.25)


class HeldOut(NamedTuple):
    """One whole held-out image.

    Attributes:
        name: where it comes from.
        image: (C, H, W) float32 in [-1, 1], H and W multiples of the down-sampling factor.
    """

    name: str
    image: Tensor


class Sample(NamedTuple):
    """One picture of a walk through a part of the data.

    Attributes:
        name: where it comes from.
        image: (3, H, W) float32 in [-1, 1].
        label: number of its class, None where the data names none.
    """

    name: str
    image: Tensor
    label: int | None


class ImageSet:
    """Pictures in two parts: random crops of one to train on, the whole of the other to measure on.

    Attributes:
        training: pictures to take crops from.
        held_out: pictures to measure on.
        labels: names of the classes by their numbers, None where the data names none.
        epoch_steps: steps that show as many crops as streamed samples, else as many pixels as the pictures.
    """

    def __init__(
        self,
        training: Sequence[Picture],
        held_out: Sequence[Picture],
        *,
        crop: int,
        batch_size: int,
        factor: int,
        seed: int,
        augment: bool = False,
        labels: tuple[str, ...] | None = None,
        order: EpochOrder | None = None,
    ) -> None:
        """Check that every picture is large enough.

        Args:
            training: pictures to take crops from.
            held_out: pictures to measure on.
            crop: side of a crop, in pixels.
            batch_size: crops in a batch.
            factor: held-out pictures are cut at the right and bottom to a multiple of it.
            seed: of the crops.
            augment: mirror half of the crops, and change exposure and white balance of all.
            labels: names of the classes by their numbers, None where the data names none.
            order: in which training pictures are shown, one crop of each in an epoch; None to draw them
                anew for every batch.

        Raises:
            RunError: if a part is empty, or a picture is smaller than the crop or too small to measure on.
        """
        if not training or not held_out:
            got = f"{len(training)} to train on and {len(held_out)} held out"
            refuse(
                RunError, "data", "images", "be at least 2, to hold one out", got, "Add images to the folder"
            )
        sizes, measured = sizes_of(training), sizes_of(held_out)
        sides = np.concatenate([sizes, measured]).min(1)
        small = np.flatnonzero(sides < crop)
        if len(small):
            first, least = int(small[0]), int(sides.min())
            picture = training[first] if first < len(training) else held_out[first - len(training)]
            got = f"{picture.name} of {picture.height}x{picture.width} and {len(small) - 1} more"
            fix = f"Remove them, or pass --crop {least // factor * factor}"
            if least < factor:
                fix = "Remove them"
            refuse(RunError, "data", "images", f"be at least crop = {crop} pixels each way", got, fix)
        low = np.flatnonzero(measured.min(1) // factor * factor < MIN_HELD_OUT_SIDE)
        if len(low):
            picture = held_out[int(low[0])]
            got = f"{picture.name} of {picture.height}x{picture.width}"
            requirement = f"have {MIN_HELD_OUT_SIDE} pixels each way for SSIM, in multiples of {factor}"
            refuse(RunError, "data", "held-out images", requirement, got, "Use larger images")
        self.training, self.held_out, self.labels = training, held_out, labels
        self._crop, self._batch_size, self._factor, self._seed = crop, batch_size, factor, seed
        self._augment, self._order = augment, order
        crops = len(training) if order else sizes.prod(1).sum() / crop**2
        self.epoch_steps = math.ceil(crops / batch_size)

    @property
    def in_memory(self) -> bool:
        """Whether the pictures to train on are decoded already."""
        return self.training[0].pixels is not None

    @property
    def crop(self) -> int:
        """Side of a training crop, in pixels."""
        return self._crop

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Tensor:
        """Return the crops of one step, uniform over positions; streamed pictures come in their order.

        Args:
            step: 0-based step.
            rank: of this process.
            world: number of processes; they share the batch out in equal parts.

        Returns:
            (batch_size / world, 3, crop, crop) float32 in [-1, 1], channels last in memory.
        """
        rng = np.random.default_rng((self._seed, step))
        share = self._batch_size // world
        own = slice(rank * share, (rank + 1) * share)
        if self._order is None:
            which = rng.integers(len(self.training), size=self._batch_size)[own]
        else:
            which = self._order.take(step * self._batch_size + rank * share, share)
        where = rng.random((self._batch_size, 2))[own]
        crops = np.empty((share, self._crop, self._crop, 3), dtype=np.uint8)
        for row in range(share):
            picture = self.training[int(which[row])]
            top, left = (
                int(u * (size - self._crop + 1))
                for u, size in zip(where[row], (picture.height, picture.width), strict=True)
            )
            crops[row] = picture.read()[top : top + self._crop, left : left + self._crop]
        batch = _to_float(crops)
        if self._augment:
            mirrored = torch.from_numpy(rng.random(self._batch_size)[own] < 0.5)
            gain = rng.uniform(*GAIN, self._batch_size)[own].astype(np.float32)
            offset = rng.uniform(-OFFSET, OFFSET, self._batch_size)[own].astype(np.float32)
            tint = rng.uniform(*TINT, (self._batch_size, 1, 1, 3))[own].astype(np.float32)
            batch[mirrored] = batch[mirrored].flip(2)
            gain, offset = (torch.from_numpy(value)[:, None, None, None] for value in (gain, offset))
            batch = ((batch + 1) * gain * torch.from_numpy(tint) - 1 + offset).clamp(-1, 1)
        return batch.permute(0, 3, 1, 2)

    def validation(self, limit: int | None = None) -> Iterator[HeldOut]:
        """Yield the held-out images, whole but for a margin below the down-sampling factor.

        Args:
            limit: at most this many; None for all.
        """
        for picture in self.held_out[:limit]:
            height, width = (size // self._factor * self._factor for size in (picture.height, picture.width))
            yield HeldOut(picture.name, _to_float(picture.read()[:height, :width]).permute(2, 0, 1))

    def walk(
        self, part: Literal["train", "held_out"], crop: int | None, *, rank: int = 0, world: int = 1
    ) -> Iterator[Sample]:
        """Yield every picture of a part once, in a fixed order.

        Args:
            part: of the data.
            crop: side of the square taken from the middle, in pixels; None for the whole picture, cut at
                the right and bottom to a multiple of the down-sampling factor.
            rank: of this process.
            world: number of processes; each walks through every world-th picture.

        Raises:
            RunError: if a picture is smaller than the crop, or cannot be decoded.
        """
        pictures = self.training if part == "train" else self.held_out
        for picture in pictures[rank::world]:
            if crop is not None and min(picture.height, picture.width) < crop:
                got = f"{picture.name} of {picture.height}x{picture.width}"
                refuse(RunError, "data", "images", f"be at least {crop} pixels each way", got, "Remove it")
            pixels = picture.read()
            if crop is None:
                height, width = (
                    size // self._factor * self._factor for size in (picture.height, picture.width)
                )
                pixels = pixels[:height, :width]
            else:
                top, left = ((size - crop) // 2 for size in (picture.height, picture.width))
                pixels = pixels[top : top + crop, left : left + crop]
            yield Sample(picture.name, _to_float(pixels).permute(2, 0, 1), picture.label)

    def only(self, number: int) -> "ImageSet":
        """Return a set with the same training pictures and a single held-out one.

        Args:
            number: of the held-out picture.
        """
        return self._measured_on(self.held_out[number : number + 1])

    def spread(self, count: int) -> "ImageSet":
        """Return a set with the same training pictures and at most so many held-out ones.

        Args:
            count: of held-out pictures, evenly spaced among all, for neighbours are often of one class.
        """
        of = len(self.held_out)
        if of <= count:
            return self
        return self._measured_on([self.held_out[number * of // count] for number in range(count)])

    def _measured_on(self, held_out: Sequence[Picture]) -> "ImageSet":
        other = copy(self)
        other.held_out = held_out
        return other


def load_images(config: TrainConfig) -> ImageSet:
    """Open the data of a run.

    `data` is one of
    - `photos`: those that come with scikit-image;
    - a folder of images, searched at any depth; its sub-folders are classes where every picture lies in one;
    - a folder of CIFAR-10's Python files;
    - a folder of tar shards, a shard, or a pattern such as `shards/{000..009}.tar`, as webdataset writes;
    - `hf:PATH`, a data set on this disk, or `hf:NAME`, one that the datasets package fetches from the Hugging
      Face hub; either with `:SPLIT` behind it.

    In their order every tenth picture is held out, or the last of fewer than ten; of shards every tenth,
    if there are two or more. CIFAR-10 holds out its test set, a data set of several splits the one named
    validation or test. Transparency is dropped. Shards and `hf:` are streamed: an epoch shows each once.

    Args:
        config: of the run; `data`, `crop`, `batch_size`, `downsamplings`, `augment` and `seed` matter here.

    Returns:
        The images, decoded and in memory when they take less than `KEEP_BYTES`.

    Raises:
        RunError: if there are no such images, one is unreadable, one is too small, or a package is missing.
    """
    parts = _parts(config.data)
    order = EpochOrder(len(parts.training), config.seed) if parts.streamed and parts.training else None
    images = ImageSet(
        parts.training,
        parts.held_out,
        crop=config.crop,
        batch_size=config.batch_size,
        factor=config.factor,
        seed=config.seed,
        augment=config.augment,
        labels=parts.labels,
        order=order,
    )
    if 3 * sum(int(sizes_of(part).prod(1).sum()) for part in parts[:2]) <= KEEP_BYTES:
        images.training, images.held_out = (
            [replace(p, pixels=p.read(), content=None) for p in part]
            for part in (images.training, images.held_out)
        )
    return images


def _parts(data: str) -> Parts:
    place = Path(data)
    if data == "photos":
        return photos()
    if data.startswith(HF_PREFIX):
        return hf_pictures(data.removeprefix(HF_PREFIX))
    if is_pattern(data):
        return shard_pictures(pattern_shards(data))
    if not place.is_dir():
        fix = "Pass --data photos, or a folder of images"
        refuse(RunError, "data", "data", "be photos or a folder", f"{place}, which is no folder", fix)
    if is_cifar(place):
        return cifar_pictures(place)
    shards = sorted(path for path in place.glob("[!.]*.tar") if path.is_file())
    if not shards:
        return folder_pictures(place)
    if image_files(place):
        got = f"{len(shards)} *.tar and {len(image_files(place))} images in {place}"
        fix = f"Pass --data '{place}/*.tar' to train on the shards, or move them away"
        refuse(RunError, "data", "data", "hold either images or tar shards", got, fix)
    return shard_pictures(shards)


def _to_float(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1.0)
