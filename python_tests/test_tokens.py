"""Token sets: what they hold, when they are encoded again, and training on them."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from prior_runs import ImageSet, make_autoencoder, walk_with_classes

from vqkernels.train.checkpoints.restore import load_run
from vqkernels.train.config import RunError
from vqkernels.train.log import read_lines
from vqkernels.train.priors import prior as prior_module
from vqkernels.train.priors import tokens as tokens_module
from vqkernels.train.priors.config import PriorConfig
from vqkernels.train.priors.prior import load_prior, train_prior
from vqkernels.train.priors.token_key import data_identity
from vqkernels.train.priors.tokens import encode, open_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("priors")


@pytest.fixture(scope="module")
def checkpoint(folder):
    return make_autoencoder(folder)


@pytest.fixture(autouse=True)
def _classes(monkeypatch):
    monkeypatch.setattr(ImageSet, "walk", walk_with_classes, raising=False)


@pytest.fixture
def encoded(monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(1)
        return encode(*arguments)

    monkeypatch.setattr(tokens_module, "encode", counted)
    return calls


def test_tokens_are_those_of_the_model(checkpoint, tmp_path):
    found = open_tokens(checkpoint, tmp_path)
    model, images, _ = load_run(checkpoint)
    batch = torch.stack([one.image for one in walk_with_classes(images, "train", 16)])
    with torch.no_grad():
        indices = model.eval()(batch).indices
    assert found.grid == (4, 4, 1) and found.num_classes == 2 and found.train.dtype == np.uint16
    assert isinstance(found.train, np.memmap)
    assert np.array_equal(found.train, indices.flatten(1).numpy())
    assert found.train_labels.tolist() == [number % 2 for number in range(10)]


def test_a_stride_takes_a_grid_of_crops(checkpoint, tmp_path):
    # whole pictures are 20 x 24 here: 16 fits at 0 and 4 down, at 0, 4 and 8 across
    assert len(open_tokens(checkpoint, tmp_path, stride=4).train) == 10 * 2 * 3


def test_a_second_call_does_not_encode(checkpoint, tmp_path, encoded):
    first = open_tokens(checkpoint, tmp_path)
    count = len(encoded)
    second = open_tokens(checkpoint, tmp_path)
    assert count > 0 and len(encoded) == count and first.key == second.key
    assert not [path for path in tmp_path.iterdir() if path.name != first.key]


def test_the_key_follows_checkpoint_data_and_crop(checkpoint, folder, tmp_path):
    other = make_autoencoder(folder, seed=1)
    keys = {open_tokens(path, tmp_path).key for path in (checkpoint, other)}
    keys |= {open_tokens(checkpoint, tmp_path, crop=8).key, open_tokens(checkpoint, tmp_path, stride=4).key}
    assert len(keys) == 4


def test_the_identity_of_data_follows_shards_and_splits(tmp_path, monkeypatch):
    # braces and wildcards are webdataset's
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.bin").write_bytes(b"0")
    shards = [tmp_path / f"{number}.tar" for number in range(2)]
    for shard in shards:
        shard.write_bytes(b"0")
    patterns = ("*.tar", "{0..1}.tar", "0.tar")
    before = [data_identity(pattern) for pattern in patterns]
    (tmp_path / "other.bin").write_bytes(b"01")
    assert [data_identity(pattern) for pattern in patterns] == before
    shards[0].write_bytes(b"01")
    assert not set(before) & {data_identity(pattern) for pattern in patterns}
    assert data_identity(f"hf:{tmp_path}") == data_identity("hf:.")
    assert data_identity(f"hf:{tmp_path}:train") != data_identity(f"hf:{tmp_path}:test")


def test_pictures_below_the_crop_of_the_run_are_encoded_in_smaller_ones(checkpoint, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for number in range(2):
        Image.new("RGB", (12, 12), (number, 0, 0)).save(small / f"{number}.png")
    assert open_tokens(checkpoint, tmp_path / "tokens", data=str(small), crop=8).grid == (2, 2, 1)


@pytest.mark.parametrize("name", ["train.bin", "manifest.json", "held_out_labels.bin"])
@pytest.mark.parametrize("damage", ["altered", "shortened", "missing"])
def test_damaged_tokens_are_encoded_again_with_a_word(checkpoint, tmp_path, encoded, name, damage):
    first = open_tokens(checkpoint, tmp_path)
    before, path, words = np.array(first.train), tmp_path / first.key / name, []
    content = path.read_bytes()
    count = len(encoded)
    if damage == "missing":
        path.unlink()
    else:
        # a new file, for the mapped one must not change under the test
        path.unlink()
        path.write_bytes(content[:-2] if damage == "shortened" else bytes([content[0] ^ 1]) + content[1:])
    again = open_tokens(checkpoint, tmp_path, say=words.append)
    assert np.array_equal(again.train, before) and len(encoded) > count
    assert any("damaged" in word for word in words)


def test_a_crop_that_does_not_fit_is_refused(checkpoint, tmp_path):
    with pytest.raises(RunError, match="tokens: crop must be a multiple"):
        open_tokens(checkpoint, tmp_path, crop=10)


@pytest.fixture
def make(checkpoint, tmp_path):
    def config(name, **fields):
        small = {"layers": 1, "heads": 2, "width": 16, "batch_size": 4, "steps": 8, "log_every": 4}
        small |= {"evaluate_every": 4, "checkpoint_every": 3, "cache": str(tmp_path / "tokens")}
        return PriorConfig(checkpoint=str(checkpoint), out=str(tmp_path / name), **small | fields)

    return config


@pytest.mark.parametrize("model", ["gpt", "maskgit"])
def test_a_resumed_run_ends_with_the_same_bits(make, model, monkeypatch):
    whole, broken = (make(name, model=model, conditional=True) for name in ("whole", "broken"))
    train_prior(whole)
    step = prior_module._Run.train_step

    def dies(run):
        if run.step == 5:
            raise KeyboardInterrupt
        step(run)

    monkeypatch.setattr(prior_module._Run, "train_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_prior(broken)
    monkeypatch.setattr(prior_module._Run, "train_step", step)
    with pytest.raises(RunError, match="hold no earlier run"):
        train_prior(broken)
    assert train_prior(broken, resume=True).started_at == 3
    one, other = (load_prior(config.checkpoint_path()).prior.state_dict() for config in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    untimed = [
        [
            {key: value for key, value in line.items() if key != "seconds_per_step"}
            for line in read_lines(config.metrics_path())
        ]
        for config in (whole, broken)
    ]
    assert untimed[0] == untimed[1] and len(untimed[0]) == 4


def test_other_settings_or_a_damaged_file_are_not_resumed(make):
    config = make("run", steps=3)
    train_prior(config)
    with pytest.raises(RunError, match="width"):
        train_prior(make("run", steps=3, width=32), resume=True)
    path = config.checkpoint_path()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="whole checkpoint"):
        train_prior(config, resume=True)


@pytest.mark.parametrize("every", [1, 8])
def test_weights_that_a_step_has_spoilt_are_not_saved(make, monkeypatch, every):
    config = make("run", checkpoint_every=every, steps=8)
    step = prior_module._Run.train_step

    def spoils(run):
        step(run)
        if run.step == 2:
            # the loss of this step is finite
            next(run.prior.parameters()).data.view(-1)[0] = float("nan")

    monkeypatch.setattr(prior_module._Run, "train_step", spoils)
    with pytest.raises(RunError, match=r"prior: (weights|loss) must stay finite"):
        train_prior(config)
    assert config.checkpoint_path().exists() == (every == 1)
    if every == 1:
        assert load_prior(config.checkpoint_path()).step == 1


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_the_checkpoint_before_a_damaged_one_is_offered_and_goes_on_bit_for_bit(make, damage):
    config = make("run")
    train_prior(config)
    path = config.checkpoint_path()
    whole, content = load_prior(path).prior.state_dict(), path.read_bytes()
    path.unlink()
    if damage != "missing":
        half = len(content) // 2
        path.write_bytes(
            content[:half] + (b"" if damage == "truncated" else b"?" * 64 + content[half + 64 :])
        )
    with pytest.raises(RunError, match=r"previous\.pt to prior\.pt to go on from step 6\.$"):
        train_prior(config, resume=True)
    path.with_name("prior.previous.pt").replace(path)
    assert train_prior(config, resume=True).started_at == 6
    again = load_prior(path).prior.state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_damaged_checkpoint_is_refused_where_the_one_before_it_is_damaged_too(make):
    config = make("run")
    train_prior(config)
    for path in config.checkpoint_path().parent.glob("*.pt"):
        path.write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match=r"Pass the prior\.pt of a run"):
        train_prior(config, resume=True)
