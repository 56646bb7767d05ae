"""The index of one tar shard: where its samples are, how large their images, and which labels they carry."""

import hashlib
import json
import os
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from vqkernels.checks import refuse
from vqkernels.train.config import RunError
from vqkernels.train.data.pictures import endings, measure

# webdataset's rule for members that are no samples
META = re.compile(r"__[^/]*__($|/)")

# the index of a shard of this many bytes or more is kept on disk: to walk through it takes a while
STORE_BYTES = 1 << 24
STORE_VERSION = 1


class ShardIndex(NamedTuple):
    """The samples of one shard.

    Attributes:
        names: (n,) UTF-8 names of the image members.
        places: (n, 4) of each image: first byte in the shard, bytes, height and width in pixels.
        labels: n labels, None where a sample has none.
    """

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


# runs that open the same data again, as a comparison does, find the shards indexed
@cache
def index_shard(path: Path, size: int, modified: int) -> ShardIndex:
    """Return the index of a shard: from memory, from the user's cache folder, or by going through the shard.

    Large shards leave their index in `$XDG_CACHE_HOME/vqkernels/shards` (by default below `~/.cache`).

    Args:
        path: of an uncompressed tar file.
        size: of the file in bytes; with `modified` it tells a shard that was replaced.
        modified: time of its last change, in ns.

    Raises:
        RunError: if the shard is damaged, or a sample has no picture or two.
    """
    store = _store(path, size, modified) if size >= STORE_BYTES else None
    found = _load(store) if store is not None and store.is_file() else None
    if found is None:
        found = _read(path)
        if store is not None:
            _save(store, found)
    return found


def _store(path: Path, size: int, modified: int) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = repr((STORE_VERSION, str(path.resolve()), size, modified, sorted(endings())))
    return root / "vqkernels" / "shards" / f"{hashlib.sha256(key.encode()).hexdigest()}.npz"


def _load(store: Path) -> ShardIndex | None:
    try:
        with store.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            names, places, labels = (
                content["names"],
                content["places"],
                json.loads(content["labels"].tobytes()),
            )
    # a damaged index is made anew from the shard
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return ShardIndex(names, places, labels)


def _save(store: Path, index: ShardIndex) -> None:
    labels = np.frombuffer(json.dumps(index.labels).encode(), dtype=np.uint8)
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        # processes that index the same shard at the same time replace each other's whole files
        with tempfile.NamedTemporaryFile(dir=store.parent, suffix=".part", delete=False) as stream:
            np.savez(stream, names=index.names, places=index.places, labels=labels)
        os.replace(stream.name, store)
    # without a place to keep it the next run goes through the shard again
    except OSError:
        return


def import_webdataset() -> ModuleType:
    """Return the webdataset package.

    Raises:
        RunError: if it is missing.
    """
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ModuleNotFoundError:
        fix = 'Install it with pip install webdataset, or pip install "vqkernels[train]"'
        refuse(RunError, "data", "tar shards", "be read by the webdataset package", "no such package", fix)
    return webdataset


def _read(path: Path) -> ShardIndex:
    images = {ending[1:] for ending in endings()}
    names: list[bytes] = []
    places: list[tuple[int, int, int, int]] = []
    labels: list[int | str | None] = []
    try:
        for sample in import_webdataset().tariterators.group_by_keys(_members(path, images)):
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
    return ShardIndex(np.array(names), np.array(places, dtype=np.int64), labels)


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


def _refuse_shard(path: Path, reason: str) -> NoReturn:
    requirement, fix = "be whole, uncompressed tar files", "Write or download the shard again"
    refuse(RunError, "data", "tar shards", requirement, f"{path} ({reason.rstrip('.')})", fix)
