"""Learners: procedures as runs, gradient accumulation, schedules, recipes and trackers."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")
pytest.importorskip("tyro")

from small import SIZES

from vqkernels.__main__ import main
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.log import read_lines
from vqkernels.train.loop import train
from vqkernels.train.model import build_model
from vqkernels.train.options import GROUPS
from vqkernels.train.presets import PRESETS

SMALL = {
    **SIZES,
    "steps": 6,
    "log_every": 2,
    "evaluate_every": 6,
    "checkpoint_every": 4,
}


@pytest.fixture
def make(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(pictures / f"{number}.png")

    def config(name="run", **fields):
        return TrainConfig(**{"data": str(pictures), "out": str(tmp_path / name), **SMALL, **fields})

    return config


def weights(result):
    return {name: value.clone() for name, value in result.model.state_dict().items()}


@pytest.mark.parametrize(
    ("procedure", "quantizer"),
    [("alternated", "ste"), ("alternated", "affine"), ("meta", "mq"), ("meta", "diveq")],
)
def test_a_procedure_stops_and_goes_on_bit_for_bit(make, procedure, quantizer):
    whole = make("whole", procedure=procedure, quantizer=quantizer, inner=2)
    parts = dataclasses.replace(whole, out=make("parts").out)
    expected = weights(train(whole))

    def stop(line):
        if line["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(parts, checkpoint_every=1), on_line=stop)
    result = train(parts, resume=True)
    assert result.started_at >= 1
    for name, value in weights(result).items():
        assert torch.equal(value, expected[name]), name


def test_meta_logs_its_two_gradients(make):
    config = make(procedure="meta", quantizer="mq")
    train(config)
    lines = [line for line in read_lines(config.metrics_path()) if line["split"] == "train"]
    assert len(lines) == 3
    for line in lines:
        assert line["direct_norm"] > 0 and line["indirect_norm"] > 0 and -1 <= line["cosine"] <= 1


def test_accumulated_parts_are_one_step(make):
    """Without noise and with all latents of one code the parts add up to the batch, to rounding."""
    one, many = (train(make(f"{n}", quantizer="ste", accumulate=n, steps=1, noise_std=0.0)) for n in (1, 4))
    for name, value in weights(one).items():
        other = weights(many)[name]
        if value.is_floating_point():
            # adam's first step is lr times the sign of a gradient, whose rounding may turn it where it is near 0
            off = (value - other).abs() > 1e-6
            assert off.float().mean() < 0.02, name
        else:
            assert torch.equal(value, other), name


def test_codes_have_a_rate_of_their_own_and_no_decay(make):
    config = make(
        quantizer="ste", optimizer="adamw", weight_decay=0.1, codes_rate=0.0, steps=2, upkeep="none"
    )
    torch.manual_seed(config.seed)
    before = build_model(config).quantizer.codebook.codes().detach().clone()
    result = train(config)
    assert torch.equal(result.model.quantizer.codebook.codes(), before)


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(steps=100, lr=1.0, rise=0.1, schedule="cosine")
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    for step in range(10, 100):
        assert rates[step] == pytest.approx((1 + math.cos(math.pi * (step - 10) / 90)) / 2)
    halved = TrainConfig(steps=100, lr=1.0, halve_at=(0.5, 0.75))
    assert [halved.lr_at(step) for step in (0, 49, 50, 74, 75, 99)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert {TrainConfig(steps=9, schedule="constant", lr=2.0).lr_at(step) for step in range(9)} == {2.0}


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_is_a_configuration_in_both_sizes(name):
    for full in (False, True):
        config = PRESETS[name].config(full=full)
        assert TrainConfig.from_json(config.to_json()) == config
    assert PRESETS[name].config(seed=3).seed == 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_builds_in_the_paper_s_size(name):
    """Shapes alone, without the memory."""
    config = PRESETS[name].config(full=True)
    with torch.device("meta"):
        model = build_model(config)
        latents = model.eval().encode(torch.empty(1, 3, config.crop, config.crop))
        assert latents.shape[1] == config.latent_dim == model.quantizer.dim
        assert latents.shape[2] * model.factor == config.crop and model.factor == config.factor
        assert model.decode(latents).shape == (1, 3, config.crop, config.crop)


def test_help_groups_options_by_what_they_change(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--preset", "mq", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    places = [text.index(f"{group.title} options") for group in GROUPS]
    assert places == sorted(places)
    assert re.search(r"--procedure .*?\(default: meta\)", text, re.DOTALL)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"procedure": "meta", "quantizer": "fsq"}, "procedure must be joint for fsq"),
        ({"procedure": "meta", "quantizer": "diveq", "hypergradient": "closed"}, "for the closed form"),
        ({"procedure": "alternated", "accumulate": 2}, "accumulate must be 1 with procedure alternated"),
        ({"accumulate": 3}, "accumulate must divide batch_size = 4"),
        ({"quantizer": "fsq", "commitment_weight": 1.0}, "commitment_weight must be left out for fsq"),
        ({"start": "kmeans"}, "start must be plain for runs of sf_diveq, which start as means of latents"),
        ({"weight_decay": 0.1}, "weight_decay must be 0 for adam"),
        ({"multipliers": (1, 2, 3)}, "multipliers must be left out for backbone diveq"),
        ({"attention": True}, "attention must be left out for backbone diveq"),
        ({"split": True}, "split must be left out for procedure joint"),
        ({"hypergradient": "general"}, "hypergradient must be left out for procedure joint"),
        (
            {"adversarial": 1.0, "discriminator_start": 0.95},
            "discriminator_start must leave a step of 6 to the discriminator",
        ),
        (
            {"procedure": "alternated", "quantizer": "ste", "inner": 5, "split": True},
            "inner must be at most 4, the images of a step in a process, with split; got 5",
        ),
        (
            {"quantizer": "ste", "start": "kmeans", "crop": 4, "accumulate": 2},
            "start must leave at least num_codes = 8 latents to fit the codes to; got kmeans with 2 latents",
        ),
        (
            {"quantizer": "ste", "upkeep": "repeated", "crop": 4},
            "upkeep must leave at least num_codes = 8 latents to fit the codes to; got repeated with 4 latents",
        ),
        ({"perceptual": "vgg.pth", "crop": 8}, "crop must be 16 or more for LPIPS; got 8"),
        (
            {"quantizer": "ste", "backbone": "takida", "batch_size": 1, "crop": 4},
            "batch_size must leave more than one latent",
        ),
        ({"backbone": "vqgan", "multipliers": (1, 2)}, "multipliers must be downsamplings"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, fields, words):
    with pytest.raises(RunError, match=re.escape(words)):
        train(make(**fields))


def test_a_tracker_that_is_not_installed_is_refused(make):
    with pytest.raises(
        RunError, match="tracker must be one of Accelerate whose package is installed; got 'nobody'"
    ):
        train(make(tracker="nobody"))


def test_tensorboard_gets_the_numbers(make):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make(quantizer="ste", tracker="tensorboard")
    train(config)
    folder = Path(config.out) / "tracker"
    found = events.EventAccumulator(str(folder)).Reload()
    logged = [line["psnr"] for line in read_lines(config.metrics_path()) if line["split"] == "train"]
    assert [event.value for event in found.Scalars("train/psnr")] == pytest.approx(logged, rel=1e-6)
