"""What priors over the tokens of an autoencoder have in common."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqkernels.checks import check_count, check_number, refuse


class Corrupted(NamedTuple):
    """What a prior sees of a batch, and where it is asked.

    Attributes:
        inputs: (B, n) int64, what `forward` takes.
        asked: (B, n) bool, True where the loss counts.
    """

    inputs: Tensor
    asked: Tensor


class TokenPrior(nn.Module, ABC):
    """A distribution over sequences of n tokens below `num_codes`, given a class or not."""

    def __init__(
        self, num_codes: int, length: int, num_classes: int, layers: int, heads: int, width: int
    ) -> None:
        """Check and keep the sizes.

        Args:
            num_codes: values a token can take.
            length: tokens in a sequence, n = h w Q.
            num_classes: classes of the images, 0 for a prior without them.
            layers: transformer blocks.
            heads: attention heads in a block.
            width: features of a token inside.

        Raises:
            TypeError: if a size is not an int.
            ValueError: if a size is below 1, or the heads do not divide the width.
        """
        super().__init__()
        op = type(self).__name__
        sizes = {"num_codes": num_codes, "length": length, "layers": layers, "heads": heads, "width": width}
        for name, value in sizes.items():
            check_count(op, name, value, minimum=1)
        check_count(op, "num_classes", num_classes)
        if width % heads:
            fix = f"Pass --width {math.ceil(width / heads) * heads}"
            refuse(ValueError, op, "width", f"be a multiple of heads = {heads}", width, fix)
        self.num_codes, self.length, self.num_classes = num_codes, length, num_classes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def corrupt(
        self, tokens: Tensor, *, keep: float = 1.0, generator: torch.Generator | None = None
    ) -> Corrupted:
        """Return what training shows of a batch.

        Args:
            tokens: (B, n) int64.
            keep: probability that a shown token is the true one, p_keep; else it is any, uniformly.
            generator: of the draws, on the device of the tokens.
        """

    @abstractmethod
    def corrupt_to_measure(self, tokens: Tensor, *, generator: torch.Generator | None = None) -> Corrupted:
        """Return what a measurement shows of a batch, so that the mean loss bounds the nats per token.

        Args:
            tokens: (B, n) int64.
            generator: of the draws, on the device of the tokens.
        """

    @abstractmethod
    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of every token.

        Args:
            inputs: (B, n) int64, of `corrupt`.
            labels: (B,) int64 classes, None for a prior without them.

        Returns:
            (B, n, num_codes).

        Raises:
            TypeError: if tokens or labels are not int64 tensors.
            ValueError: if shapes do not fit, or labels are given to a prior without classes, or missing.
        """

    def score(self, logits: Tensor, tokens: Tensor, asked: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the mean cross-entropy of the true tokens where they are asked for, 0-d, in nats.

        Args:
            logits: (B, n, num_codes).
            tokens: (B, n) int64, the true ones.
            asked: (B, n) bool.
            label_smoothing: share of the target that is spread over all codes.
        """
        loss = F.cross_entropy(
            logits.float().transpose(1, 2), tokens, reduction="none", label_smoothing=label_smoothing
        )  # (B, n)
        # a product, for picking rows would wait for the device
        return (loss * asked).sum() / asked.sum()

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        keep: float = 1.0,
        label_smoothing: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the training loss of a batch, 0-d, in nats.

        Args:
            tokens: (B, n) int64.
            labels: (B,) int64 classes, None for a prior without them.
            keep: probability that a shown token is the true one.
            label_smoothing: share of the target that is spread over all codes.
            generator: of the draws, on the device of the tokens.
        """
        inputs, asked = self.corrupt(tokens, keep=keep, generator=generator)
        return self.score(self(inputs, labels), tokens, asked, label_smoothing=label_smoothing)

    def nats(
        self, tokens: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return an unbiased estimate of a bound of -log p(tokens) / n for each sequence, (B,).

        Args:
            tokens: (B, n) int64.
            labels: (B,) int64 classes, None for a prior without them.
            generator: of the draws, on the device of the tokens.
        """
        inputs, asked = self.corrupt_to_measure(tokens, generator=generator)
        logits = self(inputs, labels).float()
        loss = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")  # (B, n)
        return (loss * asked).sum(1) / asked.sum(1)

    @abstractmethod
    def sample(
        self,
        count: int,
        labels: Tensor | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw sequences; the training flag is left as it was.

        Args:
            count: sequences to draw.
            labels: (count,) int64 classes, None for a prior without them.
            temperature: divides the logits.
            top_k: only the k likeliest codes are drawn; None for all, 1 for the likeliest.
            generator: of the draws, on the device of the prior.

        Returns:
            (count, n) int64.

        Raises:
            TypeError: if an argument has the wrong type.
            ValueError: if a value is out of range.
        """

    def beginning(self, count: int, labels: Tensor | None) -> Tensor:
        """Return the token before the first, (B,): the class, or the only start there is.

        Args:
            count: sequences, B.
            labels: (B,) int64 classes, None for a prior without them.

        Raises:
            TypeError: if the labels are not int64.
            ValueError: if they are missing, not wanted, of another shape, or, on the CPU, beyond the classes.
        """
        op = type(self).__name__
        if (labels is None) != (self.num_classes == 0):
            if labels is None:
                fix = f"Pass ({count},) int64 classes below {self.num_classes}"
                refuse(ValueError, op, "labels", "be given to a prior with classes", None, fix)
            fix = "Leave labels out, or build the prior with num_classes"
            refuse(ValueError, op, "labels", "be None for a prior without classes", "a tensor", fix)
        if labels is None:
            return torch.full((count,), self.num_codes, dtype=torch.int64, device=self.device)
        if labels.dtype != torch.int64:
            refuse(TypeError, op, "labels", "be int64", labels.dtype, "Call labels.long()")
        if labels.shape != (count,):
            refuse(
                ValueError, op, "labels", f"be ({count},)", tuple(labels.shape), "Pass one class per sequence"
            )
        if (
            labels.device.type == "cpu"
            and count
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            got = f"values from {int(labels.min())} to {int(labels.max())}"
            requirement = f"be at least 0 and below num_classes = {self.num_classes}"
            refuse(ValueError, op, "labels", requirement, got, "Pass classes the prior was trained on")
        return labels + self.num_codes

    def _check_tokens(self, tokens: Tensor) -> None:
        op = type(self).__name__
        if tokens.dtype != torch.int64:
            refuse(TypeError, op, "tokens", "be int64", tokens.dtype, "Call tokens.long()")
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            fix = "Flatten the tokens of an image to one row"
            refuse(ValueError, op, "tokens", f"be (B, {self.length})", tuple(tokens.shape), fix)


def draw_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row from softmax(logits / temperature), among the k likeliest.

    Args:
        logits: (..., K).
        temperature: above 0.
        top_k: how many codes can be drawn, of equal ones the first; None or more than K for all.
        generator: of the draws, on the device of the logits.

    Returns:
        (...) int64.
    """
    scaled = logits.float() / temperature
    if top_k is not None and top_k < scaled.shape[-1]:
        values, codes = scaled.topk(top_k)
        return codes.gather(-1, _draw(values, generator)[..., None])[..., 0]
    return _draw(scaled, generator)


def check_sampling(op: str, count: int, temperature: float, top_k: int | None) -> None:
    """Refuse what no prior can sample with.

    Args:
        op: class, for the message.
        count: sequences to draw.
        temperature: of the logits.
        top_k: codes that can be drawn.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a value is out of range.
    """
    check_count(op, "count", count, minimum=1)
    check_number(op, "temperature", temperature)
    if temperature == 0:
        fix = "Pass top_k=1 for the likeliest codes"
        refuse(ValueError, op, "temperature", "be above 0", temperature, fix)
    if top_k is not None:
        check_count(op, "top_k", top_k, minimum=1)


def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    rows = logits.softmax(-1).reshape(-1, logits.shape[-1])
    return torch.multinomial(rows, 1, generator=generator).view(logits.shape[:-1])
