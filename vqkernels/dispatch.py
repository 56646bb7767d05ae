"""Backend dispatch: which implementation of an op runs, why, and how torch gets to know it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("native", "triton", "reference")

# the order in which backends are tried, by device type; triton on the cpu is the interpreter, a tool for tests
_ORDER = {
    "cpu": ("native", "reference", "triton"),
    "cuda": ("triton", "native", "reference"),
}

_NAMESPACE = {"native": "vqkernels", "triton": "vqkernels_triton", "reference": "vqkernels_reference"}

# torch unregisters an op when its library object dies, so they live as long as the process
_LIBRARIES: dict[str, torch.library.Library] = {}

# a module global and not a ContextVar: torch.compile guards the one and cannot trace the other
_forced: str | None = os.environ.get("VQKERNELS_BACKEND") or None


class BackendError(RuntimeError):
    """No backend, or not the one asked for, can run these inputs."""


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: what users write in `backend=`: `"native"`, `"triton"` or `"reference"`.
        run: takes the op's arguments, returns the op's outputs.
        why_not: takes (device, dtypes) and returns None when `run` accepts them, else one sentence that says
            what it would need. It speaks of capability only and never reads a tensor's values.
        prepare: takes what does not change between calls and returns tensors that spare `run` work, or None
            where there is nothing to spare.
    """

    name: str
    run: Callable
    why_not: Callable[[torch.device, tuple[torch.dtype, ...]], str | None]
    prepare: Callable[..., list[Tensor]] | None = None


class Op:
    """A function of tensors with one schema, one reference and any number of faster backends.

    Every backend is registered with torch under the same schema and the same fake kernel, so `torch.compile`
    sees one opaque call whichever backend runs.

    Args:
        name: the op's name, the same word in csrc, kernels, ops, tests and bench.
        schema: torch schema without the name, e.g. `"(Tensor x) -> Tensor"`.
        reference: the specification, in PyTorch.
        fake: shapes, dtypes and strides of the outputs, for tensors without data.
    """

    def __init__(self, name: str, schema: str, *, reference: Callable, fake: Callable):
        self.name, self.schema, self.fake = name, schema, fake
        self.backends: dict[str, Backend] = {}
        self.add("reference", reference, why_not=_needs_float64)

    def add(self, name: str, run: Callable, *, why_not: Callable, prepare: Callable | None = None) -> None:
        """Register a backend written in Python."""
        namespace = _NAMESPACE[name]
        if namespace not in _LIBRARIES:
            _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
        _LIBRARIES[namespace].define(self.name + self.schema)
        _LIBRARIES[namespace].impl(self.name, run, "CompositeExplicitAutograd")
        self._add_defined(name, why_not, prepare)

    def add_native(self, missing: str | None, *, why_not: Callable, prepare: Callable | None = None) -> None:
        """Register the op of the compiled library, or the sentence that says why the library is missing."""
        if missing is None:
            self._add_defined("native", why_not, prepare)
        else:
            self.backends["native"] = Backend("native", _missing, why_not)

    def _add_defined(self, name: str, why_not: Callable, prepare: Callable | None) -> None:
        namespace = _NAMESPACE[name]
        torch.library.register_fake(f"{namespace}::{self.name}", self.fake)
        packet = getattr(getattr(torch.ops, namespace), self.name)
        self.backends[name] = Backend(name, packet.default, why_not, prepare)

    def __call__(self, *args, backend: str | None = None):
        """Run the op on the backend asked for, or on the first that accepts the arguments."""
        return self.select(*args, backend=backend).run(*args)

    def select(self, *args, backend: str | None = None) -> Backend:
        """The backend that will run `args`; reads devices and dtypes only."""
        device, dtypes = _traits(args)
        wanted = _forced if backend is None else backend
        for name in _ORDER.get(device.type, ("reference",)) if wanted is None else (wanted,):
            candidate = self.backends.get(name)
            if candidate is not None and candidate.why_not(device, dtypes) is None:
                return candidate
        raise BackendError(self._refusal(wanted, device, dtypes))

    def explain(self, *args) -> dict[str, str | None]:
        """For each backend, in the order tried: None when it would run `args`, else what it would need."""
        return self.explain_for(*_traits(args))

    def explain_for(
        self, device: torch.device, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    ) -> dict[str, str | None]:
        """Like `explain`, from a device and the dtypes of the floating-point arguments."""
        order = _ORDER.get(device.type, ())
        names = (*order, *(name for name in BACKENDS if name not in order))
        return {name: self._reason(name, device, dtypes) for name in names}

    def _reason(self, name: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
        if name not in self.backends:
            return f"it has no body for {self.name}"
        return self.backends[name].why_not(device, dtypes)

    def _refusal(self, wanted: str | None, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str:
        if wanted is not None and wanted not in BACKENDS:
            return unknown_backend(self.name, wanted)
        if wanted is not None:
            reason = self._reason(wanted, device, dtypes)
            return (
                f"{self.name}: backend {wanted!r} cannot run these inputs: {reason}. Choose another backend."
            )
        reasons = "; ".join(f"{name}: {why}" for name, why in self.explain_for(device, dtypes).items())
        return (
            f"{self.name}: no backend can run these inputs: {reasons}. Move the inputs to the cpu or to cuda."
        )


def forced_backend() -> str | None:
    """The backend that `use_backend` or the environment forces, or None."""
    return _forced


def unknown_backend(op: str, name: str) -> str:
    """The sentence that refuses a backend nobody knows."""
    return f"{op}: backend must be one of {', '.join(map(repr, BACKENDS))}; got {name!r}. Pass one of these names."


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the block, process-wide; it never falls back.

    Args:
        name: `"native"`, `"triton"` or `"reference"`.

    Raises:
        BackendError: `name` is none of these; and, from ops inside the block, where it cannot run their inputs.
    """
    global _forced
    if name not in BACKENDS:
        raise BackendError(unknown_backend("use_backend", name))
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def _traits(args: tuple) -> tuple[torch.device, tuple[torch.dtype, ...]]:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return tensors[0].device, tuple(t.dtype for t in tensors if t.is_floating_point())


def _missing(*args) -> None:
    raise BackendError("native: the extension is missing. Ask `python -m vqkernels info` why.")


def _needs_float64(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> str | None:
    # the specification is written in float64, which apple's gpus do not have
    return "it needs a device with float64" if device.type == "mps" else None
