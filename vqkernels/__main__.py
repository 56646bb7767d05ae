"""The command line: python -m vqkernels COMMAND."""

import sys
from collections.abc import Callable, Sequence

from vqkernels import BackendError
from vqkernels.cli.console import first_process, processes, refused, stopped
from vqkernels.cli.info import how_to_install, info, missing_packages

DESCRIPTION = (
    "Train, compare and demonstrate vector-quantized autoencoders; time the ops; ask what can run here."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; those of the process when left out.

    Returns:
        The exit code: 0, 2 for a run that cannot be, 130 for one that was interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    # info is for the installation where something is missing, so it needs nothing
    if words == ["info"]:
        return info()
    # of the others, bench needs the least
    extra = "bench" if words[:1] == ["bench"] else "train"
    if missing := missing_packages(extra):
        return refused(how_to_install(missing, extra))
    if processes() > 1 and words[:1] != ["train"]:
        return refused(
            f"{words[0] if words else 'vqkernels'}: launcher must start one process; got {processes()}. Use torchrun for train alone."
        )
    import tyro

    from vqkernels.train.config import RunError

    try:
        return tyro.extras.subcommand_cli_from_dict(
            commands(words),
            prog="python -m vqkernels",
            description=DESCRIPTION,
            args=words,
            console_outputs=first_process(),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    except (RunError, BackendError) as error:
        return refused(str(error))
    except KeyboardInterrupt:
        # these make no checkpoints
        rest = "" if words[:1] in (["bench"], ["info"]) else ", and a checkpoint that was there is whole"
        return stopped("SIGINT", f"nothing is half-written{rest}")


def commands(words: Sequence[str]) -> dict[str, Callable[..., int]]:
    """Return every command by its name.

    Args:
        words: of the command line; the recipe that they name sets the defaults of `train` and `prior`.
    """
    from vqkernels.cli.bench import bench

    if words[:1] == ["bench"]:
        return {"bench": bench, "info": info}
    from vqkernels.cli import train
    from vqkernels.cli.compare import compare
    from vqkernels.cli.demo import demo
    from vqkernels.cli.evaluate import evaluate
    from vqkernels.cli.prior import prior_command, sample, tokens

    return {
        "train": train.command(train.default_of(words[1:])),
        "evaluate": evaluate,
        "compare": compare,
        "tokens": tokens,
        "prior": prior_command(words[1:]),
        "sample": sample,
        "demo": demo,
        "bench": bench,
        "info": info,
    }


if __name__ == "__main__":
    sys.exit(main())
