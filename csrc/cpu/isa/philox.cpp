// Words and normals as they are, for tests and for the dither of SF-DiVeQ.
#include "../kernels.h"
#include "noise.h"

namespace vqk {
namespace {

void row(uint64_t seed, uint64_t row, uint32_t stream, int64_t blocks, int64_t* words, float* normals) {
  uint32_t w[4][kBlocks];
  float n[kNoise];
  for (int64_t first = 0; first < blocks; first += kBlocks) {
    words16((uint32_t)first, row, stream, seed, w);
    normals16(w, n);
    const int64_t count = blocks - first < kBlocks ? blocks - first : kBlocks;
    for (int64_t b = 0; b < count; ++b)
      for (int q = 0; q < 4; ++q) {
        words[4 * (first + b) + q] = w[q][b];
        normals[4 * (first + b) + q] = n[4 * b + q];
      }
  }
}

}  // namespace

namespace VQK_ISA {
extern const PhiloxKernels philox;
const PhiloxKernels philox = {row};
}  // namespace VQK_ISA

}  // namespace vqk
