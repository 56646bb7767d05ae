"""The command `compare`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vqkernels.checks import refuse
from vqkernels.cli.console import stopped
from vqkernels.train.comparison.contenders import ABLATIONS, CONTENDERS
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.options import Schedule

if TYPE_CHECKING:
    from vqkernels.train.comparison.compare import CellState

    AblationName = str
else:
    AblationName = Literal[tuple(ABLATIONS)]

METHODS = "ste,ema,rotation,nsvq,gumbel,diveq,sf_diveq,affine,mq"
_BASE = TrainConfig()


def compare(
    methods: str | None = None,
    num_codes: str | None = None,
    seeds: str = "0,1",
    ablate: AblationName | None = None,
    out: Path = Path("runs/compare"),
    data: str = _BASE.data,
    steps: int = _BASE.steps,
    batch_size: int = _BASE.batch_size,
    lr: float = 1e-3,
    schedule: Schedule = "cosine",
    rise: float = 0.05,
    latent_dim: int = _BASE.latent_dim,
    width: int = _BASE.width,
    crop: int = _BASE.crop,
    augment: bool = _BASE.augment,
    workers: int | None = None,
    known: bool = False,
) -> int:
    """Train methods x codebook sizes x seeds on the same data and steps; draws figures and writes tables.

    Goes on where it was stopped: a finished cell of the same settings is never trained again.

    Args:
        methods: Names with commas between them, from --known; name:lru or name:none takes another upkeep. The nine of
            the papers' comparison when left out, or those of the ablation.
        num_codes: Codebook sizes with commas between them. 256,1024 when left out; 256 for an ablation.
        seeds: With commas between them.
        ablate: Vary one thing in place of comparing the methods as they are.
        out: Folder for tables, figures and cells.
        data: photos, a folder of images, or of CIFAR-10's Python files.
        steps: Optimizer steps of each cell.
        batch_size: Crops in a step.
        lr: Learning rate of each cell at its highest; DiVeQ's own is 5.5e-4, with --schedule halving --rise 0, for
            trainings many times as long.
        schedule: halving: at 40 and 70 % of the steps; cosine: half a cycle down to 0; constant.
        rise: Fraction of the steps in which the learning rate rises to lr.
        latent_dim: Features of a latent and of a code, D.
        width: Channels of the hidden layers.
        crop: Height and width of a training crop, in pixels.
        augment: Mirror half of the crops, and change exposure and white balance of all a little; the flag switches it.
        workers: Cells at a time, which share the cores. One for each core when left out, one alone with a GPU.
        known: List the methods with their settings, and train nothing.
    """
    if known:
        for name, who in CONTENDERS.items():
            settings = ", ".join(f"{key} {value}" for key, value in who.overrides.items())
            print(f"{name:<16} {who.label}: {settings}")
        return 0
    from vqkernels.train.checkpoints.files import open_folder
    from vqkernels.train.comparison.compare import Grid, run_cells
    from vqkernels.train.comparison.report import report_files, write_report

    default = METHODS.split(",") if ablate is None else list(ABLATIONS[ablate].methods)
    sizes = num_codes or ("256,1024" if ablate is None else "256")
    base = TrainConfig(
        data=data,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        schedule=schedule,
        rise=rise,
        latent_dim=latent_dim,
        width=width,
        crop=crop,
        augment=augment,
        # whole images take longer than the steps between them; the training log shows crops
        evaluate_every=max(1, steps // 4),
    )
    grid = Grid(
        methods=default if methods is None else [word.strip() for word in methods.split(",")],
        num_codes=_numbers("num_codes", sizes),
        seeds=_numbers("seeds", seeds),
        base=base,
        ablation=ablate,
    )
    cells = grid.cells(out)
    open_folder(out)
    began = time.monotonic()

    def tell(states: "Sequence[CellState]", changed: "CellState | None") -> None:
        write_report(out, grid, states)
        finished = sum(state.result is not None for state in states)
        if changed is None:
            print(f"{len(states)} cells, {finished} of them finished before", flush=True)
            return
        _tell(changed, finished, len(states), time.monotonic() - began)

    outcome = run_cells(cells, workers=workers, on_change=tell)
    if outcome.signal is not None:
        return stopped(outcome.signal, f"what is finished is in {out}; the same command goes on")
    table, *_ = report_files(out, grid)
    print(table.read_text(encoding="utf-8"))
    print("files: " + ", ".join(map(str, report_files(out, grid))))
    failed = sum(state.error is not None for state in outcome.states)
    if failed:
        print(f"{failed} of {len(cells)} cells failed")
    return 1 if failed else 0


def _tell(state: "CellState", finished: int, of: int, seconds: float) -> None:
    cell = state.cell
    point = f", {cell.variant.label}" if cell.variant.label else ""
    name = f"{cell.label}{point}, K = {cell.config.num_codes}, seed {cell.config.seed}"
    found = state.result.measurements.get("psnr") if state.result is not None else None
    words = state.error or ("no finite PSNR" if found is None else f"{found:.2f} dB")
    print(f"[{finished} of {of}, {seconds:.0f} s] {name}: {words}", flush=True)


def _numbers(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        flag = name.replace("_", "-")
        refuse(
            RunError,
            "compare",
            name,
            "be whole numbers with commas between them",
            repr(text),
            f"Pass --{flag} 1,2",
        )
    return [int(word) for word in words]
