// The table of one instruction set.
#include "../kernels.h"

namespace vqk {
namespace VQK_ISA {

extern const NearestCodeKernels nearest_code;
extern const NearestSegmentKernels nearest_segment;
extern const DirectionalKernels directional;
extern const StraightThroughKernels straight_through;
extern const CodeSumsKernels code_sums;
extern const PhiloxKernels philox;
extern const PeakKernels peaks;

#define VQK_NAME_OF(isa) #isa
#define VQK_NAME(isa) VQK_NAME_OF(isa)
const Kernels kernels = {VQK_NAME(VQK_ISA), &nearest_code, &nearest_segment, &directional,
                         &straight_through, &code_sums,    &philox,          &peaks};

}  // namespace VQK_ISA
}  // namespace vqk
