"""Compile Triton kernels for GPUs that are not here, and read what they would use there.

Not for a process with TRITON_INTERPRET=1, where Triton has no compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vqkernels.kernels._common import Configuration

# bytes of shared memory that one block may ask for
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Usage:
    """What one thread or one block of a compiled kernel uses."""

    registers: int
    stack: int
    local: int
    shared: int
    ptx: str
    cubin: bytes


def compile_for(configuration: Configuration, arch: int) -> Usage:
    """Compile one configuration for sm_`arch`, with pointers aligned as torch's are."""
    names = configuration.kernel.arg_names
    constants = dict(configuration.constants) | dict.fromkeys(configuration.ones, 1)
    signature = {
        name: "constexpr" if name in constants else configuration.types.get(name, "i32") for name in names
    }
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in configuration.multiples
    ]
    source = ASTSource(
        fn=configuration.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {
        "num_warps": configuration.warps,
        "num_stages": configuration.stages,
        "enable_fp_fusion": configuration.fused,
    }
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return _usage(compiled.asm["cubin"], compiled.metadata.shared, compiled.asm["ptx"])


def machine_code(cubin: bytes) -> str:
    """The instructions that the GPU would run."""
    return _tool("nvdisasm", "-c", cubin=cubin)


def _usage(cubin: bytes, shared: int, ptx: str) -> Usage:
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", "-res-usage", cubin=cubin)))
    return Usage(int(found["REG"]), int(found["STACK"]), int(found["LOCAL"]), shared, ptx, cubin)


def _tool(name: str, option: str, *, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
