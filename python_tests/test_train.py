"""The trainer and the command line: restarts, logs, measurements, pictures and refusals."""

import json
import math
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small import SIZES

from vqkernels.__main__ import main
from vqkernels.nn.metrics import code_counts
from vqkernels.train.checkpoints.checkpoint import load_checkpoint
from vqkernels.train.checkpoints.restore import load_run
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import load_images
from vqkernels.train.demo import run_demo
from vqkernels.train.log import MetricsLog, Window, read_lines
from vqkernels.train.loop import train
from vqkernels.train.measures.evaluate import evaluate, modes_of, reconstruct, to_pixels
from vqkernels.train.model import build_model
from vqkernels.train.timing import QuantizerShare

ROOT = Path(__file__).resolve().parents[1]
needs_tyro = pytest.mark.skipif(
    find_spec("tyro") is None, reason="tyro reads the command line; it is not installed"
)
SMALL = {
    **SIZES,
    "steps": 12,
    "log_every": 4,
    "evaluate_every": 6,
    "checkpoint_every": 5,
}
TIMINGS = {"seconds_per_step", "quantizer_share"}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Eleven small pictures with some structure."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(11):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((26, 22), Image.Resampling.BICUBIC).save(path / f"{number:02d}.png")
    return path


@pytest.fixture
def make(folder, tmp_path):
    def config(name="run", **fields):
        return TrainConfig(**{"data": str(folder), "out": str(tmp_path / name), **SMALL, **fields})

    return config


def untimed(path):
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in read_lines(path)]


def same_weights(one, other):
    a, b = load_checkpoint(one.checkpoint_path()), load_checkpoint(other.checkpoint_path())
    assert a.step == b.step and a.model.keys() == b.model.keys()
    assert all(torch.equal(value, b.model[name]) for name, value in a.model.items())
    torch.testing.assert_close(a.learner, b.learner, rtol=0, atol=0)
    assert untimed(one.metrics_path()) == untimed(other.metrics_path())


@pytest.mark.parametrize(
    "quantizer", ["sf_diveq", "sf_diveq_detach", "diveq", "diveq_detach", "nsvq", "ste", "ema"]
)
def test_every_quantizer_stops_and_goes_on_bit_for_bit(make, quantizer):
    whole, parts = make("whole", quantizer=quantizer), make("parts", quantizer=quantizer)
    assert train(whole).signal is None
    seen = []

    def stop_once(line):
        seen.append(line["step"])
        if line["step"] in (4, 8) and seen.count(line["step"]) == 1:
            signal.raise_signal(signal.SIGINT if line["step"] == 4 else signal.SIGTERM)

    first = train(parts, on_line=stop_once)
    assert (first.signal, first.step) == ("SIGINT", 4)
    second = train(parts, resume=True, on_line=stop_once)
    assert (second.signal, second.step, second.started_at) == ("SIGTERM", 8, 4)
    last = train(parts, resume=True)
    assert (last.signal, last.step, last.started_at) == (None, 12, 8)
    same_weights(whole, parts)


def test_the_handlers_of_the_caller_come_back(make):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(make(quantizer="ste", steps=1))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def command(config):
    words = [sys.executable, "-m", "vqkernels", "train", "--resume", "--no-report"]
    for name in ("data", "out", *SMALL):
        words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return words


def test_an_earlier_run_is_not_overwritten(make):
    config = make(quantizer="ste", steps=2)
    train(config)
    with pytest.raises(
        RunError, match=r"out must hold no earlier run; got .*step-00000002.pt. Pass --resume"
    ):
        train(config)
    with pytest.raises(RunError, match=r"same configuration; got .*lr \(0.00055, 0.1\)"):
        train(make(quantizer="ste", steps=2, lr=0.1), resume=True)
    assert train(config, resume=True).started_at == 2


def test_refusals_come_before_training(make, tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"train: out must be a folder that can be written; got .*file"):
        train(make("file/run"))
    with pytest.raises(RunError, match="data must be photos or a folder"):
        train(make(data=str(folder / "nowhere")))
    if not torch.cuda.is_available():
        with pytest.raises(RunError, match="precision must be one that this device has; got 'fp16'"):
            train(make(precision="fp16"))


def test_lines_of_the_log(make):
    config = make(steps=12)
    told = []
    train(config, on_line=told.append)
    lines = read_lines(config.metrics_path())
    assert lines == told
    trained = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in trained] == [4, 8, 12]
    held_out = [line for line in lines if line["split"] == "held_out"]
    assert [line["step"] for line in held_out] == [6, 12]
    # two of twelve steps are the warm-up, so usage is known from the first line on
    assert all(0 < line["usage"] <= 1 and 1 <= line["perplexity"] <= 7.001 for line in trained)
    assert [line["lr"] for line in trained] == [5.5e-4, 5.5e-4 / 2, 5.5e-4 / 4]
    assert all(line["seconds_per_step"] > 0 for line in trained)


def test_a_window_is_the_mean_of_its_steps():
    window = Window(4, torch.device("cpu"))
    window.add(torch.tensor(1.0), torch.tensor(0.5), torch.tensor([[0], [1], [-1]]))
    window.add(torch.tensor(3.0), torch.tensor(0.3), torch.tensor([[0], [1]]))
    line = window.line(torch.clone)
    # float32 inputs, summed in float64
    assert line["loss"] == 2.0
    assert line["psnr"] == pytest.approx(10 * math.log10(4 / 0.4), rel=1e-6)
    assert line["perplexity"] == pytest.approx(2.0, rel=1e-6) and line["usage"] == 0.5
    other = Window(4, torch.device("cpu"))
    other.restore(window.state(torch.clone))
    assert other.line(torch.clone) == line


def test_a_log_forgets_what_follows_a_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    with MetricsLog(path, 2) as log:
        log.write({"step": 4})
    assert [line["step"] for line in read_lines(path)] == [1, 2, 4]


def test_the_share_of_the_quantizer_is_measured(make):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            time.sleep(0.02)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(0.04)
            return gradient

    model = build_model(make(quantizer="diveq"))
    inner = model.quantizer.estimator.forward
    model.quantizer.estimator.forward = lambda x, *rest: inner(Slow.apply(x), *rest)
    images = torch.rand(2, 3, 16, 16)
    measured = []
    with QuantizerShare(model.quantizer, torch.device("cpu")) as timer:
        for step in range(3):
            timer.begin(step, active=True)
            model(images).reconstruction.sum().backward()
            time.sleep(0.06)
            timer.end()
            measured.append(timer._step_seconds)
        share = timer.share()
    assert measured[0] == measured[1] == measured[2]
    # step 0 is the only sample: at least 60 ms of the quantizer, at least 60 ms of the rest
    assert share is not None and timer._quantizer_seconds >= 0.06 and 0 < share < 1
    assert timer._step_seconds - timer._quantizer_seconds >= 0.06
    assert not model.quantizer._forward_hooks and not model.quantizer._forward_pre_hooks


def test_three_evaluation_modes(make):
    result = train(make())
    assert modes_of(result.model) == ("codeword", "curve", "segment")
    found = {mode: evaluate(result.model, result.images, mode=mode) for mode in modes_of(result.model)}
    assert found["codeword"].bits_per_latent == 3 and found["codeword"].bits_per_pixel == 3 / 16
    assert found["curve"].bits_per_latent == math.inf
    assert found["segment"].bits_per_latent == math.log2(7) + 4
    assert [one.counted for one in found.values()] == ["codes", "segments", "segments"]
    for one in found.values():
        assert one.images == 1 and math.isfinite(one.psnr) and one.ssim is not None and -1 <= one.ssim <= 1
        assert 1 <= one.perplexity <= 8 and 0 < one.usage <= 1
    assert result.model.training and result.model.quantizer.estimator.evaluation == "codeword"


def test_measurements_against_their_definitions(make):
    result = train(make(quantizer="ste"))
    model, images = result.model.eval(), result.images
    assert modes_of(model) == ("codeword",)
    found = evaluate(model, images)
    (shown,) = images.validation()
    device = next(model.parameters()).device
    with torch.no_grad():
        reconstruction, indices, _ = model(shown.image[None].to(device))
    error = (reconstruction[0].cpu().clamp(-1, 1) - shown.image).double().square().mean().item()
    assert found.psnr == pytest.approx(10 * math.log10(4 / error), rel=1e-6)
    p = code_counts(indices, 8).double() / indices.numel()
    entropy = -sum(float(q) * math.log(q) for q in p if q > 0)
    assert found.perplexity == pytest.approx(math.exp(entropy), rel=1e-5)
    assert found.usage == pytest.approx(float((p > 0).double().mean()))
    pixels = reconstruct(model, [shown])[0]
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 24, 3)
    assert np.array_equal(to_pixels(shown.image), images.held_out[0].read()[:20, :24])


@needs_tyro
def test_a_checkpoint_evaluates_as_the_run_did(make, capsys, tmp_path):
    config = make()
    result = train(config)
    model, images, loaded = load_run(config.checkpoint_path())
    assert loaded == config
    assert evaluate(model, images) == evaluate(result.model, result.images)
    picture = tmp_path / "picture.png"
    assert main(["evaluate", "--checkpoint", str(config.checkpoint_path()), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("codeword", "curve", "segment", "PSNR dB", "segments"))
    with Image.open(picture) as image:
        assert image.width > 300


def test_a_run_in_its_warm_up_cannot_be_measured(make):
    config = make(warmup=0.9, evaluate_every=1)
    train(config, on_line=lambda line: signal.raise_signal(signal.SIGINT))
    with pytest.raises(RunError, match="past its warm-up; got step 4 of a warm-up of 11"):
        load_run(config.checkpoint_path())


@pytest.fixture
def small_demo(monkeypatch, folder):
    """The demonstration on small pictures."""
    import vqkernels.train.demo as module

    def config(**fields):
        return TrainConfig(**{**SMALL, "data": str(folder), **fields})

    monkeypatch.setattr(module, "TrainConfig", config)


@needs_tyro
def test_the_demo_leaves_what_it_promises(small_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--steps", "12"]) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith(("SF-DiVeQ", "STE"))]
    assert [line.split()[:2] for line in table] == [
        ["SF-DiVeQ", "codeword"],
        ["SF-DiVeQ", "curve"],
        ["SF-DiVeQ", "segment"],
        ["STE", "codeword"],
    ]
    for name in ("reconstructions.png", "training.png"):
        with Image.open(out / name) as image:
            assert image.width >= 500 and image.height >= 500
            assert np.asarray(image.convert("L")).std() > 10
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"sf_diveq", "ste"}
    assert [line.get("mode") for line in lines if line["split"] == "final"] == [
        "codeword",
        "curve",
        "segment",
        "codeword",
    ]
    assert all(load_checkpoint(out / name).step == 12 for name in ("sf_diveq", "ste"))


def test_the_demo_goes_on_and_does_not_train_twice(small_demo, tmp_path):
    told = []

    def stop(line):
        told.append(line["step"])
        if len(told) == 1:
            signal.raise_signal(signal.SIGTERM)

    runs, stopped = run_demo(tmp_path, steps=12, on_line=stop)
    assert stopped == "SIGTERM" and runs == []
    runs, stopped = run_demo(tmp_path, steps=12, on_line=stop)
    assert stopped is None and [run.label for run in runs] == ["SF-DiVeQ", "STE"]
    before = len(told)
    again, _ = run_demo(tmp_path, steps=12, on_line=stop)
    assert len(told) == before
    assert [run.evaluations for run in again] == [run.evaluations for run in runs]
    run_demo(tmp_path, steps=12, fresh=True, on_line=stop)
    assert len(told) > before


@needs_tyro
def test_the_command_line_says_what_is_wrong_in_one_line(make, capsys, tmp_path):
    words = command(make())[3:]
    assert main(["evaluate", "--checkpoint", str(tmp_path / "none.pt")]) == 2
    assert capsys.readouterr().err.startswith("error: checkpoint: path must name a file; got ")
    (tmp_path / "file").write_text("")
    assert main([*words, "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    refused = [
        ([*words, "--crop", "30"], "error: train: crop must be a multiple of"),
        ([*words, "--steps", "0"], "error: train: steps must be at least 1; got 0. Pass 1 or more."),
        (["demo", "--steps", "0"], "error: train: steps must be at least 1; got 0. Pass 1 or more."),
    ]
    if not torch.cuda.is_available():
        said = "error: train: precision must be one that this device has; got 'fp16' on cpu"
        refused.append(([*words, "--precision", "fp16"], said))
    for bad, words_of_it in refused:
        assert main(bad) == 2
        said = capsys.readouterr().err
        assert said.startswith(words_of_it) and said.count("\n") == 1
    for log in ('{"my": "own log"}\n', "\udcff"):
        other = make("other")
        other.metrics_path().parent.mkdir(exist_ok=True)
        other.metrics_path().write_text(log, errors="surrogateescape")
        assert main(command(other)[3:]) == 2
        assert "train: metrics.jsonl must be the log of a run; got" in capsys.readouterr().err


def test_photographs_train_for_a_few_steps(tmp_path):
    config = TrainConfig(**{**SMALL, "out": str(tmp_path), "steps": 3, "evaluate_every": 100, "crop": 32})
    assert train(config).step == 3
    assert [image.name for image in load_images(config).validation()] == ["coffee", "rocket"]
