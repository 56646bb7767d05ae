"""Comparisons: grids, cells in processes of their own, going on after a stop, tables and figures."""

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from PIL import Image

from vqkernels.cli.compare import compare
from vqkernels.train.comparison.cell import RESULT, Result, held_out_crops, measure, read_result
from vqkernels.train.comparison.compare import CellState, Grid, run_cells
from vqkernels.train.comparison.contenders import ABLATIONS, CONTENDERS, contender
from vqkernels.train.comparison.report import report_files, write_report
from vqkernels.train.comparison.table import as_csv, markdown, summarise
from vqkernels.train.config import RunError, TrainConfig
from vqkernels.train.data.images import load_images
from vqkernels.train.log import read_lines
from vqkernels.train.loop import train

ROOT = Path(__file__).resolve().parents[1]
SMALL = TrainConfig(
    num_codes=8,
    latent_dim=4,
    width=8,
    residual_blocks=1,
    crop=16,
    batch_size=8,
    steps=12,
    log_every=4,
    evaluate_every=6,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three pictures with some structure, of which one is held out."""
    path = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((26, 22), Image.Resampling.BICUBIC).save(path / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def small(folder):
    return dataclasses.replace(SMALL, data=str(folder))


def grid(base, methods=("ste", "sf_diveq"), num_codes=(8,), seeds=(0,), ablation=None):
    return Grid(methods, num_codes, seeds, base, ablation)


def invented(cell, **measurements):
    """A finished cell with numbers to recognise."""
    return CellState(cell, Result(cell.config, measurements, "0"))


class TestGrid:
    def test_every_combination_has_a_folder_of_its_own(self, small, tmp_path):
        cells = grid(small, num_codes=(8, 16), seeds=(0, 1)).cells(tmp_path)
        found = [(c.method, c.config.num_codes, c.config.seed) for c in cells]
        assert found == [(m, k, s) for s in (0, 1) for k in (8, 16) for m in ("ste", "sf_diveq")]
        assert len({c.folder for c in cells}) == 8
        assert all(c.folder.parent == tmp_path / "cells" for c in cells)

    def test_all_cells_share_what_the_contenders_do_not_set(self, small, tmp_path):
        free = {"quantizer", "upkeep", "num_codes", "seed", "out"}
        for cell in grid(small, seeds=(0, 1)).cells(tmp_path):
            for field in dataclasses.fields(TrainConfig):
                if field.name not in free:
                    assert getattr(cell.config, field.name) == getattr(small, field.name)

    def test_folders_follow_the_settings_alone(self, small, tmp_path):
        first, second = (grid(base).cells(tmp_path)[0] for base in (small, small))
        assert first.folder == second.folder
        more = dataclasses.replace(small, steps=13)
        rarely = dataclasses.replace(small, checkpoint_every=1)
        assert grid(more).cells(tmp_path)[0].folder != first.folder
        # where checkpoints are made changes no weight
        assert grid(rarely).cells(tmp_path)[0].folder == first.folder

    def test_other_pictures_are_other_cells(self, small, tmp_path):
        pictures = tmp_path / "pictures"
        shutil.copytree(small.data, pictures)
        base = dataclasses.replace(small, data=str(pictures))
        before = grid(base).cells(tmp_path)
        Image.new("RGB", (26, 22)).save(pictures / "0.png")
        assert not {c.folder for c in grid(base).cells(tmp_path)} & {c.folder for c in before}

    def test_ablations_vary_their_field_alone(self, small, tmp_path):
        cells = grid(small, methods=("diveq",), ablation="sigma").cells(tmp_path)
        assert [c.config.noise_std**2 for c in cells] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
        assert len({c.folder for c in cells}) == 4
        assert {c.config.upkeep for c in cells} == {"replacement"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"methods": ("ste", "magic")},
                "compare: methods must be known names; got 'magic'. Pass one of ste",
            ),
            ({"methods": ()}, "compare: methods must be one or more"),
            ({"seeds": (1, 1)}, "compare: seeds must be one or more, each once; got 1, 1"),
            ({"methods": ("ste:magic",)}, "compare: methods must name an upkeep or a start after ':'"),
            ({"ablation": "weather"}, "compare: ablate must be a known ablation; got 'weather'"),
            ({"methods": ("sf_diveq:replacement",)}, "upkeep must be paper, warmup or none for sf_diveq"),
        ],
    )
    def test_refusals(self, small, tmp_path, change, message):
        with pytest.raises(RunError) as caught:
            grid(small, **change).cells(tmp_path)
        assert message in str(caught.value)


class TestContenders:
    def test_each_one_is_a_run(self, small):
        for name in CONTENDERS:
            config = contender(name).config(dataclasses.replace(small, steps=120))
            assert config.quantizer == CONTENDERS[name].overrides["quantizer"]

    def test_each_ablation_is_one(self, small, tmp_path):
        for name, ablation in ABLATIONS.items():
            cells = grid(small, methods=ablation.methods, ablation=name).cells(tmp_path)
            assert len({c.folder for c in cells}) == len(ablation.methods) * len(ablation.variants)

    def test_words_after_a_name_replace_its_upkeep(self, small):
        plain = contender("diveq:none")
        assert plain.config(small).upkeep == "none"
        assert plain.label == "DiVeQ (none)"

    def test_labels_are_told_apart(self):
        assert len({who.label for who in CONTENDERS.values()}) == len(CONTENDERS)


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """A grid of two cells that has run."""
    cells = grid(small).cells(tmp_path_factory.mktemp("compare"))
    changes = []
    outcome = run_cells(cells, workers=2, on_change=lambda states, changed: changes.append(changed))
    return cells, outcome, changes


class TestCells:
    def test_a_cell_is_an_ordinary_run(self, finished, tmp_path):
        cells, outcome, changes = finished
        assert outcome.signal is None
        assert [state.error for state in outcome.states] == [None, None]
        assert changes[0] is None and {id(c) for c in changes[1:]} == {id(s) for s in outcome.states}
        # same weights as the same run elsewhere, measured to the same numbers
        config = dataclasses.replace(cells[0].config, out=str(tmp_path / "alone"))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            done = train(config)
            expected = measure(done.model, done.images, config)
        finally:
            torch.set_num_threads(threads)
        found = outcome.states[0].result.measurements
        assert set(found) == set(expected)
        for name in set(expected) - {"seconds_per_step"}:
            assert found[name] == expected[name], name

    def test_finished_cells_are_not_trained_again(self, finished):
        cells, outcome, _ = finished
        before = [(c.folder / RESULT).stat().st_mtime_ns for c in cells]
        again = run_cells(cells)
        assert [state.result for state in again.states] == [state.result for state in outcome.states]
        assert all(state.cached for state in again.states)
        assert [(c.folder / RESULT).stat().st_mtime_ns for c in cells] == before

    def test_results_of_other_settings_are_not_taken(self, finished):
        cells, _, _ = finished
        other = dataclasses.replace(cells[0].config, lr=1e-3)
        assert read_result(cells[0].folder, cells[0].config) is not None
        assert read_result(cells[0].folder, other) is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "vqkernels cell 1"}', '{"format": "other"}'])
    def test_damaged_results_are_not_taken(self, small, tmp_path, text):
        (tmp_path / RESULT).write_text(text)
        assert read_result(tmp_path, small) is None

    def test_one_that_fails_leaves_the_others(self, small, tmp_path):
        cells = grid(small).cells(tmp_path)
        cells[0].folder.mkdir(parents=True)
        log = cells[0].config.metrics_path()
        log.write_text("no log\nat all\n")
        bad, good = run_cells(cells, workers=2).states
        assert bad.result is None and "exit code 2: train: metrics.jsonl must" in bad.error
        assert good.result is not None
        # what was wrong is gone, and the same call finishes the grid
        log.unlink()
        again = run_cells(cells).states
        assert [state.error for state in again] == [None, None]
        assert [state.cached for state in again] == [False, True]

    def test_a_signal_keeps_checkpoints_and_the_same_call_goes_on(self, small, tmp_path):
        base = dataclasses.replace(small, steps=100_000)
        cells = grid(base, methods=("ste",)).cells(tmp_path)
        log = cells[0].config.metrics_path()
        script = (
            "import sys; from pathlib import Path\n"
            "from vqkernels.train.comparison.compare import Grid, run_cells\n"
            "from vqkernels.train.config import TrainConfig\n"
            "base = TrainConfig.from_json(sys.argv[1])\n"
            "done = run_cells(Grid(['ste'], [8], [0], base).cells(Path(sys.argv[2])))\n"
            "sys.exit(0 if done.signal == 'SIGTERM' else 1)\n"
        )
        command = [sys.executable, "-c", script, base.to_json(), str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            _wait_for(lambda: _steps(log) >= 8)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            before = read_lines(log)
            # a parent that is killed takes its cells along
            process = subprocess.Popen(command, cwd=ROOT)
            _wait_for(lambda: _steps(log) > before[-1]["step"])
        finally:
            process.kill()
            process.wait()
        _wait_for(lambda: _unlocked(cells[0].folder))
        # it went on: a run from the start would have measured other times
        assert read_lines(log)[: len(before)] == before
        assert not (cells[0].folder / RESULT).exists()


def _steps(log):
    lines = read_lines(log) if log.exists() else []
    return lines[-1]["step"] if lines else 0


def _wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def _unlocked(folder):
    import fcntl

    with (folder / "cell.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


class TestMeasurements:
    def test_crops_are_the_same_for_all_seeds(self, small):
        first, second = (load_images(dataclasses.replace(small, seed=seed)) for seed in (0, 1))
        crops = held_out_crops(first, 16)
        assert crops.shape == (512, 3, 16, 16)
        assert torch.equal(crops, held_out_crops(second, 16))
        assert len(crops.flatten(1).unique(dim=0)) > 20

    def test_pooled_psnr_is_of_the_error_of_all_crops(self, finished):
        cells, outcome, _ = finished
        # of a finished run, which gives its model back
        done = train(cells[0].config, resume=True)
        crops = held_out_crops(done.images, cells[0].config.crop)
        with torch.no_grad():
            output = done.model.eval()(crops).reconstruction.clamp(-1, 1)
        error = float((output - crops).double().square().mean())
        found = outcome.states[0].result.measurements
        # sums of another order differ in the last bits of float32: errors of 2^-24 each in values up to 1, and dB
        # are 10 / ln 10 times the relative change of the error
        assert found["psnr"] == pytest.approx(10 * math.log10(4 / error), abs=1e-3)
        assert found["bits_per_latent"] == 3


class TestReport:
    @pytest.fixture
    def states(self, small, tmp_path):
        cells = grid(small, num_codes=(8, 16), seeds=(0, 1)).cells(tmp_path)
        return [
            invented(
                cell,
                psnr=20.0 + number,
                usage=0.5,
                perplexity=4.0,
                ssim=0.5,
                distortion_per_bit=0.1,
                seconds_per_step=0.02 if cell.method == "ste" else 0.03,
            )
            for number, cell in enumerate(cells)
        ]

    def test_means_and_deviations_are_over_seeds(self, states):
        entries = summarise(states)
        assert [(e.method, e.num_codes) for e in entries] == [
            ("ste", 8),
            ("sf_diveq", 8),
            ("ste", 16),
            ("sf_diveq", 16),
        ]
        # cells 0 and 4 are STE with K = 8
        assert entries[0].spreads["psnr"].mean == mean([20, 24])
        assert entries[0].spreads["psnr"].deviation == stdev([20, 24])
        assert entries[1].spreads["step_ratio"].mean == pytest.approx(1.5)

    def test_tables_hold_every_entry_best_first(self, small, states):
        rows = list(csv.DictReader(as_csv(summarise(states)).splitlines()))
        assert [(r["method"], float(r["psnr"]), r["seeds"]) for r in rows][:2] == [
            ("ste", 22.0, "2"),
            ("sf_diveq", 23.0, "2"),
        ]
        text = markdown(grid(small, num_codes=(8, 16), seeds=(0, 1)), summarise(states))
        lines = [line for line in text.splitlines() if line.startswith("| 8 |")]
        assert "SF-DiVeQ | 23.00 ± 2.83" in lines[0] and "STE | 22.00 ± 2.83" in lines[1]
        assert "- STE: quantizer ste, upkeep replacement" in text

    def test_measurements_of_several_versions_are_told(self, small, states):
        plan = grid(small, num_codes=(8, 16), seeds=(0, 1))
        assert "vqkernels 0" not in markdown(plan, summarise(states))
        states[0] = dataclasses.replace(
            states[0], result=dataclasses.replace(states[0].result, version="0.1")
        )
        assert "Measured by vqkernels 0, 0.1" in markdown(plan, summarise(states))

    def test_failures_stand_in_the_table(self, small, states):
        states[0] = CellState(states[0].cell, error="exit code 2: no disk")
        text = markdown(grid(small, num_codes=(8, 16), seeds=(0, 1)), summarise(states))
        assert "- STE, K = 8: exit code 2: no disk" in text
        assert "| 1 of 2 |" in text

    @pytest.mark.parametrize("ablation", [None, "sigma", "replacement"])
    def test_files_are_there_before_the_first_cell_and_after(self, small, tmp_path, ablation):
        methods = ("ste", "diveq") if ablation != "sigma" else ("diveq",)
        plan = grid(small, methods=methods, num_codes=(8, 16), seeds=(0, 1), ablation=ablation)
        cells = plan.cells(tmp_path)
        write_report(tmp_path, plan, [CellState(cell) for cell in cells])
        before = [path.read_bytes() for path in report_files(tmp_path, plan)]
        line = {"step": 4, "split": "train", "loss": 1.0, "psnr": 9.0, "perplexity": 2.0, "usage": 0.5}
        for cell in cells:
            cell.folder.mkdir(parents=True)
            cell.config.metrics_path().write_text(
                json.dumps(line) + "\n" + json.dumps(line | {"step": 8}) + "\n"
            )
        done = [invented(c, psnr=20.0, ssim=0.4, perplexity=3.0, distortion_per_bit=None) for c in cells]
        write_report(tmp_path, plan, done)
        after = [path.read_bytes() for path in report_files(tmp_path, plan)]
        assert all(old != new for old, new in zip(before, after, strict=True))
        assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]
        for path in report_files(tmp_path, plan):
            if path.suffix == ".png":
                with Image.open(path) as image:
                    assert min(image.size) > 600


class TestCommand:
    def test_a_finished_comparison_is_told_without_training(self, folder, tmp_path, capsys):
        options = {"data": str(folder), "steps": 12, "width": 8, "crop": 16}
        options |= {"lr": 1e-3, "schedule": "cosine", "rise": 0.1}
        base = TrainConfig(**options)
        cells = Grid(["ste", "mq"], [8], [0], base).cells(tmp_path)
        for cell in cells:
            cell.folder.mkdir(parents=True)
            Result(cell.config, {"psnr": 21.5, "ssim": 0.5}, "0").save(cell.folder)
            cell.config.metrics_path().write_text("")
        assert compare("ste, mq", num_codes="8", seeds="0", out=tmp_path, **options) == 0
        told = capsys.readouterr().out
        assert "2 cells, 2 of them finished before" in told
        assert "| 8 | MQ | 21.50 |" in told and "procedure meta" in told
        assert (tmp_path / "compare.md").read_text() in told

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_codes": "8,x"}, "num_codes must be whole numbers with commas between them; got '8,x'"),
            ({"methods": "ste,,mq"}, "methods must be known names; got ''"),
            ({"workers": 0}, "workers must be at least 1; got 0"),
        ],
    )
    def test_refusals(self, tmp_path, options, message):
        with pytest.raises(RunError, match=message):
            compare(out=tmp_path, **options)

    def test_every_method_is_listed_with_its_settings(self, capsys):
        assert compare(known=True) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(CONTENDERS)
