"""The build: one list of sources, CUDA that compiles without a GPU, a pure package where it must be, exact flags."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from vqkernels import __version__, native

ROOT = Path(__file__).parents[1]
SOURCES = (
    "CMakeLists.txt",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "setup.py",
    "csrc",
    "vqkernels",
)


def tool(name):
    """A program of this environment, activated or not, or of the machine."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


NVCC = tool("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH")
needs_cxx = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is on PATH")
NORMAL_ERROR = 2.0**-18


def run(*command, cwd=None, check=True, **environment):
    done = subprocess.run(
        [*map(str, command)],
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, so that no build writes beside the tests."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(source, tmp_path / "src" / name, ignore=ignore)
        elif source.exists():
            (tmp_path / "src").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "src" / name)
    return tmp_path / "src"


def wheel(checkout, **environment):
    """Build a wheel as pip does; its path, what it holds, and what was printed."""
    out = checkout.parent / "wheels"
    flags = "--no-build-isolation", "--no-deps", "--no-index", "--verbose", "--disable-pip-version-check"
    text = run(sys.executable, "-m", "pip", "wheel", *flags, "-w", out, checkout, **environment)
    (path,) = out.glob("*.whl")
    return path, zipfile.ZipFile(path).namelist(), text


def run_installed(target, *arguments):
    """Run Python on an unpacked wheel; without site, for an editable install would lend it the extension."""
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return run(sys.executable, "-S", *arguments, cwd=target.parent, PYTHONPATH=path)


def compiled(names):
    return [name for name in names if name.startswith("vqkernels/_C")]


@needs_cxx
@pytest.mark.skipif(os.environ.get("VQKERNELS_BUILD") == "off", reason="the extension was not asked for")
def test_the_extension_is_there():
    """Tests of the native backend skip without it, so a build that fails must fail here."""
    assert native.MISSING is None


def test_cmake_is_the_only_list_of_sources():
    listed = (ROOT / "CMakeLists.txt").read_text()
    sources = {
        p.relative_to(ROOT).as_posix() for s in (".cpp", ".cu") for p in (ROOT / "csrc").rglob(f"*{s}")
    }
    assert {s for s in sources if s in listed} == sources
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in"):
        text = (ROOT / name).read_text()
        assert not [s for s in sources if Path(s).name in text], name
        assert not [flag for flag in ("-O3", "-std=", "-march", "-ffp", "-gencode") if flag in text], name


def test_the_sdist_is_told_every_file_of_the_root_that_make_needs():
    """Beside those that setuptools takes by itself."""
    included = (ROOT / "MANIFEST.in").read_text().split()
    for name in (
        "CMakeLists.txt",
        "Makefile",
        "mkdocs.yml",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        ".clang-format",
    ):
        assert name in included and (ROOT / name).exists(), name


def test_no_cuda_source_includes_torch():
    for path in (ROOT / "csrc/cuda").iterdir():
        if path.suffix != ".cpp":
            assert "torch/" not in path.read_text(), path


def test_off_is_a_pure_wheel(checkout):
    path, names, _ = wheel(checkout, VQKERNELS_BUILD="off")
    assert path.name == f"vqkernels-{__version__}-py3-none-any.whl"
    assert compiled(names) == []
    assert "vqkernels/py.typed" in names
    assert not [name for name in names if name.startswith(("csrc", "python_tests", "bench"))]


def test_auto_without_a_compiler_is_pure_and_says_why(checkout):
    path, names, text = wheel(checkout, VQKERNELS_BUILD="auto", CXX="/nonexistent/c++")
    assert path.name.endswith("-py3-none-any.whl")
    assert compiled(names) == []
    reason = "no C++ compiler was found (tried /nonexistent/c++)"
    assert f"vqkernels: the compiled extension is skipped: {reason}." in text
    # pip hides that line, so the installed package says it again, and works
    target = checkout.parent / "installed"
    zipfile.ZipFile(path).extractall(target)
    for code, words in (
        ("import vqkernels.native as n; print(n.MISSING)", f"the extension was not built: {reason}"),
        (
            "import torch, vqkernels as v; print(v.nearest_code(torch.ones(2, 3), torch.ones(4, 3)))",
            "indices=tensor([0, 0])",
        ),
    ):
        assert words in run_installed(target, "-c", code)
    text = run_installed(target, "-m", "vqkernels", "info")
    assert f"extension: missing, the extension was not built: {reason}" in text


def test_auto_without_anything_on_path_is_pure(checkout):
    _, names, text = wheel(checkout, VQKERNELS_BUILD="auto", PATH="")
    assert compiled(names) == []
    assert "vqkernels: the compiled extension is skipped: " in text


@needs_cxx
def test_auto_with_a_broken_compiler_is_pure_and_says_why(checkout):
    _, names, text = wheel(checkout, VQKERNELS_BUILD="auto", CXX=shutil.which("false"))
    assert compiled(names) == []
    assert "vqkernels: the compiled extension is skipped: " in text


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_forced_build_fails_without_a_compiler(checkout, mode):
    environment = {"VQKERNELS_BUILD": mode, "CXX": "/nonexistent/c++"}
    text = run(sys.executable, "setup.py", "--version", cwd=checkout, check=False, **environment)
    assert "vqkernels: the compiled extension cannot be built: no C++ compiler was found" in text


def test_unknown_mode(checkout):
    text = run(sys.executable, "setup.py", "--version", cwd=checkout, check=False, VQKERNELS_BUILD="yes")
    assert "VQKERNELS_BUILD must be auto, off, cpu, cuda or cuda-wheel; got 'yes'. Unset it for auto." in text


@pytest.mark.slow
@needs_cxx
def test_native_wheel_works_where_it_is_installed(checkout):
    pytest.importorskip("pybind11")
    path, names, _ = wheel(checkout, VQKERNELS_BUILD="cpu")
    assert len(compiled(names)) == 1
    target = checkout.parent / "installed"
    zipfile.ZipFile(path).extractall(target)
    code = "import vqkernels.native as n; print(n.__file__, n.MISSING)"
    text = run_installed(target, "-c", code)
    assert text.split() == [str(target / "vqkernels/native.py"), "None"]


@pytest.mark.slow
@needs_cxx
def test_editable_build_lies_beside_the_sources(checkout):
    pytest.importorskip("pybind11")
    flags = "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"
    where = checkout.parent / "editable"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        *flags,
        "--target",
        where,
        "-e",
        checkout,
        VQKERNELS_BUILD="cpu",
    )
    assert len(list((checkout / "vqkernels").glob("_C*.so"))) == 1


@needs_nvcc
@needs_cxx
def test_cuda_compiles_for_every_arch(tmp_path):
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("cmake and ninja are not installed")
    pybind11 = pytest.importorskip("pybind11")
    arguments = (
        "-DVQKERNELS_CUDA=ON",
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    )
    run(
        cmake,
        "-G",
        "Ninja",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        "-DCMAKE_CUDA_FLAGS=-Werror=all-warnings",
        *arguments,
    )
    run(cmake, "--build", tmp_path, "--target", "bodies_cuda")
    objects = sorted(tmp_path.rglob("*.cu.o"))
    assert len(objects) == len(list((ROOT / "csrc/cuda").glob("*.cu")))
    # the wheel of triton brings one along
    triton = find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    dump = beside if beside.is_file() else tool("cuobjdump")
    if dump is not None:
        for path in objects:
            listing = run(dump, "--list-elf", path)
            assert all(f"sm_{arch}.cubin" in listing for arch in ("80", "90a", "100a")), listing


@needs_nvcc
@needs_cxx
def test_cuda_bindings_compile():
    extension = pytest.importorskip("torch.utils.cpp_extension")
    # nvcc may be a wrapper far from its toolkit, but it knows where its headers are
    read = run(NVCC, "-M", ROOT / "csrc/cuda/philox.cu").split()
    cuda = next(Path(word).parent for word in read if word.endswith("/cuda_runtime_api.h"))
    includes = [f"-isystem{folder}" for folder in (*extension.include_paths(), cuda)]
    flags = (
        "-std=c++20",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    )
    run("c++", *flags, *includes, ROOT / "csrc/cuda/bindings_cuda.cpp")


EVERY_NORMAL = """
#include <cstdio>
#include <cmath>
#include "random.h"

int main() {
  double radius = 0, angle = 0, largest = 0;
  for (uint32_t k = 0; k < 1u << 24; ++k) {
    const uint32_t w = k << 8 | (k & 255);
    const double r = std::sqrt(-2 * std::log((k + 1) * 0x1p-24)), a = 2 * M_PI * k * 0x1p-24;
    float cosine, sine;
    vqk::direction(w, &cosine, &sine);
    radius = std::fmax(radius, std::fabs(vqk::radius(w) - r));
    angle = std::fmax(angle, std::fmax(std::fabs(cosine - std::cos(a)), std::fabs(sine - std::sin(a))));
    largest = std::fmax(largest, r);
  }
  std::printf("%.9g %.9g %.9g", radius, angle, largest);
}
"""


@needs_cxx
def test_every_normal(tmp_path):
    (tmp_path / "normals.cpp").write_text(EVERY_NORMAL)
    run("c++", "-std=c++20", "-O2", "-I", ROOT / "csrc", tmp_path / "normals.cpp", "-o", tmp_path / "normals")
    radius, angle, largest = map(float, run(tmp_path / "normals").split())
    # |r' c' - r c| <= |r' - r| |c'| + r |c' - c|, and one rounding of the product
    assert radius * (1 + angle) + largest * angle + largest * 2.0**-24 <= NORMAL_ERROR


@needs_cxx
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not on PATH")
def test_no_body_leaks_into_another_instruction_set(tmp_path):
    # a weak symbol compiled for avx512 could be the one the linker keeps for the portable body as well
    for source in sorted((ROOT / "csrc/cpu/isa").glob("*.cpp")):
        made = tmp_path / (source.stem + ".o")
        run("c++", "-std=c++20", "-O1", "-w", "-DVQK_ISA=portable", "-c", source, "-o", made)
        weak = [
            line
            for line in run("nm", "-C", made).splitlines()
            if " W " in line or " V " in line or " u " in line
        ]
        assert weak == [], source
