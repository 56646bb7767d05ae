"""The tokens of a whole image set, encoded once and kept on the disk."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqkernels.checks import check_count, refuse
from vqkernels.models import ImageAutoencoder
from vqkernels.train.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from vqkernels.train.checkpoints.files import sync_folder
from vqkernels.train.checkpoints.restore import load_model
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import ImageSet, load_images
from vqkernels.train.priors.token_key import data_identity, file_digest, key_of

Part = Literal["train", "held_out"]
PARTS: tuple[Part, ...] = ("train", "held_out")
MANIFEST = "manifest.json"
FORMAT = "vqkernels tokens 1"

# crops that are encoded together have about this many pixels
BATCH_PIXELS = 1 << 20


@dataclass(frozen=True)
class TokenSet:
    """Tokens of crops of images, mapped from the disk.

    Attributes:
        key: of the checkpoint, the data and the crops they are of.
        checkpoint_digest: SHA-256 of the checkpoint that encoded them.
        num_codes: values a token can take.
        grid: (h, w, Q), latents down and across and codes per latent.
        train: (n, h w Q) unsigned or signed integers, row by row and the Q codes of a latent together.
        held_out: likewise, of held-out images.
        train_labels: (n,) int32 classes, -1 where there is none.
        held_out_labels: likewise.
    """

    key: str
    checkpoint_digest: str
    num_codes: int
    grid: tuple[int, int, int]
    train: NDArray[Any]
    held_out: NDArray[Any]
    train_labels: NDArray[np.int32]
    held_out_labels: NDArray[np.int32]

    @property
    def num_classes(self) -> int:
        """Classes of the images, 0 if an image has none."""
        if min(self.train_labels.min(), self.held_out_labels.min()) < 0:
            return 0
        return int(max(self.train_labels.max(), self.held_out_labels.max())) + 1

    @property
    def length(self) -> int:
        """Tokens of a crop."""
        height, width, codes = self.grid
        return height * width * codes


def open_tokens(
    checkpoint: Path,
    cache: Path,
    *,
    data: str | None = None,
    crop: int | None = None,
    stride: int | None = None,
    say: Callable[[str], None] | None = None,
) -> TokenSet:
    """Open the tokens of an image set, encoding it where the cache does not hold it whole.

    Args:
        checkpoint: of the autoencoder.
        cache: folder of token sets, one folder in it for each key.
        data: as `TrainConfig.data`; None for that of the checkpoint.
        crop: side of a crop in pixels; None for that of the checkpoint.
        stride: pixels between the crops of a grid over each picture, 0 for the middle of it alone; None for
            half a crop on `photos`, which are few and large, and 0 on other data.
        say: called with a sentence when tokens are encoded, and when those on the disk are damaged.

    Returns:
        The tokens, mapped into memory.

    Raises:
        RunError: if the checkpoint, the data or the folder cannot be used, or an argument is out of range.
    """
    config = load_checkpoint(checkpoint).config
    asked = _asked(config, data, crop, stride)
    checkpoint = find_checkpoint(checkpoint)
    digest = file_digest(checkpoint)
    key = key_of(digest, data_identity(asked.data), asked.crop, asked.stride)
    folder = cache / key
    tell = say or (lambda _: None)
    if folder.exists():
        try:
            return _open(folder, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            tell(f"The tokens in {folder} are damaged ({error}); they are encoded again.")
    tell(f"Encoding {asked.data} with {checkpoint} into {folder}.")
    model = load_model(checkpoint)[0]
    images = load_images(dataclasses.replace(config, data=asked.data, crop=asked.crop))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=cache))
        try:
            _write(part, model, images, asked, digest)
            _replace(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return _open(folder, key)
    except OSError as error:
        got = f"{cache} ({error.strerror or error})"
        refuse(RunError, "tokens", "cache", "be a folder that can be written", got, "Pass another --cache")


@torch.no_grad()
def encode(model: ImageAutoencoder, images: Tensor) -> Tensor:
    """Return the tokens of images, without noise.

    Args:
        model: with an initialised quantizer; its training flag is left as it was.
        images: (B, C, H, W) in [-1, 1], on any device.

    Returns:
        (B, H / f, W / f, Q) int64.
    """
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        return model.quantizer(model.encode(images.to(device))).indices
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Asked:
    data: str
    crop: int
    stride: int


def _asked(config: TrainConfig, data: str | None, crop: int | None, stride: int | None) -> _Asked:
    source = config.data if data is None else data
    side = config.crop if crop is None else crop
    step = (max(1, side // 2) if source == "photos" else 0) if stride is None else stride
    try:
        check_count("tokens", "crop", side, minimum=1)
        check_count("tokens", "stride", step)
    except (TypeError, ValueError) as error:
        raise RunError(str(error)) from error
    if side % config.factor:
        fix = f"Pass --crop {max(1, round(side / config.factor)) * config.factor}"
        refuse(RunError, "tokens", "crop", f"be a multiple of 2^downsamplings = {config.factor}", side, fix)
    return _Asked(source, side, step)


def _crops(images: ImageSet, part: Part, asked: _Asked) -> Iterator[tuple[Tensor, int]]:
    for _, image, label in images.walk(part, None if asked.stride else asked.crop):
        number = -1 if label is None else int(label)
        side = asked.crop
        if not asked.stride:
            yield image, number
            continue
        for top in range(0, image.shape[1] - side + 1, asked.stride):
            for left in range(0, image.shape[2] - side + 1, asked.stride):
                yield image[:, top : top + side, left : left + side], number


def _batches(crops: Iterator[tuple[Tensor, int]], size: int) -> Iterator[tuple[Tensor, list[int]]]:
    waiting: list[tuple[Tensor, int]] = []
    for one in crops:
        waiting.append(one)
        if len(waiting) == size:
            yield torch.stack([image for image, _ in waiting]), [label for _, label in waiting]
            waiting = []
    if waiting:
        yield torch.stack([image for image, _ in waiting]), [label for _, label in waiting]


def _write(folder: Path, model: ImageAutoencoder, images: ImageSet, asked: _Asked, digest: str) -> None:
    num_codes = model.quantizer.num_codes
    dtype = "uint16" if num_codes <= 1 << 16 else "int32"
    grid: list[int] = []
    counts: dict[str, int] = {}
    for part in PARTS:
        labels: list[int] = []
        with (folder / f"{part}.bin").open("wb") as stream:
            size = max(1, BATCH_PIXELS // asked.crop**2)
            for batch, classes in _batches(_crops(images, part, asked), size):
                tokens = encode(model, batch).cpu().numpy()  # (B, h, w, Q)
                grid = list(tokens.shape[1:])
                stream.write(np.ascontiguousarray(tokens.astype(dtype)).tobytes())
                labels += classes
            _flush(stream)
        with (folder / f"{part}_labels.bin").open("wb") as stream:
            stream.write(np.asarray(labels, dtype=np.int32).tobytes())
            _flush(stream)
        if not labels:
            got = f"none of {asked.crop}x{asked.crop} in {part}"
            refuse(RunError, "tokens", "data", "have a crop in each part", got, "Pass a smaller --crop")
        counts[part] = len(labels)
    manifest = {
        "format": FORMAT,
        "checkpoint_digest": digest,
        "num_codes": num_codes,
        "grid": grid,
        "dtype": dtype,
        "counts": counts,
        "sha256": {path.name: file_digest(path) for path in sorted(folder.glob("*.bin"))},
    }
    with (folder / MANIFEST).open("w", encoding="utf-8") as text:
        text.write(json.dumps(manifest))
        _flush(text)


def _replace(part: Path, folder: Path) -> None:
    """Give a finished folder its name; what had the name before is damaged."""
    if folder.exists():
        shutil.rmtree(folder)
    try:
        part.rename(folder)
    except OSError:
        # another process was quicker, and wrote the same
        if not (folder / MANIFEST).is_file():
            raise
    sync_folder(folder.parent)


def _open(folder: Path, key: str) -> TokenSet:
    """Map a folder; a ValueError, OSError, KeyError or TypeError says what is wrong with it."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(f"{manifest['format']!r} instead of {FORMAT!r}")
    for name, digest in manifest["sha256"].items():
        if file_digest(folder / name) != digest:
            raise ValueError(f"a wrong checksum of {name}")
    height, width, codes = manifest["grid"]
    arrays: dict[str, Any] = {}
    for part in PARTS:
        count = manifest["counts"][part]
        shape = (count, height * width * codes)
        arrays[part] = np.memmap(folder / f"{part}.bin", manifest["dtype"], mode="r", shape=shape)
        arrays[f"{part}_labels"] = np.memmap(
            folder / f"{part}_labels.bin", np.int32, mode="r", shape=(count,)
        )
    return TokenSet(
        key=key,
        checkpoint_digest=manifest["checkpoint_digest"],
        num_codes=manifest["num_codes"],
        grid=(height, width, codes),
        **arrays,
    )


def _flush(stream: IO[Any]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
