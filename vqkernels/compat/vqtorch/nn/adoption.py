"""Reading a live layer of vqtorch, without importing it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vqkernels.compat.face import unserved

if TYPE_CHECKING:
    from vqkernels.compat.vqtorch.nn.vq import VectorQuant


def options_of(name: str, peer: Any) -> dict[str, object]:
    """The keywords of `VectorQuant` that the layer was made with, as it is now.

    Raises:
        UnservedOption: it was changed by hand to what the face called `name` does not serve.
    """
    affine = getattr(peer, "affine_transform", None)
    if affine is not None and affine.use_running_statistics:
        fix = "Use vqkernels.nn.AffineEMACodebook"
        unserved(name, "affine_transform.use_running_statistics", True, fix)
    if peer.topk != 1:
        unserved(name, "topk", peer.topk, "Set it to 1")
    hook = _replacement(peer)
    if hook is not None and hook.policy != "input_random":
        unserved(name, "policy", repr(hook.policy), "Set it to 'input_random'")
    optimizer = getattr(peer, "inplace_codebook_optimizer", None)
    return {
        "feature_size": peer.feature_size,
        "num_codes": peer.num_codes,
        "beta": peer.beta,
        "sync_nu": peer.nu,
        "affine_lr": 0.0 if affine is None else affine.lr_scale,
        "affine_groups": 1 if affine is None else affine.num_groups,
        "replace_freq": 0 if hook is None else hook.timeout,
        "inplace_optimizer": None if optimizer is None else partial(_given, optimizer),
        "dim": peer.dim,
        "norm": peer.norm,
        "cb_norm": peer.codebook_norm,
        "kmeans_init": "data_initialized" in peer._buffers,
    }


def carry(face: VectorQuant, peer: Any) -> None:
    """Give a face the layer's own submodules, switch and optimizer; hooks that start or replace codes stay behind."""
    face.enabled = peer.enabled
    face.codebook = peer.codebook
    if face.norm in ("bn", "gn", "in"):
        face.norm_layer = peer.norm_layer
    hook = _replacement(peer)
    if hook is not None:
        face.replace_rho = hook.rho
    for number, each in list(face._forward_hooks.items()):
        if each is hook or getattr(each, "__name__", "") == "data_dependent_init_forward_hook":
            del face._forward_hooks[number]
    optimizer, weight = face.inplace_codebook_optimizer, face.codebook.weight
    if optimizer is not None and not any(weight is p for g in optimizer.param_groups for p in g["params"]):
        # in groups the peer's holds an embedding that is no longer there
        optimizer.state.clear()
        optimizer.param_groups[0]["params"] = [weight]


def _given(optimizer: torch.optim.Optimizer, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return optimizer


def _replacement(peer: Any) -> Any:
    """The layer's replacement of codes, which is a hook."""
    hooks = (hook for hook in peer._forward_hooks.values() if type(hook).__name__ == "ReplaceLRU")
    return next(hooks, None)
