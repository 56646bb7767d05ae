"""Sharding a model over processes (FSDP), with its quantizer whole on each of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from vqkernels.models import ImageAutoencoder
from vqkernels.train.learners.procedure import check_model


def shard_model(model: ImageAutoencoder, mesh: DeviceMesh | None = None) -> None:
    """Shard all of a model but its quantizer by torch's `fully_shard`, in place; before its optimizer is made.

    Codes are written in place by upkeep and read by kernels, so every rank keeps the quantizer whole, plain and in its
    own dtype. `vqkernels.train.processes.average_gradients(model.quantizer)` after a backward averages its gradients.

    `model.state_dict()` is that of the whole model, on the CPU, and `load_state_dict` takes one; both are collective.

    Args:
        model: with encoder, quantizer and decoder, on the device and alike on every rank.
        mesh: of the ranks to shard over; all of them when left out.

    Raises:
        TypeError: the model lacks one of the three.
    """
    check_model("shard_model", model)
    kept = set(model.quantizer.parameters())
    for parameter in model.parameters():
        if parameter not in kept:
            # what is cut into pieces has no memory format
            parameter.data = parameter.data.contiguous()
    if mesh is None:
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for half in (model.encoder, model.decoder):
        for block in _blocks(half):
            fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)
    model.register_state_dict_post_hook(_whole_model)
    model.register_load_state_dict_pre_hook(_shard_loaded_model)


def shard_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let the state of an optimizer be saved whole, on the CPU, and loaded from such; both are then collective.

    Args:
        optimizer: of a sharded model's parameters.
    """
    optimizer.register_state_dict_post_hook(lambda _, state: _whole(state))
    optimizer.register_load_state_dict_pre_hook(_shard_loaded_optimizer)


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Gradients of a sharded model inside are added up on each rank, and reduced by the next backward outside.

    Args:
        model: that `shard_model` sharded.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.set_requires_gradient_sync(True, recurse=False)


def _blocks(half: nn.Module) -> Iterator[nn.Module]:
    for child in half.children():
        # a list has no forward that could gather its parameters
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _whole(value: Any) -> Any:
    """A nested state with whole tensors on the CPU."""
    if isinstance(value, DTensor):
        return value.full_tensor().cpu()
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {key: _whole(one) for key, one in value.items()}
    return value


def _sharded(value: Tensor, like: object) -> Tensor:
    """This rank's part of a whole tensor, where there is a sharded one of its shape."""
    if not isinstance(like, DTensor) or isinstance(value, DTensor) or value.shape != like.shape:
        return value
    # every rank has read the same file
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _whole_model(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
    state.update(_whole(dict(state)))


def _shard_loaded_model(model: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, parameter in model.named_parameters(prefix=prefix.removesuffix(".")):
        if name in state:
            state[name] = _sharded(state[name], parameter)


def _shard_loaded_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    numbers = (number for group in state["param_groups"] for number in group["params"])
    held = (parameter for group in optimizer.param_groups for parameter in group["params"])
    parts = {}
    for number, parameter in zip(numbers, held, strict=True):
        if number in state["state"]:
            saved = state["state"][number]
            parts[number] = {
                name: _sharded(v, parameter) if isinstance(v, Tensor) else v for name, v in saved.items()
            }
    return state | {"state": parts}
