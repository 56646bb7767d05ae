"""The command line: python -m vqkernels train | evaluate | info | demo."""

import importlib.util
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vqkernels
from vqkernels import BackendError, native
from vqkernels.checks import refuse
from vqkernels.ops import OPS
from vqkernels.train.config import RunError, TrainConfig

TRAINING_PACKAGES = ("accelerate", "matplotlib", "PIL", "skimage", "tqdm", "tyro")
SIGNAL_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143}
DESCRIPTION = "Train, evaluate and demonstrate vector-quantized autoencoders; ask what can run here."

# between two lines of text where there is no terminal for a progress bar
QUIET_STEPS = 100


def train(config: TrainConfig, resume: bool = False) -> int:
    """Train a VQ-VAE; leaves a checkpoint and a log in --out.

    Args:
        config: Settings of the run.
        resume: Go on from the checkpoint in --out, or start where there is none.
    """
    from vqkernels.train.evaluate import evaluate, modes_of
    from vqkernels.train.log import read_lines
    from vqkernels.train.loop import train as run_training
    from vqkernels.train.report import format_table

    terminal = sys.stderr.isatty()
    result = run_training(config, resume=resume, progress=terminal, on_line=None if terminal else _tell)
    if result.signal is not None:
        return _stopped(result.signal, f"at step {result.step}; the checkpoint is in {config.out}")
    if not result.main:
        return 0
    shares = [line.get("quantizer_share") for line in read_lines(config.metrics_path())]
    known = [float(share) for share in shares if share is not None]
    found = [evaluate(result.model, result.images, mode=mode) for mode in modes_of(result.model)]
    share = sum(known) / len(known) if known else None
    print(format_table([(config.quantizer, one, share) for one in found]))
    print(f"checkpoint and log: {config.out}")
    return 0


def evaluate(checkpoint: Path, data: str | None = None, picture: Path | None = None) -> int:
    """Measure a checkpoint on whole held-out images, in every evaluation mode.

    Args:
        checkpoint: The checkpoint.pt of a run.
        data: Other images; of a folder every tenth is held out and measured, as in training. Those of the run
            when left out.
        picture: Also draw the first reconstructions into this PNG.
    """
    from vqkernels.train.checkpoint import open_folder
    from vqkernels.train.demo import draw_models, reconstruction_row
    from vqkernels.train.evaluate import evaluate as measure
    from vqkernels.train.evaluate import modes_of
    from vqkernels.train.report import format_table
    from vqkernels.train.restore import load_run

    if picture is not None:
        if picture.suffix.lower() != ".png" or picture.is_dir():
            refuse(RunError, "evaluate", "picture", "name a .png file", picture, "Pass --picture FILE.png")
        open_folder(picture.parent, "picture")
    model, images, config = load_run(checkpoint, data)
    found = [measure(model, images, mode=mode) for mode in modes_of(model)]
    plural = "" if found[0].images == 1 else "s"
    print(f"{found[0].images} whole held-out image{plural} of {data or config.data}")
    print(format_table([(config.quantizer, one, None) for one in found]))
    if picture is not None:
        draw_models(picture, images, [reconstruction_row(config.quantizer, model, images)])
        print(f"picture: {picture}")
    return 0


def demo(out: Path = Path("runs/demo"), steps: int = 3000, seed: int = 0, fresh: bool = False) -> int:
    """Train SF-DiVeQ and plain STE on photographs, then compare them; goes on where it was stopped.

    Args:
        out: Folder for pictures, logs and checkpoints.
        steps: Optimizer steps of each model.
        seed: Of both models.
        fresh: Train again even where a run is finished.
    """
    from vqkernels.train.demo import run_demo
    from vqkernels.train.report import format_table

    terminal = sys.stderr.isatty()
    runs, signal = run_demo(
        out, steps=steps, seed=seed, fresh=fresh, progress=terminal, on_line=None if terminal else _tell
    )
    if signal is not None:
        return _stopped(signal, f"the checkpoints are in {out}; the same command goes on")
    print(format_table([(run.label, found, run.share) for run in runs for found in run.evaluations]))
    print("On whole held-out photographs: PSNR and SSIM are means over images.")
    print(f"pictures, log and checkpoints: {out}")
    return 0


def info() -> int:
    """Print versions, the device, and for every op and backend: ready, or the reason why not."""
    print(
        f"vqkernels {vqkernels.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {_triton()}"
    )
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    cuda = torch.cuda.is_available()
    print(f"cuda: {torch.cuda.get_device_name()}" if cuda else "cuda: no device that torch can use")
    facts = native.facts()
    print("extension:" if facts else f"extension: missing, {native.MISSING}")
    for name, value in facts.items():
        print(f"  {name}: {_words(value)}")
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        print(f"ops on {device}, float32; the first that is ready runs:")
        for name, op in OPS.items():
            print(f"  {name}")
            for backend, reason in op.explain_for(torch.device(device)).items():
                print(f"    {backend:<10} {'ready' if reason is None else reason}")
    missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    print(f"train, evaluate, demo: {'ready' if not missing else _install(missing)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; those of the process when left out.

    Returns:
        The exit code: 0, 2 for a run that cannot be, 130 or 143 for one that a signal stopped.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # info is for the installation where something is missing, so it needs nothing
    if words == ["info"]:
        return info()
    missing = [name for name in TRAINING_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        return _refused(_install(missing))
    import tyro

    try:
        return tyro.extras.subcommand_cli_from_dict(
            {"train": train, "evaluate": evaluate, "info": info, "demo": demo},
            prog="python -m vqkernels",
            description=DESCRIPTION,
            args=words,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except (RunError, BackendError) as error:
        return _refused(str(error))
    except KeyboardInterrupt:
        return _stopped("SIGINT", "nothing is half-written, and a checkpoint that was there is whole")


def _tell(line: Mapping[str, float | int | str | None]) -> None:
    if line["split"] == "held_out" or (line["step"] or 0) % QUIET_STEPS == 0:
        numbers = (f"{key} {value:.4g}" for key, value in line.items() if isinstance(value, float))
        print(f"step {line['step']} {line['split']}: {', '.join(numbers)}", flush=True)


def _stopped(signal: str, where: str) -> int:
    print(f"Stopped by {signal}: {where}.", file=sys.stderr)
    return SIGNAL_EXIT_CODES[signal]


def _refused(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _install(missing: Sequence[str]) -> str:
    return f'{", ".join(missing)} not installed; run pip install "vqkernels[train]"'


def _triton() -> str:
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "no triton"


def _words(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)


if __name__ == "__main__":
    sys.exit(main())
