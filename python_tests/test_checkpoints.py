"""Checkpoints and configurations: round trips, whole files only, one sentence for each refusal."""

import dataclasses
import json
import os
import pickle
import zipfile

import pytest
import torch

from vqkernels.train.checkpoints.checkpoint import FORMAT, Checkpoint, load_checkpoint
from vqkernels.train.checkpoints.files import open_folder, replace_file
from vqkernels.train.config import FREE_FIELDS, RunError, TrainConfig
from vqkernels.train.model import build_model

SMALL = {"width": 8, "latent_dim": 4, "num_codes": 8, "crop": 16, "batch_size": 2, "residual_blocks": 1}


def make(step=3, **fields):
    config = TrainConfig(quantizer="ste", **SMALL, **fields)
    model = build_model(config)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.rand(2, 3, 16, 16)).reconstruction.sum().backward()
    optimizer.step()
    rng = {"cpu0": torch.get_rng_state()}
    window = {"sums": torch.ones(3)}
    learner = {
        "optimizers": [optimizer.state_dict()],
        "scaler": {},
        "average": None,
        "started": (1, 2.5, "x"),
    }
    return Checkpoint(config, step, model.state_dict(), learner, window, rng), model


def save(checkpoint, path):
    replace_file(path, checkpoint.to_bytes())


def refused(action):
    with pytest.raises(RunError) as caught:
        action()
    text = str(caught.value)
    assert " must " in text and "; got " in text and text.endswith(".") and "\n" not in text
    return text


def test_round_trip(tmp_path):
    saved, _ = make()
    save(saved, tmp_path / "checkpoint.pt")
    loaded = load_checkpoint(tmp_path / "checkpoint.pt")
    assert loaded.config == saved.config and loaded.step == 3 and loaded.version == saved.version
    assert loaded.model.keys() == saved.model.keys()
    for name, value in saved.model.items():
        assert torch.equal(loaded.model[name], value), name
        assert loaded.model[name].stride() == value.stride(), name
    kept, given = loaded.learner["optimizers"][0]["state"], saved.learner["optimizers"][0]["state"]
    assert kept.keys() == given.keys()
    for number, state in given.items():
        assert all(torch.equal(kept[number][key], value) for key, value in state.items())
    assert loaded.learner["started"] == (1, 2.5, "x") and loaded.learner["average"] is None
    assert torch.equal(loaded.rng["cpu0"], saved.rng["cpu0"])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save(make(step=3)[0], path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = refused(lambda: save(make(step=4)[0], path))
    assert "No space left on device" in text
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    replace_file(tmp_path / "file", b"content")
    assert events == ["fsync", "replace", "fsync"]
    assert (tmp_path / "file").read_bytes() == b"content"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_files(tmp_path, share):
    path = tmp_path / "checkpoint.pt"
    save(make()[0], path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    text = refused(lambda: load_checkpoint(path))
    assert str(path) in text and ("truncated" in text or "empty" in text)


def test_a_flipped_bit(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(make()[0], path)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda item: item.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2 + 100] ^= 1
    path.write_bytes(content)
    assert "checksum" in refused(lambda: load_checkpoint(path))


class _Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def test_loading_runs_nothing(tmp_path):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    torch.save({"format": FORMAT, "evil": _Evil(str(trace))}, path)
    assert "plain values only" in refused(lambda: load_checkpoint(path))
    path.write_bytes(pickle.dumps(_Evil(str(trace))))
    assert "another kind of file" in refused(lambda: load_checkpoint(path))
    assert not trace.exists()


def test_foreign_files(tmp_path):
    path = tmp_path / "checkpoint.pt"
    assert "where there is none" in refused(lambda: load_checkpoint(path))
    torch.save({"state_dict": {}}, path)
    assert FORMAT in refused(lambda: load_checkpoint(path))
    torch.save({"format": "vqkernels checkpoint 1", "version": "0.1"}, path)
    text = refused(lambda: load_checkpoint(path))
    assert "'vqkernels checkpoint 1'" in text and "vqkernels 0.1" in text and "Train again" in text
    torch.save([1, 2], path)
    assert "list" in refused(lambda: load_checkpoint(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(lambda: load_checkpoint(path))
    path.write_text("hello")
    refused(lambda: load_checkpoint(path))


def test_another_configuration_names_the_fields(tmp_path):
    saved, _ = make()
    text = refused(lambda: saved.require(dataclasses.replace(saved.config, steps=7, seed=5), tmp_path))
    assert "steps (1200, 7)" in text and "seed (0, 5)" in text and "width" not in text
    free = {"out": "elsewhere", "checkpoint_every": 1, "log_every": 2, "evaluate_every": 3}
    free |= {"keep": 5, "tracker": "tensorboard", "shard": True}
    assert set(free) == FREE_FIELDS
    saved.require(dataclasses.replace(saved.config, **free), tmp_path)


def test_weights_of_another_shape(tmp_path):
    saved, _ = make()
    other = build_model(dataclasses.replace(saved.config, width=4))
    assert "fit its own configuration" in refused(lambda: saved.restore_model(other, tmp_path))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        text = refused(lambda folder=folder: open_folder(folder))
        assert str(folder) in text and "--out" in text
    if os.geteuid() != 0:
        sealed = tmp_path / "sealed"
        sealed.mkdir(mode=0o500)
        refused(lambda: open_folder(sealed))


def test_configuration_round_trip():
    config = TrainConfig(quantizer="diveq", steps=7, noise_std=0.1, out="here")
    assert TrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("change", [{"extra": 1}, {"steps": -1}, {"steps": "many"}, {"quantizer": "magic"}])
def test_configurations_that_cannot_be_read(change):
    values = json.loads(TrainConfig().to_json()) | change
    refused(lambda: TrainConfig.from_json(json.dumps(values)))
    refused(lambda: TrainConfig.from_json("[]"))
    refused(lambda: TrainConfig.from_json("{"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_codes": 1}, "train: num_codes must be at least 2; got 1."),
        ({"num_codes": 0, "quantizer": "ste"}, "train: num_codes must be at least 1; got 0."),
        ({"crop": 30}, "train: crop must be a multiple of 2^downsamplings = 4; got 30. Pass --crop 32"),
        ({"lr": float("nan")}, "train: lr must be finite and above 0; got nan."),
        ({"noise_std": -1.0}, "train: noise_std must be finite and not negative; got -1.0."),
        ({"warmup": 1.0}, "train: warmup must be a fraction between 0 and 1; got 1.0."),
        ({"upkeep": "both"}, "train: upkeep must be paper, warmup or none for sf_diveq"),
        ({"steps": 1, "batch_size": 1}, "train: warmup must leave at least num_codes = 256 latents"),
        ({"out": ""}, "train: out must name a folder; got an empty string."),
        ({"precision": "int8"}, "train: precision must be one of 'no', 'fp16', 'bf16'; got 'int8'."),
        ({"seed": -1}, "train: seed must be at least 0; got -1."),
    ],
)
def test_values_no_run_can_have(fields, said):
    with pytest.raises(RunError) as caught:
        TrainConfig(**fields)
    assert str(caught.value).startswith(said)


def test_the_learning_rate_halves_twice():
    config = TrainConfig(steps=100, lr=1.0)
    rates = [config.lr_at(step) for step in (0, 39, 40, 69, 70, 99)]
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_what_the_papers_give_each_quantizer():
    assert TrainConfig(quantizer="sf_diveq", steps=100).warmup_steps == 10
    assert not TrainConfig(quantizer="sf_diveq").replaces
    assert TrainConfig(quantizer="diveq").replaces and TrainConfig(quantizer="diveq").warmup_steps == 0
    assert not TrainConfig(quantizer="ste").replaces and not TrainConfig(quantizer="ste").warms_up
    assert TrainConfig(quantizer="ste", upkeep="both").replaces
