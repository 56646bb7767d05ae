"""What was packed works where nothing but torch is: the check of a wheel, and of the sdist it was made from.

    python python_tests/packed.py dist [--torch torch==2.13.0]      in a new environment that pip fills
    python python_tests/packed.py dist --python OTHER/bin/python    beside the torch of an environment that stays as it is

Nothing of the tree is on the path of what is run, and PATH holds no compiler.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = {"train", "bench", "docs", "dev"}
# what a build from the sdist, and its tests, need
NEEDED = (
    "CMakeLists.txt",
    "LICENSE",
    "Makefile",
    "README.md",
    "csrc/bindings.cpp",
    "csrc/cuda/kernels.h",
    "pyproject.toml",
    "python_tests/conftest.py",
    "setup.py",
    "vqkernels/py.typed",
)
# indices equal to float64 by brute force, and one training step of two quantizers
WORK = """
import sys
import torch
import vqkernels
from vqkernels import native, nearest_code
from vqkernels.nn import build

root = sys.argv[1]
assert vqkernels.__file__.startswith(root), vqkernels.__file__
torch.manual_seed(0)
backends = ["reference"] + ([] if native.MISSING else ["native"])
for offset, dtype in ((0.0, torch.float32), (100.0, torch.float32), (1.0, torch.bfloat16)):
    x, codes = ((offset + 0.1 * torch.randn(n, 24)).to(dtype) for n in (999, 257))
    wanted = (x.double()[:, None] - codes.double()).square().sum(-1).argmin(1)
    for backend in backends:
        found = nearest_code(x, codes, backend=backend).indices
        assert torch.equal(found, wanted), (backend, dtype, offset)
for name in ("ste", "sf_diveq"):
    quantizer = build(name, dim=24, num_codes=64)
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    quantizer.follow(optimizer)
    latents = torch.randn(8, 16, 24, requires_grad=True)
    z, indices, loss = quantizer(latents)
    (z.square().mean() + loss).backward()
    optimizer.step()
    assert indices.shape == (8, 16, 1) and latents.grad.isfinite().all(), name
print("extension:", native.MISSING or native.facts())
"""


class Wrong(Exception):
    """What was packed is not what it must be; the words say in which way."""


def demand(condition: bool, words: str) -> None:
    """Raise `Wrong` with these words unless the condition holds."""
    if not condition:
        raise Wrong(words)


def sources() -> set[str]:
    """What the package consists of, as paths in the tree."""
    found = (path for path in (ROOT / "vqkernels").rglob("*") if path.suffix == ".py")
    return {path.relative_to(ROOT).as_posix() for path in found} | {"vqkernels/py.typed"}


def check_sdist(path: Path) -> None:
    """Everything that a build needs is there, with the tests, and nothing that was built."""
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    missing = sorted(({*NEEDED} | native | sources()) - names)
    demand(not missing, f"{path.name} lacks {', '.join(missing)}")
    built = sorted(name for name in names if name.endswith((".so", ".pyc", ".o")))
    demand(not built, f"{path.name} holds {', '.join(built)}")


def check_wheel(path: Path) -> bool:
    """The package and its metadata are whole, and the tag says what the extension needs; whether there is one."""
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
        told = {Path(name).name: name for name in names if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(told["METADATA"]).decode())
        tags = Parser().parsestr(archive.read(told["WHEEL"]).decode())
        scripts = archive.read(told["entry_points.txt"]).decode()
    missing = sorted(sources() - names)
    demand(not missing, f"{path.name} lacks {', '.join(missing)}")
    strangers = {name.split("/")[0] for name in names if ".dist-info/" not in name} - {"vqkernels"}
    demand(not strangers, f"{path.name} would install {', '.join(sorted(strangers))} too")
    demand("LICENSE" in told, f"{path.name} has no licence")
    demand("vqkernels = vqkernels.__main__:main" in scripts, f"{path.name} has no console script")
    lacking = EXTRAS - set(metadata.get_all("Provides-Extra", []))
    demand(not lacking, f"{path.name} lacks the extras {', '.join(sorted(lacking))}")
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    demand(needs == ["torch>=2.10"], f"{path.name} requires {needs}")
    extensions = [name for name in names if name.endswith((".so", ".pyd"))]
    demand(len(extensions) <= 1, f"{path.name} holds {', '.join(extensions)}")
    (tag,) = tags.get_all("Tag", [])
    native = bool(extensions)
    if not native:
        demand(tag == "py3-none-any", f"{path.name} holds no compiled code, but its tag is {tag}")
        return native
    # _C.cpython-311-x86_64-linux-gnu.so is of one Python alone
    found = re.search(r"_C\.cpython-(\d+)-", extensions[0])
    python = f"cp{found[1]}-cp{found[1]}-" if found else "cp311-abi3-"
    demand(tag.startswith(python), f"{path.name} holds {extensions[0]}, but its tag is {tag}")
    demand(not tag.endswith("-any"), f"{path.name} holds compiled code, but its tag is {tag}")
    return native


def said(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program prints; `Wrong` with all of it where it fails."""
    words = [*map(str, command)]
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VQKERNELS_"))
    }
    done = subprocess.run(
        words,
        check=False,
        cwd=cwd,
        env=kept | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    demand(done.returncode == 0, f"{' '.join(words)[:200]} failed with {done.returncode}:\n{done.stdout}")
    return done.stdout


def fresh(folder: Path, wheel: Path, torch: str) -> tuple[Path, Path, Path, dict[str, str]]:
    """A new environment with torch and the wheel: its Python, its script, where the package lies, variables."""
    place = folder / "venv"
    venv.create(place, with_pip=True)
    python = place / "bin/python"
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    said(*pip, "install", "--quiet", torch, "numpy", cwd=folder)
    before = said(*pip, "list", "--format=freeze", cwd=folder).splitlines()
    said(*pip, "install", "--quiet", wheel, cwd=folder)
    after = said(*pip, "list", "--format=freeze", cwd=folder).splitlines()
    more = [line for line in after if line not in before and not line.startswith("vqkernels==")]
    demand(not more, f"{wheel.name} brought {', '.join(more)} beside torch")
    said(*pip, "check", cwd=folder)
    return python, place / "bin/vqkernels", place, {}


def beside(folder: Path, wheel: Path, python: Path) -> tuple[Path, Path, Path, dict[str, str]]:
    """The wheel in a folder of its own for a Python that has torch; as `fresh`."""
    place = folder / "beside"
    flags = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    said(python, "-m", "pip", "install", *flags, "--target", place, wheel, cwd=folder)
    return python, place / "bin/vqkernels", place, {"PYTHONPATH": str(place)}


def check_installed(
    folder: Path, python: Path, script: Path, place: Path, variables: dict[str, str], native: bool
) -> str:
    """The package imports, searches, trains and tells about itself; what it told."""
    # no compiler, no tools: what runs has nothing but this Python
    alone = variables | {"PATH": str(folder / "nothing")}
    told = said(python, "-P", "-c", WORK, place, cwd=folder, **alone)
    demand(("extension: {" in told) == native, f"the compiled extension is not what the wheel holds:\n{told}")
    module = said(python, "-P", "-m", "vqkernels", "info", cwd=folder, **alone)
    demand(said(script, "info", cwd=folder, **alone) == module, "vqkernels and python -m vqkernels differ")
    demand("reference  ready" in module, module)
    typed = "import importlib.resources as r; print(r.files('vqkernels').joinpath('py.typed').is_file())"
    demand(
        said(python, "-P", "-c", typed, cwd=folder, **alone).strip() == "True", "py.typed is not installed"
    )
    return told + module


def check(dist: Path, torch: str, python: Path | None) -> None:
    """Check the one wheel of a folder, and the sdist where it lies there too."""
    wheels, archives = ([*dist.glob(pattern)] for pattern in ("*.whl", "*.tar.gz"))
    demand(len(wheels) == 1, f"{dist} must hold one wheel; got {len(wheels)}")
    wheel = wheels[0].resolve()
    for archive in archives:
        check_sdist(archive)
    native = check_wheel(wheel)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        installed = fresh(folder, wheel, torch) if python is None else beside(folder, wheel, python)
        print(check_installed(folder, *installed, native))
    print(f"{wheel.name} is as it should be")


def main() -> None:
    """Read the words of the command line, and end with what is wrong or with nothing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("dist", type=Path, help="the folder of the wheel")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs first")
    parser.add_argument("--python", type=Path, help="of an environment that has torch and pip")
    options = parser.parse_args()
    try:
        # an interpreter of an environment is a link, and must stay one
        check(options.dist.resolve(), options.torch, options.python and options.python.absolute())
    except Wrong as wrong:
        sys.exit(f"packed: {wrong}")


if __name__ == "__main__":
    main()
