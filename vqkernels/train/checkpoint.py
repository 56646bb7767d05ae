"""Checkpoints: one file, replaced as a whole, read without running anything in it."""

import io
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

import vqkernels
from vqkernels.checks import refuse
from vqkernels.train.config import RunError, TrainConfig

FORMAT = "vqkernels checkpoint 1"
_FIELDS = frozenset({"format", "version", "config", "step", "model", "optimizer", "scaler", "window", "rng"})


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        config: of the run.
        step: optimizer steps done.
        model: state of the model, with the quantizer inside.
        optimizer: state of the optimizer.
        scaler: state of the loss scaler of fp16, empty without one.
        window: sums behind the next line of the log.
        rng: state of torch's generators, "cpu" and one per CUDA device "cuda0", "cuda1", ...
        version: of the package that wrote it.
    """

    config: TrainConfig
    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    scaler: Mapping[str, Any]
    window: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    version: str = vqkernels.__version__

    def save(self, path: Path) -> None:
        """Write the checkpoint so that at every moment the path holds the old file or the new one, whole.

        Args:
            path: of the file.

        Raises:
            RunError: if the folder cannot be written.
        """
        content = {
            "format": FORMAT,
            "version": self.version,
            "config": self.config.to_json(),
            "step": self.step,
            "model": dict(self.model),
            "optimizer": dict(self.optimizer),
            "scaler": dict(self.scaler),
            "window": dict(self.window),
            "rng": dict(self.rng),
        }
        # in memory first: torch would word a full disk its own way
        buffer = io.BytesIO()
        torch.save(content, buffer)
        replace_file(path, buffer.getbuffer())

    def require(self, config: TrainConfig, path: Path) -> None:
        """Refuse to continue a run of another configuration.

        Args:
            config: the configuration asked for.
            path: of this checkpoint, for the message.

        Raises:
            RunError: if a field outside `FREE_FIELDS` differs; the message names them all.
        """
        differences = self.config.differences(config)
        if differences:
            got = f"(checkpoint, asked for) {', '.join(differences)} in {path}"
            fix = "Pass the checkpoint's values, or another --out to start afresh"
            refuse(RunError, "resume", "checkpoint", "be of the same configuration", got, fix)

    def restore_model(self, model: nn.Module, path: Path) -> None:
        """Put the saved weights into a model built from `config`.

        Args:
            model: to fill.
            path: of this checkpoint, for the message.

        Raises:
            RunError: if the names or shapes differ.
        """
        try:
            model.load_state_dict(dict(self.model))
        except RuntimeError as error:
            got = f"other names or shapes in {path} ({str(error).splitlines()[-1].strip()})"
            fix = f"Use vqkernels {self.version}, which wrote it"
            refuse(RunError, "checkpoint", "model", "fit its own configuration", got, fix)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: of the file.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        RunError: if there is no such file, or it is truncated, damaged or no checkpoint of this package.
    """
    if not path.is_file():
        fix = "Pass the checkpoint.pt of a run"
        got = f"{path}, {'a folder' if path.is_dir() else 'where there is none'}"
        refuse(RunError, "checkpoint", "path", "name a file", got, fix)
    content = _read(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or set(content) != _FIELDS:
        told = content.get("format") if isinstance(content, dict) else type(content).__name__
        fix = "Pass a checkpoint.pt that this version of vqkernels wrote"
        refuse(RunError, "checkpoint", "file", f"be a {FORMAT!r}", f"{told!r} in {path}", fix)
    return Checkpoint(
        config=TrainConfig.from_json(content["config"]),
        step=content["step"],
        model=content["model"],
        optimizer=content["optimizer"],
        scaler=content["scaler"],
        window=content["window"],
        rng=content["rng"],
        version=content["version"],
    )


def _read(path: Path) -> object:
    fix = "Start the run again, or pass another checkpoint"
    with path.open("rb") as stream:
        beginning = stream.read(4)
    if beginning != b"PK\x03\x04":
        got = "an empty file" if not beginning else "another kind of file"
        refuse(RunError, "checkpoint", "file", "be a checkpoint of this package", f"{got} at {path}", fix)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        refuse(RunError, "checkpoint", "file", "be whole", f"a truncated file at {path} ({error})", fix)
    if damaged is not None:
        refuse(RunError, "checkpoint", "file", "be whole", f"a wrong checksum of {damaged} in {path}", fix)
    try:
        with warnings.catch_warnings():
            # of other kinds of archives, which are refused right below
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError):
        # torch's own words would advise to load it unsafely
        got = f"{path}, which names other objects or is damaged"
        refuse(RunError, "checkpoint", "file", "hold tensors and plain values only", got, fix)


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write a file under a temporary name, flush it to the disk, and give it its name in one step.

    Args:
        path: of the file.
        content: what it shall hold.

    Raises:
        RunError: if the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            # the new name is a change of the folder, which has buffers of its own
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _refuse_folder(path.parent, error)


def open_folder(folder: Path, argument: str = "out") -> None:
    """Make the folder of a run and try to write in it.

    Args:
        folder: to make, with its parents.
        argument: what named it, for the message.

    Raises:
        RunError: if it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _refuse_folder(folder, error, argument)


def _refuse_folder(folder: Path, error: OSError, argument: str = "out") -> NoReturn:
    got = f"{folder} ({error.strerror or error})"
    requirement = (
        "be a folder that can be written" if argument == "out" else "lie in a folder that can be written"
    )
    op = "train" if argument == "out" else "evaluate"
    refuse(RunError, op, argument, requirement, got, f"Pass another --{argument}")
