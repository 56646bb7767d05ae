"""Files that survive: replaced as a whole, on the disk before they have their name, and never half there."""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from vqkernels.checks import refuse
from vqkernels.train.config import RunError

LOCK = ".lock"
# what a system says when no byte more fits
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_all(descriptor: int, content: bytes | memoryview) -> None:
    """Write every byte to an open file.

    Args:
        descriptor: of the file.
        content: what to write.

    Raises:
        OSError: if the system takes no more.
    """
    rest = memoryview(content).cast("B")
    while rest:
        # a disk that is almost full takes a part without complaint and refuses the next call
        rest = rest[os.write(descriptor, rest) :]


def replace_file(
    path: Path, content: bytes | memoryview, argument: str = "out", *, op: str | None = None
) -> None:
    """Write a file under a temporary name, flush it to the disk, and give it its name in one step.

    At every moment the path holds the old file or the new one, whole, also after a power cut.

    Args:
        path: of the file.
        content: what it shall hold.
        argument, op: as `refuse_folder` takes them.

    Raises:
        RunError: if the folder cannot be written or the disk is full; the temporary file is gone then.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                write_all(descriptor, content)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        refuse_folder(path.parent, error, argument, op=op)


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files, those that are gone already included.

    Args:
        paths: of the files.

    Raises:
        RunError: if the folder cannot be written.
    """
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            refuse_folder(path.parent, error)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; they have buffers of their own.

    Args:
        folder: whose names changed.

    Raises:
        OSError: if the system cannot.
    """
    # windows opens no folder
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_folder(folder: Path, argument: str = "out", *, op: str | None = None) -> None:
    """Make a folder and try to write in it.

    Args:
        folder: to make, with its parents.
        argument, op: as `refuse_folder` takes them.

    Raises:
        RunError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        refuse_folder(folder, error, argument, op=op)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until this one ends, however it ends; the processes of one run count as one.

    A database keeps the lock, for its locks end with their process and are known on every system.

    Args:
        folder: of the run, that can be written.

    Raises:
        RunError: another run is at work there.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    lock = None
    try:
        try:
            lock = sqlite3.connect(folder / LOCK, timeout=0, isolation_level=None, check_same_thread=False)
            # nothing is ever written, so nothing has to be undone after a kill
            lock.execute("PRAGMA journal_mode = MEMORY")
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            # some network file systems know no locks, and have to do without
            if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
                got, fix = f"{folder}, where one is at work", "Wait for its end, or pass another --out"
                refuse(RunError, "train", "out", "be of one run at a time", got, fix)
        yield
    finally:
        if lock is not None:
            lock.close()


def refuse_folder(folder: Path, error: OSError, argument: str = "out", *, op: str | None = None) -> NoReturn:
    """Say in one sentence why nothing can be written, and whether that is for want of room.

    Args:
        folder: where it was tried.
        error: of the system.
        argument: what named the folder.
        op: who was asked; train for `out` and evaluate for all others when left out.

    Raises:
        RunError: always.
    """
    got = f"{folder} ({error.strerror or error})"
    resumes = op is None and argument == "out"
    # a function takes keywords, a command options
    another = f"{argument}=" if op == "profile" else f"--{argument}"
    op = op or ("train" if argument == "out" else "evaluate")
    if error.errno in _FULL:
        fix = f"Free some space, or pass another {another}"
        if resumes:
            fix = "Free some space and pass --resume; everything saved before is whole"
        refuse(RunError, op, argument, "lie on a disk with room", got, fix)
    requirement = (
        "be a folder that can be written" if argument == "out" else "lie in a folder that can be written"
    )
    refuse(RunError, op, argument, requirement, got, f"Pass another {another}")
