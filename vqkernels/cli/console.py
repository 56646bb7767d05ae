"""Words on the terminal that several commands share."""

import os
import sys
from collections.abc import Mapping

# of a run that a signal stopped; a run that was asked to end has done so
SIGNAL_EXIT_CODES = {"SIGINT": 130, "SIGTERM": 0}

# between two lines of text where there is no terminal for a progress bar
QUIET_STEPS = 100


def processes() -> int:
    """Return how many processes a launcher such as torchrun has started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first_process() -> bool:
    """Whether this process is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def tell(line: Mapping[str, float | int | str | None]) -> None:
    """Print a line of a log now and then.

    Args:
        line: of metrics.jsonl.
    """
    if line["split"] == "held_out" or int(line["step"] or 0) % QUIET_STEPS == 0:
        numbers = (f"{key} {value:.4g}" for key, value in line.items() if isinstance(value, float))
        print(f"step {line['step']} {line['split']}: {', '.join(numbers)}", flush=True)


def stopped(signal: str, where: str) -> int:
    """Say what stopped the command, and return its exit code.

    Args:
        signal: its name.
        where: what is left, and how to go on.
    """
    if first_process():
        print(f"Stopped by {signal}: {where}.", file=sys.stderr)
    return SIGNAL_EXIT_CODES[signal]


def refused(reason: str) -> int:
    """Say why the command cannot be, and return its exit code.

    Args:
        reason: one sentence.
    """
    if first_process():
        print(f"error: {reason}", file=sys.stderr)
    else:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        # the others mostly find the same; torchrun shows this where they do not
        get_error_handler().record_exception(RuntimeError(reason))
    return 2
