"""What a set of tokens is of: the checkpoint by its content, the data by names, sizes and times of its files."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vqkernels.train.data.huggingface import HF_PREFIX
from vqkernels.train.data.shards import is_pattern, pattern_shards


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Args:
        path: of the file.

    Returns:
        64 hexadecimal digits.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def data_identity(data: str) -> str:
    """Return a text that changes when the images behind a `TrainConfig.data` do.

    Args:
        data: `photos`, a path, a pattern of shards, or `hf:` with a path or a name.

    Returns:
        The SHA-256 of names, sizes and times of change of all files; a set that lies elsewhere is known by its
        name alone.

    Raises:
        RunError: if a pattern names shards that are not there.
    """
    if data == "photos":
        found: list[object] = [data, _version("scikit-image")]
    elif is_pattern(data):
        found = [_identity(shard) for shard in pattern_shards(data)]
    elif (place := _place(data)) is None:
        found = [data]
    else:
        root, split = place
        paths = [root] if root.is_file() else (path for path in root.rglob("*") if path.is_file())
        found = [data.startswith(HF_PREFIX), split, *map(_identity, sorted(paths))]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def key_of(checkpoint_digest: str, identity: str, crop: int, stride: int) -> str:
    """Return the name of a set of tokens.

    Args:
        checkpoint_digest: SHA-256 of the checkpoint.
        identity: of the data, what `data_identity` returned.
        crop: side of a crop, in pixels.
        stride: between crops, 0 for one crop of each picture.

    Returns:
        32 hexadecimal digits.
    """
    text = json.dumps([checkpoint_digest, identity, crop, stride])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _place(data: str) -> tuple[Path, str] | None:
    """The file or folder behind the words and the split after it, None where there is none on this disk."""
    path = data.removeprefix(HF_PREFIX)
    shorter, _, split = path.rpartition(":")
    places = ((Path(text).expanduser(), rest) for text, rest in ((path, ""), (shorter, split)) if text)
    return next(((place, rest) for place, rest in places if place.exists()), None)


def _identity(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
