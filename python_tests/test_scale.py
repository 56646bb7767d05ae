"""Several processes train as one does on the joint batch: wrapped, sharded, resumed, accumulated, launched."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("accelerate")

from processes import two_processes
from small import SIZES

from vqkernels.__main__ import main
from vqkernels.train.checkpoints.checkpoint import load_checkpoint
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.log import read_lines
from vqkernels.train.loop import train
from vqkernels.train.processes import joint_statistics, make_accelerator

needs_tyro = pytest.mark.skipif(
    find_spec("tyro") is None, reason="tyro reads the command line; it is not installed"
)
ROOT = Path(__file__).resolve().parents[1]
STEPS = 8
SMALL = {
    **SIZES,
    "steps": STEPS,
    "log_every": 2,
    "evaluate_every": STEPS,
    "checkpoint_every": STEPS // 2,
}
LAUNCH = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "vqkernels",
]
METHODS = {
    "ste": {"quantizer": "ste", "upkeep": "replacement", "start": "kmeans"},
    "ema": {"quantizer": "ema"},
    "diveq": {"quantizer": "diveq"},
    "sf_diveq": {"quantizer": "sf_diveq", "warmup": 0.25},
    "affine_ema": {"quantizer": "affine_ema"},
    "residual": {"quantizer": "residual"},
    "meta": {"quantizer": "mq", "procedure": "meta", "xi": 0.1},
    "alternated": {"quantizer": "affine", "procedure": "alternated", "inner": 2},
    "accumulate": {"quantizer": "ste", "upkeep": "none", "accumulate": 2},
    "sharded": {"quantizer": "sf_diveq", "warmup": 0.25, "shard": True},
    "sharded parts": {"quantizer": "ste", "upkeep": "none", "accumulate": 2, "shard": True},
    "bf16": {"quantizer": "ste", "upkeep": "none", "precision": "bf16"},
    "sharded bf16": {"quantizer": "ste", "upkeep": "none", "precision": "bf16", "shard": True},
}
# a gradient of a weight sums over at most 4 crops of 8 x 8 positions, and passes through at most 8 layers
TERMS, LAYERS = 256, 8
EPS = 2.0**-23


def small(data, out, **fields):
    return TrainConfig(**{"data": str(data), "out": str(out), **SMALL, **fields})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((26, 22), Image.Resampling.BICUBIC).save(path / f"{number}.png")
    return path


def facts(config, **how):
    """What a run leaves behind: its log and its whole weights."""
    torch.set_num_threads(1)
    result = train(config, **how)
    lines = [line for line in read_lines(config.metrics_path()) if line["split"] == "train"]
    weights = {name: value.detach().clone() for name, value in result.model.state_dict().items()}
    return {"lines": lines, "weights": weights, "step": result.step, "signal": result.signal}


def stop_at(step):
    def on_line(line):
        if line["split"] == "train" and line["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return on_line


def on_rank(rank, data, out):
    from vqkernels.train import loop
    from vqkernels.train.model import build_model
    from vqkernels.train.sharding import shard_model

    # what torchrun tells each process
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ["OMP_NUM_THREADS"] = "1"
    make_accelerator(small(data, out))
    torch.manual_seed(0)
    model = build_model(small(data, out))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shard_model(model)
    held = {n: getattr(p, "_local_tensor", p).numel() for n, p in model.named_parameters()}
    whole = model.state_dict()
    plain = all(type(p) is torch.nn.Parameter for p in model.quantizer.parameters())
    found = {"held": held, "whole": whole, "before": before, "plain": plain}
    for name, fields in METHODS.items():
        found[name] = facts(small(data, f"{out}/two {name}", **fields))
    for name, shard in (("one two", False), ("one two sharded", True)):
        found[name] = facts(small(data, f"{out}/{name}", shard=shard), resume=True)
    # a signal to one process alone, which writes nothing
    line = loop._Run.line

    def line_and_signal(self):
        if rank == 1 and self.step == STEPS // 2:
            signal.raise_signal(signal.SIGTERM)
        return line(self)

    loop._Run.line = line_and_signal
    for name, shard in (("two one", False), ("two one sharded", True)):
        found[name] = facts(small(data, f"{out}/{name}", shard=shard))
    return found


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Everything on one process, and the two processes that did the same on halves of its batches."""
    out = tmp_path_factory.mktemp("runs")
    one = {}
    for name, fields in METHODS.items():
        one[name] = facts(small(data, out / f"one {name}", **(fields | {"shard": False})))
    for name in ("one two", "one two sharded"):
        stopped = facts(small(data, out / name), on_line=stop_at(STEPS // 2))
        assert (stopped["step"], stopped["signal"]) == (STEPS // 2, "SIGTERM")
    one["whole"] = facts(small(data, out / "whole"))
    two = two_processes(on_rank, str(data), str(out))
    return out, one, two


def assert_same_path(one, two, lr=5.5e-4):
    assert [line["step"] for line in one["lines"]] == [line["step"] for line in two["lines"]]
    for a, b in zip(one["lines"], two["lines"], strict=True):
        # roundings of either sign in sums of squares, in another order, behind LAYERS layers; psnr is 10 log10 of one
        bound = LAYERS * TERMS**0.5 * EPS
        assert b["loss"] == pytest.approx(a["loss"], rel=bound)
        assert b["psnr"] == pytest.approx(a["psnr"], abs=10 / np.log(10) * bound)
        # counts are exact
        assert (b["perplexity"], b["usage"]) == (a["perplexity"], a["usage"])
    assert one["weights"].keys() == two["weights"].keys()
    # a step of Adam is lr g / |g|. roundings of either sign in a sum of TERMS terms are sqrt(TERMS) EPS of a term, and
    # sqrt(TERMS) times that of the sum, whose terms have either sign too; once in each of LAYERS layers
    bound = STEPS * lr * LAYERS * TERMS * EPS
    for name, value in one["weights"].items():
        other = two["weights"][name]
        if not (value.is_floating_point() and value.numel()):
            assert torch.equal(value, other), name
            continue
        scale = max(1.0, float(value.abs().max()))
        off = (value.double() - other.double()).square().mean().sqrt()
        assert off <= bound * scale, f"{name}: {off:.3g} > {bound * scale:.3g}"


@pytest.mark.parametrize("name", [name for name in METHODS if "bf16" not in name])
def test_two_processes_train_as_one_on_the_joint_batch(runs, name):
    _, one, two = runs
    for rank in two:
        assert_same_path(one[name], rank[name])
    # ranks do not drift apart
    for key, value in two[0][name]["weights"].items():
        assert torch.equal(value, two[1][name]["weights"][key]), key


def test_accumulated_parts_are_one_step_without_noise(runs, data, tmp_path):
    whole = facts(small(data, tmp_path / "whole", **(METHODS["accumulate"] | {"accumulate": 1})))
    assert_same_path(whole, runs[1]["accumulate"])


@pytest.mark.parametrize("name", ["bf16", "sharded bf16"])
def test_half_precision_stays_near_float32(runs, data, tmp_path, name):
    _, one, two = runs
    whole = facts(small(data, tmp_path / "float32", **(METHODS[name] | {"precision": "no", "shard": False})))
    for found in (one[name], two[0][name]):
        for a, b in zip(whole["lines"], found["lines"], strict=True):
            # every layer rounds once, to 8 bits
            assert b["loss"] == pytest.approx(a["loss"], rel=LAYERS * 2.0**-8)
        assert all(v.dtype == torch.float32 for v in found["weights"].values() if v.is_floating_point())
    for key, value in two[0][name]["weights"].items():
        assert torch.equal(value, two[1][name]["weights"][key]), key


@pytest.mark.parametrize("sharded", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(runs, data, sharded):
    out, one, two = runs
    more, fewer = ("one two sharded", "two one sharded") if sharded else ("one two", "two one")
    assert_same_path(one["whole"], two[0][more])
    for rank in two:
        assert (rank[fewer]["step"], rank[fewer]["signal"]) == (STEPS // 2, "SIGTERM")
    assert_same_path(one["whole"], facts(small(data, out / fewer), resume=True))


def test_shards_are_parts_and_codes_are_whole(runs):
    for rank in runs[2]:
        assert rank["plain"]
        for name, value in rank["before"].items():
            assert torch.equal(value, rank["whole"][name]), name
    for name, held in runs[2][0]["held"].items():
        total = runs[2][0]["whole"][name].numel()
        other = runs[2][1]["held"][name]
        assert (held, other) == (total, total) if name.startswith("quantizer.") else held + other == total


@pytest.mark.parametrize("plugin", ["FSDP", "DEEPSPEED"])
def test_other_ways_of_sharding_are_refused(monkeypatch, data, tmp_path, plugin):
    monkeypatch.setenv(f"ACCELERATE_USE_{plugin}", "true")
    with pytest.raises(
        RunError, match=f"launcher must start plain processes; got Accelerate's {plugin} plugin"
    ):
        train(small(data, tmp_path / "run"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"procedure": "alternated", "quantizer": "ste"}, "procedure must be joint with shard"),
        ({"adversarial": 0.8}, "adversarial must be 0 with shard"),
        ({"weights_ema": 0.9}, "weights_ema must be 0 with shard"),
        ({"precision": "fp16"}, "precision must be no or bf16 with shard"),
    ],
)
def test_what_cannot_be_sharded_is_refused(data, tmp_path, fields, words):
    with pytest.raises(RunError, match=words):
        small(data, tmp_path, shard=True, **fields)


def test_batch_statistics_are_joint_or_refused():
    class Place:
        num_processes, device = 2, torch.device("cpu")

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    with pytest.raises(RunError, match="backbone must have none on several CPU processes"):
        joint_statistics(model, Place)
    Place.device = torch.device("cuda")
    assert isinstance(joint_statistics(model, Place)[1], torch.nn.SyncBatchNorm)
    Place.num_processes = 1
    again = torch.nn.Sequential(torch.nn.BatchNorm2d(4))
    assert type(joint_statistics(again, Place)[0]) is torch.nn.BatchNorm2d


def words(config):
    found = ["train"]
    for name in ("data", "out", "quantizer", *SMALL):
        found += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return found


@needs_tyro
def test_a_signal_to_torchrun_stops_all_with_one_checkpoint(data, tmp_path):
    config = small(data, tmp_path / "run", quantizer="ste", steps=100_000, checkpoint_every=100_000)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [*LAUNCH, *words(config)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if config.metrics_path().exists() and len(read_lines(config.metrics_path())) >= 2:
            break
        time.sleep(0.02)
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    step = load_checkpoint(config.checkpoint_path()).step
    # only one process says so
    assert errors.count(f"Stopped by SIGTERM: at step {step}; the checkpoint is in") == 1, errors
    assert step == read_lines(config.metrics_path())[-1]["step"] >= 4


@needs_tyro
def test_only_the_first_process_prints(monkeypatch, capsys, data, tmp_path):
    refused = [*words(small(data, tmp_path / "run")), "--lr=-1"]
    unknown = ["train", "--no-such-option"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        assert main(refused) == 2
        found = capsys.readouterr()
        assert (found.err + found.out).count("lr must be finite and above 0") == said
        with pytest.raises(SystemExit) as ended:
            main(unknown)
        assert ended.value.code == 2
        found = capsys.readouterr()
        assert bool(found.err + found.out) == bool(said)
    monkeypatch.setenv("RANK", "0")
    assert main(["demo"]) == 2
    assert "demo: launcher must start one process; got 2" in capsys.readouterr().err


def test_a_precision_of_the_launcher_is_not_ignored(monkeypatch, data, tmp_path):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(
        RunError, match=r"precision must be the launcher's 'bf16'; got 'no'\. Pass --precision bf16"
    ):
        train(small(data, tmp_path / "run"))
