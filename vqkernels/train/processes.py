"""Several processes: how they find each other, and what keeps n of them on the path of one."""

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vqkernels.checks import refuse
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.learners.procedure import mean_over_ranks

Model = TypeVar("Model", bound=nn.Module)


def make_accelerator(config: TrainConfig, tracker: Any = None) -> Accelerator:
    """Join the other processes of the launcher, if there is one.

    Args:
        config: of the run.
        tracker: what Accelerate logs with; None for nothing.

    Returns:
        What places tensors and reduces over processes.

    Raises:
        RunError: the device lacks the precision, the launcher asks for another way of sharding, or the batch cannot
            be shared out.
    """
    for plugin in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{plugin}", "false").lower() == "true":
            # their wrappers would shard, cast or leave out the codes, which kernels and upkeep need whole
            requirement = "start plain processes"
            fix = "Launch without that plugin and pass --shard to shard the model"
            refuse(RunError, "train", "launcher", requirement, f"Accelerate's {plugin} plugin", fix)
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", config.precision):
        fix = f"Pass --precision {told}, or launch without it"
        refuse(RunError, "train", "precision", f"be the launcher's {told!r}", repr(config.precision), fix)
    # torchrun tells nobody that there is no GPU, and Accelerate would run every process on its own
    cpu = not torch.accelerator.is_available()
    if config.precision == "fp16" and cpu:
        # accelerate would train in float32 without a word
        fix = "Pass --precision bf16 or no"
        refuse(RunError, "train", "precision", "be one that this device has", "'fp16' on cpu", fix)
    if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # on many threads per process Accelerate would say that it sets one
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    # what an earlier run of this process has set up; the group of processes stays
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=config.precision,
            log_with=tracker,
            project_dir=config.out,
        )
    except ValueError as error:
        got = f"{config.precision!r} ({str(error).rstrip('.')})"
        refuse(RunError, "train", "precision", "be one that this device has", got, "Pass --precision no")
    if config.batch_size % (accelerator.num_processes * config.accumulate):
        requirement = f"be a multiple of the {accelerator.num_processes} processes"
        if config.accumulate > 1:
            requirement += f" times {config.accumulate} parts"
        refuse(RunError, "train", "batch_size", requirement, config.batch_size, "Pass such a --batch-size")
    return accelerator


def joint_statistics(model: Model, accelerator: Accelerator) -> Model:
    """Let batch statistics be those of the joint batch.

    Args:
        model: before its optimizer is made.
        accelerator: of the process.

    Returns:
        The model, its layers of batch statistics replaced where there are several processes.

    Raises:
        RunError: there are such layers and several processes on CPUs, for which torch has no such replacement.
    """
    parts = [name for name, part in model.named_modules() if isinstance(part, _BatchNorm)]
    if accelerator.num_processes == 1 or not parts:
        return model
    if accelerator.device.type == "cpu":
        got = f"batch statistics in {parts[0]} and {accelerator.num_processes} processes"
        fix = "Pass --backbone diveq or vqgan, or start one process"
        refuse(RunError, "train", "backbone", "have none on several CPU processes", got, fix)
    # in place, for a model that is no such layer itself
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def leave_out(model: nn.Module, part: str) -> None:
    """Tell DistributedDataParallel to leave a part alone, whose gradients `average_gradients` averages.

    Args:
        model: to be wrapped.
        part: name of its quantizer, which has no gradient in a warm-up or where its codes are means, and whose
            buffers are alike on every rank without a broadcast.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    names = [name for name, _ in tensors if name.startswith(f"{part}.")]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def average_gradients(part: nn.Module) -> None:
    """Replace the gradients of a part by their means over ranks, in one reduction; alike on every rank.

    Args:
        part: whose parameters are whole on every rank.
    """
    parameters = [parameter for parameter in part.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for parameter, gradient in zip(parameters, mean_over_ranks(gradients), strict=True):
        parameter.grad = gradient


def leave() -> None:
    """Leave the group of processes after the last run, so that its end is no surprise to the others."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
