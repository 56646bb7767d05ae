"""Training against a discriminator: its losses, gradients, start, accumulation, resuming and processes."""

import copy
import io
import math
import os
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import two_processes
from skimage import data

from vqkernels.models import LPIPS, VQGAN, VQVAE
from vqkernels.nn import build
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.learners.adversarial import Adversarial
from vqkernels.train.learners.losses import (
    ImageLoss,
    adaptive_weight,
    generator_loss,
    hinge_loss,
    vanilla_loss,
)

B, SIDE, STEPS = 4, 16, 8
EPS = torch.finfo(torch.float64).eps


def settings(**changes):
    values = {
        "crop": SIDE,
        "steps": STEPS,
        "lr": 1e-3,
        "schedule": "constant",
        "betas": (0.5, 0.9),
        "batch_size": 360,
        "reconstruction": "l1",
        "adversarial": 0.8,
        "discriminator_start": 0.5,
        "discriminator_width": 4,
        "discriminator_layers": 2,
    }
    return TrainConfig(**(values | changes))


def learner(
    method="ste",
    *,
    dtype=torch.float64,
    loss="hinge",
    precision="no",
    backbone="vqgan",
    num_codes=8,
    **changes,
):
    torch.manual_seed(0)
    # one process sees one precision, unless it is told to forget it
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        quantizer = build(method, dim=4, num_codes=num_codes, channel_dim=1).to(dtype)
        sizes = {"width": 8, "latent_dim": 4, "residual_blocks": 1}
        made = {"vqgan": partial(VQGAN, multipliers=(1, 2)), "vqvae": VQVAE}[backbone](quantizer, **sizes)
        return Adversarial(settings(**changes), accelerator, made, loss=loss)
    finally:
        torch.set_default_dtype(before)


def images(seed=1, dtype=torch.float64, batch=B):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, SIDE, SIDE, dtype=dtype, generator=generator).mul(2).sub(1)


def test_losses_equal_their_equations():
    real, fake = torch.randn(2, 5, 7, dtype=torch.float64)
    r, f = real.numpy(), fake.numpy()
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for found, expected in (
        (hinge_loss(real, fake), (np.maximum(0, 1 - r).mean() + np.maximum(0, 1 + f).mean()) / 2),
        (vanilla_loss(real, fake), -(np.log(sigmoid(r)).mean() + np.log(1 - sigmoid(f)).mean()) / 2),
        (generator_loss(fake), -f.mean()),
    ):
        assert abs(found.item() - expected) <= 16 * 7 * EPS * max(1, abs(expected))


def test_the_image_loss_equals_its_equation():
    x, y = images(1), images(2)
    perceptual = LPIPS().double()
    found = ImageLoss("l1", perceptual=perceptual, perceptual_weight=0.3)(x, y)
    expected = (x - y).abs().sum() / x.numel() + 0.3 * sum(perceptual(x, y)) / B
    assert abs(found.total - expected) <= x.numel() * EPS * expected
    assert torch.equal(found.mse, ImageLoss("mse")(x, y).total)
    assert ImageLoss("mse", perceptual=perceptual, perceptual_weight=0)(x, y).perceptual is None
    with pytest.raises(ValueError, match=r"ImageLoss: reconstruction must be one of 'mse', 'l1'; got 'l2'"):
        ImageLoss("l2")
    with pytest.raises(TypeError, match=r"ImageLoss: perceptual must be an LPIPS; got str"):
        ImageLoss(perceptual="vgg.pth")


def test_the_adaptive_weight():
    task, game = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = math.sqrt(float((task**2).sum())) / (math.sqrt(float((game**2).sum())) + 1e-4)
    assert abs(adaptive_weight(task, game).item() - expected) <= 24 * EPS * expected
    assert adaptive_weight(task * 1e9, game * 0) == 1e4
    assert adaptive_weight(task * 0, game) == 0


@pytest.mark.parametrize("loss", ["hinge", "vanilla"])
@pytest.mark.parametrize("backbone", ["vqgan", "vqvae"])
def test_gradients_of_a_step_equal_autograd_by_hand(loss, backbone):
    made = learner(loss=loss, backbone=backbone, discriminator_start=0.0)
    model, judge = copy.deepcopy(made.model), copy.deepcopy(made.discriminator)
    batch = images()
    result = made.learn(batch, 0)

    reconstruction, indices, quantizer_loss = model(batch)
    task = (reconstruction - batch).abs().mean()
    game = -judge(reconstruction).mean()
    last = list(model.decoder.modules())[-1].weight
    a, b = (torch.autograd.grad(each, last, retain_graph=True)[0].norm() for each in (task, game))
    weight = 0.8 * (a / (b + 1e-4)).clamp(0, 1e4).detach()
    total = task + weight * game + quantizer_loss
    gradients = torch.autograd.grad(total, list(model.parameters()))
    # the same sums in another order, through some 30 layers of at most 9 * 16 terms
    bound = 30 * 9 * 16 * EPS
    assert abs(result.loss - total) <= bound * abs(total)
    assert abs(result.extras["gan_weight"] - weight) <= bound * weight
    assert torch.equal(result.indices, indices)
    size = torch.cat([g.flatten() for g in gradients]).norm()
    for found, expected in zip(made.model.parameters(), gradients, strict=True):
        assert (found.grad - expected).norm() <= bound * size

    fake = reconstruction.detach()
    real_logits, fake_logits = judge(batch), judge(fake)
    judged = {"hinge": hinge_loss, "vanilla": vanilla_loss}[loss](real_logits, fake_logits)
    gradients = torch.autograd.grad(judged, list(judge.parameters()))
    size = torch.cat([g.flatten() for g in gradients]).norm()
    for found, expected in zip(made.discriminator.parameters(), gradients, strict=True):
        assert (found.grad - expected).norm() <= bound * size
    for name, expected in (
        ("discriminator_loss", judged),
        ("logits_real", real_logits.mean()),
        ("logits_fake", fake_logits.mean()),
    ):
        assert abs(result.extras[name] - expected) <= bound


def test_before_its_start_the_discriminator_does_nothing():
    made = learner(discriminator_start=0.5)
    calls = []
    made.discriminator.main.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(made.discriminator.state_dict())
    for number in range(STEPS // 2):
        result = made.learn(images(number), number)
        assert result.extras == {}
    after = made.discriminator.state_dict()
    assert not calls and all(torch.equal(before[name], after[name]) for name in before)
    assert not made.discriminator_optimizer.state_dict()["state"]
    result = made.learn(images(9), STEPS // 2)
    # the reconstruction for its maker; images and reconstructions for itself
    assert len(calls) == 3
    assert set(result.extras) == {"gan_weight", "discriminator_loss", "logits_real", "logits_fake"}
    assert any(
        not torch.equal(before[name], value) for name, value in made.discriminator.state_dict().items()
    )


def test_without_a_game_there_is_no_discriminator():
    made = learner(adversarial=0.0)
    assert made.discriminator is None
    assert made.state_dict()["modules"] == {}
    assert made.learn(images(), STEPS - 1).extras == {}


def test_the_perceptual_distance_is_part_of_the_loss(tmp_path):
    torch.manual_seed(5)
    reference = LPIPS()
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    convolutions = [part for part in reference.modules() if isinstance(part, torch.nn.Conv2d)]
    content = {}
    for place, part in zip(places, convolutions, strict=True):
        content |= {f"features.{place}.weight": part.weight, f"features.{place}.bias": part.bias}
    content |= {f"lin{n}.model.1.weight": w.view(1, -1, 1, 1) for n, w in enumerate(reference.linear)}
    torch.save({name: value.detach().clone() for name, value in content.items()}, tmp_path / "lpips.pth")
    made = learner(
        dtype=torch.float32,
        perceptual=str(tmp_path / "lpips.pth"),
        perceptual_weight=2.0,
        discriminator_start=0.0,
    )
    batch = images(dtype=torch.float32)
    with torch.no_grad():
        reconstruction, _, quantizer_loss = copy.deepcopy(made.model)(batch)
        distance = reference(reconstruction, batch).mean()
        game = -copy.deepcopy(made.discriminator)(reconstruction).mean()
        task = F.l1_loss(reconstruction, batch) + 2 * distance
    result = made.learn(batch, 0)
    bound = 30 * 9 * 16 * torch.finfo(torch.float32).eps
    assert abs(result.extras["perceptual"] - distance) <= bound * distance
    total = task + result.extras["gan_weight"] * game + quantizer_loss
    assert abs(result.loss - total) <= bound * (task + abs(result.extras["gan_weight"] * game))
    assert set(made.state_dict()["modules"]) == {"discriminator"} and not any(
        p.requires_grad for p in made.image_loss.parameters()
    )
    with pytest.raises(RunError, match=r"LPIPS: weights must name a file; got .*none.pth"):
        learner(perceptual=str(tmp_path / "none.pth"))


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_accumulated_gradients_are_those_of_the_batch(parts):
    whole, cut = learner(adversarial=0.0), learner(adversarial=0.0, accumulate=parts)
    first, second = whole.learn(images(), 0), cut.learn(images(), 0)
    bound = 30 * 9 * 16 * EPS
    assert abs(first.loss - second.loss) <= bound and abs(first.mse - second.mse) <= bound
    assert torch.equal(first.indices, second.indices)
    size = torch.cat([p.grad.flatten() for p in whole.model.parameters()]).norm()
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= bound * size


def test_accumulated_parts_each_have_their_game():
    made = learner(discriminator_start=0.0, accumulate=2)
    judge, batch = copy.deepcopy(made.discriminator), images()
    fakes = [copy.deepcopy(made.model)(part).reconstruction.detach() for part in batch.chunk(2)]
    result = made.learn(batch, 0)
    losses = [hinge_loss(judge(x), judge(y)) for x, y in zip(batch.chunk(2), fakes)]
    gradients = torch.autograd.grad(sum(losses) / 2, list(judge.parameters()))
    size = torch.cat([g.flatten() for g in gradients]).norm()
    for found, expected in zip(made.discriminator.parameters(), gradients, strict=True):
        assert (found.grad - expected).norm() <= 30 * 9 * 16 * EPS * size
    assert result.indices.shape == (B, SIDE // 2, SIDE // 2, 1)


@pytest.mark.parametrize("method", ["diveq", "ema"])
def test_a_resumed_run_is_bit_for_bit_the_same(method):
    def numbers(made):
        model = made.model.state_dict() | {f"d.{n}": v for n, v in made.discriminator.state_dict().items()}
        return {name: value.clone() for name, value in model.items()}

    straight = learner(method, dtype=torch.float32)
    for number in range(STEPS):
        straight.learn(images(number, torch.float32), number)

    first = learner(method, dtype=torch.float32)
    # one step after the discriminator has begun, so that its moments matter
    for number in range(STEPS // 2 + 1):
        first.learn(images(number, torch.float32), number)
    buffer = io.BytesIO()
    torch.save({"model": first.model.state_dict(), "learner": first.state_dict()}, buffer)
    random = torch.get_rng_state()
    second = learner(method, dtype=torch.float32)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second.model.load_state_dict(saved["model"])
    second.load_state_dict(saved["learner"])
    torch.set_rng_state(random)
    for number in range(STEPS // 2 + 1, STEPS):
        second.learn(images(number, torch.float32), number)
    expected, found = numbers(straight), numbers(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_codes_have_their_own_rate_and_no_decay():
    made = learner(codes_rate=3.0, weight_decay=0.1, optimizer="adamw")
    made.learn(images(), 0)
    rest, codes = made.optimizer.param_groups
    assert (rest["lr"], codes["lr"]) == (1e-3, 3e-3)
    assert (rest["weight_decay"], codes["weight_decay"]) == (0.1, 0.0)
    assert [p.shape for p in codes["params"]] == [(8, 4)]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_discriminator_has_the_decay_of_the_run(decay):
    made = learner(weight_decay=decay, optimizer="adamw")
    assert [group["weight_decay"] for group in made.discriminator_optimizer.param_groups] == [decay]


def test_half_precision_steps_are_finite():
    made = learner(dtype=torch.float32, precision="bf16", discriminator_start=0.0)
    for number in range(3):
        result = made.learn(images(number, torch.float32), number)
        assert result.loss.isfinite() and result.loss.dtype == torch.float32
        assert all(value.isfinite() for value in result.extras.values())
    AcceleratorState._reset_state()


def test_a_loss_scale_changes_no_weight():
    plain, scaled = learner(discriminator_start=0.0), learner(discriminator_start=0.0)
    # a power of two, so that nothing is rounded otherwise
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    first, second = plain.step(images(), 0), scaled.step(images(), 0)
    assert first.extras["gan_weight"] == second.extras["gan_weight"] and first.loss == second.loss
    for a, b in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        assert torch.equal(a.grad * 2**10, b.grad)
    for a, b in zip(plain.discriminator.parameters(), scaled.discriminator.parameters(), strict=True):
        assert torch.equal(a.grad * 2**10, b.grad)
    assert "scaler" in scaled.state_dict()


def test_crops_too_small_for_the_discriminator():
    with pytest.raises(RunError, match=r"train: crop must be 24 or more for 3 layers .*; got 16. Pass fewer"):
        learner(discriminator_layers=3)


def test_photographs_are_learned():
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 127.5 - 1
    generator = torch.Generator().manual_seed(4)

    def crops():
        corners = torch.randint(0, 512 - SIDE, (16, 2), generator=generator).tolist()
        return torch.stack([photo[:, i : i + SIDE, j : j + SIDE] for i, j in corners])

    changes = {"num_codes": 32, "steps": 30, "discriminator_start": 0.7, "lr": 2e-3}
    made = learner("diveq", dtype=torch.float32, **changes)
    held_out = crops()

    def error():
        made.model.eval()
        with torch.no_grad():
            found = F.mse_loss(made.model(held_out).reconstruction, held_out)
        made.model.train()
        return found.item()

    before = error()
    for number in range(30):
        made.learn(crops(), number)
    assert error() < 0.7 * before


def _on_rank(rank, world=2):
    if world > 1:
        # what a launcher tells accelerate
        told = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 0,
        }
        os.environ |= {name: str(value) for name, value in told.items()}
    made = learner(steps=4, discriminator_start=0.5, accumulate=2 if world > 1 else 1)
    found = []
    for number in range(4):
        result = made.learn(images(number).chunk(world)[rank], number)
        assert made.accelerator.num_processes == world
        found.append({"loss": result.loss, **result.extras})
        if number == 1:
            before = [p.detach().clone() for p in made.model.parameters()]
    after = [*made.model.parameters(), *made.discriminator.parameters()]
    return {"steps": found, "before": before, "after": [p.detach().clone() for p in after]}


def test_two_processes_agree():
    one, two = two_processes(_on_rank)
    alone = _on_rank(0, 1)
    for a, b in zip(one["after"], two["after"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one["steps"][2:], two["steps"][2:], strict=True):
        # one weight for all, or gradients would be of no loss
        assert a["gan_weight"] == b["gan_weight"] and a["logits_real"] != b["logits_real"]
    # until the game begins they are one process with the joint batch; Adam divides by gradients that may be small
    for a, b in zip(one["before"], alone["before"], strict=True):
        assert (a - b).abs().max() <= 1e-3 * 1e-6
