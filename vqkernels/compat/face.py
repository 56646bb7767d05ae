"""What every drop-in face has in common: it can take the place of a live peer, tensors and all."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NoReturn

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse

# what `nn.Module` keeps of the hooks around a forward and its backward
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class UnservedOption(ValueError):
    """A keyword of the peer that its face does not serve: the sentence names it."""


class Face(nn.Module):
    """Base of the faces: modules with a peer's constructor, returned tuple, attributes and state keys.

    A subclass registers its parameters and buffers under the peer's names, shapes and dtypes, so that state dicts load
    and save both ways without a translation, and `adopt` can hand over the peer's very tensors.
    """

    # qualified names "module.Class" that it stands for, of all versions that `adopt` understands
    peers: ClassVar[tuple[str, ...]] = ()
    # one sentence for each way in which it behaves otherwise than the peer, on purpose
    differences: ClassVar[tuple[str, ...]] = ()
    # methods of the peer that quantize -> the method, of both, by which a verification compares them: one that draws no
    # noise in eval mode; what it returns is what `outcome` reads
    entries: ClassVar[Mapping[str, str]] = MappingProxyType({"forward": "forward"})
    # why outputs in eval mode are others than the peer's, on purpose; they then are nearer to the input
    nearer: ClassVar[str | None] = None

    @classmethod
    def options_of(cls, peer: nn.Module) -> dict[str, object]:
        """The keywords that would construct `peer` anew, read from the live module.

        Raises:
            UnservedOption: the peer uses an option that the face does not serve.
        """
        raise NotImplementedError

    @classmethod
    def adopt(cls, peer: nn.Module) -> Face:
        """Make a face that holds the peer's own parameters and buffers (the same objects), mode and hooks.

        No random number is drawn and nothing is copied.

        Raises:
            UnservedOption: the peer uses an option that the face does not serve.
            ValueError: the tensors of the two do not have the same names and shapes.
        """
        options = cls.options_of(peer)
        with torch.device("meta"):
            face = cls(**options)
        take_over(face, peer)
        face.carry(peer)
        return face

    def carry(self, peer: nn.Module) -> None:
        """Take over what a live peer knows besides its tensors and options, such as counters on the host."""

    @staticmethod
    def outcome(result: tuple) -> tuple[Tensor, Tensor]:
        """Output and indices of what `forward` (the peer's or the face's) returned."""
        return result[0], result[1]

    def sq_dist_of(self, x: Tensor, indices: Tensor) -> Tensor | None:
        """Squared distances in float64 from what is searched to the codes that indices name.

        Args:
            x: an input of `forward`.
            indices: as `forward` returns them for x, by whomever; of several stages, the first ones say what the next
                one searches.

        Returns:
            float64, the shape of `indices`, NaN where it cannot be told; None where indices come from no search.
        """
        return None


def unserved(face: str, option: str, got: object, fix: str) -> NoReturn:
    """Refuse an option by name."""
    refuse(UnservedOption, face, option, "be left at what vqkernels serves", got, fix)


def take_over(face: nn.Module, peer: nn.Module) -> None:
    """Put the peer's parameters and buffers (the same objects), training mode and hooks into `face`.

    Raises:
        ValueError: the tensors of the two do not have the same names and shapes.
    """
    share_tensors(face, peer)
    # read first: the two may share modules
    modes = {key: module.training for key, module in peer.named_modules()}
    face.train(peer.training)
    for key, module in face.named_modules():
        module.training = modes.get(key, peer.training)
    for hooks in HOOKS:
        getattr(face, hooks).update(getattr(peer, hooks))
    face._is_full_backward_hook = peer._is_full_backward_hook


def share_tensors(face: nn.Module, peer: nn.Module) -> None:
    """Put the peer's parameters and buffers (the same objects) into `face`.

    Raises:
        ValueError: the tensors of the two do not have the same names and shapes.
    """
    name = type(face).__name__
    for table in ("_parameters", "_buffers"):
        ours, theirs = _entries(face, table), _entries(peer, table)
        # an empty entry, such as the bias of a layer without one, needs none on the other side
        unmatched = [
            key for one, other in ((ours, theirs), (theirs, ours)) for key in _filled(one) - other.keys()
        ]
        if unmatched:
            got = ", ".join(sorted(unmatched))
            refuse(
                ValueError,
                name,
                table[1:],
                "have the names of its peer's",
                f"{got} on one side only",
                "Report it",
            )
        for key, (module, entry, old) in ours.items():
            new = theirs[key][2] if key in theirs else None
            if old is not None and new is not None and old.shape != new.shape:
                got = f"{tuple(new.shape)} for {tuple(old.shape)}"
                refuse(ValueError, name, key, "have the shape of its peer's", got, "Report it")
            getattr(module, table)[entry] = new


def take_hooks(face: nn.Module, peer: nn.Module) -> None:
    """Keep the hooks of `face` in the tables of `peer`, for the handles that remove a hook know those alone."""
    for hooks in HOOKS:
        mine, table = getattr(face, hooks), getattr(peer, hooks)
        kept = dict(mine)
        table.clear()
        table.update(kept)
        setattr(face, hooks, table)


def _filled(entries: dict[str, tuple[nn.Module, str, Tensor | None]]) -> set[str]:
    return {key for key, (_, _, tensor) in entries.items() if tensor is not None}


def _entries(root: nn.Module, table: str) -> dict[str, tuple[nn.Module, str, Tensor | None]]:
    """Every entry of a table of tensors by its full name; modules that stand in two places appear twice."""
    found = {}
    for prefix, module in root.named_modules(remove_duplicate=False):
        for entry, tensor in getattr(module, table).items():
            found[f"{prefix}.{entry}" if prefix else entry] = (module, entry, tensor)
    return found
