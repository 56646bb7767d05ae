// Op schemas and CPU bodies for torch's dispatcher, and the module vqkernels._C with the facts of this build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa.h"
#include "cpu/ops.h"
#include "cpu/peaks.h"

#define VQK_DIRECTIONAL_ARGUMENTS                                              \
  "Tensor x, Tensor codebook, Tensor indices, Tensor? position, Tensor seed, " \
  "int direction, float noise_std, SymInt row_offset"

STABLE_TORCH_LIBRARY(vqkernels, m) {
  m.def(
      "nearest_code(Tensor x, Tensor codebook, Tensor? dither, bool exact, Tensor[] parts) -> (Tensor, "
      "Tensor)");
  m.def("prepare_codes(Tensor codebook, ScalarType x_dtype) -> Tensor[]");
  m.def("nearest_segment(Tensor x, Tensor codebook) -> (Tensor, Tensor, Tensor)");
  m.def("directional(" VQK_DIRECTIONAL_ARGUMENTS ") -> Tensor");
  m.def("directional_backward(Tensor grad, " VQK_DIRECTIONAL_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("straight_through(Tensor x, Tensor codebook, Tensor indices) -> (Tensor, Tensor, Tensor)");
  m.def(
      "straight_through_backward(Tensor grad, Tensor pull, Tensor x, Tensor codebook, Tensor indices, "
      "bool rotation, float commitment, float codebook_weight, float sync, bool need_x, bool need_codebook) "
      "-> (Tensor, Tensor)");
  m.def("code_sums(Tensor x, Tensor indices, SymInt num_codes) -> (Tensor, Tensor)");
  m.def("philox(Tensor seed, SymInt rows, SymInt blocks, int stream, SymInt row_offset) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(vqkernels, CPU, m) {
  m.impl("nearest_code", TORCH_BOX(&vqk::cpu::nearest_code));
  m.impl("prepare_codes", TORCH_BOX(&vqk::cpu::prepare_codes));
  m.impl("nearest_segment", TORCH_BOX(&vqk::cpu::nearest_segment));
  m.impl("directional", TORCH_BOX(&vqk::cpu::directional));
  m.impl("directional_backward", TORCH_BOX(&vqk::cpu::directional_backward));
  m.impl("straight_through", TORCH_BOX(&vqk::cpu::straight_through));
  m.impl("straight_through_backward", TORCH_BOX(&vqk::cpu::straight_through_backward));
  m.impl("code_sums", TORCH_BOX(&vqk::cpu::code_sums));
  m.impl("philox", TORCH_BOX(&vqk::cpu::philox));
}

namespace {

pybind11::dict facts() {
  pybind11::dict facts;
  facts["version"] = VQK_VERSION;
  facts["compiler"] = VQK_COMPILER;
  facts["isas_built"] = vqk::isas_built();
  facts["isas_supported"] = vqk::isas_supported();
  facts["isa"] = vqk::kernels().name;
  facts["cuda_archs"] = pybind11::list(pybind11::str(VQK_CUDA_ARCHS).attr("split")());
  facts["torch_target"] = VQK_TORCH_TARGET;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("facts", &facts, "What this build is: version, compiler, instruction sets, CUDA architectures.");
  m.def("set_isa", &vqk::set_isa, pybind11::arg("name"),
        "Force the instruction set of the CPU bodies, or \"auto\".");
  m.def("peaks", &vqk::cpu::peaks, pybind11::arg("seconds"),
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Operations per second of products in registers, by kind.");
}
