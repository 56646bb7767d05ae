"""The order in which streamed samples are shown, a pure function of the seed and the position."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class EpochOrder:
    """An endless order of samples that shows every sample once in each epoch.

    Samples that lie together make a run. An epoch permutes the runs, and then the samples within windows
    of as many runs as a shuffle buffer would hold; so any position is found without what came before it,
    and samples that lie together are read at about the same time.

    Attributes:
        count: number of samples, at least 1.
        seed: of all permutations.
        run: samples in a run.
        window: samples shuffled among each other.
    """

    count: int
    seed: int
    run: int = 1024
    window: int = 16384

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the samples at some positions.

        Args:
            start: first position, from 0; position count * e begins epoch e.
            count: of positions.

        Returns:
            (count,) numbers of samples.
        """
        taken = np.empty(count, dtype=np.int64)
        for row in range(count):
            epoch, rest = divmod(start + row, self.count)
            taken[row] = _window(self, epoch, rest // self.window)[rest % self.window]
        return taken


def _rng(order: EpochOrder, epoch: int, purpose: int) -> np.random.Generator:
    # a spawn key, unlike more words of entropy, never coincides with the generator of a batch's crops
    return np.random.default_rng(np.random.SeedSequence(order.seed, spawn_key=(epoch, purpose)))


@lru_cache(maxsize=4)
def _runs(order: EpochOrder, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts of the runs in the order of an epoch, and the positions where they begin there."""
    starts = _rng(order, epoch, 0).permutation(np.arange(0, order.count, order.run))
    lengths = np.minimum(starts + order.run, order.count) - starts
    return starts, np.cumsum(lengths) - lengths


@lru_cache(maxsize=8)
def _window(order: EpochOrder, epoch: int, number: int) -> NDArray[np.int64]:
    starts, places = _runs(order, epoch)
    low, high = number * order.window, min((number + 1) * order.window, order.count)
    positions = np.arange(low, high)
    run = np.searchsorted(places, positions, side="right") - 1
    samples = _rng(order, epoch, 1 + number).permutation(starts[run] + positions - places[run])
    samples.flags.writeable = False
    return samples
