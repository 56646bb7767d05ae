"""The list of a run's checkpoints, with sizes and checksums."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import vqkernels
from vqkernels.checks import refuse
from vqkernels.train.checkpoints.files import replace_file
from vqkernels.train.config import RunError

NAME = "manifest.json"
FORMAT = "vqkernels manifest 1"
_FILE = re.compile(r"step-(\d{8,})\.pt")


@dataclass(frozen=True)
class Entry:
    """One checkpoint in the list.

    Attributes:
        file: name in the folder of checkpoints.
        step: optimizer steps done.
        bytes: size of the file.
        sha256: of its content, in hexadecimal.
        config: of the run, as plain values.
    """

    file: str
    step: int
    bytes: int
    sha256: str
    config: Mapping[str, Any]


def file_of(step: int) -> str:
    """Return the name of the checkpoint of a step; names sort as steps do.

    Args:
        step: optimizer steps done.
    """
    return f"step-{step:08d}.pt"


def files_in(folder: Path) -> dict[int, Path]:
    """Find checkpoints by their names, listed or not.

    Args:
        folder: of checkpoints.

    Returns:
        Paths by step, in the order of steps.
    """
    matches = ((_FILE.fullmatch(path.name), path) for path in folder.glob("step-*.pt"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def read_manifest(folder: Path) -> list[Entry]:
    """Read the list.

    Args:
        folder: of checkpoints.

    Returns:
        The entries, oldest first; none where there is no list.

    Raises:
        RunError: if the list is damaged or of another version.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        _refuse(path, str(error))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        _refuse(path, repr(content.get("format") if isinstance(content, dict) else type(content).__name__))
    try:
        entries = [Entry(**entry) for entry in content["checkpoints"]]
    except (KeyError, TypeError) as error:
        _refuse(path, str(error))
    for entry in entries:
        # a name must not lead out of the folder
        if not isinstance(entry.step, int) or entry.file != file_of(entry.step):
            _refuse(path, f"{entry.file!r} as step {entry.step!r}")
    return sorted(entries, key=lambda entry: entry.step)


def write_manifest(folder: Path, entries: Sequence[Entry]) -> None:
    """Replace the list.

    Args:
        folder: of checkpoints.
        entries: oldest first.

    Raises:
        RunError: if the folder cannot be written or the disk is full; the old list is whole then.
    """
    content = {
        "format": FORMAT,
        "version": vqkernels.__version__,
        "checkpoints": [dataclasses.asdict(entry) for entry in entries],
    }
    replace_file(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())


def _refuse(path: Path, got: str) -> NoReturn:
    fix = "Remove it: the checkpoints beside it carry checksums of their own"
    refuse(RunError, "checkpoint", NAME, f"be a {FORMAT!r}", f"{path} ({got.rstrip('.')})", fix)
