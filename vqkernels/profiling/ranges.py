"""Ranges that a profiler shows: every quantizer of a model by its path, and on a GPU every op for Nsight."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.utils.hooks import RemovableHandle

from vqkernels.compat.face import Face
from vqkernels.nn import Quantizer

# how the name of a quantizer's range begins
PREFIX = "vqkernels: "
# what Nsight Systems tells the processes it starts
_NSIGHT = "NSYS_PROFILING_SESSION_ID"


def quantizers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost quantizers of a model by path: ours, faces, and those of libraries that `convert` knows.

    Args:
        model: to walk; nothing is imported for it that is not there already.
    """
    from vqkernels.compat.registry import is_composite, recognize

    found: dict[str, nn.Module] = {}
    within: list[str] = []
    for path, module in model.named_modules():
        if any(not outer or path.startswith(f"{outer}.") for outer in within):
            continue
        ours = isinstance(module, (Quantizer, Face))
        if ours or recognize(module) is not None or is_composite(module):
            found[path] = module
            within.append(path)
    return found


@contextmanager
def ranges(model: nn.Module, *, nvtx: bool | None = None) -> Iterator[dict[str, nn.Module]]:
    """Name the quantizers of a model in whatever profiler runs inside the block.

    The ops need nothing: torch names them itself, `vqkernels::nearest_code` of the compiled backend,
    `vqkernels_triton::` and `vqkernels_reference::` of the others. Outside of the block nothing is left, so that a
    step that nobody looks at pays nothing.

    Args:
        model: whose quantizers get the range "vqkernels: <path>" around their forward and their commits.
        nvtx: whether every op becomes an NVTX range, which excludes torch's own profiler inside the block; where Nsight
            Systems has started this process when left out.

    Yields:
        The quantizers by path.
    """
    found = quantizers_of(model)
    if nvtx is None:
        nvtx = torch.cuda.is_available() and _NSIGHT in os.environ
    with ExitStack() as stack:
        for path, module in found.items():
            for handle in _named(path, module):
                stack.callback(handle.remove)
            if isinstance(module, Quantizer):
                stack.callback(_name_commits(path, module))
        if nvtx:
            stack.enter_context(torch.autograd.profiler.emit_nvtx())
        yield found


def range_name(path: str) -> str:
    """The name of a quantizer's range."""
    return PREFIX + (path or "model")


def _named(path: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    # a module may run inside itself, so a stack of what is open
    opened: list[record_function] = []

    def enter(*_: object) -> None:
        opened.append(record_function(range_name(path)))
        opened[-1].__enter__()

    def leave(*_: object) -> None:
        # a module that was entered before the block has no range
        if opened:
            opened.pop().__exit__(None, None, None)

    # the end counts also where a forward raises
    return (
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    )


def _name_commits(path: str, module: Quantizer) -> Callable[[], object]:
    commit = module.commit

    def named(optimizer: torch.optim.Optimizer | None = None) -> None:
        with record_function(range_name(path)):
            commit(optimizer)

    # hooks of the optimizer look it up at each step
    module.__dict__["commit"] = named
    return lambda: module.__dict__.pop("commit", None)
