"""Moving averages of weights, which reconstruct better than the weights of any one step."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vqkernels.checks import check_number, refuse
from vqkernels.nn.upkeep import Upkeep
from vqkernels.train.learners.procedure import Autoencoder, check_model, split_parameters


class WeightAverage:
    """An exponential moving average of a model's parameters, kept beside the model.

        average <- d average + (1 - d) parameter,   d = min(decay, (1 + n) / (10 + n)) after n updates

    so that the start does not count for long in short runs (as TensorFlow's ExponentialMovingAverage with
    `num_updates`). Codes that learn by gradient are averaged like all weights, for the averaged decoder has learned
    to read them; but they are copied while the quantizer warms up and whenever its upkeep has replaced some, for
    the middle between a code and its replacement is the code of nothing. Buffers, such as codes that are averages
    already, statistics and counts, are the model's own and the same inside `applied`.

    Every rank of a process group keeps the same average: the parameters are the same there.
    """

    def __init__(self, model: Autoencoder, decay: float) -> None:
        """Start with the model as it is.

        Args:
            model: the module itself, no wrapper around it; on its device already.
            decay: in [0, 1), such as 0.999.

        Raises:
            TypeError, ValueError: if the decay is out of range or the model lacks a part.
        """
        self.decay = check_number("WeightAverage", "decay", decay, below=1)
        check_model("WeightAverage", model)
        codes = set(split_parameters(model)[0])
        self._quantizer = model.quantizer
        whole = nn.ModuleList([model.encoder, model.quantizer, model.decoder])
        self._parameters = list(whole.parameters())
        self._codes = [place for place, p in enumerate(self._parameters) if p in codes]
        # torch's AveragedModel would copy its count to the device at every update, and wait for that
        self._averages = [p.detach().clone() for p in self._parameters]
        self._updates = 0
        self._replaced = self._count_replaced()

    @torch.no_grad()
    def update(self) -> None:
        """Take note of the parameters; after each optimizer step. Waits for no device."""
        n, own = self._updates, [p.detach() for p in self._parameters]
        decay = min(self.decay, (1 + n) / (10 + n)) if n else 0.0
        get_ema_multi_avg_fn(decay)(self._averages, own, n)
        self._updates += 1
        replaced = self._count_replaced()
        restart = replaced != self._replaced
        self._replaced = replaced
        if not self._quantizer.initialized:
            restart = torch.ones_like(restart)
        for place in self._codes:
            average, code = self._averages[place], self._parameters[place]
            average.copy_(torch.where(restart, code, average))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model has the averages as its parameters; afterwards its own again, bit for bit.

        No optimizer may step inside, and no update be made.
        """
        own = [p.detach().clone() for p in self._parameters]
        _copy(self._parameters, self._averages)
        try:
            yield
        finally:
            _copy(self._parameters, own)

    def replace(self) -> None:
        """Leave the model the averages as its parameters, for good."""
        _copy(self._parameters, self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averages and the number of updates, for a checkpoint."""
        state = {f"average.{place}": p.detach() for place, p in enumerate(self._averages)}
        return state | {"updates": torch.tensor(self._updates), "replaced": self._replaced.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned.

        Args:
            state: of an average of the same model.

        Raises:
            ValueError: if the names or shapes differ.
        """
        averages = self._averages
        saved = [state.get(f"average.{place}") for place in range(len(averages))]
        fits = all(s is not None and s.shape == p.shape for s, p in zip(saved, averages))
        if not fits or len(state) != len(averages) + 2:
            requirement = f"hold the averages of {len(averages)} parameters of these shapes"
            fix = "Pass the state of an average of the same model"
            refuse(ValueError, "WeightAverage", "state", requirement, f"{len(state)} entries", fix)
        _copy(averages, [s for s in saved if s is not None])
        self._updates = int(state["updates"])
        self._replaced = state["replaced"].to(self._replaced.device)

    def _count_replaced(self) -> Tensor:
        device = next((p.device for p in self._parameters), torch.device("cpu"))
        counts = [part.history[3] for part in self._quantizer.modules() if isinstance(part, Upkeep)]
        return torch.stack(counts).sum() if counts else torch.zeros((), dtype=torch.int64, device=device)


@torch.no_grad()
def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(to, values, strict=True):
        target.copy_(value)
