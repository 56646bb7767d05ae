"""The log of a run: sums over a window of steps, and one JSON object per line on the disk."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import torch
from torch import Tensor

from vqkernels.checks import refuse
from vqkernels.nn.metrics import code_counts, perplexity, usage
from vqkernels.train.checkpoints.files import refuse_folder, replace_file, write_all
from vqkernels.train.config import RunError

# keeps the PSNR of a perfect reconstruction a number that JSON has
TINY = 1e-30

Line = dict[str, float | int | str | None]


class Window:
    """Sums since the last line of the log, kept on the device so that a step waits for nothing."""

    def __init__(self, num_indices: int, device: torch.device) -> None:
        """Start empty.

        Args:
            num_indices: values a training index can take.
            device: of the sums.
        """
        self._num_indices = num_indices
        self._device = device
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        self._counts = torch.zeros(self._num_indices, dtype=torch.int64, device=self._device)
        self._extras: dict[str, Tensor] = {}
        self._unchecked: list[Tensor] = []

    def add(
        self, loss: Tensor, mse: Tensor, indices: Tensor, extras: Mapping[str, Tensor] | None = None
    ) -> None:
        """Count one step.

        Args:
            loss: 0-d, what was minimised.
            mse: 0-d mean squared error of images in [-1, 1].
            indices: (..., Q) int64, negative where nothing was quantized; Q = 1 in training.
            extras: further 0-d tensors by name, whose means over the steps that have them are logged.
        """
        for name, value in (extras or {}).items():
            pair = torch.stack((value.detach().double(), value.new_ones((), dtype=torch.float64)))
            self._extras[name] = self._extras.get(name, 0) + pair
        self._sums += torch.stack((loss.detach(), mse.detach(), torch.ones_like(mse))).double()
        self._counts += code_counts(indices, self._num_indices)
        self._unchecked.append(loss.detach())

    def first_bad(self, reduce: Callable[[Tensor], Tensor]) -> int | None:
        """Find the first loss that is not finite among the steps since the last call; waits for the device.

        Args:
            reduce: returns the sum of a tensor over processes, as a copy.

        Returns:
            How many steps ago it was, 1 for the last step; None when all are finite.
        """
        if not self._unchecked:
            return None
        finite = reduce(torch.stack(self._unchecked)).isfinite().tolist()
        self._unchecked = []
        return len(finite) - finite.index(False) if False in finite else None

    def line(self, reduce: Callable[[Tensor], Tensor]) -> Line:
        """Return the means of the window over all processes; waits for the device.

        Args:
            reduce: returns the sum of a tensor over processes, as a copy.
        """
        loss, mse, steps = reduce(self._sums).tolist()
        counts = reduce(self._counts)
        quantized = bool(counts.sum() > 0)
        extras = {name: reduce(pair).tolist() for name, pair in sorted(self._extras.items())}
        return {
            "loss": loss / steps,
            "psnr": 10 * math.log10(4 * steps / max(mse, TINY)),
            "perplexity": float(perplexity(counts)) if quantized else None,
            "usage": float(usage(counts)) if quantized else None,
            # JSON has no other numbers
            **{
                name: total / count if math.isfinite(total) and count else None
                for name, (total, count) in extras.items()
            },
        }

    def state(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the sums over all processes, for a checkpoint; waits for the device.

        Args:
            reduce: returns the sum of a tensor over processes, as a copy.
        """
        extras = {f"extras.{name}": reduce(pair).cpu() for name, pair in sorted(self._extras.items())}
        return {"sums": reduce(self._sums).cpu(), "counts": reduce(self._counts).cpu(), **extras}

    def restore(self, state: Mapping[str, Tensor], *, main: bool = True) -> None:
        """Go on from what `state` returned.

        Args:
            state: of a window of the same run.
            main: whether the sums, which are of all processes, count here; elsewhere they start at zero.
        """
        own = {name: value.to(self._device) * int(main) for name, value in state.items()}
        self._sums, self._counts = own.pop("sums"), own.pop("counts")
        # by the same names everywhere, since all processes add them up in the same order
        self._extras = {name.removeprefix("extras."): pair for name, pair in own.items()}


class MetricsLog:
    """Appends lines to metrics.jsonl; opened at a step, it first drops what a killed run wrote beyond it."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the log to go on from a step.

        Args:
            path: of the file.
            step: of the checkpoint the run starts from; 0 drops every line.
        """
        kept = [line for line in read_lines(path) if int(line["step"] or 0) <= step] if path.exists() else []
        replace_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._path = path
        try:
            # without a buffer of its own, which a full disk would leave for the closing to fail on
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            refuse_folder(path.parent, error)

    def write(self, line: Line) -> None:
        """Append one line.

        Args:
            line: a flat JSON object with a "step".

        Raises:
            RunError: if the disk is full; a line that is cut off is dropped when the log is opened again.
        """
        text = json.dumps(line, allow_nan=False) + "\n"
        try:
            write_all(self._descriptor, text.encode())
        except OSError as error:
            refuse_folder(self._path.parent, error)

    def sync(self) -> None:
        """Put every line on the disk, before a checkpoint that relies on them.

        Raises:
            RunError: if the disk is full.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            refuse_folder(self._path.parent, error)

    def __enter__(self) -> Self:
        """Return the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_lines(path: Path) -> list[Line]:
    """Read a log, up to a line that a killed run left unfinished.

    Args:
        path: of metrics.jsonl.

    Returns:
        One dict per line.

    Raises:
        RunError: if the file cannot be read, or is no such log.
    """
    lines: list[Line] = []
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        _refuse(path, str(error))
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if number < len(texts) - 1:
                _refuse(path, f"no JSON in line {number + 1}")
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            _refuse(path, f"no step in line {number + 1}")
        lines.append(line)
    return lines


def _refuse(path: Path, got: str) -> NoReturn:
    fix = "Move it away, or pass another --out"
    refuse(RunError, "train", "metrics.jsonl", "be the log of a run", f"{path} ({got})", fix)
