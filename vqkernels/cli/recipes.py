"""The recipe that a command line names, which sets the defaults of the other options."""

import argparse
from collections.abc import Collection, Sequence


def named(words: Sequence[str], recipes: Collection[str], *, default: str = "small") -> tuple[str, bool]:
    """Return the recipe after --preset and whether --full is given, before the rest of a command line is read.

    Args:
        words: after the command.
        recipes: that there are.
        default: the recipe where none of them is named; the command's own reader words what is wrong.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--preset", default=default, choices=tuple(recipes))
    reader.add_argument("--full", action="store_true")
    try:
        found, _ = reader.parse_known_args(list(words))
    except argparse.ArgumentError:
        return default, False
    return found.preset, found.full
