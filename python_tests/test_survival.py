"""What a run survives: kills, damaged and foreign checkpoints, a full disk, a loss that is not finite, SIGTERM."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from importlib.util import find_spec

import kills
import pytest
import torch

from vqkernels.train.checkpoints.checkpoint import CheckpointStore, load_checkpoint, store_of
from vqkernels.train.checkpoints.snapshot import Checkpoint
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.log import MetricsLog, Window, read_lines
from vqkernels.train.loop import train

needs_tyro = pytest.mark.skipif(
    find_spec("tyro") is None, reason="tyro reads the command line; it is not installed"
)
TINY = {key: value for key, value in kills.OPTIONS.items() if key != "keep"} | {"evaluate_every": 100}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads wait for each other longer than such small models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return kills.make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def make(pictures, tmp_path):
    def config(name="run", **fields):
        values = {"data": str(pictures), "out": str(tmp_path / name), "quantizer": "ste", "steps": 12}
        return TrainConfig(**{**TINY, **values, **fields})

    return config


def snapshot(step, value=0.0):
    model = {"weight": torch.full((100,), value + step)}
    return Checkpoint(TrainConfig(), step, model, {"optimizers": []}, {}, {"cpu0": torch.get_rng_state()})


def filled(folder, *steps, keep=3):
    store = CheckpointStore(folder, keep)
    for step in steps:
        store.save(snapshot(step))
    return store


def refused(action):
    with pytest.raises(RunError) as caught:
        action()
    text = str(caught.value)
    assert " must " in text and "; got " in text and text.endswith(".") and "\n" not in text
    return text


def names(store):
    return sorted(path.name for path in store.folder.iterdir())


@needs_tyro
def test_kills_lose_nothing(tmp_path):
    figures = kills.survive(tmp_path, kills=2, steps=60)
    assert figures["lost"] == 0 and figures["differences"] == [], figures


def test_the_comparison_sees_one_bit(make, tmp_path):
    one, other = make("one", steps=3), make("other", steps=3)
    train(one)
    shutil.copytree(one.out, other.out)
    assert kills.differences(tmp_path / "one", tmp_path / "other") == []
    store = store_of(tmp_path / "other")
    saved = store.load()
    moments = saved.learner["optimizers"][0]["state"][0]["exp_avg"]
    moments.view(torch.int32)[(0,) * moments.dim()] ^= 1
    store.save(saved)
    assert kills.differences(tmp_path / "one", tmp_path / "other") == ["learner.optimizers.0.state.0.exp_avg"]


def test_the_last_few_are_kept_and_listed(tmp_path):
    store = filled(tmp_path / "checkpoints", 1, 2, 3, 4, keep=2)
    assert names(store) == ["manifest.json", "step-00000003.pt", "step-00000004.pt"]
    assert [(entry.step, entry.file) for entry in store.entries()] == [
        (3, "step-00000003.pt"),
        (4, "step-00000004.pt"),
    ]
    for entry in store.entries():
        content = (store.folder / entry.file).read_bytes()
        assert entry.bytes == len(content) and entry.config["steps"] == TrainConfig().steps
    assert store.latest() == store.folder / "step-00000004.pt"
    assert store.load().step == 4 and store.load(store.folder / "step-00000003.pt").step == 3
    assert load_checkpoint(tmp_path).step == load_checkpoint(store.folder).step == 4


def test_a_kill_between_the_file_and_its_line_loses_neither(tmp_path):
    store = filled(tmp_path / "checkpoints", 1, 2)
    before = (store.folder / "manifest.json").read_bytes()
    store.save(snapshot(3))
    (store.folder / "manifest.json").write_bytes(before)
    (store.folder / ".step-00000004.pt.part").write_bytes(b"PK\x03\x04 half")
    assert store.latest().name == "step-00000003.pt" and store.load().step == 3
    store.settle(store.load())
    assert [entry.step for entry in store.entries()] == [1, 2, 3]
    assert names(store) == ["manifest.json", *(f"step-0000000{n}.pt" for n in (1, 2, 3))]


def test_a_kill_before_the_old_ones_go(tmp_path):
    store = filled(tmp_path / "checkpoints", 1, 2, 3, keep=2)
    old = snapshot(1)
    (store.folder / "step-00000001.pt").write_bytes(old.to_bytes())
    assert store.load().step == 3
    store.save(snapshot(4))
    assert [path for path in names(store) if path.startswith("step")] == [
        "step-00000003.pt",
        "step-00000004.pt",
    ]


def test_without_the_list_the_files_speak_for_themselves(tmp_path):
    store = filled(tmp_path / "checkpoints", 1, 2, 3)
    (store.folder / "manifest.json").write_text("{")
    assert "manifest.json" in refused(store.load) and "Remove it" in refused(store.load)
    (store.folder / "manifest.json").unlink()
    store.settle(store.load())
    assert [entry.step for entry in store.entries()] == [1, 2, 3]
    assert store.load().step == 3


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def foreign(path):
    size, other = path.stat().st_size, snapshot(3, value=1.0).to_bytes()
    assert len(other) == size
    path.write_bytes(other)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "truncated or replaced"),
        (alter, "altered or of another run"),
        (foreign, "altered or of another run"),
        (os.unlink, "missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(tmp_path, damage, said):
    store = filled(tmp_path / "checkpoints", 1, 2, 3)
    damage(store.folder / "step-00000003.pt")
    text = refused(store.load)
    assert said in text and f"Pass --resume-from {store.folder / 'step-00000002.pt'} " in text
    damage(store.folder / "step-00000002.pt") if damage is not foreign else truncate(
        store.folder / "step-00000002.pt"
    )
    assert f"--resume-from {store.folder / 'step-00000001.pt'} " in refused(store.load)
    truncate(store.folder / "step-00000001.pt")
    assert "no older one is whole" in refused(store.load)


def test_a_checkpoint_that_nobody_listed_and_is_not_whole(tmp_path):
    store = filled(tmp_path / "checkpoints", 1)
    (store.folder / "step-00000009.pt").write_bytes(b"PK\x03\x04 half")
    assert "not in the manifest" in refused(store.load) and "step-00000001.pt" in refused(store.load)
    (store.folder / "step-00000009.pt").write_bytes(snapshot(5).to_bytes())
    assert "of step 5" in refused(store.load)


def test_a_run_goes_on_from_an_older_checkpoint_bit_for_bit(make, tmp_path):
    whole, damaged = make("whole"), make("damaged")
    train(whole)
    train(damaged)
    folder = tmp_path / "damaged" / "checkpoints"
    assert names(store_of(tmp_path / "damaged")) == ["manifest.json", "step-00000009.pt", "step-00000012.pt"]
    alter(folder / "step-00000012.pt")
    with pytest.raises(RunError, match=r"Pass --resume-from .*step-00000009.pt"):
        train(damaged, resume=True)
    result = train(damaged, resume=True, resume_from=folder / "step-00000009.pt")
    assert (result.started_at, result.step) == (9, 12)
    assert kills.differences(tmp_path / "whole", tmp_path / "damaged") == []
    # a copy kept elsewhere does as well, in a folder that has nothing
    backup = shutil.copy(folder / "step-00000009.pt", tmp_path / "backup.pt")
    elsewhere = make("elsewhere")
    assert train(elsewhere, resume_from=type(tmp_path)(backup)).started_at == 9
    a, b = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "elsewhere")
    assert all(torch.equal(value, b.model[name]) for name, value in a.model.items())


class Full:
    """Lets so many calls of the system pass, then the disk is full."""

    def __init__(self, monkeypatch, calls):
        self.left, self.log = calls, []
        for name in ("write", "fsync", "replace", "open"):
            monkeypatch.setattr(os, name, self.limited(name, getattr(os, name)))

    def limited(self, name, call):
        def limited(*arguments, **others):
            # opening to read takes no room
            reads = name == "open" and not arguments[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)
            if not reads:
                self.log.append(name)
                if self.left == 0:
                    if name == "write" and len(arguments[1]) > 1:
                        # as the system does: a part fits, the next call says no
                        call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.left -= 1
            return call(*arguments, **others)

        return limited


def test_a_full_disk_at_every_call_of_the_store(tmp_path, monkeypatch):
    original = filled(tmp_path / "original", 1, 2, keep=2)
    with monkeypatch.context() as patch:
        probe = Full(patch, 10**6)
        shutil.copytree(original.folder, tmp_path / "probe")
        probe.log.clear()
        CheckpointStore(tmp_path / "probe", 2).save(snapshot(3))
        calls = len(probe.log)
    # two files, each opened, written, flushed and renamed, and the folder flushed after each
    assert [call for call in probe.log if call != "open"] == 2 * ["write", "fsync", "replace", "fsync"]
    for position in range(calls):
        store = CheckpointStore(tmp_path / f"full{position}", 2)
        shutil.copytree(original.folder, store.folder)
        with monkeypatch.context() as patch:
            Full(patch, position)
            text = refused(lambda store=store: store.save(snapshot(3)))
        assert "lie on a disk with room" in text and "No space left" in text and "--resume" in text
        assert not list(store.folder.glob(".*.part")), position
        assert store.load().step in (2, 3) and store.load(store.folder / "step-00000002.pt").step == 2
        store.settle(store.load())
        store.save(snapshot(4))
        assert store.load().step == 4 and len(store.entries()) == 2


def test_a_full_disk_at_every_call_of_a_run(make, tmp_path, monkeypatch):
    whole = make("whole", steps=6, log_every=2)
    with monkeypatch.context() as patch:
        probe = Full(patch, 10**6)
        train(whole)
        calls = len(probe.log)
    # some of them: every one is covered for the store and for the log alone
    for position in range(1, calls, 5):
        config = make(f"full{position}", steps=6, log_every=2)
        with monkeypatch.context() as patch:
            Full(patch, position)
            assert "No space left" in refused(lambda config=config: train(config))
        assert train(config, resume=True).step == 6
        assert kills.differences(tmp_path / "whole", tmp_path / f"full{position}") == []


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode != 0:
        pytest.skip("this user cannot mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(make, small_disk, tmp_path):
    whole, config = make("whole", width=16), make("disk/run", width=16)
    train(whole)
    text = refused(lambda: train(config))
    assert "No space left on device" in text and "Free some space" in text
    saved = store_of(small_disk / "run").load()
    assert 0 < saved.step < 12 and not list(small_disk.rglob(".*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert train(config, resume=True).started_at == saved.step
    assert kills.differences(tmp_path / "whole", small_disk / "run") == []


def test_a_line_cut_off_by_a_full_disk_is_dropped(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.write({"step": 1})
        with monkeypatch.context() as patch:
            Full(patch, 0)
            assert "No space left" in refused(lambda: log.write({"step": 2}))
            assert "No space left" in refused(log.sync)
    assert read_lines(path) == [{"step": 1}] and len(path.read_text()) > len('{"step": 1}\n')
    with MetricsLog(path, 1) as log:
        log.write({"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(("every", "procedure"), [(1, "joint"), (100, "joint"), (1, "meta")])
def test_a_loss_that_is_not_finite_is_kept_with_its_batch(make, tmp_path, every, procedure):
    config = make(lr=1e30, steps=40, checkpoint_every=every, log_every=10, procedure=procedure)
    text = refused(lambda: train(config))
    (path,) = (tmp_path / "run").glob("nan-step-*.pt")
    assert text.startswith("train: loss must stay finite; got ") and str(path) in text
    assert "torch.load(" in text and "--lr" in text
    bad = torch.load(path, weights_only=True)
    assert f"at step {bad['step']}, " in text and TrainConfig.from_json(bad["config"]) == config
    assert bad["batch"].shape == (4, 3, 16, 16)
    assert all(value.isfinite().all() for value in bad["before"]["model"].values())
    spoilt = not all(value.isfinite().all() for value in bad["after"]["model"].values())
    assert spoilt or not bad["loss"].isfinite()
    found = store_of(tmp_path / "run").latest()
    if every == 1:
        assert found is not None
    if found is not None:
        assert all(value.isfinite().all() for value in load_checkpoint(found).model.values())
        assert load_checkpoint(found).step <= bad["step"]


def test_the_first_bad_step_is_found_among_many():
    window = Window(4, torch.device("cpu"))
    losses = [1.0, 2.0, float("nan"), 3.0, float("inf")]
    for loss in losses:
        window.add(torch.tensor(loss), torch.tensor(0.5), torch.zeros(2, 1, dtype=torch.int64))
    assert window.first_bad(torch.clone) == 3 and window.first_bad(torch.clone) is None
    window.add(torch.tensor(1.0), torch.tensor(0.5), torch.zeros(2, 1, dtype=torch.int64))
    assert window.first_bad(torch.clone) is None


@needs_tyro
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(pictures, tmp_path, number, code):
    out = tmp_path / "run"
    words = kills.command(pictures, out, 100000, checkpoint_every=100000, evaluate_every=100000)
    process = subprocess.Popen(
        words, env=kills.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and read_lines(out / "metrics.jsonl"):
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert f"Stopped by {signal.Signals(number).name}" in said
    assert store_of(out).load().step >= 2


def test_extras_are_means_of_the_steps_that_had_them():
    window = Window(4, torch.device("cpu"))
    for number in range(3):
        extras = {"norm": torch.tensor(float(number))} if number else {}
        indices = torch.zeros(2, 1, dtype=torch.int64)
        window.add(torch.tensor(1.0), torch.tensor(0.5), indices, extras)
    assert window.line(torch.clone)["norm"] == 1.5
    other = Window(4, torch.device("cpu"))
    other.restore(window.state(torch.clone))
    assert json.dumps(other.line(torch.clone)) == json.dumps(window.line(torch.clone))
