"""Methods x codebook sizes x seeds on the same data and steps: cells in processes of their own, each trained once."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vqkernels.checks import refuse
from vqkernels.train.checkpoints.files import open_folder, replace_file
from vqkernels.train.comparison.cell import CONFIG, ERRORS, STOPPED, Result, read_result
from vqkernels.train.comparison.contenders import ABLATIONS, Ablation, Variant, contender, with_settings
from vqkernels.train.config import FREE_FIELDS, RunError, TrainConfig
from vqkernels.train.priors.token_key import data_identity
from vqkernels.train.signals import StopSignals

# between two looks at the processes, in seconds
PAUSE = 0.2
# how long a process may take from a signal to its checkpoint, in seconds
PATIENCE = 60.0

WHOLE = Variant("", {})


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        method: name of the contender.
        label: of the contender, in figures and tables.
        variant: point of the ablation, `WHOLE` without one.
        settings: what this contender changes, in words.
        config: of the run.
    """

    method: str
    label: str
    variant: Variant
    settings: str
    config: TrainConfig

    @property
    def folder(self) -> Path:
        """Where the run and its result lie."""
        return Path(self.config.out)


@dataclass(frozen=True)
class Grid:
    """What a comparison trains.

    Attributes:
        methods: names that `contender` knows.
        num_codes: codebook sizes K.
        seeds: of weights, crops and noise.
        base: settings that all runs share.
        ablation: a name in `ABLATIONS`, None to compare the methods as they are.
    """

    methods: Sequence[str]
    num_codes: Sequence[int]
    seeds: Sequence[int]
    base: TrainConfig
    ablation: str | None = None

    def __post_init__(self) -> None:
        """Refuse an empty or repeated axis, and an unknown ablation.

        Raises:
            RunError: naming the axis.
        """
        for name in ("methods", "num_codes", "seeds"):
            values = list(getattr(self, name))
            if not values or len(set(values)) != len(values):
                got = "none" if not values else ", ".join(map(str, values))
                requirement = "be one or more, each once"
                refuse(RunError, "compare", name, requirement, got, "Pass a list such as a,b")
        if self.ablation is not None and self.ablation not in ABLATIONS:
            fix = "Pass one of " + ", ".join(ABLATIONS)
            refuse(RunError, "compare", "ablate", "be a known ablation", repr(self.ablation), fix)

    @property
    def variants(self) -> Sequence[Variant]:
        """The points of the ablation, or the one there is without it."""
        return (WHOLE,) if self.ablation is None else self.sweep.variants

    @property
    def sweep(self) -> Ablation:
        """The ablation of this grid."""
        return ABLATIONS[self.ablation or ""]

    def cells(self, out: Path) -> list[Cell]:
        """List the runs: all methods with the first seed, then with the next.

        Args:
            out: folder of the comparison.

        Returns:
            The cells, each with a folder of its own that the settings and the pictures alone determine.

        Raises:
            RunError: a method is unknown, or its settings do not fit together.
        """
        found: list[Cell] = []
        # photos come with a package; other pictures may be changed between two calls
        data = None if self.base.data == "photos" else data_identity(self.base.data)
        for seed in self.seeds:
            for num_codes in self.num_codes:
                for variant in self.variants:
                    base = replace(self.base, seed=seed)
                    found += [_cell(out, base, name, variant, num_codes, data) for name in self.methods]
        return found


@dataclass(frozen=True)
class CellState:
    """How far a cell has come.

    Attributes:
        cell: which one.
        result: what it found, None as long as it has not finished.
        error: why it failed, None where it did not.
        cached: whether an earlier comparison had finished it.
    """

    cell: Cell
    result: Result | None = None
    error: str | None = None
    cached: bool = False


@dataclass(frozen=True)
class Outcome:
    """Where a call of `run_cells` ended.

    Attributes:
        states: of all cells, in their order.
        signal: name of the signal that stopped it, None when all cells were tried.
    """

    states: Sequence[CellState]
    signal: str | None


def run_cells(
    cells: Sequence[Cell],
    *,
    workers: int | None = None,
    on_change: Callable[[Sequence[CellState], CellState | None], None] | None = None,
) -> Outcome:
    """Train the cells that have no result yet, some at a time, and go on with those that were interrupted.

    A cell that fails is kept as such and tried again by the next call; the others go on. SIGINT and SIGTERM pass on to
    the running cells, which save a checkpoint.

    Args:
        cells: from `Grid.cells`.
        workers: cells at a time; the number of cores when omitted, 1 with a GPU. Each has its share of the cores as
            threads.
        on_change: called with all states and the one that changed, once at the beginning with None.

    Returns:
        The states and the signal.

    Raises:
        RunError: a folder cannot be written, or `workers` is below 1.
    """
    cores = _cores()
    if workers is None:
        # cells on one GPU would share its memory
        workers = 1 if torch.cuda.is_available() else cores
    if workers < 1:
        refuse(RunError, "compare", "workers", "be at least 1", workers, "Pass 1 or more")
    states = {
        cell.folder: CellState(cell, read_result(cell.folder, cell.config), cached=True) for cell in cells
    }
    waiting = [state.cell for state in states.values() if state.result is None]
    running: dict[Path, subprocess.Popen[bytes]] = {}

    def tell(changed: CellState | None) -> None:
        if on_change is not None:
            on_change(list(states.values()), changed)

    with StopSignals() as stop:
        tell(None)
        try:
            while (waiting or running) and stop.name is None:
                while waiting and len(running) < workers:
                    cell = waiting.pop(0)
                    running[cell.folder] = _start(cell, threads=max(1, cores // workers))
                for folder, process in list(running.items()):
                    if process.poll() is not None:
                        del running[folder]
                        states[folder] = _ended(states[folder].cell, process)
                        tell(states[folder])
                time.sleep(PAUSE)
        finally:
            _stop(running.values())
        return Outcome(list(states.values()), stop.name)


def _cell(
    out: Path, base: TrainConfig, name: str, variant: Variant, num_codes: int, data: str | None
) -> Cell:
    who = contender(name)
    overrides = {**who.overrides, **variant.overrides}
    config = with_settings(base, {**overrides, "num_codes": num_codes})
    values = {k: v for k, v in json.loads(config.to_json()).items() if k not in FREE_FIELDS}
    if data is not None:
        values["data"] = data
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    folder = f"{name.replace(':', '-')}-k{num_codes}-seed{config.seed}-{digest}"
    words = [f"{key} {value}" for key, value in overrides.items()]
    settings = ", ".join(words)
    return Cell(name, who.label, variant, settings, replace(config, out=str(out / "cells" / folder)))


def _start(cell: Cell, *, threads: int) -> "subprocess.Popen[bytes]":
    open_folder(cell.folder)
    replace_file(cell.folder / CONFIG, cell.config.to_json().encode())
    command = [sys.executable, "-m", "vqkernels.train.comparison.cell", str(cell.folder), str(threads)]
    # a library that makes threads of its own must know of the others too
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with (cell.folder / ERRORS).open("wb") as errors:
        # in a session of its own, so that a terminal interrupts this process alone, which then stops the cells
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )


def _ended(cell: Cell, process: "subprocess.Popen[bytes]") -> CellState:
    _close(process)
    result = read_result(cell.folder, cell.config)
    if result is not None:
        return CellState(cell, result)
    if process.returncode in (STOPPED, -signal.SIGTERM):
        return CellState(cell, error="stopped by a signal from elsewhere; the same command goes on with it")
    text = (cell.folder / ERRORS).read_text(encoding="utf-8", errors="replace").strip()
    last = text.splitlines()[-1] if text else "no message"
    return CellState(cell, error=f"exit code {process.returncode}: {last}")


def _stop(processes: Iterable["subprocess.Popen[bytes]"]) -> None:
    there = [process for process in processes if process.poll() is None]
    for process in there:
        process.terminate()
    until = time.monotonic() + PATIENCE
    for process in there:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            # its last checkpoint is whole at any moment
            process.kill()
            process.wait()
        _close(process)


def _close(process: "subprocess.Popen[bytes]") -> None:
    if process.stdin is not None:
        process.stdin.close()


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
