"""CIFAR-10 in its own Python format, read without running what the pickles might ask for."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from vqkernels.checks import refuse
from vqkernels.train.config import RunError

TRAIN_FILES = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST_FILE = "test_batch"
ARCHIVE_FOLDER = "cifar-10-batches-py"

# names of the classes by number, as the data set's page lists them
CIFAR_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class CifarPart(NamedTuple):
    """The training or the test images.

    Attributes:
        images: (n, 32, 32, 3) uint8.
        labels: n class numbers from 0 to 9, None where a file holds none.
    """

    images: NDArray[np.uint8]
    labels: list[int] | None


def is_cifar(folder: Path) -> bool:
    """Tell whether a folder, or the archive's folder inside it, holds any of CIFAR-10's Python files.

    Args:
        folder: to look into.
    """
    return any((_inner(folder) / name).is_file() for name in (*TRAIN_FILES, TEST_FILE))


def read_cifar(folder: Path) -> tuple[CifarPart, CifarPart]:
    """Read the training and the test images with their classes.

    Args:
        folder: with data_batch_1 to data_batch_5 and test_batch, or the folder above cifar-10-batches-py.

    Returns:
        The training and the test part.

    Raises:
        RunError: if a file is missing, damaged, or holds more than plain data and numpy arrays.
    """
    folder = _inner(folder)
    files = [_read(folder / name) for name in TRAIN_FILES]
    labels = [label for file in files for label in file.labels or ()]
    images = np.concatenate([file.images for file in files])
    return CifarPart(images, labels if len(labels) == len(images) else None), _read(folder / TEST_FILE)


def _inner(folder: Path) -> Path:
    inner = folder / ARCHIVE_FOLDER
    return inner if inner.is_dir() else folder


def _read(path: Path) -> CifarPart:
    if not path.is_file():
        _refuse(path, "no such file")
    try:
        with path.open("rb") as stream:
            content = _PlainUnpickler(stream, encoding="bytes").load()
    except pickle.UnpicklingError as error:
        _refuse(path, str(error).rstrip("."))
    # what a damaged pickle raises is not specified beyond this list of the pickle module's documentation
    except (
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
        MemoryError,
    ) as error:
        _refuse(path, f"damaged content ({type(error).__name__})")
    found = content.get(b"data", content.get("data")) if isinstance(content, dict) else None
    images = found.values if isinstance(found, _ByteArray) else None
    if images is None or images.ndim != 2 or images.shape[1] != 3072:
        _refuse(path, "no (n, 3072) uint8 array under 'data'")
    labels = content.get(b"labels", content.get("labels"))
    if labels is not None and not _are_labels(labels, len(images)):
        _refuse(path, f"no list of {len(images)} class numbers from 0 to 9 under 'labels'")
    return CifarPart(np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels)


def _are_labels(labels: object, count: int) -> bool:
    if not isinstance(labels, list) or len(labels) != count:
        return False
    return all(isinstance(label, int) and 0 <= label < len(CIFAR_CLASSES) for label in labels)


def _refuse(path: Path, got: str) -> NoReturn:
    fix = "Unpack the Python version of CIFAR-10 again"
    refuse(RunError, "data", path.name, "be a file of CIFAR-10's Python version", f"{got} at {path}", fix)


class _ByteType:
    """Stands for numpy's dtype uint8, the only one such a file needs."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if code not in ("u1", b"u1"):
            raise pickle.UnpicklingError(f"an array of dtype {code!r}")

    def __setstate__(self, state: object) -> None:
        """Ignore byte order and alignment: a byte has neither."""


class _ByteArray:
    """Stands for numpy's array while a file is read, so that numpy itself never sees a foreign state."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _ByteType, bool, bytes]) -> None:
        _, shape, dtype, fortran, raw = state
        self.fill(raw, dtype, shape, "F" if fortran else "C")

    def fill(self, raw: bytes, dtype: object, shape: tuple[int, ...], order: Literal["C", "F"]) -> None:
        if not isinstance(dtype, _ByteType):
            raise pickle.UnpicklingError("an array without a dtype")
        self.values = np.frombuffer(raw, dtype=np.uint8).reshape(shape, order=order)


def _from_buffer(raw: bytes, dtype: object, shape: tuple[int, ...], order: Literal["C", "F"]) -> _ByteArray:
    array = _ByteArray()
    array.fill(raw, dtype, shape, order)
    return array


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding!r}")
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Callable[..., object]] = {
    ("numpy", "ndarray"): _ByteArray,
    ("numpy", "dtype"): _ByteType,
    ("numpy.core.multiarray", "_reconstruct"): _ByteArray,
    ("numpy._core.multiarray", "_reconstruct"): _ByteArray,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _latin1,
}


class _PlainUnpickler(pickle.Unpickler):
    """Admits numbers, text, containers and arrays of bytes; any other name in the file is refused."""

    def find_class(self, module_name: str, global_name: str, /) -> Callable[..., object]:
        admitted = _ADMITTED.get((module_name, global_name))
        if admitted is None:
            raise pickle.UnpicklingError(
                f"the name {module_name}.{global_name}, which plain data has no use for"
            )
        return admitted
