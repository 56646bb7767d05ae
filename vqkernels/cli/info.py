"""The command `info`, which needs nothing but torch."""

import importlib.util
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

import vqkernels
from vqkernels import native
from vqkernels.ops import OPS

# what the commands import beside torch, by the extra that brings it
PACKAGES = {
    "train": ("accelerate", "matplotlib", "PIL", "skimage", "sklearn", "tqdm", "transformers", "tyro"),
    "bench": ("matplotlib", "tyro"),
}


def info() -> int:
    """Print versions, the device, and for every op and backend: ready, or the reason why not."""
    print(
        f"vqkernels {vqkernels.__version__}, Python {platform.python_version()}, torch {torch.__version__}, {_triton()}"
    )
    print(f"cpu: {platform.machine()}, {torch.get_num_threads()} threads")
    cuda = torch.cuda.is_available()
    print(f"cuda: {torch.cuda.get_device_name()}" if cuda else "cuda: no device that torch can use")
    facts = native.facts()
    print("extension:" if facts else f"extension: missing, {native.MISSING}")
    for name, value in facts.items():
        print(f"  {name}: {_words(value)}")
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        print(f"ops on {device}, float32; the first that is ready runs:")
        for name, op in OPS.items():
            print(f"  {name}")
            for backend, reason in op.explain_for(torch.device(device)).items():
                print(f"    {backend:<10} {'ready' if reason is None else reason}")
    for extra, what in (("bench", "bench"), ("train", "all other commands")):
        missing = missing_packages(extra)
        print(f"{what}: {'ready' if not missing else how_to_install(missing, extra)}")
    return 0


def missing_packages(extra: str = "train") -> list[str]:
    """Name the packages that commands need and that are not installed.

    Args:
        extra: of the package, "train" or "bench".
    """
    return [name for name in PACKAGES[extra] if importlib.util.find_spec(name) is None]


def how_to_install(missing: Sequence[str], extra: str = "train") -> str:
    """Return one sentence about packages that are missing.

    Args:
        missing: their names.
        extra: of the package, which brings them.
    """
    return f'{", ".join(missing)} not installed; run pip install "vqkernels[{extra}]"'


def _triton() -> str:
    try:
        return f"triton {version('triton')}"
    except PackageNotFoundError:
        return "no triton"


def _words(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, (list, tuple)) else str(value)
