"""What a set of tokens is of: the checkpoint by its content, the data by names, sizes and times of its files."""

import hashlib
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


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
    """
    root = _root(data)
    found: list[object] = [data if root is None else str(root.resolve()), data.partition("{")[2]]
    if data == "photos":
        found.append(_version("scikit-image"))
    elif root is not None:
        paths = [root] if root.is_file() else (path for path in root.rglob("*") if path.is_file())
        for path in sorted(paths):
            status = path.stat()
            found.append((str(path.relative_to(root.parent)), status.st_size, status.st_mtime_ns))
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


def _root(data: str) -> Path | None:
    """The file or folder behind the words, None where there is none on this disk."""
    if data == "photos":
        return None
    path = data.removeprefix("hf:")
    for text in (path, path.rpartition(":")[0]):
        if text and Path(text).exists():
            return Path(text)
    folder = Path(path.partition("{")[0]).parent
    return folder if "{" in path and folder.exists() else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
