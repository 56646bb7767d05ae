"""Quantizers of other libraries swapped for their faces, in a model that is alive."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from vqkernels.checks import refuse
from vqkernels.compat.face import HOOKS, Face, take_hooks
from vqkernels.compat.registry import Recognized, defaults_of, face_of, is_composite, qualified, recognize
from vqkernels.compat.report import ConversionReport, Row
from vqkernels.compat.verification import Batch, Pair, Place


class ConversionError(ValueError):
    """A model that was not converted, and is as it was."""


class VerificationError(ConversionError):
    """A face that does not agree with its peer on the batch; `report` says where."""

    def __init__(self, message: str, report: ConversionReport) -> None:
        super().__init__(message)
        self.report = report


# what shards parameters: a face would have to be sharded in the same way
_SHARDING = ("FullyShardedDataParallel", "FSDPModule")
# what computes a parameter from others right before a forward
_REWRITING = ("WeightNorm", "SpectralNorm", "BasePruningMethod")
# hooks that may hold on to the module they were registered on
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class _Peer(NamedTuple):
    """A quantizer that was found, its places, the modules around each, from the outside in, and what holds on to it."""

    module: nn.Module
    name: Recognized
    places: list[Place]
    around: list[tuple[nn.Module, ...]]
    # paths of tuples that it stands in, and of attributes that are methods of it
    fixed: list[str]


def convert(
    model: nn.Module, *, dry_run: bool = False, verify: Batch | None = None, strict: bool = False
) -> ConversionReport:
    """Swap the quantizers of other libraries in a model for those of vqkernels, in place.

    Known are vector-quantize-pytorch, diveq, vqtorch and taming-transformers. A face holds the very parameters and
    buffers of its peer, so that an optimizer and its moments, DDP, and checkpoints go on; modes and hooks are carried
    over. No library is imported, no random number drawn, and nothing copied. All faces are built before the first swap.
    A model compiled as a whole compiles anew at its next call; a model is to be converted before it is sharded.
    After it, `isinstance(quantizer, PeerClass)` is false.

    Args:
        model: anywhere: on a device or on meta, in any dtype, inside DDP or torch.compile, half-trained.
        dry_run: only say what would be done.
        verify: what forward takes (a tensor, a tuple of arguments or a dict of keywords): peers and faces are compared
            on it in eval mode before the swap.
        strict: refuse a model with a quantizer that cannot be converted, instead of leaving that one as it is.

    Returns:
        The report; `report.model` is the model, or the face if the model itself was a quantizer.

    Raises:
        ConversionError: the model is sharded; or a quantizer would be left, and `strict` is on.
        VerificationError: a face does not agree with its peer; not in a dry run, whose report says it.
        TypeError: the model is no module, or verify no batch.
    """
    if not isinstance(model, nn.Module):
        refuse(TypeError, "convert", "model", "be a torch.nn.Module", type(model).__name__, "Pass a module")
    roots = [model]
    rows, pairs = [], []
    for peer in _find(roots):
        row, face = _prepare(peer, "convertible" if dry_run else "converted")
        rows.append(row)
        around = {id(one): one for path in peer.around for one in path}
        pairs.append(Pair(peer.module, face, tuple(peer.places), tuple(around.values())))
    report = ConversionReport(tuple(rows), (), roots, tuple(pairs))
    if strict and report.left:
        got = "; ".join(f"{row.path}: {row.reason}".rstrip(".") for row in report.left)
        fix = "Pass strict=False to leave these as they are"
        refuse(ConversionError, "convert", "model", "have faces for all of its quantizers", got, fix)
    if verify is not None:
        report.verify(verify)
    if dry_run:
        return report
    failed = [f"{check.path}: {sentence}" for check in report.checks for sentence in check.failures]
    if failed:
        message = (
            f"convert: faces must agree with their peers; got {' '.join(failed)} The model is as it was."
        )
        raise VerificationError(message, report)
    for pair in pairs:
        if pair.face is not None:
            take_hooks(pair.face, pair.peer)
            for place in pair.places:
                place.put(pair.face)
    return report


def _find(roots: list[nn.Module]) -> list[_Peer]:
    """Every peer of a model once, with all of its places; not what is inside a peer."""
    found: dict[int, _Peer] = {}
    held: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[Place, nn.Module, tuple[nn.Module, ...]]] = [(Place("", roots, 0), roots[0], ())]
    while waiting:
        place, module, around = waiting.pop()
        if id(module) in found:
            found[id(module)].places.append(place)
            found[id(module)].around.append(around)
            continue
        name = recognize(module)
        if name is not None:
            found[id(module)] = _Peer(module, name, [place], [around], [])
            continue
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside = [(inner, one, (*around, module)) for inner, one in _inside(place.path, module)]
        waiting.extend(reversed(inside))
        held.extend(_fixed(place.path, module))
    for path, module in held:
        name = recognize(module)
        if name is not None:
            found.setdefault(
                id(module), _Peer(module, name, [Place(path, {0: module}, 0)], [()], [])
            ).fixed.append(path)
    return list(found.values())


def _inside(path: str, module: nn.Module) -> Iterator[tuple[Place, nn.Module]]:
    """Children, and modules that plain attributes hold, as they are or in a list or dict."""
    prefix = f"{path}." if path else ""
    for key, child in module._modules.items():
        if child is not None:
            yield Place(f"{prefix}{key}", module._modules, key), child
    for key, value in vars(module).items():
        if key == "_modules":
            continue
        yield from _held_aside(Place(f"{prefix}{key}", vars(module), key), value, module)


def _held_aside(
    place: Place, value: object, holder: nn.Module, depth: int = 3
) -> Iterator[tuple[Place, nn.Module]]:
    """Modules of a plain attribute, but for those that hold its own module: these are the way up to the whole."""
    if isinstance(value, nn.Module):
        if not any(one is holder for one in value.modules()):
            yield place, value
    elif isinstance(value, (list, dict)) and depth:
        for inner, one in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield from _held_aside(Place(f"{place.path}[{inner!r}]", value, inner), one, holder, depth - 1)


def _fixed(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in tuples, and those whose methods are attributes here: nothing else can be put there."""
    for key, value in vars(module).items():
        where = f"{path}.{key}" if path else key
        if isinstance(value, tuple):
            yield from ((f"{where}[{i}]", one) for i, one in enumerate(value) if isinstance(one, nn.Module))
        while isinstance(value, functools.partial):
            value = value.func
        owner = getattr(value, "__self__", None) if inspect.ismethod(value) else None
        if isinstance(owner, nn.Module) and owner is not module:
            yield where, owner


def _prepare(peer: _Peer, status: str) -> tuple[Row, Face | None]:
    """The row of a peer and its face, or the reason why it has none."""
    paths = tuple(place.path for place in peer.places)
    where = paths[0] or "the model"
    if _sharded(peer):
        got = f"{where} with sharded parameters"
        refuse(ConversionError, "convert", "model", "be whole", got, "Convert it before you shard it")
    reason = _obstacle(peer)
    if reason is not None:
        return Row(paths, peer.name.name, None, "left", {}, (), reason), None
    kind = face_of(peer.name.name)
    try:
        options = kind.options_of(peer.module)
        face = kind.adopt(peer.module)
    except ValueError as error:
        return Row(paths, peer.name.name, qualified(kind), "left", {}, (), str(error)), None
    except RuntimeError:
        if not any(tensor.is_meta for tensor in (*peer.module.parameters(), *peer.module.buffers())):
            raise
        reason = "Options of it are values of its tensors, and it is on the meta device. Convert it where it has values."
        return Row(paths, peer.name.name, qualified(kind), "left", {}, (), reason), None
    carried = _unusual(peer.name.name, options)
    return Row(paths, peer.name.name, qualified(kind), status, carried, kind.differences, None), face


def _sharded(peer: _Peer) -> bool:
    """Whether this process holds a part of the parameters alone."""
    wrapped = (kind.__name__ in _SHARDING for one in _above(peer) for kind in type(one).__mro__)
    # torch's own sharded tensors, and those that DeepSpeed takes apart
    return any(wrapped) or any(
        type(one).__name__ == "DTensor" or hasattr(one, "ds_id") for one in peer.module.parameters()
    )


def _obstacle(peer: _Peer) -> str | None:
    """Why a face could not do all that this peer does."""
    module, inner = peer.module, list(peer.module.modules())
    if any(parametrize.is_parametrized(one) for one in inner):
        return "It is parametrized. Call torch.nn.utils.parametrize.remove_parametrizations, then convert."
    kinds = {
        base.__name__
        for one in inner
        for hook in one._forward_pre_hooks.values()
        for base in type(hook).__mro__
    }
    if kinds.intersection(_REWRITING):
        return (
            "A hook computes its weights (weight_norm, spectral_norm or pruning). Remove that, then convert."
        )
    if peer.name.changed:
        changes = ", ".join(peer.name.changed)
        return f"Its class {qualified(type(module))} changes or adds {changes}, which a face does not have."
    replaced = [name for name in vars(module) if inspect.isroutine(getattr(type(module), name, None))]
    if replaced:
        return f"Its method {', '.join(replaced)} was replaced on the object, as by a wrapper. Convert before that."
    if any(getattr(one, hooks) for one in inner for hooks in _STATE_HOOKS):
        return "It has hooks of its state dict, which a face does not call. Convert it, then register them."
    for name, one in module.named_modules():
        if name and any(getattr(one, hooks) for hooks in HOOKS):
            return (
                f"Its inner module {name} has hooks, which a face does not call. Put them on the quantizer."
            )
    compiled = any(type(around[-1]).__name__ == "OptimizedModule" for around in peer.around if around)
    if compiled or any(one._compiled_call_impl is not None for one in inner):
        return "It is compiled by itself, and that code runs the peer for ever. Convert it, then compile."
    if peer.fixed:
        where = ", ".join(peer.fixed)
        return f"A tuple or a method of it at {where} would go on with the peer. Hold the quantizer itself there."
    composites = [one for one in _above(peer) if is_composite(one)]
    if composites:
        return f"It is a part of {qualified(type(composites[0]))}, which has no face and works with this class alone."
    return None


def _above(peer: _Peer) -> Iterator[nn.Module]:
    yield peer.module
    for around in peer.around:
        yield from around


def _unusual(name: str, options: dict[str, object]) -> dict[str, object]:
    """Options that the peer's constructor would not choose by itself; those without a default always."""
    usual = defaults_of(name)
    return {key: value for key, value in options.items() if key not in usual or not _equal(value, usual[key])}


def _equal(value: object, default: object) -> bool:
    if default is None and value is False:
        return True
    plain = (bool, int, float, str, tuple, list)
    return value is default or (
        type(value) is type(default) and isinstance(value, plain) and value == default
    )
