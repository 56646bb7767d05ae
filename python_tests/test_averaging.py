"""Moving averages of weights: the recursion, codes and buffers, swapping, resuming."""

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vqkernels.models import VQVAE, TakidaVAE
from vqkernels.nn import ImportanceReplacement, LatentMeans, TwoPhase, build
from vqkernels.train.learners.averaging import WeightAverage
from vqkernels.train.learners.procedure import split_parameters


def make(method="ste", kind=VQVAE, upkeep=()):
    torch.manual_seed(0)
    quantizer = build(method, dim=4, num_codes=8, channel_dim=1, upkeep=list(upkeep))
    return kind(quantizer, width=4, latent_dim=4, residual_blocks=1)


def trainer(model, average):
    """One optimizer step and one update a call."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.quantizer.follow(optimizer)

    def step():
        images = torch.rand(2, 3, 8, 8)
        reconstruction, _, loss = model(images)
        optimizer.zero_grad()
        ((reconstruction - images).square().mean() + loss).backward()
        optimizer.step()
        average.update()

    return step


def averages(average, model):
    with average.applied():
        return {name: value.clone() for name, value in model.state_dict().items()}


def test_equals_its_recursion():
    model = make().double()
    average = WeightAverage(model, 0.4)
    weight = model.last_layer
    expected = weight.detach().clone()
    for n in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        decay = 0.0 if n == 0 else min(0.4, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.detach()
        with average.applied():
            # three roundings an update
            bound = 3 * (n + 1) * torch.finfo(torch.float64).eps * 12
            assert (model.last_layer - expected).abs().max() <= bound
            assert model.last_layer is weight
    assert not torch.equal(weight, expected)


def test_own_weights_return_even_after_an_error():
    model = make()
    average = WeightAverage(model, 0.9)
    step = trainer(model, average)
    for _ in range(3):
        step()
    own = {name: value.clone() for name, value in model.state_dict().items()}
    inside = averages(average, model)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert all(torch.equal(own[name], value) for name, value in model.state_dict().items())
    assert all(not torch.equal(own[name], inside[name]) for name, _ in model.named_parameters())
    model(torch.rand(1, 3, 8, 8)).reconstruction.sum().backward()


def test_buffers_are_the_models_own():
    model = make("ema", TakidaVAE)
    average = WeightAverage(model, 0.9)
    step = trainer(model, average)
    for _ in range(3):
        step()
    inside = averages(average, model)
    buffers = dict(model.named_buffers())
    assert any(value.dtype == torch.int64 for value in buffers.values())
    assert "quantizer.codebook.weight" in buffers
    for name, value in buffers.items():
        assert torch.equal(inside[name], value), name


def test_codes_are_averaged_like_weights():
    model = make("ste")
    average = WeightAverage(model, 0.9)
    step = trainer(model, average)
    codes = split_parameters(model)[0][0]
    expected = None
    for n in range(4):
        step()
        decay = (1 + n) / (10 + n)
        now = codes.detach().clone()
        expected = now if expected is None else decay * expected + (1 - decay) * now
    with average.applied():
        bound = 12 * torch.finfo(torch.float32).eps * expected.abs().max()
        assert (codes - expected).abs().max() <= bound


def test_codes_are_copied_while_they_jump():
    upkeep = [LatentMeans(3), ImportanceReplacement(TwoPhase(12, 3, stop_before=0), threshold=1.0)]
    model = make("diveq", upkeep=upkeep)
    average = WeightAverage(model, 0.9)
    step = trainer(model, average)
    codes, weight = split_parameters(model)[0][0], model.last_layer
    copied, replaced = [], 0
    for _ in range(12):
        step()
        now = sum(int(part.history[3]) for part in model.quantizer.upkeep)
        initialized = model.quantizer.initialized
        own, own_weight = codes.detach().clone(), weight.detach().clone()
        with average.applied():
            same = torch.equal(codes, own)
            copied.append((same, initialized, now > replaced))
            assert torch.equal(weight, own_weight) == (len(copied) == 1)
        replaced = now
    assert all(same for same, initialized, jumped in copied if jumped or not initialized)
    # the start after the warm-up, and replacements
    assert sum(jumped for *_, jumped in copied) > 1
    assert not all(same for same, *_ in copied)


def test_resumed_averages_are_bit_for_bit_the_same():
    model = make("diveq")
    average = WeightAverage(model, 0.9)
    step = trainer(model, average)
    for _ in range(3):
        step()
    buffer = io.BytesIO()
    torch.save({"average": average.state_dict(), "model": model.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other = make("diveq")
    other.load_state_dict(saved["model"])
    resumed = WeightAverage(other, 0.9)
    resumed.load_state_dict(saved["average"])
    for each, taken in ((model, average), (other, resumed)):
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.mul_(1.01)
        taken.update()
    first, second = averages(average, model), averages(resumed, other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_refusals():
    model = make()
    with pytest.raises(ValueError, match=r"WeightAverage: decay must be in \[0, 1\); got 1"):
        WeightAverage(model, 1.0)
    with pytest.raises(TypeError, match=r"WeightAverage: model must have a Module as its encoder; got none"):
        WeightAverage(nn.Identity(), 0.9)
    state = WeightAverage(model, 0.9).state_dict()
    del state["average.0"]
    with pytest.raises(ValueError, match=r"WeightAverage: state must hold the averages of \d+ parameters"):
        WeightAverage(model, 0.9).load_state_dict(state)


def test_an_update_moves_nothing_between_devices():
    """What moves from the host to a GPU at every step makes the host wait for it."""
    moved = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten._local_scalar_dense):
                moved.append(func)
            return func(*args, **(kwargs or {}))

    # a device of its own, without which the host and the device would be one here
    with torch.device("meta"):
        model = make(upkeep=[ImportanceReplacement(TwoPhase.scaled(10))])
    average = WeightAverage(model, 0.9)
    average.update()
    with Watch():
        average.update()
    assert not moved
