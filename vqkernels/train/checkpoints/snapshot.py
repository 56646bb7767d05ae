"""One checkpoint as one file, read without running anything in it."""

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vqkernels
from vqkernels.checks import refuse
from vqkernels.train.config import RunError, TrainConfig

FORMAT = "vqkernels checkpoint 2"
_OLDER = ("vqkernels checkpoint 1",)
_FIELDS = frozenset({"format", "version", "config", "step", "model", "learner", "window", "rng"})


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on as if it had never stopped.

    Attributes:
        config: of the run.
        step: optimizer steps done.
        model: state of the model, with the quantizer inside.
        learner: all else that learns, tensors and plain values at any depth: optimizers, the loss scaler of fp16,
            a discriminator, averages of weights.
        window: sums behind the next line of the log.
        rng: states of torch's generators by process: "cpu0", "cpu1", ..., and on GPUs "cuda0", "cuda1", ...
        version: of the package that wrote it.
    """

    config: TrainConfig
    step: int
    model: Mapping[str, Tensor]
    learner: Mapping[str, Any]
    window: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    version: str = vqkernels.__version__

    def to_bytes(self) -> memoryview:
        """Return the file that holds this checkpoint."""
        return to_bytes(
            {
                "format": FORMAT,
                "version": self.version,
                "config": self.config.to_json(),
                "step": self.step,
                "model": dict(self.model),
                "learner": dict(self.learner),
                "window": dict(self.window),
                "rng": dict(self.rng),
            }
        )

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


def to_bytes(content: Mapping[str, Any]) -> memoryview:
    """Return what `torch.save` would write.

    Args:
        content: tensors and plain values.
    """
    # in memory first: torch would word a full disk its own way
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getbuffer()


def read_snapshot(path: Path) -> Checkpoint:
    """Read a checkpoint; nothing in the file is executed.

    Args:
        path: of the file.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        RunError: if there is no such file, or it is truncated, damaged or no checkpoint of this version.
    """
    if not path.is_file():
        fix = "Pass a checkpoint, or the folder of a run"
        got = f"{path}, {'a folder' if path.is_dir() else 'where there is none'}"
        refuse(RunError, "checkpoint", "path", "name a file", got, fix)
    content = _read(path)
    told = content.get("format") if isinstance(content, dict) else type(content).__name__
    if isinstance(content, dict) and told in _OLDER:
        got = f"{told!r}, which holds less than a run needs, of vqkernels {content.get('version')} in {path}"
        fix = "Train again with another --out, or use the version that wrote it"
        refuse(RunError, "checkpoint", "file", f"be a {FORMAT!r}", got, fix)
    if not isinstance(content, dict) or told != FORMAT or set(content) != _FIELDS:
        fix = "Pass a checkpoint that this version of vqkernels wrote"
        refuse(RunError, "checkpoint", "file", f"be a {FORMAT!r}", f"{told!r} in {path}", fix)
    return Checkpoint(
        config=TrainConfig.from_json(content["config"]),
        step=content["step"],
        model=content["model"],
        learner=content["learner"],
        window=content["window"],
        rng=content["rng"],
        version=content["version"],
    )


def _read(path: Path) -> object:
    fix = "Pass another checkpoint, or start the run again"
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
