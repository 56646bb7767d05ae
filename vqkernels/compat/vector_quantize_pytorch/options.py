"""Which options of `VectorQuantize` go together, and how they are read from a live peer."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import nn

from vqkernels.checks import refuse
from vqkernels.compat.face import unserved

_NAME = "VectorQuantize"


def check_options(face: Any, ema_update: bool, affine: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: they do.
    """
    ways = {
        name: True
        for name in ("straight_through", "rotation_trick", "directional_reparam")
        if getattr(face, name)
    }
    learnable, cosine = face.learnable_codebook, face.use_cosine_sim
    rules = (
        (len(ways) > 1, "straight_through, rotation_trick, directional_reparam", "exclude each other", ways),
        (cosine and learnable, "use_cosine_sim", "be False for a learnable codebook", True),
        (cosine and affine, "affine_param", "be False with use_cosine_sim", True),
        (ema_update and learnable, "ema_update", "be False for a learnable codebook", True),
        (face.straight_through and learnable, "straight_through", "be False for a learnable codebook", True),
        (
            face.sync_update_v < 0 or (face.sync_update_v > 0 and not learnable),
            "sync_update_v",
            "be 0, or positive with a learnable codebook",
            face.sync_update_v,
        ),
        (
            face.has_codebook_orthogonal_loss
            and face.orthogonal_reg_active_codes_only
            and face.heads > 1
            and face.separate_codebook_per_head,
            "orthogonal_reg_active_codes_only",
            "be False for separate codebooks",
            True,
        ),
    )
    for broken, name, requirement, got in rules:
        if broken:
            refuse(ValueError, _NAME, name, requirement, got, "Change one of the two")


def options_of(peer: Any) -> dict[str, object]:
    """The keywords that would construct a live peer, or face, anew.

    Raises:
        UnservedOption: the peer uses an option that the face does not serve.
    """
    book = peer._codebook
    bridge = getattr(book, "vq_bridge", None)
    if bridge is not None:
        unserved(_NAME, "vq_bridge", type(bridge).__name__, "Leave this module as it is")
    sampling = getattr(getattr(book, "gumbel_sample", None), "keywords", {})
    names = (
        "dim codebook_size heads separate_codebook_per_head eps freeze_codebook use_cosine_sim channel_last "
        "accept_image_fmap accept_3d_fmap commitment_weight commitment_use_cross_entropy_loss orthogonal_reg_weight "
        "orthogonal_reg_active_codes_only orthogonal_reg_max_codes codebook_diversity_loss_weight "
        "codebook_diversity_temperature rotation_trick directional_reparam directional_reparam_variance "
        "learnable_codebook manual_in_place_optimizer_update sync_update_v return_zeros_for_masked_padding "
        "route_gradients_to_input"
    )
    options: dict[str, object] = {name: getattr(peer, name) for name in names.split()}
    for name in ("decay", "kmeans_iters", "threshold_ema_dead_code", "ema_update", "manual_ema_update"):
        options[name] = getattr(book, name)
    options["codebook_dim"] = book.embed.shape[-1]
    options["layernorm_after_project_in"] = isinstance(peer.project_in, nn.Sequential)
    options["kmeans_init"] = not bool(book.initted)
    # a peer that was built before its process group does not know of it
    options["sync_codebook"] = True if book.use_ddp else None
    options["stochastic_sample_codes"] = sampling.get("stochastic", False)
    options["straight_through"] = sampling.get("straight_through", False)
    options["sample_codebook_temp"] = book.sample_codebook_temp
    if getattr(book, "affine_param", False):
        options["affine_param"] = True
        for name in ("sync_affine_param", "affine_param_batch_decay", "affine_param_codebook_decay"):
            options[name] = getattr(book, name)
    if peer.in_place_codebook_optimizer is not None:
        options["in_place_codebook_optimizer"] = _maker(peer.in_place_codebook_optimizer)
    return options


def _maker(optimizer: torch.optim.Optimizer) -> partial:
    """What makes an optimizer of the same kind and settings."""
    kind = type(optimizer)
    accepted = inspect.signature(kind).parameters
    return partial(kind, **{name: value for name, value in optimizer.defaults.items() if name in accepted})
