"""The command `demo`."""

import sys
from pathlib import Path

from vqkernels.cli.console import stopped, tell


def demo(out: Path = Path("runs/demo"), steps: int = 3000, seed: int = 0, fresh: bool = False) -> int:
    """Train SF-DiVeQ and plain STE on photographs, then compare them; goes on where it was stopped.

    Args:
        out: Folder for pictures, logs and checkpoints.
        steps: Optimizer steps of each model.
        seed: Of both models.
        fresh: Train again even where a run is finished.
    """
    from vqkernels.train.demo import run_demo
    from vqkernels.train.reports.report import format_table

    terminal = sys.stderr.isatty()
    runs, signal = run_demo(
        out, steps=steps, seed=seed, fresh=fresh, progress=terminal, on_line=None if terminal else tell
    )
    if signal is not None:
        return stopped(signal, f"the checkpoints are in {out}; the same command goes on")
    print(format_table([(run.label, found, run.share) for run in runs for found in run.evaluations]))
    print("On whole held-out photographs: PSNR and SSIM are means over images.")
    print(f"pictures, log and checkpoints: {out}")
    return 0
