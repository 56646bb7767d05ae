"""Whose a folder is: one run at a time, and checkpoints that come from elsewhere."""

import dataclasses
import subprocess
import sys

import kills
import pytest
import torch

from vqkernels.train.checkpoints.checkpoint import store_of
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.loop import train

TINY = {key: value for key, value in kills.OPTIONS.items() if key != "keep"} | {"evaluate_every": 100}
# holds a folder until its input ends, or until it is killed
HOLDER = (
    "import sys; from pathlib import Path; from vqkernels.train.checkpoints.files import only_run\n"
    "with only_run(Path(sys.argv[1])): print('here', flush=True); sys.stdin.read()"
)
BUSY = r"train: out must be of one run at a time; got .*run, where one is at work\. Wait"


@pytest.fixture
def make(tmp_path):
    kills.make_pictures(tmp_path / "pictures")
    values = {"data": str(tmp_path / "pictures"), "quantizer": "ste", "steps": 3}

    def config(name="run", **fields):
        return TrainConfig(**{**TINY, **values, "out": str(tmp_path / name), **fields})

    return config


def test_two_runs_do_not_share_a_folder(make, tmp_path):
    config = make()
    (tmp_path / "run").mkdir()
    words = [sys.executable, "-c", HOLDER, config.out]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"here\n"
        with pytest.raises(RunError, match=BUSY):
            train(config)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        # no end in order, and yet no lock is left
        other.kill()
    assert train(config).step == 3


def test_a_run_within_a_run_is_another_run(make):
    with pytest.raises(RunError, match=BUSY):
        train(make(), on_line=lambda _: train(make()))
    # nor does a run that failed keep the folder
    assert train(make(), resume=True).step == 3


def test_a_checkpoint_from_elsewhere_replaces_one_of_its_step(make, tmp_path):
    """Or a kill soon after would go on from the one that was given up."""
    for name in ("one", "other"):
        train(make(name))
    saved = store_of(tmp_path / "one").load()
    zeros = {name: torch.zeros_like(value) for name, value in saved.model.items()}
    (tmp_path / "backup.pt").write_bytes(dataclasses.replace(saved, model=zeros).to_bytes())
    train(make("other"), resume_from=tmp_path / "backup.pt")
    found = store_of(tmp_path / "other").load()
    assert found.step == 3 and not any(value.any() for value in found.model.values())


def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(make, tmp_path):
    for name in ("one", "other"):
        train(make(name, seed=0))
    assert train(make("other"), resume_from=tmp_path / "one").started_at == 3
    assert kills.differences(tmp_path / "one", tmp_path / "other") == []
    assert train(make("fresh"), resume_from=tmp_path / "one" / "checkpoints").started_at == 3
