// Words and normals as they are, for tests and for the dither of SF-DiVeQ.
#include "../kernels.h"
#include "noise.h"

namespace vqk {
namespace {

void rows(uint64_t seed, uint64_t row, uint32_t stream, int64_t rows, int64_t blocks, int64_t* words,
          float* normals) {
  const Keys keys = keys_of(seed);
  Counter at = counter(row, blocks);
  float n[4 * kBlocks];
  const int64_t count = rows * blocks;
  for (int64_t first = 0; first < count; first += kBlocks, advance(at)) {
    LaneWords w;
    philox<1>(&at.block, &at.row, stream, keys, &w);
    box_muller(w, n);
    alignas(64) uint64_t some[4][kBlocks];
    memcpy(some, &w, sizeof some);
    for (int b = 0; b < kBlocks && first + b < count; ++b) {
      const int lane = b < kBlocks / 2 ? 2 * b : 2 * b + 1 - kBlocks;
      for (int q = 0; q < 4; ++q) words[4 * (first + b) + q] = (int64_t)(some[q][lane] & kWord);
      memcpy(normals + 4 * (first + b), n + 4 * b, 4 * sizeof(float));
    }
  }
}

}  // namespace

namespace VQK_ISA {
extern const PhiloxKernels philox;
const PhiloxKernels philox = {rows};
}  // namespace VQK_ISA

}  // namespace vqk
