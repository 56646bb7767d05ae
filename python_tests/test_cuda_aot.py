"""The CUDA kernels compiled for GPUs that need not be here: what they use, and what their main loops cost."""

import collections
import functools
import re
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc", path=sysconfig.get_path("scripts")) or shutil.which("nvcc")
TRITON = find_spec("triton")
TOOLS = Path(TRITON.origin).parent / "backends/nvidia/bin" if TRITON and TRITON.origin else Path()

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(
        not (TOOLS / "nvdisasm").is_file(), reason="the wheel of triton brings the disassembler"
    ),
]

# bytes of shared memory that a block may ask for, and that a kernel may declare by itself
SHARED_LIMIT = {"80": 163 << 10, "90a": 227 << 10, "100a": 227 << 10}
STATIC_LIMIT = 48 << 10

# the searches on the GPUs they are for, and their launcher; the rest is compiled by test_build.py as well
CHOSEN = {("search_sm90", "90a"), ("search_mma", "80"), ("nearest_code", "90a")}


def cases():
    for source in SOURCES:
        for arch in SHARED_LIMIT:
            marks = () if (source, arch) in CHOSEN else pytest.mark.slow
            yield pytest.param(source, arch, id=f"{source}-sm_{arch}", marks=marks)


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cubin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cubin")

    @functools.cache
    def compiled(source, arch):
        out = folder / f"{source}.{arch}.cubin"
        command = [NVCC, "-std=c++20", "-cubin", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += [
            "-Werror=all-warnings",
            "-Xptxas=-warn-spills",
            "-o",
            out,
            ROOT / "csrc/cuda" / f"{source}.cu",
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # what ptxas says of wgmma that it had to serialise
        assert "wgmma" not in done.stderr + done.stdout, done.stderr
        return out

    return compiled


@functools.cache
def functions(path):
    """The machine code of each kernel of a cubin, by its mangled name."""
    parts = re.split(r"^\.text\.(\S+):$", tool("nvdisasm", "-c", path), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def matching(path, pattern):
    found = [code for name, code in functions(path).items() if re.search(pattern, name)]
    assert found, pattern
    return found


@pytest.mark.parametrize(("source", "arch"), list(cases()))
def test_no_kernel_spills(cubin, source, arch):
    usage = tool("cuobjdump", "-res-usage", cubin(source, arch))
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found
    for registers, stack, shared, local in (map(int, each) for each in found):
        assert (stack, local) == (0, 0), usage
        assert registers <= 255
        assert shared <= STATIC_LIMIT


def test_the_search_of_hopper_uses_what_hopper_has(cubin):
    for code in matching(cubin("search_sm90", "90a"), "search_kernel"):
        for name in ("HGMMA", "UTMALDG", "MULTICAST", "SYNCS", "VIMNMX3", "VIADDMNMX"):
            assert name in code, name
    # 640 threads with 96 registers at the start
    assert any("USETMAXREG" in code for code in matching(cubin("search_sm90", "90a"), "search_kernel"))
    usage = tool("cuobjdump", "-res-usage", cubin("search_sm90", "90a"))
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
    assert {
        int(count) for name, count in registers.items() if "Li4E" in name.split("search_kernel")[1][:24]
    } >= {96}


def test_the_portable_search_uses_tensor_cores_and_asynchronous_copies(cubin):
    for code in matching(cubin("search_mma", "80"), "search_kernel"):
        for name in ("HMMA.16816.F32", "LDGSTS", "LDSM"):
            assert name in code, name


# Per (row, code) element of one pass over a tile of codes, without the products: instructions of the ALU pipe
# and all that are issued, where no row improves and where one does. Peers, at D = 64: flash-kmeans issues 9.75,
# 6.75 of them on the ALU. 64 elements a thread on Hopper and in the portable tile of 128 rows.
#                             kernel                                    common       improving
BUDGET = {
    ("search_sm90", "90a"): ("search_kernelI.*Li4ELi4E", 64, (0.80, 3.40), (2.70, 6.40)),
    ("search_mma", "80"): ("search_kernelILi4E", 64, (2.40, 6.70), (5.90, 12.6)),
}

# DPX, beside what sass.py knows
ALU = sass.ALU | {"VIADDMNMX"}
IMPROVING = re.compile(r"VIADDMNMX|MNMX3?\.U32")


def tile_loop(code):
    """Instructions of the loop over tiles without the loop over chunks: where no row improves, and all."""
    found, labels = sass.instructions(code)
    blocks = sass._blocks(found, labels)
    bodies = [
        body
        for body in sass._natural_loops(found, labels, blocks)
        if any(sass.opcode(each) in sass.MATRIX for begin, end in body for each in found[begin:end])
    ]
    # the smallest that folds scores
    loop = min(
        (b for b in bodies if any(IMPROVING.search(each) for begin, end in b for each in found[begin:end])),
        key=len,
    )
    chunks = max((b for b in bodies if b < loop), key=len, default=frozenset())
    common, whole = collections.Counter(), collections.Counter()
    for begin, end in loop - chunks:
        counts = collections.Counter(sass.opcode(each) for each in found[begin:end])
        whole += counts
        if not any(IMPROVING.search(each) for each in found[begin:end]):
            common += counts
    return common, whole


def cost(counts):
    return sum(counts[name] for name in ALU), sum(counts.values())


@pytest.mark.parametrize(("source", "arch"), BUDGET)
def test_the_main_loop_keeps_its_budget(cubin, source, arch):
    pattern, elements, *budgets = BUDGET[source, arch]
    for code in matching(cubin(source, arch), pattern):
        for counts, (alu, issued) in zip(tile_loop(code), budgets, strict=True):
            spent = cost(counts)
            # a fence of the GPU or of L1 at every stage would cost more than all of it
            assert not {"MEMBAR", "CCTL", "ERRBAR"} & counts.keys()
            assert spent[0] / elements <= alu, (spent, counts)
            assert spent[1] / elements <= issued, (spent, counts)
