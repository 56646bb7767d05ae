"""A file that one process at a time holds, whatever becomes of the process."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

# between two attempts where the system cannot wait by itself, in seconds
PAUSE = 0.2


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process holds a file, and hold it; its end lets go of it too.

    Args:
        path: of the file, made where there is none.

    Yields:
        Nothing.
    """
    with path.open("w") as stream:
        _wait(stream)
        yield


if sys.platform == "win32":
    import msvcrt

    def _wait(stream: IO[str]) -> None:
        while True:
            try:
                msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
                return
            except OSError:
                time.sleep(PAUSE)

else:
    import fcntl

    def _wait(stream: IO[str]) -> None:
        fcntl.flock(stream, fcntl.LOCK_EX)
