"""Peer and face on the inputs that a model gives them; copies do the work, so that nothing of the model changes."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vqkernels.checks import refuse
from vqkernels.compat.agreement import Check, compare
from vqkernels.compat.face import HOOKS, Face, UnservedOption, share_tensors

_Module = TypeVar("_Module", bound=nn.Module)
Batch = Tensor | Sequence[object] | Mapping[str, object]

# what wraps a model, talks to other processes or compiles, and computes what the wrapped one does
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


class Place(NamedTuple):
    """Where a module hangs: a path of names, and the table and the key that hold it."""

    path: str
    table: Any
    key: object

    def put(self, module: nn.Module) -> None:
        """Let the place hold another module."""
        self.table[self.key] = module


class Pair(NamedTuple):
    """A peer, its face (None for a peer that stays), the places that hold the one or the other, and what is around."""

    peer: nn.Module
    face: Face | None
    places: tuple[Place, ...]
    around: tuple[nn.Module, ...] = ()

    @property
    def path(self) -> str:
        """All of its paths."""
        return ", ".join(place.path or "(the model)" for place in self.places)


def verify(roots: Sequence[nn.Module], pairs: Sequence[Pair], batch: Batch) -> tuple[Check, ...]:
    """Run one forward of a model in eval mode, and compare peer and face on whatever their places are called with.

    Parameters, buffers, modes and random generators are left as they were.

    Args:
        roots: the model alone, in a table that a pair may have as its place.
        pairs: its quantizers; those without a face run and are not compared.
        batch: what forward takes: a tensor, a sequence of positional arguments or a mapping of keywords.

    Returns:
        A check for every pair that has a face.

    Raises:
        TypeError: batch is none of the three.
        ValueError: the model has no values, for it is on the meta device.
    """
    args, kwargs = _arguments(batch)
    model = roots[0]
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        refuse(
            ValueError, "convert", "model", "have values to verify on", "the meta device", "Leave verify out"
        )
    found = {index: Check(pair.path) for index, pair in enumerate(pairs) if pair.face is not None}
    inner = {id(inside) for pair in pairs for place in pair.places for inside in _held(place).modules()}
    # plain attributes may hold what the model does not list
    tops = (model, *(module for pair in pairs for module in pair.around))
    modules = list({id(one): one for top in tops for one in top.modules()}.values())
    with (
        torch.no_grad(),
        _same_generators(model),
        _same_state(modules, inner),
        _eager(),
        ExitStack() as stack,
    ):
        for index, pair in enumerate(pairs):
            if pair.face is not None:
                # buffers become others when the one that the model holds is moved
                held = _held(pair.places[0])
                share_tensors(pair.face if held is pair.peer else pair.peer, held)
            stand_in = settled(pair.peer)
            if pair.face is not None:
                for entry, judged in pair.face.entries.items():
                    setattr(stand_in, entry, _comparing(found, index, pair, pair.face, entry, judged))
            for place in pair.places:
                stack.callback(place.put, _held(place))
                place.put(stand_in)
        root = roots[0]
        while type(root).__name__ in _WRAPPERS:
            root = getattr(root, _WRAPPERS[type(root).__name__])
        root(*args, **kwargs)
    return tuple(found.values())


def settled(module: _Module) -> _Module:
    """A copy in eval mode without hooks: those are not copied, for they may hold anything."""
    memo: dict[int, object] = {
        id(getattr(inside, hooks)): OrderedDict() for inside in module.modules() for hooks in HOOKS
    }
    found = copy.deepcopy(module, memo)
    for inside in found.modules():
        inside.training = False
    return found


def _comparing(
    found: dict[int, Check], index: int, pair: Pair, face: Face, entry: str, judged: str
) -> Callable[..., object]:
    """A method that does what the peer's does, and compares peer and face on the way."""

    def method(*args: object, **kwargs: object) -> object:
        def run(module: nn.Module, name: str) -> Any:
            return getattr(module, name)(*args, **kwargs)

        # a copy for each call: some change their state in eval mode too
        returned = run(settled(pair.peer), entry)
        moved = settled(pair.peer)
        theirs = run(moved, judged)
        x = args[0] if args else next(iter(kwargs.values()))

        def checked(state: Face) -> Check:
            ours = run(settled(state), judged)
            again = settled(pair.peer)
            return compare(pair.path, settled(state), x, theirs, ours, lambda: run(again, judged))

        try:
            check = checked(face)
            if check.failures or check.differing:
                # the peer may have quantized with what this very call changed, such as moments
                after = settled(face)
                share_tensors(after, moved)
                second = checked(after)
                if not second.failures and (check.failures or second.differing < check.differing):
                    note = (
                        "The peer changes its state in eval mode; this is the face in the state that it left."
                    )
                    check = second._replace(notes=(*second.notes, note))
        except UnservedOption as error:
            check = Check(pair.path, 1, failures=(str(error),))
        found[index] = found[index].plus(check)
        return returned

    return method


def _held(place: Place) -> nn.Module:
    return place.table[place.key]


def _arguments(batch: Batch) -> tuple[Sequence[object], Mapping[str, object]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), batch
    if isinstance(batch, (tuple, list)):
        return batch, {}
    fix = "Pass what the forward of the model takes"
    got = type(batch).__name__
    refuse(
        TypeError, "convert", "verify", "be a tensor, a tuple of arguments or a dict of keywords", got, fix
    )


@contextmanager
def _same_generators(model: nn.Module) -> Iterator[None]:
    """Leave the random generators of torch and of Python as they were."""
    state = random.getstate()
    kinds = {(tensor.device.type, tensor.device.index) for tensor in (*model.parameters(), *model.buffers())}
    devices = sorted(
        (kind, index) for kind, index in kinds if kind not in ("cpu", "meta") and index is not None
    )
    kind = devices[0][0] if devices else "cuda"
    with torch.random.fork_rng([index for one, index in devices if one == kind], device_type=kind):
        try:
            yield
        finally:
            random.setstate(state)


@contextmanager
def _same_state(modules: Sequence[nn.Module], inner: set[int]) -> Iterator[None]:
    """Set eval mode, and leave modes, and the buffers of all modules that are not in `inner`, as they were."""
    modes = [(module, module.training) for module in modules]
    # what torch.jit made holds its buffers for itself
    owners = [m for m, _ in modes if id(m) not in inner and not isinstance(m, torch.jit.ScriptModule)]
    tables = [(module._buffers, dict(module._buffers)) for module in owners]
    values = {id(b): (b, b.clone()) for m, _ in modes if id(m) not in inner for b in m.buffers(recurse=False)}
    try:
        for module, _ in modes:
            # the flag alone: modules may do more in train() and eval()
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for table, entries in tables:
            table.clear()
            table.update(entries)
        for buffer, value in values.values():
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _eager() -> Any:
    """Compile nothing for a single forward; a process that has no compiler yet loads none."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
