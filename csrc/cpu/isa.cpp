#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace vqk {
namespace {

struct Isa {
  const Kernels* kernels;
  bool supported;
};

#ifdef VQK_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
#endif

// best first
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#ifdef VQK_HAS_AVX512_VNNI
      {&avx512_vnni::kernels, has_avx512() && __builtin_cpu_supports("avx512vnni")},
#endif
#ifdef VQK_HAS_AVX512
      {&avx512::kernels, has_avx512()},
#endif
#ifdef VQK_HAS_AVX2
      {&avx2::kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
      {&portable::kernels, true},
  };
  return all;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "'" : ", '") + name + "'";
  return text;
}

const Kernels* choose(const std::string& name, const std::string& who) {
  for (const Isa& isa : isas()) {
    if (name != "auto" && name != isa.kernels->name) continue;
    if (isa.supported) return isa.kernels;
    if (name != "auto")
      throw std::invalid_argument(who + ": name must be an instruction set of this CPU; got '" + name +
                                  "'. Choose 'auto' or one of " + join(isas_supported()) + ".");
  }
  throw std::invalid_argument(who + ": name must be 'auto' or one of " + join(isas_built()) + "; got '" +
                              name + "'. Choose one of these.");
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> kernels{[] {
    const char* wanted = std::getenv("VQKERNELS_ISA");
    return choose(wanted && *wanted ? wanted : "auto", "VQKERNELS_ISA");
  }()};
  return kernels;
}

}  // namespace

std::vector<std::string> isas_built() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.kernels->name);
  return names;
}

std::vector<std::string> isas_supported() {
  std::vector<std::string> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.kernels->name);
  return names;
}

void set_isa(const std::string& name) { active() = choose(name, "set_isa"); }

const Kernels& kernels() { return *active(); }

}  // namespace vqk
