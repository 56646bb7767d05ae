"""Checkpoints: what they hold, where they are kept, and how any of them is read."""

from pathlib import Path

from vqkernels.train.checkpoints.snapshot import FORMAT, Checkpoint, read_snapshot
from vqkernels.train.checkpoints.store import CheckpointStore, store_of

__all__ = ["FORMAT", "Checkpoint", "CheckpointStore", "find_checkpoint", "load_checkpoint", "store_of"]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: of a file anywhere, or of the folder of a run or of checkpoints, which gives its newest.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        RunError: if there is none, or it is truncated, altered or no checkpoint of this version.
    """
    return read_snapshot(path) if not path.is_dir() else _store_in(path).load()


def find_checkpoint(path: Path) -> Path:
    """Return the file that a path stands for.

    Args:
        path: of a file, or of the folder of a run or of checkpoints, which stands for its newest.

    Returns:
        The file; the path itself where there is none.
    """
    return (_store_in(path).latest() or path) if path.is_dir() else path


def _store_in(folder: Path) -> CheckpointStore:
    inner = store_of(folder)
    return inner if inner.folder.is_dir() else CheckpointStore(folder)
