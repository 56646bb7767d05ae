"""What is packed is whole, and what checks it sees what is not."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from packed import ROOT, Wrong, check_sdist, check_wheel

LEFT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__", "results"
)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """An sdist and a wheel without the extension, of a copy of the tree."""
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(ROOT, folder / "tree", ignore=LEFT)
    out = folder / "dist"
    words = [sys.executable, "setup.py", "-q", "sdist", "-d", out, "bdist_wheel", "-d", out]
    ran = subprocess.run(
        [*map(str, words)],
        cwd=folder / "tree",
        env=os.environ | {"VQKERNELS_BUILD": "off"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    return out


def test_both_are_whole(dist):
    check_sdist(next(dist.glob("*.tar.gz")))
    assert not check_wheel(next(dist.glob("*.whl")))


def test_an_sdist_that_lacks_a_source_is_refused(dist, tmp_path):
    path = tmp_path / "lacking.tar.gz"
    with tarfile.open(next(dist.glob("*.tar.gz"))) as whole, tarfile.open(path, "w:gz") as lacking:
        for member in whole.getmembers():
            if member.isfile() and not member.name.endswith("csrc/cpu/rows.h"):
                lacking.addfile(member, whole.extractfile(member))
    with pytest.raises(Wrong, match=r"lacks csrc/cpu/rows\.h"):
        check_sdist(path)


@pytest.mark.parametrize(
    ("without", "more", "words"),
    [
        ("vqkernels/py.typed", None, "lacks vqkernels/py.typed"),
        ("licenses/LICENSE", None, "has no licence"),
        (None, "bench/run.py", "would install bench too"),
        (None, "vqkernels/_C.cpython-311-x86_64-linux-gnu.so", "but its tag is py3-none-any"),
    ],
)
def test_a_wheel_that_is_not_what_it_says_is_refused(dist, tmp_path, without, more, words):
    path = tmp_path / "changed.whl"
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as whole, zipfile.ZipFile(path, "w") as changed:
        for name in whole.namelist():
            if without is None or not name.endswith(without):
                changed.writestr(name, whole.read(name))
        if more is not None:
            changed.writestr(more, b"")
    with pytest.raises(Wrong, match=words):
        check_wheel(path)
