"""Every Triton kernel, in the forms its launcher uses, compiled for GPUs that need not be here."""

import importlib
import os

import pytest

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("triton has no compiler in a process that interprets", allow_module_level=True)

import aot

MODULES = ("nearest_code", "directional", "directional_backward", "code_sums", "philox")
ARCHS = (80, 90, 100)
FORMS = [
    form for name in MODULES for form in importlib.import_module(f"vqkernels.kernels.{name}").configurations()
]
CASES = [(form, arch) for form in FORMS for arch in ARCHS]

# the default run: each form for one arch in turn, and the hungriest for all
HUNGRY = ("nearest_code_search_bf16_bf16_d128", "nearest_code_search_fp32_fp32_d32_loop")
CHOSEN = [
    (form, arch)
    for number, form in enumerate(FORMS)
    for turn, arch in enumerate(ARCHS)
    if number % len(ARCHS) == turn or form.name in HUNGRY
]


def case(form, arch):
    marks = () if (form, arch) in CHOSEN else pytest.mark.slow
    return pytest.param(form, arch, id=f"{form.name}-sm_{arch}", marks=marks)


def find(name):
    return next(form for form in FORMS if form.name == name)


@pytest.mark.parametrize(("form", "arch"), [case(*each) for each in CASES])
def test_a_kernel_fits_without_spilling(form, arch):
    usage = aot.compile_for(form, arch)
    assert (usage.stack, usage.local) == (0, 0)
    assert usage.shared <= aot.SHARED_LIMIT[arch]


def test_the_default_run_is_small_and_leaves_no_form_out():
    assert len(CHOSEN) <= 40
    assert {form.name for form, _ in CHOSEN} == {form.name for form in FORMS}
    assert len({form.name for form in FORMS}) == len(FORMS)


def test_halves_are_multiplied_by_tensor_cores_and_float32_is_not_rounded_for_them():
    assert "mma" in aot.compile_for(find("nearest_code_search_bf16_bf16_d64"), 90).ptx
    assert "tf32" not in aot.compile_for(find("nearest_code_search_fp32_fp32_d16"), 90).ptx


@pytest.mark.parametrize(
    "name", ["rescue_fp32_fp64", "finish_fp32_fp32_exact_dithered", "prepare_fp32_dithered"]
)
def test_the_arithmetic_of_the_contract_is_not_fused(name):
    usage = aot.compile_for(find(f"nearest_code_{name}"), 90)
    assert "fma.rn.f64" not in usage.ptx
    assert "mul" in usage.ptx
    # a square root is made of fused steps, the rescue has none
    if name.startswith("rescue"):
        code = aot.machine_code(usage.cubin)
        assert "DMUL" in code
        assert "DFMA" not in code


def test_normals_are_made_of_an_accurate_logarithm():
    # the fast one is off by 2^-11 in the radius where its argument is close to 1
    assert "lg2.approx" not in aot.compile_for(find("philox_stream2"), 90).ptx
