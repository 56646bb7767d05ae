"""Fast, exact vector quantization for neural networks."""

from importlib import import_module
from typing import TYPE_CHECKING

from vqkernels.dispatch import BackendError as BackendError
from vqkernels.dispatch import use_backend as use_backend
from vqkernels.ops import code_sums as code_sums
from vqkernels.ops import directional as directional
from vqkernels.ops import diveq as diveq
from vqkernels.ops import nearest_code as nearest_code
from vqkernels.ops import nearest_segment as nearest_segment
from vqkernels.ops import prepare as prepare
from vqkernels.ops import sf_diveq as sf_diveq
from vqkernels.ops import straight_through as straight_through

if TYPE_CHECKING:
    from vqkernels.compat.conversion import convert as convert
    from vqkernels.profiling import profile as profile

__version__ = "0.1.0"

# what needs modules, or more, waits until somebody asks
_LATER = {"convert": "vqkernels.compat.conversion", "profile": "vqkernels.profiling"}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
