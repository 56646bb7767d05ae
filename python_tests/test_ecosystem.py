"""What training code does to a module, for every short name: accumulate, checkpoint, autocast, copy, move, compile."""

import copy
import io

import pytest
import torch
from conftest import INTERPRETED
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqkernels.nn import (
    METHODS,
    Codebook,
    ImportanceReplacement,
    LatentMeans,
    TwoPhase,
    VectorQuantizer,
    build,
)
from vqkernels.testing import DEVICE, brute_force

EVERY = pytest.mark.parametrize("name", list(METHODS))
pytestmark = pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")
D, K, N = 6, 16, 48
WARM = [name for name, method in METHODS.items() if method.upkeep]


def make(name, *, warm_up=0, replace=True):
    """A quantizer with codes that normal latents reach, and the upkeep that its method takes."""
    torch.manual_seed(1)
    method = METHODS[name]
    upkeep = [LatentMeans(warm_up, latents_per_code=2)] if warm_up else []
    if replace and method.upkeep and not method.segments:
        upkeep.append(ImportanceReplacement(TwoPhase(99, 2, stop_before=0), threshold=0.5))
    quantizer = build(name, dim=D, num_codes=K, upkeep=upkeep).to(DEVICE)
    for part in quantizer.modules():
        if isinstance(part, Codebook) and part.assignable:
            part.assign(torch.randn(part.num_codes, part.dim, device=DEVICE))
    return quantizer


def optimizer_of(*modules):
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.Adam([*parameters, nn.Parameter(torch.zeros((), device=DEVICE))], 1e-2)


def backward(z, loss):
    # not the sum of squares: that is a constant on the unit sphere
    (z * torch.linspace(1, 2, D, device=z.device)).float().sum().add(loss).backward()


def step(quantizer, optimizer, x, run=None):
    """One training step from a given seed; all that another way to run it must give as well."""
    optimizer.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(4)
    z, indices, loss = (run or quantizer)(x)
    backward(z, loss)
    gradients = {key: parameter.grad.clone() for key, parameter in quantizer.named_parameters()}
    optimizer.step()
    return {"z": z.detach(), "indices": indices, "loss": loss.detach(), "x": x.grad, **gradients}


def state(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def check_equal(found, expected, **close):
    """The same tensors, to the bit where no tolerance is given."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if close and value.is_floating_point():
            torch.testing.assert_close(found[key], value, msg=lambda words, key=key: f"{key}: {words}", **close)
        else:
            assert torch.equal(found[key], value), key


@EVERY
def test_gradient_accumulation(name):
    """Two half batches before a step are counted like one batch, and committed once."""
    x = torch.randn(N, D, device=DEVICE)
    results = []
    for parts in ([x], x.chunk(2)):
        quantizer = make(name)
        optimizer = optimizer_of(quantizer)
        quantizer.follow(optimizer)
        seen = []
        for rows in parts:
            z, indices, loss = quantizer(rows.clone().requires_grad_())
            backward(z, loss / len(parts))
            seen.append(indices)
        counted = state(quantizer)
        # what moves the codes besides statistics has its own tests: a mean of means has another noise
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        assert quantizer.get_extra_state().tolist() == [1, 0]
        results.append((torch.cat(seen), counted, state(quantizer)))
    (indices, *whole), (chosen, *halves) = results
    for key, value in halves[0].items():
        if key.endswith("counts"):
            assert value.sum() == N, key
    if torch.equal(indices, chosen):
        # sums of N rows in another order
        bound = N * torch.finfo(torch.float32).eps
        for found, expected in zip(halves, whole, strict=True):
            check_equal(found, expected, rtol=bound, atol=bound)
    else:
        # two forwards draw two seeds
        assert quantizer.noisy


@EVERY
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name, reentrant):
    """A forward that is run again in the backward pass counts once and draws the same noise: equal to the bit."""
    warm_up = 1 if METHODS[name].warm_up else 0
    results = []
    for recompute in (False, True):
        quantizer = make(name, warm_up=warm_up)
        optimizer = optimizer_of(quantizer)
        quantizer.follow(optimizer)

        def run(x, recompute=recompute, quantizer=quantizer):
            return checkpoint(quantizer, x, use_reentrant=reentrant) if recompute else quantizer(x)

        generator = torch.Generator().manual_seed(2)
        seen = {}
        for number in range(3):
            x = torch.randn(N, D, generator=generator).to(DEVICE)
            seen |= {f"{number} {key}": v for key, v in step(quantizer, optimizer, x, run).items()}
        results.append(seen | state(quantizer))
    check_equal(results[1], results[0])
