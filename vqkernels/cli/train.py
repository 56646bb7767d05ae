"""The command `train`."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vqkernels.cli.console import stopped, tell
from vqkernels.cli.recipes import named
from vqkernels.train.config import TrainConfig
from vqkernels.train.options import GROUPS
from vqkernels.train.presets import PRESETS, PresetName

# held-out crops of a report
CROPS = 512

# one argument for each group, so that the help shows them apart
_Options = dataclasses.make_dataclass(
    "Options",
    [(group.title, group, dataclasses.field(default_factory=group)) for group in GROUPS],
    frozen=True,
)


def options_of(config: TrainConfig) -> Any:
    """Return the options of a configuration in their groups, as defaults of the command line.

    Args:
        config: of a run.
    """
    groups = {
        group.title: group(**{f.name: getattr(config, f.name) for f in dataclasses.fields(group)})
        for group in GROUPS
    }
    return _Options(**groups)


def config_of(options: Any) -> TrainConfig:
    """Return the configuration that options in groups stand for.

    Args:
        options: what `options_of` returned, perhaps changed.

    Raises:
        RunError: a value is out of range, or two do not fit together.
    """
    fields: dict[str, Any] = {}
    for group in GROUPS:
        part = getattr(options, group.title)
        fields |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return TrainConfig(**fields)


def command(default: TrainConfig) -> Callable[..., int]:
    """Return the command with the options of a recipe as its defaults.

    Args:
        default: configuration of the recipe.
    """

    start = options_of(default)

    def train(
        options: Annotated[_Options, tyro.conf.arg(name="")] = start,  # type: ignore[valid-type]
        preset: PresetName = "small",
        full: bool = False,
        resume: bool = False,
        resume_from: Path | None = None,
        report: bool = True,
    ) -> int:
        """Train an autoencoder; leaves checkpoints, a log and pictures in --out.

        Args:
            options: Options in groups.
            preset: Recipe of a paper whose options are the defaults here; --help after it shows them.
            full: The recipe in the paper's size, for a GPU and a data set.
            resume: Go on from the newest checkpoint in --out, or start where there is none.
            resume_from: Go on from this checkpoint, or the newest of this folder of a run; later ones, and the log beyond it, are dropped.
            report: Write report.md and its pictures into --out at the end; the flag switches it off.
        """
        again = resume or resume_from is not None
        return run(config_of(options), resume=again, resume_from=resume_from, report=report)

    return train


def default_of(words: Sequence[str]) -> TrainConfig:
    """Return the configuration of the recipe that a command line names, before the rest of it is read.

    Args:
        words: after `train`.
    """
    preset, full = named(words, PRESETS)
    return PRESETS[preset].config(full=full)


def run(config: TrainConfig, *, resume: bool, resume_from: Path | None = None, report: bool = True) -> int:
    """Train, print a table and write a report.

    Args:
        config: of the run.
        resume: whether to go on from a checkpoint.
        resume_from: which one; None for the newest.
        report: whether to write report.md and its pictures.
    """
    from vqkernels.train.log import read_lines
    from vqkernels.train.loop import train
    from vqkernels.train.measures.evaluate import MOST_IMAGES, evaluate, modes_of
    from vqkernels.train.measures.latents import study_latents
    from vqkernels.train.processes import leave
    from vqkernels.train.reports.pages import write_report
    from vqkernels.train.reports.report import format_table, make_report

    terminal = sys.stderr.isatty()
    on_line = None if terminal else tell
    result = train(config, resume=resume, resume_from=resume_from, progress=terminal, on_line=on_line)
    leave()
    if result.signal is not None:
        return stopped(result.signal, f"at step {result.step}; the checkpoint is in {config.out}")
    if not result.main:
        return 0
    lines = read_lines(config.metrics_path())
    shares = [line.get("quantizer_share") for line in lines]
    known = [float(share) for share in shares if share is not None]
    model, images = result.model, result.images
    found = [
        evaluate(model, images, mode=mode, crops=CROPS if report else 0, limit=MOST_IMAGES)
        for mode in modes_of(model)
    ]
    share = sum(known) / len(known) if known else None
    print(format_table([(config.quantizer, one, share) for one in found]))
    if found[0].images < len(images.held_out):
        print(f"on {found[0].images} of {len(images.held_out)} held-out images; `evaluate` takes all of them")
    print(f"checkpoint and log: {config.out}")
    if report:
        path, study = Path(config.out) / "report.md", study_latents(model, images, crops=CROPS)
        page = make_report(model, images, config, evaluations=found, study=study, lines=lines)
        write_report(path, page)
        print(f"report with pictures: {path}")
    return 0
