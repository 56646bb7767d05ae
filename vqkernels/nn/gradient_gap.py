"""The gradient gap of a model: how far a quantizer moves the gradient of a task loss (Huh eq. 14)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.nn.metrics import gradient_gap
from vqkernels.nn.quantizers.base import Quantized


def loss_gradient_gap(loss: Tensor, reference: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """sum_l |dL/dp_l - dL0/dp_l|^2 of a task loss L with a quantizer and L0 without it (Huh eq. 14, A.3).

        loss = task(model(x))
        with unquantized(model.quantizer):
            reference = task(model(x))
        gap = loss_gradient_gap(loss, reference, model.encoder.parameters())
        loss.backward()

    Neither graph is freed and no `.grad` is written, so that the loss can be trained on afterwards. With the latents
    F(x) of one forward as the only parameter, this is the square of eq. 14 to the letter. Where the loss holds
    randomness besides the quantizer's, such as dropout, that is part of the gap. In a process group the gap is that
    of the rank's own batch; take the model out of DistributedDataParallel, whose reducer knows only `backward`.

    Args:
        loss: 0-d, with the quantizer; the task loss alone, without the loss that the quantizer returns.
        reference: 0-d, of the same batch, without it.
        parameters: tensors that require a gradient, one per layer; one that a loss does not depend on has a gradient
            of zeros there.

    Returns:
        0-d float32.

    Raises:
        ValueError: there are no parameters, one requires no gradient, or neither loss depends on any of them.
    """
    layers = list(parameters)
    op, fix = "loss_gradient_gap", "Pass the encoder's parameters, before a generator of them is used up"
    if not layers:
        refuse(ValueError, op, "parameters", "hold at least one tensor", "none", fix)
    if not all(layer.requires_grad for layer in layers):
        requirement = "require a gradient"
        refuse(ValueError, op, "parameters", requirement, "one that does not", "Leave frozen layers out")
    return gradient_gap(_gradients(loss, layers), _gradients(reference, layers))


@contextmanager
def unquantized(*quantizers: nn.Module) -> Iterator[None]:
    """Replace the forward of quantizers by the identity: z = x, indices -1, loss 0, and no batch is taken note of.

    It replaces `forward` of each module given and of nothing inside it, until the block ends; a model that
    `torch.compile` has made a graph of must be called uncompiled here.

    Args:
        quantizers: each with `channel_dim`, the dimension of x that holds the features.

    Yields:
        Nothing.

    Raises:
        TypeError: a module has no `channel_dim`.
    """
    with ExitStack() as stack:
        for quantizer in quantizers:
            stack.enter_context(_identity(quantizer))
        yield


@contextmanager
def _identity(quantizer: nn.Module) -> Iterator[None]:
    channel_dim = getattr(quantizer, "channel_dim", None)
    if not isinstance(channel_dim, int):
        fix = "Pass quantizers, such as model.quantizer"
        refuse(TypeError, "unquantized", "quantizers", "have a channel_dim", type(quantizer).__name__, fix)

    def forward(x: Tensor, *args: object, **options: object) -> Quantized:
        rows = x.movedim(channel_dim, -1).shape[:-1]
        indices = torch.full((*rows, 1), -1, dtype=torch.int64, device=x.device)
        return Quantized(x, indices, x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)))

    # the instance hides the method of its class; what hid it before comes back
    before = vars(quantizer).get("forward")
    vars(quantizer)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(quantizer)["forward"]
        else:
            vars(quantizer)["forward"] = before


def _gradients(loss: Tensor, layers: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, layers, retain_graph=True, allow_unused=True)
