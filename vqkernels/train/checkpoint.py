"""Checkpoints: what they hold, where they are kept, and how any of them is read."""

from pathlib import Path

from vqkernels.train.snapshot import FORMAT, Checkpoint, read_snapshot
from vqkernels.train.store import CheckpointStore, store_of

__all__ = ["FORMAT", "Checkpoint", "CheckpointStore", "load_checkpoint", "store_of"]


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: of a file anywhere, or of the folder of a run or of checkpoints, which gives its newest.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        RunError: if there is none, or it is truncated, altered or no checkpoint of this version.
    """
    if not path.is_dir():
        return read_snapshot(path)
    inner = store_of(path)
    return (inner if inner.folder.is_dir() else CheckpointStore(path)).load()
