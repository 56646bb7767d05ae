"""What a comparison leaves in its folder, written again after every cell."""

from collections.abc import Sequence
from pathlib import Path

from vqkernels.train.checkpoints.files import replace_file
from vqkernels.train.comparison.compare import CellState, Grid
from vqkernels.train.comparison.figures import draw_ablation, draw_comparison, draw_logs
from vqkernels.train.comparison.table import as_csv, markdown, summarise


def report_files(out: Path, grid: Grid) -> list[Path]:
    """Name the files of a report.

    Args:
        out: folder of the comparison.
        grid: what it trains.

    Returns:
        The table in Markdown and CSV, the figure, and the training logs where there is no ablation.
    """
    stem = "compare" if grid.ablation is None else f"ablation-{grid.ablation}"
    files = [out / f"{stem}.md", out / f"{stem}.csv", out / f"{stem}.png"]
    return files if grid.ablation is not None else [*files, out / "training.png"]


def write_report(out: Path, grid: Grid, states: Sequence[CellState]) -> None:
    """Write tables and figures of all cells that are finished, each file as a whole.

    Args:
        out: folder of the comparison.
        grid: what it trains.
        states: of its cells.

    Raises:
        RunError: the folder cannot be written.
    """
    entries = summarise(states)
    table, numbers, figure, *logs = report_files(out, grid)
    replace_file(table, markdown(grid, entries).encode())
    replace_file(numbers, as_csv(entries).encode())
    draw = draw_comparison if grid.ablation is None else draw_ablation
    draw(figure, grid, entries)
    for path in logs:
        draw_logs(path, grid, states)
