"""A wheel with CUDA bodies holds machine code for every architecture, PTX for later ones, and asks for torch's CUDA.

    python python_tests/packed_cuda.py dist/cuda [--archs "80 90a 100a"]

No GPU is asked: what was compiled is listed by cuobjdump, what the loader will look for by readelf.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from packed import ROOT, Wrong, check_wheel, demand, said


def dump() -> str:
    """Where cuobjdump is: on PATH, in the toolkit of nvcc, or in the wheel of triton."""
    spec, nvcc = find_spec("triton"), shutil.which("nvcc")
    near = [Path(nvcc).resolve().with_name("cuobjdump")] if nvcc else []
    near += [Path("/usr/local/cuda/bin/cuobjdump")]
    near += [Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"] if spec and spec.origin else []
    found = shutil.which("cuobjdump") or next((str(path) for path in near if path.is_file()), None)
    if found is None:
        raise Wrong("cuobjdump must be on PATH, in the toolkit of nvcc or in triton; it is nowhere")
    return found


def check(dist: Path, archs: list[str]) -> None:
    """Print what the one wheel of a folder holds for GPUs; `Wrong` where something lacks."""
    wheels = [*dist.glob("*.whl")]
    demand(len(wheels) == 1, f"{dist} must hold one wheel; got {len(wheels)}")
    demand(check_wheel(wheels[0]), f"{wheels[0].name} holds no compiled code")
    demand("+cu" in wheels[0].name, f"{wheels[0].name} does not say that it is one for CUDA")
    sources = len(list((ROOT / "csrc/cuda").glob("*.cu")))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheels[0]) as archive:
            (member,) = [each for each in archive.namelist() if each.endswith(".so")]
            library = Path(archive.extract(member, folder))
        codes = re.findall(r"sm_(\w+)\.cubin", said(dump(), "--list-elf", library, cwd=folder))
        texts = re.findall(r"sm_(\w+)\.ptx", said(dump(), "--list-ptx", library, cwd=folder))
        print(f"machine code: {_counted(codes)}; PTX: {_counted(texts)}; {library.stat().st_size >> 20} MiB")
        for arch in archs:
            demand(
                codes.count(arch) == sources,
                f"{codes.count(arch)} of {sources} sources are there for sm_{arch}",
            )
        demand(
            texts.count(archs[0]) == sources,
            f"PTX of sm_{archs[0]} is there for {texts.count(archs[0])} sources",
        )
        if shutil.which("readelf") is None:
            return
        needed = re.findall(r"NEEDED.*\[(.+)\]", said("readelf", "-d", library, cwd=folder))
        print(f"needs: {', '.join(needed)}")
        demand("libtorch_cuda.so" in needed, "the loader is not told to look for libtorch_cuda.so")
        demand(not any("cudart" in each for each in needed), "the runtime of CUDA must come along")


def _counted(names: list[str]) -> str:
    return ", ".join(f"{names.count(name)} x sm_{name}" for name in dict.fromkeys(names)) or "none"


def main() -> None:
    """Read the words of the command line, and end with what is wrong or with nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dist", type=Path, help="the folder of the wheel")
    parser.add_argument("--archs", default="80 90a 100a", help="with machine code; the first with PTX too")
    options = parser.parse_args()
    try:
        check(options.dist.resolve(), options.archs.split())
    except Wrong as wrong:
        sys.exit(f"packed_cuda: {wrong}")


if __name__ == "__main__":
    main()
