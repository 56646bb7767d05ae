"""Kill a training at random moments and show that nothing is lost: python python_tests/kills.py --kills 50.

Every launch is a real `python -m vqkernels train --resume`, every kill a SIGKILL: a third at a random moment after the
launch, imports and reading included; a third some steps after its first checkpoint; a third as soon as a file is half
written. After each, the newest checkpoint must be whole and no older than before. The run that went through all of it
must equal, bit for bit, one that was left alone: weights, optimizers, generators, log.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vqkernels.train.checkpoints.checkpoint import load_checkpoint, store_of
from vqkernels.train.log import read_lines

ROOT = Path(__file__).resolve().parents[1]
TIMINGS = {"seconds_per_step", "quantizer_share"}
# small and never pausing: the run writes most of the time, and every third step is a checkpoint
OPTIONS = {
    "quantizer": "sf_diveq",
    "num_codes": 16,
    "latent_dim": 4,
    "width": 8,
    "residual_blocks": 1,
    "crop": 16,
    "batch_size": 4,
    "log_every": 2,
    "evaluate_every": 50,
    "checkpoint_every": 3,
    "keep": 3,
}
KINDS = ("any", "steps", "write")


def make_pictures(folder: Path) -> Path:
    """Write eleven small pictures to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(11):
        coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((26, 22), Image.Resampling.BICUBIC).save(folder / f"{number:02d}.png")
    return folder


def command(data: Path, out: Path, steps: int, **options: object) -> list[str]:
    """The words of a launch."""
    words = [sys.executable, "-m", "vqkernels", "train", "--resume", "--no-report"]
    values = {**OPTIONS, "data": data, "out": out, "steps": steps, **options}
    return words + [
        word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def environment() -> dict[str, str]:
    """Runs are promised to be equal to the bit on a CPU with as many threads."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def finish(words: list[str], out: Path) -> tuple[float, float]:
    """Launch and wait for the end; returns seconds to the first checkpoint, and from there on."""
    began, first = time.monotonic(), None
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            if first is None and newest(out) is not None:
                first = time.monotonic() - began
            time.sleep(0.005)
        if process.returncode != 0:
            said.seek(0)
            raise SystemExit(f"exit {process.returncode}: {said.read()}")
    total = time.monotonic() - began
    return first or total, total - (first or total)


def newest(out: Path) -> Path | None:
    """The newest checkpoint by name, without reading anything."""
    return max((out / "checkpoints").glob("step-*.pt"), default=None)


def kill_once(
    words: list[str], out: Path, kind: str, rng: random.Random, launch: float, spread: float
) -> bool:
    """Launch and kill; return whether it was killed before it finished.

    Args:
        words: of the launch.
        out: folder of the run.
        kind: one of `KINDS`.
        rng: of the moments.
        launch: seconds from a launch to its first checkpoint, about.
        spread: seconds of training that a kill may wait at most.
    """
    before = newest(out)
    process = subprocess.Popen(
        words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        if kind == "any":
            time.sleep(rng.uniform(0, launch + spread))
        else:
            while process.poll() is None and newest(out) == before:
                time.sleep(0.001)
            # the first write is the manifest's, unless the moment is drawn anew
            time.sleep(rng.uniform(0, spread))
            while kind == "write" and process.poll() is None and not any(out.rglob(".*.part")):
                pass
        finished = process.poll() is not None
    finally:
        process.send_signal(signal.SIGKILL)
        _, said = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"exit {process.returncode}: {said}")
    return not finished


def differences(one: Path, other: Path) -> list[str]:
    """Name what differs between two finished runs, bit by bit."""
    a, b = load_checkpoint(one), load_checkpoint(other)
    found = [] if a.step == b.step else [f"step {a.step} {b.step}"]
    for part in ("model", "learner", "window", "rng"):
        found += _differ(getattr(a, part), getattr(b, part), part)
    logs = [
        [
            {key: value for key, value in line.items() if key not in TIMINGS}
            for line in read_lines(out / "metrics.jsonl")
        ]
        for out in (one, other)
    ]
    return found + ([] if logs[0] == logs[1] else [f"log of {len(logs[0])} and {len(logs[1])} lines"])


def _differ(a: object, b: object, name: str) -> list[str]:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        # bytes, because a NaN equals nothing and 0 equals -0
        return [] if same and a.numpy().tobytes() == b.numpy().tobytes() else [name]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [word for key in a for word in _differ(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            word for number in range(len(a)) for word in _differ(a[number], b[number], f"{name}.{number}")
        ]
    return [] if type(a) is type(b) and a == b else [name]


def survive(folder: Path, kills: int, steps: int, seed: int = 0) -> dict[str, object]:
    """Kill one training again and again and compare it with one left alone.

    Args:
        folder: for pictures and runs.
        kills: how many launches are killed.
        steps: of the training.
        seed: of the moments.

    Returns:
        Figures; "differences" names what is not equal, "lost" the checkpoints that went backwards.
    """
    rng = random.Random(seed)
    data, whole, killed = make_pictures(folder / "pictures"), folder / "whole", folder / "killed"
    launch, training = finish(command(data, whole, steps), whole)
    spread = 2 * training / (kills + 1)
    seen, steps_at, found, done, last, lost = Counter[str](), [], list[str](), 0, 0, 0
    while done < kills:
        kind = KINDS[done % len(KINDS)]
        if not kill_once(command(data, killed, steps), killed, kind, rng, launch, spread):
            # faster than its killer: compared like any other, and the kills go on in a fresh run
            seen["runs that ended between kills"] += 1
            found += differences(whole, killed)
            shutil.rmtree(killed)
            last = 0
            continue
        done += 1
        seen[f"kill {kind}"] += 1
        seen["left a half-written file"] += any(killed.rglob(".*.part"))
        store = store_of(killed)
        listed = {entry.file for entry in store.entries()}
        path = store.latest()
        seen["left a file before its line in the list"] += path is not None and path.name not in listed
        step = store.load().step if path is not None else 0
        lost += step < last
        last = step
        steps_at.append(step)
    finish(command(data, killed, steps), killed)
    return {
        "kills": kills,
        "steps": steps,
        "checkpoint after each kill": steps_at,
        "seen": dict(seen),
        "lost": lost,
        "differences": found + differences(whole, killed),
    }


def main() -> int:
    """Run, print the figures, and exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = survive(Path(folder), chosen.kills, chosen.steps, chosen.seed)
    print(json.dumps(figures, indent=1))
    return int(bool(figures["lost"] or figures["differences"]))


if __name__ == "__main__":
    sys.exit(main())
