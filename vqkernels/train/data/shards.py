"""Tar shards as webdataset writes them, indexed so that any sample is read without those before it."""

import glob
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vqkernels.checks import refuse
from vqkernels.train.config import RunError
from vqkernels.train.data.pictures import LazyPictures, Parts, Picture, hold_out, number_labels
from vqkernels.train.data.shard_index import ShardIndex, import_webdataset, index_shard

WILDCARDS = "{*?["
INDEX_THREADS = 8


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
    for each in import_webdataset().shardlists.expand_urls(pattern):
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
    import_webdataset()
    stats = [path.stat() for path in shards]
    with ThreadPoolExecutor(INDEX_THREADS) as pool:
        indices = list(
            pool.map(index_shard, shards, (s.st_size for s in stats), (s.st_mtime_ns for s in stats))
        )
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


@dataclass(frozen=True)
class _Samples:
    """The samples of all shards, numbered in their order."""

    shards: Sequence[Path]
    indices: Sequence[ShardIndex]
    ends: NDArray[np.int64]
    labels: NDArray[np.int64] | None = None

    @cached_property
    def names(self) -> list[str]:
        """Of the shards: without their folders, unless two are called alike."""
        short = [path.name for path in self.shards]
        return short if len(set(short)) == len(short) else list(map(str, self.shards))

    def picture(self, number: int) -> Picture:
        shard = int(np.searchsorted(self.ends, number, side="right"))
        index = self.indices[shard]
        row = number - int(self.ends[shard]) + len(index.names)
        offset, size, height, width = (int(value) for value in index.places[row])
        return Picture(
            f"{self.names[shard]}/{index.names[row].decode()}",
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
