"""A new estimator is one new file: the table, the tests, the command line and the docs find it there."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import INTERPRETED

from vqkernels.nn import METHODS, Method, register

ROOT = Path(__file__).parent.parent
TRAINABLE = all(importlib.util.find_spec(name) for name in ("accelerate", "PIL", "skimage", "tyro"))
pytestmark = pytest.mark.skipif(INTERPRETED, reason="modules are tested beside the compiled backends")

# what "Adding a quantizer" in CONTRIBUTING.md asks for, and nothing else
TOY = '''"""A straight line to the code, for a test."""

from __future__ import annotations

import torch
from torch import Tensor

from vqkernels.nn.estimators.base import Choice, Context, Estimate, Estimator, finite_rows, flat, gather, mark, no_loss
from vqkernels.nn.methods import Method, register


class Toy(Estimator):
    """z = c_i + x - sg[x]: the gradient of z goes to x and to the code alike (no paper)."""

    has_loss = False

    def cross(self, x: Tensor, codes: Tensor, choice: Choice, context: Context) -> Estimate:
        points, finite = gather(*flat(codes, choice.indices)), finite_rows(x)
        z = mark(x - x.detach(), finite) + torch.where(finite, points, torch.nan)
        z = torch.where(choice.indices[..., None] >= 0, z, 0)
        return Estimate(z.to(x.dtype), choice.indices, no_loss(x))


register("toy", Method("for a test alone", source="no paper", estimator=lambda spec: Toy()))
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with one file more."""
    root = tmp_path_factory.mktemp("project")
    for folder in ("vqkernels", "python_tests", "bench", "docs"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "*.png", "runs", "*.so")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for library in (ROOT / "vqkernels").glob("_C*.so"):
        (root / "vqkernels" / library.name).symlink_to(library)
    shutil.copy(ROOT / "pyproject.toml", root)
    (root / "vqkernels/nn/estimators/toy.py").write_text(TOY)
    return root


def run(copy, *words):
    """Output of a Python process in the copy."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    ran = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=copy, env=environment, timeout=600
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_contract_and_compiler_find_it(copy):
    """The contract tests pass on the new name, and the grid pairs it with every codebook."""
    tests = ("test_quantizers.py", "test_compile.py", "test_export.py")
    grid = "python_tests/test_grid.py::test_pair"
    paths = [*(f"python_tests/{name}" for name in tests), f"{grid}[learned-toy]", f"{grid}[affine-toy]"]
    plain = ("-m", "pytest", "-n0", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "-k", "toy")
    found = run(copy, *plain, "--collect-only", *paths[:-2], "python_tests/test_grid.py")
    assert "test_quantizers.py" in found and "test_compile.py" in found and "[vqgan_lc-toy]" in found
    ran = run(copy, *plain, *paths)
    assert "passed" in ran and "failed" not in ran and "skipped" not in ran


def test_docs_find_it(copy):
    run(copy, "bench/family.py", "docs/quantizers.md")
    assert "| `toy` | for a test alone | no paper |" in (copy / "docs/quantizers.md").read_text()


@pytest.mark.skipif(not TRAINABLE, reason="the command line needs the extra train")
def test_command_line_finds_it(copy, tmp_path):
    sizes = "--steps 2 --width 4 --residual-blocks 0 --latent-dim 4 --num-codes 8 --batch-size 2 --crop 8"
    out = run(
        copy,
        "-m",
        "vqkernels",
        "train",
        "--no-report",
        "--quantizer",
        "toy",
        "--out",
        str(tmp_path / "run"),
        *sizes.split(),
    )
    assert "toy" in out and (tmp_path / "run/checkpoints/manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "method", "words"),
    [
        ("ste", METHODS["ste"], r"register: name must be new; got 'ste'\. Choose"),
        ("new", Method("s", "s"), r"method must have either make or estimator; got neither\. Pass"),
    ],
)
def test_what_cannot_be_registered(name, method, words):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=words):
        register(name, method)
    assert before == METHODS
