"""Decoding ahead in a run: the same weights, and no thread left, however the run ends."""

import signal
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.train.config import TrainConfig
from vqkernels.train.data import images as data_module
from vqkernels.train.data.images import ImageSet, load_images
from vqkernels.train.loop import train


@pytest.fixture
def make(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(4):
        pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")

    def config(name):
        return TrainConfig(
            data=str(tmp_path / "images"),
            out=str(tmp_path / name),
            quantizer="ste",
            upkeep="none",
            num_codes=8,
            latent_dim=4,
            width=8,
            residual_blocks=1,
            crop=16,
            batch_size=4,
            steps=6,
            log_every=2,
            evaluate_every=6,
        )

    return config


@pytest.fixture
def on_disk(monkeypatch):
    """Leave pictures on the disk; returns the names of the threads that decoded batches."""
    monkeypatch.setattr(data_module, "KEEP_BYTES", 0)
    seen, batch = [], ImageSet.batch

    def noted(images, step, **where):
        seen.append(threading.current_thread().name)
        return batch(images, step, **where)

    monkeypatch.setattr(ImageSet, "batch", noted)
    return seen


def weights(result):
    return torch.cat([value.double().flatten() for value in result.model.state_dict().values()])


def decoders():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_a_run_decodes_ahead_only_what_is_not_in_memory(make, monkeypatch, request):
    assert load_images(make("kept")).in_memory
    kept = weights(train(make("kept")))
    seen = request.getfixturevalue("on_disk")
    assert not load_images(make("lazy")).in_memory
    assert torch.equal(weights(train(make("lazy"))), kept)
    assert len(seen) >= 6 and all(name.startswith("prefetch") for name in seen)
    assert not decoders()
    # and from memory, in the thread of the run
    monkeypatch.setattr(data_module, "KEEP_BYTES", 1 << 30)
    seen.clear()
    train(make("again"))
    assert len(seen) == 6 and not any(name.startswith("prefetch") for name in seen)


def test_a_run_that_is_stopped_ends_its_threads_and_goes_on_bit_for_bit(make, on_disk):
    whole = weights(train(make("whole")))

    def stop(line):
        if line["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    assert train(make("broken"), on_line=stop).signal == "SIGTERM"
    assert not decoders()
    assert torch.equal(weights(train(make("broken"), resume=True)), whole)


def test_a_run_that_fails_ends_its_threads(make, on_disk):
    def fail(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make("run"), on_line=fail)
    assert on_disk and not decoders()


def test_what_is_ahead_of_the_last_step_does_not_matter(make, on_disk, monkeypatch):
    batch, config = ImageSet.batch, make("run")

    def broken_later(images, step, **where):
        if step >= config.steps:
            raise OSError("gone")
        return batch(images, step, **where)

    monkeypatch.setattr(ImageSet, "batch", broken_later)
    assert train(config).step == config.steps
    assert not decoders()
