"""Packs the wheel and calls CMake + Ninja for the compiled extension; flags and sources are in CMakeLists.txt."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "vqkernels/__init__.py").read_text())[1]
MODE = os.environ.get("VQKERNELS_BUILD", "auto")


def cmake_arguments() -> list[str]:
    """What CMake needs to know about this Python; raises ImportError where the build tools are missing."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    cuda = MODE != "cpu" and torch.version.cuda is not None and shutil.which("nvcc") is not None
    if MODE == "cuda" and not cuda:
        raise RuntimeError("VQKERNELS_BUILD=cuda needs nvcc on PATH and a torch built with CUDA")
    return [
        f"-DVQKERNELS_VERSION={VERSION}",
        f"-DVQKERNELS_CUDA={'ON' if cuda else 'OFF'}",
        f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
        f"-DTORCH_LIBRARY_DIR={Path(torch.__file__).parent / 'lib'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]


class CMakeBuild(build_ext):
    """Builds vqkernels._C; with VQKERNELS_BUILD=auto a failure leaves the pure package and its reason."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._cmake(Path(self.get_ext_fullpath(ext.name)).resolve())
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            if MODE != "auto":
                raise
            print(f"vqkernels: the compiled extension is skipped: {error}", file=sys.stderr)

    def _cmake(self, target: Path) -> None:
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *cmake_arguments()], check=True)
        subprocess.run(["cmake", "--build", build], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)


if MODE not in ("auto", "off", "cpu", "cuda"):
    sys.exit(f"VQKERNELS_BUILD must be auto, off, cpu or cuda; got {MODE!r}. Unset it for auto.")
native = [] if MODE == "off" else [Extension("vqkernels._C", sources=[], optional=MODE == "auto")]
setup(version=VERSION, ext_modules=native, cmdclass={"build_ext": CMakeBuild})
