"""Images whose training batch is a pure function of the seed and the step."""

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vqkernels.checks import refuse
from vqkernels.train.cifar import is_cifar, read_cifar
from vqkernels.train.config import RunError, TrainConfig

PHOTOS_TRAIN = (
    "astronaut.png",
    "chelsea.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
)
PHOTOS_HELD_OUT = ("coffee.png", "rocket.jpg")

# decoded pictures up to this many bytes stay in memory; beyond it every use decodes anew
KEEP_BYTES = 1 << 30

# side of the window of the structural similarity
MIN_HELD_OUT_SIDE = 11


# exposure of a training crop: light is multiplied and added, in units where black is -1 and white is 1
GAIN = (0.7, 1.2)
OFFSET = 0.15


class HeldOut(NamedTuple):
    """One whole held-out image.

    Attributes:
        name: where it comes from.
        image: (C, H, W) float32 in [-1, 1], H and W multiples of the down-sampling factor.
    """

    name: str
    image: Tensor


@dataclass(frozen=True)
class Picture:
    """One image: its size, and its pixels or the file they are in.

    Attributes:
        name: for messages and captions.
        height: in pixels.
        width: in pixels.
        path: the file, None when the pixels are here.
        pixels: (H, W, 3) uint8, None until they are read.
    """

    name: str
    height: int
    width: int
    path: Path | None = None
    pixels: NDArray[np.uint8] | None = None

    def read(self) -> NDArray[np.uint8]:
        """Return the pixels, (H, W, 3) uint8, from memory or from the file.

        Raises:
            RunError: if the file cannot be decoded.
        """
        if self.pixels is not None:
            return self.pixels
        with _open(self.path or Path(self.name)) as image:
            try:
                return np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                _refuse_image(self.path or Path(self.name), str(error))


class ImageSet:
    """Pictures in two parts: random crops of one to train on, the whole of the other to measure on."""

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
    ) -> None:
        """Check that every picture is large enough.

        Args:
            training: pictures to take crops from.
            held_out: pictures to measure on.
            crop: side of a crop, in pixels.
            batch_size: crops in a batch.
            factor: held-out pictures are cut at the right and bottom to a multiple of it.
            seed: of the crops.
            augment: mirror half of the crops and change the exposure of all.

        Raises:
            RunError: if a part is empty, or a picture is smaller than the crop or too small to measure on.
        """
        if not training or not held_out:
            got = f"{len(training)} to train on and {len(held_out)} held out"
            refuse(
                RunError, "data", "images", "be at least 2, to hold one out", got, "Add images to the folder"
            )
        small = [p for p in (*training, *held_out) if min(p.height, p.width) < crop]
        if small:
            least = min(min(p.height, p.width) for p in small)
            got = f"{small[0].name} of {small[0].height}x{small[0].width} and {len(small) - 1} more"
            fix = f"Remove them, or pass --crop {least // factor * factor}"
            if least < factor:
                fix = "Remove them"
            refuse(RunError, "data", "images", f"be at least crop = {crop} pixels each way", got, fix)
        for picture in held_out:
            if min(picture.height, picture.width) // factor * factor < MIN_HELD_OUT_SIDE:
                got = f"{picture.name} of {picture.height}x{picture.width}"
                requirement = f"have {MIN_HELD_OUT_SIDE} pixels each way for SSIM, in multiples of {factor}"
                refuse(RunError, "data", "held-out images", requirement, got, "Use larger images")
        self.training = tuple(training)
        self.held_out = tuple(held_out)
        self._crop, self._batch_size, self._factor, self._seed = crop, batch_size, factor, seed
        self._augment = augment

    @property
    def crop(self) -> int:
        """Side of a training crop, in pixels."""
        return self._crop

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Tensor:
        """Return the crops of one step, uniform over pictures and positions.

        Args:
            step: 0-based step.
            rank: of this process.
            world: number of processes; they share the batch out in equal parts.

        Returns:
            (batch_size / world, 3, crop, crop) float32 in [-1, 1], channels last in memory.
        """
        rng = np.random.default_rng((self._seed, step))
        which = rng.integers(len(self.training), size=self._batch_size)
        where = rng.random((self._batch_size, 2))
        share = self._batch_size // world
        crops = np.empty((share, self._crop, self._crop, 3), dtype=np.uint8)
        for row in range(share):
            picture = self.training[which[rank * share + row]]
            top, left = (
                int(u * (size - self._crop + 1))
                for u, size in zip(where[rank * share + row], (picture.height, picture.width), strict=True)
            )
            crops[row] = picture.read()[top : top + self._crop, left : left + self._crop]
        batch = _to_float(crops)
        if self._augment:
            own = slice(rank * share, (rank + 1) * share)
            mirrored = torch.from_numpy(rng.random(self._batch_size)[own] < 0.5)
            gain = rng.uniform(*GAIN, self._batch_size)[own].astype(np.float32)
            offset = rng.uniform(-OFFSET, OFFSET, self._batch_size)[own].astype(np.float32)
            batch[mirrored] = batch[mirrored].flip(2)
            gain, offset = (torch.from_numpy(value)[:, None, None, None] for value in (gain, offset))
            batch = ((batch + 1) * gain - 1 + offset).clamp(-1, 1)
        return batch.permute(0, 3, 1, 2)

    def validation(self, limit: int | None = None) -> Iterator[HeldOut]:
        """Yield the held-out images, whole but for a margin below the down-sampling factor.

        Args:
            limit: at most this many; None for all.
        """
        for picture in self.held_out[:limit]:
            height, width = (size // self._factor * self._factor for size in (picture.height, picture.width))
            yield HeldOut(picture.name, _to_float(picture.read()[:height, :width]).permute(2, 0, 1))

    def only(self, number: int) -> "ImageSet":
        """Return a set with the same training pictures and a single held-out one.

        Args:
            number: of the held-out picture.
        """
        one = copy(self)
        one.held_out = self.held_out[number : number + 1]
        return one


def load_images(config: TrainConfig) -> ImageSet:
    """Open the data of a run: `photos`, a folder of images, or a folder of CIFAR-10's Python files.

    A folder of images is searched at any depth; in the order of the paths every tenth picture is held out,
    or the last of fewer than ten. CIFAR-10 holds out its test set. Transparency is dropped.

    Args:
        config: of the run; `data`, `crop`, `batch_size`, `downsamplings` and `seed` matter here.

    Returns:
        The images, decoded and in memory when they take less than `KEEP_BYTES`.

    Raises:
        RunError: if there are no such images, one is unreadable, or one is too small.
    """
    if config.data == "photos":
        training, held_out = _photos()
    elif is_cifar(Path(config.data)):
        training, held_out = (
            _arrays(part, name)
            for part, name in zip(read_cifar(Path(config.data)), ("train", "test"), strict=True)
        )
    else:
        training, held_out = _folder(Path(config.data))
    images = ImageSet(
        training,
        held_out,
        crop=config.crop,
        batch_size=config.batch_size,
        factor=config.factor,
        seed=config.seed,
        augment=config.augment,
    )
    if sum(3 * p.height * p.width for p in (*training, *held_out)) <= KEEP_BYTES:
        images.training = tuple(replace(p, pixels=p.read()) for p in images.training)
        images.held_out = tuple(replace(p, pixels=p.read()) for p in images.held_out)
    return images


def _to_float(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).div_(127.5).sub_(1.0)


def _photos() -> tuple[list[Picture], list[Picture]]:
    # the package is found, not imported: its data module would fetch what the wheel lacks
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        fix = 'Install it with pip install "vqkernels[train]"'
        refuse(RunError, "data", "photos", "come with the scikit-image package", "no such package", fix)
    folder = Path(spec.origin).parent / "data"
    missing = [name for name in (*PHOTOS_TRAIN, *PHOTOS_HELD_OUT) if not (folder / name).is_file()]
    if missing:
        fix = "Install scikit-image from its wheel, or pass --data FOLDER"
        refuse(RunError, "data", "photos", f"lie in {folder}", f"no {', '.join(missing)}", fix)
    training, held_out = (
        [_header(folder / name, Path(name).stem) for name in names]
        for names in (PHOTOS_TRAIN, PHOTOS_HELD_OUT)
    )
    return training, held_out


def _folder(folder: Path) -> tuple[list[Picture], list[Picture]]:
    fix = "Pass --data photos, or a folder of images"
    if not folder.is_dir():
        refuse(RunError, "data", "data", "be photos or a folder", f"{folder}, which is no folder", fix)
    # formats that PIL can read, not those it only writes; hidden files are notes of file systems
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    found = (path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    paths = sorted(path for path in found if not path.name.startswith("."))
    if not paths:
        refuse(RunError, "data", "data", "hold image files that PIL reads", f"none in {folder}", fix)
    pictures = [_header(path, str(path.relative_to(folder))) for path in paths]
    if len(pictures) == 1:
        got = f"only {pictures[0].name} in {folder}"
        refuse(
            RunError,
            "data",
            "data",
            "hold at least 2 images, to hold one out",
            got,
            "Add images to the folder",
        )
    held_out = pictures[9::10] or pictures[-1:]
    names = {picture.name for picture in held_out}
    return [picture for picture in pictures if picture.name not in names], held_out


def _arrays(images: NDArray[np.uint8], part: str) -> list[Picture]:
    return [
        Picture(f"{part} {number}", image.shape[0], image.shape[1], pixels=image)
        for number, image in enumerate(images)
    ]


def _header(path: Path, name: str) -> Picture:
    with _open(path) as image:
        # PIL would clip deeper pixels to 8 bits without a word
        if image.mode[:1] in ("I", "F"):
            _refuse_image(path, f"pixels of mode {image.mode}, deeper than 8 bits")
        return Picture(name, image.height, image.width, path=path)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        _refuse_image(path, str(error))


def _refuse_image(path: Path, reason: str) -> NoReturn:
    fix = "Remove the file or replace it"
    refuse(RunError, "data", "images", "be readable 8-bit pictures", f"{path} ({reason.rstrip('.')})", fix)
