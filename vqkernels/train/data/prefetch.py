"""Batches decoded in the background, ahead of the step that asks for them."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType

from torch import Tensor

from vqkernels.train.data.images import ImageSet


class Prefetch:
    """Gives the batches of an image set, and decodes those of the next steps meanwhile.

    A batch is a function of its step alone, so what comes is the same whether it was ready or not. Leaving
    a `with` block, or `close`, ends the threads.
    """

    def __init__(self, images: ImageSet, rank: int = 0, world: int = 1, *, depth: int = 2) -> None:
        """Start no work yet.

        Args:
            images: to take batches from.
            rank: of this process.
            world: number of processes.
            depth: steps to be ahead; at most depth + 1 batches are in memory, and as many threads decode.
        """
        self._images, self._rank, self._world, self._depth = images, rank, world, depth
        self._pool = ThreadPoolExecutor(depth + 1, thread_name_prefix="prefetch")
        self._ahead: dict[int, Future[Tensor]] = {}

    def batch(self, step: int) -> Tensor:
        """Return the batch of a step, and ask for the next ones.

        Args:
            step: 0-based step, in any order.

        Returns:
            What `ImageSet.batch` returns.

        Raises:
            RunError: if an image of the batch cannot be decoded.
        """
        wanted = range(step, step + self._depth + 1)
        for other in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(other).cancel()
        for number in wanted:
            if number not in self._ahead:
                self._ahead[number] = self._pool.submit(
                    self._images.batch, number, rank=self._rank, world=self._world
                )
        return self._ahead.pop(step).result()

    def close(self) -> None:
        """Forget what was asked for and end the threads."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Prefetch":
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the threads."""
        self.close()


@contextmanager
def batches(images: ImageSet, rank: int, world: int) -> Iterator[Callable[[int], Tensor]]:
    """Take the batches of a run, decoded in the background unless the pictures are in memory.

    Args:
        images: to take batches from.
        rank: of this process.
        world: number of processes.

    Yields:
        A function from a step to its batch; leaving the block ends the threads.
    """
    if images.in_memory:
        yield partial(images.batch, rank=rank, world=world)
        return
    with Prefetch(images, rank, world) as ahead:
        yield ahead.batch
