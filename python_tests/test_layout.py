"""The shape of the house: import direction, lean import, one version, short files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vqkernels

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vqkernels"

# a module may import from its own layer and from lower ones
LAYERS = [
    {"checks", "dispatch", "native", "philox", "kernels"},
    {"ops"},
    {"nn"},
    {"models"},
    {"train", "compat", "profiling"},
    {"cli"},
    {"__main__", "testing"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path):
    """The vqkernels parts that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "vqkernels":
                names = [f"vqkernels.{alias.name}" for alias in node.names]
        yield from (name.split(".")[1] for name in names if name.startswith("vqkernels."))


def files():
    return [p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"]


def test_imports_point_down():
    for path in files():
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        assert part in RANK, f"{path.name} stands in no layer"
        for other in imports(path):
            # public names of the package come from ops and below
            rank = RANK.get(other, RANK["ops"])
            assert rank <= RANK[part], f"{path.relative_to(ROOT)} imports {other}, which is above it"
            assert other != "testing" or part == "testing", f"{path.name} imports the tests' helpers"


def test_files_are_short():
    for path in [*files(), *(ROOT / "python_tests").glob("*.py"), *(ROOT / "bench").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_import_is_lean():
    """No triton, no plotting, no trainer, no GPU and not a word on `import vqkernels`."""
    # what torch itself warns of while it is imported is not ours
    code = (
        "import sys, torch, warnings; warnings.simplefilter('error'); before = set(sys.modules); import vqkernels;"
        "heavy = {'triton', 'matplotlib', 'accelerate', 'skimage', 'tyro', 'vqkernels.nn'} & (set(sys.modules) - before);"
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0 and ran.stdout == "", ran.stderr
    assert "vqkernels" not in ran.stderr, ran.stderr


def test_one_version():
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("vqkernels")
    except PackageNotFoundError:
        pytest.skip("the package is not installed: it was built in place")
    assert installed == vqkernels.__version__


def test_public_functions_are_documented_and_typed():
    for path in files():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                assert node.returns is not None, f"{path.name}: {node.name} says not what it returns"
