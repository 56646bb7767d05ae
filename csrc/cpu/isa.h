// Which of the compiled instruction sets runs.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace vqk {

std::vector<std::string> isas_built();
std::vector<std::string> isas_supported();
// throws std::invalid_argument with one sentence
void set_isa(const std::string& name);
// the table in use; the first call reads VQKERNELS_ISA
const Kernels& kernels();

}  // namespace vqk
