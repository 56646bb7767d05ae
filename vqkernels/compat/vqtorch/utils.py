"""Finding quantizers in a network, and leaving them out for a while."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from vqkernels.checks import check_kind
from vqkernels.compat.vqtorch.nn.vq import VectorQuant


def is_vq(m: object) -> bool:
    """Whether it is one of the faces of vqtorch."""
    return isinstance(m, VectorQuant)


def is_vqn(net: nn.Module) -> bool:
    """Whether a network has one."""
    return any(map(is_vq, net.modules()))


def get_vq_layers(model: nn.Module) -> list[VectorQuant]:
    """All that a network has."""
    return [part for part in model.modules() if isinstance(part, VectorQuant)]


class no_vq:
    """Quantizers of a network pass their input on, from construction until the `with` block ends.

    At the end each is as it was: one that was off before stays off, where vqtorch turns all of them on.

    Args:
        modules: a module or a list of modules.

    Raises:
        TypeError: it holds something else.
    """

    def __init__(self, modules: nn.Module | list[nn.Module]):
        self.modules = modules if isinstance(modules, list) else [modules]
        for module in self.modules:
            check_kind("no_vq", "modules", module, nn.Module, "Pass a module or a list of modules")
        layers = {layer for module in self.modules for layer in get_vq_layers(module)}
        self._before = [(layer, layer.enabled) for layer in layers]
        for layer, _ in self._before:
            layer.enabled = False

    def __enter__(self) -> None:
        """The quantizers are off already."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put them back."""
        for layer, enabled in self._before:
            layer.enabled = enabled
