"""Options together: runs that stop at any moment end as if they had not, and are measured as their checkpoints are."""

import signal

import kills
import pytest
import torch

from vqkernels.train.checkpoints.restore import load_run
from vqkernels.train.config import TrainConfig
from vqkernels.train.loop import train
from vqkernels.train.measures.evaluate import evaluate

TINY = kills.OPTIONS | {"num_codes": 8, "steps": 6, "checkpoint_every": 6, "log_every": 1, "keep": 1}
GAME = {"adversarial": 0.8, "discriminator_start": 0.5, "discriminator_width": 4, "discriminator_layers": 1}
TOGETHER = {
    "a game, averages, parts and a warm-up": {
        **GAME,
        "quantizer": "sf_diveq",
        "warmup": 0.5,
        "backbone": "vqgan",
        "attention": True,
        "reconstruction": "l1",
        "weights_ema": 0.9,
        "accumulate": 2,
    },
    "a game in half precision, with decay": {
        **GAME,
        "quantizer": "ema",
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "precision": "bf16",
        "weights_ema": 0.9,
    },
    "averages, replaced codes and batch statistics": {
        "quantizer": "diveq",
        "backbone": "takida",
        "weights_ema": 0.9,
    },
    "averages and alternated steps from k-means": {
        "quantizer": "affine",
        "procedure": "alternated",
        "inner": 2,
        "split": True,
        "start": "kmeans",
        "upkeep": "lru",
        "backbone": "takida",
        "weights_ema": 0.9,
        "codes_rate": 3.0,
        "schedule": "cosine",
        "rise": 0.3,
    },
    "averages and meta-quantization": {
        "quantizer": "mq",
        "procedure": "meta",
        "weights_ema": 0.9,
        "precision": "bf16",
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return kills.make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("name", TOGETHER)
def test_options_together_stop_go_on_and_are_measured_alike(data, tmp_path, name):
    def config(out):
        return TrainConfig(**{**TINY, **TOGETHER[name], "data": str(data), "out": str(tmp_path / out)})

    whole = train(config("whole"))
    for step in range(1, 6):

        def stop(line, step=step):
            if line["step"] == step and line["split"] == "train":
                signal.raise_signal(signal.SIGTERM)

        stopped = train(config("parts"), resume=True, on_line=stop)
        assert (stopped.signal, stopped.step, stopped.started_at) == ("SIGTERM", step, step - 1)
    train(config("parts"), resume=True)
    assert kills.differences(tmp_path / "whole", tmp_path / "parts") == []
    # what the command prints at the end of a run, and what it prints of the checkpoint later
    model, images, _ = load_run(tmp_path / "parts")
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
    assert evaluate(model, images) == evaluate(whole.model, whole.images)
    # a run that is over has nothing to do, and says the same
    again = train(config("parts"), resume=True)
    assert again.started_at == 6 and evaluate(again.model, images) == evaluate(model, images)
