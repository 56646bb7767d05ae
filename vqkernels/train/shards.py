"""Tar shards as webdataset writes them, indexed so that any sample is read without those before it."""

import glob
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from vqkernels.checks import refuse
from vqkernels.train.config import RunError
from vqkernels.train.pictures import LazyPictures, Parts, Picture, endings, hold_out, measure, number_labels

WILDCARDS = "{*?["
INDEX_THREADS = 8

# webdataset's rule for members that are no samples
META = re.compile(r"__[^/]*__($|/)")


def is_pattern(data: str) -> bool:
    """Tell whether `--data` names a tar shard or a pattern of them.

    Args:
        data: the text given; a folder of that very name is no pattern.
    """
    if Path(data).exists():
        return Path(data).is_file() and data.endswith(".tar")
    return data.endswith(".tar") or any(sign in data for sign in WILDCARDS)


def pattern_shards(pattern: str) -> list[Path]:
    """Return the shards that a pattern names, braces by webdataset's rules and wildcards by the shell's.

    Args:
        pattern: such as `shards/{000..009}.tar` or `shards/*.tar`.

    Raises:
        RunError: if a shard that braces name is missing, wildcards match none, or webdataset is missing.
    """
    if Path(pattern).exists():
        return [Path(pattern)]
    shards: list[Path] = []
    for each in _webdataset().shardlists.expand_urls(pattern):
        wild = any(sign in each for sign in WILDCARDS)
        found = sorted(glob.glob(each)) if wild else [each]
        if not found or not all(Path(name).is_file() for name in found):
            fix = "Check the pattern, or download the shards first"
            refuse(RunError, "data", "tar shards", "be files on this disk", f"no file {each}", fix)
        shards += map(Path, found)
    return shards


def shard_pictures(shards: Sequence[Path]) -> Parts:
    """Return the samples of tar shards; every tenth shard is held out, or of one shard every tenth sample.

    A sample's class is its member `.cls`, or "label" in its member `.json`.

    Args:
        shards: uncompressed tar files in their order; members of one base name in a row make a sample.

    Raises:
        RunError: if a shard is damaged, a sample has no picture or two, or webdataset is missing.
    """
    # a missing package is told once here, not by the threads
    _webdataset()
    stats = [path.stat() for path in shards]
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        indices = list(pool.map(_index, shards, (s.st_size for s in stats), (s.st_mtime_ns for s in stats)))
    counts = np.array([len(index.names) for index in indices])
    samples = _Samples(shards, indices, np.cumsum(counts))
    labels = number_labels([label for index in indices for label in index.labels])
    if labels is not None:
        samples = _Samples(shards, indices, samples.ends, labels[0])
    if len(shards) == 1:
        parts = hold_out(int(counts[0]))
    else:
        shard_of = np.repeat(np.arange(len(shards)), counts)
        parts = tuple(np.flatnonzero(np.isin(shard_of, part)) for part in hold_out(len(shards)))
    sizes = np.concatenate([index.places[:, 2:] for index in indices])
    training, held_out = (LazyPictures(samples.picture, part, sizes) for part in parts)
    return Parts(training, held_out, labels and labels[1], streamed=True)


class _Index(NamedTuple):
    """Of the samples of one shard: names, (n, 4) offset, bytes, height and width of the image, labels."""

    names: NDArray[np.bytes_]
    places: NDArray[np.int64]
    labels: list[int | str | None]


class _Member(NamedTuple):
    """One file of a shard: where its content is, and the content itself where that is short and needed."""

    offset: int
    size: int
    height: int = 0
    width: int = 0
    text: bytes | None = None


@dataclass(frozen=True)
class _Samples:
    """The samples of all shards, numbered in their order."""

    shards: Sequence[Path]
    indices: Sequence[_Index]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None

    def picture(self, number: int) -> Picture:
        shard = int(np.searchsorted(self.ends, number, side="right"))
        index = self.indices[shard]
        row = number - int(self.ends[shard]) + len(index.names)
        offset, size, height, width = (int(value) for value in index.places[row])
        return Picture(
            f"{self.shards[shard].name}/{index.names[row].decode()}",
            height,
            width,
            content=partial(_read_span, self.shards[shard], offset, size),
            label=None if self.labels is None else int(self.labels[number]),
        )


def _read_span(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) < size:
        raise OSError(f"{path} ends within it")
    return content


# runs that open the same data again, as a comparison does, find the shards indexed; size and time tell a
# shard that was replaced
@cache
def _index(path: Path, size: int, modified: int) -> _Index:
    images = {ending[1:] for ending in endings()}
    names: list[bytes] = []
    places: list[tuple[int, int, int, int]] = []
    labels: list[int | str | None] = []
    try:
        for sample in _webdataset().tariterators.group_by_keys(_members(path, images)):
            found = [suffix for suffix in sample if suffix in images]
            name = f"{path.name}/{sample['__key__']}"
            if len(found) != 1:
                got = f"{len(found)} in {name}" + (f" ({', '.join(found)})" if found else "")
                fix = "Write the shards anew with one image a sample"
                refuse(RunError, "data", "tar shards", "hold one image in every sample", got, fix)
            names.append(f"{sample['__key__']}.{found[0]}".encode(errors="replace"))
            places.append(sample[found[0]][:4])
            labels.append(_label(sample, name))
    except tarfile.TarError as error:
        _refuse_shard(path, str(error))
    # what webdataset's grouping raises where a name occurs twice in a sample
    except ValueError as error:
        _refuse_shard(path, str(error.args[0]))
    except OSError as error:
        _refuse_shard(path, str(error))
    if not names:
        _refuse_shard(path, "no samples")
    return _Index(np.array(names), np.array(places, dtype=np.int64), labels)


def _members(path: Path, images: set[str]) -> Iterator[dict[str, object]]:
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
            stream = archive.extractfile(member) if member.isreg() else None
            if stream is None or META.match(member.name):
                continue
            place = _Member(member.offset_data, member.size)
            if suffix in images:
                height, width = measure(stream, f"{path}: {member.name}")
                place = place._replace(height=height, width=width)
            elif suffix in ("cls", "json"):
                place = place._replace(text=stream.read())
            yield {"fname": member.name, "data": place, "__url__": str(path)}
        # tarfile takes a damaged header for the end
        end = archive.fileobj
        if end is not None:
            end.seek(archive.offset)
            if end.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"no header and no end mark at byte {archive.offset}")


def _label(sample: dict[str, _Member], name: str) -> int | str | None:
    for suffix in ("cls", "json"):
        if suffix not in sample:
            continue
        try:
            text = (sample[suffix].text or b"").decode().strip()
            label = json.loads(text) if suffix == "json" else text
        except ValueError as error:
            fix = "Write the sample anew"
            got = f"{name}.{suffix} ({type(error).__name__})"
            refuse(RunError, "data", "labels", "be UTF-8 text or JSON", got, fix)
        if suffix == "json":
            label = label.get("label") if isinstance(label, dict) else None
        if isinstance(label, str) and label.isdecimal():
            label = int(label)
        if isinstance(label, (int, str)) and not isinstance(label, bool) and label != "":
            return label
    return None


def _webdataset() -> ModuleType:
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ModuleNotFoundError:
        fix = 'Install it with pip install webdataset, or pip install "vqkernels[train]"'
        refuse(RunError, "data", "tar shards", "be read by the webdataset package", "no such package", fix)
    return webdataset


def _refuse_shard(path: Path, reason: str) -> NoReturn:
    requirement, fix = "be whole, uncompressed tar files", "Write or download the shard again"
    refuse(RunError, "data", "tar shards", requirement, f"{path} ({reason.rstrip('.')})", fix)
