"""Build the native CPU ops with sanitizers and run their tests on these builds; no build but these is touched.

    python python_tests/sanitize.py [address | thread]

address: AddressSanitizer and UndefinedBehaviorSanitizer in the extension, under the tests of the native ops, and in
a program without Python, whose leaks can be told from those of an interpreter. thread: ThreadSanitizer in that
program (without_torch/), which gives the ops threads of its own, since torch's are not instrumented.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# what the compiler is told; float-cast-overflow is not part of undefined
SANITIZERS = {"address": "address,undefined,float-cast-overflow", "thread": "thread"}
SYMBOLS = {"address": b"__asan_init", "thread": b"__tsan_init"}
OPTIONS = {
    # Python and torch leave memory behind on purpose; the program without them looks for leaks
    "ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "second_deadlock_stack=1",
}
TESTS = (
    "native",
    "threads",
    "row_threads",
    "prepare",
    "exactness",
    "nearest_code",
    "nearest_segment",
    "directional",
    "directional_range",
    "straight_through",
    "straight_through_rows",
    "code_sums",
    "philox",
)


def run(*command: str | Path, **environment: str) -> None:
    """Run to the end with the output on the terminal; a failure ends this program."""
    words = [*map(str, command)]
    done = subprocess.run(words, check=False, cwd=ROOT, env={**os.environ, **OPTIONS, **environment})
    if done.returncode:
        sys.exit(f"sanitize: {' '.join(words[:3])} failed with {done.returncode}")


def build(sanitizer: str, folder: Path) -> Path:
    """The package with a sanitized extension; its folder of intermediate files."""
    shutil.rmtree(folder / "lib", ignore_errors=True)
    places = ("--build-lib", folder / "lib", "--build-temp", folder / "temp")
    chosen = {"VQKERNELS_BUILD": "cpu", "VQKERNELS_SANITIZE": SANITIZERS[sanitizer]}
    run(sys.executable, "setup.py", "-q", "build", "--build-base", folder, *places, **chosen)
    (library,) = (folder / "lib/vqkernels").glob("_C*.so")
    if SYMBOLS[sanitizer] not in library.read_bytes():
        sys.exit(f"sanitize: {library} has no {sanitizer} sanitizer in it")
    return folder / "temp/cmake"


def runtime(*names: str) -> str:
    """Libraries that must come before all others, found by the compiler that built the extension."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    ask = [[compiler, f"-print-file-name={name}"] for name in names]
    return " ".join(subprocess.check_output(words, text=True).strip() for words in ask)


def test(folder: Path) -> None:
    """The tests of the native ops on the build in `folder`."""
    environment = {
        # libstdc++ early, or the sanitizer finds no exceptions to wrap
        "LD_PRELOAD": runtime("libasan.so", "libubsan.so", "libstdc++.so.6"),
        "PYTHONPATH": str(folder / "lib"),
        # this folder must not come before it
        "PYTHONSAFEPATH": "1",
    }
    where = (
        "import sys, vqkernels.native as n; sys.exit(not n._C or not n._C.__file__.startswith(sys.argv[1]))"
    )
    run(sys.executable, "-c", where, folder, **environment)
    files = [f"python_tests/test_{name}.py" for name in TESTS]
    # a sanitizer writes its report where pytest would keep it, and lose it with the process
    pytest = ("-m", "pytest", *files, "-m", "not slow", "-k", "not (reference or million)", "--capture=sys")
    run(sys.executable, *pytest, "-p", "no:cacheprovider", **environment)


def fixed_addresses() -> list[str]:
    """What goes before a program whose sanitizer cannot start where a kernel lays out addresses too freely."""
    words = ["setarch", "--addr-no-randomize"]
    # containers may forbid it; most need it not
    allowed = shutil.which("setarch") and subprocess.run([*words, "true"], check=False).returncode == 0
    return words if allowed else []


def main() -> None:
    """Build and run what was asked for, or both."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sanitizer", nargs="?", choices=SANITIZERS, help="default: both")
    one = parser.parse_args().sanitizer
    for sanitizer in [one] if one else SANITIZERS:
        began = time.perf_counter()
        folder = ROOT / "build/sanitize" / sanitizer
        cmake = build(sanitizer, folder)
        built = time.perf_counter()
        run(*fixed_addresses(), cmake / "without_torch", ASAN_OPTIONS="detect_leaks=1")
        if sanitizer == "address":
            test(folder)
        done = time.perf_counter()
        print(f"{sanitizer}: clean, built in {built - began:.0f} s, run in {done - built:.0f} s", flush=True)


if __name__ == "__main__":
    main()
