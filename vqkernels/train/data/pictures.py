"""Pictures: where their pixels are, what they measure, which class they are of, and which are held out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import IO, NamedTuple, NoReturn, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vqkernels.checks import refuse
from vqkernels.train.config import RunError
from vqkernels.train.data.cifar import CIFAR_CLASSES, CifarPart, read_cifar

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

# integer labels below it are class numbers; a larger one is an identifier, of which few numbers are in use
MOST_CLASSES = 100_000


@dataclass(frozen=True)
class Picture:
    """One image: its size, and its pixels or the place they are in.

    Attributes:
        name: for messages and captions.
        height: in pixels.
        width: in pixels.
        path: the file, None when the pixels are elsewhere.
        pixels: (H, W, 3) uint8, None until they are read.
        content: gives the bytes of the encoded image, None when a path or the pixels are there.
        label: number of the class, None where the data names none.
    """

    name: str
    height: int
    width: int
    path: Path | None = None
    pixels: NDArray[np.uint8] | None = None
    content: Callable[[], bytes] | None = None
    label: int | None = None

    def read(self) -> NDArray[np.uint8]:
        """Return the pixels, (H, W, 3) uint8, from memory or decoded.

        Raises:
            RunError: if the image cannot be read or decoded.
        """
        if self.pixels is not None:
            return self.pixels
        where = self.path or self.name
        try:
            source = BytesIO(self.content()) if self.content is not None else Path(where)
        except OSError as error:
            _refuse_image(where, str(error))
        with _open(source, where) as image:
            try:
                return np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError) as error:
                _refuse_image(where, str(error))


class LazyPictures(Sequence[Picture]):
    """Some of many pictures, each made when it is asked for."""

    def __init__(
        self, make: Callable[[int], Picture], numbers: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> None:
        """Store what to make pictures of.

        Args:
            make: gives the picture of a number.
            numbers: (n,) of the pictures this sequence holds.
            sizes: (m, 2) heights and widths of all pictures by number, in pixels.
        """
        self._make, self._numbers, self._sizes = make, numbers, sizes

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(n, 2) heights and widths of the pictures of this sequence, in pixels."""
        return self._sizes[self._numbers]

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int, /) -> Picture: ...
    @overload
    def __getitem__(self, index: slice, /) -> "LazyPictures": ...
    def __getitem__(self, index: int | slice, /) -> "Picture | LazyPictures":
        """Return one picture, or the sequence of some."""
        if isinstance(index, slice):
            return LazyPictures(self._make, self._numbers[index], self._sizes)
        return self._make(int(self._numbers[index]))


class Parts(NamedTuple):
    """The two parts of a data set.

    Attributes:
        training: pictures to train on.
        held_out: pictures to measure on.
        labels: names of the classes by their numbers, None where the data names none.
        streamed: whether training goes through the pictures in order, epoch by epoch.
    """

    training: Sequence[Picture]
    held_out: Sequence[Picture]
    labels: tuple[str, ...] | None = None
    streamed: bool = False


def sizes_of(pictures: Sequence[Picture]) -> NDArray[np.int64]:
    """Return the heights and widths of pictures, (n, 2), in pixels.

    Args:
        pictures: any number of them, none made that is not.
    """
    if isinstance(pictures, LazyPictures):
        return pictures.sizes
    return np.array([(p.height, p.width) for p in pictures], dtype=np.int64).reshape(-1, 2)


def hold_out(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Part 0 .. count-1 into training and held-out numbers: every tenth, or the last of fewer than ten.

    Args:
        count: of what is parted.

    Returns:
        Numbers to train on and numbers held out, both ascending.
    """
    numbers = np.arange(count)
    chosen = numbers[9::10] if count >= 10 else numbers[-1:]
    return np.setdiff1d(numbers, chosen), chosen


def number_labels(
    found: Sequence[int | str | None],
) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
    """Give every label a class number.

    Integers from 0 are numbers already, and their names are the numerals; anything else is a name, and the
    names are numbered in sorted order.

    Args:
        found: label of each picture, None (or a negative number) where it has none.

    Returns:
        (n,) class numbers and the names by number; None if any picture lacks a label.
    """
    if not found or any(label is None or (isinstance(label, int) and label < 0) for label in found):
        return None
    numbers = [label for label in found if isinstance(label, int) and label < MOST_CLASSES]
    if len(numbers) == len(found):
        return np.array(numbers, dtype=np.int64), tuple(str(label) for label in range(max(numbers) + 1))
    names = [str(label) for label in found]
    known = {name: number for number, name in enumerate(sorted(set(names)))}
    return np.array([known[name] for name in names], dtype=np.int64), tuple(known)


def endings() -> set[str]:
    """Return the file endings of the formats that PIL can read, such as ".png"; not those it only writes."""
    return {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder at any depth, in the order of their paths.

    Args:
        folder: to search; hidden files are notes of file systems, and left out.
    """
    known = endings()
    found = (path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
    return sorted(path for path in found if not path.name.startswith("."))


def measure(source: Path | IO[bytes], where: Path | str) -> tuple[int, int]:
    """Return the height and the width of an image from its first bytes.

    Args:
        source: file, or stream of the encoded image.
        where: name for messages.

    Raises:
        RunError: if this is no picture of 8 bits a channel.
    """
    with _open(source, where) as image:
        # PIL would clip deeper pixels to 8 bits without a word
        if image.mode[:1] in ("I", "F"):
            _refuse_image(where, f"pixels of mode {image.mode}, deeper than 8 bits")
        return image.height, image.width


def photos() -> Parts:
    """Return the photographs that come with scikit-image, split by scene.

    Raises:
        RunError: if the package, or a photograph in it, is missing.
    """
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
        [_file(folder / name, Path(name).stem) for name in names] for names in (PHOTOS_TRAIN, PHOTOS_HELD_OUT)
    )
    return Parts(training, held_out)


def folder_pictures(folder: Path) -> Parts:
    """Return the images of a folder at any depth; by the order of paths every tenth is held out.

    Where every picture lies in a sub-folder, the sub-folders' names are the classes.

    Args:
        folder: to search.

    Raises:
        RunError: if there are fewer than two images, or one is unreadable.
    """
    paths = image_files(folder)
    if not paths:
        fix = "Pass --data photos, or a folder of images"
        if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
            fix = f"Pass --data hf:{folder} for a data set saved by the datasets package"
        refuse(RunError, "data", "data", "hold image files that PIL reads", f"none in {folder}", fix)
    places = [path.relative_to(folder) for path in paths]
    if len(places) == 1:
        requirement, got = "hold at least 2 images, to hold one out", f"only {places[0]} in {folder}"
        refuse(RunError, "data", "data", requirement, got, "Add images to the folder")
    labels = number_labels([place.parts[0] if len(place.parts) > 1 else None for place in places])
    of_each, names = labels or ([None] * len(paths), None)
    pictures = [
        _file(path, str(place), None if label is None else int(label))
        for path, place, label in zip(paths, places, of_each, strict=True)
    ]
    training, held_out = ([pictures[number] for number in part] for part in hold_out(len(pictures)))
    return Parts(training, held_out, names)


def cifar_pictures(folder: Path) -> Parts:
    """Return the images of CIFAR-10 with their classes; its test set is held out.

    Args:
        folder: with its Python files.

    Raises:
        RunError: if a file is missing or damaged.
    """
    training, test = read_cifar(folder)
    labelled = training.labels is not None and test.labels is not None
    return Parts(
        _arrays(training, "train", labelled),
        _arrays(test, "test", labelled),
        CIFAR_CLASSES if labelled else None,
    )


def _arrays(part: CifarPart, name: str, labelled: bool) -> list[Picture]:
    labels = part.labels if labelled and part.labels is not None else [None] * len(part.images)
    return [
        Picture(f"{name} {number}", image.shape[0], image.shape[1], pixels=image, label=label)
        for number, (image, label) in enumerate(zip(part.images, labels, strict=True))
    ]


def _file(path: Path, name: str, label: int | None = None) -> Picture:
    return Picture(name, *measure(path, path), path=path, label=label)


def _open(source: Path | IO[bytes], where: Path | str) -> Image.Image:
    try:
        return Image.open(source)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL would name the object that it reads from, which says nothing of where that came from
        reason = str(error) if isinstance(source, Path) else "in no format that PIL reads"
        _refuse_image(where, reason)


def _refuse_image(where: Path | str, reason: str) -> NoReturn:
    fix = "Remove the file or replace it" if isinstance(where, Path) else "Remove the sample or replace it"
    refuse(RunError, "data", "images", "be readable 8-bit pictures", f"{where} ({reason.rstrip('.')})", fix)
