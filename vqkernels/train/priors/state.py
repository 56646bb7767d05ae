"""What a run of a prior keeps between calls: its checkpoint and the states of its random numbers."""

import io
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import vqkernels
from vqkernels.checks import refuse
from vqkernels.train.checkpoints.files import refuse_folder, replace_file
from vqkernels.train.config import RunError

FORMAT = "vqkernels prior 1"
_FIELDS = frozenset(
    {"format", "version", "config", "step", "tokens", "checkpoint_digest", "grid", "num_codes"}
    | {"num_classes", "model", "optimizer", "scaler", "sums", "rng"}
)


def save_state(path: Path, content: Mapping[str, Any]) -> None:
    """Write a checkpoint so that at every moment the path holds the old file or the new one, whole.

    The old one stays beside it as `previous_of` names it, for a disk may damage the new one later.

    Args:
        path: of the file.
        content: tensors and plain values by name.

    Raises:
        RunError: if the folder cannot be written.
    """
    # in memory first: torch would word a full disk its own way
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": vqkernels.__version__, **content}, buffer)
    content_bytes = buffer.getbuffer()
    try:
        if path.is_file():
            _give_second_name(path, previous_of(path))
    except OSError as error:
        refuse_folder(path.parent, error)
    replace_file(path, content_bytes)


def previous_of(path: Path) -> Path:
    """Return where the checkpoint before the last one is kept.

    Args:
        path: of the last one, such as prior.pt.
    """
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: of the file.

    Returns:
        What `save_state` was given, tensors on the CPU.

    Raises:
        RunError: if there is no such file, or it is damaged or no checkpoint of a prior; the message names the
            previous one where that is whole.
    """
    try:
        return _load(path)
    except RunError as error:
        previous = previous_of(path)
        if not previous.is_file():
            raise
        try:
            step = _load(previous)["step"]
        except RunError:
            raise error from None
        reason, _, _ = str(error).rpartition(". ")
        raise RunError(f"{reason}. Rename {previous} to {path.name} to go on from step {step}.") from error


def _give_second_name(path: Path, other: Path) -> None:
    temporary = other.with_name(f".{other.name}.part")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(path)
    # of file systems without such names
    except OSError:
        shutil.copyfile(path, temporary)
    temporary.replace(other)


def _load(path: Path) -> dict[str, Any]:
    fix = "Pass the prior.pt of a run of `prior`"
    if not path.is_file():
        got = f"{path}, {'a folder' if path.is_dir() else 'where there is none'}"
        refuse(RunError, "prior", "path", "name a file", got, fix)
    try:
        # torch does not look at the checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        got = f"{path}, which is truncated, damaged or something else ({type(error).__name__})"
        refuse(RunError, "prior", "file", "be a whole checkpoint of a prior", got, fix)
    if damaged:
        got = f"a wrong checksum of {damaged} in {path}"
        refuse(RunError, "prior", "file", "be a whole checkpoint of a prior", got, fix)
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != _FIELDS:
        told = content.get("format") if isinstance(content, dict) else type(content).__name__
        refuse(RunError, "prior", "file", f"be a {FORMAT!r}", f"{told!r} in {path}", fix)
    return content


def fill(model: nn.Module, saved: Mapping[str, Any], path: Path) -> None:
    """Put the saved weights into a model.

    Args:
        model: to fill.
        saved: what `load_state` returned.
        path: of the file, for the message.

    Raises:
        RunError: if the names or shapes differ.
    """
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        got = f"other names or shapes in {path} ({str(error).splitlines()[-1].strip()})"
        fix = f"Use vqkernels {saved['version']} and the transformers package of its time"
        refuse(RunError, "prior", "model", "fit its own configuration", got, fix)


def seed_of(*words: int) -> int:
    """Return a seed for torch that is a function of some integers.

    Args:
        words: not negative.
    """
    # torch's cpu generator takes 64 bits, of which the sign is one
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's generators.

    Args:
        device: of the run.
    """
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state |= {f"cuda{number}": one for number, one in enumerate(torch.cuda.get_rng_state_all())}
    return state


def restore_rng(state: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Put torch's generators into a state.

    Args:
        state: what `rng_state` returned.
        device: of the run.
    """
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        for number in range(torch.cuda.device_count()):
            if f"cuda{number}" in state:
                torch.cuda.set_rng_state(state[f"cuda{number}"], number)
