"""The checkpoints of one run: the newest few, listed with their checksums, whole at every moment."""

import hashlib
import json
from pathlib import Path
from typing import NoReturn

from vqkernels.checks import refuse
from vqkernels.train.checkpoints.files import open_folder, remove_files, replace_file
from vqkernels.train.checkpoints.manifest import Entry, file_of, files_in, read_manifest, write_manifest
from vqkernels.train.checkpoints.snapshot import Checkpoint, read_snapshot
from vqkernels.train.config import RunError

# beside TrainConfig.checkpoint_path, for folders of runs whose configuration is not known yet
FOLDER = "checkpoints"
# where versions before the store kept their one checkpoint
_LEGACY = "checkpoint.pt"
_CHUNK = 1 << 20


class CheckpointStore:
    """A folder of checkpoints and the list of them.

    A checkpoint is on the disk before the list names it, and the list is on the disk before an older checkpoint
    goes. So a kill leaves at most a whole file that the list does not name yet, which counts as the newest, files
    that it names no more, and temporary files; `settle` puts all of that in order.

    Args:
        folder: of the checkpoints; made by the first `settle` or `save`.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def entries(self) -> list[Entry]:
        """Return the list, oldest first.

        Raises:
            RunError: if it is damaged.
        """
        return read_manifest(self.folder)

    def latest(self) -> Path | None:
        """Return the newest checkpoint, unread, or None where there is none.

        Raises:
            RunError: if the list is damaged.
        """
        candidates = self._candidates()
        return candidates[max(candidates)] if candidates else None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Add a checkpoint and let the oldest go.

        Args:
            checkpoint: to keep.

        Returns:
            Its file.

        Raises:
            RunError: if the folder cannot be written or the disk is full; what was saved before is whole then.
        """
        open_folder(self.folder)
        path = self.folder / file_of(checkpoint.step)
        content = checkpoint.to_bytes()
        replace_file(path, content)
        config = json.loads(checkpoint.config.to_json())
        digest = hashlib.sha256(content).hexdigest()
        entry = Entry(path.name, checkpoint.step, content.nbytes, digest, config)
        others = [other for other in self.entries() if other.step != checkpoint.step]
        self._list(sorted([*others, entry], key=lambda one: one.step)[-self.keep :])
        return path

    def load(self, path: Path | None = None) -> Checkpoint:
        """Read a checkpoint after its size and checksum were compared with the list.

        Args:
            path: of a checkpoint, here or elsewhere; the newest one here when left out.

        Returns:
            The checkpoint, its tensors on the CPU.

        Raises:
            RunError: if there is none, or it is missing, truncated, altered or foreign; the message names the newest
                older one that is whole.
        """
        path = path or self.latest()
        if path is None:
            self._refuse_nothing()
        candidates = self._candidates()
        own = self.holds(path)
        step = next((step for step, other in candidates.items() if own and other.name == path.name), None)
        if step is None:
            return read_snapshot(path)
        listed = {entry.step: entry for entry in self.entries()}
        fault = self._fault(path, listed.get(step))
        if fault is not None:
            older = sorted((other for other in candidates if other < step), reverse=True)
            good = next((n for n in older if self._fault(candidates[n], listed.get(n)) is None), None)
            fix = "Pass another --out to start afresh; no older one is whole"
            if good is not None:
                fix = f"Pass --resume-from {candidates[good]} to go on from the last whole one"
            refuse(RunError, "checkpoint", "file", "be as it was written", f"{path} ({fault})", fix)
        return read_snapshot(path)

    def holds(self, path: Path) -> bool:
        """Whether a checkpoint lies in this folder.

        Args:
            path: of the file.
        """
        return path.parent.resolve() == self.folder.resolve()

    def settle(self, checkpoint: Checkpoint | None, *, foreign: bool = False) -> None:
        """Put the folder in order before a run goes on: by one process, after all have read what they need.

        Args:
            checkpoint: the one the run goes on from, which becomes the newest here, also when it comes from elsewhere;
                None for a fresh run, which needs a folder without checkpoints.
            foreign: whether it comes from elsewhere, and so replaces one of its step here.

        Raises:
            RunError: if the folder cannot be written, or the disk is full.
        """
        open_folder(self.folder)
        remove_files(self.folder.glob(".*.part"))
        if checkpoint is None:
            return
        listed = {entry.step: entry for entry in self.entries()}
        kept: list[Entry] = []
        for step, path in files_in(self.folder).items():
            entry = listed.get(step)
            # a file without its line in the list was written just before a kill, or the list is lost
            same = step == checkpoint.step and not foreign
            wanted = same or (step < checkpoint.step and entry is None)
            if wanted and self._fault(path, entry) is not None:
                continue
            if step < checkpoint.step or same:
                kept.append(entry or _entry_of(path))
        self._list(kept[-self.keep :])
        if foreign or not kept or kept[-1].step != checkpoint.step:
            self.save(checkpoint)

    def clear(self) -> None:
        """Forget every checkpoint, those of older versions included.

        Raises:
            RunError: if the folder cannot be written.
        """
        remove_files([self.folder.parent / _LEGACY])
        if self.folder.is_dir():
            # files go first: a list without files says what is missing, files without a list count
            remove_files(files_in(self.folder).values())
            write_manifest(self.folder, [])

    def _list(self, entries: list[Entry]) -> None:
        write_manifest(self.folder, entries)
        names = {entry.file for entry in entries}
        remove_files(path for path in files_in(self.folder).values() if path.name not in names)

    def _candidates(self) -> dict[int, Path]:
        listed = {entry.step: self.folder / entry.file for entry in self.entries()}
        last = max(listed, default=-1)
        # older ones that the list does not name have had their time
        return {step: path for step, path in files_in(self.folder).items() if step > last} | listed

    def _fault(self, path: Path, entry: Entry | None) -> str | None:
        """Why a file here is not the checkpoint it should be, None for one that is."""
        if not path.is_file():
            return "missing"
        if entry is None:
            try:
                step = read_snapshot(path).step
            except RunError as error:
                return f"not in the manifest; {str(error).rpartition('. ')[0]}"
            return None if path.name == file_of(step) else f"not in the manifest, and of step {step}"
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{size} bytes where the manifest says {entry.bytes}: truncated or replaced"
        if _sha256(path) != entry.sha256:
            return "another SHA-256 than the manifest says: altered or of another run"
        return None

    def refuse_older(self) -> None:
        """Refuse the folder of a run that an older version has left.

        Raises:
            RunError: if there is one.
        """
        older = self.folder.parent / _LEGACY
        if older.is_file():
            read_snapshot(older)

    def _refuse_nothing(self) -> NoReturn:
        self.refuse_older()
        fix = "Pass a checkpoint, or the folder of a run that has saved one"
        refuse(RunError, "checkpoint", "path", "hold a checkpoint", f"none in {self.folder}", fix)


def store_of(out: Path, keep: int = 2) -> CheckpointStore:
    """Return the store of a run.

    Args:
        out: folder of the run.
        keep: how many of the newest checkpoints stay.
    """
    return CheckpointStore(out / FOLDER, keep)


def _entry_of(path: Path) -> Entry:
    found = read_snapshot(path)
    config = json.loads(found.config.to_json())
    return Entry(path.name, found.step, path.stat().st_size, _sha256(path), config)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
