"""Data sets of the Hugging Face datasets package: on this disk, or by name from the hub."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from vqkernels.checks import refuse
from vqkernels.train.config import RunError
from vqkernels.train.data.pictures import LazyPictures, Parts, Picture, hold_out, measure, number_labels

if TYPE_CHECKING:
    from datasets import Dataset

HF_PREFIX = "hf:"
HELD_OUT_SPLITS = ("validation", "valid", "val", "test")

# encoded images looked at together while their sizes are read
SIZE_ROWS = 256


def hf_pictures(place: str) -> Parts:
    """Return the pictures of a data set: one split to train on, another or every tenth picture held out.

    A path is opened without the network; only a name that is no path is fetched, by the datasets package.
    The image column is the one of that kind, or the one called image. The column "label" holds the classes.

    Args:
        place: `PATH` or `NAME`, and `:SPLIT` behind it to choose what to train on. A path is what
            `save_to_disk` wrote, a Parquet file, or a folder that `load_dataset` understands.

    Raises:
        RunError: if there is no such data set, split or image column, an image is unreadable, or the
            datasets package is missing.
    """
    path, split = str(Path(place).expanduser()) if place.startswith("~") else place, None
    if not Path(path).exists() and ":" in path:
        path, _, split = path.rpartition(":")
    loaded = _load(path)
    chosen, other = _splits(loaded, path, split)
    training = _Rows(loaded[chosen], path, chosen)
    if other is None:
        parts = hold_out(training.count)
        labels = number_labels(training.found)
        of_each = labels and labels[0]
        pictures = [LazyPictures(partial(training.picture, of_each), part, training.sizes) for part in parts]
    else:
        held_out = _Rows(loaded[other], path, other)
        labels = number_labels([*training.found, *held_out.found])
        of_each = (
            [None, None] if labels is None else [labels[0][: training.count], labels[0][training.count :]]
        )
        pictures = [
            LazyPictures(partial(rows.picture, numbers), np.arange(rows.count), rows.sizes)
            for rows, numbers in zip((training, held_out), of_each, strict=True)
        ]
    names = training.names or (labels and labels[1])
    return Parts(pictures[0], pictures[1], names if labels else None, streamed=True)


class _Rows:
    """The rows of one split: their images, sizes and labels."""

    def __init__(self, dataset: "Dataset", path: str, split: str) -> None:
        import datasets

        # a data set remembers the tensors that it was told to give
        dataset = dataset.with_format(None)
        column = _image_column(dataset, path)
        self._name, self._column = f"{Path(path).name}/{split}", column
        self._images = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self.count = len(dataset)
        self.sizes = self._measure()
        self.found: list[int | str | None] = [None] * self.count
        self.names: tuple[str, ...] | None = None
        if "label" in dataset.column_names:
            self.found = [_plain(label) for label in dataset["label"][:]]
            kind = dataset.features["label"]
            self.names = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None

    def picture(self, labels: NDArray[np.int64] | None, number: int) -> Picture:
        height, width = (int(side) for side in self.sizes[number])
        return Picture(
            f"{self._name} {number}",
            height,
            width,
            content=partial(self._read, number),
            label=None if labels is None else int(labels[number]),
        )

    def _read(self, number: int) -> bytes:
        image = self._images[number][self._column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()

    def _measure(self) -> NDArray[np.int64]:
        import pyarrow

        sizes = np.empty((self.count, 2), dtype=np.int64)
        row = 0
        tables = cast("Iterator[pyarrow.Table]", self._images.with_format("arrow").iter(batch_size=SIZE_ROWS))
        for table in tables:
            images = table.column(self._column).combine_chunks()
            for content, path in zip(images.field("bytes"), images.field("path"), strict=True):
                where = f"{self._name} {row}"
                if content.is_valid:
                    # a view: only the pages with the head of the image are read
                    sizes[row] = measure(pyarrow.BufferReader(content.as_buffer()), where)
                elif path.is_valid:
                    sizes[row] = measure(Path(path.as_py()), Path(path.as_py()))
                else:
                    requirement, got = "hold an image in every row", f"none in {where}"
                    refuse(
                        RunError, "data", "data", requirement, got, "Filter the data set and save it again"
                    )
                row += 1
        return sizes


def _load(path: str) -> "Mapping[str, Dataset]":
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError:
        fix = 'Install it with pip install datasets, or pip install "vqkernels[train]"'
        refuse(
            RunError, "data", f"{HF_PREFIX}{path}", "be read by the datasets package", "no such package", fix
        )
    place = Path(path)
    if not path or (not place.exists() and (path.startswith((".", "/")) or path.count("/") > 1)):
        _refuse_data(path, "no such folder or file")
    try:
        if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            loaded = datasets.load_from_disk(path)
        elif place.is_file():
            loaded = datasets.load_dataset("parquet", data_files=path)
        else:
            loaded = datasets.load_dataset(path)
    # what the package (RuntimeError of data sets that are scripts), pyarrow (ValueError) and the network raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError) as error:
        _refuse_data(path, " ".join(str(error).split()).split(". ")[0] or type(error).__name__)
    if isinstance(loaded, datasets.Dataset):
        return {"train": loaded}
    return {str(name): dataset for name, dataset in loaded.items()}


def _splits(loaded: "Mapping[str, Dataset]", path: str, split: str | None) -> tuple[str, str | None]:
    names = list(loaded)
    chosen = split or ("train" if "train" in names else names[0])
    if chosen not in names or (split is None and chosen != "train" and len(names) > 1):
        got = f"{', '.join(names)} in {path}" if split is None else f"{split}, not among {', '.join(names)}"
        refuse(
            RunError, "data", "split", "be one of the data set", got, f"Pass --data {HF_PREFIX}{path}:SPLIT"
        )
    others = [name for name in HELD_OUT_SPLITS if name in names and name != chosen]
    return chosen, others[0] if others else None


def _image_column(dataset: "Dataset", path: str) -> str:
    import datasets

    columns = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.Image)]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        got = f"{', '.join(columns) or 'none'} among {', '.join(dataset.column_names)} in {path}"
        fix = "Cast the column to datasets.Image, call it image and save the data set again"
        refuse(RunError, "data", "data", "have one column of images, or one called image", got, fix)
    return columns[0]


def _plain(label: object) -> int | str | None:
    return label if isinstance(label, (int, str)) and not isinstance(label, bool) else None


def _refuse_data(path: str, reason: str) -> NoReturn:
    requirement = "be a data set that the datasets package opens"
    fix = f"Check the path or the name behind {HF_PREFIX}"
    refuse(RunError, "data", "data", requirement, f"{path} ({reason.rstrip('.')})", fix)
