"""Which face stands for which class of another library, by name alone: nothing is imported to find out."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import NamedTuple

from torch import nn

from vqkernels.compat.face import Face

_LUCIDRAINS = "vqkernels.compat.vector_quantize_pytorch"
_DIVEQ = "vqkernels.compat.diveq"
_VQTORCH = "vqkernels.compat.vqtorch"
_TAMING = "vqkernels.compat.taming"

# qualified name of a peer -> the module and the name of its face
_FACES: dict[str, tuple[str, str] | type[Face]] = {
    "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize": (_LUCIDRAINS, "VectorQuantize"),
    "vector_quantize_pytorch.residual_vq.ResidualVQ": (_LUCIDRAINS, "ResidualVQ"),
    "vector_quantize_pytorch.residual_vq.GroupedResidualVQ": (_LUCIDRAINS, "GroupedResidualVQ"),
    "vector_quantize_pytorch.sim_vq.SimVQ": (_LUCIDRAINS, "SimVQ"),
    "vector_quantize_pytorch.finite_scalar_quantization.FSQ": (_LUCIDRAINS, "FSQ"),
    "vector_quantize_pytorch.lookup_free_quantization.LFQ": (_LUCIDRAINS, "LFQ"),
    "vqtorch.nn.vq.VectorQuant": (_VQTORCH, "VectorQuant"),
    "vqtorch.nn.gvq.GroupVectorQuant": (_VQTORCH, "GroupVectorQuant"),
    "vqtorch.nn.rvq.ResidualVectorQuant": (_VQTORCH, "ResidualVectorQuant"),
    "taming.modules.vqvae.quantize.VectorQuantizer": (_TAMING, "VectorQuantizer"),
    "taming.modules.vqvae.quantize.VectorQuantizer2": (_TAMING, "VectorQuantizer2"),
    "taming.modules.vqvae.quantize.GumbelQuantize": (_TAMING, "GumbelQuantize"),
}

# diveq from an index is a package; from its repository, modules without one
for _module, _name in (
    ("diveq", "DIVEQ"),
    ("diveq_detach", "DIVEQDetach"),
    ("sf_diveq", "SFDIVEQ"),
    ("sf_diveq_detach", "SFDIVEQDetach"),
    ("residual_diveq", "ResidualDIVEQ"),
    ("residual_sf_diveq", "ResidualSFDIVEQ"),
    ("product_diveq", "ProductDIVEQ"),
    ("product_sf_diveq", "ProductSFDIVEQ"),
):
    _FACES[f"diveq.{_module}.{_name}"] = _FACES[f"{_module}.{_name}"] = (_DIVEQ, _name)

# modules of those libraries that ask their quantizers for more than a face has: their class, or its inner modules
_COMPOSITES = frozenset(
    f"vector_quantize_pytorch.{name}"
    for name in (
        "hierarchical_vq.HierarchicalVQ",
        "random_projection_quantizer.RandomProjectionQuantizer",
        "residual_fsq.ResidualFSQ",
        "residual_fsq.GroupedResidualFSQ",
        "residual_lfq.ResidualLFQ",
        "residual_lfq.GroupedResidualLFQ",
        "residual_sim_vq.ResidualSimVQ",
        "utils.Sequential",
    )
)

# a peer that hands its further keywords to the constructor of another
_INNER = {
    "vector_quantize_pytorch.residual_vq.GroupedResidualVQ": "vector_quantize_pytorch.residual_vq.ResidualVQ",
    "vector_quantize_pytorch.residual_vq.ResidualVQ": "vector_quantize_pytorch.vector_quantize_pytorch.VectorQuantize",
}

# what a class statement writes into every class
_ALWAYS = {
    "__module__",
    "__qualname__",
    "__doc__",
    "__init__",
    "__annotations__",
    "__parameters__",
    "__orig_bases__",
}
_ALWAYS |= {
    "__firstlineno__",
    "__static_attributes__",
    "__annotate__",
    "__annotate_func__",
    "__annotations_cache__",
}


class Recognized(NamedTuple):
    """A peer: its qualified name, and what its class changes of it, where it is a subclass."""

    name: str
    changed: tuple[str, ...]


def qualified(kind: type) -> str:
    """The name of a class with that of its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def recognize(module: nn.Module) -> Recognized | None:
    """Say which peer a module is, or inherits from; None for all others."""
    changed: list[str] = []
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        if qualified(kind) in _FACES:
            return Recognized(qualified(kind), tuple(dict.fromkeys(changed)))
        changed += [name for name in vars(kind) if name not in _ALWAYS]
    return None


def is_composite(module: nn.Module) -> bool:
    """Whether a module is a quantizer of a peer library around others, for which there is no face."""
    return any(qualified(kind) in _COMPOSITES for kind in type(module).__mro__)


def face_of(name: str) -> type[Face]:
    """The face that stands for a peer; its module is imported here and no sooner.

    Args:
        name: as `recognize` says.
    """
    face = _FACES[name]
    return face if isinstance(face, type) else getattr(import_module(face[0]), face[1])


def defaults_of(name: str) -> dict[str, object]:
    """What the constructor of a peer takes where a keyword is left out; its face has the same.

    Args:
        name: as `recognize` says.
    """
    inner = defaults_of(_INNER[name]) if name in _INNER else {}
    known = inspect.signature(face_of(name)).parameters.items()
    return inner | {key: one.default for key, one in known if one.default is not one.empty}


def register_face(face: type[Face]) -> type[Face]:
    """Let `convert` know a face of your own, under every name in its `peers`; a decorator of classes."""
    _FACES.update(dict.fromkeys(face.peers, face))
    return face
