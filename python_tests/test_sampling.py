"""From a prior to a grid of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from prior_runs import ImageSet, make_autoencoder, walk_with_classes

from vqkernels.train.checkpoints.restore import load_run
from vqkernels.train.config import RunError
from vqkernels.train.priors.config import PriorConfig
from vqkernels.train.priors.prior import train_prior
from vqkernels.train.priors.sampling import SampleOptions, decode_tokens, sample_grid, tile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sampling")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make_autoencoder(folder)


@pytest.fixture
def train(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageSet, "walk", walk_with_classes, raising=False)

    def run(**fields):
        small = {"layers": 1, "heads": 2, "width": 16, "batch_size": 4, "steps": 1}
        config = PriorConfig(
            checkpoint=str(checkpoint), cache=str(folder / "tokens"), out=str(tmp_path), **small, **fields
        )
        train_prior(config)
        return config.checkpoint_path()

    return run


def test_decoded_tokens_are_the_reconstruction(checkpoint):
    model, images, _ = load_run(checkpoint)
    batch = images.batch(0)
    with torch.no_grad():
        reconstruction, indices, _ = model.eval()(batch)
    # one lookup of the same rows; evaluation returns x + (z - x) at most one rounding of each away
    scale = float(reconstruction.abs().max())
    tolerance = 64 * torch.finfo(torch.float32).eps * max(1.0, scale)
    torch.testing.assert_close(decode_tokens(model, indices), reconstruction, rtol=0, atol=tolerance)


def test_a_class_has_a_row_and_a_seed_its_picture(train, tmp_path):
    prior = train(conditional=True)
    pictures = [tmp_path / f"{number}.png" for number in range(3)]
    for picture, seed in zip(pictures, (0, 0, 1), strict=True):
        assert sample_grid(prior, picture, SampleOptions(count=3, seed=seed)) == (2, 3)
    with Image.open(pictures[0]) as image:
        assert image.size == (3 * 18 - 2, 2 * 18 - 2)
    assert pictures[0].read_bytes() == pictures[1].read_bytes() != pictures[2].read_bytes()
    assert sample_grid(prior, pictures[0], SampleOptions(count=2, classes=(1,))) == (1, 2)
    with pytest.raises(RunError, match="classes must be classes from 0 to 1"):
        sample_grid(prior, pictures[0], SampleOptions(classes=(2,)))


def test_maskgit_without_classes_fills_a_square(train, tmp_path):
    prior = train(model="maskgit")
    assert sample_grid(prior, tmp_path / "a.png", SampleOptions(count=5, batch_size=2)) == (2, 3)
    with pytest.raises(RunError, match="without classes"):
        sample_grid(prior, tmp_path / "a.png", SampleOptions(classes=(0,)))


def test_another_autoencoder_is_refused(train, folder, tmp_path):
    prior, other = train(), make_autoencoder(folder, seed=1)
    with pytest.raises(RunError, match="be the autoencoder that"):
        sample_grid(prior, tmp_path / "a.png", SampleOptions(), checkpoint=other)


def test_the_folder_of_a_run_is_its_newest_checkpoint_and_images_may_be_gone(
    train, checkpoint, tmp_path, monkeypatch
):
    prior = train()
    monkeypatch.setattr(
        "vqkernels.train.checkpoints.restore.load_images", lambda config: pytest.fail("images were read")
    )
    run = checkpoint.parent.parent
    assert sample_grid(prior, tmp_path / "a.png", SampleOptions(count=1), checkpoint=run) == (1, 1)


def test_tiles_are_in_reading_order():
    images = [np.full((2, 3, 3), value, dtype=np.uint8) for value in (10, 20, 30)]
    grid = tile(images, 2)
    assert grid.shape == (6, 8, 3)
    assert (grid[:2, :3] == 10).all() and (grid[:2, 5:] == 20).all() and (grid[4:, :3] == 30).all()
    assert (grid[2:4] == 255).all() and (grid[4:, 3:] == 255).all()


@pytest.mark.parametrize("fields", [{"count": 0}, {"temperature": 0.0}, {"top_k": 0}, {"seed": -1}])
def test_options_that_cannot_be_are_refused(fields):
    with pytest.raises(RunError, match=r"^sample: "):
        SampleOptions(**fields)
