"""What the row kernels cost per element beside the memory traffic that they cannot avoid, read from machine code.

An H200 reads and writes 4.3 TB/s, which is 16.5 bytes per clock of each of its 132 multiprocessors at 1.98 GHz. In the
same clock a multiprocessor issues 128 instructions of one lane, 64 of them compares, selects, logic and integer sums
(ALU). So a byte of traffic hides 7.8 instructions, 3.9 of them ALU:

    pass                 bytes per element      instructions that fit    ALU that fit
    forward, halves      4 (x and z)            31                       15.5
    forward, float32     8                      62                       31
    backward, halves     6 (g, x and dL/dx)     47                       23
    backward, float32    12                     93                       47

Of the instructions of a noisy element 28 make its normal: ten rounds of Philox are 20 wide multiplies and 40 xors,
two to a three-input one, for four elements (5 + 5 each, of which the first two rounds are shared by the rows or the
blocks of a thread), and the logarithm, root, sine and cosine of a pair take 36 (18 each). At half precision the noise
alone is worth nine tenths of the traffic, and these kernels are limited by arithmetic: 1.7 times the floor forward
and 1.5 times backward, with two points twice that. In float32 the forward of one point is limited by memory, and so
is every form without noise, but for the rotation of `straight_through_backward`: 1.7 times the floor at half precision,
1.1 times in float32. A wide multiply is counted as one instruction; should it take two, add five.

Counted along the path that a tile takes whose sums of squares are in range.
"""

import collections
import os
import re

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton has no compiler in a process that interprets", allow_module_level=True)

import aot
import sass

from vqkernels.kernels import (
    code_sums,
    directional,
    directional_backward,
    nearest_segment,
    straight_through,
    straight_through_backward,
)

FORMS = {
    form.name: form
    for module in (
        code_sums,
        directional,
        directional_backward,
        nearest_segment,
        straight_through,
        straight_through_backward,
    )
    for form in module.configurations()
}

# form: most instructions of any kind and of ALU per element
BUDGETS = {
    "directional_bf16_fp32_0_1_d64": (54, 21),
    "directional_bf16_fp32_0_1_d512": (58, 21),
    "directional_fp32_fp32_0_1_d64": (60, 22),
    "directional_bf16_bf16_1_2_d64": (25, 10),
    "directional_fp32_fp32_0_2_d256": (120, 37),
    "directional_backward_bf16_bf16_fp32_0_1_d64_atomic": (73, 27),
    "directional_backward_bf16_bf16_fp32_0_1_d512": (71, 27),
    "directional_backward_fp32_fp32_fp32_1_2_d256": (68, 21),
    "straight_through_bf16_fp32_d64": (24, 8),
    "straight_through_fp32_fp32_d256": (30, 10),
    "straight_through_backward_bf16_bf16_fp32_0_d64_atomic": (32, 13),
    "straight_through_backward_bf16_bf16_fp32_1_d512": (80, 23),
    "straight_through_backward_fp32_fp32_fp32_1_d256_atomic": (105, 32),
}


def straight(code):
    """The instructions of a thread that takes every branch ahead: around what is rare, and to the end."""
    found, labels = sass.instructions(code)
    path, at = [], 0
    while at < len(found):
        each = found[at]
        path.append(each)
        target = re.search(r"BRA[^`]*`\((\.L_x_\d+)\)", each)
        ends = sass.opcode(each) == "EXIT" and not each.startswith("@")
        if ends or (target and labels[target[1]] <= at):
            break
        at = labels[target[1]] if target else at + 1
    return collections.Counter(sass.opcode(each) for each in path if sass.opcode(each) != "NOP")


@pytest.mark.parametrize("name", BUDGETS)
def test_instructions_per_element(name):
    form = FORMS[name]
    counts = straight(aot.machine_code(aot.compile_for(form, 90).cubin))
    elements = form.constants["BLOCK_N"] * form.constants["BLOCK_D"] / (32 * form.warps)
    issued, alu = sum(counts.values()), sum(counts[opcode] for opcode in sass.ALU)
    assert issued / elements <= BUDGETS[name][0] and alu / elements <= BUDGETS[name][1]


def test_integers_become_floats_at_full_rate():
    """I2FP; a conversion of the other kind (I2F, F2I, FRND) takes four times as long, and one of float64 more."""
    noisy = straight(aot.machine_code(aot.compile_for(FORMS["directional_bf16_fp32_0_1_d64"], 90).cubin))
    assert noisy["I2FP"] == 3 * 16 / 2
    assert not any(noisy[each] for each in ("I2F", "F2I", "FRND", "F2F"))
    # a root for each pair of normals, and two for each row
    assert noisy["MUFU"] <= 16 / 2 + 2 * 2


@pytest.mark.parametrize(
    "name", [name for name in FORMS if name.startswith(("directional", "straight", "code", "segment_sums"))]
)
def test_rows_are_moved_in_sixteen_bytes(name):
    """Of every tile, whichever way its rows lie; and nothing is widened to float64 or divided to find a row."""
    ptx = aot.compile_for(FORMS[name], 90).ptx
    moved = collections.Counter(re.findall(r"\b(?:ld|st|red)\.global\S*", ptx))
    elements = FORMS[name].constants["BLOCK_N"] * FORMS[name].constants["BLOCK_D"] / (32 * FORMS[name].warps)
    wide = sum(count for each, count in moved.items() if re.search(r"v4\.(b32|f32)|v2\.b64", each))
    assert wide >= elements / 8
    assert not re.search(r"\.f64|(div|rem)\.[su](32|64)", ptx)
    if name.endswith("_atomic"):
        assert any("red" in each and each.endswith("add.v4.f32") for each in moved)


def test_nearest_segment_multiplies_on_tensor_cores():
    assert "HGMMA" in aot.machine_code(
        aot.compile_for(FORMS["nearest_segment_search_bf16_bf16_d64"], 90).cubin
    )
    assert "tf32" not in aot.compile_for(FORMS["nearest_segment_search_fp32_fp32_d16"], 90).ptx


@pytest.mark.parametrize("name", ["prepare_fp32_fp32", "finish_fp32_fp32", "rescue_bf16_bf16"])
def test_the_arithmetic_of_the_contract_is_not_fused(name):
    ptx = aot.compile_for(FORMS[f"nearest_segment_{name}"], 90).ptx
    assert "mul.rn.f64" in ptx or "mul.f64" in ptx
    assert "fma.rn.f64" not in ptx
