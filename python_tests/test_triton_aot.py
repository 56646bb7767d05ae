"""Every Triton kernel, in the forms its launcher uses, compiled for GPUs that need not be here, and its budget."""

import importlib
import os
from importlib.metadata import version

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton has no compiler in a process that interprets", allow_module_level=True)
if not version("triton").startswith("3.9."):
    pytest.skip("the budgets are those of triton 3.9", allow_module_level=True)

import aot
import sass

from vqkernels.kernels import nearest_code

MODULES = ("nearest_code", "nearest_segment", "directional", "directional_backward", "straight_through",
           "straight_through_backward", "code_sums", "philox")  # fmt: skip
ARCHS = (80, 90, 100)
FORMS = [
    form for name in MODULES for form in importlib.import_module(f"vqkernels.kernels.{name}").configurations()
]
CASES = [(form, arch) for form in FORMS for arch in ARCHS]
SEARCHES = [(form, shape, arch) for arch in ARCHS for form, shape in nearest_code.searches(arch)]

# the default run: each form of the search and three of seven of the rest for one arch in turn, and these searches
CHOSEN = [
    (form, arch)
    for number, form in enumerate(FORMS)
    for turn, arch in enumerate(ARCHS)
    if number % len(ARCHS) == turn and (form.name.startswith("nearest_code") or number % 7 in (1, 3, 5))
]
CHOSEN_SEARCHES = {
    90: ("bf16_bf16_d64_128x128_g4", "bf16_bf16_d64_128x128_g8", "fp32_fp16_scaled_d64_128x64_g4",
         "bf16_bf16_d256_128x128_g4", "bf16_bf16_d256_128x128_g4_packed", "fp16_fp16_scaled_dloop_128x128_g4_packed",
         "bf16_bf16_dloop_128x256_g4", "bf16_bf16_d64_128x128_g8_fast"),
    80: ("bf16_bf16_d64_128x64_g8", "fp32_fp16_scaled_d128_128x64_g8", "bf16_bf16_dloop_128x128_g4_packed"),
    100: ("bf16_bf16_d64_128x128_g8", "bf16_bf16_d256_128x128_g4_parts"),
}  # fmt: skip

# instructions per (row, code) in the main loop: on the ALU, which does 64 a clock, and issued, of which 128 a clock;
# beside them flash-kmeans 0.3 at D = 64 (tl.min and tl.argmin of every tile), by the same count
#   kind of search                sm_80          sm_90          sm_100         flash-kmeans (sm_90)
BUDGETS = {
    "group of 8 or more":       {80: (1.8, 6.4), 90: (1.6, 4.4), 100: (1.6, 5.2)},  # 6.75, 9.75
    "group of 8 or more, wide": {80: (2.1, 10.7), 90: (1.65, 5.3), 100: (2.2, 6.5)},
    "smaller group":            {80: (2.5, 11.0), 90: (2.3, 5.8), 100: (2.3, 6.0)},
    "packed":                   {80: (4.8, 13.2), 90: (5.4, 9.1), 100: (5.4, 9.4)},
    "group of 8 or more, fast": {80: (1.5, 5.0), 90: (1.3, 3.1), 100: (1.3, 3.9)},
    "smaller group, fast":      {80: (1.7, 5.0), 90: (1.7, 3.7), 100: (1.7, 4.6)},
    "packed, fast":             {80: (3.5, 12.0), 90: (3.5, 7.1), 100: (3.5, 8.5)},
}  # fmt: skip
# the first bytes of the register file: 64 Ki registers a multiprocessor
REGISTERS = 65536


def case(form, arch):
    marks = () if (form, arch) in CHOSEN else pytest.mark.slow
    return pytest.param(form, arch, id=f"{form.name}-sm_{arch}", marks=marks)


def search_case(form, shape, arch):
    short = form.name.removeprefix("nearest_code_search_")
    marks = () if short in CHOSEN_SEARCHES[arch] else pytest.mark.slow
    return pytest.param(form, shape, arch, id=f"{short}-sm_{arch}", marks=marks)


def find(name):
    return next(form for form in (*FORMS, *(form for form, _, _ in SEARCHES)) if form.name == name)


def kind(form, shape):
    """The line of the budget that a search belongs to."""
    fast = "" if form.constants["CERTIFIED"] else ", fast"
    if shape.packed:
        return "packed" + fast
    if shape.group < 8:
        return "smaller group" + fast
    # eight warps share a tile of 64 codes or a row of 256 features: addresses weigh more
    return "group of 8 or more" + (fast or (", wide" if form.constants["BLOCK_D"] == 256 else ""))


@pytest.mark.parametrize(("form", "arch"), [case(*each) for each in CASES])
def test_a_kernel_fits_without_spilling(form, arch):
    usage = aot.compile_for(form, arch)
    assert (usage.stack, usage.local) == (0, 0)
    assert usage.shared <= aot.SHARED_LIMIT[arch]


@pytest.mark.parametrize(("form", "shape", "arch"), [search_case(*each) for each in SEARCHES])
def test_a_search_keeps_its_budget(form, shape, arch):
    usage = aot.compile_for(form, arch)
    assert (usage.stack, usage.local) == (0, 0)
    assert usage.shared <= aot.SHARED_LIMIT[arch]
    # four warps: two programs share a multiprocessor, so that one compares while the other multiplies
    programs = 2 if shape.warps == 4 else 1
    assert usage.registers * shape.warps * 32 * programs <= REGISTERS
    code = aot.machine_code(usage.cubin)
    matrix = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
    assert matrix in code
    loop = sass.main_loop(code)
    elements = shape.block_n * shape.block_k / (shape.warps * 32)
    alu, issued = BUDGETS[kind(form, shape)][arch]
    assert loop.alu / elements <= alu
    assert loop.issued / elements <= issued
    # what leaves the registers in the loop would cost more than all of it
    assert loop.total("LDL", "STL", "SHFL") == 0


def test_the_default_run_is_small_and_every_form_has_a_name():
    chosen = sum(
        form.name.removeprefix("nearest_code_search_") in CHOSEN_SEARCHES[arch] for form, _, arch in SEARCHES
    )
    assert chosen == sum(map(len, CHOSEN_SEARCHES.values()))
    # two tests below compile three more
    assert len(CHOSEN) + chosen + 3 <= 60
    assert len({form.name for form in FORMS}) == len(FORMS)
    assert {kind(form, shape) for form, shape, _ in SEARCHES} == set(BUDGETS)


def test_a_loop_is_found_by_its_flow_and_not_by_its_text():
    """Waits that are tried again stand behind the code and branch back into the loop."""
    text = """
        /*0000*/ MOV R1, R2 ;
    .L_x_1:
        /*0010*/ HMMA.16816.F32 R4, R5, R6, R4 ;
        /*0020*/ @!P0 BRA `(.L_x_3) ;
    .L_x_2:
        /*0030*/ FMNMX R4, R4, R5, PT ;
        /*0040*/ @P1 BRA `(.L_x_1) ;
        /*0050*/ SHFL.BFLY PT, R4, R4, 1, 0x1f ;
        /*0060*/ EXIT ;
    .L_x_3:
        /*0070*/ NOP ;
        /*0080*/ BRA.U !UP0, `(.L_x_3) ;
        /*0090*/ BRA `(.L_x_2) ;
    """
    loop = sass.main_loop(text)
    assert loop.counts == {"HMMA": 1, "BRA": 4, "FMNMX": 1, "NOP": 1}
    assert (loop.alu, loop.matrix) == (1, 1)
    with pytest.raises(ValueError, match="matrix"):
        sass.main_loop("/*0000*/ EXIT ;")


@pytest.mark.parametrize(
    "name", ["settle_bf16_bf16", "finish_fp32_fp32_d256_of8x32_exact", "prepare_bf16_fp32_dithered"]
)
def test_the_arithmetic_of_the_contract_is_not_fused(name):
    usage = aot.compile_for(find(f"nearest_code_{name}"), 90)
    assert "fma.rn.f64" not in usage.ptx
    assert "mul" in usage.ptx
    # a square root is made of fused steps, the settlement has none
    if name.startswith("settle"):
        code = aot.machine_code(usage.cubin)
        assert "DMUL" in code
        assert "DFMA" not in code


def test_normals_are_made_of_an_accurate_logarithm():
    # the fast one is off by 2^-11 in the radius where its argument is close to 1
    assert "lg2.approx" not in aot.compile_for(find("philox_stream2"), 90).ptx
