"""Packs the wheel and calls CMake + Ninja for the compiled extension; flags and sources are in CMakeLists.txt."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vqkernels/__init__.py").read_text())[1]
REASON = ROOT / "vqkernels/native_missing.txt"
MODE = os.environ.get("VQKERNELS_BUILD", "auto")
# a wheel for other machines may be made beside a torch for CPUs
CUDA_MODES = ("cuda", "cuda-wheel")


def tool(name: str) -> str | None:
    """Where a program is: beside this Python, even when its environment is not activated, or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def why_not() -> str | None:
    """What the compiled extension needs and does not find here."""
    for module in ("torch", "pybind11"):
        if find_spec(module) is None:
            return f"{module} is not installed here (install it, then pip install --no-build-isolation --editable .)"
    for name in ("cmake", "ninja"):
        if tool(name) is None:
            return f"{name} is not installed (pip install {name})"
    compilers = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found (tried {', '.join(compilers)})"
    if MODE in CUDA_MODES and not has_cuda():
        needs = "nvcc on PATH" if MODE == "cuda-wheel" else "nvcc on PATH and a torch built with CUDA"
        return f"VQKERNELS_BUILD={MODE} needs {needs}"
    return None


def has_cuda() -> bool:
    """Whether nvcc is there, and torch has CUDA or need not; a GPU need not be."""
    import torch

    return (MODE == "cuda-wheel" or torch.version.cuda is not None) and tool("nvcc") is not None


def cuda_label() -> str:
    """Sets a wheel of CUDA apart from that of the same version without: +cu130 of nvcc 13.0."""
    nvcc = tool("nvcc")
    told = (
        subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout if nvcc else ""
    )
    found = re.search(r"release (\d+)\.(\d+)", told)
    return f"+cu{found[1]}{found[2]}" if found else "+cuda"


def cmake_arguments() -> list[str]:
    """What CMake must be told about this Python."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    archs = os.environ.get("VQKERNELS_ARCHS")
    return [
        *([f"-DVQKERNELS_ARCHS={archs}"] if archs else []),
        f"-DVQKERNELS_VERSION={VERSION}",
        f"-DVQKERNELS_CUDA={'ON' if MODE != 'cpu' and has_cuda() else 'OFF'}",
        f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
        f"-DTORCH_LIBRARY_DIR={Path(torch.__file__).parent / 'lib'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        f"-DVQKERNELS_SANITIZE={os.environ.get('VQKERNELS_SANITIZE', '')}",
    ]


def skip(reason: str) -> None:
    """Say why the package stays pure, now and when it runs, or stop where the extension was asked for."""
    if MODE in ("cpu", *CUDA_MODES):
        sys.exit(f"vqkernels: the compiled extension cannot be built: {reason}.")
    print(f"vqkernels: the compiled extension is skipped: {reason}.", file=sys.stderr)
    # pip shows no output of a build that succeeds, so the package itself remembers
    REASON.write_text(reason + "\n")


class CMakeBuild(build_ext):
    """Builds vqkernels._C into the wheel, or beside the sources for an editable install."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # an older library must not pass for this build's
        target.unlink(missing_ok=True)
        try:
            cmake = tool("cmake")
            subprocess.run(
                [cmake, "--fresh", "-G", "Ninja", "-S", ROOT, "-B", build, *cmake_arguments()], check=True
            )
            subprocess.run([cmake, "--build", build], check=True)
        except subprocess.CalledProcessError as error:
            skip(f"{' '.join(map(str, error.cmd[:2]))} failed (pip install -v shows how)")
            if not self.inplace:
                shutil.copy2(REASON, Path(self.build_lib) / "vqkernels")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


if MODE not in ("auto", "off", "cpu", *CUDA_MODES):
    sys.exit(f"VQKERNELS_BUILD must be auto, off, cpu, cuda or cuda-wheel; got {MODE!r}. Unset it for auto.")
REASON.unlink(missing_ok=True)
reason = "VQKERNELS_BUILD=off" if MODE == "off" else why_not()
if reason:
    skip(reason)
native = [] if reason else [Extension("vqkernels._C", sources=[], optional=MODE == "auto")]
label = cuda_label() if MODE == "cuda-wheel" and native else ""
setup(version=VERSION + label, ext_modules=native, cmdclass={"build_ext": CMakeBuild})
