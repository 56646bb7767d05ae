"""`make gpu`: its steps, their limits, and what is left of a step that failed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vqkernels import native

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import gpu  # noqa: E402

PYTHON = [sys.executable, "-c"]


def test_a_failed_step_does_not_hide_the_rest(tmp_path, capsys):
    steps = [
        gpu.Step("good", [*PYTHON, "print('fine')"], "a.log", 20),
        gpu.Step("bad", [*PYTHON, "print('the reason'); raise SystemExit(3)"], "b.log", 20),
        gpu.Step("missing", ["/nonexistent/tool"], "b.log", 20),
        gpu.Step("told", [*PYTHON, "import sys; print(sys.argv[1])", "{seconds}"], "a.log", 20, spare=5),
        gpu.Step("left out", [*PYTHON, ""], "a.log", 20, reserve=1e6, optional=True),
    ]
    outcomes = gpu.run_steps(steps[:4], 60, tmp_path)
    assert [each.status for each in outcomes] == [0, 3, "could not start: No such file or directory", 0]
    assert [each.failed for each in outcomes] == [False, True, True, False]
    assert (tmp_path / "a.log").read_text().splitlines()[-1] == "15"
    told = capsys.readouterr().out
    assert "bad: FAILED: 3" in told and "the reason" in told and "fine" not in told
    (last,) = gpu.run_steps(steps[4:], 60, tmp_path)
    assert last.status == "left out: no time" and not last.failed


def test_steps_have_limits_and_leave_time_for_others(tmp_path):
    """What a stopped step started is ended with it, and later steps keep what is reserved for them."""
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    command = [*PYTHON, f"{child}; print(p.pid, flush=True); time.sleep(60)"]
    steps = [
        gpu.Step("slow", command, "slow.log", 100),
        gpu.Step("after", [*PYTHON, ""], "after.log", 20, reserve=17),
    ]
    outcomes = gpu.run_steps(steps, 20, tmp_path)
    assert outcomes[0].status == "stopped after 3 s" and outcomes[0].seconds < 12 and outcomes[1].status == 0
    log = (tmp_path / "slow.log").read_text()
    pid = next(int(line) for line in log.splitlines() if line.isdigit())
    # it was asked to stop before it was made to
    assert "KeyboardInterrupt" in log
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
    ).stdout.strip()
    # gone, or dead and not yet fetched by whoever adopts orphans
    assert state[:1] in ("", "Z")
    (spent,) = gpu.run_steps([gpu.Step("none", command, "slow.log", 100)], 1, tmp_path)
    assert spent.status == "no time left" and spent.failed


def test_the_plan_fits_the_time_and_few_files(tmp_path):
    steps = gpu.plan(tmp_path, tmp_path / "gpu.jsonl")
    assert sum(step.reserve for step in steps) < 520
    names = {step.log for step in steps} | {"gpu.jsonl", "gpu-roofline.png", "gpu-summary.json"}
    assert len(names) <= 8 and all(set(name) <= set("abcdefghijklmnopqrstuvwxyz.-") for name in names)
    for step in steps:
        for word in step.command:
            assert not str(word).startswith(str(ROOT)) or Path(word).exists() or Path(word).parent == tmp_path


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run([sys.executable, str(ROOT / "bench/gpu.py")], capture_output=True, text=True)
    assert ran.returncode == 1 and "torch must see a cuda device; got none" in ran.stderr


@pytest.mark.skipif(native.MISSING is not None, reason="the reference takes long")
def test_every_op_on_the_cpu():
    command = [sys.executable, str(ROOT / "bench/every_op.py"), "--device", "cpu", "--backends", "native"]
    ran = subprocess.run([*command, "--seconds", "2"], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and " 0 wrong" in ran.stdout, ran.stdout + ran.stderr
