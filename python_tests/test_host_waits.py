"""A step of a learner asks the device for nothing: the host runs ahead of it."""

from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("accelerate")

from small import SIZES

from vqkernels.train.config import TrainConfig
from vqkernels.train.learners.joint import make_learner
from vqkernels.train.log import Window
from vqkernels.train.model import build_model

# has shapes and no values, so that whatever asks it for one fails
DEVICE = torch.device("meta")
SMALL = {
    **SIZES,
    "steps": 40,
    "upkeep": "none",
}
GAME = {
    "adversarial": 0.8,
    "discriminator_start": 0.0,
    "discriminator_width": 4,
    "discriminator_layers": 1,
}
RUNS = {
    "ste": {"quantizer": "ste"},
    "affine": {"quantizer": "affine", "upkeep": "lru", "backbone": "takida", "optimizer": "adamw"},
    "diveq": {"quantizer": "diveq", "upkeep": "replacement", "weights_ema": 0.9},
    "ema": {"quantizer": "ema", "accumulate": 2},
    "mq": {"quantizer": "mq", "reconstruction": "l1"},
    "warm-up": {"quantizer": "sf_diveq", "upkeep": "paper", "weights_ema": 0.9},
    "game": {**GAME, "quantizer": "ste", "accumulate": 2, "weights_ema": 0.9, "backbone": "vqgan"},
}


class OneProcess:
    """As much of an Accelerator as a learner asks for; the real one knows no such device."""

    device, scaler, num_processes, process_index = DEVICE, None, 1, 0
    autocast = staticmethod(nullcontext)
    no_sync = staticmethod(nullcontext)

    def prepare(self, *parts):
        return parts if len(parts) > 1 else parts[0]

    def backward(self, loss):
        loss.backward()


class Moves(TorchDispatchMode):
    """Notes what goes from one device to another, for which the host waits too."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        devices = {value.device.type for value in args if isinstance(value, torch.Tensor)}
        if kwargs.get("device") is not None and args:
            devices.add(torch.device(kwargs["device"]).type)
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_) and len(devices) > 1:
            self.found.append(str(func))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_no_device(name):
    config = TrainConfig(**{**SMALL, **RUNS[name]})
    with DEVICE:
        learner = make_learner(config, OneProcess(), build_model(config))
        batch = torch.empty(4, 3, 16, 16)
    window = Window(learner.model.quantizer.num_indices, DEVICE)

    def step(number):
        found = learner.learn(batch, number)
        window.add(found.loss, found.mse, found.indices, found.extras)

    # moments and first codes are made in the first step
    step(0)
    with Moves() as moves:
        step(1)
    assert moves.found == []
    with pytest.raises(RuntimeError, match="meta"):
        window.line(lambda tensor: tensor)
